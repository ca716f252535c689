"""Does the merged model answer like base and adapter? Logits and weights before and after, in numbers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

    from .opened import Opened

PROMPTS = (
    "Explain in one sentence what a lighthouse is for.",
    "two medium green teas, the name's Maya",
    "Write a short function that reverses a list.",
)


def stored_dtype(path: Path) -> str:
    """Give the number format of a base model's files: bfloat16 for any 16-bit one, else float32."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if named in ("bfloat16", "float16") else "float32"


def fold(opened: "Opened", dtype: str) -> dict[str, Any]:
    """Merge the adapter of a float32 model, round the weights to `dtype`, and measure what that did.

    max_logit_difference: largest |logit of base and adapter - logit of the merged model| over the prompts
    top1_agreement: share of positions where both have the same likeliest token
    relative_delta_error: |W_merged - W| / |W - W_base| over all adapted weights, W = W_base + delta (Frobenius norm)
    weights_changed: share of the adapted weights that differ from the base's
    """
    import torch

    from ..core.attach import adapters
    from ..core.merge import merge
    from .opened import ADAPTER

    model = opened.model
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    expected = logits(opened)
    layers = [layer for _, layer, _ in adapters(model, ADAPTER)]
    before = [{key: p.detach().clone() for key, p in base_weights(layer)} for layer in layers]
    merge(model, ADAPTER, keep=False)
    total = {"delta": 0.0, "error": 0.0, "weights": 0, "changed": 0, "layers": 0}
    with torch.no_grad():
        for layer, olds in zip(layers, before, strict=True):
            changed = 0
            for key, new in base_weights(layer):
                old, rounded = olds[key], new.to(kind).float()
                total["delta"] += float((new.double() - old).square().sum())
                total["error"] += float((rounded.double() - new).square().sum())
                changed += int((rounded != old.to(kind).float()).sum())
                total["weights"] += new.numel()
            total["changed"] += changed
            total["layers"] += changed > 0
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind).float()
    found = logits(opened)
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(expected, found, strict=True)]
    return {
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)),
        "max_logit": max(float(a.abs().max()) for a in expected),
        "top1_agreement": sum(same) / len(same),
        "relative_delta_error": (total["error"] / total["delta"]) ** 0.5 if total["delta"] else 0.0,
        "weights_changed": total["changed"] / max(total["weights"], 1),
        "layers_changed": total["layers"],
        "layers": len(layers),
    }


def logits(opened: "Opened") -> "list[torch.Tensor]":
    """Give the model's logits for the prompts, each by itself."""
    import torch

    from ..models import encode_prompt

    model, answers = opened.model, []
    for text in PROMPTS:
        ids = torch.tensor([encode_prompt(opened.tokenizer, cast(Any, opened.prompt(text)))], device=model.device)
        with torch.inference_mode():
            answers.append(model(input_ids=ids).logits.float().flatten(0, -2))
    return answers


def base_weights(layer: Any) -> list[tuple[str, "torch.Tensor"]]:
    """Give the layer's own parameters, those of its adapters left out."""
    return [(key, p) for key, p in layer.named_parameters() if not key.startswith("adapters.")]
