"""What a run is made of: one frozen dataclass per section. It is the Python API; `config_file.py` spells it in YAML.

Each class says in its docstring what every key means. The command line's `--help`, `lorakit init` and the JSON Schema
print those lines, so a key is described in one place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from ..bases import FORMATS
from ..core.adapter import Method
from ..core.errors import UsageError
from ..core.registry import METHODS
from ..core.settings import own_settings
from ..core.stack import settings_of
from ..core.target import Target
from ..optim import OPTIMIZERS, SCHEDULES
from .controllers import CONTROLLERS

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Text = Annotated[str, MinLen(1)]


@dataclass(frozen=True, eq=False)  # compared by identity: an annotation in a union must be hashable
class OneOf:
    """Annotation of a text that must be one of `names`, which may be a registry of files."""

    names: Iterable[str]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model.

    name: built-in name (smollm2, minilm), directory, or hub id of the base model
    dtype: number format of the frozen weights; auto is bfloat16 where the hardware computes it natively
    quantize: store the frozen weights in 4 or 8 bits
    """

    name: Text
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Annotated[str, OneOf(FORMATS)] | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows to learn from.

    path: file (.jsonl, .json, .csv, .tsv, .parquet, also .gz) or directory with train and valid files
    format: form of the rows (messages, completion, text, ...); found by looking when absent
    valid: validation file, or the fraction of the rows to hold out
    skip_bad_rows: drop rows that cannot be used, with a count, instead of stopping
    """

    path: Text
    format: Text | None = None
    valid: Annotated[float, Gt(0), Lt(1)] | Text | None = None
    skip_bad_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The adapter: the method's `name`, its own hyper-parameters in `config`, and which layers get one in `target`.

    In YAML the three share the section `method`.
    """

    name: str
    config: Method
    target: Target = field(default_factory=Target)

    @classmethod
    def of(cls, config: Method, target: Target | None = None) -> "MethodConfig":
        """Give the section for a method object such as `LoRA(r=8)`, its name looked up."""
        return cls(name=METHODS.name_of(type(config)), config=config, target=target or Target())


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer.

    name: optimizer
    lr: peak learning rate
    b_ratio: learning rate of lora_B over that of lora_A (LoRA+)
    weight_decay: decoupled weight decay of the matrices
    schedule: shape of the learning rate after the warm-up
    warmup: fraction of all steps if below 1, otherwise a number of steps
    clip: largest norm of the gradient; null for no limit
    betas: decay rates of the optimizer's running averages
    eps: term added to the denominator of the update
    options: settings that only this optimizer has, such as the rank of galore
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    lr: Positive = 2e-4
    b_ratio: Positive = 1.0
    weight_decay: NotNegative = 0.0
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    warmup: NotNegative = 0.03
    clip: Positive | None = 1.0
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        cls = vars(OPTIMIZERS.module(self.name)).get("Options")
        if cls is not None:
            object.__setattr__(self, "options", own_settings(cls, self.options or {}, self.name))
        elif self.options:
            raise UsageError(f"{self.name} has no options", fix="leave optim.options out")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The loop (section `train`).

    task: what is learned; found by looking at the data when absent
    batch_size: rows per batch
    batch_tokens: tokens per packed batch, instead of batch_size
    accumulate: batches per optimizer step
    max_length: tokens kept of a row; 99th percentile of the data when absent
    epochs: passes over the data
    max_steps: optimizer steps, instead of epochs
    save_steps: optimizer steps between checkpoints; 0 for none
    eval_steps: optimizer steps between evaluations; 0 for none, null for one per epoch if there is validation data
    seed: start of every random number
    controller: schedule of ranks or restarts: its name, or a mapping of name and settings; the method's own when absent
    checkpointing: recompute activations in the backward pass, which saves memory and costs time: of all blocks (true), of the
        lowest so many, of as few as the free memory allows (auto)
    cache_prefix: run the blocks below the lowest adapter in the first epoch only, and keep what they give for each row on disk
    compile: run the model's blocks by torch.compile instead of by fused operations; micro-batches are filled up to a few fixed
        sizes then. For GPUs: on a processor it takes twice the time
    cuda_graph: record a micro-batch of each size once and replay it: for small models on an NVIDIA GPU, which wait for Python
    keep_checkpoints: how many of the newest checkpoints stay on disk
    track: also record to tensorboard or trackio (metrics.jsonl is always written)
    diagnose: measure on the way whether rate, backward pass and strength are right, and say what is not
    diagnose_steps: optimizer steps between two such looks; the first step has one too
    """

    task: Literal["sft", "completion", "classification"] | None = None
    batch_size: Count = 8
    batch_tokens: Count | None = None
    accumulate: Count = 1
    max_length: Annotated[int, Ge(2)] | None = None
    epochs: Positive = 1.0
    max_steps: Count | None = None
    save_steps: Annotated[int, Ge(0)] = 50
    eval_steps: Annotated[int, Ge(0)] | None = None
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    controller: Annotated[str, OneOf(tuple(CONTROLLERS))] | Mapping[str, Any] | None = None
    checkpointing: bool | Annotated[int, Ge(0)] | Literal["auto"] = False
    cache_prefix: bool = False
    compile: bool = False
    cuda_graph: bool = False
    keep_checkpoints: Count = 2
    track: tuple[Annotated[str, OneOf(("tensorboard", "trackio"))], ...] = ()
    diagnose: bool = False
    diagnose_steps: Count = 60

    def __post_init__(self) -> None:
        if self.controller is not None:
            given = {"name": self.controller} if isinstance(self.controller, str) else dict(self.controller)
            name = given.pop("name", None)
            if not isinstance(name, str):
                raise UsageError("a controller needs a name", fix=f"name: {' or '.join(sorted(CONTROLLERS))}")
            settings = own_settings(CONTROLLERS[name], given, name)
            object.__setattr__(self, "controller", {"name": name, **settings})


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What happens at each evaluation.

    prompts: prompts answered and kept in samples.jsonl at each evaluation
    max_tokens: longest answer to a prompt, in tokens
    patience: stop after this many evaluations without a better validation loss; null to go on
    load_best: keep the adapter of the evaluation with the lowest validation loss
    """

    prompts: tuple[str, ...] = ()
    max_tokens: Count = 64
    patience: Count | None = None
    load_best: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. `output` is its directory."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainOptions = field(default_factory=TrainOptions)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: Text


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainOptions,
    "eval": EvalConfig,
}
DEFAULT_METHOD = "lora"
OUTPUT_HELP = "directory of the run; runs/<name of the data> when absent"


def as_tree(config: RunConfig) -> dict[str, Any]:
    """Give the configuration as plain values in the shape of a file: {section: {key: value}, "output": directory}."""
    method = {**settings_of(config.method.config), **asdict(config.method.target)}
    return {
        "model": asdict(config.model),
        "data": asdict(config.data),
        "method": method,
        "optim": asdict(config.optim),
        "train": asdict(config.train),
        "eval": asdict(config.eval),
        "output": config.output,
    }
