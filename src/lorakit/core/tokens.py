"""Adapters that look at tokens: what the whole model is given, shown to something inside them before each forward pass.

A layer sees vectors, and some methods need to know which tokens they stand for (aLoRA: everything behind some words). Such
a method gives all adapters of an attachment one `Watcher` as a submodule; `attach` and `load` register it on the model, and
`detach` takes it off again. It is shown the tokens also while its adapter is not active.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NONE = -1
"""Stands for a token that the attention mask hides."""


class Tokens(NamedTuple):
    """The tokens of one forward pass.

    ids: (B, T), with `NONE` where the attention mask is 0
    documents: (B, T), the number of the document that a position belongs to: its row, or by `lengths` in a packed row
    count: number of documents
    before: (B, L), the tokens of the same rows that are in the cache; (B, 0) if there is none or it is not known
    """

    ids: Tensor
    documents: Tensor
    count: int
    before: Tensor


@runtime_checkable
class Cache(Protocol):
    """A transformers cache, as far as its length goes."""

    def get_seq_length(self) -> int:
        """Give the number of positions it holds."""
        ...


class Watcher(nn.Module, ABC):
    """A module of adapters that is shown the tokens of every forward pass of the model they stand in.

    What it keeps of a pass must last until the next one: recomputing activations runs layers again in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handle: RemovableHandle | None = None
        self._cached: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()
        self._last: Tensor | None = None

    @abstractmethod
    def see(self, tokens: Tokens | None) -> None:
        """Look at the tokens of the pass that begins; None if the model is not given any (vectors, pictures)."""

    def watch(self, model: nn.Module) -> None:
        """Be shown the passes of `model` from now on."""
        if self._handle is None:
            self._handle = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def unwatch(self) -> None:
        """No longer be shown them."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            self.see(None)
            return
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, NONE)
        documents, count = _documents(ids, kwargs.get("lengths"))
        self.see(Tokens(ids, documents, count, self._remember(ids, kwargs.get("past_key_values"))))

    def _remember(self, ids: Tensor, cache: object) -> Tensor:
        """Give the tokens (B, L) that the cache holds, and keep them with those of this pass for the next."""
        before = ids[:, :0]
        if isinstance(cache, Cache):
            length = int(cache.get_seq_length())
            # A model that is given no cache makes one, which only the next pass shows: then the last one filled it.
            known = self._cached.get(cache, self._last)
            if length and known is not None and len(known) == len(ids) and known.shape[1] >= length:
                before = known[:, :length]
            self._cached[cache] = torch.cat([before, ids], dim=1)
            self._last = None
        else:
            self._last = ids
        return before


def _documents(ids: Tensor, lengths: Sequence[int] | None) -> tuple[Tensor, int]:
    if lengths is None:
        return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids), len(ids)
    numbers = torch.arange(len(lengths), device=ids.device)
    return numbers.repeat_interleave(torch.tensor(lengths, device=ids.device))[None], len(lengths)


def watchers(module: nn.Module) -> list[Watcher]:
    """Give the watchers inside an adapter."""
    return [m for m in module.modules() if isinstance(m, Watcher)]
