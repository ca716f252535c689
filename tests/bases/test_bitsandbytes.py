"""NF4, FP4 and int8: the published format bit for bit, what may be assumed of a quantized base, and merging into it."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.weight import bytes_of, dense, shape_of, store
from lorakit.models.quantize import bytes_when_stored, dequantize, quantize, saved_bytes, stored_bytes

bnb = pytest.importorskip("bitsandbytes")

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
GOLDEN = [0, 0, 1, 17, 17, 17, 18, 34, 34, 51, 52, 68, 69, 85, 102, 103, 120, 136, 153, 170, 171, 187, 204, 204, 221,
          221, 238, 238, 238, 239, 255, 255]  # fmt: skip
FORMATS = ["nf4", "fp4", "int8"]


def linear(out: int = 48, width: int = 64, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, out, bias=bias)).to(dtype)


def stored(name: str, model: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    model = linear() if model is None else copy.deepcopy(model)
    quantize(model, name, **kwargs)
    return model


# The format, written down again from its description: blocks of 64 of the flattened weight, each divided by its largest
# magnitude and rounded to the nearest of 16 levels, two to a byte, the first one in the high half.


def reference_codes(weight: Tensor, levels: Tensor = NF4) -> tuple[Tensor, Tensor]:
    flat = weight.flatten().float()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp(min=1e-38)[:, None]
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(scaled, middles).flatten()[: len(flat)], largest


def reference_packed(codes: Tensor) -> Tensor:
    codes = nn.functional.pad(codes, (0, len(codes) % 2))
    return (codes[::2] * 16 + codes[1::2]).to(torch.uint8)


def dynamic_map() -> Tensor:
    """The 8-bit levels of the scales: a sign, then zeros that count a power of ten, then a linear fraction."""
    levels = [0.0, 1.0]
    for zeros in range(7):
        edges = torch.linspace(0.1, 1, 2**zeros + 1)
        values = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (zeros - 6)).tolist()
        levels += values + [-v for v in values]
    return torch.tensor(sorted(levels))


def reference_scales(largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales in 8 bits: their distances from the mean in blocks of 256. Gives what is rounded, and its factor and mean."""
    offset = largest.mean()
    apart = nn.functional.pad(largest - offset, (0, -len(largest) % 256)).reshape(-1, 256)
    second = apart.abs().amax(1, keepdim=True)
    return (apart / second).flatten()[: len(largest)], second.expand_as(apart).flatten()[: len(largest)], offset


def test_the_golden_vector() -> None:
    model = nn.Sequential(nn.Linear(64, 1, bias=False))
    model[0].weight.data.copy_(torch.linspace(-1, 1, 64))
    assert stored("nf4", model)[0].weight.data.flatten().tolist() == GOLDEN
    assert reference_packed(reference_codes(torch.linspace(-1, 1, 64))[0]).tolist() == GOLDEN


@pytest.mark.parametrize("shape", [(48, 64), (30, 50), (300, 257)])
def test_nf4_is_the_published_format_bit_for_bit(shape: tuple[int, int]) -> None:
    """Also where rows are no multiple of a block, the last block is short, and there is more than one block of scales."""
    model = linear(*shape)
    W = model[0].weight.detach()
    found = stored("nf4", model)[0].weight
    codes, largest = reference_codes(W)
    assert torch.equal(found.data.flatten(), reference_packed(codes))
    levels, state = dynamic_map(), found.quant_state
    assert torch.equal(state.state2.code, levels)
    scaled, second, offset = reference_scales(largest)
    middles = (levels[1:] + levels[:-1]) / 2
    own = state.absmax.flatten().long()
    tied = (scaled[:, None] - middles).abs().amin(1) < 2e-5  # bitsandbytes goes either way there
    assert torch.equal(own[~tied], torch.bucketize(scaled, middles)[~tied])
    assert (own - torch.bucketize(scaled, middles)).abs().max() <= 1
    assert tied.float().mean() < 0.05
    scales = (levels[own] * second + offset).repeat_interleave(64)[: len(codes)]
    assert torch.equal(dense(found), (NF4[codes] * scales).reshape(shape))


