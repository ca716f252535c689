"""The arm of PEFT: the plain loop that its users write. Imports nothing of lorakit but the work.

What can be tuned without changing PEFT is: AdamW in torch's fused form, no cache, no mask where nothing is padded.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .clock import Arm
from .work import Work


def build(work: Work, scratch: Path, *, autocast: bool = True) -> Arm:
    """Give the plain loop of a wrapped model; see `wrap`."""
    model, vocabulary = wrap(work, autocast=autocast)
    return plain_loop(model, work, vocabulary, factors(model))


def wrap(work: Work, *, autocast: bool = True) -> tuple[Any, int]:
    """Load the model with transformers and wrap it with PEFT; gives it, ready to train, and its vocabulary's size.

    autocast: PEFT's own default, factors in float32; False puts them in the base's dtype.
    """
    model, config = load(work)
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=work.rank,
        lora_alpha=work.alpha,  # ty: ignore[invalid-argument-type]  PEFT says int and takes any number
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=work.method == "dora",
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=autocast).train(), config.vocab_size


def load(work: Work) -> tuple[Any, Any]:
    """Give the base model in the work's dtype, and its configuration."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype), local_files_only=True)
    return model.to(work.device), model.config.get_text_config()


def plain_loop(model: nn.Module, work: Work, vocabulary: int, factors: dict[str, nn.Parameter]) -> Arm:
    """Give the loop of a model whose trainable parameters are set: its own loss, backward, clip, AdamW."""
    rows = work.rows(vocabulary)
    inputs, labels = (torch.tensor(ids, device=work.device) for ids in (rows, work.labelled(rows)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> tuple[float, float]:
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return Arm(step, optimizer, factors)


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name PEFT's `base_model.model.<path>.lora_A.default.weight` as `<path>/lora_A`."""
    found = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            found[f"{path}/{leaf}"] = parameter
    return found
