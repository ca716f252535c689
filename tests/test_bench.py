"""`lorakit bench`: both programs do the same work, a wrong one is caught, and the figures are what they say."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.cli import bench
from lorakit.cli.main import run as command_line
from lorakit.core.errors import CheckError, LorakitError
from lorakit.models.skeleton import skeleton
from lorakit.train.bench import agree, compare, limit, ours, peft, worker
from lorakit.train.bench.agree import Step, agreement, read_step
from lorakit.train.bench.compare import Spread, alternate, ratio, require_agreement, spread
from lorakit.train.bench.limit import products
from lorakit.train.bench.work import IGNORED, Work

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without dropout: two programs cannot drop the same weights of the attention."""
    directory = tmp_path_factory.mktemp("bench") / "decoder"
    directory.mkdir()
    for file in tiny_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | {"attention_dropout": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def one_step(arm: str, work: Work, file: Path) -> Step:
    result = worker.run({"arm": arm, "work": asdict(replace(work, steps=0, gradients=str(file)))})
    return read_step(result, file)


@pytest.fixture
def work(decoder: Path) -> Work:
    return Work(model=str(decoder), dtype="float32", batch=3, length=20, rank=4, alpha=8.0, steps=1)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("labels", ["all", "half"])
def test_both_programs_compute_the_same_step(work: Work, labels: Any, method: Any, tmp_path: Path) -> None:
    work = replace(work, labels=labels, method=method)
    found = agreement(one_step("ours", work, tmp_path / "a"), one_step("peft", work, tmp_path / "b"))
    assert found["agrees"], found
    require_agreement(found, "PEFT")


@pytest.mark.parametrize(
    "wrong", [{"alpha": 8.1}, {"labels": "half"}, {"seed": 1}, {"rank": 5}], ids=["scale", "labels", "tokens", "rank"]
)
def test_a_program_that_computes_something_else_is_caught(work: Work, wrong: dict[str, Any], tmp_path: Path) -> None:
    other = replace(work, **wrong)
    if "rank" in wrong:  # the same scale, so that only the factors differ
        other = replace(other, alpha=work.alpha * 5 / 4)
    found = agreement(one_step("ours", other, tmp_path / "a"), one_step("peft", work, tmp_path / "b"))
    assert not found["agrees"]
    with pytest.raises(CheckError) as caught:
        require_agreement(found, "PEFT")
    assert caught.value.exit_code == 8


def test_in_bfloat16_the_peer_s_own_error_is_allowed_and_a_wrong_scale_is_not(work: Work, tmp_path: Path) -> None:
    exact = one_step("peft", work, tmp_path / "exact")
    theirs = one_step("peft", replace(work, dtype="bfloat16"), tmp_path / "theirs")
    scaled = replace(work, dtype="bfloat16", alpha=work.alpha * 1.1)
    assert agreement(theirs, theirs, exact)["agrees"]
    assert not agreement(one_step("ours", scaled, tmp_path / "ours"), theirs, exact)["agrees"]


def test_errors_are_relative_and_the_gradient_s_is_the_mean_over_factors() -> None:
    true = Step(2.0, 5.0, {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[2.0]])})
    found = Step(2.1, 5.0, {"a": torch.tensor([[3.0, 4.5]]), "b": torch.tensor([[1.4]])})
    assert agree.errors(found, true) == pytest.approx({"loss": 0.05, "gradient norm": 0.0, "gradient": (0.1 + 0.3) / 2})


