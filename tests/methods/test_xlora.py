"""X-LoRA: any one of its adapters, or none, where the scalings say so; experts from all kinds of adapters; its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.train.config_file import loads
from lorakit.train.progress import Progress
from lorakit.train.run import run

from .problem import Problem, close, perturb

XLoRA = lk.METHODS["xlora"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.down = nn.Embedding(11, 6), nn.Linear(6, 24), nn.Linear(24, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.qkv(self.embed(ids))))))


FUSED = {"qkv": {"q": 8, "k": 8, "v": 8}}
EXPERTS: dict[str, Any] = {
    "narrow": (lk.LoRA(r=2, alpha=3, dropout=0.5), {"target_modules": ["embed", "down"]}),
    "wide": (lk.LoRA(r=3, alpha=4, init="pissa"), {"target_modules": ["down", "head"]}),
    "fused": (lk.LoRA(r=3), {"target_modules": ["qkv.q", "qkv.v"], "fused": FUSED}),
    "adalora": (lk.METHODS["adalora"](init_r=4, target_r=2), {"target_modules": ["qkv"]}),
}
IDS = torch.arange(11).reshape(1, 11)


def model_with(names: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    for name in names:
        method, target = EXPERTS[name]
        lk.attach(model, method, name=name, **target)
        for _, _, adapter in lk.adapters(model, name):
            perturb(adapter)
    return model.double()


def routers(model: nn.Module, scalings: list[float], router: float = 0.0) -> None:
    """The same scalings for every token, or none the same."""
    for _, _, adapter in lk.adapters(model, "mixture"):
        with torch.no_grad():
            adapter.shift.copy_(torch.tensor(scalings))
            adapter.router.normal_(std=router) if router else adapter.router.zero_()


def test_one_hot_is_that_adapter_and_zero_is_the_base() -> None:
    names = list(EXPERTS)
    model = model_with(names).eval()
    alone = {name: lk.use(model, name)(IDS) for name in names}
    base = lk.use(model, None)(IDS)
    lk.mixture(model, names)
    assert torch.equal(model(IDS), base), "it starts at the base, bit for bit"
    for i, name in enumerate(names):
        routers(model, [float(k == i) for k in range(4)])
        assert (alone[name] - base).abs().max() > 0.05
        close(model(IDS), alone[name])
    routers(model, [0.0] * 4)
    assert torch.equal(model(IDS), base)


def test_scalings_are_linear_in_each_token_and_weigh_the_changes() -> None:
    p = Problem(lk.LoRA(r=2))
    perturb(p.adapter)
    lk.attach(p.model, lk.LoRA(r=3, alpha=7), name="second")
    ((_, _, second),) = lk.adapters(p.model, "second")
    perturb(second)
    deltas = [p.adapter.delta_weight().detach(), second.delta_weight().detach()]
    lk.mixture(p.model, ["default", "second"])
    ((_, _, mixed),) = lk.adapters(p.model, "mixture")
    nn.init.normal_(mixed.router), nn.init.normal_(mixed.shift)
    scalings = p.x @ mixed.router.T + mixed.shift
    expected = p.base(p.x) + sum(s[:, None] * (p.x @ delta.T) for s, delta in zip(scalings.T, deltas, strict=True))
    close(p.model(p.x), expected)
    lk.mixture(p.model, ["default", "second"], softmax=True, name="soft")
    close(p.model(p.x), p.base(p.x) + sum(p.x @ delta.T for delta in deltas) / 2)


def test_only_the_routers_learn_and_the_adapters_may_go() -> None:
    model = model_with(["narrow", "wide"])
    lk.mixture(model, ["narrow", "wide"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{path}.adapters.mixture.{n}" for path in ("embed", "down", "head") for n in ("router", "shift")
    }
    routers(model, [0.4, -0.7], 0.2)
    y = model.eval()(IDS)
    lk.detach(model, "narrow"), lk.detach(model, "wide")
    assert torch.equal(model(IDS), y)
    assert lk.names(model) == ["mixture"]
    with pytest.raises(UsageError, match="cannot be merged"):
        lk.merge(model, "mixture")


def test_its_directory_holds_the_experts(tmp_path: Path) -> None:
    model = model_with(list(EXPERTS)).float()
    lk.mixture(model, list(EXPERTS))
    routers(model, [0.3, -0.2, 1.0, 0.5], 0.3)
    lk.save(model, tmp_path, "mixture")
    torch.manual_seed(0)
    again = lk.load(Net(), tmp_path).eval()
    assert torch.equal(again(IDS), model.eval()(IDS))
    method = json.loads((tmp_path / "lorakit.json").read_text())["method"]
    assert method == {"name": "xlora", "adapters": [], "softmax": False, "num_experts": 4, "r": 6}


@pytest.mark.parametrize(
    ("methods", "target", "reason"),
    [
        ([lk.LoRA(r=2)], {}, "at least two different adapters"),
        ([lk.LoRA(r=2), lk.METHODS["dora"](r=2)], {}, "its change is not s B A"),
        ([lk.LoRA(r=2), lk.METHODS["houlsby"]()], {}, "its change is not s B A"),
        ([lk.LoRA(r=2), lk.LoRA(r=2)], {"modules_to_save": ["head"]}, "trains head in full"),
    ],
)
def test_what_cannot_be_mixed_is_refused(methods: list[lk.Method], target: dict[str, Any], reason: str) -> None:
    model = Net()
    for i, method in enumerate(methods):
        lk.attach(model, method, name=f"n{i}", target_modules=["down"], **(target if i else {}))
    before = lk.names(model)
    with pytest.raises(UsageError, match=reason):
        lk.mixture(model, before)
    assert lk.names(model) == before


def test_without_adapters_there_is_nothing_to_start_from() -> None:
    with pytest.raises(UsageError, match=r"lk\.mixture"):
        lk.attach(Net(), XLoRA(), target_modules=["down"])
    with pytest.raises(UsageError, match="at least two"):
        XLoRA(adapters=("one",))


# --- from directories, in a run ---


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)

    def _write(self, text: str) -> None:
        pass


@pytest.fixture
def adapters(tiny_model: Path, tmp_path: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    made = []
    for i, targets in enumerate((["q_proj", "v_proj"], ["v_proj", "down_proj"])):
        model = lk.attach(AutoModelForCausalLM.from_pretrained(tiny_model), lk.LoRA(r=2 + i), target_modules=targets)
        for _, _, adapter in lk.adapters(model):
            perturb(adapter, 0.02)
        made.append(str(lk.save(model, tmp_path / f"expert{i}")))
    return made


@pytest.fixture
def configure(tiny_model: Path, rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    data = rows(12)

    def make(name: str, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "model.name": str(tiny_model), "model.dtype": "float32", "data.path": str(data), "method.name": "xlora",
            "optim.lr": 1e-2, "train.batch_size": 3, "train.max_steps": 4, "train.save_steps": 1,
            "output": str(tmp_path / name),
        }  # fmt: skip
        settings |= {k.replace("__", "."): v for k, v in changes.items()}
        return loads("", [f"{k}={json.dumps(v)}" for k, v in settings.items()])[0]

    return make


def test_a_run_from_directories_resumes_exactly_and_leaves_one_directory(
    configure: Callable[..., Any], adapters: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from lorakit.train import loop

    whole = run(configure("whole", method__adapters=adapters), progress=Silent())
    assert whole.summary.layers == 3 * 3, "q, v and down in each of 3 blocks: the layers that one of them adapts"
    config, real = configure("cut", method__adapters=adapters), loop.update

    class Killed(BaseException):
        pass

    def update(job: Any, state: Any, window: Any) -> Any:
        if state.step == 2:
            raise Killed
        return real(job, state, window)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(Killed):
        run(config, progress=Silent())
    monkeypatch.undo()
    resumed = run(config, progress=Silent())
    assert resumed.resumed_from == 2
    files = [r.adapter / "adapter_model.safetensors" for r in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    texts = (
        "".join(p.read_text() for p in whole.adapter.glob("*adapter*.json"))
        + (whole.adapter / "lorakit.json").read_text()
    )
    assert "expert0" not in texts, "no path of the machine is written"
    again = lk.load(AutoModelForCausalLM.from_pretrained(tiny_model), whole.adapter)
    kept = next(a for p, _, a in lk.adapters(again) if p.endswith("0.self_attn.v_proj"))
    first = lk.load(AutoModelForCausalLM.from_pretrained(tiny_model), adapters[0])
    lora = next(a for p, _, a in lk.adapters(first) if p.endswith("0.self_attn.v_proj"))
    close(kept.lora_B[0] @ kept.lora_A[0], lora.delta_weight(), 1e-6)
    assert kept.router.abs().max() > 0


def test_the_plan_reads_the_adapters_too(configure: Callable[..., Any], adapters: list[str]) -> None:
    from lorakit.cli.planning import make_plan

    made = make_plan(configure("planned", method__adapters=adapters))
    hidden, feed_forward, blocks = 32, 64, 3
    assert made.summary.trainable == blocks * (2 * (2 * hidden + 2) + 2 * feed_forward + 2)


def test_a_configuration_that_contradicts_its_adapters_is_refused(configure: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="mixes trained LoRAs: give their directories"):
        configure("none")
    with pytest.raises(UsageError, match="adapts the layers of its adapters; leave target_modules out"):
        configure("targets", method__adapters=["a", "b"], method__target_modules=["q_proj"])
