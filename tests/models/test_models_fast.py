"""The fast way through a model is the ordinary way: for every family, in values, gradients and in what it leaves alone."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.kernels.low_rank import plain
from lorakit.models.blocks import FAMILIES, FastBlock, swap_back
from lorakit.models.fast import ORDINARY, accelerate
from lorakit.models.modes import checkpoint_activations
from lorakit.models.packing import enable_packing

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaDecoderLayer": ("Llama", {}),
    "MistralDecoderLayer": ("Mistral", {"sliding_window": 4}),
    "Qwen2DecoderLayer": ("Qwen2", {}),
    "Qwen3DecoderLayer": ("Qwen3", {}),
    "GemmaDecoderLayer": ("Gemma", {}),
    "Gemma2DecoderLayer": ("Gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "Gemma3DecoderLayer": ("Gemma3", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
}
LENGTHS = [7, 3, 9]


def build(layer: str = "LlamaDecoderLayer", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    name, settings = MODELS[layer]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **settings, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too, or a forgotten one would not show
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def adapt(model: nn.Module, method: Any, **where: Any) -> nn.Module:
    lk.attach(model, method, **where)
    torch.manual_seed(1)
    for _, _, adapter in lk.adapters(model):
        for p in adapter.parameters():
            p.data += torch.randn_like(p) * 0.1
    return model.train()


def step(model: Any, fast: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the loss of three packed documents, and all gradients."""
    torch.manual_seed(2)
    ids = torch.randint(64, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    rows = torch.tensor([0, 2, 5, 8, 12, 17])
    model.zero_grad()
    inputs = {"input_ids": ids[None], "position_ids": positions[None]}
    loss = fast.loss(model, inputs, rows, ids[rows + 1], lengths=LENGTHS)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: Any, tolerance: float = 1e-5) -> Any:
    """The fast step and the ordinary one agree in every gradient; gives what is fast. transformers norms in fp32: 1e-5."""
    assert enable_packing(model)
    with plain():
        expected, gradients = step(model, ORDINARY)
    fast = accelerate(model)
    loss, found = step(model, fast)
    assert abs(loss - expected) <= tolerance * abs(expected)
    assert found.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
    return fast


def test_every_family_has_a_model_here() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("layer", MODELS)
def test_the_fast_step_is_the_ordinary_step(layer: str) -> None:
    capped = layer == "Gemma2DecoderLayer"  # transformers' way of it makes NaN of fp64
    model = build(layer, torch.float32 if capped else torch.float64)
    fast = assert_same_step(adapt(model, lk.LoRA(r=3, alpha=5)), 1e-4 if capped else 1e-5)
    assert (fast.blocks, fast.of) == (3, 3)
    assert fast.head != capped  # it caps its logits too


METHODS = [
    lk.LoRA(r=3, rank_stabilized=True),
    lk.LoRA(r=3, init="pissa"),
    lk.METHODS["lora_fa"](r=3),
    lk.METHODS["dora"](r=3),
    lk.METHODS["adalora"](init_r=4, target_r=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_low_rank_method_runs_fused(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(build(), method)
    assert_same_step(model)
    fused = []
    monkeypatch.setattr(FastBlock, "fused", lambda self, *a, **k: fused.append(self) or FastBlock_fused(self, *a, **k))
    step(model, ORDINARY)
    assert len(fused) == 3


FastBlock_fused = FastBlock.fused


@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"last_n_layers": 1},
        {"target_modules": "all-linear", "rank_pattern": {"v_proj": 5}},
        {"modules_to_save": ["layers.1.mlp.up_proj"], "target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_any_choice_of_layers(where: dict[str, Any]) -> None:
    assert_same_step(adapt(build(), lk.LoRA(r=3), **where))


def test_dropout_draws_what_the_ordinary_way_draws() -> None:
    """Except in the last block, which draws for the rows that it computes."""
    assert_same_step(adapt(build(), lk.LoRA(r=3, dropout=0.3), layers=[0, 1]))


def test_other_methods_run_the_ordinary_way() -> None:
    fast = assert_same_step(adapt(build(), lk.METHODS["vera"](r=8)))
    assert fast.blocks == 0 and "blocks run the ordinary way" in fast.words


def test_checkpointing_agrees() -> None:
    model = adapt(build(), lk.LoRA(r=3))
    checkpoint_activations(model)
    assert_same_step(model)


def test_in_fp32_the_step_is_within_1e_4_of_the_ordinary_one() -> None:
    assert_same_step(adapt(build(dtype=torch.float32), lk.LoRA(r=3)), 1e-4)


def test_in_bf16_the_error_against_fp32_is_no_larger_than_the_ordinary_ways() -> None:
    exact = adapt(build(dtype=torch.float32), lk.LoRA(r=3))
    enable_packing(exact)
    with plain():
        _, truth = step(exact, ORDINARY)
    model = adapt(build(dtype=torch.float32).bfloat16(), lk.LoRA(r=3))
    model.load_state_dict(exact.state_dict())
    enable_packing(model)
    with plain():
        _, ordinary = step(model, ORDINARY)
    _, found = step(model, accelerate(model))
    errors = [sum(float((g[n] - truth[n]).norm() / truth[n].norm()) for n in truth) for g in (found, ordinary)]
    assert errors[0] <= 1.1 * errors[1]


def test_a_hook_sees_its_layer_run() -> None:
    model = adapt(build(), lk.LoRA(r=3))
    fast, seen = accelerate(model), []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: seen.append(1))
    enable_packing(model)
    step(model, fast)
    assert seen


def test_evaluation_and_generation_are_transformers_own() -> None:
    model = adapt(build(), lk.LoRA(r=3)).eval()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    accelerate(model)
    assert torch.equal(model(ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 13)


def test_the_models_keys_and_modes_stay() -> None:
    model = adapt(build(), lk.LoRA(r=3))
    keys, modes = list(model.state_dict()), [m.training for m in model.modules()]
    accelerate(model)
    assert list(model.state_dict()) == keys and [m.training for m in model.modules()] == modes
    swap_back(model)
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


def test_a_block_that_does_something_else_is_left_alone() -> None:
    """Its class has the name of a known one, its forward another meaning: the proof fails, and nothing is changed."""
    model = build().requires_grad_(False)

    class LlamaDecoderLayer(type(model.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    model.model.layers[1].__class__ = LlamaDecoderLayer
    fast = accelerate(model)
    assert fast.blocks == 0 and "ordinary" in fast.words
    assert not any(isinstance(m, FastBlock) for m in model.modules())


def test_a_head_that_is_trained_gives_its_logits() -> None:
    model = adapt(build(tie_word_embeddings=False), lk.LoRA(r=3), modules_to_save=["lm_head"])
    assert not assert_same_step(model).head


def test_only_the_last_blocks_needed_rows_are_computed() -> None:
    model = adapt(build(), lk.LoRA(r=3))
    enable_packing(model)
    fast = accelerate(model)
    shapes = []
    model.model.norm.register_forward_hook(lambda m, a, out: shapes.append(out.shape[1]))
    step(model, fast)
    assert shapes == [6]


def test_a_model_of_another_kind_runs_as_it_is() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).double()
    assert_same_step(adapt(model, lk.LoRA(r=2)))


def test_copying_a_fast_model_copies_it() -> None:
    model = adapt(build(), lk.LoRA(r=3))
    fast = accelerate(model)
    other = copy.deepcopy(model)
    enable_packing(model), enable_packing(other)
    assert torch.equal(step(model, fast)[0], step(other, fast)[0])
