"""Command lines that carry configuration, and the configuration that `init` writes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli.overrides import split
from lorakit.core.errors import UsageError
from lorakit.train.config_file import load


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("--lr 1e-3", ["lr=1e-3"]),
        ("--optim.lr=1e-3", ["optim.lr=1e-3"]),
        ("--learning_rate 1e-3 --learning-rate 2", ["learning_rate=1e-3", "learning_rate=2"]),
        ("optim.lr=1 --max-steps 5", ["optim.lr=1", "max_steps=5"]),
        ("-o out --model m --data d --method lora", ["output=out", "model=m", "data=d", "method=lora"]),
        ("--checkpointing --skip_bad_rows", ["checkpointing=true", "skip_bad_rows=true"]),
        ("--no-checkpointing --load-best true", ["checkpointing=false", "load_best=true"]),
        ("--checkpointing auto --checkpointing 12", ["checkpointing=auto", "checkpointing=12"]),
        ("--no-load-best --checkpointing --seed 3", ["load_best=false", "checkpointing=true", "seed=3"]),
        ("--bf16 --bf16 False --gradient_checkpointing", ["bf16=true", "bf16=False", "gradient_checkpointing=true"]),
        ("--use_rslora --use_peft --r 4", ["use_rslora=true", "use_peft=true", "r=4"]),
        ("--seed -1", ["seed=-1"]),
        ("--target-modules [q_proj,v_proj]", ["target_modules=[q_proj,v_proj]"]),
    ],
)
def test_flags_mean_what_the_file_would(line: str, overrides: list[str]) -> None:
    assert split(line.split()) == (None, overrides)


def test_a_run_directory_stands_for_its_configuration(tmp_path: Path) -> None:
    assert split([str(tmp_path), "lr=1"]) == (tmp_path / "config.yaml", ["lr=1"])
    assert split(["--config", "a.yaml"]) == (Path("a.yaml"), [])
    file = tmp_path / "a=b.yaml"
    file.touch()
    assert split([str(file)]) == (file, [])


@pytest.mark.parametrize("line", ["--lrr 1", "-z 1", "--optim.lrr 1", "--no-lr", "--max-steps"])
def test_flags_that_mean_nothing_are_refused(line: str) -> None:
    with pytest.raises(UsageError, match=r"option|needs a value"):
        split(line.split())


def test_a_switch_leaves_the_file_behind_it_alone() -> None:
    assert split(["--checkpointing", "c.yaml"]) == (Path("c.yaml"), ["checkpointing=true"])


def test_init_writes_a_configuration_that_reads(lorakit: Callable, tmp_path: Path, orders_file: Path) -> None:
    file = tmp_path / "train.yaml"
    done = lorakit("init", orders_file, "-o", file)
    assert done.code == 0
    config, notices = load(file)
    assert notices == []
    assert (config.model.name, config.data.path, config.data.valid) == ("smollm2", str(orders_file), 0.1)
    assert config.train.epochs == 3
    assert config.train.max_length is not None
    assert config.train.max_length % 64 == 0
    assert done.out.strip() == file.read_text().strip()
    assert len(done.out.splitlines()) <= 16
    assert "messages (OpenAI chat)" in done.out
    before = file.read_bytes()
    again = lorakit("init", orders_file, "-o", file)
    assert again.code == 2
    assert file.read_bytes() == before


def test_init_chooses_the_encoder_for_labels_and_drops_bad_rows(lorakit: Callable, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(6)]
    (data / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    (data / "valid.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert lorakit("init", data, "-o", tmp_path / "t.yaml").code == 0
    config = load(tmp_path / "t.yaml")[0]
    assert (config.model.name, config.data.valid, config.data.skip_bad_rows) == ("minilm", None, True)


def test_preview_marks_exactly_what_is_trained(lorakit: Callable, tiny_model: Path, orders_file: Path) -> None:
    shown = json.loads(lorakit("data", "preview", orders_file, "--model", tiny_model, "-n", 5, "--json").out)
    rows = [json.loads(line) for line in orders_file.read_text().splitlines()[:5]]
    for row, found in zip(rows, shown, strict=True):
        trained = "".join(s["text"] for s in found["segments"] if s["trained"])
        assert trained == row["messages"][1]["content"] + "<|im_end|>"
        assert row["messages"][0]["content"] in "".join(s["text"] for s in found["segments"] if not s["trained"])
    plain = lorakit("data", "preview", orders_file, "--model", tiny_model, "-n", 5).out
    assert all(f"[[{row['messages'][1]['content']}<|im_end|>]]" in plain for row in rows)
    assert "\x1b" not in plain


def test_preview_is_coloured_on_a_terminal(
    lorakit: Callable, tiny_model: Path, orders_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = lorakit("data", "preview", orders_file, "--model", tiny_model, "-n", 1).out
    answer = json.loads(orders_file.read_text().splitlines()[0])["messages"][1]["content"]
    assert f"\x1b[32m{answer}" in shown
    assert "[[" not in shown


def test_stats_count(lorakit: Callable, tiny_model: Path, orders_file: Path) -> None:
    found = json.loads(lorakit("data", "stats", orders_file, "--model", tiny_model, "--json").out)
    answers = [json.loads(line)["messages"][1]["content"] for line in orders_file.read_text().splitlines()]
    assert found["rows"] == found["kept"] == len(answers)
    assert found["trained_tokens"] == sum(len(a.encode()) + 1 for a in answers)  # bytes and the end token
    assert "\x1b" not in lorakit("data", "stats", orders_file, "--model", tiny_model).out


def test_split_loses_and_doubles_nothing(lorakit: Callable, tmp_path: Path, orders_file: Path) -> None:
    assert lorakit("data", "split", orders_file, "--valid", 0.25, "-o", tmp_path / "s").code == 0
    parts = {name: (tmp_path / "s" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid")}
    whole = orders_file.read_text().splitlines()
    assert Counter(map(json.dumps, map(json.loads, whole))) == Counter(
        json.dumps(json.loads(line)) for lines in parts.values() for line in lines
    )
    assert not set(parts["train"]) & set(parts["valid"])
    assert len(parts["valid"]) == 4
    assert lorakit("data", "split", orders_file, "-o", tmp_path / "s").code == 2
