"""What users do with an adapter before they ship it: merge-check, compress, compare, extract, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


def loss_of(lorakit: Callable[..., Any], model: Path, data: Path) -> float:
    done = lorakit("eval", model, "--data", data, "--dtype", "float32", "--no-compare", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)["eval_loss"]


def test_merge_check_measures_the_model_that_merge_writes(
    lorakit: Callable[..., Any], trained: Path, orders_file: Path, tmp_path: Path
) -> None:
    limits = ["--threshold", 0, "--max-noise", 10]
    done = lorakit("merge-check", trained, "--dtype", "bfloat16", "--eval", orders_file, "--json", *limits)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["dtype"], len(found["modules"]), found["ok"]) == ("bf16", 21, True)
    merged = tmp_path / "merged"
    written = json.loads(lorakit("merge", trained, "-o", merged, "--dtype", "bfloat16", "--json").out)
    loss = {name: number["value"] for name, number in found["loss"].items()}
    assert loss["loss_after"] == pytest.approx(loss_of(lorakit, merged, orders_file), rel=1e-5)
    assert loss["loss_before"] == pytest.approx(loss_of(lorakit, trained, orders_file), rel=1e-5)
    assert loss["loss_increase"] == pytest.approx(loss["loss_after"] - loss["loss_before"], abs=1e-9)
    low, high = found["loss"]["loss_increase"]["ci"]
    assert low <= loss["loss_increase"] <= high
    # The base is in float32: W + ΔW and W are both rounded, while merge compares with the sum before rounding.
    assert 1 <= found["numbers"]["noise"]["value"] / written["relative_delta_error"] < 1.45
    for number in found["numbers"].values():
        assert {"value", "kind", "null", "ci", "n", "inputs", "cost", "formula_id"} == set(number)


def test_merge_check_measures_a_model_quantized_after_merging(
    lorakit: Callable[..., Any], trained: Path, orders_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from lorakit.cli.held_out import held_out
    from lorakit.cli.measure import losses
    from lorakit.cli.opened import open_model
    from lorakit.models.quantize import quantize

    flags = ["--dtype", "nf4", "--eval", orders_file, "--json", "--threshold", 0, "--max-noise", 10]
    done = lorakit("merge-check", trained, *flags)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert "predicted_noise" not in found["numbers"]
    assert lorakit("merge", trained, "-o", tmp_path / "merged", "--dtype", "float32").code == 0
    opened = open_model(str(tmp_path / "merged"), dtype="float32")
    quantize(opened.model, "nf4")
    _, dataset = held_out(opened, str(orders_file), None, 0)
    wanted = losses(opened, dataset)["eval_loss"]
    assert found["loss"]["loss_after"]["value"] == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(found["loss"]["loss_before"]["value"], rel=1e-3)


@pytest.mark.parametrize("limit", [["--threshold", 1.5], ["--max-noise", 1e-6]])
def test_merge_check_fails_a_gate(lorakit: Callable[..., Any], trained: Path, limit: list) -> None:
    done = lorakit("merge-check", trained, *limit)
    assert done.code == 8
    assert "all, by energy" in done.out
    assert "keep the adapter beside the base model" in done.err
    assert "loss: not measured" in done.out


def test_merge_check_of_an_untrained_adapter(lorakit: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    copy = zeroed(trained / "adapter", tmp_path / "zero")
    done = lorakit("merge-check", copy, "--base", config_base(trained))
    assert done.code == 8
    assert "changes no weight" in done.err
    assert lorakit("merge-check", trained, "--dtype", "int3").code == 2


def config_base(run: Path) -> str:
    from lorakit.train.config_file import load

    return load(run / "config.yaml")[0].model.name


def zeroed(adapter: Path, directory: Path, count: int | None = None) -> Path:
    directory.mkdir()
    for file in adapter.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "lora_B" in key][:count]:
        tensors[key].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def test_compress_writes_nothing_without_a_gate_or_past_one(
    lorakit: Callable[..., Any], trained: Path, orders_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    refused = lorakit("compress", trained, "--rank", 2, "-o", output)
    assert refused.code == 2
    assert "--force" in refused.err
    gate = ["--rank", 1, "--eval", orders_file, "-o", output]
    failed = lorakit("compress", trained, *gate, "--max-loss-increase", -5)
    assert failed.code == 8
    assert "nothing was written" in failed.err
    assert "compressed - adapter" in failed.out, "what was measured is shown"
    assert list(tmp_path.iterdir()) == []
    assert lorakit("compress", trained, "--rank", 2, "--tol", 0.1).code == 2
    assert lorakit("compress", trained, "--rank", 2, "-o", trained / "adapter", "--force").code == 2
    looked = lorakit("compress", trained, "--tol", 0.1)
    assert looked.code == 0
    assert "nothing was written" in looked.out
    assert "loss: not measured" in looked.out


@pytest.mark.parametrize("calib", [False, True])
def test_compress_measures_what_it_writes(
    lorakit: Callable[..., Any], trained: Path, orders_file: Path, tmp_path: Path, calib: bool
) -> None:
    output = tmp_path / "small"
    more = ["--calib", orders_file] if calib else []
    flags = ["--eval", orders_file, "-o", output, "--max-loss-increase", 100, "--json", *more]
    done = lorakit("compress", trained, "--rank", 2, *flags)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["written"] == str(output)
    assert {m["rank"] for m in found["modules"]} == {2}
    assert found["parameters"] * 2 == found["parameters_before"]
    assert ("output_error" in found["numbers"]) == calib
    again = ["--base", config_base(trained)]
    loss = {name: number["value"] for name, number in found["loss"].items()}
    evaluated = lorakit("eval", output, *again, "--data", orders_file, "--dtype", "float32", "--json")
    assert evaluated.code == 0, evaluated.err
    measured = json.loads(evaluated.out)
    assert loss["loss_after"] == pytest.approx(measured["eval_loss"], rel=1e-5)
    assert loss["loss_base"] == pytest.approx(measured["base"]["eval_loss"], rel=1e-5)
    assert loss["loss_before"] == pytest.approx(loss_of(lorakit, trained, orders_file), rel=1e-5)
    assert (output / "tokenizer.json").exists()
    side = json.loads((output / "lorakit.json").read_text())
    source = json.loads((trained / "adapter" / "lorakit.json").read_text())
    assert {key: side[key] for key in ("base", "task", "max_length")} == {
        key: source[key] for key in ("base", "task", "max_length")
    }
    assert lorakit("compress", trained, "--rank", 3, "-o", output, "--force").code == 2, "it exists"
    assert lorakit("compress", trained, "--rank", 3, "-o", output, "--force", "--overwrite").code == 0


def test_compare_an_adapter_with_itself(lorakit: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    copy = zeroed(trained / "adapter", tmp_path / "other", count=1)
    page = tmp_path / "page.html"
    done = lorakit("compare", trained, copy, "--html", page)
    assert done.code == 0, done.err
    assert "changed by one of them only" in done.out
    assert "replicated directions by block" in done.out
    assert "<!doctype html>" in page.read_text()
    found = json.loads(lorakit("compare", trained, copy, "--json").out)
    (pair,) = found["pairs"]
    assert len(pair["modules"]) == 20
    assert all(m["numbers"]["phi_left"]["value"] == pytest.approx(1) for m in pair["modules"])
    assert pair["numbers"]["interference"]["value"] == pytest.approx(1)
    assert lorakit("compare", trained).code == 2


def test_extract_gives_back_what_was_merged(
    lorakit: Callable[..., Any], trained: Path, tiny_model: Path, orders_file: Path, tmp_path: Path
) -> None:
    merged, output = tmp_path / "merged", tmp_path / "extracted"
    assert lorakit("merge", trained, "-o", merged, "--dtype", "float32").code == 0
    pair = ["--base", tiny_model, "--tuned", merged, "-o", output]
    done = lorakit("extract", *pair, "--rank", 4, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (len(found["modules"]), found["rest"]) == (21, [])
    assert found["numbers"]["error"]["value"] < 1e-5
    evaluated = lorakit("eval", output, "--base", tiny_model, "--data", orders_file, "--dtype", "float32", "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["eval_loss"] == pytest.approx(loss_of(lorakit, trained, orders_file), rel=1e-4)
    compared = json.loads(lorakit("compare", trained, output, "--json").out)["pairs"][0]
    assert {m["numbers"]["replicated"]["value"] for m in compared["modules"]} == {4}
    shown = lorakit("extract", *pair, "--rank", 2, "--overwrite")
    assert shown.code == 0
    assert "Gavish-Donoho" in shown.out


def test_extract_asks_what_to_do_with_the_rest(
    lorakit: Callable[..., Any], trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    merged, output = tmp_path / "merged", tmp_path / "extracted"
    assert lorakit("merge", trained, "-o", merged, "--dtype", "float32").code == 0
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"].mul_(1.25)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    pair = ["--base", tiny_model, "--tuned", merged, "-o", output, "--rank", 2]
    refused = lorakit("extract", *pair)
    assert refused.code == 2
    assert "model.norm.weight (by 0.25)" in refused.err
    assert not output.exists()
    assert lorakit("extract", *pair, "--full").code == 0
    assert torch.equal(
        load_file(output / "adapter_model.safetensors")["base_model.model.model.norm.weight"],
        tensors["model.norm.weight"],
    )
    assert lorakit("extract", *pair, "--drop-rest", "--overwrite").code == 0
    assert "base_model.model.model.norm.weight" not in load_file(output / "adapter_model.safetensors")
    assert (
        lorakit("extract", "--base", tiny_model, "--tuned", tiny_model, "-o", output, "--rank", 2, "--overwrite").code
        == 8
    )


def test_the_benchmark_of_the_predictions(
    trained: Path, tiny_model: Path, orders_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.setattr("sys.argv", ["merge_precision.py"])
    import merge_precision as script

    monkeypatch.setattr(script, "RHOS", (1e-3, 1e-1))
    rows = script.merging(str(tiny_model))
    assert [(row["dtype"], row["rho"], row["modules"]) for row in rows[:2]] == [("bf16", 1e-3, 7), ("fp16", 1e-3, 7)]
    for row in rows:
        assert row["noise"] == pytest.approx(row["predicted_noise"], rel=0.1)
        assert row["relative_norm"] == pytest.approx(row["rho"], rel=1e-5)
    cut = list(script.compressing(str(trained), str(orders_file), str(orders_file), 8))
    assert [(row["rank"], row["by"]) for row in cut] == [(r, by) for r in (1, 2) for by in ("svd", "activation")]
    assert 1 > cut[0]["predicted"] > cut[2]["predicted"] > 0
    assert script.compressing_table(cut).count("\n") == 6
    assert script.plot(rows).count("<circle") == 8
