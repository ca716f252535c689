"""The fast way on a base in 4 or 8 bits: the ordinary step's gradients, and no dequantized weight is kept for the backward pass."""

from typing import Any

import pytest
import torch
import transformers

import lorakit as lk
from lorakit.core.weight import dense
from lorakit.kernels.low_rank import plain
from lorakit.models.blocks import FastBlock
from lorakit.models.fast import ORDINARY, accelerate
from lorakit.models.ledger import Ledger
from lorakit.models.modes import checkpoint_activations
from lorakit.models.packing import enable_packing
from lorakit.models.quantize import quantize

pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Params4bit

from lorakit.bases import bitsandbytes as own

LENGTHS = [5, 3]
TOKENS = sum(LENGTHS)
HIDDEN, BLOCKS = 256, 2


def build(name: str | None, dtype: torch.dtype = torch.float32, method: Any = None) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if name is not None:
        quantize(model, name)
    lk.attach(model, method or lk.LoRA(r=3, alpha=5))
    torch.manual_seed(1)
    for _, _, adapter in lk.adapters(model):
        for p in adapter.parameters():
            p.data += torch.randn_like(p) * 0.1
    assert enable_packing(model)
    return model.train()


def loss(model: Any, fast: Any) -> torch.Tensor:
    torch.manual_seed(2)
    ids = torch.arange(TOKENS)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    rows = torch.tensor([0, 2, 6])
    return fast.loss(
        model, {"input_ids": ids[None], "position_ids": positions[None]}, rows, ids[rows + 1], lengths=LENGTHS
    )


def step(model: Any, fast: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model, fast).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys() and len(found) == 14 * BLOCKS
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_the_gradients_are_those_of_the_ordinary_way(
    name: str, checkpointed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    with plain():
        expected = step(model, ORDINARY)
    fast = accelerate(model)
    checkpoint_activations(model, checkpointed)
    runs, fused = [], FastBlock.fused
    monkeypatch.setattr(FastBlock, "fused", lambda *a, **k: runs.append(1) or fused(*a, **k))
    assert apart(step(model, fast), expected) < 1e-4
    assert len(runs) == (0 if name == "int8" else BLOCKS + checkpointed)  # int8 runs by its own product


def test_the_gradients_are_those_of_the_base_that_the_bits_say() -> None:
    """Against a plain model holding the dequantized weights."""
    model, exact = build("nf4"), build(None)
    stored = dict(model.named_modules())
    with torch.no_grad():
        for path, layer in exact.named_modules():
            if type(stored[path].__dict__.get("_parameters", {}).get("weight")).__name__ == "Params4bit":
                layer.weight.copy_(dense(stored[path].weight))
    exact.load_state_dict({n: p for n, p in model.state_dict().items() if ".adapters." in n}, strict=False)
    assert apart(step(model, accelerate(model)), step(exact, accelerate(exact))) < 1e-5


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_shared_buffer_come_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights of all sizes around a piece, larger ones first and last; and a step by it is the same step."""
    for rows, scales in ((70, True), (8, True), (16, False), (300, True)):
        torch.manual_seed(rows)
        weight = Params4bit(torch.randn(rows, 128, dtype=dtype), compress_statistics=scales, quant_type=name).to("cpu")
        monkeypatch.setattr(own, "_PIECE", 1 << 11)
        found = own._read_passing(weight)
        assert found.dtype == dtype and torch.equal(found, dense(weight))
    model = build(name, dtype)
    fast = accelerate(model)
    expected = step(model, fast)
    monkeypatch.setattr(own, "_MAPPED", 0)
    reads, real = [], own._read_passing
    monkeypatch.setattr(own, "_read_passing", lambda weight: reads.append(1) or real(weight))
    found = step(model, fast)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert (
        len(reads) == 14 * BLOCKS - 3
    )  # forward and back, but for the first block's q, k, v, whose input needs no gradient


def test_large_weights_go_through_the_buffer() -> None:
    shapes = {(1024, 64): False, (8192, 1024): True}  # 32 MB in float32
    for shape, mapped in shapes.items():
        weight = Params4bit(torch.ones(shape), quant_type="nf4").to("cpu")
        assert own._is_mapped(weight) == mapped
        assert not own._is_mapped(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dequantized_weight_is_kept(dtype: torch.dtype) -> None:
    """With so few tokens one dequantized weight would outweigh all that the step keeps."""
    weight = HIDDEN * HIDDEN * dtype.itemsize
    kept = {}
    for name in (None, "nf4"):
        model = build(name, dtype)
        fast, ledger = accelerate(model), Ledger(model, 1.0)
        with ledger:
            total = loss(model, fast)
            kept[name] = ledger.live
            total.backward()
        if name:
            assert kept[name] < weight
            assert ledger.peak - sum(p.nbytes for p in model.parameters() if p.requires_grad) < kept[name] + 4 * weight
    assert kept["nf4"] <= kept[None] + 1024
