"""Chains of adapters in time: what was trained so far is put aside, and training goes on with fresh factors.

    W' = W + s (B A + B_1 A_1 + ... + B_n A_n)      A, B: trained now      A_i, B_i: frozen links (`core/chain.py`)

The papers of ReLoRA, PLoRA and CoLA add what was trained to the base weight. Here it stays beside it as frozen
factors, which is the same function without a rounding: the base may be bf16 or 4-bit, nothing is lost when thousands
of small updates go into it, and the result is one ordinary LoRA of the ranks' sum. The price is the work of that rank
until it is merged.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast, final

import torch
from torch import Tensor, nn

from ...core.adapter import AbstractAdapter, AdditiveAdapter, Base, Method, Ranked, Shape, Sharing
from ...core.attach import adapters
from ...core.chain import Chain
from ...core.errors import UsageError
from ...core.fused import Parts
from ...core.registry import INITS, METHODS
from ...interop.peft_config import peft_format
from . import Run


def refuses(method: Method) -> str | None:
    """Say why what `method` has trained cannot be put aside and continued with fresh factors; None if it can."""
    if isinstance(method, Sharing):
        return "its layers share their factors"
    if not {"r", "alpha"} <= vars(method).keys():
        return "what it adds is not one product scale * lora_B lora_A"
    try:
        adapter = cast(Method, cast(Ranked, method).at(1, vars(method)["alpha"])).build(
            Shape(16, 16)
        )  # its form, not its size
    except UsageError as error:  # a method that refuses so small a layer has no product of two plain factors
        return error.what
    live = adapter.live if isinstance(adapter, Chain) else adapter
    if not isinstance(live, AdditiveAdapter):
        return "what it does to a weight is not adding something, so what was trained before cannot be added beside it"
    if set(live.state_dict()) != {"lora_A", "lora_B"} or "scale" not in dict(live.named_buffers()):
        return "what it adds is not one product scale * lora_B lora_A"
    for factor in live.parameters():
        nn.init.normal_(factor, generator=torch.Generator().manual_seed(0))
    A, B = live.get_parameter("lora_A"), live.get_parameter("lora_B")
    if not torch.allclose(live.delta_weight(), cast(Tensor, live.scale) * B @ A, rtol=1e-4, atol=1e-5):
        return "what it adds is not the product scale * lora_B lora_A"
    if peft_format(method) is None:
        return "PEFT has no form for it in which the links could be saved as one adapter"
    start = vars(INITS.module(vars(method)["init"])) if "init" in vars(method) else {}
    if start.get("FROM_BASE") or start.get("NEEDS"):
        return "its init starts from the weight or from data, which are the same at every restart; take init: kaiming"
    return None


@final
class Links:
    """The adapters of a run, each as a chain: the live factors keep their identity, names and optimizer."""

    def __init__(self, run: Run) -> None:
        """Put a chain around each adapter. Raises UsageError with the reason if the method does not allow it."""
        self.seed = run.seed
        self.layers: list[tuple[Base, AbstractAdapter]] = []
        self.chains: list[Chain] = []
        for path, layer, adapter in list(adapters(run.model, run.adapter)):
            if isinstance(adapter, AbstractAdapter):
                reason = refuses(adapter.config)
                if reason is not None:
                    name = METHODS.name_of(type(adapter.config))
                    raise UsageError(f"method {name} cannot be trained in links", why=reason, where=path)
                layer.adapters[run.adapter] = chained = _chained(adapter)
                self.layers.append((cast(Base, layer), chained))
                self.chains += _chains(chained)
        self.ranks = [len(chain.factors()[0]) for chain in self.chains]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the live factors."""
        for chain in self.chains:
            yield from cast(tuple[nn.Parameter, nn.Parameter], chain.factors())

    def freeze(self, share: float = 1.0) -> None:
        """Put `share` of each live product aside. The live factors stay as they are."""
        for chain in self.chains:
            chain.freeze(share)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply both live factors by `factor`, their product by its square."""
        for parameter in self.parameters():
            parameter.mul_(factor)

    def restart(self, number: int) -> None:
        """Start the live factors anew: A from (seed, number) alone, B zero (in an embedding the other way round)."""
        cuda = [d for d in {p.device for p in self.parameters()} if d.type == "cuda"]
        with torch.random.fork_rng(cuda):
            torch.manual_seed((self.seed * 0x9E3779B97F4A7C15 + number * 0xD6E8FEB86659FD93) % 2**63)
            for layer, adapter in self.layers:
                adapter.start(layer)

    def resize(self, share: float) -> None:
        """Give the live factors this share of the rank they had in the first link, at least 1, with undefined values.

        The parameters stay the same objects, for an optimizer holds them; the scale stays that of the first link.
        """
        for chain, rank in zip(self.chains, self.ranks, strict=True):
            _live_rank(chain, max(1, round(rank * share)))

    def state(self) -> dict[str, Any]:
        """Give the ranks of the live and of the frozen factors, as JSON."""
        return {"ranks": [[len(chain.factors()[0]), len(chain.frozen_A)] for chain in self.chains]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Give the factors the shapes they had; their values come with the adapter's."""
        for chain, (live, frozen) in zip(self.chains, saved["ranks"], strict=True):
            _live_rank(chain, live)
            A, B = chain.factors()
            chain.frozen_A = nn.Parameter(A.detach().new_empty(frozen, A.shape[1]), requires_grad=False)
            chain.frozen_B = nn.Parameter(B.detach().new_empty(B.shape[0], frozen), requires_grad=False)


