"""An adapter on disk: a PEFT directory, read by PEFT, vLLM, SGLang and llama.cpp's tools, and a side file for the rest.

    adapter_config.json  adapter_model.safetensors        as PEFT writes them
    tokenizer files, chat_template.jinja                   if a tokenizer is given
    lorakit.json                                           what PEFT cannot express; nothing breaks without it

Loading is strict: every tensor is used exactly once, every expected tensor is there, finite and of the right shape;
else one error lists all problems. Nothing is unpickled, and no path of the machine is written.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Method, Resizable, Selective
from ..core.attach import Adapted, Attached, Replacement, adapters, detach, place, places, require, use
from ..core.errors import DivergenceError, FileError, UsageError
from ..core.files import atomic_directory
from ..core.fused import Parts, ranges
from ..core.pattern import is_suffix
from ..core.stack import parts_of, settings_of
from ..core.target import Target, saved_modules, sites
from ..core.weight import shape_of
from .keys import PREFIX, SHARED_PREFIX, config_in_file, file_tensors, fill, spelled_for_peft
from .peft_config import write_config
from .read import DTYPES, FLOATS, TensorInfo, read_header, read_json, read_tensors, regular_file, shown, some

CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
PICKLE = "adapter_model.bin"
FORMAT = 1
BASE_WEIGHT = ".base_layer.weight"


class Tokenizer(Protocol):
    """A transformers tokenizer, as far as saving one goes."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write its files."""
        ...


