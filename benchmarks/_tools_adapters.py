"""Adapters that PEFT makes and saves on small random models, each with its change of one weight written out as a formula.

The change is what the layer computes with the adapter less what it computed before there was one. The formula, in float64, is
the truth of the comparison; before anything is compared with it, it is held against the layer's own output on the unit vectors.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HIDDEN, VOCABULARY = 64, 96
ATTENTION, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
AGREE = 1e-6
"""Relative distance of formula and forward pass: what float32 leaves of a base that PiSSA has changed."""

Tensors = Mapping[str, Tensor]


class Trained(NamedTuple):
    """A layer after training: its base weight (out, in), and the adapter's tensors, now and at the start, in float64."""

    base: Tensor
    now: Tensors
    start: Tensors


Change = Callable[[Tensor, Trained], Tensor]
"""(W of the original base, the trained layer) -> ΔW, (out, in) and float64."""


class Case(NamedTuple):
    """An adapter. `path`: the layer that is measured; `dtype`: of the base while it was trained."""

    title: str
    config: Callable[[], Any]
    path: str
    change: Change
    family: str = "llama"
    convert: bool = False
    dtype: torch.dtype = torch.float32


class Made(NamedTuple):
    """What a tool is given: directories, the layer's path, and the truth it is compared with."""

    adapter: Path
    base: Path
    path: str
    weight: Tensor
    change: Tensor


def low_rank(scale: float) -> Change:
    """ΔW = s·B·A."""
    return lambda W, layer: scale * layer.now["lora_B"] @ layer.now["lora_A"]


def embedding(scale: float) -> Change:
    """ΔW = s·B·A, on the one-hot vector of a token."""
    return lambda W, layer: scale * layer.now["lora_embedding_B"] @ layer.now["lora_embedding_A"]


def dora(scale: float) -> Change:
    """ΔW = m / ||V|| V - W with V = W + s·B·A, the norm of every row."""

    def change(W: Tensor, layer: Trained) -> Tensor:
        V = W + scale * layer.now["lora_B"] @ layer.now["lora_A"]
        return (layer.now["lora_magnitude_vector"] / V.norm(dim=1))[:, None] * V - W

    return change


def since_start(scale: float) -> Change:
    """ΔW = s·(B·A - B0·A0): the start was taken out of the base, which is rounded as float32 rounds."""

    def change(W: Tensor, layer: Trained) -> Tensor:
        products = [t["lora_B"] @ t["lora_A"] for t in (layer.now, layer.start)]
        return scale * (products[0] - products[1])

    return change


def on_rounded_base(scale: float) -> Change:
    """ΔW = W' + s·B·A - W: the base less the start, W', was rounded to 16 bits, and that is a part of the change."""
    return lambda W, layer: layer.base + scale * layer.now["lora_B"] @ layer.now["lora_A"] - W


def hadamard(scale: float) -> Change:
    """ΔW = s·(w1a·w1b) * (w2a·w2b), entry by entry."""

    def change(W: Tensor, layer: Trained) -> Tensor:
        t = layer.now
        return scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])

    return change


def scaled_rows(W: Tensor, layer: Trained) -> Tensor:
    """ΔW = (l - 1) W, row by row."""
    return (layer.now["ia3_l"] - 1) * W


def lora(**settings: Any) -> Callable[[], Any]:
    """Give the making of a LoraConfig, rank 12 and alpha 30 unless told."""

    def config() -> Any:
        from peft import LoraConfig

        return LoraConfig(**{"r": 12, "lora_alpha": 30, "target_modules": ["q_proj", "up_proj"], **settings})

    return config


def other(name: str, **settings: Any) -> Callable[[], Any]:
    """Give the making of another of PEFT's configurations."""

    def config() -> Any:
        import peft

        return getattr(peft, name)(**settings)

    return config


