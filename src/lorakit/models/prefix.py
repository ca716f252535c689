"""The blocks below everything that is trained, run once for each row instead of once an epoch.

    state(row) = block_d-1( ... block_0(embed(row)))          d: the lowest block that is adapted or trained

is a function of the base and the row's tokens: nothing in it learns, nothing in it draws random numbers. So it is kept when the
row is first needed, and from then on a pass begins at block d. No gradient flows below d, with or without this.

Rows are run in groups: those that the first epoch packs into one pass. So that epoch costs what it costs anyway and comes out
the same bit for bit (a row alone would take two to three times as long at 20 to 45 tokens), and a state depends on data,
configuration and base, not on when it is first needed: a run that goes on after an interruption takes the same ones.

They lie in a file without a name, which is gone with the process however that ends, and which the system keeps in memory as
long as there is room.
"""

import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..core.attach import Adapted, disabled
from ..core.errors import ResourceError, UsageError
from ..core.files import disk_errors
from ..core.threads import threads
from .blocks import FastBlock, draws
from .fast import probe_tokens
from .modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "train.cache_prefix"


class Given(NamedTuple):
    """Stands in for the blocks below `depth`: `hidden` (1, T, n) is what enters that block."""

    depth: int
    hidden: Tensor

    def instead(self, block: int, x: Tensor) -> Tensor | None:
        """Give the known states in place of what a block would compute."""
        return self.hidden if block < self.depth else None


@dataclass
class Taken:
    """Takes what enters block `depth`, and lets no block from there on run."""

    depth: int
    hidden: Tensor | None = None

    def instead(self, block: int, x: Tensor) -> Tensor | None:
        """Keep the states that enter the block, if it is that one."""
        if block < self.depth:
            return None
        if block == self.depth:
            self.hidden = x.detach()
        return x


def frozen_blocks(model: "PreTrainedModel") -> int:
    """Count the blocks below everything that is trained or adapted; at most all but the last, which is run for some positions.

    Raises UsageError if there is none, if they draw random numbers, and if `accelerate` did not take all of them.
    """
    blocks = [module for module in model.modules() if isinstance(module, FastBlock)]
    numbers, count = [block.self_attn.layer_idx for block in blocks], model.config.get_text_config().num_hidden_layers
    if numbers != list(range(count)):
        raise _refusal(
            "its blocks cannot all run by fused operations, and only those that can may be left out of a pass"
        )
    depth = _below_what_changes(model)
    if depth == 0:
        raise _refusal(
            "its lowest block, or what comes before it, is adapted or trained: what leaves it changes with every step",
            "adapt the upper layers only, e.g. method.last_n_layers: 12",
        )
    if any(map(draws, blocks[:depth])):
        raise _refusal(
            "the blocks below the lowest adapter have dropout of their own, so what leaves them is never the same twice",
            "set its dropout to 0 (attention_dropout in its config.json)",
        )
    return depth


def below(depth: int) -> str:
    """Name the blocks below `depth`."""
    return "block 0" if depth == 1 else f"blocks 0 to {depth - 1}"


def _refusal(why: str, fix: str | None = None) -> UsageError:
    leave = f"leave {KEY} out"
    return UsageError(f"{KEY} has nothing to keep with this model", why=why, fix=f"{fix}, or {leave}" if fix else leave)


def _below_what_changes(model: nn.Module) -> int:
    """Count the blocks before the first module that is trained or adapted; modules come in the order in which they run."""
    begun = 0
    for module in model.modules():
        begun += isinstance(module, FastBlock)
        if isinstance(module, Adapted) or any(p.requires_grad for p in module.parameters(recurse=False)):
            break
    return max(begun - 1, 0)


@dataclass(eq=False)
class _Group:
    """Rows that are run together, the first time one of them is needed, by operations of so many threads."""

    rows: list[bytes]
    threads: int
    known: bool = False
    lock: Lock = field(default_factory=Lock)


class _Row(NamedTuple):
    """Where a row's states lie, in tokens from the beginning of the file, and with which rows it is run."""

    at: int
    group: _Group


