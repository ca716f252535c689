"""Fused projections: one weight that holds several (q, k and v; gate and up). Any subset can be adapted, each with its own factors.

A fused layer at `h.0.attn.c_attn` is targeted as if its parts were layers: `c_attn.q`, `c_attn.v` (loralib's `enable_lora`).
Which rows of the matrix are which part is known for the common names, and can be given as sizes: `fused={"my_qkv": {"q": 64, ...}}`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast, final, runtime_checkable

import torch
from torch import Tensor, nn

from ..kernels.low_rank import LowRank
from .adapter import AbstractAdapter, Base
from .errors import UsageError
from .pattern import is_suffix
from .statistics import Statistics

Declared = Mapping[str, int | Sequence[Sequence[int]]]
"""Parts of a fused layer as a user gives them: sizes, or ranges of rows."""


class Config(Protocol):
    """A transformers configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Give every field, `model_type` among them."""
        ...


@runtime_checkable
class Configured(Protocol):
    """A transformers model: what it is and the number of its heads are in `config`."""

    config: Config


def _equal(*names: str) -> Callable[[int, Mapping], dict[str, Tensor]]:
    def split(out: int, config: Mapping) -> dict[str, Tensor]:
        return dict(zip(names, torch.arange(out).chunk(len(names)), strict=True))

    return split


def _heads(out: int, config: Mapping) -> dict[str, Tensor]:
    heads, kv = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    size = out // (heads + 2 * kv)
    return contiguous({"q": heads * size, "k": kv * size, "v": kv * size}, out)


def _interleaved(out: int, config: Mapping) -> dict[str, Tensor]:
    heads = config.get("num_attention_heads") or config["n_head"]
    rows = torch.arange(out).reshape(heads, 3, -1)
    return {name: rows[:, i].flatten() for i, name in enumerate("qkv")}


LAYOUTS: Mapping[tuple[str, str | None], Callable[[int, Mapping], dict[str, Tensor]]] = {
    ("c_attn", "gpt2"): _equal("q", "k", "v"),
    ("qkv_proj", None): _heads,  # Phi-3
    ("gate_up_proj", None): _equal("gate", "up"),
    ("Wqkv", "modernbert"): _equal("q", "k", "v"),
    ("query_key_value", "gpt_neox"): _interleaved,
    ("query_key_value", "bloom"): _interleaved,
}


def contiguous(sizes: Mapping[str, int], out: int) -> dict[str, Tensor]:
    """Give the rows of parts that stand one after the other. Raises UsageError if the sizes do not add up to `out`."""
    if sum(sizes.values()) != out:
        raise UsageError(
            f"fused sizes {list(sizes.values())[:10]} add up to {sum(sizes.values())}, the layer has {out} outputs"
        )
    return dict(zip(sizes, torch.arange(out).split(list(sizes.values())), strict=True))


def ranges(rows: Tensor) -> list[list[int]]:
    """Give ascending rows as [start, stop) pairs."""
    breaks = torch.nonzero(rows.diff() != 1).flatten().tolist()
    starts, stops = [0, *[b + 1 for b in breaks]], [*[b + 1 for b in breaks], len(rows)]
    return [[int(rows[a]), int(rows[b - 1]) + 1] for a, b in zip(starts, stops, strict=True)]


def declared_rows(given: Declared, out: int) -> dict[str, Tensor]:
    """Give the rows of declared parts: sizes of parts one after the other, or [start, stop) ranges of rows."""
    sizes = {name: size for name, size in given.items() if isinstance(size, int)}
    if len(sizes) == len(given):
        return contiguous(sizes, out)
    spans = {name: own for name, own in given.items() if not isinstance(own, int)}
    every = [span for own in spans.values() for span in own]
    inside = all(own for own in spans.values()) and all(0 <= a < b <= out for a, b in every)
    if len(spans) < len(given) or not inside or sum(b - a for a, b in every) > out:
        names = ", ".join(map(repr, list(given)[:10]))
        raise UsageError(
            f"the fused parts {names} are no rows of a layer with {out} outputs",
            fix="give [start, stop) ranges of its rows",
        )
    return {name: torch.cat([torch.arange(a, b) for a, b in own]) for name, own in spans.items()}


def parts(model: nn.Module, path: str, out: int, declared: Mapping[str, Declared] | None) -> dict[str, Tensor]:
    """Give part name -> rows (long tensor) of the fused layer at `path`; {} where it is not known to be fused."""
    leaf = path.rpartition(".")[2]
    for name, given in (declared or {}).items():
        if is_suffix(name, path):
            return declared_rows(given, out)
    if leaf not in {name for name, _ in LAYOUTS}:
        return {}
    config = model.config.to_dict() if isinstance(model, Configured) else {}
    layout = LAYOUTS.get((leaf, config.get("model_type"))) or LAYOUTS.get((leaf, None))
    if layout is None or "crossattention" in path:  # GPT-2's cross attention holds only k and v there
        return {}
    try:
        return layout(out, config)
    except (KeyError, RuntimeError, UsageError):  # a model that uses the name for something else
        return {}


@final
class Parts(AbstractAdapter):
    """One adapter per part of a fused layer; the rows of the other parts stay as they are."""

    ROLES: ClassVar[Mapping[str, str]] = {}

    def __init__(self, adapters: dict[str, AbstractAdapter], rows: dict[str, Tensor], out_features: int) -> None:
        super().__init__()
        self.parts, self.out_features = nn.ModuleDict(adapters), out_features
        self.config = next(iter(adapters.values())).config
        for name in adapters:
            self.register_buffer(f"rows_{name}", rows[name], persistent=False)

    def each(self) -> Iterator[tuple[str, AbstractAdapter]]:
        """Yield (part, its adapter)."""
        return ((name, cast(AbstractAdapter, part)) for name, part in self.parts.items())

    def rows(self, name: str) -> Tensor:
        """Give the rows (out_part,) of the fused matrix that part `name` is."""
        return self.get_buffer(f"rows_{name}")

    def start(self, base: Base, statistics: Statistics | None = None) -> None:
        """Start each part."""
        for name, part in self.each():
            own = None if statistics is None else statistics.rows(self.rows(name))
            part.start(_Rows(base, self.rows(name)), own)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Run the layer once and replace the outputs of the adapted parts."""
        frozen = base.frozen(x)
        y = frozen
        for name, part in self.each():
            rows = self.rows(name)
            y = y.index_copy(-1, rows, part(x, _Rows(base, rows, (x, frozen))).to(y.dtype))
        return y

    def merge(self, weight: Tensor) -> Tensor:
        """Merge each part's rows."""
        merged = weight.clone()
        for name, part in self.each():
            merged[self.rows(name)] = part.merge(weight[self.rows(name)])
        return merged

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """Merge each part's entries."""
        if bias is None:
            return None
        merged = bias.clone()
        for name, part in self.each():
            merged[self.rows(name)] = cast(Tensor, part.merge_bias(bias[self.rows(name)]))
        return merged

    def mergeable(self) -> bool:
        """Whether every part is."""
        return all(part.mergeable() for _, part in self.each())

    def low_rank(self, base: Base) -> LowRank | None:
        """Give one pair of factors, A stacked and s·B block by block, if every part has one and nothing is dropped."""
        pairs = [(self.rows(name), part.low_rank(_Rows(base, self.rows(name)))) for name, part in self.each()]
        own = [(rows, c) for rows, c in pairs if c is not None and c.gain is None and not c.dropout]
        if len(own) < len(pairs):
            return None
        columns = [c.B.new_zeros(self.out_features, c.B.shape[1]).index_copy(0, rows, c.scale * c.B) for rows, c in own]
        A = torch.cat([c.A for _, c in own])
        return LowRank(A, torch.cat(columns, dim=1), A.new_ones(()))

    def compact(self) -> "Parts":
        """Give the compact parts."""
        parts = {name: part.compact() for name, part in self.each()}
        return Parts(parts, {name: self.rows(name) for name in parts}, self.out_features)

    def shared_tensors(self) -> dict[str, Tensor]:
        """Give what the parts share."""
        return {name: t for _, part in self.each() for name, t in part.shared_tensors().items()}

    def roles(self) -> dict[str, str]:
        """Give the parts' roles."""
        return {f"parts.{name}.{key}": role for name, part in self.each() for key, role in part.roles().items()}


