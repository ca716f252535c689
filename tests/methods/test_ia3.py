"""IA3 on outputs and on inputs: closed forms, which layers are which, PEFT's directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import FileError, UsageError

from .problem import IN, OUT, Problem, close, perturb

IA3 = lk.METHODS["ia3"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def problem(*, inputs: bool) -> Problem:
    return Problem(IA3(feedforward_modules=("0",) if inputs else ()))


def test_the_output_is_scaled_with_its_bias() -> None:
    p = problem(inputs=False)
    assert torch.equal(p.model(p.x), p.base(p.x))
    perturb(p.adapter)
    gain = p.adapter.ia3_l.detach()
    assert gain.shape == (OUT, 1)
    close(p.merged, torch.diag(gain[:, 0]) @ p.W)
    close(p.model(p.x).detach(), p.base(p.x).detach() * gain[:, 0])
    p.backward()
    close(p.adapter.ia3_l.grad[:, 0], (p.error() * p.base(p.x).detach()).sum(0))


def test_the_input_is_scaled_and_the_bias_is_not() -> None:
    p = problem(inputs=True)
    assert torch.equal(p.model(p.x), p.base(p.x))
    perturb(p.adapter)
    gain = p.adapter.ia3_l.detach()
    assert gain.shape == (1, IN)
    close(p.merged, p.W @ torch.diag(gain[0]))
    close(p.model(p.x).detach(), p.base(p.x * gain[0]).detach())
    p.backward()
    close(p.adapter.ia3_l.grad[0], (p.gradient() * p.W).sum(0))


def test_the_first_step() -> None:
    for inputs in (True, False):
        p = problem(inputs=inputs).backward()
        G, error = p.gradient(), p.error()
        torch.optim.SGD(p.parameters(), lr=1e-3).step()
        moved = (G * p.W).sum(0, keepdim=True) if inputs else (error * p.base(p.x)).sum(0)[:, None].detach()
        close(p.delta, -1e-3 * p.W * moved)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(3, 5, 12)),
    "conv1d_gpt2": (lambda: Conv1D(20, 12), lambda: torch.randn(3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, padding_mode="reflect"), lambda: torch.randn(2, 6, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), lambda: torch.randn(2, 4, 5, 6, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_law_for_inputs(layer: str, dtype: torch.dtype) -> None:
    """The law of every method (`tests/core/test_contract.py`), for the way that its layers do not get there."""
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).to(dtype), inputs().to(dtype)
    base = model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lk.attach(model, IA3(feedforward_modules=["0"]), target_modules=["0"])
    assert torch.equal(model(x), base)
    perturb(model[0].adapters)
    y = model(x)
    assert (y - base).norm() > 0.01 * base.norm()
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(lk.merge(model)(x), y, rtol=tolerance, atol=tolerance)
    lk.unmerge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_the_input_of_one_part_of_a_fused_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30)).double()
    fused = {"0": {"q": 10, "k": 10, "v": 10}}
    base = model[0].weight.detach().clone()
    lk.attach(model, IA3(feedforward_modules=["0.k"]), target_modules=["0.k", "0.v"], fused=fused)
    ((_, _, a),) = lk.adapters(model)
    assert {name: tuple(part.ia3_l.shape) for name, part in a.parts.items()} == {"k": (1, 12), "v": (10, 1)}
    perturb(a)
    x = torch.randn(4, 12).double()
    W = torch.cat([base[:10], base[10:20] * a.parts["k"].ia3_l, base[20:] * a.parts["v"].ia3_l]).detach()
    gains = torch.cat([torch.ones(20).double(), a.parts["v"].ia3_l[:, 0]]).detach()
    close(model(x).detach(), (x @ W.T + gains * model[0].bias).detach())


def test_the_input_of_an_embedding_is_refused() -> None:
    with pytest.raises(UsageError, match="input of an embedding"):
        lk.attach(nn.Sequential(nn.Embedding(9, 4)), IA3(feedforward_modules=["0"]), target_modules=["0"])


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return BertModel(BertConfig(**sizes, num_attention_heads=4)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    ).eval()


def on_input(model: nn.Module) -> set[str]:
    return {path for path, _, adapter in lk.adapters(model) if adapter.selected}


KNOWN: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "llama": (llama, ["k_proj", "v_proj", "down_proj"], "model.layers.{}.mlp.down_proj"),
    "bert": (bert, ["key", "value", "output.dense"], "encoder.layer.{}.output.dense"),
    "gpt2": (gpt2, ["c_attn.k", "c_attn.v", "mlp.c_proj"], "transformer.h.{}.mlp.c_proj"),
}


@pytest.mark.parametrize("case", KNOWN)
def test_the_second_layers_of_common_models_are_known(case: str) -> None:
    make, targets, path = KNOWN[case]
    model = lk.attach(make(), IA3(), target_modules=targets)
    assert on_input(model) == {path.format(0), path.format(1)}


def test_which_layers_are_feedforward_can_be_said() -> None:
    targets = ["k_proj", "v_proj", "down_proj"]
    for said, expected in {
        (): set(),
        ("layers.1.mlp.down_proj",): {"model.layers.1.mlp.down_proj"},
        r".*0\.(mlp|self_attn)\.(down|k)_proj": {"model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj"},
    }.items():
        assert on_input(lk.attach(llama(), IA3(feedforward_modules=said), target_modules=targets)) == expected


@pytest.mark.parametrize("said", [["up_proj"], "nothing.*", ["down_proj", "typo"]])
def test_a_name_that_is_no_target_is_an_error(said: Any) -> None:
    model = llama()
    with pytest.raises(UsageError, match="feedforward_modules"):
        lk.attach(model, IA3(feedforward_modules=said), target_modules=["k_proj", "down_proj"])
    assert lk.names(model) == []


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(torch.arange(3, 12)[None])
    return out.logits if "logits" in out else out.last_hidden_state


# feedforward_modules here -> what the directory says, with targets as PEFT finds them; PEFT wants the former among these
SAID: dict[Any, tuple[list[str], set[str]]] = {
    None: (["down_proj"], {"k_proj", "v_proj", "down_proj"}),
    (): ([], {"k_proj", "v_proj", "down_proj"}),
    ("v_proj", "down_proj"): (["down_proj", "v_proj"], {"k_proj", "v_proj", "down_proj"}),
    r".*1\.mlp\.down_proj": (["model.layers.1.mlp.down_proj"], set()),
}


@pytest.mark.parametrize("said", SAID)
def test_peft_scales_the_same_sides(said: Any, tmp_path: Path) -> None:
    model = lk.attach(llama(), IA3(feedforward_modules=said), target_modules=["k_proj", "v_proj", "down_proj"])
    perturb(nn.ModuleList(a for _, _, a in lk.adapters(model)))
    lk.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    written, targets = SAID[said]
    assert config["feedforward_modules"] == written
    assert set(config["target_modules"]) == (targets or {path for path, _, _ in lk.adapters(model)})
    assert torch.equal(output(peft.PeftModel.from_pretrained(llama(), str(tmp_path / "a")).eval()), output(model))
    again = lk.load(llama(), tmp_path / "a")
    assert torch.equal(output(again), output(model))
    assert on_input(again) == on_input(model)
    lk.save(again, tmp_path / "b")
    assert all((tmp_path / "b" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_pefts_own_choice_of_layers_is_read(case: str, tmp_path: Path) -> None:
    """PEFT's lists for a known model, which for BERT end like the attention's output too."""
    make = KNOWN[case][0]
    theirs = peft.get_peft_model(make(), peft.IA3Config()).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    model = lk.load(make(), tmp_path)
    assert on_input(model) and on_input(model) != {path for path, _, _ in lk.adapters(model)}
    assert torch.equal(output(model), output(theirs))


def test_a_directory_with_a_name_that_is_no_target_is_refused(tmp_path: Path) -> None:
    lk.save(lk.attach(llama(), IA3(), target_modules=["k_proj", "down_proj"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "feedforward_modules": ["up_proj"]}))
    with pytest.raises(FileError, match="feedforward_modules"):
        lk.load(llama(), tmp_path)


@pytest.mark.parametrize("bad", [[""], [3]])
def test_impossible_settings_are_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="feedforward_modules"):
        IA3(feedforward_modules=bad)
