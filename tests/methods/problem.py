"""Least squares on one layer, in float64: L = 1/2 |x W'^T + b' - y|^2, of which everything is known in closed form."""

import copy

import torch
from torch import Tensor, nn

import lorakit as lk

OUT, IN, ROWS = 7, 11, 23


class Problem:
    """A layer W (7, 11) with an adapter. G is the gradient of the loss by the adapted matrix W'."""

    def __init__(self, method: lk.Method, *, bias: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).double()
        self.x, self.y = torch.randn(ROWS, IN).double(), torch.randn(ROWS, OUT).double()
        self.base = copy.deepcopy(self.model)
        lk.attach(self.model, method)
        ((_, self.layer, self.adapter),) = lk.adapters(self.model)

    @property
    def W(self) -> Tensor:
        """The frozen matrix."""
        return self.layer.weight.detach()

    @property
    def merged(self) -> Tensor:
        return self.adapter.merge(self.W).detach()

    @property
    def delta(self) -> Tensor:
        return self.merged - self.W

    def error(self) -> Tensor:
        bias = self.adapter.merge_bias(self.layer.bias)
        return (self.x @ self.merged.T + (0 if bias is None else bias) - self.y).detach()

    def gradient(self) -> Tensor:
        return self.error().T @ self.x

    def loss(self) -> Tensor:
        return 0.5 * (self.model(self.x) - self.y).square().sum()

    def backward(self) -> "Problem":
        self.model.zero_grad()
        self.loss().backward()
        return self

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def perturb(module: nn.Module, by: float = 0.3) -> None:
    torch.manual_seed(7)
    for p in module.parameters():
        p.add_(by * torch.randn_like(p))
