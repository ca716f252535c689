"""Causal attention over packed documents with explicit probabilities, for processors.

    o = softmax(s q k^T + causal) v        q: (1, heads, T, D)   k, v: (1, kv_heads, T, D)   o: (1, T, heads, D)

Each document is cut into blocks of `ROWS` queries, which look at the keys up to their own end: half the products of a square
mask are never computed. Heads that share a key head are rows of one product. The probabilities of documents up to `KEPT` tokens
are kept for the backward pass, those of longer ones computed again, so that memory grows with T and not with its square.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 128  # queries of a block: the products are then large enough, and a quarter to a half of them is saved
KEPT = 512


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attend within each of the documents that fill the row one after the other."""
    return cast(Tensor, _Attention.apply(q, k, v, tuple(lengths), scale))


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Compute the same, document by document, by torch's attention."""
    parts = [tensor.split(list(lengths), 2) for tensor in (q, k, v)]
    outs = [
        F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scale, enable_gqa=True)
        for qkv in zip(*parts, strict=True)
    ]
    return torch.cat(outs, 2).transpose(1, 2)


class _Block(NamedTuple):
    """Rows [first, last) of a run of `count` documents of one length, whose first token is `start`."""

    start: int
    count: int
    length: int
    first: int
    last: int


def _blocks(lengths: Sequence[int]) -> Iterator[_Block]:
    """Cut into blocks; neighbours of equal length go together."""
    start = i = 0
    while i < len(lengths):
        count = next((n for n in range(1, len(lengths) - i) if lengths[i + n] != lengths[i]), len(lengths) - i)
        for first in range(0, lengths[i], ROWS):
            yield _Block(start, count, lengths[i], first, min(first + ROWS, lengths[i]))
        start, i = start + count * lengths[i], i + count


def _rows(x: Tensor, b: _Block, first: int) -> Tensor:
    """Give rows [first, b.last) of a run of x (heads, T, D): (heads, count, rows, D), a view."""
    run = x[:, b.start : b.start + b.count * b.length]
    return run.unflatten(1, (b.count, b.length))[:, :, first : b.last]


def _queries(x: Tensor, b: _Block, kv_heads: int) -> Tensor:
    """Give the block's rows of x (heads, T, D), those of one key head together: (kv_heads * count, group * rows, D)."""
    rows = _rows(x, b, b.first).unflatten(0, (kv_heads, -1))  # (kv_heads, group, count, rows, D)
    return rows.transpose(1, 2).reshape(kv_heads * b.count, -1, x.shape[-1])


def _heads(y: Tensor, b: _Block, kv_heads: int) -> Tensor:
    """Give (kv_heads * count, group * rows, D) back as (heads, count, rows, D)."""
    grouped = y.view(kv_heads, b.count, -1, b.last - b.first, y.shape[-1])
    return grouped.transpose(1, 2).flatten(0, 1)


def _keys(x: Tensor, b: _Block) -> Tensor:
    """Give the keys that the block sees: (kv_heads * count, last, D)."""
    return _rows(x, b, 0).reshape(-1, b.last, x.shape[-1])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        q, k, v = q[0], k[0], v[0]
        out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])  # (T, heads, D)
        by_head, kv_heads, kept = out.transpose(0, 1), len(k), []
        for b in _blocks(lengths):
            p = _probabilities(q, k, b, scale)
            _rows(by_head, b, b.first).copy_(_heads(torch.bmm(p, _keys(v, b)), b, kv_heads))
            if b.length <= KEPT:
                kept.append(p)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(q, k, v, *kept)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, *saved = ctx.saved_tensors
        kept = iter(saved)
        by_head, kv_heads = dout[0].transpose(0, 1), len(k)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for b in _blocks(ctx.lengths):
            p = next(kept) if b.length <= KEPT else _probabilities(q, k, b, ctx.scale)
            do, keys = _queries(by_head, b, kv_heads), _keys(k, b)
            dp = torch.bmm(do, _keys(v, b).transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            _rows(dq, b, b.first).copy_(_heads(torch.bmm(ds, keys), b, kv_heads))
            shape = (kv_heads, b.count, b.last, -1)
            _rows(dk, b, 0).add_(torch.bmm(ds.transpose(1, 2), _queries(q, b, kv_heads)).view(shape))
            _rows(dv, b, 0).add_(torch.bmm(p.transpose(1, 2), do).view(shape))
        return dq[None], dk[None], dv[None], None, None


def _probabilities(q: Tensor, k: Tensor, b: _Block, scale: float) -> Tensor:
    """Give softmax(s q k^T + causal) of a block: (kv_heads * count, group * rows, last)."""
    scores = torch.bmm(_queries(q, b, len(k)), _keys(k, b).transpose(1, 2)).mul_(scale)
    rows = b.last - b.first
    scores.view(-1, rows, b.last)[:, :, b.first :].add_(_future(rows, scores))
    return scores.softmax(-1)


def _future(rows: int, like: Tensor) -> Tensor:
    """Give -inf where a key comes after the query: adding it takes a fifth of the time of filling in."""
    return like.new_full((rows, rows), -torch.inf).triu_(1)
