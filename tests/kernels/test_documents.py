"""Attention over documents whose ends are data: what each document's own attention gives, and nothing of its neighbours."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernels.documents import Documents, allowed, attention

LENGTHS = [5, 1, 9, 4]


def ends(lengths: list[int], spare: int = 0) -> Documents:
    found = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Documents(torch.tensor(found + [found[-1]] * spare, dtype=torch.int32))


def one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    parts = []
    for own in zip(*(t.split(LENGTHS, 2) for t in (q, k, v)), strict=True):
        n = own[0].shape[2]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        grouped = [own[0], *(t.repeat_interleave(2, 1) for t in own[1:])]
        parts.append(F.scaled_dot_product_attention(*grouped, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("spare", [0, 3])
def test_each_document_by_itself(window: int | None, spare: int) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, sum(LENGTHS), 6, dtype=torch.float64) for heads in (4, 2, 2)]
    pulls, results = torch.randn(1, sum(LENGTHS), 4, 6, dtype=torch.float64), []
    for run in (
        lambda *t: attention(*t, ends(LENGTHS, spare), 0.3, window),
        lambda *t: one_by_one(*t, 0.3, window),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, pulls)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_mask_is_blocks_of_triangles() -> None:
    mask = allowed(ends([2, 3], spare=1), 5)
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert allowed(ends([4]), 4, window=2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
def test_one_kernel_on_a_gpu(window: Any) -> None:
    torch.manual_seed(0)
    lengths = [100, 1, 27, 128]
    q, k, v = (torch.randn(1, h, sum(lengths), 64, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    documents = Documents(ends(lengths, 4).ends.cuda())
    expected = attention(q.float(), k.float(), v.float(), documents, 0.125, window)
    torch.testing.assert_close(attention(q, k, v, documents, 0.125, window).float(), expected, rtol=2e-2, atol=2e-2)
