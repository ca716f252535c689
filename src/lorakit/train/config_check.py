"""What two keys of a configuration say about each other, and what two configurations have in common."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..bases import FORMATS
from ..core.attach import check_patterns
from ..core.errors import UsageError
from ..core.start import needs
from ..core.target import Target
from ..optim import refuses
from .config import RunConfig, TrainOptions, as_tree
from .controllers import CONTROLLERS, brought

PATTERNS = ("rank_pattern", "alpha_pattern")

# What may differ between a run and its resumption: what is written and looked at, and what is kept or computed a second
# time, never what comes out. A longer run is not among them: max_steps and epochs shape the learning rate of every step.
MAY_CHANGE = frozenset(
    {"output", "train.save_steps", "train.keep_checkpoints", "train.track", "train.eval_steps"}
    | {"train.checkpointing", "train.diagnose", "train.diagnose_steps"}
    | {"eval.prompts", "eval.max_tokens"}
)


def diff(a: RunConfig, b: RunConfig) -> list[str]:
    """Give the dotted keys whose values differ, in the order of the sections."""
    old, new = dict(_items(a)), dict(_items(b))
    return [key for key in old | new if key not in old or key not in new or old[key] != new[key]]


def resume_conflicts(a: RunConfig, b: RunConfig) -> list[str]:
    """Give the keys that differ and make `b` another run than `a`, so that it cannot resume `a`."""
    return [key for key in diff(a, b) if key not in MAY_CHANGE]


def contradictions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, what is wrong) for all settings that contradict each other, before any model is loaded."""
    yield from _either_or(config)
    yield from _start(config)
    yield from _packages(config)
    yield from _controller(config)
    yield from _patterns(config)
    yield from _optimizer(config)
    yield from _evaluation(config)
    yield from _output(Path(config.output), config.model.name)


def _either_or(config: RunConfig) -> Iterator[tuple[str, str]]:
    train, target = config.train, config.method.target
    if train.max_steps is not None and train.epochs != TrainOptions.epochs:
        yield "train.max_steps", "max_steps and epochs are both given; give one of them"
    if train.batch_tokens is not None and train.batch_size != TrainOptions.batch_size:
        yield "train.batch_tokens", "batch_tokens and batch_size are both given; give one of them"
    if target.layers is not None and target.last_n_layers is not None:
        yield "method.layers", "layers and last_n_layers are both given; give one of them"


def _controller(config: RunConfig) -> Iterator[tuple[str, str]]:
    chosen, own = config.train.controller, brought(config.method.config)
    if len(own) > 1:
        yield "method.name", f"{' and '.join(own)} each has a controller of its own, and a run has one"
    if isinstance(chosen, Mapping):
        refuses = vars(CONTROLLERS.module(chosen["name"])).get("refuses")
        reason = refuses(config.method.config) if refuses else None
        if reason is not None:
            yield "train.controller", f"{chosen['name']} cannot train the method {config.method.name}: {reason}"
        elif own and chosen["name"] not in own:
            yield (
                "train.controller",
                f"the method {config.method.name} needs its own controller {own[0]}; a run has one",
            )


def _patterns(config: RunConfig) -> Iterator[tuple[str, str]]:
    target = config.method.target
    for key in PATTERNS:
        method, pattern = config.method.config, vars(target)[key] or {}
        try:
            check_patterns(method, *(bool(pattern) and k == key for k in PATTERNS))
            for value in pattern.values():
                sized: Any = method
                sized.at(*((value, vars(method).get("alpha")) if key == "rank_pattern" else (sized.r, value)))
        except UsageError as error:
            yield f"method.{key}", "; ".join(part for part in (error.what, error.why) if part)


def _optimizer(config: RunConfig) -> Iterator[tuple[str, str]]:
    reason = refuses(config.optim.name, config.optim, config.method.config)
    if reason is not None:
        yield "optim.name", f"the method {config.method.name}: {reason}"


def _packages(config: RunConfig) -> Iterator[tuple[str, str]]:
    wanted = config.model.quantize
    if wanted is not None and find_spec(FORMATS[wanted]) is None:
        yield "model.quantize", f"{wanted} needs the package {FORMATS[wanted]}: pip install 'lorakit[quant]'"


def _start(config: RunConfig) -> Iterator[tuple[str, str]]:
    needed = needs(config.method.config)
    if config.model.quantize is None and "residual" in needed:
        yield "method.init", "it repairs what quantization takes from the weights: set model.quantize, e.g. nf4"
    if "experts" in needed:
        if not vars(config.method.config)["adapters"]:
            yield "method.adapters", f"{config.method.name} mixes trained LoRAs: give their directories"
        given = [f.name for f in fields(Target) if f.name not in ("modules_to_save", "fused")]
        for key in given:
            if vars(config.method.target)[key] != vars(Target())[key]:
                yield f"method.{key}", f"{config.method.name} adapts the layers of its adapters; leave {key} out"


def _evaluation(config: RunConfig) -> Iterator[tuple[str, str]]:
    # A directory may bring its own validation file; whether it does is known when the data is read.
    no_rows = config.data.valid is None and not _is_directory(config.data.path)
    if config.train.eval_steps and no_rows and not config.eval.prompts:
        yield "train.eval_steps", "there is nothing to evaluate: set data.valid (e.g. 0.1) or eval.prompts"
    if config.train.eval_steps == 0:
        missing = "train.eval_steps is 0"
    elif no_rows:
        missing = "there is no validation data: set data.valid, e.g. 0.1"
    else:
        return
    if config.eval.patience is not None:
        yield "eval.patience", f"needs a validation loss, but {missing}"
    if config.eval.load_best:
        yield "eval.load_best", f"needs a validation loss, but {missing}"


def _output(output: Path, model: str) -> Iterator[tuple[str, str]]:
    try:
        if output.exists() and not output.is_dir():
            yield "output", f"{output} is a file; the run needs a directory"
        elif _is_directory(model) and output.resolve().is_relative_to(Path(model).resolve()):
            yield "output", f"{output} lies inside the base model's directory; the run must not write there"
    except (OSError, ValueError) as error:
        yield "output", f"cannot be a directory: {error}"


def _is_directory(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # too long for the file system, or with a NUL
        return False


def _items(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for section, values in as_tree(config).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            yield f"{section}.{key}".rstrip("."), _comparable(value)


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return {key: _comparable(item) for key, item in value.items()} if isinstance(value, dict) else value
