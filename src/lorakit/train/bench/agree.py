"""Did two programs compute the same step? Loss, norm of the gradient, and the gradient of every factor.

In float32 they are held against each other. In bfloat16 both round, each in its own way, so each is held against a
float32 reference, and ours must not be further off than the peer, but for luck.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXACT = 1e-4  # of loss, norm and gradient in float32
ROUNDING = 2.0**-8  # of the loss in bfloat16: one unit in the last place of a number near 1
LUCK = 1.25  # two ways of rounding: over seeds, one's error was 0.9 to 1.2 times the other's on 64 to 1024 tokens


class Step(NamedTuple):
    """What a step computed before its update: mean loss, norm of the gradient, gradients by name."""

    loss: float
    norm: float
    gradients: Mapping[str, Tensor]


def read_step(result: Mapping[str, Any], file: Path) -> Step:
    """Give the first step of an arm's result, with the gradients it wrote to a file."""
    from safetensors.torch import load_file

    return Step(result["loss"], result["grad_norm"], load_file(file))


def agreement(ours: Step, theirs: Step, reference: Step | None = None) -> dict[str, Any]:
    """Compare two steps (in bfloat16: with a float32 reference). Gives each error, what is allowed, and the verdict."""
    if reference is None:
        measured = errors(ours, theirs)
        allowed = dict.fromkeys(measured, EXACT)
        return _verdict(measured, allowed, "relative difference to the peer, in float32")
    measured, peers = errors(ours, reference), errors(theirs, reference)
    near = LUCK * peers["gradient"]  # for the norm too: no norm is further off than its vector
    allowed = {"loss": max(peers["loss"], ROUNDING), "gradient norm": near, "gradient": near}
    return _verdict(
        measured, allowed, "relative error against a float32 reference; allowed is the peer's own and a little luck"
    ) | {"peer": peers}


def errors(found: Step, true: Step) -> dict[str, float]:
    """Give relative errors of loss and norm, and the mean over the factors of |g - g'| / |g'| (Frobenius norms).

    Infinite where the two have other factors.
    """
    if _shapes(found) != _shapes(true):
        return {"loss": _off(found.loss, true.loss), "gradient norm": float("inf"), "gradient": float("inf")}
    each = torch.stack([(found.gradients[n] - g).norm() / g.norm() for n, g in true.gradients.items()])
    return {
        "loss": _off(found.loss, true.loss),
        "gradient norm": _off(found.norm, true.norm),
        "gradient": float(each.mean()),
    }


def _shapes(step: Step) -> dict[str, torch.Size]:
    return {name: gradient.shape for name, gradient in step.gradients.items()}


def _off(value: float, true: float) -> float:
    return abs(value - true) / abs(true)


def _verdict(measured: dict[str, float], allowed: dict[str, float], against: str) -> dict[str, Any]:
    measures = {name: {"error": error, "allowed": allowed[name]} for name, error in measured.items()}
    return {
        "agrees": all(m["error"] <= m["allowed"] for m in measures.values()),
        "against": against,
        "measures": measures,
    }
