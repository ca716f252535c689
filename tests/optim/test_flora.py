"""FLORA: Adafactor where it is Adafactor, the authors' code where it is not, random projections and what they cost."""

import math
from typing import Any

import pytest
import torch
from problem import Settings, close, feed, oracle, recorded
from torch import Tensor, nn

from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS, Groups, flora, state_bytes
from lorakit.optim.flora import Accumulation, Options, down, projection, up

SHAPES = [(12, 16), (16, 12), (12, 12), (7,), (3, 40), (4, 3, 2)]


def parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def optimizer(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    given = Settings(**settings)
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    group = {"params": named, "role": "base", "lr": given.lr, "weight_decay": given.weight_decay}
    return OPTIMIZERS["flora"](Groups([group], []), given)


@pytest.mark.parametrize("scale_parameter", [True, False])
def test_without_momentum_it_is_adafactor_bit_for_bit(scale_parameter: bool) -> None:
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    ours, theirs = parameters(), parameters()
    reference = adafactor(theirs, lr=1e-2, relative_step=False, scale_parameter=scale_parameter, weight_decay=0.1)
    settings = {"betas": (0.0, 0.999), "weight_decay": 0.1, "options": {"scale_parameter": scale_parameter}}
    feed(optimizer(ours, **settings), ours, recorded(SHAPES, 7))
    feed(reference, theirs, recorded(SHAPES, 7))
    assert all(map(torch.equal, ours, theirs))


def test_the_first_step_is_adafactors_times_one_minus_beta_and_keeps_the_compressed_update() -> None:
    shapes = [(12, 16)]
    ours, plain = parameters(shapes), parameters(shapes)
    start = ours[0].detach().clone()
    ((g,),) = recorded(shapes, 1)
    g = 1e-3 * g  # Adafactor's update has a root mean square of about 1; clipping acts on it and not on a tenth of it
    one = optimizer(ours, options={"rank": 4, "clip": 100.0})
    feed(one, ours, [[g]])
    feed(optimizer(plain, betas=(0.0, 0.999), options={"clip": 100.0}), plain, [[g]])
    update = start - plain[0].detach()
    close(start - ours[0].detach(), 0.1 * update, 1e-6)
    rate = 1e-2 * start.norm() / math.sqrt(start.numel())
    P = projection(0, 0, 0, (12, 16), 4, start)
    close(one.state[ours[0]]["exp_avg"], 0.1 * P @ update / rate, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_it_agrees_with_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """flora-opt on recorded gradients over two switches of the subspace, with our projections in place of its own."""
    theirs_module: Any = oracle("flora_opt.optimizers.torch.flora", monkeypatch)
    shapes, rank, refresh = SHAPES[:5], 4, 3
    ours, theirs = parameters(shapes), parameters(shapes)
    drawn: dict[int, tuple[int, int]] = {}  # their seed -> our parameter and number of the switch
    for index in range(len(shapes)):
        seed = index + 1
        for number in range(4):
            drawn |= dict.fromkeys(theirs_module.split_seed(seed), (index, number))
            seed = theirs_module.next_seed(seed)

    def stable_randn(shape: tuple[int, int], seed: int, **_: Any) -> Tensor:
        index, number = drawn[seed]
        P = projection(0, index, number, shapes[index], rank, ours[index]) * math.sqrt(rank)
        return P if P.shape == shape else P.T

    monkeypatch.setattr(theirs_module, "stable_randn", stable_randn)
    reference = theirs_module.Flora(theirs, lr=1e-2, rank=rank, kappa=refresh, beta1=0.9, weight_decay=0.01)
    feed(optimizer(ours, weight_decay=0.01, options={"rank": rank, "refresh": refresh}), ours, recorded(shapes, 8))
    feed(reference, theirs, recorded(shapes, 8))
    for p, q in zip(ours, theirs, strict=True):
        close(p.detach(), q.detach(), 1e-6)


def test_c12_a_projection_is_the_identity_on_average() -> None:
    torch.manual_seed(0)
    k, r, draws = 11, 4, 4000
    G = torch.randn(30, k).double()
    seen = torch.stack([up(P, down(P, G), G.shape) for P in (projection(3, 0, i, G.shape, r, G) for i in range(draws))])
    error = (seen - G).square().sum((1, 2)) / G.square().sum()
    assert float(error.mean()) == pytest.approx((k + 1) / r, rel=0.05)
    assert (seen.mean(0) - G).norm() / G.norm() == pytest.approx(math.sqrt((k + 1) / r / draws), rel=0.3)


def test_projections_are_functions_of_their_seed_and_never_in_the_state() -> None:
    one, two, other = parameters(), parameters(), parameters()
    first = optimizer(one, options={"rank": 4, "refresh": 2})
    feed(first, one, recorded(SHAPES, 5))
    torch.manual_seed(99)
    feed(optimizer(two, options={"rank": 4, "refresh": 2}), two, recorded(SHAPES, 5))
    feed(optimizer(other, options={"rank": 4, "refresh": 2, "seed": 1}), other, recorded(SHAPES, 5))
    assert all(map(torch.equal, one, two))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[3], other[3])  # a vector is not compressed
    assert {key for state in first.state.values() for key in state} <= {
        "step", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "drawn_on",
    }  # fmt: skip
    P = [projection(0, i, n, (12, 12), 4, one[0]) for i in range(3) for n in range(3)]
    assert len({tuple(p.flatten().tolist()) for p in P}) == 9


def test_state_of_a_matrix_is_rank_times_its_long_side_and_its_sides() -> None:
    shapes = [(60, 40)]
    ours = parameters(shapes)
    one = optimizer(ours, options={"rank": 5})
    feed(one, ours, recorded(shapes, 2))
    assert state_bytes(one) == 4 * (5 * 60 + 60 + 40)


def test_accumulation_is_the_projected_sum_of_the_gradients() -> None:
    ours, theirs = parameters(), parameters()
    accumulation, micro = Accumulation(ours, rank=4, seed=3), recorded(SHAPES, 3)
    seen = []
    for _ in range(2):
        for batch in micro:
            for p, g in zip(ours, batch, strict=True):
                p.grad = g / 3
            accumulation.take()
            assert all(p.grad is None for p in ours)
        kept = sum(t.numel() for t in accumulation.sums.values())
        accumulation.give()
        seen.append([p.grad.clone() for p in ours])
    mean = [sum(gs) / 3 for gs in zip(*micro, strict=True)]
    for i, shape in enumerate(SHAPES):
        if i >= 3:  # a vector, a matrix that is too narrow, a kernel: summed as they are
            close(seen[0][i], mean[i], 1e-6)
            continue
        for step in range(2):
            P = projection(3, i, step, shape, 4, ours[i])
            close(seen[step][i], up(P, down(P, mean[i]), shape), 1e-5)
        assert not torch.equal(seen[0][i], seen[1][i])
    assert kept == 4 * (16 + 16 + 12) + 7 + 120 + 24
    wide = Accumulation(theirs, rank=12)
    for p, g in zip(theirs, micro[0], strict=True):
        p.grad = g.clone()
    Q, _ = torch.linalg.qr(torch.randn(12, 12))
    with pytest.MonkeyPatch.context() as patch:  # a square orthogonal P loses nothing
        patch.setattr(flora, "projection", lambda *_: Q)
        wide.take()
        wide.give()
    for p, g in zip(theirs, micro[0], strict=True):
        close(p.grad, g, 1e-5)


def test_momentum_of_another_kind_of_device_is_refused() -> None:
    ours = parameters()
    one = optimizer(ours, options={"rank": 4})
    feed(one, ours, recorded(SHAPES, 1))
    one.state[ours[0]]["drawn_on"] = 1
    with pytest.raises(UsageError, match="only cuda draws again"):
        feed(one, ours, recorded(SHAPES, 1))


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"rank": 0}, {"refresh": 0}, {"clip": 0.0}, {"decay": 0.5}):
        with pytest.raises(UsageError):
            Options(**wrong)
    with pytest.raises(UsageError, match=r"nothing to compress"):
        optimizer(parameters(), options={"rank": 13})
    optimizer(parameters(), betas=(0.0, 0.999), options={"rank": 13})
