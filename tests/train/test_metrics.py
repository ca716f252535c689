"""The records of a run: append, resume, damage, NaN; and the trackers that get copies of them."""

import errno
import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import ResourceError, UsageError
from lorakit.train import trackers
from lorakit.train.metrics import MetricsLog, SampleLog, read_metrics
from lorakit.train.trackers import Trackers


def train(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / (step + 0.1), "lr": 1e-4 * step}


def evaluation(step: int) -> dict[str, float]:
    return {"step": step, "eval_loss": math.sqrt(step)}


def run(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write(train(step))
        if step % 4 == 0:
            log.write(evaluation(step))


def test_records_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        run(log, 1, 9)
        assert len(read_metrics(path)) == 11  # every line is in the file at once
    expected = [r for s in range(1, 10) for r in ([train(s)] + ([evaluation(s)] if s % 4 == 0 else []))]
    assert read_metrics(path) == expected
    assert read_metrics(tmp_path / "missing.jsonl") == []


@given(resume=st.integers(0, 12), torn=st.integers(0, 40), again=st.booleans())
def test_a_resumed_log_equals_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, resume: int, torn: int, again: bool
) -> None:
    directory = tmp_path_factory.mktemp("log")
    whole, broken = directory / "whole", directory / "broken"
    with MetricsLog(whole) as log:
        run(log, 1, 12)
    with MetricsLog(broken) as log:
        run(log, 1, 12)
    size = broken.stat().st_size
    kept = sum(len(json.dumps(r)) + 1 for r in read_metrics(broken) if r["step"] <= resume)
    os.truncate(broken, max(size - torn, kept))
    with MetricsLog(broken, resume) as log:
        if again and resume and resume % 4 == 0:  # killed between evaluating and saving
            log.write(evaluation(resume))
        run(log, resume + 1, 12)
    assert broken.read_bytes() == whole.read_bytes()


def test_a_torn_last_line_is_dropped_even_where_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    with MetricsLog(path, 5) as log:
        log.write({"step": 2, "loss": 1.0})
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "tokens": 3})
    line = path.read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": None,
        "tokens": 3,
    }


def test_samples_of_any_text(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    texts = ["line\nline\r\n\u2028", 'a "quote" \\ \x1b[31m', "größe 漢字 🙂", "", "\ud800 lone surrogate"]
    with SampleLog(path) as log:
        for step, text in enumerate(texts):
            log.write({"step": step, "prompt": "p", "text": text})
    assert [r["text"] for r in read_metrics(path)][:4] == texts[:4]
    assert len(path.read_bytes().splitlines()) == len(texts)
    with SampleLog(path, 2) as log:
        for prompt in ("p", "q", "q"):  # two equal prompts are two samples
            log.write({"step": 2, "prompt": prompt, "text": "again"})
    assert [(r["step"], r["prompt"]) for r in read_metrics(path)] == [(0, "p"), (1, "p"), (2, "p"), (2, "q"), (2, "q")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"")  # the device never ends
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ResourceError, match=r"cannot write metrics\.jsonl"):
        log.write({"step": 1})
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        log.close()


# --- trackers -----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = Trackers(["tensorboard"], tmp_path, {"optim": {"lr": 1}})
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1 / step, "grad_norm": math.nan, "note": "x"})
        log.write({"step": 3, "eval_loss": 0.25})
        log.sample(3, "prompt", "answer")
        log.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "eval/loss"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(s, pytest.approx(1 / s)) for s in (1, 2, 3)]
    assert {"config/text_summary", "sample/prompt/text_summary"} <= set(events.Tags()["tensors"])


class Broken:
    def __init__(self, directory: Path, config: object, resume_step: int) -> None:
        self.calls = 0

    def write(self, step: int, values: object) -> None:
        self.calls += 1
        raise ConnectionError("gone")

    sample = close = write


class Good(Broken):
    seen: list[tuple[int, object]]

    def __init__(self, directory: Path, config: object, resume_step: int) -> None:
        self.seen = []

    def write(self, step: int, values: object) -> None:
        self.seen.append((step, values))

    def close(self) -> None:
        self.seen.append((-1, None))


def test_a_failing_tracker_is_named_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = Broken(tmp_path, {}, 0), Good(tmp_path, {}, 0)
    monkeypatch.setitem(trackers.TRACKERS, "broken", ("json", lambda *_: broken))
    monkeypatch.setitem(trackers.TRACKERS, "good", ("json", lambda *_: good))
    log = Trackers(["broken", "good"], tmp_path)
    with caplog.at_level(logging.WARNING):
        log.write({"step": 1, "loss": 2, "eval_accuracy": 0.5})
        log.write({"step": 2, "loss": 1.0})
        log.close()
    assert broken.calls == 1
    assert [r.getMessage() for r in caplog.records] == [
        "broken failed and is left out from here on: ConnectionError: gone"
    ]
    assert good.seen == [(1, {"train/loss": 2.0, "eval/accuracy": 0.5}), (2, {"train/loss": 1.0}), (-1, None)]


def test_unknown_and_missing_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="wandb"):
        Trackers(["wandb"], tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="trackio") as caught:
        Trackers(["trackio"], tmp_path)
    assert "lorakit[track]" in (caught.value.fix or "")


def test_no_tracker_is_imported_unless_asked_for(tmp_path: Path) -> None:
    before = set(sys.modules)
    Trackers([], tmp_path).close()
    assert not {m for m in set(sys.modules) - before if "tensorboard" in m or "trackio" in m}
