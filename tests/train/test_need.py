"""How many blocks `train.checkpointing: auto` recomputes: the fewest that fit, as the plan says and as the run does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.models.modes import checkpoint_activations
from lorakit.train import session
from lorakit.train.config_file import loads
from lorakit.train.need import ROOM, smallest
from lorakit.train.run import run


@pytest.mark.parametrize("room", [-1.0, 0.0, 3.0, 5.5, 11.0, 47.0, 48.0, 63.9, 64.0, 100.0])
@pytest.mark.parametrize("power", [1, 2, 6])
def test_the_smallest_count_that_fits(power: int, room: float) -> None:
    """Against trying all of them, on lines and on curves."""
    most = 30
    values = [64 * (1 - k / most) ** power for k in range(most + 1)]
    asked = []
    found = smallest(lambda k: asked.append(k) or values[k], most, room)
    assert found == next((k for k, value in enumerate(values) if value <= room), most)
    assert power > 1 or len(set(asked)) <= 5


@pytest.fixture
def configuration(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    data = tmp_path / "rows.jsonl"
    row = {"prompt": "how many?", "completion": "seven, as I said already and more than once " * 3}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))

    def build(name: str, **changes: Any) -> Any:
        tree = {"model.name": str(tiny_model), "model.dtype": "float32", "data.path": str(data), "method.r": 4}
        tree |= {"train.batch_size": 8, "train.max_steps": 1, "train.save_steps": 0, "output": str(tmp_path / name)}
        tree |= {key.replace("__", "."): value for key, value in changes.items()}
        return loads("", [f"{key}={json.dumps(value)}" for key, value in tree.items()])[0]

    return build


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_auto_recomputes_what_the_memory_asks_for_and_trains_the_same(
    configuration: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    asked = []
    monkeypatch.setattr(
        session,
        "checkpoint_activations",
        lambda model, count: asked.append(count) or checkpoint_activations(model, count),
    )
    plain = run(configuration("plain", model__quantize=quantize))
    said = []
    for free in (1000,) if quantize else (1000, 10**12):
        monkeypatch.setattr(session, "free_memory", lambda device, free=free: free)
        found = run(configuration(f"free{free}", train__checkpointing="auto", model__quantize=quantize))
        assert losses(found.directory) == losses(plain.directory)
        said.append(next(line for line in (found.directory / "log.txt").read_text().splitlines() if "auto" in line))
    assert asked == [3]
    assert "of 3 blocks that keep activations, 3 recompute them" in said[0] and "too little" in said[0]
    assert quantize or "0 recompute them" in said[1]


def test_the_plan_says_how_many(configuration: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.cli import planning
    from lorakit.cli.plan import text

    def made(free: int, checkpointing: Any = "auto") -> Any:
        monkeypatch.setattr(planning, "_available", lambda: free)
        return planning.make_plan(configuration("p", train__checkpointing=checkpointing))

    monkeypatch.setattr("lorakit.models.memory.resident_bytes", lambda: 10**8)  # it grows a little from plan to plan
    totals = [made(10**12, count).need.total for count in (0, 1)]
    assert totals[0] > totals[1]
    some = made(int((totals[0] + totals[1]) / 2 / ROOM))
    assert some.recomputed == 1 == some.as_dict()["recomputed_blocks"] and some.need.total == totals[1]
    assert "of 3 blocks that keep activations, 1 recompute them" in text(configuration("p"), some)
