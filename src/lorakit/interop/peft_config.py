"""`adapter_config.json`: a method and its targets as PEFT spells them. Reading it is in `peft_reading.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.adapter import Method, PeftFormat
from ..core.registry import METHODS

# Starts that leave the difference in the base weights: such a file means nothing on the original base.
MOVES_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "milora")


def peft_format(method: Method) -> PeftFormat | None:
    """Give how PEFT spells this method, or None where it cannot."""
    return vars(type(method)).get("PEFT")


def own_type(name: str) -> str:
    """Give the `peft_type` of a directory that PEFT cannot read, so that it says so instead of reading half of it."""
    return f"LORAKIT_{name.upper()}"


def write_config(
    method: Method,
    *,
    target_modules: Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules_to_save: Sequence[str],
    base: str | None,
    task_type: str | None,
    for_peft: bool,
) -> dict[str, Any]:
    """Give the content of `adapter_config.json`. ranks, alphas: of every layer, where the method has them.

    for_peft: the tensors are named as PEFT names them. If not, or if PEFT lacks the method, the `peft_type` is ours.
    """
    form = peft_format(method)
    config: dict[str, Any] = {
        "peft_type": form.peft_type if form and for_peft else own_type(METHODS.name_of(type(method))),
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": list(target_modules),
        "modules_to_save": list(modules_to_save) or None,
    }
    if form:
        config |= {**form.constants, **form.ignored}
        config |= {theirs: _number(_theirs(form, ours, getattr(method, ours))) for ours, theirs in form.fields.items()}
    if ranks and form and form.masked:
        tensor, full = form.masked[0], getattr(method, form.masked[1])
        masks = {f"{path}.{tensor}": [True] * r + [False] * (full - r) for path, r in ranks.items()}
        config["rank_pattern"] = masks if any(r < full for r in ranks.values()) else None
    elif ranks:
        common: Any = method
        config["rank_pattern"] = {path: r for path, r in ranks.items() if r != common.r}
        if alphas:
            config["alpha_pattern"] = {path: _number(a) for path, a in alphas.items() if a != common.alpha}
    return dict(sorted(config.items()))


def _theirs(form: PeftFormat, name: str, value: Any) -> Any:
    """Give the hyper-parameter `name` as the file has it."""
    known = form.values.get(name, {})
    return next((theirs for theirs, ours in known.items() if ours == value), value)


def _number(value: Any) -> Any:
    """Write 32.0 as 32: some readers insist on an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
