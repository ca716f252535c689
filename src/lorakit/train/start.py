"""Put the adapter of a run on its base: measured on the data, ranked and started, or as a checkpoint holds it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from ..combine.mixture import experts_in
from ..core.adapter import Method, Ranked
from ..core.attach import adapters, attach, place, places, trainable, use
from ..core.calibrate import Calibration, calibrate
from ..core.registry import INITS
from ..core.start import needs
from ..core.statistics import Statistics
from ..core.target import Target
from ..data.dataset import Example
from ..methods.xlora import XLoRA
from .steps import Steps
from .task import LanguageModelling, Task

CALIBRATION_ROWS = 256
"""Rows of the training data, the first ones in the order of training, on which inits measure the layers."""

Rows = Sequence[Example]


def measures(method: Method) -> bool:
    """Whether the start of this method's adapters looks at data."""
    return bool(needs(method) & {"inputs", "gradient"})


def with_experts(
    model: nn.Module, method: Method, target: Target
) -> tuple[Method, Target, Mapping[str, Statistics] | None]:
    """Read the trained adapters that a mixture names: the method with their numbers, their layers, their factors by layer."""
    if not (isinstance(method, XLoRA) and method.adapters):
        return method, target, None
    found, layers, experts = experts_in(model, method)
    return found, replace(target, target_modules=layers.target_modules), experts


def measure(model: nn.Module, method: Method, target: Target, task: Task, batches: Sequence[Rows]) -> Calibration:
    """Give what the method needs to know of its layers, measured on batches of rows with the loss of the task."""

    def loss(model: nn.Module, rows: Rows) -> Tensor:
        return task.loss(model, rows)[0] / sum(task.weight(row) for row in rows)

    return calibrate(model, method, batches, loss, **vars(target))


def calibration_batches(task: Task, examples: Rows, steps: Steps) -> list[Rows]:
    """Give the first micro-batches of training, until they hold enough rows. Where rows would be padded, each stands alone."""
    chosen: list[list[Example]] = []
    for step in range(steps.total):
        chosen += [[examples[i] for i in batch] for batch in steps[step].batches]
        if sum(map(len, chosen)) >= CALIBRATION_ROWS:
            break
    if isinstance(task, LanguageModelling) and task.packed:
        return list(chosen)
    return [[row] for batch in chosen for row in batch]  # padding has inputs and gradients that mean nothing


def start(
    model: nn.Module, method: Method, target: Target, name: str, statistics: Mapping[str, Statistics]
) -> nn.Module:
    """Attach adapter `name`, with the ranks that the method's init gives the layers if it has an opinion on them (EVA)."""
    init = _init(method)
    if "ranks" in init:
        sites = _ranked(model, method, target)
        own = {site: ranked.r for site, (_, ranked) in sites.items()}
        measured = {site: statistics[path] for site, (path, _) in sites.items() if path in statistics}
        target = with_ranks(sites, target, own | init["ranks"](measured, own))
    return attach(model, method, name=name, statistics=statistics, **vars(target))


def restart(
    model: nn.Module, method: Method, target: Target, name: str, tensors: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """Attach adapter `name` in the shape of a checkpoint's tensors, which are yet to be copied. Nothing is measured again."""
    if not needs(method):
        return attach(model, method, name=name, **vars(target))
    if "ranks" in _init(method):
        sites = _ranked(model, method, target)
        target = with_ranks(sites, target, _ranks_in(tensors))
    place(model, method, target, name)
    for _, _, adapter in adapters(model, name):
        for parameter in adapter.parameters():
            parameter.detach().zero_()  # not what was in memory: the model may be run before the tensors are copied
    return trainable(use(model, name), name)


def _init(method: Method) -> Mapping[str, Any]:
    """Give what the file of the method's init declares; nothing if it has no init."""
    own = vars(method)
    return vars(INITS.module(own["init"])) if "init" in own else {}


def with_ranks(sites: Mapping[str, tuple[str, Ranked]], target: Target, ranks: Mapping[str, int]) -> Target:
    """Give `target` with these ranks, alpha scaled so that s stays, and without the layers of rank 0."""
    kept = sorted(
        (site for site, r in ranks.items() if r), key=len, reverse=True
    )  # a pattern is a suffix: longest first
    alphas = {site: _alpha(sites[site][1], ranks[site]) for site in kept}
    return replace(
        target,
        target_modules=kept,
        exclude_modules=None,
        layers=None,
        last_n_layers=None,
        rank_pattern={site: ranks[site] for site in kept},
        alpha_pattern={site: alpha for site, alpha in alphas.items() if alpha is not None} or None,
    )


def _alpha(method: Ranked, r: int) -> float | None:
    """Give the alpha that keeps the scale at another rank; None stays None, which follows the rank by itself."""
    if method.alpha is None:
        return None
    stabilized = vars(method).get("rank_stabilized", False)
    return method.alpha * (r / method.r) ** (0.5 if stabilized else 1.0)


def _ranked(model: nn.Module, method: Method, target: Target) -> dict[str, tuple[str, Ranked]]:
    """Give site -> (layer path, its method) of the layers and parts that `target` names."""
    spots = places(model, method, target)
    return {
        s.name: (spot.path, cast(Ranked, m)) for spot in spots for s, m in zip(spot.sites, spot.methods, strict=True)
    }


def _ranks_in(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Read the ranks off a checkpoint's adapter: `<layer path>/[parts.<part>.]lora_A` is (r, in), of several experts (n, r, in)."""
    found: dict[str, int] = {}
    for key, tensor in tensors:
        path, _, own = key.partition("/")
        *parts, leaf = own.split(".")
        if leaf == "lora_A":
            found[".".join([path, *parts[1:2]])] = tensor.shape[-2]
    return found
