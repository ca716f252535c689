"""Several adapters in one batch: stacked factors, and for each row of the batch the number of the slot that it uses.

    y[b] = x[b] W^T + (x[b] A[k]^T) B[k],  k = slots[b]      A: (slots, r, in)   B: (slots, r, out), s B transposed

Slot 0 is zero: the base. A lower rank than r is filled up with zeros, which changes nothing. Which row uses which slot is
one tensor that all layers share, written before the forward pass, and what a slot holds is copied in place: so neither another
routing nor another adapter compiles anything anew.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NoReturn, cast, final

import torch
from torch import Tensor, nn

from ..kernels.low_rank import LowRank
from .adapter import AbstractAdapter, Base
from .attach import adapted
from .errors import UsageError
from .low_rank import delta
from .statistics import Statistics

BASE = 0
"""The slot of no adapter."""


@final
class Route(nn.Module):
    """Which rows use which slot; shared by all layers of a bank.

    A row of a batch, or, of documents packed into one row (`lengths`), a run of tokens.
    """

    slots: Tensor

    def __init__(self, numbers: dict[str, int]) -> None:
        super().__init__()
        self.numbers = numbers
        """Adapter -> slot."""
        self.register_buffer("slots", torch.tensor([BASE]), persistent=False)
        self.runs: tuple[tuple[int, int], ...] | None = None
        """(slot, tokens) of each document of a packed row."""

    def set(self, chosen: Sequence[str | None], lengths: Sequence[int] | None) -> None:
        """Take the adapter of each row, or of each document of these lengths; one alone is for all rows."""
        unknown = sorted({name for name in chosen if name is not None and name not in self.numbers})
        if unknown or not chosen:
            raise UsageError(
                f"no adapter {', '.join(map(repr, unknown))} in the bank" if unknown else "there are no rows to route",
                fix=f"there are: {', '.join(self.numbers) or 'none'}, and None for the base",
            )
        if lengths is not None and len(lengths) != len(chosen):
            raise UsageError(f"{len(chosen)} adapters for {len(lengths)} documents", fix="give one for each document")
        numbers = [BASE if name is None else self.numbers[name] for name in chosen]
        self._write(torch.tensor(numbers), None if lengths is None else tuple(zip(numbers, lengths, strict=True)))

    @contextmanager
    def during(self, chosen: Sequence[str | None]) -> Generator[None]:
        """Route the rows so inside the block, and afterwards as before."""
        slots, runs = self.slots.clone(), self.runs
        self.set(chosen, None)
        try:
            yield
        finally:
            self._write(slots, runs)

    def _write(self, slots: Tensor, runs: tuple[tuple[int, int], ...] | None) -> None:
        self.runs = runs
        if slots.shape == self.slots.shape:
            self.slots.copy_(slots)  # at its place, which a CUDA graph remembers
        else:
            self.slots = slots.to(self.slots.device)


@final
class BankAdapter(AbstractAdapter):
    """The slots of one layer."""

    MERGEABLE: ClassVar[bool] = False
    ROLES: ClassVar = {}
    A: Tensor
    B: Tensor

    def __init__(self, route: Route, slots: int, r: int, weight: Tensor, *, width: int, out: int) -> None:
        """`slots`: how many adapters there is room for, beside the base; `weight`: of the layer."""
        super().__init__()
        self.config, self.route = None, route
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        for name, shape in (("A", (slots + 1, r, width)), ("B", (slots + 1, r, out))):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=weight.device), persistent=False)

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Do nothing: every slot starts as the base."""

    @torch.no_grad()
    def put(self, slot: int, change: LowRank | None) -> None:
        """Let a slot hold a change of at most this rank, or none."""
        self.A[slot].zero_()
        self.B[slot].zero_()
        if change is not None:
            r = len(change.A)
            self.A[slot, :r].copy_(change.A)
            self.B[slot, :r].copy_((change.scale * change.B).T)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer once, and add to each row what its slot holds."""
        y, slots = base.frozen(x), self.route.slots
        if self.route.runs is not None:
            return y + self._by_document(x, base).to(y.dtype)
        rows = len(slots)
        if rows not in (1, x.shape[0]):
            _refuse_rows(x.shape[0], rows)
        if base.VECTORS:
            A = self.A.index_select(0, slots).to(x.dtype)  # five times as fast as A[slots]
            h = torch.bmm(x.reshape(rows, -1, x.shape[-1]), A.mT)
        else:
            h = self.A[slots[:, None], :, x.reshape(rows, -1)]  # (rows, T, r)
        B = self.B.index_select(0, slots).to(y.dtype)
        return torch.baddbmm(y.reshape(rows, -1, y.shape[-1]), h.to(y.dtype), B).view(y.shape)

    def _by_document(self, x: Tensor, base: Base) -> Tensor:
        """Give what is added to the documents of one packed row, one after the other."""
        runs = cast(tuple[tuple[int, int], ...], self.route.runs)
        tokens = sum(count for _, count in runs)
        if x.shape[:2] != (1, tokens):
            raise UsageError(
                f"a layer sees {tuple(x.shape[:2])} tokens, and the documents of the bank's routing have {tokens} in one row",
                fix="route the documents of this batch: bank.route(adapters, lengths=...)",
            )
        one = self.B.new_ones(())
        parts = x.split([count for _, count in runs], dim=1)
        changes = [LowRank(self.A[slot], self.B[slot].T, one) for slot, _ in runs]
        return torch.cat([delta(part, change, base) for part, change in zip(parts, changes, strict=True)], dim=1)

    def merge(self, weight: Tensor) -> Tensor:
        """Refuse: a bank is not one matrix."""
        raise UsageError(*_SEVERAL, fix="merge one of its adapters: lk.load it, then lk.merge")

    def compact(self) -> AbstractAdapter:
        """Refuse to be saved."""
        raise UsageError(*_SEVERAL, fix="save its adapters, each by its own name")


_SEVERAL = ("a bank is several adapters, not one",)


def _refuse_rows(rows: int, routed: int) -> NoReturn:
    raise UsageError(
        f"a layer sees {rows} rows, and {routed} are routed",
        fix="route the rows of this batch (bank.route), one adapter for each or one for all; "
        "layers that see other rows than the model (experts) need exclude_modules",
    )


def route_of(model: nn.Module) -> Route:
    """Give the routing of the active bank. Raises UsageError if there is none."""
    for _, layer in adapted(model):
        active = layer.adapters[layer.active] if layer.active is not None else None
        if isinstance(active, BankAdapter):
            return active.route
    raise UsageError("no bank is active on this model", fix="bank = lk.bank(model, [names of adapters])")
