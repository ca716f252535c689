"""The training loop, top to bottom: rows of a step, losses, gradients, checks, update, log, evaluate, save.

A run is a generator (`training`): it yields each micro-batch whose gradient it needs and is sent the loss once the gradient is
there. `fit` gives one run what it asks for; `many.py` gives several runs on one model what they ask for, in one pass.

Everything random is a pure function of (seed, step, micro-batch), so a resumed run is the uninterrupted one bit for bit, and
sampling or evaluating in between moves nothing.
"""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..core.attach import use
from ..core.errors import DivergenceError, UsageError
from ..core.threads import for_each_of
from ..data.dataset import Example
from ..models.modes import evaluating
from ..optim import Accumulating
from ..optim.groups import scale_learning_rates
from .adapter_state import adapter_tensors, restore_adapter
from .checkpoint import optimizer_tensors, restore_optimizer, save_checkpoint
from .controllers import Controller
from .diagnostics import Diagnostics
from .measure import memory_gb
from .records import Records
from .shares import Team, share_out
from .steps import Steps, Window
from .stop import Interrupted, StopRequest
from .task import Task

PATIENCE_FOR_DIVERGENCE = 5  # steps in a row with a loss no better than guessing, after a better start


@dataclass
class Job:
    """Everything a run needs, made by `run.py`; the loop adds nothing and looks nothing up."""

    model: nn.Module
    adapter: str
    task: Task
    examples: Sequence[Example]
    valid: Sequence[Example]
    steps: Steps
    optimizer: torch.optim.Optimizer
    controller: Controller
    clip: float | None
    seed: int
    eval_steps: int | None
    save_steps: int
    keep_checkpoints: int
    patience: int | None
    load_best: bool
    directory: Path
    config_hash: str
    identity: Mapping[str, Any]
    """What a checkpoint must agree with to be resumed: fingerprints of data and base."""
    records: Records
    stop: StopRequest
    diagnostics: Diagnostics
    sample: Callable[[int], None]
    """Answer the fixed prompts and log the answers."""
    first_step: Callable[[], None]
    """Prove after the first step that what was trained can be saved and read again."""
    team: Team = field(default_factory=Team)
    """The threads that share a micro-batch."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass
class State:
    """Where a run stands; with the tensors, all that a checkpoint holds."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    evaluated: bool = True
    """Whether the evaluation due after `step` has been done."""
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0
    """Evaluations since the best one."""
    divergent: int = 0
    """Steps in a row with a loss no better than a uniform guess."""
    first_loss: float | None = None
    last_loss: float | None = None
    kernels: list[str] | None = None
    """The operations that are Triton's; None before it is known."""
    evaluation: dict[str, float] = field(default_factory=dict)


class Micro(NamedTuple):
    """A micro-batch whose gradient a run needs: of its summed loss over `weight`, with the dropout masks of `seed`."""

    job: Job
    rows: Sequence[Example]
    weight: int
    seed: int


T = TypeVar("T")
Course = Generator[Micro, float, T]
"""What yields micro-batches, is sent the summed loss of each when its gradient has been added up, and gives a T at its end."""


def fit(job: Job, state: State) -> State:
    """Train from `state` to the end of the run, or to early stopping. Raises Interrupted after saving on a signal."""
    return alone(training(job, state))


def alone(course: Course[T]) -> T:
    """Give a course every gradient it asks for, one after the other, to its end."""
    try:
        micro = next(course)
        while True:
            micro = course.send(_differentiate(micro))
    except StopIteration as end:
        return end.value


def _differentiate(micro: Micro) -> float:
    """Add a micro-batch's gradient up and give its summed loss; the graph must not live on, a parameter may be replaced."""
    job = micro.job
    torch.manual_seed(micro.seed)
    model = use(job.model, job.adapter)
    shares = _shares(job, micro.rows)
    return job.team.backward(lambda rows: job.task.loss(model, rows)[0], shares, micro.weight, job.parameters)


def _shares(job: Job, rows: Sequence[Example]) -> list[list[Example]]:
    """Deal rows out to the threads of the run."""
    return [[rows[i] for i in share] for share in share_out([len(row.input_ids) for row in rows], job.team.count)]


