"""An adapter on disk: a PEFT directory that PEFT, vLLM, SGLang and llama.cpp's tools read, and one side file for the rest.

    adapter_config.json  adapter_model.safetensors        as PEFT writes them
    tokenizer files, chat_template.jinja                   if a tokenizer is given
    lorakit.json                                           what PEFT cannot express; nothing breaks without it

Loading is strict: every tensor is used exactly once, every expected tensor is there, finite and of the right shape; else one
error lists all problems. Nothing is unpickled, and no path of the machine is written.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Method
from ..core.attach import Adapted, Attached, Replacement, adapters, place, places, require, use
from ..core.errors import FileError, UsageError
from ..core.files import atomic_directory
from ..core.fused import Parts, ranges
from ..core.pattern import is_suffix
from ..core.registry import METHODS
from ..core.target import Target, saved_modules, sites
from .keys import PREFIX, config_in_file, file_tensors, fill, spelled_for_peft
from .peft_config import read_config, write_config
from .read import TensorInfo, read_header, read_json, read_tensors, regular_file, some

CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
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
    """Write adapter `name` as a PEFT directory, whole or not at all; a directory that is there is replaced.

    base: what `base_model_name_or_path` is to say (a hub id or a built-in name; of a path only the last component is kept).
    task_type: PEFT's, such as "CAUSAL_LM". extra: more facts for `lorakit.json` (class names, fingerprints).
    """
    require(model, name)
    found = list(_to_save(model, name))
    tensors = {key: value.detach().cpu().contiguous() for p, layer, a in found for key, value in file_tensors(p, layer, a)}
    config, side = describe(model, name, base=base, task_type=task_type)
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
    """Give the contents of `adapter_config.json` and `lorakit.json` for adapter `name`, from the adapters themselves."""
    every = [(path, a) for path, _, a in _to_save(model, name)]
    found = {path: a for path, a in every if isinstance(a, AbstractAdapter)}
    replaced = [path for path, a in every if isinstance(a, Replacement)]
    configs = {path: config_in_file(a) for path, a in found.items()}
    if not configs:
        raise UsageError(f"adapter {name!r} has only modules trained in full", fix="target at least one layer")
    method = _commonest(configs.values())
    config = write_config(
        method,
        target_modules=_shortest(model, list(found)),
        ranks={p: c.r for p, c in configs.items() if _ranked(c)},
        alphas={p: c.alpha for p, c in configs.items() if _ranked(c)},
        modules_to_save=replaced,
        base=_no_path(base),
        task_type=task_type,
        for_peft=all(spelled_for_peft(a) for a in found.values()),
    )
    plain = [part for a in found.values() for part in (a.parts.values() if isinstance(a, Parts) else [a])]
    own = _commonest(config_in_file(cast(AbstractAdapter, part)) for part in plain)
    fused = {path: a for path, a in found.items() if isinstance(a, Parts)}
    side: dict[str, Any] = {
        "format": FORMAT,
        "method": {"name": METHODS.name_of(type(own)), **asdict(own)},
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
    directory = Path(directory)
    if not directory.is_dir():
        raise FileError(f"no adapter directory {str(directory)!r}", fix="give the directory that holds adapter_config.json")
    config = read_json(regular_file(directory, CONFIG))
    side = read_json(regular_file(directory, SIDE)) if (directory / SIDE).exists() else {}
    if side.get("format", FORMAT) != FORMAT:
        raise FileError(f"lorakit.json has format {side['format']}", why=f"this lorakit reads format {FORMAT}", where=str(directory))
    if (directory / "adapter_model.bin").exists() and not (directory / WEIGHTS).exists():
        raise FileError("the adapter is a pickle (adapter_model.bin)", why="unpickling can run code", fix="save it as safetensors", where=str(directory))
    weights = regular_file(directory, WEIGHTS)
    header = read_header(weights)
    try:
        method, target = read_config(config, side)
        target = _by_parts(model, target, side.get("parts", {}))
        _check_tensors(header, _expected(model, method, target), weights)
    except UsageError as error:  # what a user would have to change in a configuration is here a property of the file
        raise FileError(f"the adapter does not fit this model: {error.what}", why=error.why, where=str(directory)) from error
    tensors = read_tensors(weights)
    _check_values(model, tensors, weights)
    place(model, method, target, name)
    for path, layer, adapter in adapters(model, name):
        fill(path, layer, adapter, tensors)
        roles = adapter.roles()
        for key, parameter in adapter.named_parameters():
            parameter.requires_grad_(trainable and roles[key] != "frozen")
    return use(model, name)


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
        | {n: config["r"] for n, config in named.items() if config},
        alpha_pattern={k: v for k, v in (target.alpha_pattern or {}).items() if k not in parts}
        | {n: config["alpha"] for n, config in named.items() if config},
    )


def _expected(model: nn.Module, method: Method, target: Target) -> dict[str, tuple[int, ...]]:
    """Give key -> shape of every tensor the file must hold. Nothing is allocated: a rank of millions costs nothing."""
    expected = {}
    spots = places(model, method, target)
    with torch.device("meta"):
        for spot in spots:
            expected |= {key: tuple(t.shape) for key, t in file_tensors(spot.path, spot.layer, spot.build())}
    for path, module in saved_modules(model, target):
        expected |= {f"{PREFIX}{path}.{key}": tuple(t.shape) for key, t in module.state_dict().items()}
    return expected


def _check_tensors(header: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise FileError unless the file holds exactly the expected tensors."""
    missing = [key for key in expected if key not in header]
    extra = [key for key in header if key not in expected and not key.endswith(BASE_WEIGHT)]
    shapes = [
        f"{key} is {list(header[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in header and header[key].shape != shape
    ]
    problems = [
        f"{what}: {some([repr(item)[:120] for item in items])}"
        for what, items in (("missing", missing), ("not used by this model and configuration", extra), ("wrong shape", shapes))
        if items
    ]
    if problems:
        raise FileError(
            f"{file.name} and this model do not fit: {len(missing) + len(extra) + len(shapes)} of {len(header)} tensors",
            why="; ".join(problems),
            fix="load it on the base model it was trained on; check r and target_modules in adapter_config.json",
            where=str(file),
        )


