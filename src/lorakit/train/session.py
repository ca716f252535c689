"""One run with everything loaded: the adapter goes on, the loop runs, the result is saved and proved."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Method
from ..core.attach import adapters, names, use
from ..core.errors import FileError, UsageError
from ..core.statistics import Statistics
from ..core.summary import Summary, summary
from ..core.target import Target
from ..data.dataset import Dataset
from ..models.directory import fingerprint
from ..models.fast import ORDINARY, accelerate
from ..models.generate import generate
from ..models.modes import checkpoint_activations
from ..models.packing import enable_packing
from ..models.quantize import stored_bytes
from ..models.skeleton import twin
from ..optim import OPTIMIZERS, Accumulating, Factors, parameter_groups, schedule
from ..optim.schedules import warmup_steps
from .adapter_files import AdapterFiles
from .adapter_state import restore_adapter
from .base import Base, with_head
from .checkpoint import latest, steps
from .checkpoint import load as load_checkpoint
from .config import RunConfig, as_tree
from .config_file import dump
from .controllers import CONTROLLERS, Controller, Nothing, Run, brought
from .diagnostics import Diagnostics, Watching
from .diagnostics import Nothing as NotWatching
from .fixed import fixed_sizes
from .learned import require_learned
from .loop import Job, State, fit, restore
from .measure import free_memory
from .need import adapted, choose
from .prefix import advice, kept_prefix
from .progress import Progress
from .records import Records
from .run_directory import RunDirectory
from .shares import Team
from .start import calibration_batches, measure, measures, restart, start, with_experts
from .steps import Steps
from .stop import StopRequest
from .task import Classification, LanguageModelling, Task

ADAPTER = "default"


@dataclass(frozen=True)
class RunResult:
    """What a run came to. `loss` is that of the last step, `checks` the proofs in words."""

    directory: Path
    adapter: Path
    steps: int
    loss: float | None
    evaluation: dict[str, float]
    summary: Summary
    seconds: float
    resumed_from: int | None
    checks: list[str]


class Found(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Session:
    """One run with everything loaded: attaches, trains, proves, saves.

    adapter: what its adapter is called on the model. beside: adapters of other runs, which may be there too. task: what is
    learned, if another run on this model has found it already.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        base: Base,
        data: Dataset,
        valid: Dataset | None,
        stop: StopRequest,
        progress: Progress | None,
        *,
        adapter: str = ADAPTER,
        beside: Collection[str] = (),
        task: Task | None = None,
    ) -> None:
        self.config, self.directory, self.base, self.data, self.valid = config, directory, base, data, valid
        self.stop, self.checks, self.adapter, self.beside = stop, list[str](), adapter, beside
        self._known_task, self._open, self._resumed_from = task, ExitStack(), None
        lengths = data.lengths
        train = config.train
        self.steps = Steps(
            lengths,
            seed=train.seed,
            batch_size=train.batch_size,
            batch_tokens=train.batch_tokens,
            accumulate=train.accumulate,
            epochs=train.epochs,
            max_steps=train.max_steps,
        )
        self.progress = progress or Progress(self.steps.total)
        self.progress.total_steps = self.steps.total

    def __enter__(self) -> "Session":
        """Start."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the records and give the terminal back."""
        self._open.close()
        self.progress.close()

    def run(self) -> RunResult:
        """Go through the stages."""
        job, state = self.start()
        self.base.lost.clear()  # as large as the weights were
        fit(job, state)
        return self.finish(job, state)

    def start(self) -> tuple[Job, State]:
        """Put the adapter on the model, as it starts or as a checkpoint holds it."""
        found = self._found
        before = State(**found.state["state"]) if found else State()
        self._attach(found)
        job = self._job(self._open.enter_context(closing(self._records(before))))
        self._keep_prefix(job)
        self._fix_sizes(job)
        state = restore(job, found.tensors, found.state) if found else before
        vars(self).pop("_found")  # its tensors are where they belong
        if isinstance(self.task, LanguageModelling):
            state.kernels = list(self.task.fast.choice.names)
        if not found:
            return job, state
        self._resumed_from = state.step
        loss = f", loss {state.last_loss:.4f}" if state.last_loss is not None else ""
        self.say(f"resumed at step {state.step} of {job.steps.total}{loss}")
        return job, state

    def finish(self, job: Job, state: State) -> RunResult:
        """Save what was trained, and say what the run came to."""
        self._take_best(job, state)
        self._finish()
        return RunResult(
            self.directory.path,
            self.directory.adapter,
            state.step,
            state.last_loss,
            state.evaluation,
            summary(self.base.model, self.adapter),
            state.seconds,
            self._resumed_from,
            self.checks,
        )

    @cached_property
    def _adapter_files(self) -> AdapterFiles:
        return AdapterFiles(self.base, self.config, self.data, self._identity["base"], self.adapter)

    def _first_step(self) -> None:
        count = self._adapter_files.try_saving(self.directory.path)
        self.proved(f"a test save after step 1 opens again: {count} tensors")

    def _finish(self) -> None:
        """Save the adapter and prove that it holds what was trained."""
        count, size = self._adapter_files.save(self.directory.adapter)
        require_learned(self.base.model, self.adapter, self.directory.adapter)
        self.proved("every adapted layer has learned: no factor is still zero")
        self.proved(f"the adapter opens again: {count} tensors, {size / 1e6:.1f} MB, {self.directory.adapter}")

    def say(self, text: str) -> None:
        """Tell the user, and keep it."""
        self.progress.message(text)
        self.directory.note(text)

    def proved(self, text: str) -> None:
        """Tell the user of a check that held."""
        self.checks.append(text)
        self.say(f"✓ {text}")

    def _attach(self, found: "Found | None") -> None:
        model, method = self.base.model, self.config.method.config
        target = with_head(self.config.method.target, self.base.head)
        foreign = [name for name in names(model) if name not in self.beside]
        if foreign:
            raise UsageError(f"the model carries adapters already: {', '.join(foreign)}", fix="lk.detach(model) first")
        use(model, None)  # others must not be measured
        if self.config.model.quantize:
            self.say(f"the base is stored as {self.config.model.quantize}: {stored_bytes(model) / 1e6:.1f} MB")
        method, target, experts = with_experts(model, method, target)
        torch.manual_seed(self.config.train.seed)
        if found:
            restart(model, method, target, self.adapter, found.tensors["adapter"].items())
        else:
            statistics = self._statistics(method, target) if experts is None else experts
            start(model, method, target, self.adapter, statistics)
        self._choose_checkpointing()
        self.say(str(summary(model, self.adapter)))
        for notice in self.data.stats.notices:
            self.say(f"data: {notice}")
        self.proved(f"every target matched: {sum(1 for _ in adapters(model, self.adapter))} layers carry an adapter")
        if self.data.facts.every_row_trained:
            stats = self.data.stats
            share = f", {stats.trained_tokens / stats.tokens:.0%} of the tokens" if stats.trained_tokens else ""
            self.proved(f"every one of {stats.kept} rows has something to train on{share}")
        if self.data.facts.ends_with_end_token:
            self.proved(f"each row ends with {self.data.facts.end_token}")

    def _choose_checkpointing(self) -> None:
        """Say which blocks recompute their activations in the backward pass."""
        model, count = self.base.model, self.config.train.checkpointing
        if count == "auto":
            kind = "classification" if self.config.train.task == "classification" else "causal"
            bare = adapted(twin(model, task=kind), self.config, self.base.head)
            choice = choose(self.config, self.data, bare, free_memory(model.device), runtime=0, loaded=True)
            self.say(choice.words)
            count = choice.recomputed
        if count:
            checkpoint_activations(model, count)

    def _statistics(self, method: Method, target: Target) -> Mapping[str, Statistics]:
        """Give what the adapters' start has to know of the layers: what quantization took, or what the data shows."""
        if not measures(method):
            return self.base.lost
        batches = calibration_batches(self.task, self.data.examples, self.steps)
        self.say(f"measuring the layers on {sum(map(len, batches))} rows for the adapter's start")
        return measure(self.base.model, method, target, self.task, batches)

    @cached_property
    def task(self) -> Task:
        """What is learned, and how the model is run for it; proved on the model where it is the fast way."""
        if self._known_task is not None:
            return self._known_task
        model, tokenizer = self.base.model, self.base.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        if self.config.train.task == "classification":
            return Classification(len(self.data.labels or ()), pad)
        packed = enable_packing(model)
        self.say("rows are packed without padding" if packed else "this model cannot pack rows; they are padded")
        known = self._found.state["state"].get("kernels") if self._found else None
        fast = accelerate(model, known) if packed else ORDINARY
        self.say(fast.words)
        return LanguageModelling(model.config.get_text_config().vocab_size, pad, packed=packed, fast=fast)

    def _records(self, before: State) -> Records:
        return Records(
            self.directory.path,
            self.progress,
            track=self.config.train.track,
            config=as_tree(self.config),
            resume_step=before.step,
        )

    def _job(self, records: Records) -> Job:
        config, options = self.config, self.config.train
        controller = self._controller()
        groups = parameter_groups(self.base.model, self.adapter, config.optim)
        optimizer = OPTIMIZERS[config.optim.name](groups, config.optim)
        return Job(
            model=self.base.model,
            adapter=self.adapter,
            task=self.task,
            examples=self.data.examples,
            valid=self.valid.examples if self.valid else [],
            steps=self.steps,
            optimizer=optimizer,
            controller=controller,
            clip=config.optim.clip,
            seed=options.seed,
            eval_steps=options.eval_steps,
            save_steps=options.save_steps,
            keep_checkpoints=options.keep_checkpoints,
            patience=config.eval.patience,
            load_best=config.eval.load_best,
            directory=self.directory.path,
            config_hash=sha256(dump(config).encode()).hexdigest()[:16],
            identity=self._identity,
            records=records,
            stop=self.stop,
            diagnostics=self._diagnostics(optimizer, groups.factors),
            sample=partial(self._sample, records),
            first_step=self._first_step,
            team=self._team(),
        )

    def _team(self) -> Team:
        """Give as many threads as torch has, where the model can be run by several at once."""
        task, count = self.task, torch.get_num_threads()
        options = self.config.train
        if count == 1 or not isinstance(task, LanguageModelling) or not task.fast.separable:
            return Team()
        if options.compile or options.cuda_graph:  # they bring their own
            return Team()
        self.say(f"rows of a micro-batch are shared by up to {count} threads")
        return Team(count)

    def _keep_prefix(self, job: Job) -> None:
        """Let the blocks below the lowest adapter run once for each row, if that is asked for; else say that they could."""
        alone = not self.beside  # runs that train together are not shared out
        if self.config.train.cache_prefix:
            self.say(self._open.enter_context(kept_prefix(job, job.team.count if alone else 1)).words)
        elif alone and (text := advice(job)):
            self.say(text)

    def _fix_sizes(self, job: Job) -> None:
        """Let passes be compiled or recorded, if that is asked for."""
        options = self.config.train
        if options.compile or options.cuda_graph:
            chosen = fixed_sizes(job, compile=options.compile, cuda_graph=options.cuda_graph)
            self.say(self._open.enter_context(chosen))

    def _diagnostics(self, optimizer: torch.optim.Optimizer, factors: Sequence[Factors]) -> Diagnostics:
        """Watch the run, if that is asked for."""
        options = self.config.train
        if not options.diagnose:
            return NotWatching()
        cumulative = not isinstance(optimizer, Accumulating)
        own = {"every": options.diagnose_steps, "last": self.steps.total, "cumulative": cumulative, "say": self.say}
        return Watching(self.base.model, self.adapter, self.task, optimizer, factors, **own)

    def _controller(self) -> Controller:
        """Start the configured controller, or the one that the method brings along."""
        optim, chosen = self.config.optim, self.config.train.controller
        around = Run(
            self.base.model,
            self.adapter,
            self.steps.total,
            schedule(optim.schedule, self.steps.total, optim.warmup),
            warmup_steps(self.steps.total, optim.warmup),
            self.config.train.seed,
            lambda step: len(self.steps[step].batches),
        )
        if isinstance(chosen, Mapping):
            settings = {key: value for key, value in chosen.items() if key != "name"}
            return CONTROLLERS[chosen["name"]](**settings).start(around)
        own = brought(self.config.method.config)
        return CONTROLLERS[own[0]]().start(around) if own else Nothing(around)

    @cached_property
    def _identity(self) -> dict[str, str | None]:
        """Fingerprints of what a checkpoint belongs to."""
        return {
            "data": self.data.fingerprint,
            "validation data": self.valid.fingerprint if self.valid else None,
            "base": fingerprint(self.base.path) if self.base.path else None,
        }

    @cached_property
    def _found(self) -> "Found | None":
        """Read the newest whole checkpoint, if there is any, and see that it belongs to this data and base."""
        newest = latest(self.directory.checkpoints)
        if newest is None:
            if steps(self.directory.checkpoints):
                fix = "give --overwrite to start again"
                raise FileError(f"no checkpoint in {self.directory.checkpoints} is whole", fix=fix)
            return None
        tensors, state = load_checkpoint(newest.path)
        changed = [what for what, value in self._identity.items() if state["identity"].get(what) != value]
        if changed:
            raise UsageError(
                f"the run cannot be resumed: the {' and the '.join(changed)} changed since it was started",
                fix="put the old files back, choose another output, or give --overwrite",
                where=str(newest.path),
            )
        return Found(tensors, state)

    def _take_best(self, job: Job, state: State) -> None:
        if self.config.eval.load_best and state.best_step not in (None, state.step):
            tensors, saved = load_checkpoint(steps(self.directory.checkpoints)[state.best_step])
            job.controller.restore(tensors["controller"], saved["controller"])
            restore_adapter(self.base.model, self.adapter, tensors["adapter"])
            self.say(f"took the adapter of step {state.best_step}, which had the lowest validation loss")

    def _sample(self, records: Records, step: int) -> None:
        """Answer the fixed prompts."""
        prompts, model = list(self.config.eval.prompts), self.base.model
        if prompts:
            use(model, self.adapter)
            texts = generate(model, self.base.tokenizer, prompts, max_tokens=self.config.eval.max_tokens)
            for prompt, text in zip(prompts, texts, strict=True):
                records.sample(step, prompt, text)