def test_the_limit_is_four_operations_per_weight_and_row(decoder: Path) -> None:
    tokens, labelled, vocabulary, width, inner, layers = 60, 33, 259, 32, 64, 3
    block = width * (width + width // 2 + width // 2 + width) + 3 * width * inner  # q k v o, gate up down
    needed = products(skeleton(decoder), tokens, labelled)
    assert sum(p.flops for p in needed) == 4 * (layers * block * tokens + vocabulary * width * labelled)


def test_labels_that_are_not_trained_cost_nothing_at_the_limit(work: Work) -> None:
    half = replace(work, labels="half")
    assert (sum(work.trained()), sum(half.trained())) == (19, 10)
    flops = [limit.measure_limit(w)["flops"] for w in (work, half)]
    assert flops[0] - flops[1] == 4 * 259 * 32 * work.batch * (19 - 10)
    rows = half.rows(259)
    labels = half.labelled(rows)
    assert labels[0] == [IGNORED] * 10 + rows[0][10:]


def test_the_rate_is_that_of_the_products(work: Work) -> None:
    product = limit.Product(256, 128, 512, 3)
    seconds = limit.product_seconds(product, torch.float32)
    assert product.flops == 4 * 256 * 128 * 512 * 3
    assert limit.product_seconds(product._replace(count=30), torch.float32) == pytest.approx(10 * seconds, rel=0.9)
    assert 1e8 < product.flops / seconds < 1e14


def test_quartiles_and_ratios() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert ratio([[1.0, 2.0], [8.0]], [[2.0], [4.0]]) == spread([0.5, 1.0, 2.0]), "pairs of one round only"
    runs = [{"wall": [2.0], "cpu": [3.0], "peak_memory": 10}]
    found = compare.ratios(runs, [{"wall": [4.0], "cpu": [3.0], "peak_memory": 40}])
    assert {name: value.median for name, value in found.items()} == {
        "tokens_per_second": 2.0,
        "cpu_per_step": 1.0,
        "peak_memory": 0.25,
    }


ECHO = """
import json, os, sys
print("noise")
print(json.dumps({"arm": json.load(sys.stdin)["arm"], "threads": os.environ["OMP_NUM_THREADS"]}))
"""


def test_arms_alternate_in_fresh_processes() -> None:
    jobs = {arm: {"arm": arm, "work": {"threads": 3}} for arm in ("ours", "peft")}
    said: list[str] = []
    results = alternate(jobs, 3, said.append, [sys.executable, "-c", ECHO])
    assert [line.split(",")[0] for line in said] == ["ours", "peft", "peft", "ours", "ours", "peft"]
    assert [r["arm"] for r in results["peft"]] == ["peft"] * 3
    assert results["ours"][0]["threads"] == "3"


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(LorakitError, match=r"the arm ours failed") as caught:
        compare.run_arm({"arm": "ours", "work": {"threads": 1}}, [sys.executable, "-c", "raise SystemExit('no model')"])
    assert caught.value.why == "no model"


def test_timed_steps_are_as_many_as_asked_for_and_move_the_factors(work: Work, tmp_path: Path) -> None:
    for build in (ours.build, peft.build):
        result = worker.run({"work": asdict(replace(work, steps=2))}, build)
        assert len(result["wall"]) == len(result["cpu"]) == 2
        assert result["trainable"] == 3 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)), (
            "layers r (q k v o gate up down)"
        )
        assert result["peak_memory"] >= result["peak_memory_of_loading"] > 1e8
        (tmp_path / build.__module__).mkdir()
        arm = build(work, tmp_path / build.__module__)
        first, second = arm.step(), arm.step()
        assert second[0] < first[0], "a second step on the same rows starts lower"


def test_command_line(decoder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--batch", "2", "--length", "8", "--rank", "2", "--steps", "1", "--runs", "1", "--threads", "1"]
    arguments = ["bench", "--model", str(decoder), "--dtype", "float32", *sizes]
    monkeypatch.setattr(agree, "EXACT", -1.0)
    assert command_line([*arguments, "--json"]) == 8
    found = json.loads(capsys.readouterr().out)
    assert found["arms"].keys() == {"ours", "peft"}
    assert len(found["arms"]["peft"]["runs"][0]["wall"]) == 1
    assert found["agreement"]["measures"]["loss"]["error"] < 1e-4
    assert found["machine"]["packages"]["peft"]
    bench.show(found)
    shown = capsys.readouterr().out
    assert "DISAGREE: loss" in shown
    assert "of the matrix-multiply limit" in shown
    assert command_line([*arguments, "--labels", "some"]) == 2