def training(job: Job, state: State) -> Course[State]:
    """Train from `state` to the end of the run, or to early stopping."""
    began = time.monotonic() - state.seconds
    while True:
        if not state.evaluated:
            evaluate_and_sample(job, state)
            save(job, state, when_due=True)
        if state.step >= job.steps.total or (job.patience is not None and state.worse >= job.patience):
            break
        window = job.steps[state.step]
        scale_learning_rates(job.optimizer, job.controller.schedule(state.step))
        loss, norm, weight = yield from update(job, state, window)
        rows = [job.examples[i] for batch in window.batches for i in batch]
        state.step += 1
        state.tokens += sum(len(row.input_ids) for row in rows)
        state.trained_tokens += weight
        seconds, state.seconds = state.seconds, time.monotonic() - began
        state.last_loss = loss
        record = {
            "step": state.step,
            "epoch": round(window.epoch, 6),
            "loss": loss,
            "lr": max(group["lr"] for group in job.optimizer.param_groups),
            "grad_norm": norm,
            "tokens": state.tokens,
            "trained_tokens": state.trained_tokens,
            "tok_s": sum(len(row.input_ids) for row in rows) / max(state.seconds - seconds, 1e-9),
            "mem_gb": memory_gb(),
            "t": state.seconds,
        }
        job.records.step(record | job.diagnostics.stepped(record, weight))
        if state.step == 1:
            job.first_step()
        state.evaluated = not evaluation_due(job, state, window)
        if state.evaluated:
            save(job, state, when_due=True)
    return state


def update(job: Job, state: State, window: Window) -> Course[tuple[float, float, int]]:
    """Take one optimizer step. Gives (mean loss, gradient norm before clipping, weight).

    Raises DivergenceError before anything is changed if the loss or a gradient is not finite, and Interrupted (with the
    state of before this step saved) on a signal.
    """
    batches = [[job.examples[i] for i in batch] for batch in window.batches]
    weight = sum(job.task.weight(row) for batch in batches for row in batch)
    job.model.train()
    total = 0.0
    sums = job.optimizer if len(batches) > 1 and isinstance(job.optimizer, Accumulating) else None
    for i, batch in enumerate(batches):
        if job.stop:
            interrupt(job, state)
        total += yield Micro(job, batch, weight, random_seed(job.seed, state.step, i))
        share = sum(job.task.weight(row) for row in batch) / weight
        job.diagnostics.gradient(state.step, i, len(batches), share, len(batch))
        if sums is not None:
            sums.take()
    if sums is not None:
        sums.give()
    penalty = job.controller.penalty()
    if penalty is not None:
        penalty.backward()
    parameters = job.parameters
    if state.step == 0:
        check_all_reached(job, parameters)
    with for_each_of(parameters):
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if job.clip is None else job.clip))
    check_finite(job, state, total / weight, norm, batches)

    def replay() -> float:
        seeds = [random_seed(job.seed, state.step, i) for i in range(len(batches))]
        return sum(float(batch_loss(job, s, b).detach()) for s, b in zip(seeds, batches, strict=True)) / weight

    with job.diagnostics.update(state.step, total / weight, replay), for_each_of(parameters):
        job.optimizer.step()
    job.controller.after_update(state.step, job.optimizer)
    job.optimizer.zero_grad(set_to_none=True)
    return total / weight, norm, weight


def batch_loss(job: Job, seed: int, batch: Sequence[Example]) -> Tensor:
    """Give the summed loss of a micro-batch under the run's adapter, with the dropout masks that belong to it."""
    torch.manual_seed(seed)
    return job.task.loss(use(job.model, job.adapter), batch)[0]