class _Rows:
    """Some rows of a fused layer, seen as a layer of their own (`Base`); `known` is an input with the whole layer's output."""

    def __init__(self, base: Base, rows: Tensor, known: tuple[Tensor, Tensor] | None = None) -> None:
        self.base, self._rows, self._known, self.VECTORS = base, rows, known, base.VECTORS

    def frozen(self, x: Tensor) -> Tensor:
        known = self._known
        out = known[1] if known is not None and x is known[0] else self.base.frozen(x)
        return out.index_select(-1, self._rows)

    def linear(self, x: Tensor) -> Tensor:
        return self.base.linear(x).index_select(-1, self._rows)

    def plus_bias(self, y: Tensor) -> Tensor:
        return self.base.plus_bias(self._whole(y)).index_select(-1, self._rows)

    def without_bias(self, y: Tensor) -> Tensor:
        return self.base.without_bias(self._whole(y)).index_select(-1, self._rows)

    def _whole(self, y: Tensor) -> Tensor:
        return y.new_zeros(*y.shape[:-1], self.base.matrix().shape[0]).index_copy(-1, self._rows, y)

    def matrix(self) -> Tensor:
        return self.base.matrix()[self._rows]

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.base.project(x, matrix)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self.base.mix(h, matrix)

    def channels(self, v: Tensor) -> Tensor:
        return v

    def input_channels(self, v: Tensor) -> Tensor:
        return self.base.input_channels(v)
