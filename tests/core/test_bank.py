"""A bank: every row of a batch is the run of its own adapter alone, and neither routing nor loading compiles anything anew."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import FileError, UsageError
from lorakit.models.generate import generate
from lorakit.models.packing import enable_packing

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}  # of a whole model; a layer is tested more closely


class Net(nn.Module):
    """An embedding and layers that see (B, T, n) and (B, n); one is a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12, padding_idx=3)
        self.up, self.fused, self.down = nn.Linear(12, 24), Conv1D(30, 24), nn.Linear(30, 12, bias=False)
        self.answer = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.fused(torch.tanh(self.up(self.embed(ids)))))
        return self.answer(torch.tanh(self.down(x)).mean(1))


LAYERS = ["embed", "up", "fused", "down", "answer"]
ADAPTERS: dict[str, tuple[lk.Method, dict[str, Any]]] = {
    "two": (lk.LoRA(r=2, dropout=0.3), {"target_modules": LAYERS}),
    "four": (lk.LoRA(r=4, alpha=3, rank_stabilized=True), {"target_modules": ["up", "down", "answer"]}),
    "fa": (lk.LoRAFA(r=3), {"target_modules": ["up", "answer"], "rank_pattern": {"up": 6}}),
    "pissa": (lk.LoRA(r=2, init="pissa", dropout=0.1), {"target_modules": ["up", "down"]}),
    "xs": (lk.LoRAXS(r=3), {"target_modules": ["down", "answer"]}),
    "parts": (
        lk.LoRA(r=2),
        {"target_modules": ["fused.q", "fused.v"], "fused": {"fused": {"q": 10, "k": 10, "v": 10}}},
    ),
}  # fmt: skip


@torch.no_grad()
def fill(model: nn.Module, name: str) -> None:
    torch.manual_seed(len(name))
    for _, _, adapter in lk.adapters(model, name):
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))


def adapted(dtype: torch.dtype = torch.float32, names: Sequence[str] = tuple(ADAPTERS)) -> nn.Module:
    torch.manual_seed(0)
    model = Net().to(dtype)
    for name in names:
        method, where = ADAPTERS[name]
        lk.attach(model, method, **where, name=name)
        fill(model, name)
    return model.eval()


