"""Strength: γ = 0 is the base model, slopes are derivatives, what is written is what was measured, nothing is left behind."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.analysis.rescale import rescale
from lorakit.analysis.rowwise import Rows
from lorakit.analysis.skeleton import Layer
from lorakit.analysis.strength import Strength, Sweep, measure
from lorakit.analysis.strength_judgements import judged
from lorakit.core.attach import adapters, disabled
from lorakit.core.errors import UsageError
from lorakit.core.scaling import scalable, set_strength, spots
from lorakit.data.dataset import Example
from lorakit.interop.adapter_directory import load, save
from lorakit.theory.number import Kind

METHODS: dict[str, Any] = {
    "lora": lk.LoRA(r=4, dropout=0.2),
    "rslora": lk.LoRA(r=4, rank_stabilized=True),
    "pissa": lk.LoRA(r=4, init="pissa"),
    "lora_fa": lk.METHODS["lora_fa"](r=4),
    "adalora": lk.METHODS["adalora"](init_r=4, target_r=2),
    "loha": lk.METHODS["loha"](r=2),
    "lokr": lk.METHODS["lokr"](r=2),
    "vera": lk.METHODS["vera"](r=8),
    "randlora": lk.METHODS["randlora"](),
    "fourierft": lk.METHODS["fourierft"](n_frequency=64),
    "stack": lk.METHODS["stack"](parts=({"name": "lora", "r": 2}, {"name": "lokr", "r": 2})),
}
WRITTEN = sorted(set(METHODS) - {"vera", "stack"})


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64))


def adapted(method: Any, model: Any = None, **target: Any) -> Any:
    """A model whose adapter changes something, as after training."""
    model = llama() if model is None else model
    lk.attach(model, method, **target)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            for p in adapter.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
    return model


def layer_of(model: Any) -> Any:
    """What `BaseWeights.layer` says of a model on disk."""
    return lambda path: Layer("linear", model.get_submodule(path).shape())


def examples(*lengths: int, seed: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(64, (n,), generator=generator).tolist() for n in lengths]
    return [Example(own, [-100, -100, *own[2:]], None, "row") for own in ids]


def loss_at(model: Any, rows: Rows, gamma: float) -> float:
    with scalable(model, "default") as strengths, torch.no_grad():
        set_strength(strengths, gamma)
        sums = [rows.predict([i]).losses().sum() for i in range(len(rows))]
    return float(torch.stack(sums).double().sum() / rows.weights().sum())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_at_strength_zero_the_model_is_its_base_and_at_one_itself(method: Any) -> None:
    model = adapted(method).eval()
    rows = Rows(model, examples(9, 6), 0)
    with torch.no_grad():
        with disabled(model):
            base = rows.predict([0, 1]).logits
        whole = rows.predict([0, 1]).logits
        with scalable(model, "default") as strengths:
            one = rows.predict([0, 1]).logits
            set_strength(strengths, 0.0)
            zero = rows.predict([0, 1]).logits
            set_strength(strengths, 0.5)
            half = rows.predict([0, 1]).logits
        after = rows.predict([0, 1]).logits
    assert torch.equal(zero, base)
    assert torch.equal(one, whole)
    assert torch.equal(after, whole)
    assert not torch.equal(half, whole)
    assert not torch.equal(half, base)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_slope_is_the_derivative_of_the_loss_by_the_strength(method: Any) -> None:
    model = adapted(method, llama().double()).eval()
    rows = Rows(model, examples(12, 7, 9), 0)
    found = measure(model, "default", rows, None, (0.0, 0.5, 1.0))
    e = 5e-3  # transformers norms in fp32 also where the model is fp64
    central = (loss_at(model, rows, 1 + e) - loss_at(model, rows, 1 - e)) / (2 * e)
    assert found.slope.value == pytest.approx(central, rel=2e-3, abs=1e-6)
    assert found.slope.kind is Kind.EXACT
    assert sum(s.value.value for s in found.slopes.values()) == pytest.approx(found.slope.value)


def test_three_ways_to_the_slope_of_each_module_agree_and_a_wrong_backward_pass_does_not() -> None:
    model = adapted(lk.LoRA(r=4)).eval()
    rows = Rows(model, examples(12, 7, 9), 0)
    found = measure(model, "default", rows, rows, (0.0, 0.5, 1.0))
    for slope in found.slopes.values():
        assert slope.by_A == pytest.approx(slope.value.value, rel=1e-3, abs=1e-7)
        assert slope.by_B == pytest.approx(slope.value.value, rel=1e-3, abs=1e-7)
    assert found.mismatch < 1e-6
    adapter = next(adapters(model))[2]
    adapter.lora_A.requires_grad_(True)
    handle = adapter.lora_A.register_hook(lambda g: 1.1 * g)
    assert measure(model, "default", rows, None, (0.0, 0.5, 1.0)).mismatch > 1e-3
    handle.remove()


def test_the_kl_slopes_add_up_to_the_derivative_of_the_kl() -> None:
    model = adapted(lk.LoRA(r=4)).eval()
    rows = Rows(model, examples(12, 7, 9), 0)
    e = 0.02
    found = measure(model, "default", rows, rows, (0.0, 1 - e, 1.0, 1 + e))
    assert found.retain is not None
    kls = found.retain.kls()
    assert kls is not None
    assert kls[0.0].value == 0.0
    central = (kls[1 + e].value - kls[1 - e].value) / (2 * e)
    assert sum(s.kl.value for s in found.slopes.values() if s.kl) == pytest.approx(central, rel=1e-2)


def test_after_an_error_the_adapters_stand_where_they_stood() -> None:
    for model in (
        adapted(lk.LoRA(r=2)),
        adapted(lk.LoRA(r=2), gpt2(), target_modules=["c_attn.q", "c_attn.v", "c_proj"]),
    ):
        before = [(spot.path, id(spot.adapter), spot.adapter.training) for spot in spots(model, "default")]
        keys = list(model.state_dict())
        with pytest.raises(ZeroDivisionError), scalable(model, "default"):
            assert any("gamma" not in key and ".own." in key for key in model.state_dict())
            1 / 0  # noqa: B018
        assert [(spot.path, id(spot.adapter), spot.adapter.training) for spot in spots(model, "default")] == before
        assert list(model.state_dict()) == keys


def test_parts_of_a_fused_layer_each_have_their_slope() -> None:
    model = adapted(lk.LoRA(r=2), gpt2(), target_modules=["c_attn.q", "c_attn.v"]).eval()
    found = measure(model, "default", Rows(model, examples(8, 9), 0), None)
    assert list(found.slopes) == ["transformer.h.0.attn.c_attn.q", "transformer.h.0.attn.c_attn.v"]
    assert found.mismatch < 1e-6


@pytest.mark.parametrize("name", ["dora", "ia3", "oft", "hira", "molora"])
def test_a_method_without_a_strength_is_refused_with_the_reason(name: str) -> None:
    model = adapted(lk.METHODS[name]())
    with pytest.raises(UsageError, match="added to the weight"):
        measure(model, "default", Rows(model, examples(8), 0), None)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_the_adapter_at_that_strength(name: str, tmp_path: Path) -> None:
    model = adapted(METHODS[name]).eval()
    rows = Rows(model, examples(12, 7), 0)
    save(model, tmp_path / "one")
    wanted = loss_at(model, rows, 0.75)
    rescale(tmp_path / "one", tmp_path / "weaker", 0.75, layer_of(model))
    lk.detach(model)
    load(model, tmp_path / "weaker")
    model.eval()
    assert loss_at(model, rows, 1.0) == pytest.approx(wanted, rel=1e-6)
    tensors = [(tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("one", "weaker")]
    assert tensors[0] == tensors[1]


def test_patterns_of_ranks_keep_their_proportions(tmp_path: Path) -> None:
    target = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5.0}}
    model = adapted(lk.LoRA(r=4, alpha=6), **target).eval()
    rows = Rows(model, examples(12, 7), 0)
    save(model, tmp_path / "one")
    wanted = loss_at(model, rows, 0.3)
    rescale(tmp_path / "one", tmp_path / "weaker", 0.3)
    lk.detach(model)
    load(model, tmp_path / "weaker")
    assert loss_at(model.eval(), rows, 1.0) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_nothing_is_written_at_a_strength_that_is_none(gamma: float, tmp_path: Path) -> None:
    save(adapted(lk.LoRA(r=2)), tmp_path / "one")
    with pytest.raises(UsageError, match="discard"):
        rescale(tmp_path / "one", tmp_path / "other", gamma)
    save(adapted(METHODS["vera"]), tmp_path / "vera")
    with pytest.raises(UsageError):
        rescale(tmp_path / "vera", tmp_path / "other", 0.5)
    assert not (tmp_path / "other").exists()


# --- what it says about it -----------------------------------------------------------------------------------------------


def made(best: float, damage: float | None, noise: float = 0.01, n: int = 60) -> Strength:
    """A measurement whose losses are a parabola with its least point at `best`, and noise from row to row."""
    generator = torch.Generator().manual_seed(0)
    own = 1 + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    grid = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    weights = torch.full((n,), 10.0, dtype=torch.float64)
    task = Sweep(
        weights, {g: 10 * (2 + (g - best) ** 2 * own) for g in grid}, {g: g * weights for g in grid}, None, 0.0
    )
    lost = None
    if damage is not None:
        nll = {g: 10 * (1 + damage * g**2 * own) for g in grid}
        lost = Sweep(weights, nll, {g: g * weights for g in grid}, 10 * torch.ones(n, dtype=torch.float64), 0.0)
    model = adapted(lk.LoRA(r=2))
    whole = measure(model, "default", Rows(model, examples(5), 0), None, (0.0, 0.5, 1.0))
    steepness = 2 * (1 - best) * float(own.mean())
    spread = 4 * abs(1 - best) * noise / n**0.5
    slope = replace(whole.slope, value=steepness, interval=(steepness - spread, steepness + spread))
    return judged(Strength(task, lost, whole.slopes, slope, whole.mismatch, ()))


@pytest.mark.parametrize(("best", "name"), [(0.4, "too_strong"), (0.95, "strength_right"), (1.2, "undertrained")])
def test_the_best_strength_decides_between_over_and_undertrained(best: float, name: str) -> None:
    found = made(best, None)
    first = found.judgements[0]
    assert first.name == name
    about = 2 * (best - 1) / (2 * best - 1) if name == "undertrained" else best
    assert first.number.value == pytest.approx(about, rel=1e-6)
    assert first.after
    assert first.refuted_by


def test_rows_that_cannot_tell_are_said_not_to() -> None:
    found = made(0.6, None, noise=8.0)
    low, high = found.task.best().interval or (0, 0)
    assert low < 0.7 < 1 < high
    assert found.judgements[0].name == "undecided"


def test_forgetting_comes_with_the_strength_that_avoids_most_of_it() -> None:
    (forgetting,) = [j for j in made(1.0, 0.5).judgements if j.name == "forgetting"]
    assert forgetting.number.value == pytest.approx(0.5, rel=0.05)
    assert "--gamma 0.75" in forgetting.after  # gives up 1/16 of the gain, and 7/16 of the damage goes
    assert "44%" in forgetting.after
    assert [j.name for j in made(1.0, 0.0).judgements if j.name in ("forgetting", "retained")] == ["retained"]


@pytest.mark.parametrize("classify", [False, True])
def test_rows_of_a_batch_keep_their_losses_apart(classify: bool) -> None:
    if classify:
        from transformers import BertConfig, BertForSequenceClassification

        model: Any = BertForSequenceClassification(
            BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        )
        every = [Example(e.input_ids, [], i % 2, "row") for i, e in enumerate(examples(5, 9, 3))]
    else:
        model, every = llama(), examples(5, 9, 3)
    rows = Rows(model.eval(), every, 0, classes=classify)
    with torch.no_grad():
        together = rows.predict([0, 1, 2])
        sums = together.by_row(together.losses(), 3)
        alone = [float(rows.predict([i]).losses().sum()) for i in range(3)]
    assert sums.tolist() == pytest.approx(alone, rel=1e-5)
    assert sorted(i for batch in rows.batches(12) for i in batch) == [0, 1, 2]
    assert all(
        len(batch) == 1 or len(batch) * max(len(every[i].input_ids) for i in batch) <= 12 for batch in rows.batches(12)
    )


def test_modules_trained_in_full_are_left_and_named() -> None:
    model = adapted(lk.LoRA(r=2), modules_to_save=["lm_head"]).eval()
    found = measure(model, "default", Rows(model, examples(8, 9), 0), None)
    assert found.kept == ["lm_head"]
    assert found.task.base is not None
    assert found.task.mean(found.task.nll[0.0]) != pytest.approx(found.task.mean(found.task.base))


def test_the_command_measures_judges_and_writes(
    tiny_model: Path, rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli.main import run

    train, valid = rows(16), rows(12, "valid.jsonl")
    call = ["train", "-q", "--model", tiny_model, "--data", train, "--output", tmp_path / "run", "--max-steps", 3]
    assert run([str(a) for a in [*call, "--lr", 0.01, "--dtype", "float32"]]) == 0
    capsys.readouterr()
    arguments = ["strength", tmp_path / "run", "--val", valid, "--base", tiny_model, "--dtype", "float32"]
    assert run([str(a) for a in arguments]) == 0
    out = capsys.readouterr().out
    assert "retention: not measured" in out
    more = ["--retain", valid, "--output", tmp_path / "weaker", "--gamma", 0.5, "--json"]
    assert run([str(a) for a in [*arguments, *more]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"]["strength"] == 0.5
    assert found["task"]["kl"]["0"]["value"] == 0
    assert found["task"]["loss"]["0"]["value"] == found["task"]["base_loss"]
    assert found["retain"]["rows"] == 12
    half = found["task"]["loss"]["0.5"]["value"]
    assert run([str(a) for a in ["strength", tmp_path / "weaker", *arguments[2:], "--json"]]) == 0
    assert json.loads(capsys.readouterr().out)["task"]["loss"]["1"]["value"] == pytest.approx(half, rel=1e-6)


def test_every_linear_is_reached() -> None:
    model = adapted(lk.LoRA(r=2))
    assert len(list(spots(model, "default"))) == sum(isinstance(m, nn.Linear) for m in model.modules()) - 1  # the head
