"""T31 of `lorakit selftest`: what the loader reads is what merging does, for every method and kind of layer."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, AdditiveAdapter
from ..core.attach import Adapted, adapters, attach
from ..core.errors import UsageError
from ..core.kinds import Kind
from ..core.registry import METHODS
from ..interop.adapter_directory import save
from ..theory.checks.outcome import Outcome, Where
from ..theory.selftest import Check
from .loaded import load_adapter
from .skeleton import KIND, Layer


def loader(where: Where) -> Outcome:
    """T31: the loader's change of every method on every kind of layer is W' - W of merging, and so are its factors."""
    worst: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as directory:
        for name in METHODS:
            for kind, layer in _layers():
                errors = list(_errors(name, kind, layer, Path(directory) / name / kind))
                if errors:
                    worst[f"{name} on {kind}"] = max(errors)
    wrong = [what for what, error in worst.items() if not error < 1e-5]
    if wrong:
        raise ArithmeticError(f"the loader and merging differ: {', '.join(wrong)}")
    return Outcome((0.0, 1.0), (max(worst.values()), float(len(worst) >= 10)), tolerance=1e-5)


def _layers() -> Iterator[tuple[KIND, nn.Module]]:
    yield "linear", nn.Linear(16, 24)
    yield "embedding", nn.Embedding(20, 16)
    yield "conv", nn.Conv2d(4, 8, 2)


def _errors(name: str, kind: KIND, layer: nn.Module, directory: Path) -> Iterator[float]:
    """Yield how far what is loaded is from what merging does; nothing where the method refuses the layer or merging."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"x": layer})])})
    try:
        attach(model, METHODS[name](), target_modules=["x"])
    except UsageError:
        return
    ((path, adapted, adapter),) = adapters(model)
    if not isinstance(adapter, AbstractAdapter) or not adapter.mergeable():
        return
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    W, shape = cast(Kind, adapted).matrix(), cast(Kind, adapted).shape()
    with torch.no_grad():
        wanted = adapter.merge(W) - W
    save(model, directory)
    (found,) = load_adapter(directory, lambda _: Layer(kind, shape, _kernel(adapted)))
    if found.path != path or found.shape != tuple(W.shape):
        raise ArithmeticError(f"{name}: read {found.path} {found.shape}, saved {path} {tuple(W.shape)}")
    yield _apart(found.delta(W), wanted)
    if found.A is not None and isinstance(found.adapter, AdditiveAdapter):
        U, S, V = found.factored()
        yield _apart((U * S) @ V.T, wanted)


def _kernel(layer: Adapted) -> tuple[int, ...]:
    shape = cast(Tensor, layer.weight).shape
    return tuple(shape[1:]) if len(shape) > 2 else ()


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


LOADER = Check("T31", loader)
