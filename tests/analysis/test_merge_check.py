"""Merging into few bits: the measured numbers are those of the weights that merging writes, the predicted ones those of the table."""

from pathlib import Path

import pytest
import torch
from planted import adapter, llama, normal, opened

import lorakit as lk
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.loaded import load_adapter
from lorakit.analysis.merge_check import MergeCheck, merge_check
from lorakit.core.errors import UsageError
from lorakit.theory import rounding


def of_norm(rho: float):
    """Random factors whose change is rho of the weights of a fresh Llama (deviation 0.02) in every layer."""
    draw = normal()

    def fill(path, A, B):
        A, B = draw(path, A, B)
        size = 0.02 * (len(B) * A.shape[1]) ** 0.5
        return A, B * (rho * size / float((2.0 * B @ A).norm()))

    return fill


def checked(tmp_path: Path, rho: float, dtype: str, stored: torch.dtype = torch.bfloat16, **more) -> MergeCheck:
    base = llama(tmp_path / "base", stored)
    made = adapter(base, tmp_path / "a", of_norm(rho), lk.LoRA(r=32, alpha=64), **more)  # entries about normal
    weights = BaseWeights(base)
    return merge_check(load_adapter(made, weights.layer), weights, dtype)


@pytest.mark.parametrize(("rho", "error", "retained"), [(1e-4, 0.973, 0.078), (1e-2, 0.164, 0.999)])
def test_a_bfloat16_base_keeps_what_the_table_says(tmp_path: Path, rho: float, error: float, retained: float) -> None:
    """The table is of a layer of SmolLM2; at its ends normal weights, which have other spacings, lose the same."""
    found = checked(tmp_path, rho, "bf16")
    assert found.numbers["noise"].value == pytest.approx(error, rel=0.03)
    assert found.numbers["retained"].value == pytest.approx(retained, abs=0.03)
    for name in ("noise", "retained"):
        assert found.numbers[f"predicted_{name}"].value == pytest.approx(found.numbers[name].value, abs=0.02)
    assert found.ok == (rho == 1e-2)
    assert len(found.modules) == 14


def test_the_measured_numbers_are_those_of_the_merged_model(tmp_path: Path) -> None:
    found = checked(tmp_path, 2e-3, "bf16", target_modules=["q_proj", "down_proj"])
    model = opened(tmp_path / "base")
    lk.load(model, tmp_path / "a")
    before = {path: layer.weight.detach().clone() for path, layer, _ in lk.adapters(model)}
    delta = {path: own.delta_weight().detach() for path, _, own in lk.adapters(model)}
    lk.merge(model)
    assert {m.module.path for m in found.modules} == set(before)
    for m in found.modules:
        path = m.module.path
        left = model.get_submodule(path).weight.bfloat16().double() - before[path].double()
        wanted = rounding.compare(left, delta[path])
        assert m.numbers["retained"].value == pytest.approx(wanted.retained, rel=1e-6)
        assert m.numbers["noise"].value == pytest.approx(wanted.error, rel=1e-6)
        assert m.numbers["unchanged"].value == wanted.unchanged
        again = (before[path].double() + left - delta[path].double()).bfloat16().double() - before[path].double()
        assert m.numbers["unmerge_damage"].value == pytest.approx(float(again.norm() / delta[path].norm()), rel=1e-6)
    energies = [m.energy for m in found.modules]
    pooled = sum(m.numbers["retained"].value * e for m, e in zip(found.modules, energies, strict=True)) / sum(energies)
    assert found.numbers["retained"].value == pytest.approx(pooled)
    noises = [m.numbers["noise"].value for m in found.modules]
    assert noises == sorted(noises, reverse=True), "worst first"


@pytest.mark.parametrize("rho", [1e-3, 1e-2])
def test_a_float32_base_is_predicted_by_the_form_for_weights_off_the_grid(tmp_path: Path, rho: float) -> None:
    found = checked(tmp_path, rho, "bf16", torch.float32)
    assert found.numbers["retained"].value == pytest.approx(1, abs=0.03), "right on average, and noisy"
    assert found.numbers["noise"].value == pytest.approx(found.numbers["predicted_noise"].value, rel=0.03)
    assert not found.ok
    for m in found.modules:
        assert m.numbers["unchanged"].value == pytest.approx(m.numbers["predicted_unchanged"].value, abs=0.02)


