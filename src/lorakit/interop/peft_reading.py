"""Reading `adapter_config.json` and `lorakit.json` from strangers: every field checked, nothing that would change the adapter ignored."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, cast

from annotated_types import Ge, Gt, Le, Len, Lt, MaxLen
from pydantic import BaseModel, TypeAdapter, ValidationError

from ..core.adapter import Method, PeftFormat
from ..core.errors import FileError
from ..core.registry import METHODS
from ..core.stack import parts_of
from ..core.target import Target
from .peft_config import MOVES_THE_BASE, own_type, peft_format
from .read import MAX_TENSORS, SHOWN, shown, some

# Fields of PEFT that change nothing about what the adapter computes once its tensors are loaded.
WITHOUT_EFFECT = frozenset(
    "alora_config arrow_config auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "fan_in_fan_out inference_mode init_lora_weights kasa_config loftq_config lora_ga_config megatron_config "
    "megatron_core monteclora_config peft_type peft_version qalora_group_size revision runtime_config task_type velora_config".split()
)
TARGETING = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "modules_to_save".split()
)
Names = Annotated[list[str], MaxLen(MAX_TENSORS)]
Size = Annotated[int, Ge(0), Lt(1 << 31)]
# No adapter has ever been scaled by more; far above it the forward pass overflows.
Alpha = Annotated[float, Gt(0), Le(1e6)]


class Targeting(BaseModel, strict=True):
    """The fields of `adapter_config.json` that say which layers are adapted, with which rank and scale."""

    target_modules: Names | str
    exclude_modules: Names | str | None = None
    layers_to_transform: Size | list[Size] | None = None
    rank_pattern: dict[str, Size] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    modules_to_save: Names | None = None


class Scaling(BaseModel, strict=True):
    """Rank and scale of a method, or of one part of a fused layer."""

    r: Size | None = None
    alpha: Alpha | None = None


class Side(BaseModel, strict=True):
    """The fields of `lorakit.json` that loading reads; `fused`: sizes of parts, or [start, stop) ranges of their rows."""

    method: dict[str, Any] = {}
    parts: dict[str, dict[str, Scaling]] = {}
    fused: dict[str, dict[str, Size | list[Annotated[list[Size], Len(2, 2)]]]] = {}


def read_config(config: Mapping[str, Any], side: Mapping[str, Any]) -> tuple[Method, Target]:
    """Give the method and the targets of an adapter. `side` is the content of `lorakit.json`, {} if there is none.

    Raises FileError for a method or a setting that would be lost.
    """
    method = _method(config, side)
    form = peft_format(method)
    known = TARGETING | WITHOUT_EFFECT | ({*form.fields.values(), *form.constants, *form.ignored} if form else set())
    lost = {k: v for k, v in config.items() if k not in known and v not in (None, False, "none", [], {})}
    if lost:
        listed = some([f"{k}={v!r}"[:60] for k, v in lost.items()])
        raise FileError(
            f"the adapter uses settings that lorakit cannot honour: {listed}",
            fix="convert it with PEFT to a plain adapter",
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(MOVES_THE_BASE):
        raise FileError(
            f"the adapter was saved unconverted from the start {shown(start)}",
            why="that start moved part of the base weights into the adapter, and what was left of them is in no file: repeated in "
            "another dtype, on a quantized base, on other rows or by a randomized SVD, the start gives another base",
            fix="save it in PEFT with path_initial_model_for_weight_conversion, from the model that was trained",
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
        raise FileError(
            f"adapter_config.json: rank_pattern is {shown(masks)}", fix=f"masks of the rows of {tensor} are expected"
        )
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
        if not (mine.get("name") == name if mine else form is None or _plainly(form, config)):
            continue
        if kind == own_type(name) and not mine:
            raise FileError(
                f"the adapter lacks lorakit.json, without which the settings of the method {name} are not known",
                fix="copy the whole directory; PEFT has no form for this adapter",
            )
        theirs = {ours: _ours(form, ours, config.get(key)) for ours, key in form.fields.items()} if form else {}
        own = {f.name: f.default for f in fields(cls)}
        # PEFT's defaults are not ours, so what is absent must be off by default.
        absent = [form.fields[ours] for ours, v in theirs.items() if form and v is None and own[ours] not in (0, False)]
        if absent:
            raise FileError(f"adapter_config.json lacks {', '.join(absent)}")
        values = {k: v for k, v in mine.items() if k in own} | {k: v for k, v in theirs.items() if v is not None}
        try:
            method = _reader(cls).validate_json(json.dumps(values), strict=True)
        except (TypeError, ValueError, OverflowError) as error:
            why = shown(str(error))
            raise FileError("adapter_config.json has a value that is no setting of the method", why=why) from None
        for alpha in (vars(part)["alpha"] for part in parts_of(method) if "alpha" in vars(part)):
            _checked(Scaling, {"alpha": alpha}, "adapter_config.json: lora_")
        return method
    why = (
        f"lorakit.json says that the method is {shown(mine.get('name'))}, adapter_config.json that it is another"
        if mine
        else None
    )
    raise FileError(
        f"peft_type {shown(kind)} is not a method lorakit knows", why=why, fix=f"known: {', '.join(sorted(METHODS))}"
    )


def _plainly(form: PeftFormat, config: Mapping[str, Any]) -> bool:
    """Whether `adapter_config.json` alone says that it is this method."""
    return not form.only_with_side_file and (form.marked_by is None or bool(config.get(form.marked_by)))


def _ours(form: PeftFormat, name: str, value: Any) -> Any:
    """Give a value of the file as the hyper-parameter `name` has it; one that the method does not know stays as it is."""
    known = form.values.get(name, {})
    return known.get(value, value) if isinstance(value, str | int | float | None) else value


@functools.cache
def _reader(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _absent(constant: object) -> object:
    """A flag that is not written is off."""
    return False if isinstance(constant, bool) else None


def _target(config: Mapping[str, Any], side: Mapping[str, Any]) -> Target:
    _checked(Targeting, config, "adapter_config.json: ")
    layers = config.get("layers_to_transform")
    return Target(
        target_modules=config["target_modules"],
        exclude_modules=config.get("exclude_modules") or None,
        layers=[layers] if isinstance(layers, int) else layers,
        rank_pattern=config.get("rank_pattern") or None,
        alpha_pattern=config.get("alpha_pattern") or None,
        modules_to_save=config.get("modules_to_save") or None,
        fused=side.get("fused") or None,
    )


def check_side(side: Mapping[str, Any]) -> None:
    """Raise FileError unless `lorakit.json` has the form that `load` relies on."""
    _checked(Side, side, "lorakit.json: ")


def _checked(form: type[BaseModel], content: Mapping[str, Any], where: str) -> None:
    """Raise FileError naming every field of `content` that does not have the type that `form` gives it."""
    try:
        form.model_validate(content)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}"[:SHOWN] for e in error.errors(include_url=False)]
        raise FileError(where + some(wrong)) from None
