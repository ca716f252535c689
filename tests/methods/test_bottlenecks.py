"""The adapters before LoRA: their formulas, their placements, and that they are not merged."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import IN, OUT, Problem, close, perturb

FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
NAMES = ["houlsby", "pfeiffer", "parallel"]


def small(name: str, **kwargs: Any) -> lk.Method:
    size = {"reduction_factor": 2} if name == "pfeiffer" else {"bottleneck": 3}
    return lk.METHODS[name](**size, **kwargs)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("name", ["houlsby", "pfeiffer"])
def test_serial(name: str, activation: str) -> None:
    p = Problem(small(name, activation=activation))
    perturb(p.adapter)
    a = p.adapter
    m = {"houlsby": 3, "pfeiffer": 4}[name]
    assert (a.down.shape, a.up.shape) == ((m, OUT), (OUT, m))
    y = p.base(p.x)
    close(p.model(p.x), y + FUNCTIONS[activation](y @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_parallel(activation: str, scale: float) -> None:
    p = Problem(small("parallel", activation=activation, scale=scale))
    perturb(p.adapter)
    a = p.adapter
    assert (a.down.shape, a.up.shape) == ((3, IN), (OUT, 3))
    branch = FUNCTIONS[activation](p.x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
    close(p.model(p.x), p.base(p.x) + scale * branch)


@pytest.mark.parametrize("name", NAMES)
def test_start(name: str) -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(4000, 2000)), lk.METHODS[name]())
    ((_, _, a),) = lk.adapters(model)
    std = math.sqrt(1 / 3 / 4000) if name == "parallel" else 0.01 * 0.8796  # cut at two standard deviations
    assert float(a.down.detach().std()) == pytest.approx(std, rel=0.02)
    assert not any(p.any() for p in (a.down_bias, a.up, a.up_bias))
    assert len(a.down) == {"houlsby": 64, "pfeiffer": 125, "parallel": 512}[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_moves_only_the_way_up(name: str) -> None:
    p = Problem(small(name)).backward()
    assert not p.adapter.down.grad.any()
    assert not p.adapter.down_bias.grad.any()
    scale = float(p.adapter.scale) if name == "parallel" else 1.0
    close(p.adapter.up_bias.grad, scale * (p.base(p.x) - p.y).detach().sum(0))


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_refused_with_the_reason(name: str) -> None:
    p = Problem(small(name))
    assert not p.adapter.mergeable()
    with pytest.raises(UsageError, match="cannot be merged") as refusal:
        lk.merge(p.model)
    assert "nonlinearity" in str(refusal.value.why)


def bert() -> nn.Module:
    return BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
    )


def llama() -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    return LlamaModel(LlamaConfig(**sizes))


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64))


@pytest.mark.parametrize(
    ("name", "make", "targets", "exclude", "per_block"),
    [
        ("houlsby", bert, ["attention.output.dense", "output.dense"], None, 2),
        ("houlsby", llama, ["o_proj", "down_proj"], None, 2),
        ("houlsby", gpt2, ["attn.c_proj", "mlp.c_proj"], None, 2),
        ("pfeiffer", bert, ["output.dense"], ["attention.output.dense"], 1),
        ("pfeiffer", llama, ["down_proj"], None, 1),
        ("pfeiffer", gpt2, ["mlp.c_proj"], None, 1),
        ("parallel", bert, ["intermediate.dense"], None, 1),
        ("parallel", llama, ["up_proj"], None, 1),
        ("parallel", gpt2, ["mlp.c_fc"], None, 1),
    ],
)
def test_the_placements_of_the_module_docstrings(
    name: str, make: Callable[[], nn.Module], targets: Sequence[str], exclude: Sequence[str] | None, per_block: int
) -> None:
    doc = str(lk.METHODS.module(name).__doc__)
    assert all(f'"{target}"' in doc for target in [*targets, *(exclude or ())])
    model = lk.attach(make(), small(name), target_modules=targets, exclude_modules=exclude)
    found = [path for path, _, _ in lk.adapters(model)]
    assert len(found) == 2 * per_block
    if name != "parallel":  # back at the model's width
        assert all(a.up.shape[0] == 32 for _, _, a in lk.adapters(model))


def test_norms_are_trained_beside_houlsbys_adapters() -> None:
    doc = str(lk.METHODS.module("houlsby").__doc__)
    for make, norms in (
        (bert, ["LayerNorm"]),
        (llama, ["input_layernorm", "post_attention_layernorm"]),
        (gpt2, ["ln_1", "ln_2"]),
    ):
        assert all(f'"{norm}"' in doc for norm in norms)
        model = lk.attach(make(), small("houlsby"), target_modules="all-linear", modules_to_save=norms)
        trained = {path for path, _, a in lk.adapters(model) if not isinstance(a, lk.AbstractAdapter)}
        assert trained == {path for path, _ in model.named_modules() if path.rpartition(".")[2] in norms}


@pytest.mark.parametrize("bad", [{"activation": "tanh"}, {"bottleneck": 0}])
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        lk.METHODS["houlsby"](**bad)
