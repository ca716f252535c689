"""LoftQ: base and adapter together are nearer to the weight than the quantized base alone, in any format."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.weight import dense
from lorakit.init.loftq import alternate
from lorakit.models.quantize import quantize

FORMATS = ["nf4", "fp4", "int8"]


def rounded(W: Tensor) -> Tensor:
    """A stored format that needs no package: seven levels in a row of the matrix."""
    step = W.abs().amax(1, keepdim=True) / 3
    return (W / step).round() * step


def weight(out: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(out, width) * torch.logspace(0, -1, width)


def model_of(W: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0]))
    model[0].weight.data.copy_(W)
    return model


def attached(W: Tensor, name: str, r: int, *, iterations: int = 1, **method: float) -> tuple[nn.Module, Tensor]:
    """Give the model and the matrix that base and adapter stand for at the start."""
    pytest.importorskip("bitsandbytes")
    start = lk.LoRA(r=r, init="loftq", **method)
    model = model_of(W)
    lk.attach(model, start, statistics=quantize(model, name, start, iterations=iterations))
    ((_, layer, adapter),) = lk.adapters(model)
    return model, adapter.merge(dense(layer.weight).float()).detach()


@pytest.mark.parametrize("name", FORMATS)
def test_the_start_is_the_best_repair_of_the_ordinary_quantized_base(name: str) -> None:
    W, plain = weight(), model_of(weight())
    pytest.importorskip("bitsandbytes")
    quantize(plain, name)
    lost = W - dense(plain[0].weight).float()
    sigma = torch.linalg.svdvals(lost)
    errors = [float(lost.norm())]
    for r in (1, 4, 16, 48):
        model, together = attached(W, name, r)
        assert torch.equal(model[0].weight.data, plain[0].weight.data), "one iteration leaves the base the ordinary one"
        torch.testing.assert_close((W - together).norm(), sigma[r:].norm(), rtol=1e-3, atol=1e-5 * float(W.norm()))
        errors.append(float((W - together).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.9 * errors[0]


@pytest.mark.parametrize("alpha", [2.0, 8.0, 40.0])
@pytest.mark.parametrize("stabilized", [True, False])
def test_the_scale_is_accounted_for(alpha: float, stabilized: bool) -> None:
    W = weight()
    _, one = attached(W, "nf4", 8, alpha=8.0)
    model, other = attached(W, "nf4", 8, alpha=alpha, rank_stabilized=stabilized)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    ((_, _, adapter),) = lk.adapters(model)
    torch.testing.assert_close(adapter.lora_B.norm(), adapter.lora_A.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_more_iterations_are_never_worse(name: str) -> None:
    W = weight()
    errors = [float((W - attached(W, name, 6, iterations=t)[1]).norm()) for t in range(1, 6)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    if name != "int8":  # whose 127 levels leave noise without a direction
        assert errors[-1] < 0.98 * errors[0]


def test_the_alternation_is_that_of_the_paper() -> None:
    """Q_t = quant(W - L_t-1), L_t the r leading terms of W - Q_t; the pair of the last iteration that got nearer."""
    W, r = weight(seed=5).double(), 5
    low, errors, stored = torch.zeros_like(W), [], []
    for _ in range(5):
        stored.append(rounded(W - low))
        U, S, Vh = torch.linalg.svd(W - stored[-1], full_matrices=False)
        low = (U[:, :r] * S[:r]) @ Vh[:r]
        errors.append(float((W - stored[-1] - low).norm()))
    assert errors[4] > errors[3] < errors[2] < errors[1] < errors[0], "here the fifth one is a step back"
    for iterations, best in ((1, 0), (2, 1), (4, 3), (5, 3)):
        assert torch.equal(alternate(W, rounded, r, iterations), stored[best])


def test_training_keeps_the_repaired_start_in_the_adapter() -> None:
    """It is no start that is taken off again: what is saved is one LoRA of rank r on the quantized base."""
    model, _ = attached(weight(), "nf4", 4)
    ((_, _, adapter),) = lk.adapters(model)
    assert set(adapter.state_dict()) == {"lora_A", "lora_B"}
    assert adapter.delta_weight().norm() > 0.1


def test_parts_of_a_fused_layer_are_repaired_each() -> None:
    pytest.importorskip("bitsandbytes")
    W = weight(60, 64)
    model, method = model_of(W), lk.LoRA(r=4, init="loftq")
    where = {"target_modules": ["0.q", "0.v"], "fused": {"0": {"q": 20, "k": 20, "v": 20}}}
    lk.attach(model, method, statistics=quantize(model, "nf4", method, **where), **where)
    ((_, layer, adapter),) = lk.adapters(model)
    read = dense(layer.weight)
    after = adapter.merge(read).detach()
    assert torch.equal(after[20:40], read[20:40])
    for rows in (slice(0, 20), slice(40, 60)):
        sigma = torch.linalg.svdvals(W[rows] - read[rows])
        torch.testing.assert_close((W[rows] - after[rows]).norm(), sigma[4:].norm(), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_repaired_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    method, model = lk.LoRA(r=2, init="loftq"), nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 9))
    with pytest.raises(lk.LorakitError, match="from 1 to 5"):
        quantize(copy.deepcopy(model), "nf4", method, iterations=6)
    with pytest.raises(lk.LorakitError, match="nothing for its adapter to repair"):
        quantize(copy.deepcopy(model), "nf4", method, target_modules=["0", "1"])
