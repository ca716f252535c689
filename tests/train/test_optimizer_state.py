"""The state of any torch optimizer through a checkpoint, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.errors import FileError
from lorakit.train.checkpoint import load, optimizer_tensors, restore_optimizer, save_checkpoint


class Float32Momentum(torch.optim.Optimizer):
    """Keeps its state in float32 for parameters in bfloat16, and things that are not tensors."""

    def __init__(self, parameters: object, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.5, 0.25), "note": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["betas"], tuple)
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("mean", torch.zeros_like(p, dtype=torch.float32)).lerp_(p.grad.float(), 0.3)
                state["history"] = (*state.get("history", ()), [state["mean"].clone(), 1])[-2:]
                p.sub_(group["lr"] * state["mean"] + sum(m.sum() * w for m, w in state["history"]) * 1e-3)


OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS([q for _, q in p], lr=1e-1, max_iter=3),
    "float32 momentum": Float32Momentum,
}


def model_and_optimizer(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = model.bfloat16() if name == "float32 momentum" else model
    return model, OPTIMIZERS[name](list(model.named_parameters()))


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 60, dtype=model[0].weight.dtype).view(10, 6) * (1 + step / 10)
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_training_after_a_restored_optimizer_is_bit_identical(name: str, tmp_path: Path) -> None:
    whole, optimizer = model_and_optimizer(name)
    advance(whole, optimizer, 0, 9)

    first, optimizer = model_and_optimizer(name)
    advance(first, optimizer, 0, 4)
    state, scalars = optimizer_tensors(optimizer)
    assert state
    path = save_checkpoint(tmp_path, 4, {"optimizer": state, "model": first.state_dict()}, {"optimizer": scalars})

    tensors, read = load(path)
    second, optimizer = model_and_optimizer(name)
    second.load_state_dict(tensors["model"])
    restore_optimizer(optimizer, tensors["optimizer"], read["optimizer"])
    advance(second, optimizer, 4, 9)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_restored_optimizer_shares_no_memory_with_its_source() -> None:
    model, optimizer = model_and_optimizer("adamw")
    advance(model, optimizer, 0, 2)
    tensors, scalars = optimizer_tensors(optimizer)
    other_model, other = model_and_optimizer("adamw")
    restore_optimizer(other, tensors, scalars)
    before = {k: v.clone() for k, v in tensors.items()}
    advance(other_model, other, 2, 4)
    assert all(torch.equal(v, tensors[k]) for k, v in before.items())


def test_state_of_other_parameters_is_refused() -> None:
    model, optimizer = model_and_optimizer("adamw")
    advance(model, optimizer, 0, 2)
    tensors, scalars = optimizer_tensors(optimizer)
    only_weights = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if n != "1.bias"])
    with pytest.raises(FileError, match=r"1\.bias"):
        restore_optimizer(only_weights, tensors, scalars)
    reordered = torch.optim.AdamW(list(model.named_parameters())[::-1])
    with pytest.raises(FileError, match="order"):
        restore_optimizer(reordered, tensors, scalars)
