"""What `generate.py` asks the code: sizes on the meta device, and who works with whom, by attaching to small layers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.bases import FORMATS
from lorakit.core.errors import UsageError
from lorakit.core.kinds import Kind, require_kind
from lorakit.core.start import needs
from lorakit.core.statistics import Statistics
from lorakit.optim import OPTIMIZERS, parameter_groups, state_bytes
from lorakit.train.config import OptimConfig
from lorakit.train.controllers import CONTROLLERS

SHAPES = ((4096, 4096), (576, 1536))
PROBES = (*SHAPES, (320, 800), (1536, 576))
"""A dimension is called by a symbol if the symbol has its value on all of these."""
LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(32, 48),
    "GPT-2's Conv1D": lambda: Conv1D(48, 32),
    "Embedding": lambda: nn.Embedding(40, 32),
    "Conv1d": lambda: nn.Conv1d(8, 16, 3),
    "Conv2d": lambda: nn.Conv2d(8, 16, 3),
    "Conv3d": lambda: nn.Conv3d(4, 16, 2),
    "parts of a fused layer": lambda: nn.Linear(32, 48),
}
FUSED: Mapping[str, Any] = {"target_modules": ["0.q", "0.v"], "fused": {"0": {"q": 16, "k": 16, "v": 16}}}


class Holder(nn.Sequential):
    """A model of one layer, called "0"."""


@dataclass(frozen=True)
class Tensors:
    """The parameters that a method puts on a layer of each of `PROBES`, and AdamW's state for them on each of `SHAPES`."""

    trained: list[dict[str, tuple[int, ...]]]
    kept: list[dict[str, tuple[int, ...]]]
    state: list[int]
    symbols: list[dict[str, int]]

    def count(self, index: int) -> int:
        """Give the number of trained parameters on one of `PROBES`."""
        return sum(torch.Size(shape).numel() for shape in self.trained[index].values())

    def name(self, tensor: str, place: int, shapes: list[dict[str, tuple[int, ...]]]) -> str:
        """Give one dimension of a tensor as a symbol, or as a number if no symbol has its value everywhere."""
        values = [shape[tensor][place] for shape in shapes]
        for symbol in self.symbols[0]:
            if values == [known.get(symbol) for known in self.symbols]:
                return symbol
        return str(values[0]) if len(set(values)) == 1 else ""

    def closed(self, shapes: list[dict[str, tuple[int, ...]]]) -> dict[str, list[str]] | None:
        """Give tensor -> its dimensions as symbols; None if one of them is no known function of the layer's shape."""
        if len({frozenset(shape) for shape in shapes}) > 1:
            return None
        named = {t: [self.name(t, i, shapes) for i in range(len(shapes[0][t]))] for t in shapes[0]}
        return None if any("" in dims for dims in named.values()) else named


def tensors(method: lk.Method) -> Tensors:
    """Build the method on the meta device, on a layer with a bias of each of `PROBES`."""
    trained, kept, state, symbols = [], [], [], []
    for out, width in PROBES:
        with torch.device("meta"):
            model = Holder(nn.Linear(width, out))
            lk.attach(model, method)
        ((_, _, adapter),) = lk.adapters(model)
        own = {name: (tuple(p.shape), p.requires_grad) for name, p in adapter.named_parameters()}
        trained.append({name: shape for name, (shape, learns) in own.items() if learns})
        kept.append({name: shape for name, (shape, learns) in own.items() if not learns})
        if (out, width) in SHAPES:
            state.append(state_after_a_step(model, "adamw", zero=True))
        symbols.append(_symbols(adapter.config, out, width))
    return Tensors(trained, kept, state, symbols)


def _symbols(config: Any, out: int, width: int) -> dict[str, int]:
    """Give what a dimension may be called: the layer's sizes, the whole hyper-parameters, and quotients of the two."""
    own = {f.name: vars(config)[f.name] for f in fields(config)}
    own = {name: value for name, value in own.items() if type(value) is int and value > 1}
    found = {"out": out, "in": width, **own, "out·in": out * width}
    for name, value in own.items():
        found[f"{name}({name}-1)/2"] = value * (value - 1) // 2
        for side, size in (("in", width), ("out", out)):
            found[f"{side}/{name}"] = size // value if size % value == 0 else -1
    return found


