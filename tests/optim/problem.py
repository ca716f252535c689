"""A layer W' = W + s B A with a known gradient by W', the settings of an optimizer, and its one step."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.optim import OPTIMIZERS, parameter_groups

OUT, IN, R = 9, 13, 3


@dataclass(frozen=True)
class Settings:
    lr: float = 1e-2
    b_ratio: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    options: Mapping[str, Any] | None = None


class Problem:
    """L = <G, change> for a fixed G: the gradient by the weight is G whatever the factors are."""

    def __init__(self, method: lk.Method | None = None, *, zero_b: bool = False, dtype: torch.dtype = torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).to(dtype)
        lk.attach(self.model, method or lk.LoRA(r=R, alpha=2 * R), target_modules=["0"])
        self.adapter: Any = next(iter(lk.adapters(self.model)))[2]
        self.A, self.B, self.s = self.adapter.lora_A, self.adapter.lora_B, float(self.adapter.scale)
        with torch.no_grad():
            if not zero_b:
                self.B.normal_()
        self.G = torch.randn(OUT, IN, dtype=dtype)

    @property
    def change(self) -> Tensor:
        return self.adapter.delta_weight().detach().clone()

    def optimizer(self, name: str, **settings: Any) -> torch.optim.Optimizer:
        given = Settings(**settings)
        return OPTIMIZERS[name](parameter_groups(self.model, "default", given), given)

    def step(self, optimizer: torch.optim.Optimizer, G: Tensor | None = None) -> None:
        optimizer.zero_grad()
        (self.adapter.delta_weight() * (self.G if G is None else G)).sum().backward()
        optimizer.step()


class Mixed(nn.Module):
    """Adapted layers beside ones trained in full: a matrix, a norm, a bias, and a convolution's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.conv, self.head = nn.LayerNorm(6), nn.Conv1d(6, 4, 2), nn.Linear(4, 12)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.norm(self.two(torch.tanh(self.one(self.embed(ids)))))
        return self.head(self.conv(y.mT).mean(-1))


def mixed(method: lk.Method | None = None, targets: list[str] | None = None) -> nn.Module:
    torch.manual_seed(0)
    saved = ["head", "norm", "conv"]
    return lk.attach(Mixed(), method or lk.LoRA(r=2), target_modules=targets or ["one", "two"], modules_to_save=saved)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        ids = (torch.arange(10).reshape(2, 5) + step) % 11
        (model(ids) - 0.1 * step).square().sum().backward()
        optimizer.step()


def recorded(shapes: list[tuple[int, ...]], steps: int) -> list[list[Tensor]]:
    """Gradients to feed two implementations with."""
    torch.manual_seed(5)
    return [[torch.randn(shape) * (1 + 0.3 * step) for shape in shapes] for step in range(steps)]


def feed(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a reference that needs bitsandbytes for its 8-bit variant only, which is not compared here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        stand_ins = {
            name: ModuleType(f"bitsandbytes{name}") for name in ("", ".functional", ".optim", ".optim.optimizer")
        }
        vars(stand_ins[""])["functional"] = stand_ins[".functional"]
        vars(stand_ins[".functional"]).update(quantize_blockwise=None, dequantize_blockwise=None)
        vars(stand_ins[".optim.optimizer"]).update(Optimizer2State=object)
        for module in stand_ins.values():
            monkeypatch.setitem(sys.modules, module.__name__, module)
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)