def ids(rows: int = 9) -> Tensor:
    return torch.randint(40, (rows, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def alone(model: nn.Module, routing: Sequence[str | None], x: Tensor) -> Tensor:
    """Each row from a run of the whole batch under its own adapter."""
    rows = {name: lk.use(model, name)(x) for name in dict.fromkeys(routing)}
    return torch.stack([rows[name][i] for i, name in enumerate(routing)])


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= TOLERANCE[a.dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_row_is_the_run_of_its_own_adapter(dtype: torch.dtype) -> None:
    model, x, routing = adapted(dtype), ids(), ["two", None, "four", "fa", "pissa", None, "xs", "parts", "two"]
    expected = alone(model, routing, x)
    assert len({tuple(row.tolist()) for row in expected}) == len(routing), "the adapters must differ"
    bank = lk.bank(model, list(ADAPTERS)).route(routing)
    with torch.no_grad():
        y = model(x)
        close(y, expected)
        with lk.disabled(model):
            base = model(x)
        nothing = [i for i, name in enumerate(routing) if name is None]
        assert torch.equal(y[nothing], base[nothing])
        for name in (*ADAPTERS, None):  # one for all rows
            bank.route(name)
            close(model(x), alone(model, [name] * len(x), x))
            lk.use(model, "bank")
        for name in ADAPTERS:
            lk.detach(model, name)
        close(bank.route(routing) and model(x), expected)


def test_in_bfloat16_a_routed_row_is_no_further_from_the_truth_than_the_run_alone() -> None:
    model, x, routing = adapted(torch.bfloat16), ids(), ["two", None, "four", "fa", "pissa", None, "xs", "parts", "two"]
    exact = alone(copy.deepcopy(model).double(), routing, x)
    single = alone(model, routing, x)
    lk.bank(model, list(ADAPTERS)).route(routing)
    with torch.no_grad():
        y = model(x)
        assert (y - exact).norm() <= 1.25 * (single - exact).norm() <= 0.02 * exact.norm()
        with lk.disabled(model):
            assert torch.equal(y[[1, 5]], model(x)[[1, 5]])


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_agrees_to_the_last_digits_of_single_precision(layer: str) -> None:
    model = adapted()
    own = {name: [path.partition(".")[0] for path in where["target_modules"]] for name, (_, where) in ADAPTERS.items()}
    routing = [None, *(name for name in ADAPTERS if layer in own[name])]
    one, seen = model.get_submodule(layer), [] if layer == "answer" else [7]
    x = ids(len(routing)) if layer == "embed" else torch.randn(len(routing), *seen, one.weight.shape[layer != "fused"])
    lk.bank(model, list(ADAPTERS)).route(routing)
    with torch.no_grad():
        y = one(x)
        for i, name in enumerate(routing):
            lk.use(model, name)
            assert (one(x)[i] - y[i]).norm() <= 3e-7 * y[i].norm()


def test_documents_of_a_packed_row_are_routed_each_by_itself() -> None:
    """A layer of each kind that sees tokens; every document is that of a run with its adapter alone."""
    model, lengths, routing = adapted(torch.float64), [3, 5, 1, 4], ["two", None, "parts", "four"]
    tokens = nn.Sequential(model.embed, model.up, model.fused, model.down)
    x = ids()[:2, :].reshape(1, -1)[:, : sum(lengths)]
    bank = lk.bank(model, list(ADAPTERS)).route(routing, lengths=lengths)
    with torch.no_grad():
        parts = tokens(x).split(lengths, dim=1)
        for name, part, own in zip(routing, parts, x.split(lengths, dim=1), strict=True):
            lk.use(model, name)
            close(part, tokens(own))
        lk.use(model, "bank")
        with pytest.raises(UsageError, match="13 in one row"):
            tokens(x[:, 1:])
        bank.route(None)
        tokens(x[:, 1:])


def test_one_graph_for_all_routings_and_for_what_is_loaded(tmp_path: Path) -> None:
    names, x = ["two", "four", "fa"], ids(4)
    model = adapted(names=names)
    lk.save(model, tmp_path / "xs-like", "four")
    bank = lk.bank(model, names, slots=5)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for routing in (["two", None, "four", "fa"], ["fa", "fa", None, "two"], ["four"] * 4, [None] * 4):
            bank.route(routing)
            close(compiled(x), alone(model, routing, x))
            lk.use(model, "bank")
        before = bank.route(["four", "two", None, "fa"]) and model(x)
        bank.load(tmp_path / "xs-like", "new").put("two", into="fa").route(["new", "fa", None, "two"])
        close(compiled(x), alone(model, ["four", "two", None, "two"], x))
        lk.use(model, "bank")
        assert not torch.equal(compiled(x)[3], before[3])
    assert counter.frame_count == 1


def test_a_slot_is_freed_replaced_and_never_half_written(tmp_path: Path) -> None:
    model, x = adapted(names=["two", "four", "fa"]), ids(2)
    bank = lk.bank(model, ["two"], slots=2, rank=3)
    lk.save(model, tmp_path / "high", "four")
    with torch.no_grad():
        for refused, match in (("four", "higher ranks"), ("fa", "higher ranks")):
            before = bank.route("two") and model(x)
            with pytest.raises(UsageError, match=match):
                bank.put(refused)
            with pytest.raises(UsageError, match=match):
                bank.load(tmp_path / "high", "two")
            assert torch.equal(model(x), before)
            assert (bank.adapters, lk.names(model)) == (["two"], ["two", "bank", "four", "fa"])
        bank.put("two", into="again")
        with pytest.raises(UsageError, match="slots"):
            bank.put("two", into="third")
        bank.drop("two").put("two", into="third").route(["again", "third"])
        close(model(x), before)
        with pytest.raises(UsageError, match="no adapter 'two' in the bank"):
            bank.route("two")
        with pytest.raises(FileError):
            bank.load(tmp_path, "again")
        assert lk.active(model) == "bank"
    lk.detach(model, "bank")
    assert lk.names(model) == ["two", "four", "fa"]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 6, 3)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object], str]] = {
    "dora": (lambda: lk.attach(Net(), lk.DoRA(r=2)), lambda m: lk.bank(m, ["default"]), "merged"),
    "in full": (
        lambda: lk.attach(Net(), lk.LoRA(r=2), target_modules=["up"], modules_to_save=["answer"]),
        lambda m: lk.bank(m, ["default"]),
        "answer in full",
    ),
    "convolution": (
        lambda: lk.attach(Convolution(), lk.LoRA(r=2), target_modules=["layer"]),
        lambda m: lk.bank(m, ["default"]),
        "kernel of its own",
    ),
    "no slots": (lambda: adapted(names=["two", "four"]), lambda m: lk.bank(m, ["two", "four"], slots=1), "slots=2"),
    "nobody": (lambda: adapted(names=["two"]), lambda m: lk.bank(m, ["nobody"]), "nobody"),
    "a name in use": (lambda: adapted(names=["two"]), lambda m: lk.bank(m, ["two"], name="two"), "already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_in_a_bank_is_refused_and_the_model_unchanged(case: str) -> None:
    make, call, match = REFUSED[case]
    model = make()
    before, active = set(model.state_dict()), lk.active(model)
    with pytest.raises(UsageError) as refusal:
        call(model)
    assert match in str(refusal.value)
    assert (set(model.state_dict()), lk.active(model), "bank" in lk.names(model)) == (before, active, False)


def test_a_bank_is_neither_merged_nor_saved_and_wrong_rows_are_refused(tmp_path: Path) -> None:
    model = adapted(names=["two"])
    bank = lk.bank(model, ["two"]).route(["two", None])
    keys = set(model.state_dict())
    assert not any(".bank." in key for key in keys)
    for call in (lambda: lk.merge(model, "bank"), lambda: lk.save(model, tmp_path / "bank", "bank")):
        with pytest.raises(UsageError, match="several adapters"):
            call()
    with pytest.raises(UsageError, match="3 rows, and 2 are routed"):
        model(ids(3))
    with pytest.raises(UsageError, match="one for each document"):
        bank.route(["two"], lengths=[1, 2])


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Two blocks, with a base and adapters strong enough to write different texts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, max_position_embeddings=128, **sizes)).eval()
    for name, r in (("a", 2), ("b", 5)):
        lk.attach(model, lk.LoRA(r=r), name=name)
        fill(model, name)
    return model


