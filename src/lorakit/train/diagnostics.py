"""What a run can tell about itself while it trains: is the rate right, is the backward pass right, does the adapter overfit.

`train.diagnose: true` lets a `Watching` look at step 1 and at every `train.diagnose_steps`-th; what it finds goes into the
records of these steps and of the evaluations, under the names of `FIELDS`. It draws no random numbers of the run, changes no
gradient and no weight: losses and adapter are the same bytes with and without it. An ordinary run has a `Nothing`.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.attach import use
from ..core.scaling import leaves, scalable, scales, slopes
from ..data.dataset import Example
from ..models.modes import evaluating
from ..optim.groups import Factors
from ..theory import coding, gain, gradients
from ..theory.alarms import Alarms, rules
from ..theory.thresholds import LEAST_CHANGE
from .movement import Movement
from .task import Task

SLOPE_ROWS, LEAST_ROWS, SLOPE_SHARE = 32, 8, 250
"""Validation rows, evenly spaced, of which an evaluation also takes the gradient: one in `SLOPE_SHARE` of the rows trained since it
last did, at most the first number. Below the second number it waits; the last evaluation of a run does not."""

RECENT = 0.2
"""Weight of the last step in the recent training loss."""

FIELDS = {
    "gain_ratio": "what a step lowered the loss of its batch by, over what the gradient promised",
    "train_slope": "dL/dγ on the batch of the step, <A, dA>; γ scales the change",
    "slope_mismatch": "<A, dA> against <B, dB>: 0 if the backward pass is right",
    "rho": "||ΔW|| over ||W|| of the adapted layers",
    "rho_step": "what the step added to ΔW, over ||W||",
    "A_movement": "how far A is from its start, over the size of its start",
    "grad_ratio": "||dA|| over ||dB||",
    "noise_scale": "rows at which the noise of the gradient equals its signal; needs train.accumulate",
    "decay_survival": "share of a weight that weight decay has left of it",
    "eval_slope": "dL/dγ on validation rows: above 0 a weaker adapter would be better",
    "eval_slope_se": "its standard error over rows",
    "curve_exponent": "p of loss ~ steps^-p on validation rows, since half as many steps: what the last ones brought",
    "description_bits": "bits that the first visits of the rows wrote into the adapter",
    "bits_per_parameter": "those per trained number",
}


class Diagnostics(Protocol):
    """What the loop tells it, and what it has to say. Steps count from 0."""

    def gradient(self, step: int, index: int, of: int, share: float, rows: int) -> None:
        """Take note of micro-batch `index` of `of`, whose gradient is there: its share of the weight of the step, its rows."""
        ...

    def update(self, step: int, before: float, replay: Callable[[], float]) -> AbstractContextManager[None]:
        """Stand around the optimizer's step. before: mean loss of the step; replay: computes it again, masks and all."""
        ...

    def stepped(self, record: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """Give what is to be recorded of a step beside its record; weight: its trained tokens."""
        ...

    def evaluated(self, record: Mapping[str, Any], valid: Sequence[Example]) -> dict[str, Any]:
        """Give what is to be recorded of an evaluation beside its record."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give what a checkpoint must hold, as tensors and as JSON."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take that state back; what is not there is not measured from here on."""
        ...


class Nothing:
    """An ordinary run looks at nothing."""

    def gradient(self, step: int, index: int, of: int, share: float, rows: int) -> None:
        """Do nothing."""

    def update(self, step: int, before: float, replay: Callable[[], float]) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def stepped(self, record: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """Add nothing."""
        return {}

    def evaluated(self, record: Mapping[str, Any], valid: Sequence[Example]) -> dict[str, Any]:
        """Add nothing."""
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Hold nothing."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Need nothing."""


@dataclass
class Gradients:
    """The gradient of the step that is looked at, as it adds up over its micro-batches."""

    sums: list[Tensor] = field(default_factory=list)
    """Of the loss by each parameter, over the micro-batches so far."""
    means: list[Tensor] = field(default_factory=list)
    """Sum of each micro-batch's own mean gradient; only where there are several."""
    squares: float = 0.0
    """Sum of their squared norms."""
    batches: int = 0
    rows: int = 0


@dataclass
class Kept:
    """What is remembered from step to step, all of it in a checkpoint."""

    log_decay: float = 0.0
    """ln of the share that weight decay has left."""
    first_nats: float = 0.0
    """Sum of the losses of first visits, and how many tokens they were of."""
    first_tokens: int = 0
    whole: bool = True
    """Whether that is so from the first step on."""
    rows: int = 0
    """Rows trained since the slope was last taken."""
    loss: float | None = None
    """Of training, recent steps counting most."""
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on validation rows)."""


class Watching:
    """Looks at step 1 and at every `every`-th, and at evaluations."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        task: Task,
        optimizer: torch.optim.Optimizer,
        factors: Sequence[Factors],
        *,
        every: int,
        last: int,
        cumulative: bool,
        say: Callable[[str], None],
    ) -> None:
        """last: the steps of the run. say: tells the user.

        cumulative: gradients add up over micro-batches, rather than the optimizer taking each away.
        """
        self.model, self.name, self.task, self.optimizer = model, name, task, optimizer
        self.every, self.last, self.cumulative, self.say = every, last, cumulative, say
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.pairs = [f for f in factors if f.A.requires_grad and f.B.requires_grad]
        self.movement = Movement(model, name, self.pairs)
        frozen = next((p for p in model.parameters() if not p.requires_grad), self.parameters[0])
        dtype = str(frozen.dtype).removeprefix("torch.")
        self.alarms = Alarms(rules(dtype))
        self.least = LEAST_CHANGE["float32" if dtype in ("float32", "float64") else "bfloat16"]
        self.scales = scales(model, name)
        self.kept = Kept()
        self.seen = Gradients()
        self.found: dict[str, float] = {}
        self.rows = 0  # of the step under way

    def due(self, step: int) -> bool:
        """Whether this step is looked at."""
        return step == 0 or (step + 1) % self.every == 0

    # --- around a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gradient(self, step: int, index: int, of: int, share: float, rows: int) -> None:
        """Copy the gradient, and take the micro-batch's own part of it for the noise scale."""
        self.rows = rows if index == 0 else self.rows + rows
        if step == 0 and index == 0:
            self.movement.begin()
        if not self.due(step):
            return
        if index == 0:
            self.seen = Gradients()
        seen = self.seen
        now = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.parameters]
        if self.cumulative and seen.sums:
            own = torch._foreach_sub(now, seen.sums)
        else:
            own = now
        if of > 1:
            mean = torch._foreach_div(own, share)
            seen.squares += _square(mean)
            seen.means = list(torch._foreach_add(seen.means, mean)) if seen.means else list(mean)
        seen.sums = now if self.cumulative or not seen.sums else list(torch._foreach_add(seen.sums, now))
        seen.batches, seen.rows = seen.batches + 1, seen.rows + rows

    @contextmanager
    def update(self, step: int, before: float, replay: Callable[[], float]) -> Generator[None]:
        """Compare what the step did with what its gradient promised."""
        if not self.due(step):
            yield
            return
        old = [p.detach().clone() for p in self.parameters]
        changes = self.movement.changes()
        found = self._of_gradient()
        yield
        with torch.no_grad():
            moved = torch._foreach_sub([p.detach() for p in self.parameters], old)
            promised = sum(float((g.double() * m).sum()) for g, m in zip(self.seen.sums, moved, strict=True))
        found |= self.movement.of_step(changes)
        found["gain_ratio"] = math.nan
        if abs(promised) > self.least * abs(before):  # below that rounding decides
            with _own_randomness(self.parameters[0].device):
                found["gain_ratio"] = gain.gain_ratio(before, replay(), promised)
        self.found, self.seen = found, Gradients()

    def _of_gradient(self) -> dict[str, float]:
        """Give what the gradient of the step says by itself."""
        seen, where = self.seen, {id(p): i for i, p in enumerate(self.parameters)}
        found = {"train_slope": math.nan, "slope_mismatch": math.nan, "grad_ratio": math.nan, "noise_scale": math.nan}
        if self.pairs:
            dA = [seen.sums[where[id(f.A)]] for f in self.pairs]
            dB = [seen.sums[where[id(f.B)]] for f in self.pairs]
            each = [gradients.scale_derivative(f.A, a, f.B, b) for f, a, b in zip(self.pairs, dA, dB, strict=True)]
            found["train_slope"] = math.fsum(e.value for e in each)
            found["slope_mismatch"] = max(e.mismatch for e in each)
            size = _square(dB)
            found["grad_ratio"] = math.sqrt(_square(dA) / size) if size else math.nan
        if seen.batches > 1:
            scale = gain.noise_scale_from(seen.squares, _square(seen.means), seen.batches, seen.rows / seen.batches)
            found["noise_scale"] = scale.batch
            found["batch_over_noise"] = seen.rows / scale.batch
        return found

    # --- records ------------------------------------------------------------------------------------------------------------

    def stepped(self, record: Mapping[str, Any], weight: int) -> dict[str, Any]:
        """Keep the sums that need every step, and give what a look has found."""
        decayed = [group for group in self.optimizer.param_groups if group.get("weight_decay")]
        if decayed:
            self.kept.log_decay += math.log1p(-decayed[0]["lr"] * decayed[0]["weight_decay"])
        self.kept.rows += self.rows
        before = record["loss"] if self.kept.loss is None else self.kept.loss
        self.kept.loss = before + RECENT * (record["loss"] - before)
        if record["epoch"] <= 1:
            self.kept.first_nats += record["loss"] * weight
            self.kept.first_tokens += weight
        if not self.due(record["step"] - 1):
            return {}
        found, self.found = self.found, {}
        rate = max(group["lr"] / group["initial_lr"] for group in self.optimizer.param_groups)
        at_peak = found["rho_step"] / rate if rate > 0 else math.nan
        self._tell(record["step"], {**found, "rho_step_at_peak": at_peak})
        survival = {"decay_survival": math.exp(self.kept.log_decay)} if decayed and self.kept.whole else {}
        return {k: v for k, v in {**found, **survival}.items() if k in FIELDS} | {"alarms": self.alarms.on}

    def evaluated(self, record: Mapping[str, Any], valid: Sequence[Example]) -> dict[str, Any]:
        """Take the slope on validation rows, and what follows from a held-out loss: description length, learning curve."""
        rows = min(SLOPE_ROWS, self.kept.rows // SLOPE_SHARE)
        if record["step"] == self.last:
            rows = max(rows, LEAST_ROWS)
        slope = self._slope(valid, rows) if rows >= LEAST_ROWS else (math.nan, math.nan)
        found = dict(zip(("eval_slope", "eval_slope_se"), slope, strict=True))
        bits = math.nan
        if self.kept.whole:
            bits = (self.kept.first_nats - record["eval_loss"] * self.kept.first_tokens) / coding.LN2
        found |= {
            "description_bits": bits,
            "bits_per_parameter": bits / sum(p.numel() for p in self.parameters),
        }
        self.kept.evaluations.append((record["step"], record["eval_loss"]))
        found["curve_exponent"] = gain.curve_exponent(self.kept.evaluations)
        sure = found["eval_slope"] > 2 * found["eval_slope_se"]
        strong = found["eval_slope"] if sure or math.isnan(found["eval_slope"]) else min(found["eval_slope"], 0.0)
        learned = self.kept.loss is not None and self.kept.loss < record["eval_loss"]  # the training rows themselves
        about = {"overfit_slope": strong if learned else 0.0, "strong_slope": 0.0 if learned else strong}
        if learned:
            about["rising_exponent"] = found["curve_exponent"]
        self._tell(record["step"], {**found, **about})
        return {**found, "alarms": self.alarms.on}

    def _slope(self, valid: Sequence[Example], rows: int) -> tuple[float, float]:
        """Give dL/dγ over so many validation rows and its standard error over them; NaN for a method that γ cannot scale."""
        if not self.scales:
            return math.nan, math.nan
        use(self.model, self.name)
        count = min(rows, len(valid))
        self.kept.rows = 0
        chosen = [valid[i * len(valid) // count] for i in range(count)]
        weights = torch.tensor([float(self.task.weight(row)) for row in chosen], dtype=torch.float64)
        found = torch.zeros(count, dtype=torch.float64)
        with (
            _own_randomness(self.parameters[0].device),
            evaluating(self.model),
            scalable(self.model, self.name) as strengths,
            leaves(strengths) as gammas,
            torch.enable_grad(),
        ):
            for i, row in enumerate(chosen):
                found[i] = float(slopes(self.task.loss(self.model, [row])[0], gammas, [])[0].double().sum())
        mean = float(found.sum() / weights.sum())
        rest = (found - mean * weights).square().sum() * count / max(count - 1, 1)  # of a ratio, by linearisation
        return mean, float(rest.sqrt() / weights.sum())

    def _tell(self, step: int, numbers: Mapping[str, float]) -> None:
        for text in self.alarms.look(numbers):
            self.say(f"diagnose, step {step}: {text}")

    # --- checkpoints --------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the start of A, the sums and the alarms."""
        return self.movement.starts(), {"kept": dict(vars(self.kept)), "alarms": self.alarms.state}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take them back. For a run that was not watched before, what needs its beginning is not measured."""
        self.movement.restore(tensors)
        self.kept = Kept(**scalars.get("kept", {"whole": False}))
        self.alarms.restore(scalars.get("alarms", {}))


@contextmanager
def _own_randomness(device: torch.device) -> Generator[None]:
    """Put the random state back at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _square(tensors: Sequence[Tensor]) -> float:
    """Give the squared norm of all entries together."""
    return float(torch.stack(torch._foreach_norm(list(tensors))).double().square().sum())