def save(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    *,
    base: str | None = None,
    tokenizer: Tokenizer | None = None,
    task_type: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write adapter `name` as a PEFT directory, whole or not at all; an adapter that is there is replaced.

    base: what `base_model_name_or_path` is to say (a hub id or a built-in name; of a path the last component is kept).
    task_type: PEFT's, such as "CAUSAL_LM". extra: more facts for `lorakit.json` (class names, fingerprints).
    Raises UsageError for a directory that holds something else, DivergenceError for NaN or infinity in the adapter.
    """
    require(model, name)
    found = list(_to_save(model, name))
    tensors = {
        key: value.detach().cpu().contiguous() for p, layer, a in found for key, value in file_tensors(p, layer, a)
    }
    config, side = describe(model, name, base=base, task_type=task_type)
    _check_finite(tensors)
    _check_replaceable(Path(directory))
    with atomic_directory(Path(directory)) as work:
        safetensors.torch.save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (work / SIDE).write_text(json.dumps({**side, **(extra or {})}, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(work))
    return Path(directory)


def describe(
    model: nn.Module, name: str, *, base: str | None = None, task_type: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the contents of `adapter_config.json` and `lorakit.json` for adapter `name`, from what is attached."""
    every = [(path, a) for path, _, a in _to_save(model, name)]
    found = {path: a for path, a in every if isinstance(a, AbstractAdapter)}
    replaced = [path for path, a in every if isinstance(a, Replacement)]
    configs = {path: config_in_file(a) for path, a in found.items()}
    if not configs:
        raise UsageError(f"adapter {name!r} has only modules trained in full", fix="target at least one layer")
    targets, selected = _spelled(model, found)
    method = _selecting(_commonest(configs.values()), selected)
    config = write_config(
        method,
        target_modules=targets,
        ranks={p: c.r for p, c in configs.items() if isinstance(c, Resizable)},
        alphas={p: c.alpha for p, c in configs.items() if isinstance(c, Resizable) and "alpha" in vars(c)},
        modules_to_save=replaced,
        base=_no_path(base),
        task_type=task_type,
        for_peft=all(spelled_for_peft(a) for a in found.values()),
    )
    plain = [part for a in found.values() for part in (a.parts.values() if isinstance(a, Parts) else [a])]
    own = _selecting(_commonest(config_in_file(cast(AbstractAdapter, part)) for part in plain), selected)
    fused = {path: a for path, a in found.items() if isinstance(a, Parts)}
    side: dict[str, Any] = {
        "format": FORMAT,
        "method": settings_of(own),
        "base": {"name": _no_path(base)},
    }
    if fused:
        side["parts"] = {p: {k: _rank_and_alpha(c) for k, c in a.parts.items()} for p, a in fused.items()}
        side["fused"] = {p: {k: ranges(a.rows(k)) for k in a.parts} for p, a in fused.items()}
    return config, side


def load(model: nn.Module, directory: str | Path, name: str = "default", *, trainable: bool = False) -> nn.Module:
    """Put the adapter of a directory on `model` and activate it; frozen unless `trainable`.

    Raises FileError listing every problem of the files; the model is then unchanged.
    """
    # Here, for it brings pydantic, which takes longer to import than all of lorakit.
    from .peft_reading import check_side, read_config

    directory = Path(directory)
    if not directory.is_dir():
        raise FileError(
            f"no adapter directory {str(directory)!r}", fix="give the directory that holds adapter_config.json"
        )
    config = read_json(regular_file(directory, CONFIG))
    side = read_json(regular_file(directory, SIDE)) if os.path.lexists(directory / SIDE) else {}
    if side.get("format", FORMAT) != FORMAT:
        raise FileError(
            f"lorakit.json has format {shown(side['format'])}",
            why=f"this lorakit reads format {FORMAT}",
            where=str(directory),
        )
    if (directory / PICKLE).exists() and not (directory / WEIGHTS).exists():
        raise FileError(
            f"the adapter is a pickle ({PICKLE})",
            why="unpickling can run code",
            fix="save it as safetensors",
            where=str(directory),
        )
    weights = regular_file(directory, WEIGHTS)
    header = read_header(weights)
    try:
        check_side(side)
        method, target = read_config(config, side)
        _check_ranks(model, method, target, side, header)
        target = _by_parts(model, target, side.get("parts", {}))
        expected = _expected(model, method, target)
        copies = _copies(header, expected)
        _check_tensors({key: info for key, info in header.items() if key not in copies}, expected, weights)
    except UsageError as error:  # what a user would have to change in a configuration is here a property of the file
        raise FileError(
            f"the adapter does not fit this model: {error.what}", why=error.why, where=str(directory)
        ) from error
    tensors = read_tensors(weights)
    if {key: tuple(t.shape) for key, t in tensors.items()} != {key: info.shape for key, info in header.items()}:
        raise FileError(f"{weights.name} was changed while it was read", fix="load it again", where=str(weights))
    _check_values(model, tensors, copies, weights)
    place(model, method, target, name)
    try:
        _fill(model, name, tensors, trainable)
    except BaseException:
        detach(model, name)
        raise
    return use(model, name)


def _fill(model: nn.Module, name: str, tensors: Mapping[str, Tensor], trainable: bool) -> None:
    for path, layer, adapter in adapters(model, name):
        fill(path, layer, adapter, tensors)
        roles = adapter.roles()
        for key, parameter in adapter.named_parameters():
            parameter.requires_grad_(trainable and roles[key] != "frozen")


def _by_parts(model: nn.Module, target: Target, parts: Mapping[str, Mapping[str, Any]]) -> Target:
    """Name the parts of fused layers instead of the layers, as `lorakit.json` says."""
    if not parts:
        return target
    paths = [s.path for s in sites(model, target)]
    named = {f"{p}.{part}": config for p, its in parts.items() for part, config in its.items()}
    return replace(
        target,
        target_modules=[n for p in paths for n in ([f"{p}.{part}" for part in parts[p]] if p in parts else [p])],
        rank_pattern={k: v for k, v in (target.rank_pattern or {}).items() if k not in parts}
        | {n: config["r"] for n, config in named.items() if "r" in config},
        alpha_pattern={k: v for k, v in (target.alpha_pattern or {}).items() if k not in parts}
        | {n: config["alpha"] for n, config in named.items() if "alpha" in config},
    )


def _check_ranks(
    model: nn.Module, method: Method, target: Target, side: Mapping[str, Any], header: Mapping[str, TensorInfo]
) -> None:
    """Raise FileError for a rank that no tensor of file and model is large enough for, before anything is built with it."""
    ranks = [
        (key, value)
        for part in parts_of(method)
        for key, value in vars(part).items()
        if (key == "r" or key.endswith("_r")) and value is not None
    ]
    ranks += [("rank_pattern", r) for r in (target.rank_pattern or {}).values()]
    ranks += [("parts", part.get("r") or 0) for its in side.get("parts", {}).values() for part in its.values()]
    largest = max((size for info in header.values() for size in info.shape), default=0)
    if any(r > largest for _, r in ranks):
        largest = max(largest, *(size for p in model.parameters() for size in shape_of(p)))
    wrong = [f"{key} asks for rank {shown(r)}" for key, r in ranks if r > largest]
    if wrong:
        raise FileError(f"{CONFIG}: {some(wrong)}, but no tensor of file and model has a side longer than {largest}")


def _expected(model: nn.Module, method: Method, target: Target) -> dict[str, Tensor]:
    """Give a tensor of the right shape and kind for every key the file must hold, without memory behind it."""
    expected = {}
    spots = places(model, method, target)
    with torch.device("meta"):
        for spot in spots:
            expected |= dict(file_tensors(spot.path, spot.layer, spot.build()))
    for path, module in saved_modules(model, target):
        expected |= {f"{PREFIX}{path}.{key}": t for key, t in module.state_dict().items()}
    return expected


def _copies(header: Mapping[str, TensorInfo], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Give the keys that repeat for a layer what all hold in common -> the common key. PEFT writes RandLoRA so."""
    layers = {key.rpartition(".")[0] for key in expected if key.startswith(PREFIX)}
    common = {key.removeprefix(SHARED_PREFIX): key for key in expected if not key.startswith(PREFIX)}
    split = {key: key.rpartition(".") for key in header}
    return {key: common[name] for key, (path, _, name) in split.items() if path in layers and name in common}


def _check_tensors(header: Mapping[str, TensorInfo], expected: Mapping[str, Tensor], file: Path) -> None:
    """Raise FileError unless the file holds exactly the expected tensors."""
    missing = [key for key in expected if key not in header]
    extra = [key for key in header if key not in expected and not key.endswith(BASE_WEIGHT)]
    both = [(key, header[key], t) for key, t in expected.items() if key in header]
    shapes = [
        f"{key} is {list(info.shape)}, expected {list(t.shape)}" for key, info, t in both if info.shape != t.shape
    ]
    kinds = [f"{key} is {info.dtype}" for key, info, t in both if not _may_hold(info.dtype, t)]
    problems = [
        f"{what}: {some([shown(item) for item in items])}"
        for what, items in (
            ("missing", missing),
            ("not used by this model and configuration", extra),
            ("wrong shape", shapes),
            ("wrong dtype", kinds),
        )
        if items
    ]
    if problems:
        count = len({*missing, *extra}) + len(
            {key for key, info, t in both if info.shape != t.shape or not _may_hold(info.dtype, t)}
        )
        raise FileError(
            f"{file.name} and this model do not fit: {count} of {len({*header, *expected})} tensors",
            why="; ".join(problems),
            fix="load it on the base model it was trained on; check r and target_modules in adapter_config.json",
            where=str(file),
        )


def _may_hold(dtype: str, expected: Tensor) -> bool:
    """Whether a tensor of the file can become this one: floats from floats, a buffer of integers from the same kind."""
    return dtype in FLOATS if expected.is_floating_point() else DTYPES[dtype] is expected.dtype


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = _not_finite(tensors)
    if bad:
        raise DivergenceError(f"the adapter cannot be saved: {some(bad)}", why="the run that made it has diverged")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Say which tensors hold values that are not finite, or would not be in single precision."""
    odd = {key: t for key, t in tensors.items() if not torch.isfinite(t.float().sum())}  # one pass where all is well
    counts = {key: t.numel() - int(torch.isfinite(t.float()).sum()) for key, t in odd.items()}
    return [f"{shown(key)} holds {count} NaN or infinite values" for key, count in counts.items() if count]


def _check_replaceable(directory: Path) -> None:
    """Raise UsageError for a directory with other things in it: saving replaces it whole."""
    if directory.is_dir() and not (directory / CONFIG).exists() and any(directory.iterdir()):
        raise UsageError(
            f"{str(directory)!r} holds something else than an adapter",
            why="saving replaces the whole directory",
            fix="give a directory of its own",
        )


def _check_values(model: nn.Module, tensors: Mapping[str, Tensor], copies: Mapping[str, str], file: Path) -> None:
    """Raise FileError for NaN or infinity, and for copies (PEFT adds base embeddings too) unlike what they repeat."""
    problems = _not_finite(tensors)
    differ = [key for key, common in copies.items() if not torch.equal(tensors[key], tensors[common])]
    problems += [f"{shown(key)} differs from what all layers hold in common" for key in differ]
    bases = [key for key in tensors if key.endswith(BASE_WEIGHT)]
    weights = dict(model.named_parameters()) if bases else {}
    for key in bases:
        weight = weights.get(key.removeprefix(PREFIX).removesuffix(BASE_WEIGHT) + ".weight")
        if (
            weight is None
            or weight.shape != tensors[key].shape
            or not torch.equal(weight.cpu(), tensors[key].to(weight.dtype))
        ):
            problems.append(f"{shown(key)} is a base weight that differs from this model's")
    if problems:
        raise FileError(f"{file.name} cannot be used: {some(problems)}", where=str(file))


def _shortest(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Give last components if they name exactly these layers, else the whole paths."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    named = [
        p for p, _ in model.named_modules() if p and ".adapters" not in p and any(is_suffix(leaf, p) for leaf in leaves)
    ]
    return leaves if set(named) == set(paths) else sorted(paths)


def _rank_and_alpha(part: nn.Module) -> dict[str, float]:
    config: Any = config_in_file(cast(AbstractAdapter, part))
    own = vars(config) if isinstance(config, Resizable) else {}
    return {key: own[key] for key in ("r", "alpha") if key in own}


def _spelled(model: nn.Module, found: Mapping[str, AbstractAdapter]) -> tuple[list[str], list[str]]:
    """Give the entries of `target_modules`, and among them those that name the layers that the method selected.

    PEFT takes an entry of the latter for the end of a path, whether or not a component begins there.
    """
    parts = {f"{p}.{name}": part for p, a in found.items() if isinstance(a, Parts) for name, part in a.each()}
    chosen = {name for name, adapter in {**found, **parts}.items() if adapter.selected}
    targets = _shortest(model, list(found))
    entries = [t for t in targets if any(is_suffix(t, name) for name in chosen)]
    if {path for path in found if any(path.endswith(entry) for entry in entries)} == chosen:
        return targets, entries
    return sorted(found), sorted(chosen)


def _selecting(method: Any, selected: Sequence[str]) -> Any:
    """Let a `Selective` method's field name the layers that were selected, however that came about."""
    return replace(method, **{method.SELECTS: tuple(selected)}) if isinstance(method, Selective) else method


def _to_save(model: nn.Module, name: str) -> Iterator[tuple[str, Adapted, Attached]]:
    for path, layer, adapter in adapters(model, name):
        yield path, layer, adapter.compact() if isinstance(adapter, AbstractAdapter) else adapter


def _commonest(configs: Iterable[Any]) -> Any:
    return Counter(configs).most_common(1)[0][0]


def _no_path(base: str | None) -> str | None:
    """Keep a hub id or a name; of a path only its last component, for it means nothing on another machine."""
    if base is None or (re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists()):
        return base
    return Path(base).resolve().name
