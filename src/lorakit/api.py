"""Training from Python, and what the command line calls: a run, then its page.

`train(model, tokenizer, data=...)` is for a model in hand, `run(config)` for a configuration.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analysis.report import write_report
from .core.adapter import Method
from .core.target import Target
from .methods.lora import LoRA
from .train.config import DataConfig, EvalConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, TrainOptions
from .train.config_file import check
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
    from .core.attach import detach, names
    from .core.errors import UsageError

    sections: dict[str, dict[str, Any]] = {"optim": {}, "train": {}, "eval": {}}
    classes = {"optim": OptimConfig, "train": TrainOptions, "eval": EvalConfig}
    for key, value in settings.items():
        homes = [section for section, cls in classes.items() if key in cls.__dataclass_fields__]
        if len(homes) != 1:
            raise UsageError(
                f"train() has no setting {key!r}", fix="see the keys of OptimConfig, TrainOptions and EvalConfig"
            )
        sections[homes[0]][key] = value
    config = RunConfig(
        model=ModelConfig(name=base or model.config._name_or_path or type(model).__name__),
        data=DataConfig(path=str(data), valid=valid),
        method=MethodConfig.of(method or LoRA(), target),
        optim=OptimConfig(**sections["optim"]),
        train=TrainOptions(**sections["train"]),
        eval=EvalConfig(**sections["eval"]),
        output=str(output),
    )
    check(config)
    before = names(model)
    try:
        return run(config, overwrite=overwrite, model=(model, tokenizer))
    except BaseException:
        for name in set(names(model)) - set(before):
            detach(model, name)
        raise
