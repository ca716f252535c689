"""What a run will be, found out without loading a weight: rows, steps, adapter, memory, time, and what looks unwise."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .machine import memory_available
from .opened import ADAPTER

if TYPE_CHECKING:
    from ..core.summary import Summary
    from ..data import Dataset
    from ..models.memory import Estimate
    from ..train.config import RunConfig
    from ..train.need import Choice

LOW_RATE, LARGE_BATCH = 5e-5, 32  # below and above these LoRA learns worse than it could


@dataclass(frozen=True)
class Plan:
    """One run before it is started. `seconds` is rough: the matrix speed of this machine and no more."""

    data: "Dataset"
    valid: "Dataset | None"
    summary: "Summary"
    need: "Estimate"
    dtype: str
    steps: int
    rows_per_step: int
    seconds: float
    available: int
    advice: list[str]
    recomputed: int
    """Blocks that recompute their activations; True: all."""
    choice: "Choice | None"
    """How that was found, if it is `auto`."""

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        stats = asdict(self.data.stats)
        memory = {name: value for name, value in asdict(self.need).items() if not name.startswith("flops")}
        return {
            "task": self.data.task,
            "format": self.data.format,
            "rows": len(self.data),
            "valid_rows": len(self.valid) if self.valid else 0,
            "tokens": stats["tokens"],
            "trained_tokens": stats["trained_tokens"],
            "max_length": self.data.max_length,
            "dtype": self.dtype,
            "trainable": self.summary.trainable,
            "total": self.summary.total,
            "layers": self.summary.layers,
            "steps": self.steps,
            "rows_per_step": self.rows_per_step,
            "seconds": self.seconds,
            "memory_bytes": {**memory, "total": self.need.total, "available": self.available},
            "flops_per_step": self.need.flops,
            "fits": self.fits,
            "recomputed_blocks": self.recomputed,
            "advice": self.advice,
        }

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now is enough, as far as the system says how much that is."""
        return not self.available or self.need.total <= self.available


def make_plan(config: "RunConfig") -> Plan:
    """Find out everything about a run except its result. Raises what training would raise before its first step."""
    from ..models import resolve
    from ..models.memory import resident_bytes
    from ..train.need import choose, requirement
    from ..train.steps import Steps

    data, valid = _data(config)
    options = config.train
    steps = Steps(
        data.lengths,
        seed=options.seed,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens,
        accumulate=options.accumulate,
        epochs=options.epochs,
        max_steps=options.max_steps,
    ).total
    model, summary = adapted_skeleton(config, data, resolve(config.model.name))
    recomputed, choice, runtime = options.checkpointing, None, resident_bytes()
    if recomputed == "auto":
        choice = choose(config, data, model, _available(), runtime=runtime)
        recomputed = choice.recomputed
    need = requirement(config, data, model, recomputed, runtime=runtime)
    rows = round(min(_rows(config, data) * options.accumulate, len(data)))
    dtype = str(model.dtype).removeprefix("torch.")
    seconds = steps * need.flops / matrix_speed(dtype)
    advice = list(_advice(config, data, summary, rows))
    return Plan(data, valid, summary, need, dtype, steps, rows, seconds, _available(), advice, recomputed, choice)


def matrix_speed(dtype: str, size: int = 1024, seconds: float = 0.2) -> float:
    """Measure floating-point operations per second of one matrix product here."""
    import torch

    from ..models.load import pick_device

    a = torch.ones(size, size, device=pick_device(), dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    float((a @ a)[0, 0])  # the first call sets things up
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        float((a @ a)[0, 0])
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)


def _data(config: "RunConfig") -> tuple["Dataset", "Dataset | None"]:
    from ..data import encode, find_task, read_train_valid
    from ..models import resolve
    from ..models.load import read_config
    from .rows import open_tokenizer

    train, valid = read_train_valid(
        config.data.path, config.data.valid, skip_bad_rows=config.data.skip_bad_rows, seed=config.train.seed
    )
    tokenizer = open_tokenizer(config.model.name)
    limit = read_config(resolve(config.model.name)).get_text_config().to_dict().get("max_position_embeddings")
    settings: dict[str, Any] = {
        "task": config.train.task or find_task(train, config.data.format),
        "format": config.data.format,
        "skip_bad_rows": config.data.skip_bad_rows,
        "model_limit": limit,
    }
    data = encode(train, tokenizer, max_length=config.train.max_length, **settings)
    if valid is None:
        return data, None
    return data, encode(valid, tokenizer, max_length=data.max_length, labels=data.labels, **settings)


def adapted_skeleton(config: "RunConfig", data: "Dataset", path: Any) -> tuple[Any, "Summary"]:
    """Give the model without weights, the adapter attached, and what it amounts to."""
    from ..core.summary import summary
    from ..models.skeleton import skeleton
    from ..train.need import adapted

    classify = data.labels is not None
    task = "classification" if classify else "causal"
    model = skeleton(path, task=task, dtype=config.model.dtype, labels=data.labels)
    body, head = f"{model.base_model_prefix}.", list[str]()
    if classify:  # what is not the body is the head, and trained in full
        head = sorted({name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(body)})
    return adapted(model, config, head), summary(model, ADAPTER)


def _rows(config: "RunConfig", data: "Dataset") -> float:
    if config.train.batch_tokens is None:
        return config.train.batch_size
    return config.train.batch_tokens / (data.stats.tokens / len(data))


def _available() -> int:
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory_available()


def _advice(config: "RunConfig", data: "Dataset", summary: "Summary", rows: float) -> Iterator[str]:
    tokens = data.stats.trained_tokens
    if config.optim.lr < LOW_RATE:
        yield f"optim.lr {config.optim.lr:g} is low for an adapter: full fine-tuning has such values, LoRA 1e-4 to 1e-3"
    if rows > LARGE_BATCH:
        yield f"{rows:.0f} rows per step is a large batch; adapters lose more by that than full fine-tuning does"
    if tokens > summary.trainable:
        yield f"{tokens:,} trained tokens for {summary.trainable:,} parameters of the adapter: a larger r may help"
    if data.stats.truncated > len(data) // 20:
        yield f"{data.stats.truncated} of {len(data)} rows are cut at {data.max_length} tokens; see train.max_length"
