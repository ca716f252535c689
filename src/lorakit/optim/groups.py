"""Parameter groups: one learning rate and one weight decay per role of a parameter.

LoRA+ (Hayou, Ghosh, Yu 2024, arXiv:2402.12354): with one common rate the two factors of W' = W + s B A cannot both
learn features at the right speed as the model gets wide; B, which starts at zero, wants `b_ratio` times the rate of A.

A role is declared by the adapter (`AbstractAdapter.ROLES`), never guessed from a name or a number of dimensions. The
authors' code puts everything with one dimension into the fast group, so that DoRA magnitudes, norm weights and a
classifier's bias move 16 times too fast while the classifier's weight stays slow.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..core.adapter import AbstractAdapter, AdditiveAdapter
from ..core.attach import Adapted, adapters
from ..core.errors import UsageError
from ..core.kinds import Kind

ORDER = ("A", "B", "magnitude", "other", "base", "bias", "norm")
DECAYED = frozenset({"A", "B", "other", "base"})
"""Roles that weight decay pulls towards zero. Zero is no neutral value of a magnitude, a bias or a norm weight."""


class OptimSettings(Protocol):
    """The `optim` section of a configuration, as far as this package reads it."""

    @property
    def lr(self) -> float:
        """The rate of A and of every other role but B."""
        ...

    @property
    def b_ratio(self) -> float:
        """The rate of B divided by that of A (LoRA+); 1 is plain training."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay of the roles in `DECAYED`."""
        ...

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates of the running means of the gradient and of its square."""
        ...

    @property
    def eps(self) -> float:
        """What AdamW adds to the root of the second mean."""
        ...

    @property
    def options(self) -> Mapping[str, Any] | None:
        """The optimizer's own settings: those of `Options` in its file, if it has any."""
        ...


@dataclass(frozen=True, eq=False)
class Factors:
    """A factor A (r, in), trained or frozen, and the trained B (out, r) that belongs to it."""

    path: str
    """Of the module that holds both."""
    A: nn.Parameter
    B: nn.Parameter
    scale: Tensor | None
    """s, if the layer's change is s·B·A and nothing else; None if something stands between (a diagonal, a norm)."""


class Groups(list[dict[str, Any]]):
    """Groups for a torch optimizer, and which factors among their parameters belong together."""

    def __init__(self, groups: list[dict[str, Any]], factors: list[Factors]) -> None:
        super().__init__(groups)
        self.factors = factors


class _Member(NamedTuple):
    name: str
    parameter: nn.Parameter
    role: str
    fast: bool


def role(parameter_name: str, adapter: AbstractAdapter) -> str:
    """Give the role that `adapter` declares for its parameter: "A", "B", "magnitude", "bias", "base" or "other"."""
    return adapter.roles()[parameter_name]


