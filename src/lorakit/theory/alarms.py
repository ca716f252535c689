"""Alarms of a training run: what is watched, from when on it is said, and from when on it is over (hysteresis).

An alarm begins when its number is beyond the threshold at `looks` looks in a row, and ends when it is back beyond `clear` at as
many; in between nothing is said. A number that was not measured changes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import thresholds
from .thresholds import Threshold


@dataclass(frozen=True)
class Rule:
    """number: the field it is about. statement, after: what it means, and what to do."""

    name: str
    number: str
    threshold: Threshold
    looks: int
    statement: str
    after: str


RULES: tuple[Rule, ...] = (
    Rule(
        "learning_rate_high",
        "gain_ratio",
        thresholds.GAIN_RATIO,
        2,
        "a step lowers the loss of its own batch by less than half of what the gradient promises: it overshoots",
        "halve optim.lr (or alpha), and start from the last good checkpoint if the loss has risen",
    ),
    Rule(
        "backward_wrong",
        "slope_mismatch",
        thresholds.MISMATCH["float32"],
        1,
        "<A, dA> and <B, dB> differ, which no loss and no data can do: a backward pass is wrong",
        "stop; try without train.checkpointing and report it with env.json",
    ),
    Rule(
        "update_large",
        "rho_step",
        thresholds.LARGE_UPDATE,
        1,
        "one step moves the adapted matrices by more than a fifth of their size",
        "lower optim.lr or alpha, or give optim.warmup",
    ),
    Rule(
        "update_inert",
        "rho_step_at_peak",
        thresholds.INERT_UPDATE,
        3,
        "steps hardly move the adapted matrices, even at the peak of the learning rate",
        "raise optim.lr or alpha",
    ),
    Rule(
        "too_strong",
        "strong_slope",
        thresholds.OVERFIT_SLOPE,
        1,
        "on held-out rows a weaker adapter would be better, dL/dγ is positive, though they are no harder than the training rows",
        "lower optim.lr or alpha; lorakit strength says by how much",
    ),
    Rule(
        "rising",
        "rising_exponent",
        thresholds.CURVE_EXPONENT,
        1,
        "the held-out loss has risen since half as many steps, while the training loss is below it: it overfits",
        "stop here or at the best evaluation (eval.patience, eval.load_best)",
    ),
    Rule(
        "overfit",
        "overfit_slope",
        thresholds.OVERFIT_SLOPE,
        1,
        "on held-out rows a weaker adapter would be better, dL/dγ is positive, and the training loss is below theirs",
        "stop here or at the best evaluation (eval.patience, eval.load_best); lorakit strength says by how much",
    ),
    Rule(
        "batch_large",
        "batch_over_noise",
        thresholds.BATCH_OVER_NOISE,
        2,
        "a step has more rows than the noise of its gradient calls for: more steps of fewer rows would learn more",
        "lower train.accumulate or train.batch_size",
    ),
    Rule(
        "capacity",
        "bits_per_parameter",
        thresholds.BITS_PER_PARAMETER,
        1,
        "the run has written about as many bits into each number of the adapter as such numbers hold",
        "raise r, or adapt more layers",
    ),
)


def rules(dtype: str) -> tuple[Rule, ...]:
    """Give the rules for a base model that computes in `dtype` ("float32" or one of 16 bits)."""
    own = thresholds.MISMATCH["float32" if dtype in ("float32", "float64") else "bfloat16"]
    return tuple(
        Rule(r.name, r.number, own, r.looks, r.statement, r.after) if r.name == "backward_wrong" else r for r in RULES
    )


class Alarms:
    """The alarms of one run. `state` is plain JSON: name -> [whether it is on, looks in a row that speak for a change]."""

    def __init__(self, watched: Sequence[Rule]) -> None:
        self.rules = watched
        self.state: dict[str, list[Any]] = {rule.name: [False, 0] for rule in watched}

    @property
    def on(self) -> list[str]:
        """Give the names of the alarms that are on."""
        return [rule.name for rule in self.rules if self.state[rule.name][0]]

    def look(self, numbers: Mapping[str, float]) -> list[str]:
        """Take in what one look measured, and give what is to be said about it."""
        said = []
        for rule in self.rules:
            value = numbers.get(rule.number, math.nan)
            if math.isnan(value):
                continue
            on, count = self.state[rule.name]
            changes = rule.threshold.cleared(value) if on else rule.threshold.crossed(value)
            count = count + 1 if changes else 0
            if count >= rule.looks:
                on, count = not on, 0
                what = (
                    f"{rule.statement} ({rule.number} {value:.3g}); next: {rule.after}" if on else f"over ({value:.3g})"
                )
                said.append(f"{rule.name.replace('_', ' ')}: {what}")
            self.state[rule.name] = [on, count]
        return said

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Go on from a state; alarms that it does not know begin off."""
        self.state |= {name: list(state[name]) for name in self.state if name in state}
