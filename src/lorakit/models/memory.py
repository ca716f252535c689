"""How much memory a training step needs and how much it computes, found out before any weight is loaded.

The step is run on tensors that have a shape and no data (torch's meta device), and every allocation is counted while it
lives. So the figures follow the code of the model, the adapters and the loss, whatever they are: what autograd keeps,
that layers below the lowest adapter keep nothing, what checkpointing gives up. Only SDPA is put in by hand, as it
depends on the device: the fused kernel keeps q, k, v, its output and one number a row.
"""

import os
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UsageError
from ..kernels.attention import causal_attention
from .console import quiet_transformers
from .fast import presumed, summed
from .ledger import Ledger, heap_factor
from .packing import Pattern, explicit_attention, fits_blocks, prefers_explicit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAZY_LIBRARIES = 60 << 20  # grows in the first step of any size: kernels oneDNN compiles, autograd, the optimizer


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes at the peak of training, by what they are for, and the floating-point operations of an optimizer step."""

    weights: int
    """The frozen base, and buffers."""
    adapter: int
    """Trainable parameters."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """What the loss adds to that."""
    temporary: int
    """What the backward pass needs beyond."""
    fragmentation: int
    """What the C library's heap loses between blocks. Zero for a GPU."""
    runtime: int
    """The process without model and step: interpreter, libraries, their code compiled on the way. Zero for a GPU."""
    flops_forward: int
    flops_backward: int

    @property
    def total(self) -> int:
        """The peak in bytes."""
        step = self.gradients + self.activations + self.logits + self.temporary + self.fragmentation
        return self.weights + self.adapter + self.optimizer + step + self.runtime

    @property
    def flops(self) -> int:
        """Operations of a step, forward and backward; a multiply-add is two."""
        return self.flops_forward + self.flops_backward


def estimate(
    model: "PreTrainedModel",
    *,
    rows: int,
    length: int,
    trained_tokens: int | None = None,
    packed: bool = True,
    accumulate: int = 1,
    optimizer: int | None = None,
    device: str | torch.device = "cpu",
    runtime: int | None = None,
    threads: int = 1,
) -> Estimate:
    """What one optimizer step over `accumulate` micro-batches of `rows` rows of `length` tokens needs.

    `model` is a `skeleton` prepared as for training: adapters in place, the rest frozen, checkpointing on or off. A
    generating model computes logits for the `trained_tokens` of a micro-batch (all if None) if `packed`, else for every
    position. `optimizer`: bytes of its state (None: AdamW's, two float32 a trainable parameter). `device` is where it would
    run, `runtime` the bytes of the bare process (None: of this one, which should have imported what training imports).
    `threads`: how many share the rows, where the model allows it (`Fast.separable`).
    UsageError for a model whose code looks at the values of its input.
    """
    place = torch.device(device)
    base, adapter = _parameter_bytes(model)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    trained = rows * length if trained_tokens is None else trained_tokens
    shares = min(rows, threads) if threads > 1 and packed and place.type == "cpu" and presumed(model).separable else 1
    parts = Counter(rows // shares + (i < rows % shares) for i in range(shares))
    traced = _Trace()
    for own, count in parts.items():
        traced.add(count, _trace(model, own, length, trained * own // rows, packed, place))
    known = traced.activations + traced.logits + adapter
    process = (resident_bytes() if runtime is None else runtime) + _LAZY_LIBRARIES
    return Estimate(
        weights=base,
        adapter=adapter,
        gradients=adapter,
        optimizer=8 * trainable if optimizer is None else optimizer,
        activations=traced.activations,
        logits=traced.logits,
        temporary=max(0, traced.peak - known),
        fragmentation=traced.fragmentation,
        runtime=process if place.type == "cpu" else 0,
        flops_forward=accumulate * traced.flops_forward,
        flops_backward=accumulate * traced.flops_backward,
    )


def resident_bytes() -> int:
    """The memory this process occupies now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # elsewhere only the peak is known; macOS gives it in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of (frozen parameters and buffers, trainable parameters); a tied weight counts once."""
    frozen = sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()] if not weight.requires_grad)
    return frozen, sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def _loss(
    model: "PreTrainedModel", rows: int, length: int, trained: int, packed: bool, place: torch.device
) -> Callable[[], Tensor]:
    """The loss of a step, as training computes it."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    if not model.can_generate():
        return lambda: summed(model(input_ids=ids).logits, ids[:, 0])
    kept = torch.zeros(trained, dtype=torch.long, device="meta")
    if packed:
        fast, row = presumed(model, place), ids.view(1, -1)
        inputs = {"input_ids": row, "position_ids": row}
        return lambda: fast.loss(model, inputs, kept, kept, lengths=[length] * rows)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return lambda: summed(model(input_ids=ids, **decoder, use_cache=False).logits.flatten(0, 1)[kept], kept)


@dataclass(slots=True)
class _Trace:
    activations: int = 0
    logits: int = 0
    peak: int = 0
    fragmentation: int = 0
    flops_forward: int = 0
    flops_backward: int = 0

    def add(self, count: int, other: "_Trace") -> None:
        """Add what `count` shares that run at the same time need."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + count * getattr(other, name))


def _trace(model: "PreTrainedModel", rows: int, length: int, trained: int, packed: bool, place: torch.device) -> _Trace:
    """Run one step without data and read the ledger after the body, after the loss, and at the peak."""
    from torch.utils.flop_counter import FlopCounterMode

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        fused: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
        torch.ops.aten.addmm_: _addmm_flops,  # torch's counter knows only the form that is not in place
    }
    trace, ledger = _Trace(), Ledger(model, heap_factor() if place.type == "cpu" else 1.0)

    def after_body(*_: Any) -> None:
        trace.activations = ledger.live

    model.train()
    hook = model.base_model.register_forward_hook(after_body)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with _attention_without_data(model, place) as replaced, ledger, counter:
            total = _loss(model, rows, length, trained, packed and replaced, place)()
            trace.logits = max(0, ledger.live - trace.activations)
            trace.flops_forward = counter.get_total_flops()
            total.backward()
        trace.flops_backward = counter.get_total_flops() - trace.flops_forward
        trace.peak = ledger.peak
        trace.fragmentation = max(0, int(ledger.peak_held) - ledger.peak)
    except (RuntimeError, TypeError, AttributeError) as error:  # code that looks at values does not run on meta
        name = type(model).__name__
        raise UsageError(
            f"the memory of {name} cannot be foretold: it does not run without data", why=str(error)
        ) from error
    finally:
        hook.remove()
        model.zero_grad(set_to_none=True)
    return trace


