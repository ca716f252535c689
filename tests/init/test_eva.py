"""EVA: A spans where the inputs vary most, B is zero, and the ranks of all layers share one budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.calibrate import calibrate
from lorakit.core.statistics import Statistics
from lorakit.init.eva import explained, ranks


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def spread(variances: list[float], mean: float = 0.0) -> Statistics:
    """Inputs with these variances along the axes, all with the same mean."""
    at = torch.full((len(variances),), mean).double()
    return Statistics(torch.diag(torch.tensor(variances).double()) + torch.outer(at, at), at)


def test_a_is_the_leading_principal_directions_and_b_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9)).double()
    batches = [(torch.randn(40, 12) * torch.linspace(3, 0.1, 12) + 2).double() for _ in range(3)]
    before = model(batches[0])
    method = lk.LoRA(r=4, init="eva")
    lk.attach(model, method, statistics=calibrate(model, method, batches, loss))
    ((_, _, adapter),) = lk.adapters(model)
    A = adapter.lora_A.detach()
    assert torch.equal(model(batches[0]), before)
    assert torch.count_nonzero(adapter.lora_B) == 0
    torch.testing.assert_close(A @ A.T, torch.eye(4).double())
    x = torch.cat(batches)
    sigma = torch.linalg.svdvals(x - x.mean(0))
    captured = torch.linalg.svdvals((x - x.mean(0)) @ A.T)  # no other four directions hold as much variance
    torch.testing.assert_close(captured, sigma[:4])
    model(batches[0]).sum().backward()
    assert torch.count_nonzero(adapter.lora_A.grad) == 0  # C2


def test_explained_variance_is_of_the_centered_inputs() -> None:
    assert explained(spread([1.0, 3.0], mean=100.0)) == pytest.approx([0.75, 0.25])


def test_ranks_go_to_the_largest_shares() -> None:
    known = {"flat": spread([1.0] * 8), "steep": spread([100.0] + [1e-3] * 7), "two": spread([4.0, 4.0, 1e-3, 1e-3])}
    # shares: steep 1; two .5 .5; flat eight times .125
    assert ranks(known, 2, rho=4) == {"flat": 3, "steep": 1, "two": 2}
    assert ranks(known, 1, rho=4) == {"flat": 0, "steep": 1, "two": 2}
    assert ranks(known, 2, rho=1) == {"flat": 2, "steep": 2, "two": 2}
    assert ranks(known, {"flat": 1, "steep": 3, "two": 2}, rho=1) == {"flat": 1, "steep": 3, "two": 2}
    with pytest.raises(lk.LorakitError, match="rho"):
        ranks(known, 2, rho=0.5)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.floats(0.01, 100), min_size=12, max_size=12), min_size=1, max_size=5),
    st.integers(1, 4),
    st.floats(1, 3),
)
def test_the_budget_is_kept(variances: list[list[float]], r: int, rho: float) -> None:
    known = {str(i): spread(v) for i, v in enumerate(variances)}
    chosen = ranks(known, r, rho)
    assert sum(chosen.values()) == r * len(known)
    assert all(0 <= n <= round(rho * r) for n in chosen.values())
    taken = [s for path, n in chosen.items() for s in explained(known[path])[:n]]
    left = [s for path, n in chosen.items() for s in explained(known[path])[n : round(rho * r)]]
    assert min(taken) >= max(left, default=0) * (1 - 1e-12)


def test_a_rank_beyond_the_inputs_is_refused() -> None:
    model, method = nn.Sequential(nn.Linear(3, 9)), lk.LoRA(r=4, init="eva")
    with pytest.raises(lk.LorakitError, match="no more than 3 directions"):
        lk.attach(model, method, statistics=calibrate(model, method, [torch.randn(5, 3)], loss))
