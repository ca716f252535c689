"""What a watched run looks like in its report."""

import json
from pathlib import Path
from typing import Any

from lorakit.analysis.report import render


def write(directory: Path, records: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text("model: {name: m}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def watched() -> list[dict[str, Any]]:
    looks = [
        (1, 0.9, []),
        (10, 0.4, []),
        (20, 0.3, ["learning_rate_high"]),
        (30, None, ["learning_rate_high"]),
        (40, 0.9, []),
    ]
    records: list[dict[str, Any]] = []
    for step, ratio, alarms in looks:
        records.append(
            {"step": step, "epoch": 1, "loss": 2.0, "gain_ratio": ratio, "rho": 1e-3 * step, "alarms": alarms}
        )
    records.append({"step": 40, "epoch": 1, "eval_loss": 2.5, "eval_slope": 0.7, "alarms": ["overfit", "<b>new</b>"]})
    return records


def test_the_report_lists_alarms_with_what_to_do_and_draws_what_was_watched(tmp_path: Path) -> None:
    page = render([write(tmp_path / "run", watched())])
    assert "<h2>Diagnostics</h2>" in page
    assert "<b>learning rate high</b> (steps 20 to 30)" in page
    assert "halve optim.lr" in page
    assert "<b>overfit</b> (step 40)" in page
    assert "eval.patience" in page
    assert "<b>new</b>" not in page
    assert page.count("Gain ratio of a step") >= 1
    assert "Noise scale" not in page  # nothing was measured of it


def test_runs_that_were_not_watched_have_no_such_section_and_quiet_ones_say_so(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", [{"step": 1, "epoch": 1, "loss": 2.0}])
    assert "Diagnostics" not in render([plain])
    quiet = write(tmp_path / "quiet", [{"step": 1, "epoch": 1, "loss": 2.0, "gain_ratio": 0.9, "alarms": []}])
    assert "No alarm at any look" in render([quiet])
    both = render([plain, quiet, write(tmp_path / "loud", watched())])
    assert "loud: <b>overfit</b>" in both
