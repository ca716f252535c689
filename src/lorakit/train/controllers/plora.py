"""PLoRA (PeriodicLoRA): train in stages, and move what each has learned out of the factors. Meng et al. 2024,
https://arxiv.org/abs/2402.16141

    momentum = 1:   put s B A aside, draw A anew, B = 0: each stage can learn r directions more
    momentum = m:   put m s B A aside, A = sqrt(1 - m) A, B = sqrt(1 - m) B

Either way W' is the same function before and after, and optimizer state and learning-rate schedule start anew with the
stage.

The second rule is ours. The paper unloads with a momentum too, but there is no code of its authors. An implementation
by others (MyTransformers: W + m s B A, then (1 - m) A and (1 - m) B) multiplies the learned change by 1 - m + m^2 each
time; ours keeps it exactly.

When: one LoRA of the same rank stops learning before the data are learned. It costs the work of the ranks' sum until
merged; each stage warms up and cools down anew.
"""

import math
from dataclasses import dataclass

from ...core.errors import UsageError
from . import Run
from ._links import Links, Stages, refuses

__all__ = ["CONTROLLER", "PLoRA", "refuses"]


@dataclass(frozen=True, kw_only=True)
class PLoRA:
    """How often to unload, and how much.

    stages: number of equal parts of the run
    momentum: share of the learned product that is moved out at the end of a stage; 1 for all of it, with new factors
    """

    stages: int = 4
    momentum: float = 1.0

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise UsageError(f"stages must be at least 1, not {self.stages}")
        if not 0 < self.momentum <= 1:
            raise UsageError(f"momentum must be in (0, 1], not {self.momentum}")

    def start(self, run: Run) -> Stages:
        """Put chains around the adapters."""
        links = Links(run)

        def unload(number: int) -> None:
            links.freeze(self.momentum)
            if self.momentum == 1:
                links.restart(number)
            else:
                links.scale(math.sqrt(1 - self.momentum))

        return Stages(run, self.stages, links, unload)


CONTROLLER = PLoRA
