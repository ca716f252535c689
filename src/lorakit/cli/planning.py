"""What a run will be, found out without loading a weight: rows, steps, adapter, memory, time, and what looks unwise."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .machine import memory_available
from .opened import ADAPTER

if TYPE_CHECKING:
    from ..core.summary import Summary
    from ..data import Dataset
    from ..models.memory import Estimate
    from ..train.config import RunConfig

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
            "advice": self.advice,
        }

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now is enough, as far as the system says how much that is."""
        return not self.available or self.need.total <= self.available


def make_plan(config: "RunConfig") -> Plan:
    """Find out everything about a run except its result. Raises what training would raise before its first step."""
    from ..models import resolve
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
    need = requirement(config, data, model)
    rows = round(min(_rows(config, data) * options.accumulate, len(data)))
    dtype = str(model.dtype).removeprefix("torch.")
    seconds = steps * need.flops / matrix_speed(dtype)
    advice = list(_advice(config, data, summary, rows))
    return Plan(data, valid, summary, need, dtype, steps, rows, seconds, _available(), advice)


def requirement(config: "RunConfig", data: "Dataset", model: Any) -> "Estimate":
    """Estimate memory and work of one step on the longest rows."""
    from ..models.load import pick_device
    from ..models.memory import estimate
    from ..models.modes import checkpoint_activations

    if config.train.checkpointing:
        checkpoint_activations(model)
    length = max(data.lengths)
    rows = max(1, config.train.batch_tokens // length) if config.train.batch_tokens else config.train.batch_size
    share = data.stats.trained_tokens / data.stats.tokens
    need = estimate(
        model,
        rows=rows,
        length=length,
        trained_tokens=round(rows * length * share) if data.labels is None else None,
        packed=data.labels is None,
        accumulate=config.train.accumulate,
        optimizer=_optimizer_bytes(config, model),
        device=pick_device(),
    )
    return replace(need, weights=need.weights - _saved_by_quantizing(config, model))


def _optimizer_bytes(config: "RunConfig", model: Any) -> int:
    """Give the bytes that the optimizer says its state will take."""
    from ..optim import OPTIMIZERS, parameter_groups

    groups = parameter_groups(model, ADAPTER, config.optim)
    return vars(OPTIMIZERS.module(config.optim.name))["planned_bytes"](groups, config.optim)


def _saved_by_quantizing(config: "RunConfig", model: Any) -> int:
    """Give the bytes that model.quantize takes off the weights."""
    from ..bases import require
    from ..core.attach import Replacement, adapters
    from ..models.quantize import saved_bytes

    if config.model.quantize is None:
        return 0
    require(config.model.quantize)
    in_full = [path for path, _, adapter in adapters(model) if isinstance(adapter, Replacement)]
    return saved_bytes(model, config.model.quantize, in_full)


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
    from ..core.attach import place, trainable, use
    from ..core.summary import summary
    from ..core.target import Target
    from ..models.skeleton import skeleton
    from ..train.start import with_experts

    classify = data.labels is not None
    task = "classification" if classify else "causal"
    model = skeleton(path, task=task, dtype=config.model.dtype, labels=data.labels)
    fields = dict(vars(config.method.target))
    if classify:  # what is not the body is the head, and trained in full
        body = f"{model.base_model_prefix}."
        head = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(body)}
        fields["modules_to_save"] = sorted({*(fields["modules_to_save"] or ()), *head})
    method, target, _ = with_experts(model, config.method.config, Target(**fields))
    place(model, method, target, ADAPTER)  # not `attach`: start values need weights
    trainable(use(model, ADAPTER), ADAPTER)
    return model, summary(model, ADAPTER)


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