@contextmanager
def _attention_without_data(model: "PreTrainedModel", place: torch.device) -> Generator[bool]:
    """Let attention run on meta as it would at `place`; yields whether the model has attention that can be replaced.

    Under a name that has no mask function transformers makes no mask, which would look at the positions.
    """
    from transformers import AttentionInterface

    before = str(model.config._attn_implementation)
    name = f"lorakit_without_data_{before}_{place.type}"
    AttentionInterface.register(name, partial(_attention, place, before == "eager"))
    with quiet_transformers():
        model.set_attn_implementation(name)
    try:
        yield model.config._attn_implementation == name and not model.config.is_encoder_decoder
    finally:
        model.set_attn_implementation(before)


def _attention(
    place: torch.device,
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The shapes of `packed_attention`, or of a padded batch's attention where there are no lengths."""
    explicit = eager
    if lengths is not None and fits_blocks(place, dropout, softcap):
        return causal_attention(query, key, value, lengths, scaling or query.shape[-1] ** -0.5), None
    if lengths is None:
        groups = query.shape[1] // key.shape[1]
        key, value = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (key, value))
    else:
        explicit = explicit or prefers_explicit(query[:, :, : max(lengths)], place)
    documents = zip(*(t.split(lengths or t.shape[2], dim=2) for t in (query, key, value)), strict=True)
    if explicit:
        parts = [explicit_attention(q, k, v, Pattern(True, None), dropout, scaling, softcap) for q, k, v in documents]
    else:
        parts = [_sdpa(q, k, v, dropout) for q, k, v in documents]
    out = torch.cat(parts, dim=2) if lengths else parts[0]
    return out.transpose(1, 2).contiguous(), None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The fused kernel; with dropout there is none on a processor, and SDPA keeps the weights (B, H, T, T)."""
    if dropout:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Scores and their product with v: two matrix products of B H T T D multiply-adds."""
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width


def _addmm_flops(y: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _backward_flops(grad: Any, q: tuple[int, ...], k: tuple[int, ...], *_: Any, **__: Any) -> int:
    """The scores again, and four products for the gradients."""
    return _attention_flops(q, k) * 5 // 2
