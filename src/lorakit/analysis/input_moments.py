"""Second moments of what layers get as input, on some rows: E[x x^T] (in, in), by layer path."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.calibrate import Calibration
from ..core.kinds import Kind, require_kind
from ..data.dataset import Example
from .rowwise import Rows

AT_ONCE = 2 << 30  # bytes of moments that are measured in one pass over the rows


class InputMoments(Mapping[str, Tensor]):
    """Measured when first asked for, a group of layers in each pass; iteration is in the order that asks for each group once.

    Embeddings are left out: their inputs are one-hot. Every row runs by itself, for padding has inputs that mean nothing.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], rows: Rows, at_once: int = AT_ONCE) -> None:
        wanted = set(paths)
        found = {path: layer for path, layer in model.named_modules() if path in wanted}
        layers = {path: layer for path, layer in found.items() if not _one_hot(path, layer)}
        batches = [[example] for example in rows.examples]

        def run(model: nn.Module, batch: Sequence[Example]) -> Tensor:
            one = Rows(rows.model, batch, rows.pad_id, rows.classes)
            return one.predict([0]).losses().mean()

        self._measured = Calibration(model, layers, frozenset({"inputs"}), batches, run, at_once)

    def __getitem__(self, path: str) -> Tensor:
        moment = self._measured[path].inputs
        if moment is None:
            raise KeyError(path)
        return moment

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured)

    def __len__(self) -> int:
        return len(self._measured)


def _one_hot(path: str, layer: Any) -> bool:
    kind: type[Kind] = require_kind(path, layer)
    return kind.shape(layer).one_hot