def test_generation_gives_each_prompt_its_adapter(llama: LlamaForCausalLM, tiny_tokenizer: Any) -> None:
    """Prompts of different lengths, in batches that `generate` puts together itself."""
    model = copy.deepcopy(llama)
    prompts = ["one", "a longer prompt", "two plus two", "x", "and another one"]
    routing = ["a", None, "b", "a", None]
    settings = {"max_tokens": 6, "batch_size": 2}
    expected = [
        generate(lk.use(model, name), tiny_tokenizer, [p], **settings)[0]
        for name, p in zip(routing, prompts, strict=True)
    ]
    lk.bank(model, ["a", "b"])
    assert generate(model, tiny_tokenizer, prompts, adapters=routing, **settings) == expected
    assert generate(model, tiny_tokenizer, ["x"], **settings) == generate(
        lk.use(model, None), tiny_tokenizer, ["x"], **settings
    )
    lk.use(model, "bank")
    others = generate(model, tiny_tokenizer, prompts, adapters=["b", "a", None, "b", "a"], **settings)
    assert all(a != b for a, b in zip(others, expected, strict=True))
    with pytest.raises(UsageError, match="5 prompts"):
        generate(model, tiny_tokenizer, prompts, adapters=["a"])
    with pytest.raises(UsageError, match="no bank is active"):
        generate(lk.use(model, "a"), tiny_tokenizer, prompts, adapters=routing)


def test_packed_prompts_through_a_model_are_the_runs_alone(llama: LlamaForCausalLM) -> None:
    model = copy.deepcopy(llama)
    assert enable_packing(model)
    lengths, routing = [5, 9, 2], ["b", None, "a"]
    x = torch.randint(260, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    lk.bank(model, ["a", "b"]).route(routing, lengths=lengths)
    with torch.no_grad():
        parts = model(x, position_ids=positions, lengths=lengths, use_cache=False).logits.split(lengths, dim=1)
        for name, part, own in zip(routing, parts, x.split(lengths, dim=1), strict=True):
            expected = lk.use(model, name)(own, use_cache=False).logits
            assert (part - expected).abs().max() <= 1e-5 * expected.abs().max()
