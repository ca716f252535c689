"""The arm of lorakit: the session that `lorakit train` runs, on rows of random tokens, and the loop's own update."""

from contextlib import closing
from pathlib import Path

from ...core.attach import adapters
from ...core.registry import METHODS
from ...data.dataset import Dataset, Examples, Facts, Stats
from ...data.rows import Rows
from ..base import load_base
from ..config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainOptions
from ..loop import State, alone, update
from ..run_directory import RunDirectory
from ..session import ADAPTER, Session
from ..stop import StopRequest
from .clock import Arm
from .work import Work


def build(work: Work, scratch: Path) -> Arm:
    """Load the model and attach as a run does."""
    config = configuration(work, scratch / "run")
    base = load_base(config, "sft", Rows(), work.device)
    directory = RunDirectory(config.output)
    directory.make()
    data = dataset(work, base.model.config.get_text_config().vocab_size)
    session = Session(config, directory, base, data, None, StopRequest(), None)
    session._attach(None)
    with closing(session._records(State())) as records:  # an update writes none
        job = session._job(records)
    session._fix_sizes(job)
    state = State()

    def step() -> tuple[float, float]:
        loss, norm, _ = alone(update(job, state, job.steps[state.step]))
        state.step += 1
        return loss, norm

    factors = {
        f"{path}/{name}": parameter
        for path, _, adapter in adapters(base.model, ADAPTER)
        for name, parameter in adapter.named_parameters()
        if name in ("lora_A", "lora_B")
    }
    return Arm(step, job.optimizer, factors)


def configuration(work: Work, output: Path) -> RunConfig:
    """Give the run. Nothing is clipped, so that the gradients the optimizer gets can be compared; the norm is computed."""
    method = METHODS[work.method](r=work.rank, alpha=work.alpha)
    return RunConfig(
        model=ModelConfig(name=work.model, dtype=work.dtype),
        data=DataConfig(path="random tokens"),
        method=MethodConfig.of(method),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup=0.0, clip=None),
        train=TrainOptions(
            task="sft",
            batch_size=work.batch,
            max_steps=work.steps + 1,
            save_steps=0,
            eval_steps=0,
            seed=work.seed,
            compile=work.compile,
            cuda_graph=work.cuda_graph,
        ),
        output=str(output),
    )


def dataset(work: Work, vocabulary: int) -> Dataset:
    """Give the work's rows as what a run gets from its data files."""
    examples, mask = Examples(), work.trained()
    for number, row in enumerate(work.rows(vocabulary), start=1):
        examples.add(row, mask, f"random:{number}")
    facts = Facts(True, None, None, None, None, vocabulary - 1)
    return Dataset(
        examples, _stats(work, sum(examples.trained)), facts, "sft", "random", None, None, examples.fingerprint()
    )


def _stats(work: Work, trained: int) -> Stats:
    return Stats(
        rows=work.batch,
        kept=work.batch,
        truncated=0,
        split=0,
        dropped=0,
        tokens=work.tokens,
        trained_tokens=trained,
        length_p50=work.length,
        length_p90=work.length,
        length_p99=work.length,
        length_max=work.length,
        max_length=work.length,
        control_rows=0,
        duplicates=0,
    )
