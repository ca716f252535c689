"""Several methods on one layer: the law of every method for pairs of them, their order, and their file."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.adapter import Selective
from lorakit.core.errors import FileError, UsageError
from lorakit.core.stack import Stack, parts_of, settings_of
from lorakit.core.start import needs
from lorakit.optim import parameter_groups
from lorakit.train.config import OptimConfig


def _contract() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contract_of_stacks", Path(__file__).parent / "test_contract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _contract()
model, x = contract.model, contract.x

LoRA, DoRA, BitFit, VeRA, Full = (lk.METHODS[name] for name in ("lora", "dora", "bitfit", "vera", "full"))
Houlsby, Parallel, MoLoRA = (lk.METHODS[name] for name in ("houlsby", "parallel", "molora"))

# Mergeable pairs in which the second one looks at the first one's weight or bias; then one that cannot be merged.
PAIRS: dict[str, Stack] = {
    "lora bitfit": lk.Stack([LoRA(r=3), BitFit()]),
    "lora dora": lk.Stack([LoRA(r=3), DoRA(r=2)]),
    "bitfit dora": lk.Stack([BitFit(), DoRA(r=2)]),
    "dora lora bitfit": lk.Stack([DoRA(r=2), LoRA(r=2), BitFit()]),
    "vera full": lk.Stack([VeRA(r=4), Full()]),
    "dora houlsby": lk.Stack([DoRA(r=2), Houlsby(bottleneck=4)]),
}


@pytest.fixture(params=PAIRS)
def method(request: pytest.FixtureRequest) -> Stack:
    return PAIRS[request.param]


@pytest.fixture(params=["linear", "linear_no_bias", "conv1d_gpt2", "embedding", "conv2d", "fused"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["fp32", "fp64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return contract.DTYPES[request.param]


# These take the fixtures of this file.
test_forward_is_the_layer_with_the_merged_weight = contract.test_forward_is_the_layer_with_the_merged_weight
test_attaching_changes_no_bit = contract.test_attaching_changes_no_bit
test_only_the_adapter_learns = contract.test_only_the_adapter_learns
test_two_adapters_are_two_models = contract.test_two_adapters_are_two_models


@pytest.mark.parametrize(("kind", "dtype"), [("linear", torch.float64)])
def test_merging(model: nn.Module, method: Stack, kind: str, x: Tensor, dtype: torch.dtype) -> None:
    contract.test_merge_is_the_forward_and_unmerge_is_exact(model, method, kind, x, dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("linear", torch.float32)])
def test_one_graph(model: nn.Module, method: Stack, kind: str, x: Tensor) -> None:
    contract.test_one_graph_and_none_anew_when_tensors_change(model, method, kind, x)


def layer_with(method: lk.Method, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return contract.perturb(lk.attach(contract.Toy(nn.Linear(12, 20)).double(), method, target_modules=["layer"]))


def test_a_bottleneck_reads_the_adapted_layers_output() -> None:
    """By hand: y = LoRA's output, then y + U gelu(D y + c) + e."""
    model, x = layer_with(lk.Stack([LoRA(r=3), Houlsby(bottleneck=4)])), torch.randn(6, 12).double()
    ((_, layer, adapter),) = lk.adapters(model)
    lora, b = adapter.parts
    y = layer.frozen(x) + x @ lora.delta_weight().T
    expected = y + torch.nn.functional.gelu(y @ b.down.T + b.down_bias) @ b.up.T + b.up_bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert not adapter.mergeable()


def test_additive_methods_add_up_in_any_order() -> None:
    model = layer_with(lk.Stack([LoRA(r=3), VeRA(r=4)]))
    ((_, layer, adapter),) = lk.adapters(model)
    W = layer.matrix()
    expected = W + adapter.parts[0].delta_weight() + adapter.parts[1].delta_weight()
    torch.testing.assert_close(adapter.merge(W), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", sorted(lk.METHODS))
def test_every_pair_of_methods_works_or_is_refused_with_the_reason(first: str) -> None:
    """A pair that is accepted starts at the base, learns in every part, and is its merged layer if it can be merged."""
    x = torch.randn(9, 16).double()
    for second in sorted(lk.METHODS):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16)).double()
        base = model(x)
        try:
            stack = lk.Stack([small(first), small(second)])
            lk.attach(model, stack)
        except UsageError as refusal:
            assert refusal.why or refusal.fix, (first, second)
            continue
        ((_, _, adapter),) = lk.adapters(model)
        torch.testing.assert_close(model(x), base, rtol=1e-9, atol=1e-9, msg=f"{first}, {second}")
        contract.perturb(model)
        model(x).square().sum().backward()
        for i in range(2):
            assert any(p.grad is not None and p.grad.any() for p in adapter.parts[i].parameters()), (first, second)
        if adapter.mergeable():
            y = model(x)
            torch.testing.assert_close(lk.merge(model)(x), y, rtol=1e-9, atol=1e-9, msg=f"{first}, {second}")