def random_seed(seed: int, step: int, batch: int) -> int:
    """Give the seed of one micro-batch's dropout. Odd multipliers keep neighbours apart modulo 2**63."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + batch * 0x94D049BB133111EB) % 2**63


def check_all_reached(job: Job, parameters: Sequence[nn.Parameter]) -> None:
    """Raise UsageError if a trainable tensor got no gradient: its layer is never run, and it would be saved untrained."""
    names = {id(p): name for name, p in job.model.named_parameters()}
    unreached = [names[id(p)] for p in parameters if p.grad is None]
    if unreached:
        layers = sorted({name.split(".adapters.")[0] for name in unreached})
        raise UsageError(
            f"{len(layers)} adapted layers take no part in the loss: {', '.join(layers[:5])}",
            why="no gradient reaches them, so they would be saved as they started",
            fix="leave them out with exclude_modules",
        )


def check_finite(job: Job, state: State, loss: float, norm: float, batches: Sequence[Sequence[Example]]) -> None:
    """Raise DivergenceError for NaN, infinity or a loss that stays where guessing is; the weights are untouched."""
    where = "rows " + ", ".join([row.where for batch in batches for row in batch][:8])
    fix = "lower optim.lr, or look at these rows; the last checkpoint is good: " + str(job.directory / "checkpoints")
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise DivergenceError(f"{what} at step {state.step + 1}; nothing was updated", fix=fix, where=where)
    state.first_loss = loss if state.first_loss is None else state.first_loss
    lost = loss > max(0.98 * job.task.worst, 3 * state.first_loss)
    state.divergent = state.divergent + 1 if lost else 0
    if state.divergent >= PATIENCE_FOR_DIVERGENCE:
        why = (
            f"for {state.divergent} steps it has been no better than a uniform guess ({job.task.worst:.4g}); "
            f"it began at {state.first_loss:.4g}"
        )
        raise DivergenceError(
            f"the loss is {loss:.4g} at step {state.step + 1}: the run has diverged", why=why, fix=fix, where=where
        )


def evaluation_due(job: Job, state: State, window: Window) -> bool:
    """Whether to evaluate after this step: every `eval_steps`, or by epochs (None), always at the end; 0 is never."""
    if job.eval_steps == 0:
        return False
    if state.step == job.steps.total:
        return True
    return window.ends_epoch if job.eval_steps is None else state.step % job.eval_steps == 0


def evaluate_and_sample(job: Job, state: State) -> None:
    """Evaluate, keep the best, answer the fixed prompts."""
    if job.valid:
        state.evaluation = evaluate(job, state)
        epoch = round(job.steps[state.step - 1].epoch, 6)
        record = {"step": state.step, "epoch": epoch, **state.evaluation, "t": state.seconds}
        job.records.evaluation(record | job.diagnostics.evaluated(record, job.valid))
        loss = state.evaluation["eval_loss"]
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.worse = loss, state.step, 0
        else:
            state.worse += 1
    job.sample(state.step)
    state.evaluated = True
    if job.load_best and state.best_step == state.step:
        save(job, state)


def evaluate(job: Job, state: State) -> dict[str, float]:
    """Give the mean loss (and accuracy) over the validation rows."""
    model = use(job.model, job.adapter)

    @torch.no_grad()  # of the thread that runs it
    def measured(rows: Sequence[Example]) -> tuple[float, int]:
        loss, correct = job.task.loss(model, rows)
        return float(loss), correct

    order = sorted(range(len(job.valid)), key=lambda i: len(job.valid[i].input_ids))
    size, total, weight, right = job.steps.batch_size, 0.0, 0, 0
    with evaluating(job.model):
        for i in range(0, len(order), size):
            if job.stop:
                interrupt(job, state)
            batch = [job.valid[k] for k in order[i : i + size]]
            for loss, correct in job.team.each(measured, _shares(job, batch)):
                total, right = total + loss, right + correct
            weight += sum(job.task.weight(row) for row in batch)
    return job.task.measures(total / weight, right / weight)


def interrupt(job: Job, state: State) -> None:
    """Drop the step under way, save the state before it, and stop."""
    job.optimizer.zero_grad(set_to_none=True)
    save(job, state)
    raise Interrupted(job.stop.signum or 0, state.step, f"output {job.directory}")


def save(job: Job, state: State, *, when_due: bool = False) -> None:
    """Write a checkpoint; `when_due` only every `save_steps` and at the end (for a kill during the export)."""
    due = job.save_steps > 0 and (state.step % job.save_steps == 0 or state.step == job.steps.total)
    if when_due and not due:
        return
    optimizer, optimizer_scalars = optimizer_tensors(job.optimizer)
    controller, controller_scalars = job.controller.state()
    diagnostics, diagnostics_scalars = job.diagnostics.state()
    adapter = adapter_tensors(job.model, job.adapter)
    save_checkpoint(
        job.directory / "checkpoints",
        state.step,
        {"adapter": adapter, "optimizer": optimizer, "controller": controller, "diagnostics": diagnostics},
        {
            "state": vars(state),
            "optimizer": optimizer_scalars,
            "controller": controller_scalars,
            "diagnostics": diagnostics_scalars,
            "identity": dict(job.identity),
        },
        keep=job.keep_checkpoints,
        protect={state.best_step} if job.load_best and state.best_step is not None else (),
        config_hash=job.config_hash,
    )


def restore(job: Job, tensors: Mapping[str, Mapping[str, torch.Tensor]], saved: Mapping[str, Any]) -> State:
    """Put a checkpoint's tensors in place and give the state it was taken at."""
    job.controller.restore(tensors["controller"], saved["controller"])
    restore_adapter(job.model, job.adapter, tensors["adapter"])
    restore_optimizer(job.optimizer, tensors["optimizer"], saved["optimizer"])
    job.diagnostics.restore(tensors.get("diagnostics", {}), saved.get("diagnostics", {}))
    return State(**saved["state"])