PATTERNS = {"rank_pattern": {"up_proj": 10}, "alpha_pattern": {"up_proj": 7}}
PISSA = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
CASES: dict[str, Case] = {
    "lora": Case("LoRA, alpha = 30, r = 12", lora(), ATTENTION, low_rank(30 / 12)),
    "lora-r4": Case("LoRA, alpha = r = 4", lora(r=4, lora_alpha=4), ATTENTION, low_rank(1)),
    "rslora": Case("rsLoRA, alpha = 30, r = 12", lora(use_rslora=True), ATTENTION, low_rank(30 / 12**0.5)),
    "patterns": Case("rank_pattern 10, alpha_pattern 7", lora(**PATTERNS), MLP, low_rank(7 / 10)),
    "rslora-patterns": Case("the same, rsLoRA", lora(use_rslora=True, **PATTERNS), MLP, low_rank(7 / 10**0.5)),
    "dora": Case("DoRA", lora(use_dora=True), ATTENTION, dora(30 / 12)),
    "conv1d": Case(
        "LoRA on GPT-2's Conv1D, alpha = 15",
        lora(target_modules=["c_attn"], fan_in_fan_out=True, lora_alpha=15),
        "transformer.h.0.attn.c_attn",
        low_rank(15 / 12),
        family="gpt2",
    ),
    "embedding": Case(
        "LoRA on the embedding, alpha = 2",
        lora(target_modules=["embed_tokens", "q_proj"], lora_alpha=2),
        "model.embed_tokens",
        embedding(2 / 12),
    ),
    "pissa-converted": Case("PiSSA, converted", lora(**PISSA), ATTENTION, since_start(30 / 12), convert=True),
    "pissa": Case("PiSSA, unconverted", lora(**PISSA), ATTENTION, since_start(30 / 12)),
    "pissa-bf16": Case(
        "the same, trained on a bfloat16 base", lora(**PISSA), ATTENTION, on_rounded_base(30 / 12), dtype=torch.bfloat16
    ),
    "pissa-niter": Case(
        "the same, start by randomized SVD",
        lora(**{**PISSA, "init_lora_weights": "pissa_niter_4"}),
        ATTENTION,
        since_start(30 / 12),
    ),
    "loha": Case(
        "LoHa, alpha = 5, r = 3",
        other("LoHaConfig", r=3, alpha=5, target_modules=["q_proj"]),
        ATTENTION,
        hadamard(5 / 3),
    ),
    "ia3": Case("IA3", other("IA3Config", target_modules=["q_proj"], feedforward_modules=[]), ATTENTION, scaled_rows),
}


def write_bases(directory: Path) -> dict[str, Path]:
    """Write a Llama and a GPT-2 of two layers, with random weights that bfloat16 holds exactly."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    llama = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2, num_attention_heads=4, **small
    )
    models = {
        "llama": LlamaForCausalLM(llama),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=32, **small)),
    }
    for family, model in models.items():
        model.bfloat16().float().save_pretrained(directory / family)
    return {family: directory / family for family in models}


def open_base(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load one of them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def as_applied(layer: Any, weight: Tensor) -> Tensor:
    """Give a weight, or its change, as (out, in): Conv1D and Embedding store it the other way round."""
    from transformers.pytorch_utils import Conv1D

    return weight.T if isinstance(layer, nn.Embedding | Conv1D) else weight


@torch.no_grad()
def make(case: Case, base: Path, directory: Path) -> Made:
    """Write an adapter with random tensors, as PEFT saves it. Raises ArithmeticError if the formula is not what the layer does."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = open_base(base, case.dtype)
    plain = model.get_submodule(case.path)
    weight = as_applied(plain, plain.weight.detach().double().clone())
    config = case.config()
    wrapped = get_peft_model(model, config).eval()
    start = tensors(wrapped, case.path)
    options = {}
    if case.convert:
        started = config.init_lora_weights
        config.init_lora_weights = True  # as PEFT wants the start saved that it is to take off again
        wrapped.save_pretrained(str(directory / "start"))
        config.init_lora_weights = started
        options = {"path_initial_model_for_weight_conversion": str(directory / "start")}
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(directory / "adapter"), **options)
    layer = wrapped.double().get_base_model().get_submodule(case.path)
    held = layer.get_base_layer()
    trained = Trained(as_applied(held, held.weight), tensors(wrapped, case.path), start)
    change = case.change(weight, trained)
    seen = effective(layer) - weight
    apart = float((change - seen).norm() / seen.norm())
    if not apart < AGREE:
        raise ArithmeticError(f"{case.title}: the formula differs from what the layer computes by {apart:.2g}")
    return Made(directory / "adapter", base, case.path, weight, change)


def tensors(wrapped: Any, path: str) -> Tensors:
    """Copy a layer's adapter."""
    named = wrapped.get_base_model().get_submodule(path).named_parameters()
    return {name.split(".")[0]: value.detach().double().clone() for name, value in named if ".default" in name}


def effective(layer: Any) -> Tensor:
    """Give the matrix (out, in) that a layer applies, from its outputs on the unit vectors."""
    plain = layer.get_base_layer()
    if isinstance(plain, nn.Embedding):
        return layer(torch.arange(plain.num_embeddings)).T
    inner = as_applied(plain, plain.weight).shape[1]
    out = layer(torch.eye(inner, dtype=torch.float64))
    return (out - plain.bias if plain.bias is not None else out).T
