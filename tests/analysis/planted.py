"""Tiny models with adapters whose changes are known, for the tests of what happens to adapters before they are shipped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.attach import Replacement

Fill = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Path, A and B as attached -> A and B."""


def llama(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Path:
    """Write a Llama of 2 blocks of width 64 without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, **{**sizes, **config}))
    made.to(dtype).save_pretrained(directory)
    return directory


def opened(directory: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def adapter(base: Path, directory: Path, fill: Fill, method: Any = None, **target: Any) -> Path:
    """Write an adapter of the model in `base` whose factors `fill` gives."""
    model = opened(base)
    lk.attach(model, method or lk.LoRA(r=4, alpha=8), **target)
    with torch.no_grad():
        for path, _, own in lk.adapters(model):
            if isinstance(own, Replacement):  # trained in full
                own.copy.weight.mul_(1.5)
                continue
            A, B = fill(path, own.lora_A, own.lora_B)
            own.lora_A.copy_(A)
            own.lora_B.copy_(B)
    lk.save(model, directory, base=base.name)
    return directory


def normal(seed: int = 0, size: float = 0.1) -> Fill:
    """Random factors, other ones for every layer."""
    generator = torch.Generator().manual_seed(seed)

    def fill(path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn(A.shape, generator=generator), size * torch.randn(B.shape, generator=generator)

    return fill


def basis(n: int, q: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, q, generator=generator, dtype=torch.float64))[0]


def peft_logits(base: Path, directory: Path | None, ids: Tensor) -> Tensor:
    """What transformers and PEFT make of the files, without any of our code."""
    from peft import PeftModel

    model: Any = opened(base)
    if directory is not None:
        model = PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.double()
