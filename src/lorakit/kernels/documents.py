"""Causal attention over packed documents whose ends are data and not shape.

    o_i = softmax(s q_i k_j^T) v_j     over the j of i's own document with i - window < j <= i

A list of lengths makes operations of its own sizes for every way of packing. A compiled block and a recorded CUDA graph are one
sequence of operations on fixed sizes: here these are the number of tokens T and of ends, and every packing of T tokens fits.
On a GPU in 16 bits it is one kernel (torch.nn.attention.varlen: FlashAttention or cuDNN); elsewhere a (T, T) mask, made of the ends.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """ends: (n + 1,) int32, 0 and then where each document ends, the last one at T; it repeats for documents there are not.

    kernel: `varlen_kernel()`, looked up by who makes it: torch.compile does not see through a cache.
    """

    ends: Tensor
    kernel: Callable[..., Tensor] | None = None


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None = None) -> Tensor:
    """Give o (1, T, H, D) of q (1, H, T, D), k and v (1, H_kv, T, D)."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and documents.kernel is not None:
        back = -1 if window is None else window - 1
        return one_kernel(documents.kernel, q, k, v, documents.ends, q.shape[2], scale, back)
    mask = allowed(documents, q.shape[2], window)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def allowed(documents: Documents, tokens: int, window: int | None = None) -> Tensor:
    """Give the mask (T, T): true where the token of a row may look at that of a column."""
    at = torch.arange(tokens, dtype=documents.ends.dtype, device=documents.ends.device)
    own = torch.searchsorted(documents.ends, at, right=True)
    mask = (own[:, None] == own) & (at[:, None] >= at)
    return mask if window is None else mask & (at[:, None] - at < window)


@functools.cache
def varlen_kernel() -> Callable[..., Tensor] | None:
    """Torch's attention over documents of different lengths, where this torch has it in the form used below."""
    from torch.nn.attention.varlen import varlen_attn  # costs a second to import

    return cast(Any, varlen_attn) if "window_size" in inspect.signature(varlen_attn).parameters else None


def one_kernel(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    longest: int,
    scale: float | None,
    back: int = -1,
) -> Tensor:
    """All documents at once; the kernel takes (T, H, D), the result is (1, T, H, D). back: how far a token sees, -1 for all."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = kernel(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(back, 0), enable_gqa=gqa)
    return out[None]