def parameter_groups(
    model: nn.Module, adapter_name: str, settings: OptimSettings, *, decayed: Collection[str] = DECAYED
) -> Groups:
    """Give the groups for a torch optimizer: every trainable parameter of `model` in exactly one, in a fixed order.

    The rate is `settings.lr`, times `settings.b_ratio` for the factor that starts at zero. That is B, except in an
    embedding with LoRA: there A starts at zero and B at random (the input is one-hot, so no sum over A's columns blurs
    its gradient), the two exchange their parts, and A is the fast one. A method declares it (`FAST_IN_EMBEDDING`);
    LoRA-FA and VeRA train their B there too. Roles not in `decayed` get no weight decay.
    Each group also holds its `role`, its `param_names` and its `initial_lr`. Raises UsageError if nothing is trainable.
    """
    members = list(_members(model, adapter_name))
    _check(members, model, adapter_name)
    groups = []
    for kind in ORDER:
        for fast in (False, True):
            named = [
                (_saved_name(m.name, adapter_name), m.parameter) for m in members if (m.role, m.fast) == (kind, fast)
            ]
            if named:
                rate = settings.lr * settings.b_ratio if fast else settings.lr
                decay = settings.weight_decay if kind in decayed else 0.0
                groups.append({"params": named, "role": kind, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    return Groups(groups, list(_factors(model, adapter_name)))


def scale_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set every group's rate to `multiplier` times its initial one, so that all roles follow the same schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of the tensors that the optimizer keeps from step to step."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in kept)


def _factors(model: nn.Module, adapter_name: str) -> Iterator[Factors]:
    """Pair each trained B with its A: the two of one module by their declared roles; a frozen A goes by its name."""
    for path, _, adapter in adapters(model, adapter_name):
        if not isinstance(adapter, AbstractAdapter):
            continue
        by_owner: dict[str, dict[str, str]] = {}
        for name, kind in adapter.roles().items():
            owner, _, leaf = name.rpartition(".")
            by_owner.setdefault(owner, {})[leaf] = kind
        for owner, kinds in by_owner.items():
            a = [n for n, kind in kinds.items() if kind == "A"] or [n for n in kinds if n == "lora_A"]
            b = [n for n, kind in kinds.items() if kind == "B"]
            holder = adapter.get_submodule(owner)
            if len(a) == len(b) == 1:
                A, B = holder.get_parameter(a[0]), holder.get_parameter(b[0])
                plain = isinstance(holder, AdditiveAdapter) and len(kinds) == 2
                scale = dict(holder.named_buffers(recurse=False)).get("scale") if plain else None
                if A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]:
                    yield Factors(f"{path}.adapters.{adapter_name}.{owner}".rstrip("."), A, B, scale)


def _members(model: nn.Module, adapter_name: str) -> Iterator[_Member]:
    """Name each trainable parameter once (a shared one under the name it is first met by) with its role."""
    declared: dict[int, tuple[str, bool]] = {}  # id of the parameter -> (role, fast)
    for _, layer, adapter in adapters(model, adapter_name):
        if isinstance(layer, Kind) and isinstance(adapter, AbstractAdapter):
            one_hot = layer.shape().one_hot
            for name, parameter in adapter.named_parameters():
                kind, owner = role(name, adapter), adapter.get_submodule(name.rpartition(".")[0])
                fast = owner.FAST_IN_EMBEDDING if one_hot and isinstance(owner, AbstractAdapter) else "B"
                declared.setdefault(id(parameter), (kind, kind == fast))
    for module in model.modules():  # what is left is trained in full
        for leaf, parameter in module.named_parameters(recurse=False):
            declared.setdefault(id(parameter), (_full_role(module, leaf), False))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, fast = declared[id(parameter)]
            yield _Member(name, parameter, kind, fast)


def _saved_name(name: str, adapter_name: str) -> str:
    """Name a parameter as checkpoints do, whatever its adapter is called on this model."""
    return name.replace(f".adapters.{adapter_name}.", ".adapters.default.")


def _check(members: list[_Member], model: nn.Module, adapter_name: str) -> None:
    fix = f"make exactly the adapter you train trainable: lk.trainable(model, {adapter_name!r})"
    if not members:
        raise UsageError("there is nothing to train: no parameter of the model requires a gradient", fix=fix)
    others = {
        f"{path}.adapters.{name}."
        for path, layer in model.named_modules()
        if isinstance(layer, Adapted)
        for name in layer.adapters
        if name != adapter_name
    }
    foreign = [m.name for m in members if any(m.name.startswith(prefix) for prefix in others)]
    if foreign:
        raise UsageError(f"{foreign[0]} is trainable, but the adapter to train is {adapter_name!r}", fix=fix)
    unknown = sorted({m.role for m in members} - set(ORDER))
    if unknown:
        raise UsageError(f"unknown parameter role {unknown[0]!r}", fix=f"a method may declare: {', '.join(ORDER)}")


def _full_role(module: nn.Module, leaf: str) -> str:
    """Give the role of a parameter trained in full, outside any adapter."""
    if leaf == "bias":
        return "bias"
    return "norm" if "Norm" in type(module).__name__ else "base"
