"""`lorakit explain`: the list, a page in each language, the numbers of a real run beside the formula, and JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.analysis.explain import LABELS, topics


def test_the_list_has_every_topic_and_words_find_one(lorakit: Callable) -> None:
    out = lorakit("explain").out
    assert all(f"{topic.name} " in out and topic.texts["en"].title in out for topic in topics().values())
    chinese = lorakit("explain", "--lang", "zh").out
    assert all(topic.texts["zh"].title in chinese for topic in topics().values())
    assert [t["topic"] for t in json.loads(lorakit("explain", "--json").out)["topics"]] == list(topics())
    several = lorakit("explain", "learning", "rate").out
    assert "sharpness" in several and "first-step" in several and "rate-distortion" not in several


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_page_has_everything(lorakit: Callable, lang: str) -> None:
    topic, label = topics()["gauge"], LABELS[lang]
    done = lorakit("explain", "gauge", "--lang", lang)
    flat = "".join(done.out.split())
    assert done.code == 0
    for part in vars(topic.texts[lang]).values():
        assert "".join(part.split()) in flat
    for part in (topic.formula, topic.example, label["not measured"], "lorakit selftest --only T30", *topic.sources):
        assert "".join(part.split()) in flat
    assert f"{label['give']}: --adapter DIR" in done.out


def test_numbers_of_a_run_stand_beside_the_formula(lorakit: Callable, trained: Path, tiny_model: Path) -> None:
    found = json.loads(lorakit("explain", "effective_rank", "--adapter", trained, "--json").out)
    assert found["topic"] == "effective-rank" and found["not_measured"] == {}
    inspected = json.loads(lorakit("inspect", trained, "--json").out)["modules"]
    for name, number in found["numbers"].items():
        module = inspected[number["inputs"]["module"]]["numbers"][name]
        assert (number["value"], number["null"], number["formula_id"]) == (
            module["value"],
            module["null"],
            module["formula_id"],
        )
    out = lorakit("explain", "merge-precision", "--adapter", trained, "--base", tiny_model).out
    assert "retained bfloat16 " in out and "median of 21 modules" in out and "not measured" not in out


def test_a_run_brings_its_adapter_and_its_records(lorakit: Callable, trained: Path) -> None:
    found = json.loads(lorakit("explain", "nuclear-norm", "--run", trained, "--json").out)
    assert found["numbers"].keys() == {"nuclear_gap"} and found["not_measured"] == {
        "decay_survival": "train.diagnose: true"
    }
    assert (
        found["numbers"]["nuclear_gap"]["value"] >= 1 and found["numbers"]["nuclear_gap"]["kind"] == "parametrisation"
    )
    vacuous = json.loads(lorakit("explain", "rademacher", "--adapter", trained, "--json").out)["numbers"]
    bound = vacuous["information_bound"]
    assert bound["kind"] == "bound" and bound["inputs"]["vacuity"] == bound["value"] > 1
    assert "says nothing" in lorakit("explain", "rademacher", "--run", trained).out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["intruderz"], 2, "did you mean intruders"),
        (["xyzzy"], 2, "lorakit explain lists the topics"),
        (["gauge", "--lang", "fr"], 2, "one of en, zh"),
        (["gauge", "--base", "m"], 2, "--adapter DIR --base MODEL"),
        (["--adapter", "a"], 2, "which topic"),
        (["gauge", "--adapter", "nowhere"], 4, "nowhere is no adapter"),
        (["gain-ratio", "--run", "nowhere"], 4, "not a run directory"),
    ],
)
def test_what_cannot_be_explained_is_refused(lorakit: Callable, arguments: list[str], code: int, said: str) -> None:
    done = lorakit("explain", *arguments)
    assert done.code == code and said in done.err
