"""Many documents in one row without padding, and no document sees another.

`enable_packing(model)` gives the model an attention function that works document by document when the caller says how
long the documents are, and is the ordinary one otherwise (padded evaluation, generation with a cache):

    model(input_ids, position_ids=positions, lengths=[7, 12, 5], use_cache=False)      # input_ids (1, 24)

transformers hands `lengths` down to every attention call, also where gradient checkpointing runs a layer again.
Cost and memory are the sum of the squared lengths instead of the square of their sum.

What each document may look at within itself comes from the model's own mask: transformers asks a mask function for the
whole (T, T) mask, ours answers with a promise, and only the blocks on the diagonal are ever computed. So sliding
windows, chunks and bidirectional encoders need no case of their own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UsageError
from ..kernels import documents
from ..kernels.attention import causal_attention
from ..kernels.documents import Documents
from ..kernels.low_rank import applies
from .console import quiet_transformers
from .modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lorakit_packed"
_PROBE_LENGTHS = [5, 11]
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_ROWS = 1024  # rows of a document's mask compared at a time
_SHORT = 512  # tokens of a document up to which explicit scores are the faster way on a processor


class Pattern(NamedTuple):
    """What a document's tokens may look at: the past if `causal`, all if neither, else where `mask` (L, L) is true."""

    causal: bool
    mask: Tensor | None


