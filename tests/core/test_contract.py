"""The law of every method on every kind of layer and storage format. A new file in `methods/` is covered on arrival."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.core.kinds import Kind, require_kind
from lorakit.core.start import needs
from lorakit.core.statistics import Statistics


class Toy(nn.Module):
    """One layer of each kind, under a head so that gradients have somewhere to go."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(3, 5, 12)),
    "linear_no_bias": (lambda: nn.Linear(12, 20, bias=False), lambda: torch.randn(4, 12)),
    "conv1d_gpt2": (lambda: Conv1D(20, 12), lambda: torch.randn(3, 5, 12)),
    "embedding": (lambda: nn.Embedding(30, 16, padding_idx=2), lambda: torch.randint(0, 30, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, dilation=2), lambda: torch.randn(2, 6, 9, 8)),
    "conv2d_reflect": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", bias=False),
        lambda: torch.randn(2, 6, 9, 8),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), lambda: torch.randn(2, 4, 5, 6, 4)),
    "fused": (lambda: nn.Linear(12, 30), lambda: torch.randn(3, 5, 12)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TARGETS = {"fused": ["layer.q", "layer.v"]}
FUSED = {"fused": {"layer": {"q": 10, "k": 10, "v": 10}}}


@pytest.fixture(params=sorted(lk.METHODS))
def method(request: pytest.FixtureRequest) -> lk.Method:
    return lk.METHODS[request.param]()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def model(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Toy(KINDS[kind][0]()).to(dtype)


@pytest.fixture
def x(kind: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x = KINDS[kind][1]()
    return x.to(dtype) if x.is_floating_point() else x


def known(model: nn.Module, method: lk.Method) -> dict[str, Statistics]:
    """What a method has to be told of its layer before it starts: other people's adapters, for a mixture of them."""
    if "experts" not in needs(method):
        return {}
    out, width, *_ = require_kind("layer", model.layer).shape(model.layer)
    n, r = method.num_experts, method.r
    return {"layer": Statistics(experts=(torch.randn(n, r, width) / 8, torch.randn(n, out, r) / 8))}


def attach(model: nn.Module, method: lk.Method, kind: str, name: str = "default") -> nn.Module:
    """A method may refuse a kind of layer, with the reason, and leaves the model alone then."""
    before, cls = set(model.state_dict()), type(model.layer)
    try:
        settings = {"fused": FUSED.get(kind), "statistics": known(model, method), "name": name}
        return lk.attach(model, method, target_modules=TARGETS.get(kind, ["layer"]), **settings)
    except UsageError as error:
        assert error.why
        assert "layer" in str(error.where)
        assert set(model.state_dict()) == before
        assert type(model.layer) is cls
        pytest.skip(f"refused: {error.what}: {error.why}")


def only_if_mergeable(model: nn.Module) -> None:
    """A method that cannot be merged says so beforehand, refuses with the reason, and leaves the model alone then."""
    ((_, _, adapter),) = lk.adapters(model)
    if adapter.mergeable():
        return
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as refusal:
        lk.merge(model)
    assert refusal.value.why
    assert lk.active(model) == "default"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    pytest.skip(f"not mergeable: {refusal.value.why}")


@torch.no_grad()
def perturb(model: nn.Module, name: str = "default", by: float = 0.1) -> nn.Module:
    torch.manual_seed(2)
    for _, _, adapter in lk.adapters(model, name):
        for p in adapter.parameters():
            p.add_(by * torch.randn_like(p))
    return model


def close(a: Tensor, b: Tensor) -> None:
    tolerance = {torch.bfloat16: 3e-2, torch.float32: 2e-5, torch.float64: 1e-12}[a.dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_attaching_changes_no_bit(model: nn.Module, method: lk.Method, kind: str, x: Tensor) -> None:
    before = model(x)
    assert torch.equal(attach(model, method, kind)(x), before)


def test_forward_is_the_layer_with_the_merged_weight(
    model: nn.Module, method: lk.Method, kind: str, x: Tensor, dtype: torch.dtype
) -> None:
    """Against a plain copy of the layer with the merged weight put in: an implementation that knows no adapters."""
    plain = copy.deepcopy(model)
    perturb(attach(model, method, kind))
    only_if_mergeable(model)
    ((_, layer, adapter),) = lk.adapters(model)
    wide = torch.promote_types(dtype, torch.float32)
    reference = plain.layer.to(wide)
    before = reference(x.to(wide) if x.is_floating_point() else x)
    with torch.no_grad():
        reference.weight.copy_(as_stored(reference, adapter.merge(layer.matrix().to(wide))))
        if layer.bias is not None:
            reference.bias.copy_(adapter.merge_bias(layer.bias.to(wide)))
    expected = reference(x.to(wide) if x.is_floating_point() else x)
    assert (expected - before).norm() > 0.002 * before.norm(), "the perturbed adapter must do something"
    close(layer(x), expected.to(dtype))


def as_stored(layer: nn.Module, matrix: Tensor) -> Tensor:
    transposed = isinstance(layer, Conv1D | nn.Embedding)
    return matrix.T if transposed else matrix.reshape(layer.weight.shape)


def test_only_the_adapter_learns(model: nn.Module, method: lk.Method, kind: str, x: Tensor) -> None:
    attach(model, method, kind)
    for by in (0.1, -0.2):  # a ReLU that is off for all inputs is on with the opposite perturbation
        perturb(model, by=by)(x).float().square().sum().backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    ((path, _, adapter),) = lk.adapters(model)
    wanted = {f"{path}.adapters.default.{n}" for n, role in adapter.roles().items() if role != "frozen"}
    assert learned == wanted == {n for n, p in model.named_parameters() if p.requires_grad}


def test_base_keys_and_class_do_not_change(model: nn.Module, method: lk.Method, kind: str) -> None:
    before, cls = set(model.state_dict()), type(model.layer)
    assert before <= set(attach(model, method, kind).state_dict())
    assert isinstance(model.layer, cls)
    lk.detach(model)
    assert set(model.state_dict()) == before
    assert type(model.layer) is cls


def test_merge_is_the_forward_and_unmerge_is_exact(
    model: nn.Module, method: lk.Method, kind: str, x: Tensor, dtype: torch.dtype
) -> None:
    before = copy.deepcopy(model.state_dict())
    y = perturb(attach(model, method, kind))(x)
    only_if_mergeable(model)
    for _ in range(3):
        close(lk.merge(model)(x), y)
        assert type(model.layer.weight) is nn.Parameter
        assert not all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        lk.unmerge(model)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert torch.equal(model(x), y)


# Compiling takes most of the time of this file: every kind in fp32, every dtype on a linear layer.
@pytest.mark.parametrize(
    ("kind", "dtype"), [(k, d) for k in KINDS for d in DTYPES.values() if k == "linear" or d == torch.float32]
)
def test_one_graph_and_none_anew_when_tensors_change(model: nn.Module, method: lk.Method, kind: str, x: Tensor) -> None:
    perturb(attach(model, method, kind))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    first = counter.frame_count  # 2 in fp64, where dynamo tries the 0-d scale as a Python number first
    for _ in range(2):
        close(compiled(x), model(x))
        perturb(model)
        for _, _, adapter in lk.adapters(model):
            for name, buffer in adapter.named_buffers():
                if name.endswith("scale"):
                    buffer.mul_(1.5)
    assert counter.frame_count == first


def test_two_adapters_are_two_models(model: nn.Module, method: lk.Method, kind: str, x: Tensor) -> None:
    base = model(x)
    perturb(attach(model, method, kind, "one"), "one")
    one = model(x)
    attach(model, method, kind, "two")
    assert torch.equal(model(x), base), "a fresh adapter is the base"
    with torch.no_grad():
        for _, _, adapter in lk.adapters(model, "two"):
            for p in adapter.parameters():
                p.add_(0.2)
    two = model(x)
    assert not torch.equal(one, two)
    close(lk.use(model, "one")(x), one)  # not equal: a convolution without gradients may take another kernel
    one = model(x)
    with lk.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), one)
    assert torch.equal(lk.use(model, None)(x), base)
    lk.detach(model, "one")
    assert lk.names(model) == ["two"]
    assert torch.equal(lk.use(model, "two")(x), two)


def test_every_method_works_on_a_plain_linear_layer(method: lk.Method) -> None:
    """What it refuses is a restriction to some kinds, never all of them."""
    model = Toy(nn.Linear(12, 20))
    assert lk.names(lk.attach(model, method, statistics=known(model, method))) == ["default"]


def test_kinds_agree_with_their_layer(model: nn.Module, kind: str, x: Tensor) -> None:
    """project(x, matrix) plus the bias is the layer, and stored(matrix) is its weight."""
    lk.attach(model, lk.LoRA(r=2), target_modules=["layer"])
    layer: Kind = model.layer
    close(layer.plus_bias(layer.project(x, layer.matrix())), layer.frozen(x))
    assert torch.equal(layer.stored(layer.matrix()), layer.weight)
    assert layer.matrix().shape == layer.shape()[:2]
