"""HiRA against its closed forms and PEFT's layers; and what training with it keeps."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import Problem, close, perturb
from .test_loha import kept

HiRA = lk.METHODS["hira"]


def test_every_entry_of_w_has_its_own_factor() -> None:
    p = Problem(HiRA(r=2))
    perturb(p.adapter)
    A, B = p.adapter.hira_A.detach(), p.adapter.hira_B.detach()
    close(p.merged, p.W * (1 + B @ A))
    for mode in (True, False):
        close(p.model.train(mode)(p.x).detach(), p.x @ p.merged.T + p.layer.bias.detach())


def test_lora_s_parameters_and_a_full_rank() -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Linear(40, 50)).double(), HiRA(r=1))
    ((_, layer, a),) = lk.adapters(model)
    perturb(a)
    W = layer.matrix()
    assert int(torch.linalg.matrix_rank(a.merge(W) - W, rtol=1e-10)) == 40
    assert lk.summary(model).trainable == 40 + 50
    one = torch.outer(torch.randn(50).double(), torch.randn(40).double())  # here r is all: it is W that gives the rank
    assert int(torch.linalg.matrix_rank(a.merge(one) - one, rtol=1e-10)) == 1


def test_the_first_gradient_and_the_first_step() -> None:
    p = Problem(HiRA(r=2))
    assert torch.equal(p.model(p.x), p.base(p.x))
    p.backward()
    A, weighted = p.adapter.hira_A.detach(), p.gradient() * p.W
    close(p.adapter.hira_B.grad, weighted @ A.T)
    assert not p.adapter.hira_A.grad.any()
    torch.optim.SGD(p.parameters(), lr=1e-2).step()
    close(p.delta, -1e-2 * p.W * (weighted @ A.T @ A))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_anywhere(training: bool) -> None:
    p = Problem(HiRA(r=2))
    perturb(p.adapter)
    p.model.train(training)
    p.backward()
    weighted = p.gradient() * p.W
    close(p.adapter.hira_A.grad, p.adapter.hira_B.detach().T @ weighted)
    close(p.adapter.hira_B.grad, weighted @ p.adapter.hira_A.detach().T)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(120, 100), lambda: torch.randn(3, 120)),
    "conv1d_gpt2": (lambda: Conv1D(100, 120), lambda: torch.randn(3, 120)),
    "embedding": (lambda: nn.Embedding(120, 100), lambda: torch.randint(0, 120, (3,))),
    "conv2d": (lambda: nn.Conv2d(30, 40, 3), lambda: torch.randn(1, 30, 5, 5)),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_training_keeps_no_matrix_of_the_size_of_w(layer: str, dropout: float) -> None:
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(make()), HiRA(r=4, dropout=dropout), target_modules=["0"]).train()
    perturb(model[0].adapters)
    assert kept(model, inputs()) < model[0].weight.numel() // 4


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_dropout_is_pefts(layer: str) -> None:
    """The same random numbers: y = W x + (W ⊙ B A) dropout(x)."""
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    ours, x = nn.Sequential(make()), inputs()
    theirs = nn.Sequential(make())
    theirs.load_state_dict(ours.state_dict())
    lk.attach(ours, HiRA(r=4, dropout=0.4), target_modules=["0"])
    theirs = peft.get_peft_model(theirs, peft.HiraConfig(r=4, hira_dropout=0.4, target_modules=["0"]))
    ((_, _, a),) = lk.adapters(ours)
    perturb(a)
    other: Any = theirs.base_model.model[0]
    with torch.no_grad():
        for name, p in a.named_parameters():
            their = getattr(other, name)["default"]
            their.copy_(p.reshape(their.shape))
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], ours.eval()(x), atol=1e-2)


def test_of_a_4_bit_layer_it_changes_what_is_read() -> None:
    pytest.importorskip("bitsandbytes")
    from lorakit.models.quantize import quantize

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "nf4")
    lk.attach(model, HiRA(r=3))
    ((_, base, a),) = lk.adapters(model)
    perturb(a)
    x = torch.randn(5, 64)
    expected = x @ (base.matrix() * (1 + a.hira_B @ a.hira_A)).T + base.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_start_where_they_can_learn() -> None:
    torch.manual_seed(0)
    model = lk.attach(nn.Sequential(nn.Embedding(30, 16)), HiRA(r=4), target_modules=["0"])
    ((_, _, a),) = lk.adapters(model)
    assert not a.hira_A.any()
    model(torch.tensor([1, 5, 5])).square().sum().backward()
    assert set(a.hira_A.grad.abs().sum(0).nonzero().flatten().tolist()) == {1, 5}


@pytest.mark.parametrize("bad", [{"r": 0}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        HiRA(**bad)