def test_other_dtypes(tmp_path: Path) -> None:
    found = checked(tmp_path, 1e-3, "fp16")
    assert found.numbers["noise"].value == pytest.approx(0.203, rel=0.03)
    assert found.elsewhere["bf16"].value == pytest.approx(0.79, abs=0.02)
    assert found.elsewhere["fp32"].value < 1e-3
    assert not found.ok


def test_a_weight_that_overflows_is_no_pass(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.bfloat16)

    def huge(path, A, B):
        return torch.full_like(A, 100.0), torch.full_like(B, 100.0)

    made = adapter(base, tmp_path / "a", huge, target_modules=["q_proj"])
    found = merge_check(load_adapter(made), BaseWeights(base), "fp16")
    assert not found.ok
    assert "overflow" in " ".join(found.notes)


def test_nf4_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Params4bit

    from lorakit.core.weight import dense

    found = checked(tmp_path, 0.05, "nf4", target_modules=["o_proj"])
    base, adapted = BaseWeights(tmp_path / "base"), load_adapter(tmp_path / "a")

    def nf4(values: torch.Tensor) -> torch.Tensor:
        return dense(
            Params4bit(values.float().contiguous(), quant_type="nf4", compress_statistics=True).to("cpu")
        ).double()

    energy = error = 0.0
    for module, W in base.stream(adapted):
        delta = module.delta()
        left = nf4(W.double() + delta) - nf4(W)
        energy, error = energy + float(delta.square().sum()), error + float((left - delta).square().sum())
    assert found.numbers["noise"].value == pytest.approx((error / energy) ** 0.5, rel=1e-6)
    assert found.numbers["noise"].value > 1
    assert "predicted_noise" not in found.numbers


def test_an_embedding_and_dora_are_measured_by_their_own_change(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.bfloat16)
    weights = BaseWeights(base)
    made = adapter(base, tmp_path / "a", normal(size=0.01), lk.DoRA(r=4), target_modules=["q_proj"])
    model = opened(base)
    lk.load(model, made)
    wanted = {p: own.merge(layer.weight).detach() - layer.weight.detach() for p, layer, own in lk.adapters(model)}
    found = merge_check(load_adapter(made), weights, "bf16")
    for m in found.modules:
        assert m.energy == pytest.approx(float(wanted[m.module.path].double().square().sum()), rel=1e-5)
    table = adapter(base, tmp_path / "e", normal(size=0.01), target_modules=["embed_tokens"])
    (own,) = merge_check(load_adapter(table), weights, "bf16").modules
    assert own.module.shape == (64, 128)
    assert own.numbers["noise"].value == pytest.approx(own.numbers["predicted_noise"].value, abs=0.03)


def test_what_is_no_change_of_a_matrix_cannot_be_merged(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    model = opened(base)
    lk.attach(model, lk.Houlsby(bottleneck=4), target_modules=["down_proj"])
    lk.save(model, tmp_path / "h")
    weights = BaseWeights(base)
    with pytest.raises(UsageError, match="cannot be merged"):
        merge_check(load_adapter(tmp_path / "h", weights.layer), weights, "bf16")


@pytest.mark.slow  # reads the weights of a real model
def test_the_table_of_a_real_layer(tmp_path: Path) -> None:
    """q_proj 15 of SmolLM2-135M with a random change of rank 16."""
    from safetensors import safe_open

    from lorakit.models import resolve

    with safe_open(resolve("smollm2") / "model.safetensors", "pt") as file:
        W = file.get_tensor("model.layers.15.self_attn.q_proj.weight")
    torch.manual_seed(0)
    delta = (torch.randn(len(W), 16) @ torch.randn(16, W.shape[1])).double()
    delta *= float(W.double().norm()) / float(delta.norm())
    table = {
        1e-4: (0.973, 0.078),
        3e-4: (0.920, 0.226),
        1e-3: (0.753, 0.591),
        3e-3: (0.451, 0.931),
        1e-2: (0.164, 0.999),
    }
    for rho, (error, retained) in table.items():
        found = rounding.measure(W, rho * delta, torch.bfloat16)
        rms = rho * float(delta.square().mean().sqrt())
        predicted = rounding.predict(rms, *rounding.ulp_histogram(W, torch.bfloat16))
        assert (found.error, found.retained) == pytest.approx((error, retained), abs=0.012)
        assert predicted.error == pytest.approx(found.error, rel=0.02)
