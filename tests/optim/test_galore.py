"""GaLore: at full rank it is the optimizer inside it, below it takes low-rank steps; the authors' code."""

from typing import Any

import pytest
import torch
from problem import Settings, close, feed, oracle, recorded
from torch import Tensor, nn

from lorakit.core.errors import UsageError
from lorakit.optim import OPTIMIZERS, Groups, state_bytes
from lorakit.optim.galore import Options

SHAPES = [(12, 7), (7, 12), (8, 8), (5,), (3, 20)]


def parameters(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def galore(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    named = [(f"p{i}", p) for i, p in enumerate(parameters)]
    group = {"params": named, "role": "base", "lr": settings.lr, "weight_decay": settings.weight_decay}
    return OPTIMIZERS["galore"](Groups([group], []), settings)


def gradients(steps: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    return [[g.double() for g in step] for step in recorded(shapes, steps)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_at_full_rank_and_scale_one_descent_is_descent(momentum: float) -> None:
    shapes = [(7, 7), (12, 7), (7, 12)]
    ours, plain = parameters(shapes), parameters(shapes)
    options = {"rank": 7, "scale": 1.0, "inner": "sgd", "refresh": 3 if momentum == 0 else 100}
    feed(galore(ours, Settings(betas=(momentum, 0.999), options=options)), ours, gradients(8, shapes))
    feed(torch.optim.SGD(plain, lr=1e-2, momentum=momentum), plain, gradients(8, shapes))
    for p, q in zip(ours, plain, strict=True):
        close(p.detach(), q.detach())


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_between_two_refreshes_the_weight_moves_within_the_rank(inner: str) -> None:
    ours = parameters()
    optimizer = galore(ours, Settings(options={"rank": 2, "refresh": 5, "inner": inner}))
    start = [p.detach().clone() for p in ours]
    steps = gradients(10)
    ranks = []
    for half in (steps[:5], steps[5:]):
        feed(optimizer, ours, half)
        ranks.append(
            [int(torch.linalg.matrix_rank(p.detach() - s, rtol=1e-9)) for p, s in zip(ours[:3], start[:3], strict=True)]
        )
    assert ranks == [[2, 2, 2], [4, 4, 4]]


def test_the_subspace_holds_the_largest_directions_of_the_gradient() -> None:
    ours = parameters([(12, 7)])
    ((g,),) = gradients(1, [(12, 7)])
    optimizer = galore(ours, Settings(lr=1.0, options={"rank": 3, "scale": 1.0, "inner": "sgd"}))
    before = ours[0].detach().clone()
    feed(optimizer, ours, [[g]])
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    close(before - ours[0].detach(), U[:, :3] @ torch.diag(S[:3]) @ Vh[:3])


def test_state_is_that_of_the_subspace() -> None:
    ours = parameters([(60, 40)], torch.float32)
    optimizer = galore(ours, Settings(options={"rank": 5}))
    feed(optimizer, ours, recorded([(60, 40)], 1))
    assert state_bytes(optimizer) == 4 * (40 * 5 + 2 * 60 * 5)


def test_a_gradient_of_zero_does_not_choose_the_subspace() -> None:
    ours, other = parameters([(12, 7)]), parameters([(12, 7)])
    steps = gradients(3, [(12, 7)])
    settings = Settings(options={"rank": 2, "refresh": 100})
    feed(galore(ours, settings), ours, [[torch.zeros(12, 7).double()], *steps])
    feed(galore(other, settings), other, steps)
    assert torch.equal(ours[0], other[0])


@pytest.mark.filterwarnings("ignore")
def test_it_agrees_with_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """galore-torch on recorded gradients over two refreshes; without decay, which it applies after the update."""
    theirs_module: Any = oracle("galore_torch.adamw", monkeypatch)
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    settings = Settings(eps=1e-12, options={"rank": 4, "refresh": 3, "scale": 0.25})
    projected = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": theirs[:3], **projected}, {"params": theirs[3:]}]
    reference = theirs_module.AdamW(groups, lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    feed(galore(ours, settings), ours, recorded(SHAPES, 8))
    feed(reference, theirs, recorded(SHAPES, 8))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_options_that_make_no_sense_are_refused() -> None:
    for wrong in ({"rank": 0}, {"refresh": 0}):
        with pytest.raises(UsageError):
            Options(**wrong)
    with pytest.raises(UsageError, match="the longest short side is 8"):
        galore(parameters(), Settings(options={"rank": 9}))
