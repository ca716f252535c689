"""Training from Python, and what the command line calls: a run, then its page.

`train(model, tokenizer, data=...)` is for a model in hand, `run(config)` for a configuration.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analysis.report import write_report
from .core.adapter import Method
from .core.attach import check_name, detach, names, use
from .core.errors import UsageError
from .core.target import Target
from .methods.lora import LoRA
from .train.config import DataConfig, EvalConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainOptions
from .train.config_file import check
from .train.many import Results
from .train.many import run_many as run_configs
from .train.progress import Progress
from .train.run import run as run_config
from .train.session import RunResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(
    config: RunConfig,
    *,
    overwrite: bool = False,
    model: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None,
    progress: Progress | None = None,
) -> RunResult:
    """Train as `config` says (or go on with an unfinished run) and write the run's `report.html`. See `train.run.run`."""
    result = run_config(config, overwrite=overwrite, model=model, progress=progress)
    write_report([result.directory], result.directory / "report.html")
    return result


def run_many(
    configs: Mapping[str, RunConfig],
    *,
    overwrite: bool = False,
    model: "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None" = None,
    at_once: int | None = None,
    pass_tokens: int | None = None,
) -> Results:
    """Train several runs in one pass over their base and write a report of each. See `train.many.run_many`."""
    results = run_configs(configs, overwrite=overwrite, model=model, at_once=at_once, pass_tokens=pass_tokens)
    for name in results:
        directory = Path(configs[name].output)
        write_report([directory], directory / "report.html")
    return results


def train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    data: str | Path,
    output: str | Path,
    method: Method | None = None,
    target: Target | None = None,
    valid: str | float | None = None,
    base: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> RunResult:
    """Train an adapter on `model`, in place, and save it in `output`/adapter. The model is left with the adapter active.

    data, valid: paths (see `lorakit data`), or for `valid` a fraction to hold out. method, target: `LoRA()` on all linear
    layers if absent. settings: any key of the sections `optim`, `train` and `eval`, such as `lr=1e-3, epochs=2`.
    base: the name to record for the base model. Raises what `run` raises; the model is then without the adapter.
    """
    config = _config(model, data, output, method, target, valid, base, settings)
    check(config)
    with _as_before(model):
        return run(config, overwrite=overwrite, model=(model, tokenizer))


def train_many(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    runs: Mapping[str, Mapping[str, Any]],
    data: str | Path,
    output: str | Path,
    method: Method | None = None,
    target: Target | None = None,
    valid: str | float | None = None,
    base: str | None = None,
    overwrite: bool = False,
    at_once: int | None = None,
    **settings: Any,
) -> Results:
    """Train several adapters on `model` in one pass: each as it would come out alone, saved in `output`/<name>/adapter.

    runs: name -> what this run has of its own, `method` or settings: `{"a": {"lr": 1e-3}, "b": {"method": LoRA(r=4)}}`.
    at_once: how many train together, all if absent. The rest is that of `train`, for all of them. The adapters stay on
    the model under these names, none active (`lk.use`, or `lk.bank` for all). Gives name -> what the run came to, or the
    error that ended it alone. Raises what `train.many.run_many` raises; the model is then without the adapters.
    """
    configs = {}
    for name, own in runs.items():
        chosen = {**settings, **own}
        changed = chosen.pop("method", method)
        configs[name] = _config(model, data, Path(output) / name, changed, target, valid, base, chosen)
        check(configs[name])
    with _as_before(model):
        for name in configs:
            check_name(model, name)
        results = run_many(configs, overwrite=overwrite, model=(model, tokenizer), at_once=at_once)
        use(model, None)
        return results


def _config(
    model: "PreTrainedModel",
    data: str | Path,
    output: str | Path,
    method: Method | None,
    target: Target | None,
    valid: str | float | None,
    base: str | None,
    settings: Mapping[str, Any],
) -> RunConfig:
    """Sort settings into the sections that have them."""
    sections: dict[str, dict[str, Any]] = {"optim": {}, "train": {}, "eval": {}}
    classes = {"optim": OptimConfig, "train": TrainOptions, "eval": EvalConfig}
    for key, value in settings.items():
        homes = [section for section, cls in classes.items() if key in cls.__dataclass_fields__]
        if len(homes) != 1:
            raise UsageError(
                f"train() has no setting {key!r}", fix="see the keys of OptimConfig, TrainOptions and EvalConfig"
            )
        sections[homes[0]][key] = value
    return RunConfig(
        model=ModelConfig(name=base or model.config._name_or_path or type(model).__name__),
        data=DataConfig(path=str(data), valid=valid),
        method=MethodConfig.of(method or LoRA(), target),
        optim=OptimConfig(**sections["optim"]),
        train=TrainOptions(**sections["train"]),
        eval=EvalConfig(**sections["eval"]),
        output=str(output),
    )


@contextmanager
def _as_before(model: "PreTrainedModel") -> Generator[None]:
    """Take the adapters that came off again if something goes wrong."""
    before = names(model)
    try:
        yield
    except BaseException:
        for name in set(names(model)) - set(before):
            detach(model, name)
        raise