def _check_values(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise FileError for NaN or infinity, and for a copy of a base weight (PEFT adds embeddings) that differs from the base."""
    problems = [f"{key} holds {int((~torch.isfinite(t)).sum())} NaN or infinite values" for key, t in tensors.items() if not torch.isfinite(t).all()]
    for key in [k for k in tensors if k.endswith(BASE_WEIGHT)]:
        path = key.removeprefix(PREFIX).removesuffix(BASE_WEIGHT)
        weight = dict(model.named_parameters()).get(f"{path}.weight")
        if weight is None or weight.shape != tensors[key].shape or not torch.equal(weight.cpu(), tensors[key].to(weight.dtype)):
            problems.append(f"{key} is a base weight that differs from this model's")
    if problems:
        raise FileError(f"{file.name} cannot be used: {some(problems)}", where=str(file))


def _shortest(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Give last components if they name exactly these layers, else the whole paths."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    named = [p for p, _ in model.named_modules() if p and ".adapters" not in p and any(is_suffix(leaf, p) for leaf in leaves)]
    return leaves if set(named) == set(paths) else sorted(paths)


def _rank_and_alpha(part: nn.Module) -> dict[str, float]:
    config: Any = config_in_file(cast(AbstractAdapter, part))
    return {"r": config.r, "alpha": config.alpha} if _ranked(config) else {}


def _ranked(config: Method) -> bool:
    return {"r", "alpha"} <= vars(config).keys()


def _to_save(model: nn.Module, name: str) -> Iterator[tuple[str, Adapted, Attached]]:
    for path, layer, adapter in adapters(model, name):
        yield path, layer, adapter.compact() if isinstance(adapter, AbstractAdapter) else adapter


def _commonest(configs: Iterable[Any]) -> Any:
    return Counter(configs).most_common(1)[0][0]


def _no_path(base: str | None) -> str | None:
    """Keep a hub id or a name; of a path only its last component, for it means nothing on another machine."""
    if base is None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not Path(base).exists():
        return base
    return Path(base).resolve().name
