"""A base in 4 bits from the plan to the merged model: every command sees the base that was trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, orders_file: Path) -> tuple[Path, list[str]]:
    from lorakit.cli.main import run

    output = tmp_path_factory.mktemp("runs") / "nf4"
    named = ["--model", tiny_model, "--data", orders_file, "--output", output]
    settings = ["--dtype", "float32", "model.quantize=nf4", "r=4", "lr=0.05", "max_steps=4", "method.init=loftq"]
    flags = [*map(str, named), *settings]
    assert run(["train", "-q", *flags]) == 0
    return output, flags


def test_the_plan_counts_the_stored_bytes(lorakit: Callable[..., Any], quantized: tuple[Path, list[str]]) -> None:
    from lorakit.models.load import load
    from lorakit.models.quantize import quantize, stored_bytes

    _, flags = quantized
    found = lorakit("plan", "--json", *flags)
    assert found.code == 0, found.err
    model = load(flags[1], dtype="float32").model
    quantize(model, "nf4")
    plan = json.loads(found.out)
    assert plan["memory_bytes"]["weights"] == stored_bytes(model) + 4 * 21  # and each adapter's scale
    assert plan["total"] > sum(p.numel() for p in model.parameters()), "parameters are counted, not packed bytes"


def test_the_adapter_is_used_on_the_base_it_was_trained_on(
    lorakit: Callable[..., Any], quantized: tuple[Path, list[str]], orders_file: Path
) -> None:
    from lorakit.cli.opened import open_model

    run, _ = quantized
    opened = open_model(str(run), dtype="float32")
    assert type(opened.model.model.layers[0].mlp.up_proj.weight).__name__ == "Params4bit"
    found = lorakit("eval", run, "--data", orders_file, "--json")
    assert found.code == 0, found.err
    assert lorakit("generate", run, "--prompt", "two teas", "--max-tokens", 3).code == 0


def test_the_merged_model_answers_like_the_quantized_base_with_its_adapter(
    lorakit: Callable[..., Any], quantized: tuple[Path, list[str]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from lorakit.cli.opened import open_model

    run, _ = quantized
    found = lorakit("merge", run, "--output", tmp_path / "merged", "--dtype", "float32", "--json")
    assert found.code == 0, found.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    opened, ids = open_model(str(run), dtype="float32"), torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, opened.model(ids).logits, rtol=1e-4, atol=1e-4)
        lk.use(opened.model, None)
        assert (merged(ids).logits - opened.model(ids).logits).abs().max() > 1e-2


def test_a_missing_package_is_named_before_anything_is_loaded(
    lorakit: Callable[..., Any], quantized: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else real(n, *a))
    found = lorakit("plan", *quantized[1])
    assert (found.code, "lorakit[quant]" in found.err) == (2, True)