def small(name: str) -> lk.Method:
    """The method at a size that fits a layer of 16 by 16."""
    fields = lk.METHODS[name].__dataclass_fields__
    return lk.METHODS[name](**({"r": 4} if "r" in fields and "init_r" not in fields else {}))


def test_parts_that_cannot_be_stacked_are_refused() -> None:
    with pytest.raises(UsageError, match="at least two methods"):
        lk.Stack([LoRA()])
    with pytest.raises(UsageError, match="LoRA cannot come after Houlsby"):
        lk.Stack([Houlsby(), LoRA()])
    lk.Stack([MoLoRA(num_experts=1), LoRA()])
    with pytest.raises(UsageError, match="LoRA cannot come after MoLoRA"):
        lk.Stack([MoLoRA(), LoRA()])
    with pytest.raises(UsageError, match="list its parts"):
        lk.Stack([LoRA(), lk.Stack([LoRA(), LoRA()])])
    with pytest.raises(UsageError, match="is no method"):
        lk.Stack([LoRA, LoRA])
    for name in lk.METHODS:
        if isinstance(lk.METHODS[name](), Selective) or "experts" in needs(lk.METHODS[name]()):
            with pytest.raises(UsageError, match="cannot be part of a stack"):
                lk.Stack([LoRA(), lk.METHODS[name]()])
    with pytest.raises(UsageError, match="goes by the one rank of a layer"):
        lk.Stack([LoRA(init="loftq"), BitFit()])
    with pytest.raises(UsageError, match="rank_pattern"):
        lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.Stack([LoRA(), BitFit()]), rank_pattern={"0": 2})


def test_each_part_keeps_its_roles_and_rates() -> None:
    model = layer_with(lk.Stack([LoRA(r=3), BitFit()]))
    config = OptimConfig(lr=1e-3, b_ratio=8.0)
    groups = {g["role"]: (g["lr"], [n.rpartition("default.")[2] for n, _ in g["params"]])
              for g in parameter_groups(model, "default", config)}  # fmt: skip
    assert groups == {
        "A": (1e-3, ["parts.0.lora_A"]), "B": (8e-3, ["parts.0.lora_B"]), "bias": (1e-3, ["parts.1.bias"]),
    }  # fmt: skip


def test_a_start_that_looks_at_data_is_measured_for_its_part() -> None:
    method = lk.Stack([LoRA(r=2, init="lora_ga"), BitFit()])
    assert needs(method) == {"gradient"}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    x = torch.randn(20, 8).double()
    known = lk.calibrate(model, method, [x], lambda model, x: model(x).square().sum())
    before = model(x)
    lk.attach(model, method, statistics=known)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_a_directory_gives_the_stack_back(name: str, tmp_path: Path) -> None:
    model, x = layer_with(PAIRS[name]).float(), torch.randn(6, 12)
    lk.save(model, tmp_path)
    again = lk.load(contract.Toy(base_of(model)), tmp_path)
    assert torch.equal(again(x), model(x))
    written = json.loads((tmp_path / "lorakit.json").read_text())["method"]
    ((_, _, adapter),) = lk.adapters(again)
    assert written == json.loads(json.dumps(settings_of(adapter.config)))
    assert [type(p) for p in parts_of(adapter.config)] == [type(p) for p in parts_of(PAIRS[name])]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAKIT_STACK"
    (tmp_path / "lorakit.json").unlink()
    with pytest.raises(FileError, match=r"lacks lorakit\.json"):
        lk.load(contract.Toy(base_of(model)), tmp_path)


def base_of(model: nn.Module) -> nn.Linear:
    plain = nn.Linear(12, 20)
    plain.load_state_dict({key: model.layer.state_dict()[key] for key in ("weight", "bias")})
    return plain
