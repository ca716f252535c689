"""CoLA, chain of LoRA: learn what the links before have left over. Xia, Qin and Hazan 2024,
https://arxiv.org/abs/2401.04151

    for each of M links:  tune B A, tie a knot (put s B A aside), extend the chain:  W' = W + s sum_i B_i A_i

Each link has a whole optimizer and learning-rate schedule of its own, and the links share the steps of the run
equally. With one link this is LoRA bit for bit. `step_down` makes each link's rank a share of the one before; the
scale s stays.

No official code is published; what is not in the paper (equal shares, the constant scale) is ours.

When: the change needs a higher rank than can be trained at once. It costs steps, for each link gets its share of
them, and the work of the ranks' sum until merged.
"""

from dataclasses import dataclass

from ...core.errors import UsageError
from . import Run
from ._links import Links, Stages, refuses

__all__ = ["CONTROLLER", "CoLA", "refuses"]


@dataclass(frozen=True, kw_only=True)
class CoLA:
    """The chain.

    links: how many, one after the other
    step_down: rank of a link over that of the link before; 1 for equal ranks
    """

    links: int = 3
    step_down: float = 1.0

    def __post_init__(self) -> None:
        if self.links < 1:
            raise UsageError(f"links must be at least 1, not {self.links}")
        if not 0 < self.step_down <= 1:
            raise UsageError(f"step_down must be in (0, 1], not {self.step_down}")

    def start(self, run: Run) -> Stages:
        """Put chains around the adapters."""
        links = Links(run)

        def tie_knot(number: int) -> None:
            links.freeze()
            links.resize(self.step_down**number)
            links.restart(number)

        return Stages(run, self.links, links, tie_knot)


CONTROLLER = CoLA
