"""BitFit: training its changes is training the biases, and nothing else."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.core.errors import UsageError

from .problem import Problem, close, perturb

BitFit = lk.METHODS["bitfit"]


def test_steps_are_those_of_the_bias_itself() -> None:
    p = Problem(BitFit())
    plain = copy.deepcopy(p.base)
    plain[0].weight.requires_grad_(False)
    mine = torch.optim.SGD(p.parameters(), lr=1e-2)
    theirs = torch.optim.SGD([plain[0].bias], lr=1e-2)
    for _ in range(10):
        p.backward()
        close(p.adapter.bias.grad, p.error().sum(0))
        mine.step()
        theirs.zero_grad()
        (0.5 * (plain(p.x) - p.y).square().sum()).backward()
        theirs.step()
    close(p.model(p.x), plain(p.x))
    lk.merge(p.model)
    close(p.layer.bias, plain[0].bias)
    assert torch.equal(p.layer.weight, plain[0].weight)


def test_only_biases_are_counted() -> None:
    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
    )
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    lk.attach(model, BitFit())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(m.out_features for m in linear)


def test_layers_without_a_bias_are_named_and_the_model_is_left_alone() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
    with pytest.raises(UsageError, match="no bias") as refusal:
        lk.attach(model, BitFit())
    assert "model.layers.1.mlp.down_proj" in str(refusal.value.where)
    assert "self_attn" not in str(refusal.value.where)
    assert lk.names(model) == []
    assert not any("adapters" in key for key in model.state_dict())
    lk.attach(model, BitFit(), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def test_parts_of_a_fused_layer_change_their_own_entries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30))
    base = copy.deepcopy(model)
    lk.attach(model, BitFit(), target_modules=["0.q", "0.v"], fused={"0": {"q": 10, "k": 10, "v": 10}})
    ((_, _, adapter),) = lk.adapters(model)
    perturb(adapter)
    x = torch.randn(4, 12)
    change = torch.cat([adapter.parts["q"].bias, torch.zeros(10), adapter.parts["v"].bias])
    torch.testing.assert_close(model(x), base(x) + change)
    lk.merge(model)
    torch.testing.assert_close(model[0].bias, base[0].bias + change)