def state_after_a_step(model: nn.Module, optimizer: str, *, zero: bool = False) -> int:
    """Give the bytes that an optimizer keeps after one step on gradients of zero, or drawn at random."""
    config = OptimConfig(name=optimizer)
    made = OPTIMIZERS[optimizer](parameter_groups(model, "default", config), config)
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if zero else torch.randn_like(p)
    made.step()
    return state_bytes(made)


def attached(model: nn.Module, method: lk.Method, **target: Any) -> nn.Module:
    """Attach with everything that any start could want to know, as if it had been measured."""
    torch.manual_seed(0)
    layers = {path: (require_kind(path, m), m) for path, m in model.named_modules() if path}
    statistics = {path: known(*kind.shape(cast(Kind, m))[:2], method) for path, (kind, m) in layers.items()}
    return lk.attach(model, method, statistics=statistics, **target)


def known(out: int, width: int, method: lk.Method) -> Statistics:
    """Make up all statistics of a layer."""
    moments = {"inputs": torch.eye(width), "mean": torch.zeros(width)}
    experts = None
    if "experts" in needs(method):
        n, r = (vars(method)[name] for name in ("num_experts", "r"))
        experts = (torch.randn(n, r, width), torch.randn(n, out, r))
    gradient, residual = torch.randn(out, width), torch.randn(out, width)
    return Statistics(**moments, gradient=gradient, residual=residual, experts=experts)


def refusal(model: nn.Module, method: lk.Method, **target: Any) -> str | None:
    """Attach, and give the reason if that is refused."""
    try:
        attached(model, method, **target)
    except UsageError as error:
        return said(error)
    return None


def said(error: UsageError) -> str:
    """Give what an error says, in a line."""
    return error.what + (f" ({error.why})" if error.why else "")


def layer_refusals(method: lk.Method) -> dict[str, str | None]:
    """Give kind of layer -> why the method refuses it, or None."""
    targets = {"parts of a fused layer": FUSED}
    return {
        name: refusal(Holder(make()), method, **targets.get(name, {"target_modules": ["0"]}))
        for name, make in LAYERS.items()
    }


def base_refusals(method: lk.Method) -> dict[str, str | None]:
    """Give number format of the base -> why the method refuses it, or None."""
    found: dict[str, str | None] = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype).removeprefix("torch.")] = refusal(Holder(nn.Linear(64, 64).to(dtype)), method)
    for name in FORMATS:
        model = Holder(nn.Linear(64, 64)).to(torch.bfloat16)
        lk.quantize(model, name)
        found[name] = refusal(model, method)
    return found


def merge_refusal(method: lk.Method) -> str | None:
    """Give the reason if the method cannot be merged."""
    model = attached(Holder(nn.Linear(32, 48)), method)
    try:
        lk.merge(model)
    except UsageError as error:
        return error.why or error.what
    return None


def init_refusals(init: str) -> dict[str, str | None]:
    """Give method -> why it does not take this start, or None, of the methods that have a start."""
    found: dict[str, str | None] = {}
    for name in sorted(lk.METHODS):
        if "init" in {f.name for f in fields(lk.METHODS[name])}:
            try:
                found[name] = refusal(Holder(nn.Linear(64, 64)), lk.METHODS[name](init=init))
            except UsageError as error:  # by the dataclass
                found[name] = said(error)
    return found


def optimizer_refusals(optimizer: str) -> dict[str, str | None]:
    """Give method -> why this optimizer cannot train it, or None. On a layer wide enough for the default ranks."""
    found: dict[str, str | None] = {}
    for name, model in _models():
        config = OptimConfig(name=optimizer)
        try:
            OPTIMIZERS[optimizer](parameter_groups(model, "default", config), config)
            found[name] = None
        except UsageError as error:
            found[name] = said(error)
    return found


def _models() -> Iterator[tuple[str, nn.Module]]:
    for name in sorted(lk.METHODS):
        yield name, attached(Holder(nn.Linear(160, 192)), lk.METHODS[name]())


def controller_refusals(controller: str) -> dict[str, str | None]:
    """Give method -> why this controller cannot train it, or None."""
    refuses = vars(CONTROLLERS.module(controller)).get("refuses")
    return {name: refuses(lk.METHODS[name]()) if refuses else None for name in sorted(lk.METHODS)}


def optimizer_state(optimizer: str, method: str) -> int | None:
    """Give the bytes it keeps for a layer of the second of `SHAPES`; None if it cannot train this method."""
    out, width = SHAPES[1]
    model = lk.attach(Holder(nn.Linear(width, out)), lk.METHODS[method]())
    try:
        return state_after_a_step(model, optimizer)
    except UsageError:
        return None
