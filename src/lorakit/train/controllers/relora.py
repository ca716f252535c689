"""ReLoRA: restart the factors again and again, so that low-rank steps add up to more. Lialin et al. 2023,
https://arxiv.org/abs/2307.05695

    every `every` steps:  put s B A aside (see `_links.py`), draw A anew, B = 0, prune the factors' optimizer state
    rate of step t:       m(t)                                 in the run's warm-up, and where no restart is near
                          q/w m(t - q + w), q = t mod every    in the first w = `warmup` steps after a restart
                          m = floor + (1 - floor) · the run's schedule, after the run's warm-up

With `optim.schedule: cosine` the rate is the paper's jagged cosine. As there it is zero in the step after a restart.

The authors' code counts Adam's steps on through a restart. Zeroed means are then no longer corrected for their bias,
and the first update is (1 - beta1)/sqrt(1 - beta2) = 3.2 times the rate: what the renewed warm-up is for. With
`prune: forget` that count starts anew as well, and the update has the size of the rate.

Departures from that code: frozen factors instead of a changed base; one period for restarts and pruning; its "reset",
which clears a random 99.9 %, clears all and is the default instead of magnitude. Defects of it that are not copied:
factors that are both zero in the first cycle and never get a gradient, and a learned scale that dies at the first
restart.

When: a run is long, as in pretraining, and a low rank is the limit. It costs the work of the ranks' sum until merged,
and a dip of the learning rate at each restart. `prune: magnitude` and `random` are the authors' and clear each mean by
itself: entries whose second mean was cleared and whose first was not make steps of first mean / eps, since A gets no
gradient while B is zero; in `benchmarks/methods_toy.py` that diverges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ...core.errors import UsageError
from . import Run
from ._links import Links, refuses

__all__ = ["CONTROLLER", "ReLoRA", "prune", "refuses"]

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True, kw_only=True)
class ReLoRA:
    """When to restart, and what is left of the optimizer's state.

    every: steps between restarts; a quarter of the run when absent
    warmup: renewed warm-up, a fraction of a cycle if below 1, otherwise a number of steps
    floor: lowest multiplier of the learning rate
    prune: reset sets the running means to zero; random and magnitude a share of them; forget also restarts their count
    share: of the entries that random and magnitude set to zero
    """

    every: int | None = None
    warmup: float = 0.05
    floor: float = 0.1
    prune: Literal["reset", "random", "magnitude", "forget"] = "reset"
    share: float = 0.9

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UsageError(f"every must be at least 1, not {self.every}")
        if not (self.warmup >= 0 and 0 <= self.floor <= 1 and 0 < self.share <= 1):
            given = f"{self.warmup}, {self.floor} and {self.share}"
            raise UsageError(f"warmup must not be negative, floor in [0, 1] and share in (0, 1], not {given}")

    def start(self, run: Run) -> "Restarts":
        """Put chains around the adapters."""
        every = max(1, run.total // 4) if self.every is None else self.every
        if every >= run.total:
            raise UsageError(
                f"relora would never restart: every is {every}, the run has {run.total} steps", fix="lower every"
            )
        warmup = math.ceil(round(self.warmup * every, 9)) if self.warmup < 1 else round(self.warmup)
        if warmup >= every or run.warmup > every:
            why = f"a cycle has {every} steps, the run's warm-up {run.warmup} and that after a restart {warmup}"
            raise UsageError("a warm-up of relora does not fit into a cycle", why=why, fix="lower it, or raise every")
        return Restarts(self, run, every, warmup)


@final
class Restarts:
    """The controller of one run."""

    def __init__(self, settings: ReLoRA, run: Run, every: int, warmup: int) -> None:
        self.settings, self.run, self.every, self.warmup = settings, run, every, warmup
        self.links = Links(run)

    def schedule(self, step: int) -> float:
        """Give the jagged multiplier."""
        since = step % self.every
        if step >= self.every and since < self.warmup:
            return since / self.warmup * self._smooth(step - since + self.warmup)
        return self._smooth(step)

    def _smooth(self, step: int) -> float:
        multiplier, floor = self.run.schedule(step), self.settings.floor
        return multiplier if step < self.run.warmup else floor + (1 - floor) * multiplier

    def penalty(self) -> None:
        """Add nothing."""

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Restart at the end of a cycle, except the last."""
        number, rest = divmod(step + 1, self.every)
        if rest == 0 and step + 1 < self.run.total:
            self.links.freeze()
            self.links.restart(number)
            seed = self.run.seed * 0x9E3779B97F4A7C15 + number
            for index, parameter in enumerate(self.links.parameters()):
                prune(optimizer, parameter, self.settings.prune, self.settings.share, (seed * 31 + index) % 2**63)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the ranks; the cycle follows from the step."""
        return {}, self.links.state()

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Give the factors their shapes."""
        self.links.restore(scalars)


def prune(optimizer: torch.optim.Optimizer, parameter: Tensor, mode: str, share: float, seed: int) -> None:
    """Clear part of what the optimizer knows of `parameter`; each mean by its own entries, as in the authors' code."""
    if mode == "forget":
        optimizer.state.pop(parameter, None)
        return
    state = optimizer.state.get(parameter, {})
    generator = torch.Generator(parameter.device).manual_seed(seed)
    for mean in (state[key] for key in MOMENTS if key in state):
        if mode == "reset":
            mean.zero_()
        elif mode == "random":
            mean.mul_(torch.rand(mean.shape, generator=generator, device=mean.device) > share)
        else:
            mean.mul_(mean.abs() > _quantile(mean.abs(), share))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Give the largest of the lowest `share` of the values.

    By sorting: torch.quantile refuses more than 16 million, and kthvalue is quadratic where they happen to be in order.
    """
    return values.flatten().sort().values[math.floor(share * (values.numel() - 1))]


CONTROLLER = ReLoRA
