"""The same starts by PEFT: B·A equal, the factors up to sign. PEFT moves the base weight, so it gets a copy."""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.calibrate import calibrate
from lorakit.init.eva import ranks

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

R, ALPHA = 3, 6


class Net(nn.Module):
    """Two layers that see the same input and one that does not, called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(20, 16), nn.Linear(20, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    # Positive somewhere and spread unevenly: CorDA in PEFT divides by the maximum, EVA wants distinct variances.
    return torch.randn(120, 20) * torch.linspace(0.2, 3, 20) + 0.5


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def theirs(net: Net, start: Any, **config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q", "k", "o"], "init_lora_weights": start, **config}
    return of_peft(peft.get_peft_model(net, peft.LoraConfig(**options)))


def of_peft(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            factors = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[path.removeprefix("base_model.model.")] = tuple(f.detach() for f in factors)
    return found


def ours(net: Net, start: str, x: Tensor, **target: Any) -> dict[str, tuple[Tensor, Tensor]]:
    method = lk.LoRA(r=R, alpha=ALPHA, init=start)
    needs = vars(lk.INITS.module(start)).get("NEEDS")
    statistics = calibrate(net, method, [x], loss, **target) if needs else {}
    lk.attach(net, method, statistics=statistics, **target)
    found = {}
    for path, _, adapter in lk.adapters(net):
        live = adapter if isinstance(adapter, lk.METHODS.module("lora").LoRAAdapter) else adapter.live
        found[path] = live.lora_A.detach(), live.lora_B.detach()
    return found


def same_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a[1] @ a[0], b[1] @ b[0], rtol=tolerance, atol=tolerance)


def same_rows(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to the sign of each row."""
    signs = (a * b).sum(1, keepdim=True).sign()
    torch.testing.assert_close(a, signs * b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("start", "name"), [("pissa", "pissa"), ("pissa_niter_16", "pissa_fast"), ("olora", "olora")])
def test_starts_from_the_weight(net: Net, x: Tensor, start: str, name: str) -> None:
    fast = {"tolerance": 2e-2} if name == "pissa_fast" else {}  # PEFT's sketch has r columns, ours more
    mine, other = ours(copy.deepcopy(net), name, x), theirs(net, start)
    assert mine.keys() == other.keys() == {"q", "k", "o"}
    for path, factors in mine.items():
        same_product(factors, other[path], **fast)
        if not fast:
            same_rows(factors[0], other[path][0])
            same_rows(factors[1].T, other[path][1].T)


@pytest.mark.parametrize(("mode", "name"), [("ipm", "corda"), ("kpm", "corda_kpm")])
def test_corda(net: Net, x: Tensor, mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT takes `dataclass` from attrs there, which it does not require.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    mine = ours(copy.deepcopy(net), name, x)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q", "k", "o"], "init_lora_weights": "corda"}
    settings = peft.LoraConfig(**config, corda_config=CordaConfig(corda_method=mode))
    preprocess_corda(net, settings, run_model=lambda: net(x))
    other = of_peft(peft.get_peft_model(net, settings))
    for path, factors in mine.items():
        same_product(factors, other[path], 2e-3)  # V^T C^-1 in fp32, from inputs that PEFT scales by their maximum
        ratio = factors[0].norm() / other[path][0].norm()  # that scale is also what the factors' balance differs by
        same_rows(factors[0], ratio * other[path][0], 5e-3)


def test_lora_ga(net: Net, x: Tensor) -> None:
    """The same directions; PEFT's B has the singular values besides, so the product differs by a factor in each."""
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    mine = ours(copy.deepcopy(net), "lora_ga", x)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q", "k", "o"], "init_lora_weights": "lora_ga"}
    settings = peft.LoraConfig(
        **config, lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)
    )
    preprocess_loraga(net, settings, train_step=lambda: loss(net, x).backward())
    other = of_peft(peft.get_peft_model(net, settings))
    for path, (A, B) in mine.items():
        same_rows(A / A.norm(dim=1, keepdim=True), other[path][0], 1e-3)
        theirs = other[path][1].T
        same_rows(B.T / B.norm(dim=0)[:, None], theirs / theirs.norm(dim=1, keepdim=True), 1e-3)


@pytest.mark.parametrize("rho", [1.0, 2.0, 5.0])
def test_eva(net: Net, x: Tensor, rho: float) -> None:
    """Ranks and directions. PEFT's incremental PCA sees the same rows again and again, so it settles on their PCA."""
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q", "k", "o"], "init_lora_weights": "eva"}
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)  # noqa: E731
    other = get_eva_state_dict(
        copy.deepcopy(net), [x], peft.LoraConfig(**options, eva_config=EvaConfig(rho=rho)), forward_fn=forward,
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    method = lk.LoRA(r=R, alpha=ALPHA, init="eva")
    statistics = calibrate(net, method, [x], loss)
    chosen = ranks(statistics, R, rho)
    assert sum(chosen.values()) == 3 * R
    assert sorted(chosen.values()) == sorted(
        len(A) for A in other.values()
    )  # q and k see the same: either may get more
    assert chosen["o"] == len(other["o"])
    kept = {path: r for path, r in chosen.items() if r}
    lk.attach(net, method, statistics=statistics, target_modules=list(kept), rank_pattern=kept)
    for path, _, adapter in lk.adapters(net):
        A, reference = adapter.lora_A.detach(), other[path].float()
        shared = min(len(A), len(reference))
        same_rows(A[:shared], reference[:shared], 5e-3 if rho > 1 else 5e-2)  # PEFT's sketch grows with rho
