"""`adapter_config.json`: a method and its targets as PEFT spells them, and back."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from pydantic import TypeAdapter

from ..core.adapter import Method, PeftFormat
from ..core.errors import FileError
from ..core.registry import METHODS
from ..core.target import Target

# Fields of PEFT that change nothing about what the adapter computes once its tensors are loaded.
WITHOUT_EFFECT = frozenset(
    "alora_config arrow_config auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "fan_in_fan_out inference_mode init_lora_weights kasa_config loftq_config lora_ga_config megatron_config megatron_core "
    "monteclora_config peft_type peft_version qalora_group_size revision runtime_config task_type velora_config".split()
)
TARGETING = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern modules_to_save".split()
)
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

    for_peft: the tensors are named as PEFT names them. If not, or if PEFT does not know the method, the `peft_type` is ours.
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
        config |= {theirs: _number(getattr(method, ours)) for ours, theirs in form.fields.items()}
    if ranks and form and form.masked:
        tensor, full = form.masked[0], getattr(method, form.masked[1])
        masks = {f"{path}.{tensor}": [True] * r + [False] * (full - r) for path, r in ranks.items()}
        config["rank_pattern"] = masks if any(r < full for r in ranks.values()) else None
    elif ranks:
        common: Any = method
        config["rank_pattern"] = {path: r for path, r in ranks.items() if r != common.r}
        config["alpha_pattern"] = {path: _number(a) for path, a in alphas.items() if a != common.alpha}
    return dict(sorted(config.items()))


def read_config(config: Mapping[str, Any], side: Mapping[str, Any]) -> tuple[Method, Target]:
    """Give the method and the targets of an adapter. `side` is the content of `lorakit.json`, {} if there is none.

    Raises FileError for a method or a setting that would be lost.
    """
    method = _method(config, side)
    form = peft_format(method)
    known = TARGETING | WITHOUT_EFFECT | ({*form.fields.values(), *form.constants, *form.ignored} if form else set())
    lost = {k: v for k, v in config.items() if k not in known and v not in (None, False, "none", [], {})}
    if lost:
        listed = ", ".join(f"{k}={v!r}"[:60] for k, v in lost.items())
        raise FileError(f"the adapter uses settings that lorakit cannot honour: {listed}", fix="convert it with PEFT to a plain adapter")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(MOVES_THE_BASE):
        raise FileError(
            f"the adapter was saved unconverted from an {start!r} start",
            why="that start moved part of the base weights into the adapter, so on the original base it means something else",
            fix="save it in PEFT with path_initial_model_for_weight_conversion",
        )
    return method, _target({**config, "rank_pattern": _ranks(config, form)}, side)


def _ranks(config: Mapping[str, Any], form: PeftFormat | None) -> Any:
    """Give `rank_pattern` as layer -> rank, whatever it is in the file; not validated, except where it is masks."""
    masks = config.get("rank_pattern")
    if form is None or form.masked is None or masks is None:
        return masks
    tensor = form.masked[0]
    keys = rf"(.+)\.{re.escape(tensor)}(?:\.[\w-]+)?"  # PEFT may leave the adapter's name at the end
    found = {re.fullmatch(keys, key): mask for key, mask in masks.items()} if isinstance(masks, dict) else {None: []}
    if None in found or not all(isinstance(m, list) and all(type(v) is bool for v in m) for m in found.values()):
        raise FileError(f"adapter_config.json: rank_pattern is {masks!r}"[:160], fix=f"masks of the rows of {tensor} are expected")
    return {cast(re.Match, match)[1]: sum(mask) for match, mask in found.items()}


def _method(config: Mapping[str, Any], side: Mapping[str, Any]) -> Method:
    mine = side.get("method", {})
    kind = config.get("peft_type")
    for name in METHODS:
        cls = METHODS[name]
        form: PeftFormat | None = vars(cls).get("PEFT")
        constants = form.constants if form else {}
        if kind not in (own_type(name), form and form.peft_type) or any(
            config.get(k, _absent(v)) != v for k, v in constants.items()
        ):
            continue
        if not (mine.get("name") == name if mine else form is None or not form.only_with_side_file):
            continue
        theirs = {ours: config[key] for ours, key in form.fields.items() if key in config} if form else {}
        own = {f.name for f in fields(cls)}
        values = {k: v for k, v in mine.items() if k in own} | theirs
        try:
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except (TypeError, ValueError) as error:
            raise FileError("adapter_config.json has a value that is no setting of the method", why=str(error)) from None
    raise FileError(f"peft_type {kind!r} is not a method lorakit knows", fix=f"known: {', '.join(sorted(METHODS))}")


def _absent(constant: object) -> object:
    """A flag that is not written is off."""
    return False if isinstance(constant, bool) else None


def _target(config: Mapping[str, Any], side: Mapping[str, Any]) -> Target:
    targets = config.get("target_modules")
    problems = []
    if not isinstance(targets, str | list) or not all(isinstance(t, str) for t in targets):
        problems.append(f"target_modules is {targets!r}"[:100])
    for key, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or any(
            not isinstance(v, kind) or isinstance(v, bool) or not math.isfinite(v) for v in pattern.values()
        ):
            problems.append(f"{key} is {pattern!r}"[:100])
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(type(n) is int for n in layers)):
        problems.append(f"layers_to_transform is {layers!r}"[:100])
    if problems:
        raise FileError("adapter_config.json: " + "; ".join(problems))
    return Target(
        target_modules=targets or [],
        exclude_modules=config.get("exclude_modules") or None,
        layers=layers,
        rank_pattern=config.get("rank_pattern") or None,
        alpha_pattern=config.get("alpha_pattern") or None,
        modules_to_save=config.get("modules_to_save") or None,
        fused=side.get("fused") or None,
    )


def _number(value: Any) -> Any:
    """Write 32.0 as 32: some readers insist on an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

