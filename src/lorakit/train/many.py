"""Several runs on one frozen base at once: a sweep of ranks, learning rates, seeds.

Each run is its own: data order, losses, clipping, learning rate, early stopping, records, checkpoints, adapter. Only the
forward and backward passes are shared: what the runs ask for next (`loop.training`) is packed into one row of documents, so
the base's products take the tokens of several runs at once, and each layer adds each run's adapter to that run's rows
(`core/together.py`). So every run is the one it would be alone, up to the rounding of larger products.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import nn

from ..core.attach import use
from ..core.errors import CheckError, DivergenceError, LorakitError, UsageError
from ..core.files import RunLock
from ..core.start import needs
from ..core.target import Target
from ..core.together import NAME, Part, Pass, together
from ..data.dataset import Dataset
from ..data.encode import find_task
from ..data.rows import Rows
from .base import Base, load_base
from .config import RunConfig
from .config_check import diff
from .loop import Course, Job, Micro, State, interrupt, training
from .progress import Progress
from .run import encoded, logged, read_rows, resolved
from .run_directory import RunDirectory
from .session import RunResult, Session
from .stop import Interrupted, StopRequest, listen
from .task import LanguageModelling, predicted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, RunResult | LorakitError]

# What runs on one base, packed into one row, have in common. The ranks of layers may differ, the layers may not.
SAME = frozenset(
    {f"method.{f.name}" for f in fields(Target)} - {"method.rank_pattern", "method.alpha_pattern"}
    | {"train.task", "train.max_length", "train.checkpointing", "train.cache_prefix"}
)


def run_many(
    configs: Mapping[str, RunConfig],
    *,
    overwrite: bool = False,
    model: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None,
    progress: Callable[[str], Progress] | None = None,
    at_once: int | None = None,
    pass_tokens: int | None = None,
) -> Results:
    """Train all runs, or go on with those that are unfinished; `configs` are by the names of their adapters on the model.

    at_once: how many run together, all if absent. pass_tokens: at most so many tokens in one pass, or one run's micro-batch: less
    memory and less speed; no limit if absent. Gives for each run that was not finished before what it came to, or
    what ended it alone: it diverged, or did not learn. Raises UsageError for runs that cannot share a pass, Interrupted
    when stopped (all are saved then), and what `run` raises.
    """
    check_together(configs)
    todo = {n: c for n, c in configs.items() if overwrite or not RunDirectory(c.output, overwrite=True).finished}
    if not todo:
        fix = "use their adapters, choose another output, or give --overwrite"
        raise UsageError(f"all {len(configs)} runs are finished", fix=fix)
    with ExitStack() as opened:
        stop = opened.enter_context(listen())
        shared = _Shared(next(iter(todo.values())), model)
        waiting, results = [_open(opened, name, config, overwrite) for name, config in todo.items()], Results()
        while waiting:
            group, waiting = waiting[:at_once], waiting[at_once or len(waiting) :]
            with ExitStack() as running:
                sessions = [running.enter_context(shared.session(one, configs, stop, progress)) for one in group]
                results |= _train(sessions, stop, pass_tokens)
        return results


def check_together(configs: Mapping[str, RunConfig]) -> None:
    """Raise UsageError for configurations that cannot share a pass, before anything is loaded."""
    if not configs:
        raise UsageError("there are no runs")
    first, *others = configs.values()
    outputs = [config.output for config in configs.values()]
    if len(set(outputs)) < len(outputs):
        raise UsageError("two runs have the same output", fix="give each a directory of its own")
    differing = {key for other in others for key in diff(first, other)}
    wrong = sorted(key for key in differing if key in SAME or key.partition(".")[0] in ("model", "data"))
    if wrong:
        raise UsageError(
            f"runs that train together cannot differ in {', '.join(wrong)}",
            why="they share the base and its layers, and their rows are packed in one pass",
            fix="train them one after the other",
        )
    for config in configs.values():
        method = vars(config.method.config)
        if "residual" in needs(config.method.config):
            raise UsageError(
                f"init {method['init']!r} starts from what quantization took", fix="train these runs alone"
            )
        if config.method.target.modules_to_save:
            raise UsageError(
                "runs that train together cannot train modules in full (method.modules_to_save)",
                why="of a module that is replaced there is no frozen base to share",
                fix="leave modules_to_save out, or train these runs alone",
            )
        if config.train.compile or config.train.cuda_graph:
            raise UsageError(
                "runs that train together cannot be compiled or recorded (train.compile, train.cuda_graph)",
                why="which run has how many rows changes from pass to pass",
                fix="leave them out, or train these runs alone",
            )
        if config.train.checkpointing and method.get("dropout"):
            raise UsageError(
                "train.checkpointing and method.dropout do not go together with several runs",
                why="recomputed activations would have other dropout masks",
                fix="leave one of them out",
            )


class _Opened(NamedTuple):
    """A run whose directory is ours."""

    name: str
    config: RunConfig
    directory: RunDirectory


def _open(opened: ExitStack, name: str, config: RunConfig, overwrite: bool) -> _Opened:
    directory = RunDirectory(config.output, overwrite=overwrite)
    directory.make()
    opened.enter_context(RunLock(directory.path))
    opened.enter_context(logged(directory))
    if overwrite:
        directory.clear()
    return _Opened(name, config, directory)


class _Shared:
    """What all runs have in common: the base, and the rows as tokens. A fraction that is held out goes by the run's seed."""

    def __init__(self, config: RunConfig, model: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None") -> None:
        self._rows: dict[int | None, tuple[Rows, Rows | None]] = {}
        self._data: dict[int | None, tuple[Dataset, Dataset | None]] = {}
        self._learned: LanguageModelling | None = None
        train, _ = self._read(config)
        self.task = config.train.task or find_task(train, config.data.format)
        if self.task == "classification":
            raise UsageError(
                "classifiers cannot train together",
                why="their rows have one answer each and are not packed",
                fix="train them one after the other",
            )
        self.base = load_base(config, self.task, train) if model is None else Base(*model, [], None, {})

    def session(
        self,
        run: _Opened,
        configs: Mapping[str, RunConfig],
        stop: StopRequest,
        progress: Callable[[str], Progress] | None,
    ) -> Session:
        """Make the session of a run, its adapter beside those of the others."""
        data, held_out = self._encoded(run.config)
        config = resolved(run.config, self.task, data)
        run.directory.claim(config)
        label = run.directory.path.name
        shown = progress(label) if progress else Progress(0, live=False, seconds=5.0 * len(configs), label=label)
        around: Any = {"adapter": run.name, "beside": configs, "task": self._learned}
        session = Session(config, run.directory, self.base, data, held_out, stop, shown, **around)
        self._learned = _packed(session)
        return session

    def _read(self, config: RunConfig) -> tuple[Rows, Rows | None]:
        key = _key(config)
        if key not in self._rows:
            self._rows[key] = read_rows(config)
        return self._rows[key]

    def _encoded(self, config: RunConfig) -> tuple[Dataset, Dataset | None]:
        key = _key(config)
        if key not in self._data:
            self._data[key] = encoded(config, self.task, self.base, *self._read(config))
        return self._data[key]


def _key(config: RunConfig) -> int | None:
    return config.train.seed if isinstance(config.data.valid, float) else None


def _packed(session: Session) -> LanguageModelling:
    """Give the session's task, or raise UsageError where the model cannot take documents in one row."""
    task = session.task
    if not isinstance(task, LanguageModelling) or not task.packed:
        raise UsageError(
            "runs on this model cannot train together",
            why="it cannot take several documents in one row without padding",
            fix="train them one after the other",
        )
    return task


@dataclass
class _Running:
    """A run under way."""

    session: Session
    job: Job
    state: State
    course: Course[State]


def _train(sessions: list[Session], stop: StopRequest, pass_tokens: int | None) -> Results:
    """Start all runs, then give them the gradients they ask for, all at once, until each has come to its end."""
    model = sessions[0].base.model
    runs: dict[str, _Running] = {}
    for session in sessions:
        job, state = session.start()
        runs[session.adapter] = _Running(session, job, state, training(job, state))
    sessions[0].base.lost.clear()  # as large as the weights were
    _check_draws_nothing(model, sessions[0])
    with together(model, list(runs)) as current:
        for run in runs.values():  # attaching one has frozen the others
            for parameter in run.job.parameters:
                parameter.requires_grad_(True)
        return _drive(model, runs, current, stop, pass_tokens)


def _drive(
    model: nn.Module, runs: dict[str, _Running], current: Pass, stop: StopRequest, pass_tokens: int | None
) -> Results:
    results, wanted, stopped = Results(), dict[str, Micro](), list[_Running]()
    losses: Mapping[str, float | None] = dict.fromkeys(runs)  # None: not begun yet
    while losses:
        for name, loss in losses.items():
            try:
                wanted[name] = _next(runs[name], loss)
            except StopIteration:
                wanted.pop(name, None)
                results[name] = _finished(runs[name])
            except DivergenceError as error:  # the others go on
                wanted.pop(name, None)
                runs[name].job.optimizer.zero_grad(set_to_none=True)
                runs[name].session.say(str(error))
                results[name] = error
            except Interrupted:
                wanted.pop(name, None)
                stopped.append(runs[name])
        if stop and (wanted or stopped):
            _stop([runs[name] for name in wanted], stopped, stop)
        losses = _differentiate(model, current, wanted, pass_tokens) if wanted else {}
    return results


def _next(run: _Running, loss: float | None) -> Micro:
    """Give the next micro-batch of a run, which has taken its last one's gradient into account."""
    return next(run.course) if loss is None else run.course.send(loss)


def _finished(run: _Running) -> RunResult | LorakitError:
    try:
        return run.session.finish(run.job, run.state)
    except CheckError as error:
        run.session.say(str(error))
        return error


def _stop(pending: list[_Running], stopped: list[_Running], stop: StopRequest) -> NoReturn:
    """Save the pending runs as they were before the step under way, as those that are `stopped` are already, and stop."""
    for run in pending:
        with suppress(Interrupted):
            interrupt(run.job, run.state)
    unfinished = [*pending, *stopped]
    where = ", ".join(str(run.job.directory) for run in unfinished)
    raise Interrupted(stop.signum or 0, min(run.state.step for run in unfinished), f"outputs {where}")


def _differentiate(
    model: nn.Module, current: Pass, wanted: Mapping[str, Micro], pass_tokens: int | None
) -> dict[str, float]:
    """Run all micro-batches forward and backward, as many in a pass as may be; give the summed loss of each."""
    losses = dict[str, float]()
    for group in _passes(wanted, pass_tokens or sys.maxsize):
        losses |= _one_pass(model, current, group)
    return losses


def _passes(wanted: Mapping[str, Micro], most: int) -> list[dict[str, Micro]]:
    """Put micro-batches together, in their order, to passes of at most so many tokens, or of one micro-batch."""
    passes, room = list[dict[str, Micro]](), 0
    for name, micro in wanted.items():
        tokens = sum(len(row.input_ids) for row in micro.rows)
        if tokens > room:
            passes.append({})
            room = most
        passes[-1][name] = micro
        room -= tokens
    return passes


def _one_pass(model: nn.Module, current: Pass, wanted: Mapping[str, Micro]) -> dict[str, float]:
    task: Any = next(iter(wanted.values())).job.task
    parts = [
        Part(name, sum(len(row.input_ids) for row in micro.rows), predicted(micro.rows), micro.seed)
        for name, micro in wanted.items()
    ]
    current.begin(parts, next(model.parameters()).device)
    losses = task.losses(use(model, NAME), [micro.rows for micro in wanted.values()])
    each = [loss / micro.weight for loss, micro in zip(losses, wanted.values(), strict=True)]
    torch.stack(each).sum().backward()  # what is one run's gets no gradient from another's loss
    return {name: float(loss.detach()) for name, loss in zip(wanted, losses, strict=True)}


@torch.no_grad()
def _check_draws_nothing(model: nn.Module, session: Session) -> None:
    """Raise UsageError for a base with dropout of its own: which masks a run gets would depend on the others."""
    use(model, None).train()
    device = next(model.parameters()).device
    before = _random_state(device)
    session.task.loss(model, [session.data.examples[0]])
    if not torch.equal(before, _random_state(device)):
        raise UsageError(
            "runs on this model cannot train together",
            why="the base has dropout of its own, so a run's random numbers would depend on the other runs",
            fix="set its dropout to 0 (attention_dropout in its config.json), or train the runs one after the other",
        )


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
