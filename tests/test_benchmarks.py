"""The benchmarks run, and both sides of each learn the same thing, on generated data and tiny models."""

import importlib
import json
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    """Sentences that say what they are, with GLUE's loose quotes."""
    draw = random.Random(0)
    for name, count in (("train", 300), ("dev", 60)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = draw.randrange(2)
            words = draw.choices(["a", "film", "of", '"', "the", "``", "plot"], k=draw.randint(1, 8))
            lines.append(" ".join([*words, ("dull", "great")[label]]) + f" \t{label}")
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    lines = ["mr,ref"]
    for i in range(40):
        for verb in ("is", "lies"):
            place = "city" if i % 2 else "river"
            lines.append(f'"name[Inn {i}], area[{place}]","Inn {i} {verb} by the {place}."')
    (tmp_path / "devset.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def decoder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny Llama without dropout: packed and padded rows cannot drop the same weights of the attention."""
    directory = tmp_path / "decoder"
    directory.mkdir()
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | {"attention_dropout": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def both_sides(
    script: ModuleType, work: Path, options: Namespace
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    work.mkdir()
    job = json.loads(json.dumps(script.prepare(3, work, options)))  # as it goes to the other process
    return job, script.ours(job, work), script.peft(job, work)


def test_sst2(sst2: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("peft_sst2", monkeypatch)
    options = Namespace(tiny=True, model=str(tiny_encoder), data=sst2)
    job, ours, theirs = both_sides(script, tmp_path / "work", options)
    assert len(ours["losses"]) == len(theirs["losses"]) == 6
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["losses"][0] != pytest.approx(ours["losses"][-1], rel=1e-3), "something was learned"
    assert ours["trainable"] == theirs["trainable"] == job["trainable"]
    assert [e["accuracy"] for e in ours["epochs"]] == [e["accuracy"] for e in theirs["epochs"]]
    assert [e["loss"] for e in ours["epochs"]] == pytest.approx([e["loss"] for e in theirs["epochs"]], rel=1e-4)


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_e2e(
    e2e: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, within: float
) -> None:
    script = benchmark("peft_e2e", monkeypatch)
    options = Namespace(tiny=True, model=str(decoder), data=e2e, dtype=dtype)
    job, ours, theirs = both_sides(script, tmp_path / "work", options)
    assert job["rows"]["train"] + job["rows"]["valid"] == 80
    assert len(ours["losses"]) == len(theirs["losses"]) == 4
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=within)
    assert ours["valid_before"] == pytest.approx(theirs["valid_before"], rel=within)
    assert ours["valid_after"] == pytest.approx(theirs["valid_after"], rel=within)
    assert ours["valid_after"] < ours["valid_before"]
    assert ours["trainable"] == theirs["trainable"] == job["trainable"]


def test_no_mr_is_in_both_parts(e2e: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid = benchmark("peft_e2e", monkeypatch).split_by_mr(e2e / "devset.csv", 15)
    assert {row["mr"] for row in train} & {row["mr"] for row in valid} == set()
    assert (len(train), len(valid)) == (64, 16), "whole mr's, two rows each"


def test_the_rows_of_a_draw_are_ours(sst2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's side reads the file by itself and must come to the rows that `path#N` means."""
    from lorakit.data import read

    ours = read(f"{sst2}/train.tsv#96")
    theirs = benchmark("peft_sst2", monkeypatch).read_rows(sst2 / "train.tsv", 96)
    assert [row.fields for row in ours] == theirs


def test_tools_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter is what its formula says, and lorakit's numbers are right or refused; the page says both."""
    script = benchmark("tools_compared", monkeypatch)
    rows, version = script.measure(["rslora-patterns", "dora", "conv1d", "pissa-converted", "pissa"], tmp_path)
    assert version == "not installed"
    for row in rows:
        for tool in ("lorakit load_adapter", "lorakit inspect"):
            found = row["tools"][tool]
            if row["case"] == "pissa":
                assert "unconverted" in found["error"] and str(tmp_path) not in found["error"]
                continue
            judged = {name: script.judged(name, value, row["truth"][name]) for name, value in found.items()}
            assert set(judged.values()) == {"right"}, (row["title"], tool, judged)
    assert script.judged("frobenius", 2.0, 1.0) == "x 2" and script.judged("apart", 0.5, 0.0) == "0.5 off"
    page = script.tables(rows)
    assert "x 1." in page and "not installed" in page and "1. FileError" in page


def test_the_frozen_prefix(
    decoder: Path, rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = benchmark("prefix_cache", monkeypatch)
    job = {"epochs": 3, "batch_size": 4, "dtype": "float32", "model": str(decoder), "threads": 1, "data": str(rows(11))}
    arms = {}
    for arm in script.ARMS:
        (tmp_path / arm).mkdir()
        arms[arm] = script.train({**job, "layers": 1, "arm": arm}, tmp_path / arm)
    without, kept = arms["without"], arms["with"]
    assert len(kept["cpu"]) == len(kept["wall"]) == 3 and kept["steps_of_an_epoch"] == 3
    assert all(seconds > 0 for arm in arms.values() for seconds in arm["wall"])
    assert kept["losses"][:3] == without["losses"][:3]
    assert kept["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert "11 distinct rows" in kept["said"] and without["said"] is None
    found = {"layers": 1, **arms, **script.compared(kept, without)}
    assert found["first_epoch_is_the_same"]
    environment = {"versions": {}, "gpu": None, "processor": "", "processors_visible": 1, "date": "", "threads": 1}
    environment |= {"load_average": 0, "python": "", "commit": ""}
    text = script.report({"runs": [found], "job": {**job, "rows": 11}, "environment": environment})
    assert "| last 1 " in text and "same bits" in text


@pytest.mark.slow  # four fresh processes of some 8 seconds of imports each
@pytest.mark.parametrize("name", ["peft_sst2", "peft_e2e"])
def test_the_script(
    name: str, request: pytest.FixtureRequest, tiny_encoder: Path, decoder: Path, tmp_path: Path
) -> None:
    data = request.getfixturevalue(name.removeprefix("peft_"))
    model = tiny_encoder if name == "peft_sst2" else decoder
    command = [
        sys.executable,
        BENCHMARKS / f"{name}.py",
        "--tiny",
        "--data",
        data,
        "--model",
        model,
        "--output",
        tmp_path / "results",
    ]
    done = subprocess.run([*map(str, command), "--seeds", "1", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "results").glob("*.md")
    assert report.read_text() in done.stdout
    content = json.loads(report.with_suffix(".json").read_text())
    assert [run["order"][0] for run in content["runs"]] == ["ours", "peft"], "the first one alternates"
    assert all(run[arm]["peak_memory"] for run in content["runs"] for arm in ("ours", "peft"))
    assert str(tmp_path) not in json.dumps(content["environment"])
