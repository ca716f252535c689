"""Recomputing some blocks: the same gradients, less memory with each block more, all of them at the end."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.models.blocks import FastBlock
from lorakit.models.fast import ORDINARY, accelerate
from lorakit.models.memory import estimate
from lorakit.models.modes import checkpoint_activations, recomputable
from lorakit.models.packing import enable_packing

BLOCKS = 5
CONFIG = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_dropout=0.1,
)


def build(device: str = "cpu", **target: Any) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(CONFIG)
    lk.attach(model, lk.LoRA(r=3, dropout=0.2), **target)
    for _, _, adapter in lk.adapters(model):
        for p in adapter.parameters():
            p.data += 0.1
    return model.train()


def flags(model: Any) -> list[bool]:
    return [bool(m.gradient_checkpointing) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def step(model: Any, fast: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # dropout
    ids, rows = torch.arange(20)[None], torch.tensor([2, 7, 15])
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    model.zero_grad()
    fast.loss(model, {"input_ids": ids, "position_ids": positions}, rows, ids[0, rows + 1], lengths=[8, 12]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradients_are_the_same_bit_for_bit(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = build(), []
    assert enable_packing(model)
    fast = accelerate(model) if fused else ORDINARY
    expected = step(model, fast)
    owner, way = (FastBlock, "fused") if fused else (LlamaAttention, "forward")
    own = vars(owner)[way]
    monkeypatch.setattr(owner, way, lambda *a, **k: runs.append(1) or own(*a, **k))
    for count in (0, 1, 3, BLOCKS, True):
        checkpoint_activations(model, count)
        runs.clear()
        found = step(model, fast)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
        assert len(runs) == BLOCKS + (BLOCKS if count is True else count)


@pytest.mark.parametrize("target", [{}, {"last_n_layers": 3}], ids=str)
def test_each_block_more_takes_less_memory(target: dict[str, Any]) -> None:
    model = build("meta", **target)

    def need(count: int) -> Any:
        checkpoint_activations(model, count)
        return estimate(model, rows=4, length=32, runtime=0)

    kept = target.get("last_n_layers", BLOCKS)
    found = [need(count) for count in range(BLOCKS + 1)]
    activations = [one.activations for one in found]
    assert all(a > b for a, b in pairwise(activations[: kept + 1]))
    assert all(a.total >= b.total for a, b in pairwise(found))
    assert found[0].total > found[kept].total
    assert all(a.flops < b.flops for a, b in pairwise(found[: kept + 1]))
    assert found[kept] == found[BLOCKS] == need(True)


def test_the_blocks_counted_are_those_that_keep_something() -> None:
    model = build(last_n_layers=3)
    assert recomputable(model) == list(model.model.layers[2:])
    checkpoint_activations(model, 2)
    assert flags(model) == [False, False, True, True, False]
    checkpoint_activations(model, 0)
    assert not any(flags(model))
    assert len(recomputable(build(target_modules=["embed_tokens", "o_proj"], layers=None))) == BLOCKS


def test_more_blocks_than_there_are_is_an_error() -> None:
    with pytest.raises(UsageError, match=rf"checkpointing is 6, and this LlamaForCausalLM has {BLOCKS} blocks"):
        checkpoint_activations(build(), 6)