@pytest.mark.parametrize(("name", "worst"), [("nf4", 0.0085), ("fp4", 0.0150), ("int8", 7e-5)])
def test_the_error_is_no_larger_than_it_should_be(name: str, worst: float) -> None:
    """Mean square on a standard normal: NF4 with double quantization .00846, FP4 .01486; a row of int8 by its largest value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 512, bias=False))
    W = model[0].weight.data.normal_().clone()
    read = dense(stored(name, model)[0].weight)
    error = float((read - W).square().mean())
    assert 0.8 * worst < error < worst
    if name == "nf4":
        blocks = (read - W).reshape(-1, 64).abs().amax(1) / W.reshape(-1, 64).abs().amax(1)
        assert 0.13 < float(blocks.max()) < 0.1519 + 0.02  # half the largest gap, and what the scales lose


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_can_be_stored_again(name: str) -> None:
    weight = stored(name)[0].weight
    again = store(weight, dense(weight))
    assert type(again) is type(weight)
    if name != "fp4":  # it has two zeros
        assert torch.equal(again.data, weight.data), "the codes of what was read are the same"
    torch.testing.assert_close(
        dense(again), dense(weight), rtol=1e-2, atol=1e-4
    )  # the scales are rounded a second time
    assert shape_of(weight) == dense(weight).shape == (48, 64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_multiplies_by_what_is_read(name: str, dtype: torch.dtype, bias: bool) -> None:
    model, x = stored(name, linear(dtype=dtype, bias=bias)), torch.randn(3, 5, 64, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    expected = nn.functional.linear(x, dense(model[0].weight).to(dtype), model[0].bias)
    for mode in (True, False):  # the same in training and evaluation, whatever the processor
        torch.testing.assert_close(model.train(mode)(x), expected, rtol=tolerance, atol=tolerance)
    assert model[0].bias is None or model[0].bias.dtype == dtype


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("evaluated", [False, True])
def test_gradients_reach_the_input_and_never_the_weight(name: str, evaluated: bool) -> None:
    """Also after an evaluation, at which bitsandbytes would repack 4-bit weights on processors with AVX512-BF16."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))
    quantize(model, name)
    plain = dequantize(copy.deepcopy(model))
    lk.attach(model, lk.LoRA(r=4), target_modules=["2"])  # layer 0 stays as the package made it
    x = torch.randn(7, 64, requires_grad=True)
    if evaluated:
        with torch.no_grad():
            model.eval()(x.detach())
        model.train()
    model(x).square().sum().backward()
    other = x.detach().clone().requires_grad_()
    plain(other).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("requantize", [False, True])
def test_merging_is_exact_unless_rounding_is_asked_for(name: str, requantize: bool) -> None:
    model, x = stored(name), torch.randn(9, 64)
    before = model(x)
    lk.attach(model, lk.LoRA(r=4))
    ((_, layer, adapter),) = lk.adapters(model)
    nn.init.normal_(adapter.lora_B, std=0.02)
    y, kept = model(x), layer.weight
    wanted = dense(kept) + adapter.delta_weight().detach()
    for _ in range(2):
        lk.merge(model, requantize=requantize)
        if requantize:
            assert type(layer.weight) is type(kept)
            assert torch.equal(dense(layer.weight), dense(store(kept, wanted)))
        else:
            assert type(layer.weight) is nn.Parameter
            assert torch.equal(layer.weight, wanted)
            torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        lk.unmerge(model)
        assert layer.weight is kept
        assert torch.equal(model(x), y)
    assert torch.equal(lk.detach(model)(x), before)


def test_a_merge_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model = stored("nf4")
    lk.attach(model, lk.LoRA(r=4))
    ((_, layer, adapter),) = lk.adapters(model)
    kept = layer.weight
    nn.init.constant_(adapter.lora_B, torch.inf)
    for requantize in (False, True):
        with pytest.raises(lk.LorakitError, match="NaN or infinity"):
            lk.merge(model, requantize=requantize)
        assert layer.weight is kept


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes)).eval()


