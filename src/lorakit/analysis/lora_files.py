"""A plain LoRA directory made from factors, as PEFT, vLLM and lorakit read it: no model is needed to write it.

One scale s for all layers, whatever their ranks: `alpha_pattern` says alpha_i = s r_i beside `rank_pattern`. So a reader that
ignores both patterns still has the right s = alpha / r, and takes the ranks from the tensors. `r` is the largest rank.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.errors import DivergenceError
from ..core.kinds import Kind, require_kind
from ..core.stack import settings_of
from ..interop.adapter_directory import CONFIG, FORMAT, SIDE, WEIGHTS
from ..interop.keys import PREFIX, file_tensors
from ..interop.peft_config import write_config
from ..methods.lora import LoRA, LoRAAdapter

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.jinja",
)


class Factors(NamedTuple):
    """A (r, in) and B (out, r) of one layer, as they are to be stored; `layer` says what kind it is and may hold no weights."""

    layer: nn.Module
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Lora:
    """What goes into the directory. `saved`: modules kept in full, path -> their tensors. `side`: facts for `lorakit.json`."""

    layers: Mapping[str, Factors]
    scale: float
    target_modules: Sequence[str] | str
    base: str | None
    task_type: str | None = None
    saved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    side: Mapping[str, Any] = field(default_factory=dict)

    def bytes(self) -> int:
        """Give the size of all tensors."""
        kept = [t for tensors in self.saved.values() for t in tensors.values()]
        return sum(t.nbytes for t in [*kept, *(t for own in self.layers.values() for t in (own.A, own.B))])


def write_lora(directory: Path, lora: Lora, tokenizer_of: Path | None = None) -> None:
    """Write the files into an existing, empty directory; tokenizer files are copied from `tokenizer_of`.

    Raises DivergenceError for NaN or infinity.
    """
    ranks = {path: len(own.A) for path, own in lora.layers.items()}
    r = max(ranks.values(), default=1)
    method = LoRA(r=r, alpha=lora.scale * r)
    tensors = dict(_tensors(lora))
    bad = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise DivergenceError(f"{len(bad)} tensors would hold NaN or infinity: {', '.join(bad[:3])}")
    config = write_config(
        method,
        target_modules=[],
        ranks=ranks,
        alphas={path: lora.scale * rank for path, rank in ranks.items()},
        modules_to_save=list(lora.saved),
        base=lora.base,
        task_type=lora.task_type,
        for_peft=True,
    )
    targets = lora.target_modules
    config["target_modules"] = targets if isinstance(targets, str) else list(targets)
    side = {**lora.side, "format": FORMAT, "method": settings_of(method)}
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (directory / SIDE).write_text(json.dumps(side, indent=2) + "\n")
    if tokenizer_of is not None:
        copy_tokenizer(tokenizer_of, directory)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer and chat template, whatever else lies beside them."""
    for pattern in TOKENIZER:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _tensors(lora: Lora) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor under its name in the file, which depends on the kind of the layer."""
    for path, (layer, A, B) in lora.layers.items():
        shape = require_kind(path, layer).shape(cast(Kind, layer))
        with torch.device("meta"):
            adapter = cast(LoRAAdapter, LoRA(r=len(A), alpha=lora.scale * len(A)).build(shape))
        adapter.lora_A, adapter.lora_B = (nn.Parameter(t.contiguous(), requires_grad=False) for t in (A, B))
        yield from ((key, tensor.detach().contiguous()) for key, tensor in file_tensors(path, layer, adapter))
    for path, own in lora.saved.items():
        yield from ((f"{PREFIX}{path}.{name}", tensor.detach().clone().contiguous()) for name, tensor in own.items())
