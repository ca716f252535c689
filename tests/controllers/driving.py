"""A matrix D to be learned by one adapted layer, and a run around it as the training loop makes one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.chain import Chain
from lorakit.optim import OPTIMIZERS, parameter_groups, scale_learning_rates, schedule
from lorakit.optim.schedules import warmup_steps
from lorakit.train.config import OptimConfig
from lorakit.train.controllers import Controller, Nothing, Run

SPECTRUM = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SIDE = 32


def matrix(spectrum: tuple[float, ...] = SPECTRUM) -> Tensor:
    """A (32, 32) matrix in float64 with these singular values and random vectors."""
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(SIDE, len(spectrum), generator=generator).double())[0] for _ in range(2))
    return U @ torch.diag(torch.tensor(spectrum).double()) @ V.T


class Drive:
    """L = |D - change|^2 of one layer, in steps of the training loop. Nothing in it is random but the start."""

    def __init__(self, settings: Any, total: int, *, optimizer: str = "adamw", seed: int = 0, r: int = 4, **optim: Any):
        optim = {"lr": 1e-2, "schedule": "cosine", "warmup": 0.0, "clip": None, **optim}
        self.config, self.total, self.D = OptimConfig(name=optimizer, **optim), total, matrix()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)).double()
        lk.attach(self.model, lk.LoRA(r=r, alpha=r), target_modules=["0"])
        name, warmup = self.config.schedule, self.config.warmup
        self.run = Run(self.model, "default", total, schedule(name, total, warmup), warmup_steps(total, warmup), seed)
        self.controller: Controller = settings.start(self.run) if settings is not None else Nothing(self.run)
        groups = parameter_groups(self.model, "default", self.config)
        self.optimizer = OPTIMIZERS[optimizer](groups, self.config)
        self.done = 0

    @property
    def adapter(self) -> lk.AdditiveAdapter:
        return next(iter(lk.adapters(self.model)))[2]

    @property
    def chain(self) -> Chain:
        assert isinstance(self.adapter, Chain)
        return self.adapter

    @property
    def change(self) -> Tensor:
        return self.adapter.delta_weight().detach()

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return tuple(self.adapter.get_parameter(n) for n in self.names("A", "B"))

    def names(self, *roles: str) -> list[str]:
        return [name for role in roles for name, its in self.adapter.roles().items() if its == role]

    def loss(self) -> Tensor:
        return (self.D - self.adapter.delta_weight()).square().sum()

    def step(self, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None) -> float:
        """Take a step; `before` the update (gradients are there) and `after` it, before the controller acts."""
        scale_learning_rates(self.optimizer, self.controller.schedule(self.done))
        loss = self.loss()
        loss.backward()
        before()
        self.optimizer.step()
        after()
        self.controller.after_update(self.done, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return float(loss.detach())

    def steps(self, count: int | None = None) -> "Drive":
        for _ in range(self.total - self.done if count is None else count):
            self.step()
        return self


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
