"""`lk.bank`: resident adapters in one bank, so that every row of a batch can have its own; loading and replacing while it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import nn

from ..core.attach import Adapted, active, adapters, check_name, detach, names, require, use
from ..core.bank import BankAdapter, Route
from ..core.errors import UsageError
from ..core.kinds import ConvKind, Kind
from ..core.low_rank import low_rank_at_rest
from ..interop.adapter_directory import load
from ..kernels.low_rank import LowRank

Changes = dict[str, LowRank]  # by layer path


class Bank:
    """The adapters of a model that its batches choose from; made by `bank`.

    `route` says before a forward pass which row uses which. `put` and `load` copy an adapter into its slot, in place.
    """

    def __init__(self, model: nn.Module, name: str, route: Route) -> None:
        self.model, self.name, self._route = model, name, route

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters in the bank."""
        return list(self._route.numbers)

    def route(self, adapters: str | Sequence[str | None] | None, *, lengths: Sequence[int] | None = None) -> "Bank":
        """Say which adapter each row of the next batches uses, None being the base; one name is for all rows.

        lengths: of the documents, where they are packed into one row; then `adapters` are those of the documents.
        Raises UsageError for a name that is not in the bank.
        """
        self._route.set([adapters] if adapters is None or isinstance(adapters, str) else list(adapters), lengths)
        return self

    def put(self, adapter: str, into: str | None = None) -> "Bank":
        """Copy resident adapter `adapter` into the slot `into` (its own name if absent): one that is there, or a free one.

        The resident one is no longer needed then (`lk.detach`). Raises UsageError for an adapter of another form, on
        layers that the bank does not have or of a higher rank than it has room for; the bank is then unchanged.
        """
        changes = _changes(self.model, adapter)
        layers = dict(self._layers())
        missing = sorted(changes.keys() - layers.keys())
        if missing:
            raise UsageError(
                f"adapter {adapter!r} is on layers that the bank does not have: {', '.join(missing[:5])}",
                fix=f"make the bank anew, with {adapter!r} among its adapters",
            )
        high = [f"{path} {len(c.A)}" for path, c in changes.items() if len(c.A) > layers[path].A.shape[1]]
        if high:
            raise UsageError(
                f"adapter {adapter!r} has higher ranks than the bank has room for: {', '.join(high[:5])}",
                fix="make the bank with rank=...",
            )
        slot = self._slot(into or adapter)
        for path, layer in layers.items():
            layer.put(slot, changes.get(path))
        return self

    def load(self, directory: str | Path, into: str) -> "Bank":
        """Read an adapter directory into the slot `into`: one that is there, or a free one.

        Raises FileError for files that do not fit the model, and what `put` raises; the bank is then unchanged.
        """
        before, have = active(self.model), names(self.model)
        resident = next(name for i in range(len(have) + 1) if (name := f"loading-{i}") not in have)
        try:
            load(self.model, directory, resident)
            return self.put(resident, into)
        finally:
            if resident in names(self.model):
                detach(self.model, resident)
            use(self.model, before)

    def drop(self, adapter: str) -> "Bank":
        """Free the slot of an adapter. Rows that are still routed to it are the base's."""
        if adapter not in self._route.numbers:
            raise UsageError(
                f"no adapter {adapter!r} in the bank", fix=f"there are: {', '.join(self.adapters) or 'none'}"
            )
        slot = self._route.numbers.pop(adapter)
        for _, layer in self._layers():
            layer.put(slot, None)
        return self

    def _layers(self) -> list[tuple[str, BankAdapter]]:
        return [(path, cast(BankAdapter, adapter)) for path, _, adapter in adapters(self.model, self.name)]

    def _slot(self, name: str) -> int:
        """Give the slot of this name, a free one if it has none yet."""
        numbers = self._route.numbers
        if name not in numbers:
            room = len(self._layers()[0][1].A) - 1
            free = set(range(1, room + 1)) - set(numbers.values())
            if not free:
                raise UsageError(
                    f"all {room} slots of the bank are in use", fix="drop one, or make the bank with slots=..."
                )
            numbers[name] = min(free)
        return numbers[name]


def bank(
    model: nn.Module, members: Sequence[str], *, slots: int | None = None, rank: int | None = None, name: str = "bank"
) -> Bank:
    """Put resident adapters into a bank on their layers and activate it; every row is the base until it is routed.

    slots: room for adapters, as many as there are if absent. rank: room for ranks, the highest there is if absent. The
    bank is an adapter `name` on the model (`lk.use`, `lk.disabled`, `lk.detach`); the members are copied and may go.
    Raises UsageError for adapters whose change is not s B A, and on convolutions.
    """
    check_name(model, name)
    if not members or len(set(members)) < len(members):
        raise UsageError("a bank needs adapters, each named once", fix=f"resident: {', '.join(names(model)) or 'none'}")
    room = len(members) if slots is None else slots
    if room < len(members):
        raise UsageError(f"{len(members)} adapters do not fit into {room} slots", fix=f"slots={len(members)} or more")
    changes = {member: _changes(model, member) for member in members}
    route, layers = Route({}), _places(model, members)
    for path, layer in layers.items():
        r = max([rank or 1, *(len(own[path].A) for own in changes.values() if path in own)])
        shape, weight = cast(Kind, layer).shape(), cast(Kind, layer).weight
        made = BankAdapter(route, room, r, weight, width=shape.in_features, out=shape.out_features)
        layer.adapters[name] = made.train(layer.training)
    route.to(next(iter(changes[members[0]].values())).A.device)
    found = Bank(model, name, route)
    for member in members:
        found.put(member)
    use(model, name)
    return found


def _changes(model: nn.Module, name: str) -> Changes:
    """Give the changes of an adapter by layer. Raises UsageError if one has another form."""
    require(model, name)
    return {path: low_rank_at_rest(adapter, layer, name, path) for path, layer, adapter in adapters(model, name)}


def _places(model: nn.Module, members: Sequence[str]) -> dict[str, Adapted]:
    """Give path -> layer of all layers that any of the adapters is on."""
    found = {path: layer for member in members for path, layer, _ in adapters(model, member)}
    convolutions = [path for path, layer in found.items() if isinstance(layer, ConvKind)]
    if convolutions:
        raise UsageError(
            f"a bank cannot be on convolutions: {', '.join(convolutions[:5])}",
            why="every row would be convolved with a kernel of its own",
            fix="merge these adapters, or leave the convolutions out (exclude_modules)",
        )
    return found