class Unload(Protocol):
    """What happens between two stages, beside the optimizer's and the schedule's new start."""

    def __call__(self, number: int) -> None:
        """Act before the stage `number`, counted from 1."""
        ...


@final
class Stages:
    """A controller that cuts the run into equal stages, each with the whole schedule and a new optimizer state."""

    def __init__(self, run: Run, count: int, links: Links, unload: Unload) -> None:
        if not 1 <= count <= run.total:
            raise UsageError(f"{run.total} steps cannot be cut into {count} stages", fix="train longer, or take fewer")
        self.run, self.links, self.unload = run, links, unload
        self.starts = [i * run.total // count for i in range(count + 1)]

    def schedule(self, step: int) -> float:
        """Give the multiplier of the stage's own schedule."""
        begin = max(s for s in self.starts[:-1] if s <= step)
        end = min(s for s in self.starts[1:] if s > begin)
        return squeezed(self.run, end - begin)(step - begin)

    def penalty(self) -> None:
        """Add nothing."""

    def after_update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Between two stages put aside what was trained, and forget what the optimizer knows."""
        if step + 1 in self.starts[1:-1]:
            self.unload(self.starts.index(step + 1))
            optimizer.state.clear()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the ranks; which stage it is follows from the step."""
        return {}, self.links.state()

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Give the factors their shapes."""
        self.links.restore(scalars)


def squeezed(run: Run, steps: int) -> Callable[[float], float]:
    """Give the run's schedule over `steps` steps instead of all: warm-up and shape in the same proportion."""
    if steps == run.total:
        return run.schedule
    warm = min(math.ceil(round(run.warmup * steps / run.total, 9)), steps)

    def multiplier(step: float) -> float:
        if step < warm:
            return (step + 1) / warm
        return run.schedule(run.warmup + (step - warm) * (run.total - run.warmup) / max(steps - warm, 1))

    return multiplier


def _chained(adapter: AbstractAdapter) -> AbstractAdapter:
    if isinstance(adapter, Parts):
        for name, part in list(adapter.parts.items()):
            adapter.parts[name] = _chained(cast(AbstractAdapter, part))
        return adapter
    return adapter if isinstance(adapter, Chain) else Chain(cast(AdditiveAdapter, adapter))


def _chains(adapter: AbstractAdapter) -> list[Chain]:
    return [module for module in adapter.modules() if isinstance(module, Chain)]


def _live_rank(chain: Chain, rank: int) -> None:
    A, B = chain.factors()
    if len(A) != rank:
        A.grad = B.grad = None  # of the old shape
        A.data, B.data = A.data.new_empty(rank, A.shape[1]), B.data.new_empty(B.shape[0], rank)