class Mask:
    """A promise of the attention mask of one forward pass: the arguments of `sdpa_mask`, called for what is needed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._whole: tuple[Tensor | None] | None = None
        self._documents: dict[tuple[int, int], Pattern] = {}

    def whole(self) -> Tensor | None:
        """The (B, 1, Q, K) mask of the ordinary attention; None where it is plainly causal or full."""
        from transformers.masking_utils import sdpa_mask

        if self._whole is None:
            self._whole = (sdpa_mask(**self._arguments),)
        return self._whole[0]

    def document(self, start: int, length: int) -> Pattern:
        """The pattern inside the document at `start`. UsageError if the caller also masked tokens."""
        if self._arguments.get("attention_mask") is not None:
            raise UsageError("packed documents have no padding to mask", fix="leave attention_mask out, or lengths")
        if (start, length) not in self._documents:
            self._documents[start, length] = self._look(start, length)
        return self._documents[start, length]

    def _look(self, start: int, length: int) -> Pattern:
        causal = full = True
        for first in range(0, length, _ROWS):
            rows = self._block(start, length, first, min(_ROWS, length - first))
            causal = causal and torch.equal(rows, torch.ones_like(rows).tril(first))
            full = full and bool(rows.all())
        if causal or full:
            return Pattern(causal, None)
        return Pattern(False, self._block(start, length, 0, length))

    def _block(self, start: int, length: int, first: int, rows: int) -> Tensor:
        from transformers.masking_utils import sdpa_mask

        block: dict[str, Any] = {
            "batch_size": 1,
            "q_length": rows,
            "q_offset": start + first,
            "kv_length": length,
            "kv_offset": start,
            "attention_mask": None,
            "allow_is_causal_skip": False,
            "allow_is_bidirectional_skip": False,
        }
        return cast(Tensor, sdpa_mask(**(self._arguments | block)))[0, 0]


def packed_mask(**arguments: Any) -> Mask:
    """The mask function transformers calls once per forward pass and kind of layer."""
    return Mask(arguments)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    lengths: list[int] | Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from query (B, H, T, D) to key and value (B, H_kv, T, D), per document given `lengths`; (B, T, H, D)."""
    if isinstance(lengths, Documents):
        return _fixed(query, key, value, lengths, scaling, softcap, sliding_window), None
    if lengths is None:
        mask = attention_mask.whole() if isinstance(attention_mask, Mask) else attention_mask
        kwargs["sliding_window"] = sliding_window
        return _ordinary(module, query, key, value, mask, dropout, scaling, is_causal, softcap, kwargs)
    if query.shape[0] != 1 or sum(lengths) != query.shape[2]:
        raise UsageError(
            "packed documents must fill one row",
            why=f"lengths sum to {sum(lengths)}, input is {query.shape[0]} x {query.shape[2]}",
        )
    if not isinstance(attention_mask, Mask):
        raise UsageError("this model makes its own attention mask, so documents cannot be packed")
    patterns = _patterns(attention_mask, lengths)
    causal = all(pattern.causal for pattern in patterns)
    if causal and applies(query) and fits_blocks(query.device, dropout, softcap):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, lengths, scale), None
    if _fits_one_kernel(query, patterns, dropout, softcap) and (kernel := documents.varlen_kernel()):
        return _in_one_kernel(kernel, query, key, value, lengths, scaling), None
    parts = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    out = [
        _document(q, k, v, pattern, dropout, scaling, softcap)
        for q, k, v, pattern in zip(*parts, patterns, strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _fixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Documents,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attend in a model that is known to be causal, whatever the mask: it could be looked at on the host only."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        return documents.attention(query, key, value, ends, scale, window)
    pattern = Pattern(False, documents.allowed(ends, query.shape[2], window))
    return explicit_attention(query, key, value, pattern, 0.0, scaling, softcap).transpose(1, 2).contiguous()


def _patterns(mask: Mask, lengths: list[int]) -> list[Pattern]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [mask.document(start, length) for start, length in zip(starts, lengths, strict=True)]


def _document(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float, scaling: float | None, softcap: float | None
) -> Tensor:
    if softcap is not None or prefers_explicit(q, q.device):
        return explicit_attention(q, k, v, pattern, dropout, scaling, softcap)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=pattern.mask,
        is_causal=pattern.causal,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def prefers_explicit(q: Tensor, device: torch.device) -> bool:
    """Whether explicit scores beat SDPA for the documents of queries like `q` (B, H, T, D) on a device."""
    return device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _SHORT


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, dropout: float, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(c tanh(q k^T s / c) + mask) v with the scores in memory; without a cap c the tanh is left out.

    The query heads that share a key head are rows of one matrix product. On a processor, in bfloat16, this takes half
    the time of SDPA for documents up to some 500 tokens, at the same accuracy.
    """
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1:3]
    scale = width**-0.5 if scaling is None else scaling
    bias = _bias(pattern, rows, columns, q).expand(batch, kv_heads, heads // kv_heads, rows, columns)
    bias = bias.reshape(batch * kv_heads, -1, columns)
    q = q.reshape(batch * kv_heads, -1, width)
    k, v = (tensor.reshape(batch * kv_heads, columns, width) for tensor in (k, v))
    if softcap is None:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.tanh(q @ k.transpose(1, 2) * (scale / softcap)) * softcap + bias
    return (F.dropout(scores.softmax(-1), dropout) @ v).view(batch, heads, rows, width)


def _bias(pattern: Pattern, rows: int, columns: int, like: Tensor) -> Tensor:
    """What is added to the scores: 0 where a token may look, else the lowest number: a row of -inf would be NaN."""
    allowed = pattern.mask
    if pattern.causal:
        allowed = torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril(columns - rows)
    if allowed is None:
        return like.new_zeros(rows, columns)
    bias = like.new_zeros(allowed.shape).masked_fill(~allowed, torch.finfo(like.dtype).min)
    return bias[:, :, None] if bias.ndim == 4 else bias  # (B, 1, 1, rows, columns): one for all heads


def fits_blocks(device: torch.device, dropout: float, softcap: float | None) -> bool:
    """Whether causal documents are attended to block by block in training on a device: on a processor, nothing but causal."""
    return device.type == "cpu" and not dropout and softcap is None


def _fits_one_kernel(query: Tensor, patterns: list[Pattern], dropout: float, softcap: float | None) -> bool:
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return half and not dropout and softcap is None and all(pattern.causal for pattern in patterns)


def _in_one_kernel(
    kernel: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None
) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(query.device)
    return documents.one_kernel(kernel, query, key, value, ends, max(lengths), scaling)


def _ordinary(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """What the model does without packing: transformers' SDPA, or explicit scores where it caps them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    by_default = cast(bool, module.is_causal) if is_causal is None else is_causal
    causal = mask is None and query.shape[2] > 1 and by_default
    out = explicit_attention(query, key, value, Pattern(causal, mask), dropout, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def enable_packing(model: "PreTrainedModel") -> bool:
    """Let `model` take `lengths`, and prove it: two packed documents give the logits each gives alone.

    Returns whether the proof held; if not, the model is as it was. Models that do not use transformers' attention
    interface fail it (T5, Mamba, BLOOM), and so do classifiers, which have one answer per row.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    before = model.config._attn_implementation
    if before == NAME:
        return True  # it was proved before
    if before not in ("sdpa", "eager"):
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    try:
        with evaluating(model), torch.no_grad(), quiet_transformers():
            alone, padded = _alone(model), _padded(model)
            model.set_attn_implementation(NAME)
            proven = _close(_together(model), alone) and _close(_padded(model), padded)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        proven = False  # the model does not hand the mask or the lengths on
    if not proven:
        model.set_attn_implementation(before)
    return proven


def _documents(model: "PreTrainedModel") -> list[Tensor]:
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    tokens = torch.randint(vocabulary, (sum(_PROBE_LENGTHS),), generator=torch.Generator().manual_seed(0))
    return list(tokens.to(model.device).split(_PROBE_LENGTHS))


def _alone(model: "PreTrainedModel") -> Tensor:
    positions = [torch.arange(n, device=model.device) for n in _PROBE_LENGTHS]
    runs = zip(_documents(model), positions, strict=True)
    return torch.cat([model(ids[None], position_ids=at[None], use_cache=False).logits[0] for ids, at in runs])


def _together(model: "PreTrainedModel") -> Tensor:
    ids = torch.cat(_documents(model))[None]
    positions = torch.cat([torch.arange(n, device=model.device) for n in _PROBE_LENGTHS])[None]
    return model(ids, position_ids=positions, lengths=list(_PROBE_LENGTHS), use_cache=False).logits[0]


def _padded(model: "PreTrainedModel") -> Tensor:
    """The logits of the shorter document, padded on the left to the longer one: the masks of a batched generation."""
    short, long = _documents(model)
    missing = len(long) - len(short)
    ids = torch.stack([F.pad(short, (missing, 0)), long])
    attended = torch.ones_like(ids)
    attended[0, :missing] = 0
    return model(ids, attention_mask=attended, use_cache=False).logits[0, missing:]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE[b.dtype] * b.abs().max())
