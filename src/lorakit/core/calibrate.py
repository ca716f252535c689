"""Measure the layers that adapters are to be attached to on some batches, for the starts that look at data.

    inputs    E[x x^T] and E[x] over all tokens of all batches
    gradient  mean over batches of dL/dW = g^T x, summed over the tokens; W itself never gets a gradient

Both are running sums in fp32, whatever the base is stored in, so memory does not grow with the number of batches. It is one
matrix per layer and kind of statistic; where that is more than `at_once` bytes, the layers are measured in groups, each when it
is first asked for, and only the latest group is kept.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .adapter import Method
from .attach import places
from .errors import DivergenceError, UsageError
from .kinds import Kind, require_kind
from .start import needs
from .statistics import Statistics
from .target import Target

Loss = Callable[[nn.Module, Any], Tensor]
"""Runs the model on a batch and gives its mean loss."""


def calibrate(
    model: nn.Module, method: Method, batches: Sequence[Any], loss: Loss, *, at_once: int = 2 << 30, **target: Any
) -> "Calibration":
    """Give what `method` needs to know of the layers that `target` names (the arguments of `attach`), by layer path.

    Pass it to `attach` as `statistics`. The model runs in eval mode and without its adapters being trained; the result is
    the same for any `at_once`. Raises UsageError for targets that match nothing and, when asked for, layers that never ran.
    """
    spots = places(model, method, Target(**target))
    kinds = {spot.path: require_kind(spot.path, spot.layer) for spot in spots}
    # An embedding starts from nothing that could be measured: its inputs are one-hot.
    layers = {s.path: s.layer for s in spots if not kinds[s.path].shape(cast(Kind, s.layer)).one_hot}
    return Calibration(model, layers, needs(method), batches, loss, at_once)


class Calibration(Mapping[str, Statistics]):
    """Statistics by layer path, measured when first asked for."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        wanted: frozenset[str],
        batches: Sequence[Any],
        loss: Loss,
        at_once: int,
    ) -> None:
        if not batches:
            raise UsageError("there are no batches to calibrate on")
        self.model, self.wanted, self.batches, self.loss = model, wanted, batches, loss
        self._groups = _groups(layers, wanted, at_once)
        self._latest: dict[str, Statistics] = {}

    def __getitem__(self, path: str) -> Statistics:
        if path not in self._latest:
            group = next((g for g in self._groups if path in g), None)
            if group is None:
                raise KeyError(path)
            self._latest.clear()
            self._latest = measure(self.model, group, self.wanted, self.batches, self.loss)
        return self._latest[path]

    def __iter__(self) -> Iterator[str]:
        return (path for group in self._groups for path in group)

    def __len__(self) -> int:
        return sum(map(len, self._groups))


def measure(
    model: nn.Module, layers: Mapping[str, nn.Module], wanted: frozenset[str], batches: Sequence[Any], loss: Loss
) -> dict[str, Statistics]:
    """Run the batches once and give the statistics of `layers`, all at the same time."""
    sums = {path: _Sums(layer, wanted) for path, layer in layers.items()}
    learn = "gradient" in wanted
    with watched(model, layers, sums) as root, torch.set_grad_enabled(learn):
        for batch in batches:
            value = loss(model, batch)
            if learn:
                value.backward(inputs=[root])
    return {path: s.mean(path, len(batches)) for path, s in sums.items()}


class _Sums:
    """Running sums of one layer."""

    def __init__(self, layer: nn.Module, wanted: frozenset[str]) -> None:
        self.layer, self.kind = cast(Kind, layer), require_kind("", layer)
        out, width, *_ = self.kind.shape(self.layer)
        weight = self.layer.weight
        new = partial(torch.zeros, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.count = 0
        self.total = new(width)
        self.moment = new(width, width) if "inputs" in wanted else None
        self.gradient = new(out, width) if "gradient" in wanted else None

    @torch.no_grad()
    def see(self, root: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """Take in one call of the layer: a forward hook. Gives the output, tied to `root` so that it gets a gradient."""
        x = (*args, *kwargs.values())[0]
        rows = self.kind.input_rows(self.layer, x.detach()).to(self.total.dtype)
        self.count += len(rows)
        if self.moment is not None:
            self.total += rows.sum(0)
            self.moment.addmm_(rows.T, rows)
        if self.gradient is None:
            return y
        with torch.enable_grad():
            y = y + root.to(y.dtype)
        y.register_hook(partial(self.see_gradient, x.detach()))
        return y

    @torch.no_grad()
    def see_gradient(self, x: Tensor, g: Tensor) -> None:
        """Take in the gradient of one call's output."""
        rows = self.kind.input_rows(self.layer, x).to(self.total.dtype)
        cast(Tensor, self.gradient).addmm_(self.kind.output_rows(self.layer, g).to(self.total.dtype).T, rows)

    def mean(self, path: str, batches: int) -> Statistics:
        """Divide the sums, in place."""
        if not self.count:
            raise UsageError(
                f"{path} was never run on the calibration batches", fix="leave it out with exclude_modules"
            )
        sums = [t for t in (self.moment, self.gradient) if t is not None]
        if not all(bool(t.isfinite().all()) for t in sums):
            raise DivergenceError(
                f"the inputs or gradients of {path} hold NaN or infinity", fix="look at the data, or take float32"
            )
        if self.gradient is not None:
            self.gradient /= batches
        if self.moment is None:
            return Statistics(gradient=self.gradient)
        self.moment /= self.count
        return Statistics(inputs=self.moment, mean=self.total / self.count, gradient=self.gradient)


class Watcher(Protocol):
    """What looks at one layer."""

    def see(self, root: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """Take in one call and give its output, which must depend on `root` where its gradient is wanted."""
        ...


@contextmanager
def watched(model: nn.Module, layers: Mapping[str, nn.Module], watchers: Mapping[str, Watcher]) -> Generator[Tensor]:
    """Hook the layers, switch dropout and the gradients of weights off, and put everything back at the end.

    Gives `root`, a zero: `loss.backward(inputs=[root])` reaches every output that depends on it, and no weight.
    """
    training = [module for module in model.modules() if module.training]
    learning = [p for p in model.parameters() if p.requires_grad]
    device = cast(Kind, next(iter(layers.values()))).weight.device
    root = torch.zeros((), device=device, requires_grad=True)
    hooks = [layers[path].register_forward_hook(partial(w.see, root), with_kwargs=True) for path, w in watchers.items()]
    model.eval()
    for p in learning:
        p.requires_grad_(False)
    try:
        yield root
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
        for p in learning:
            p.requires_grad_(True)


def _groups(layers: Mapping[str, nn.Module], wanted: frozenset[str], at_once: int) -> list[dict[str, nn.Module]]:
    """Divide the layers, in their order, so that the statistics of a group take at most `at_once` bytes (or it is one layer)."""
    groups: list[dict[str, nn.Module]] = []
    room = 0
    for path, layer in layers.items():
        out, width, *_ = require_kind(path, layer).shape(cast(Kind, layer))
        size = 4 * width * (("inputs" in wanted) * width + ("gradient" in wanted) * out)
        if not groups or size > room:
            groups.append({})
            room = at_once
        groups[-1][path] = layer
        room -= size
    return groups
