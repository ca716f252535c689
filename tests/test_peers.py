"""The arms of `benchmarks/peers.py` do the same work, on tiny models, and the table says what was measured."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorakit.train.bench import peft, worker
from lorakit.train.bench.agree import agreement, read_step
from lorakit.train.bench.work import Work

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without dropout."""
    directory = tmp_path_factory.mktemp("peers")
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | {"attention_dropout": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def work(decoder: Path) -> Work:
    return Work(model=str(decoder), dtype="float32", batch=3, length=20, rank=4, alpha=8.0, steps=0)


def test_loralib_takes_the_same_step_as_peft(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    for name, build in (("a", script("_peer_steps", monkeypatch).loralib), ("b", peft.build)):
        job = {"work": asdict(replace(work, gradients=str(tmp_path / name)))}
        steps.append(read_step(worker.run(job, build), tmp_path / name))
    assert agreement(*steps)["agrees"]


@pytest.fixture
def chats(tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    lines = ["mr,ref", *(f'"name[Inn {i}]","Inn {i} {"lies by the river " * (i % 4)}."' for i in range(30))]
    (tmp_path / "devset.csv").write_text("\n".join(lines) + "\n")
    facts = script("_peer_data", monkeypatch).prepare(tmp_path, 18, work.model, tmp_path)
    extra = {"directory": str(tmp_path), "batch": 4, "budget": 320, "cuda": False, "longest": facts["longest"]}
    return {"work": asdict(work), "facts": facts, **extra}


def test_a_pass_trains_the_same_tokens_to_the_same_loss(
    chats: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = script("_peer_data", monkeypatch)
    results = []
    for arm in (data.ours, data.trainer):
        scratch = tmp_path / arm.__name__
        scratch.mkdir()
        results.append(arm(chats, scratch))
    for result in results:
        assert result["trained_tokens"] == chats["facts"]["trained"]
        assert result["all_tokens"] == chats["facts"]["tokens"]
        assert len(result["wall"]) == result["steps"] - data.WARM
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=2e-4), "Trainer logs four digits"
    assert 0.3 < results[1]["fill"] < 1.0, "the rows have different lengths"


def test_both_sides_attach_to_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = script("_peer_life", monkeypatch)
    found = [life.LIFE[f"attach {side}"]({"layers": 96}, tmp_path) for side in ("lorakit", "PEFT")]
    assert [side["layers"] for side in found] == [96, 96]


def test_what_is_kept_for_backward_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = script("_peer_saved", monkeypatch)
    for name, size in {"HIDDEN": 64, "INNER": 128, "HEADS": 4, "GROUPS": 2}.items():
        monkeypatch.setattr(saved, name, size)
    directory = tmp_path / "block"
    for layers in (1, 2):
        saved.make_model(directory / str(layers), layers)
    work = Work(model=str(directory), dtype="bfloat16", batch=1, length=64, rank=4, alpha=8.0)
    units, losses = {}, {}
    for arm in ("base", "lorakit", "PEFT"):
        (tmp_path / arm).mkdir()
        found = saved.saved({"arm": f"saved {arm}", "work": asdict(work)}, tmp_path / arm)
        units[arm], losses[arm] = found["units"][0], found["loss"]
    assert losses["lorakit"] == pytest.approx(losses["PEFT"], rel=2.0**-7)
    # PEFT keeps a float32 copy of the input of q, k, v, o, gate, up (2 units each) and of down (2 x 128/64); beside it
    # x A^T of each in float32 (2 x 4/64)
    assert units["PEFT"] - units["base"] == pytest.approx(6 * 2 + 4 + 7 * 2 * 4 / 64, rel=0.02)
    assert units["lorakit"] < units["PEFT"]


def test_targets_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = script("_peer_rows", monkeypatch)
    faster = rows.line("tokens/s", [[30.0], [30.0]], "X", [[20.0], [10.0]], rows.Target(2.5))
    assert faster["ratio"].median == 2.25
    assert not faster["reached"]
    smaller = rows.line("s", [[0.2]], None, None, rows.Target(0.3, most=True, own=True))
    assert smaller["reached"]
    assert smaller["target"] == "ours <= 0.3"


def test_rows_that_are_there_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers, rows = script("peers", monkeypatch), script("_peer_rows", monkeypatch)
    ran: list[str] = []

    def row(name: str, *, agrees: bool = True) -> Any:
        def run(options: Any) -> dict[str, Any]:
            ran.append(name)
            found = rows.line("tokens/s", [[3.0]], "X", [[2.0]], rows.Target(2.0))
            return {"lines": [found], "agreement": {"agrees": agrees, "loss_off": {"X": 0.5}, "within": 0.1}}

        return peers.Row(peers.SAME_TOKENS, name, run)

    monkeypatch.setattr(peers, "ROWS", {"one": row("one"), "two": row("two")})
    monkeypatch.setattr(peers, "prepare", lambda options, scratch: None)
    options = {"output": tmp_path, "quick": False, "threads": 1, "only": ["one"], "peers": None, "model": "m"}
    monkeypatch.setattr(peers, "parse", lambda: SimpleNamespace(**options))
    peers.main()
    options["only"] = None
    peers.main()
    assert ran == ["one", "two"]
    assert capsys.readouterr().out.count("| ratio >= 2 | NO ") == 3
    monkeypatch.setitem(peers.ROWS, "one", row("one", agrees=False))
    options["only"] = ["one"]
    with pytest.raises(SystemExit) as stopped:
        peers.main()
    assert stopped.value.code == 8
    assert "**DISAGREE**" in (tmp_path / "peers-1t.md").read_text()
    options["model"] = "other"
    with pytest.raises(SystemExit, match="holds the rows of m"):
        peers.main()
