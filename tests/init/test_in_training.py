"""Starts that look at data, and quantized bases, in a whole run: measured once, resumed bit for bit, saved for others."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.models.load import load as load_model
from lorakit.models.quantize import quantize
from lorakit.train import start
from lorakit.train.config import RunConfig
from lorakit.train.stop import Interrupted


def _runs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runs", Path(__file__).parents[1] / "train" / "test_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs = _runs()
configure = runs.configure
go, StopAt, losses, adapter_bytes = runs.go, runs.StopAt, runs.losses, runs.adapter_bytes

Configure = Callable[..., RunConfig]
SHORT = {"train__epochs": ..., "train__max_steps": 4}
STARTS = {
    "pissa": {},
    "eva": {},
    "corda": {},
    "lora_ga": {},
    "loftq": {"model__quantize": "nf4"},
    "kaiming": {"model__quantize": "int8"},
    "lora_ga_on_4_bits": {"model__quantize": "nf4", "method__init": "lora_ga"},
}


def only_where_installed(settings: dict[str, Any]) -> None:
    if "model__quantize" in settings:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("case", STARTS)
def test_an_interrupted_run_goes_on_bit_for_bit_without_measuring_again(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    only_where_installed(STARTS[case])
    settings = {"method__init": case, **SHORT, **STARTS[case]}
    counter = StopAt(monkeypatch, -1)
    whole = go(configure("whole", **settings))
    monkeypatch.undo()
    config = configure("stopped", **settings)
    StopAt(monkeypatch, counter.count - 1)  # in the last step: whatever came before the training is not counted
    with pytest.raises(Interrupted):
        go(config)
    monkeypatch.undo()
    for forbidden in ("calibrate", "attach") if case in ("eva", "corda", "lora_ga", "loftq") else ("calibrate",):
        monkeypatch.setattr(start, forbidden, lambda *args, **kwargs: pytest.fail("measured or started again"))
    result = go(config)
    assert result.resumed_from == 3
    assert losses(result.directory) == losses(whole.directory)
    assert adapter_bytes(result.directory) == adapter_bytes(whole.directory)


def test_the_first_rows_are_measured_and_the_run_is_the_same_again(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = start.calibrate

    def watched(model: nn.Module, method: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([row.where for batch in batches for row in batch])
        return real(model, method, batches, *args, **kwargs)

    monkeypatch.setattr(start, "calibrate", watched)
    monkeypatch.setattr(start, "CALIBRATION_ROWS", 7)
    one = go(configure("one", method__init="corda", **SHORT))
    two = go(configure("two", method__init="corda", **SHORT))
    assert adapter_bytes(one.directory) == adapter_bytes(two.directory)
    assert losses(one.directory) == losses(two.directory)
    assert seen[0] == seen[1]
    assert 7 <= len(seen[0]) <= 12  # whole steps of 2 x 3 rows
    assert len(set(seen[0])) == len(seen[0])
    plain = go(configure("plain", **SHORT))
    first, again = (next(v for _, k, v in losses(r.directory) if k == "loss") for r in (one, plain))
    assert first == pytest.approx(again, rel=0.05)  # the same base, apart from dropout on what the adapter adds


def test_padded_rows_are_measured_alone(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding would be inputs that mean nothing: packed or padded, the same statistics."""
    found: dict[bool, dict[str, torch.Tensor]] = {}
    real = start.start

    def watched(model: nn.Module, *args: Any) -> Any:
        statistics = args[-1]
        found[packed] = {path: statistics[path].inputs for path in statistics}
        return real(model, *args)

    monkeypatch.setattr("lorakit.train.session.start", watched)
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr("lorakit.train.session.enable_packing", lambda model: False)
        go(configure(f"packed-{packed}", method__init="corda", **SHORT))
    for path, moment in found[True].items():
        torch.testing.assert_close(found[False][path], moment, rtol=1e-3, atol=1e-4 * float(moment.diagonal().max()))


def test_eva_moves_ranks_where_the_inputs_vary(configure: Configure, tiny_model: Path) -> None:
    targets = ["q_proj", "o_proj", "down_proj"]
    config = configure(
        method__init="eva", method__alpha=8.0, method__target_modules=targets, method__layers=[0, 2], **SHORT
    )
    result = go(config)
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    model = load_model(tiny_model, dtype="float32").model
    lk.load(model, result.adapter)
    ranks = {path: len(adapter.lora_A) for path, _, adapter in lk.adapters(model)}
    assert sum(ranks.values()) == 6 * 4
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert {float(adapter.scale) for _, _, adapter in lk.adapters(model)} == {2.0}, "alpha follows the rank"
    assert written["rank_pattern"]
    assert all(".1." not in path for path in ranks)


def test_a_quantized_run_learns_and_says_what_it_did(configure: Configure, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    head = ["lm_head"]
    result = go(configure(model__quantize="nf4", train__epochs=8, optim__lr=3e-2, method__modules_to_save=head))
    values = [v for _, key, v in losses(result.directory) if key == "loss"]
    assert sum(values[-3:]) / 3 < 0.75 * values[0]
    log = (result.directory / "log.txt").read_text()
    assert "the base is stored as nf4: 0.1 MB" in log or "the base is stored as nf4: 0.0 MB" in log
    assert json.loads((result.adapter / "lorakit.json").read_text())["base"]["quantize"] == "nf4"
    assert result.summary.total - result.summary.adapter == sum(
        p.numel() for p in load_model(tiny_model, dtype="float32").model.parameters()
    )
    loaded = load_model(tiny_model, dtype="float32", prepare=lambda model, head: quantize(model, "nf4"))
    lk.load(loaded.model, result.adapter)
    ids = torch.arange(20)[None]
    exact = lk.load(load_model(tiny_model, dtype="float32").model, result.adapter)
    a, b = loaded.model(ids).logits, exact(ids).logits
    assert 1e-3 < (a - b).norm() / b.norm() < 0.5, "4 bits are not the whole weights"


def test_loftq_starts_nearer_to_the_model_than_rounding_does(configure: Configure, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    exact = load_model(tiny_model, dtype="float32").model
    ids = torch.arange(40)[None]
    errors = []
    for init in ("kaiming", "loftq"):
        method, model = lk.LoRA(r=8, init=init), load_model(tiny_model, dtype="float32").model
        lk.attach(model, method, statistics=quantize(model, "nf4", method))
        errors.append(float((model(ids).logits - exact(ids).logits).detach().norm()))
    assert errors[1] < 0.8 * errors[0]
    with pytest.raises(lk.LorakitError, match=r"set model\.quantize"):
        configure(method__init="loftq")  # nothing would be lost