class Prefix:
    """The states that enter block `depth`, for rows that are announced first (`expect`). Any thread may ask for them.

    directory: on whose disk they are kept. Raises UsageError for a model that does more with its blocks than running one after
    the other, which is found out on 16 tokens.
    """

    def __init__(self, model: "PreTrainedModel", depth: int, directory: Path) -> None:
        probe = _proved(model, depth)
        self.depth, self.directory = depth, directory
        self._dtype, self._width = probe.dtype, probe.shape[-1]
        self._token = probe.element_size() * self._width  # bytes
        self._rows: dict[bytes, _Row] = {}
        self._tokens = 0
        with self._disk():
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of all states, once they are known."""
        return self._tokens * self._token

    @property
    def words(self) -> str:
        """Say it."""
        rows = f"once for each of {len(self._rows)} distinct rows"
        return f"frozen prefix: {below(self.depth)} will run {rows}, and what they give takes {self.size / 1e6:.1f} MB of disk"

    def expect(self, rows: Sequence[Sequence[int]], threads: int) -> None:
        """Announce rows (their tokens) that are to be run together, by operations of so many threads; known ones stay where they are."""
        new = [key for key in dict.fromkeys(map(_key, rows)) if key not in self._rows]
        group = _Group(new, threads)
        for key in new:
            self._rows[key] = _Row(self._tokens, group)
            self._tokens += len(_tokens(key))

    def check_room(self) -> None:
        """Raise ResourceError if the disk has no room for what is expected."""
        free = shutil.disk_usage(self.directory).free
        if self.size > free:
            raise ResourceError(
                f"the disk has no room for the frozen prefix ({KEY})",
                why=f"{self.size / 1e9:.2f} GB would be kept, and {free / 1e9:.2f} GB are free",
                fix=f"free some space, write the output to another disk, or leave {KEY} out",
                where=str(self.directory),
            )

    def of(self, model: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> Given:
        """Give the states of rows (their tokens) one after the other, as one packed row of documents.

        The model is in training mode. Raises KeyError for a row that was not announced, ResourceError if the disk is full.
        """
        places = [self._rows[_key(row)] for row in rows]
        for place in places:
            self._run(model, place.group)
        buffer = bytearray(sum(map(len, rows)) * self._token)
        rest = memoryview(buffer)
        for place, row in zip(places, rows, strict=True):
            size = len(row) * self._token
            self._moved(lambda part, at: os.preadv(self._file.fileno(), [part], at), rest[:size], place.at)
            rest = rest[size:]
        states = torch.frombuffer(buffer, dtype=self._dtype).view(1, -1, self._width)
        return Given(self.depth, states.to(model.device))

    def _run(self, model: "PreTrainedModel", group: _Group) -> None:
        with group.lock:  # a second thread that needs the group waits for it instead of running it too
            if group.known:
                return
            states = _states(model, self.depth, list(map(_tokens, group.rows)), group.threads)
            buffer = bytearray(states.nbytes)
            torch.frombuffer(buffer, dtype=self._dtype).view_as(states).copy_(states)
            self._moved(
                lambda part, at: os.pwrite(self._file.fileno(), part, at),
                memoryview(buffer),
                self._rows[group.rows[0]].at,
            )
            group.known = True

    def _moved(self, move: Callable[[memoryview, int], int], rest: memoryview, at: int) -> None:
        """Read or write all of `rest` from token `at` on; the system may do it in parts."""
        offset = at * self._token
        with self._disk():
            while rest:
                done = move(rest, offset)
                rest, offset = rest[done:], offset + done

    def _disk(self) -> Any:
        return disk_errors(self.directory / "frozen prefix")


def _key(row: Sequence[int]) -> bytes:
    return array("i", row).tobytes()


def _tokens(key: bytes) -> array:
    return array("i", key)


def _states(model: "PreTrainedModel", depth: int, rows: Sequence[Sequence[int]], count: int) -> Tensor:
    """Run the blocks below `depth` on packed rows, by operations of `count` threads.

    As training does, that is with gradients on, of which there are none.
    """
    lengths = [len(row) for row in rows]
    tokens = {
        "input_ids": [token for row in rows for token in row],
        "position_ids": [position for length in lengths for position in range(length)],
    }
    inputs = {name: torch.tensor([values], device=model.device) for name, values in tokens.items()}
    taken = Taken(depth)
    with torch.enable_grad(), threads(count):
        cast(Any, model).base_model(**inputs, lengths=lengths, prefix=taken, use_cache=False)
    return cast(Tensor, taken.hidden)[0]


@torch.no_grad()
def _proved(model: "PreTrainedModel", depth: int) -> Tensor:
    """Give the states of some tokens (1, 16, n), with which the base comes to the same end as from the tokens."""
    ids, taken, base = probe_tokens(model), Taken(depth), cast(Any, model).base_model
    with evaluating(model), disabled(model):
        base(ids, prefix=taken, use_cache=False)
        whole = base(ids, use_cache=False).last_hidden_state
        if taken.hidden is not None:
            short = base(ids, prefix=Given(depth, taken.hidden), use_cache=False).last_hidden_state
            if torch.allclose(short, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
                return taken.hidden
    raise _refusal("it does more with its blocks than running one after the other")
