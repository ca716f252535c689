"""A mixture of trained adapters: their factors become the frozen experts of an X-LoRA (`methods/xlora.py`).

    expert i of a layer:  A_i (r, in) and s_i B_i (out, r), r the largest rank of all; zero beyond its own rank

An expert is any adapter that adds s B A and nothing else: LoRA from any start, LoRA-FA, AdaLoRA, LoRA-XS, and the parts of
fused layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, Base
from ..core.attach import Replacement, adapters, attach, detach, require
from ..core.errors import UsageError
from ..core.statistics import Statistics
from ..core.target import Target
from ..interop.adapter_directory import load
from ..methods.xlora import XLoRA

Experts = tuple[XLoRA, Target, Mapping[str, Statistics]]
"""The method with its numbers, the layers that it adapts, and the factors by layer path."""


def mixture(model: nn.Module, names: Sequence[str], *, softmax: bool = False, name: str = "mixture") -> nn.Module:
    """Attach adapter `name`, which mixes copies of the resident adapters `names` for each token; activate it.

    Only its routers are trainable. The adapters stay as they are and can be detached. Raises UsageError for fewer than
    two names, adapters that are not s B A, and such as train modules in full.
    """
    method, target, statistics = experts(model, names, XLoRA(softmax=softmax))
    return attach(model, method, name=name, statistics=statistics, **vars(target))


def experts_in(model: nn.Module, method: XLoRA) -> Experts:
    """Read the adapters of the directories that `method` names; the model is as before afterwards."""
    names = [f"expert-{i}" for i in range(len(method.adapters))]
    done: list[str] = []
    try:
        for own, directory in zip(names, method.adapters, strict=True):
            load(model, directory, own)
            done.append(own)
        return experts(model, names, method)
    finally:
        for own in done:
            detach(model, own)


@torch.no_grad()
def experts(model: nn.Module, names: Sequence[str], method: XLoRA) -> Experts:
    """Give the resident adapters `names` as the experts of an X-LoRA."""
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UsageError(f"a mixture needs at least two different adapters, not {', '.join(names) or 'none'}")
    own: list[dict[str, tuple[Tensor, Tensor]]] = []
    for name in names:
        require(model, name)
        own.append(dict(_factors(model, name)))
    r = max(len(A) for factors in own for A, _ in factors.values())
    paths = [path for path, _ in model.named_modules() if any(path in factors for factors in own)]
    statistics = {path: Statistics(experts=_stacked([factors.get(path) for factors in own], r)) for path in paths}
    found = replace(method, adapters=(), num_experts=len(names), r=r)
    return found, Target(target_modules=paths), statistics


def _factors(model: nn.Module, name: str) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Give path -> (A, s B) of one adapter's layers."""
    for path, layer, adapter in adapters(model, name):
        if isinstance(adapter, Replacement):
            raise UsageError(
                f"adapter {name!r} cannot be mixed: it trains {path} in full",
                why="of a module that is replaced there is no low-rank change to weigh for each token",
                fix="train it without modules_to_save, or merge it into a base of its own",
            )
        training = adapter.training
        adapter.eval()  # dropout belongs to training: an expert has none
        try:
            factors = _of(adapter, layer)
        finally:
            adapter.train(training)
        if factors is None:
            raise UsageError(
                f"adapter {name!r} cannot be mixed: on {path} its change is not s B A",
                why="experts are pairs of low-rank factors",
                fix="mix LoRAs, or adapters of a method that is one when it is trained",
            )
        yield path, factors


def _of(adapter: AbstractAdapter, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    change = adapter.low_rank(cast(Base, layer))
    if change is None or change.gain is not None:
        return None
    return change.A.detach(), (change.scale * change.B).detach()


def _stacked(factors: Sequence[tuple[Tensor, Tensor] | None], r: int) -> tuple[Tensor, Tensor]:
    """Give A (n, r, in) and B (n, out, r); an expert without factors here is zero."""
    like_A, like_B = next(pair for pair in factors if pair is not None)
    A, B = like_A.new_zeros(len(factors), r, like_A.shape[1]), like_B.new_zeros(len(factors), like_B.shape[0], r)
    for i, pair in enumerate(factors):
        if pair is not None:
            A[i, : len(pair[0])] = pair[0]
            B[i, :, : len(pair[0])] = pair[1]
    return A, B