@pytest.mark.parametrize("name", FORMATS)
def test_every_linear_layer_but_the_head_and_what_is_trained_in_full(name: str) -> None:
    model = llama()
    float_bytes, saved = stored_bytes(model), saved_bytes(model, name, ["o_proj"])
    quantize(model, name, modules_to_save=["o_proj"])
    kinds = {path.rpartition(".")[2]: type(m) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {leaf for leaf, cls in kinds.items() if cls is nn.Linear} == {"lm_head", "o_proj"}
    assert len(kinds) == 8
    assert stored_bytes(model) == float_bytes - saved
    weight = model.model.layers[0].mlp.up_proj.weight
    assert bytes_of(weight) == bytes_when_stored(torch.Size((64, 32)), name)
    with torch.device("meta"):
        assert saved_bytes(llama(), name, ["o_proj"]) == saved
    lk.attach(model, lk.LoRA(r=2), modules_to_save=["o_proj"])  # all-linear finds the stored layers
    assert len({path for path, _, _ in lk.adapters(model)}) == 14
    counted = lk.summary(model)
    assert counted.total - counted.adapter == sum(p.numel() for p in llama().parameters()), (
        "packed bytes are not parameters"
    )


def test_four_bits_take_four_bits() -> None:
    """4.127 bits a weight with the scales in 8 bits, beside tables of a fixed size."""
    assert 8 * bytes_when_stored(torch.Size((4096, 4096)), "nf4") / 4096**2 == pytest.approx(4.127, abs=1e-3)
    assert 8 * bytes_when_stored(torch.Size((4096, 4096)), "int8") / 4096**2 == pytest.approx(8, abs=1e-2)


def test_transposed_layers_are_stored_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "vocab_size": 64,
        "n_positions": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model, ids = GPT2LMHeadModel(GPT2Config(**sizes)).eval(), torch.arange(12)[None]
    exact = model(ids).logits
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    quantize(model, "int8")
    torch.testing.assert_close(dense(model.transformer.h[0].attn.c_attn.weight), weight.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, exact, rtol=0, atol=0.02)
    lk.attach(model, lk.LoRA(r=2), target_modules=["c_attn.v", "c_fc"])
    assert len(list(lk.adapters(model))) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_goes_from_one_base_to_the_other(name: str, tmp_path: Path) -> None:
    """Saved on a quantized base, it is an ordinary PEFT adapter; loaded on another copy, it gives the same outputs."""
    model, ids = stored(name, llama()), torch.arange(20)[None]
    lk.attach(model, lk.LoRA(r=2))
    torch.manual_seed(1)
    for _, _, adapter in lk.adapters(model):
        nn.init.normal_(adapter.lora_B, std=0.1)
    y = model(ids).logits
    lk.save(model, tmp_path)
    assert torch.equal(lk.load(stored(name, llama()), tmp_path)(ids).logits, y)
    plain = lk.load(dequantize(stored(name, llama())), tmp_path)
    torch.testing.assert_close(plain(ids).logits, y, rtol=1e-4, atol=1e-4)
    lk.merge(plain)
    torch.testing.assert_close(plain(ids).logits, y, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]


def test_a_model_that_bitsandbytes_has_repacked_is_refused() -> None:
    if not bnb.functional.has_avx512bf16():
        pytest.skip("only processors with AVX512-BF16")
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.weight = layer.weight.to("cpu")
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    with pytest.raises(lk.LorakitError, match="repacked"):
        lk.attach(nn.Sequential(layer), lk.LoRA(r=2))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_layers_that_bitsandbytes_made_itself(name: str) -> None:
    torch.manual_seed(0)
    layer = {"nf4": bnb.nn.LinearNF4, "int8": bnb.nn.Linear8bitLt}[name](
        64, 64, **({"has_fp16_weights": False} if name == "int8" else {})
    )
    layer.weight = layer.weight.to("cpu")
    model, x = nn.Sequential(layer), torch.randn(5, 64)
    y = model(x)  # in training mode; int8 moves its scales from the weight into the layer here
    lk.attach(model, lk.LoRA(r=2))
    assert torch.equal(model(x), y)
    ((_, adapted, _),) = lk.adapters(model)
    torch.testing.assert_close(adapted.project(x, adapted.matrix()) + adapted.bias, y, rtol=1e-4, atol=1e-4)
    lk.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    lk.unmerge(model)
    assert torch.equal(model(x), y)


def test_a_configuration_can_ask_for_every_format() -> None:
    from lorakit.bases import FORMATS as MADE
    from lorakit.train.config_schema import choices, section_keys

    assert sorted(choices(section_keys("model")["quantize"].hint)) == sorted(MADE) == sorted(FORMATS)


def test_what_cannot_be_stored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(lk.LorakitError, match="float64"):
        quantize(linear(dtype=torch.float64), "nf4")
    with pytest.raises(lk.LorakitError, match="no storage format 'nf5'"):
        quantize(linear(), "nf5")
    with pytest.raises(lk.LorakitError, match="quantize it first"):
        quantize(lk.attach(linear(), lk.LoRA(r=2)), "nf4")
    real = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "bitsandbytes" else real(n, *a))
    with pytest.raises(lk.LorakitError, match="not installed") as raised:
        quantize(linear(), "nf4")
    assert "lorakit[quant]" in (raised.value.fix or "")
