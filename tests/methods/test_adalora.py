"""AdaLoRA's map: its scale, its start, and that leaving out what was pruned changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import Problem, close, perturb

AdaLoRA = lk.METHODS["adalora"]


def problem(**kwargs: Any) -> Problem:
    return Problem(AdaLoRA(**{"init_r": 5, "target_r": 2, "alpha": 6, **kwargs}))


def prune(adapter: Any, *rows: int) -> None:
    with torch.no_grad():
        adapter.kept[list(rows)] = False
        adapter.lora_E[list(rows)] = 0


def test_the_change_and_its_scale() -> None:
    p = problem()
    perturb(p.adapter)
    a = p.adapter
    s = 6 / (5 + 1e-5)
    close(p.delta, (s * a.lora_B @ torch.diag(a.lora_E[:, 0]) @ a.lora_A).detach(), 1e-7)
    close(p.model(p.x).detach() - p.base(p.x), p.x @ p.delta.T)
    exact = torch.tensor(6.0).double() / (torch.tensor(5.0).double() + 1e-5)
    close(p.delta, (exact * a.lora_B @ torch.diag(a.lora_E[:, 0]) @ a.lora_A).detach(), 1e-14)


def test_the_start_is_the_base_and_only_e_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(3000, 2000)), AdaLoRA())
    ((_, _, a),) = lk.adapters(model)
    assert not a.lora_E.any()
    for factor in (a.lora_A, a.lora_B):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.02)
    p = problem()
    assert torch.equal(p.model(p.x), p.base(p.x))
    p.backward()
    assert not p.adapter.lora_A.grad.any()
    assert not p.adapter.lora_B.grad.any()
    s, A, B = 6 / (5 + 1e-5), p.adapter.lora_A.detach(), p.adapter.lora_B.detach()
    close(p.adapter.lora_E.grad[:, 0], s * torch.einsum("oi,or,ri->r", p.gradient(), B, A), 1e-7)


def test_leaving_out_what_was_pruned_changes_nothing() -> None:
    p = problem()
    perturb(p.adapter)
    prune(p.adapter, 1, 4)
    small = p.adapter.compact()
    assert [tuple(t.shape) for t in small.parameters()] == [(3, 11), (3, 1), (7, 3)]
    close(small.delta_weight(), p.adapter.delta_weight(), 1e-15)
    assert small.config.r == 3
    assert small.config.init_r == 5


def test_a_triplet_that_came_back_is_not_left_out() -> None:
    """Between two choices the optimizer may move what the last one pruned; PEFT drops that from the file."""
    p = problem()
    perturb(p.adapter)
    prune(p.adapter, 1, 4)
    with torch.no_grad():
        p.adapter.lora_E[4] = 0.3
    assert p.adapter.compact().config.r == 4
    close(p.adapter.compact().delta_weight(), p.adapter.delta_weight(), 1e-15)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Conv2d(2, 4, 3), nn.Embedding(9, 6), nn.Linear(5, 9))


def test_what_is_saved_is_what_is_left(tmp_path: Path) -> None:
    """On every kind of layer, down to rank 0; and an adapter that was not trained yet is saved whole."""
    model = lk.attach(network(), AdaLoRA(init_r=4, target_r=2), target_modules=["0", "1", "2", "3"])
    lk.save(model, tmp_path / "start")
    fresh = lk.load(network(), tmp_path / "start", trainable=True)
    assert [len(a.lora_E) for _, _, a in lk.adapters(fresh)] == [4, 4, 4, 4]
    perturb(model)
    adapters = [a for _, _, a in lk.adapters(model)]
    for adapter, gone in zip(adapters, [(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (2,)], strict=True):
        prune(adapter, *gone)
    lk.save(model, tmp_path / "pruned")
    tensors = safetensors.torch.load_file(tmp_path / "pruned" / "adapter_model.safetensors")
    assert [len(tensors[f"base_model.model.{i}.lora_E"]) for i in range(4)] == [0, 0, 0, 3]
    other = network()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    lk.load(other, tmp_path / "pruned")
    for i, x in enumerate([torch.randn(3, 12), torch.randn(1, 2, 5, 5), torch.tensor([1, 4]), torch.randn(3, 5)]):
        torch.testing.assert_close(other[i](x), model[i](x), rtol=1e-6, atol=1e-6)
    assert [len(a.lora_E) for _, _, a in lk.adapters(model)] == [4, 4, 4, 4], "saving does not shrink what is trained"


def test_layers_may_start_with_less() -> None:
    model = lk.attach(network(), AdaLoRA(init_r=4, target_r=2), target_modules=["0", "3"], rank_pattern={"3": 2})
    assert [len(a.lora_E) for _, _, a in lk.adapters(model)] == [4, 2]
    assert {float(a.ranknum) for _, _, a in lk.adapters(model)} == {4.0}
    with pytest.raises(UsageError, match="alpha_pattern"):
        lk.attach(network(), AdaLoRA(), target_modules=["0", "3"], alpha_pattern={"3": 2.0})


@pytest.mark.parametrize(
    "bad", [{"init_r": 0}, {"target_r": 13}, {"target_r": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"r": 13}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="r must be" if "init_r" in bad else next(iter(bad))):
        AdaLoRA(**bad)
