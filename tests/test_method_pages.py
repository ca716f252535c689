"""The pages in `docs/methods/` are what the code says now: they are made again and compared."""

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import lorakit as lk
from lorakit.core.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("generate")


def test_the_pages_are_what_the_code_says(generate: ModuleType) -> None:
    made = {PAGES / path: text for path, text in generate.pages()}
    there = {page for page in PAGES.rglob("*.md") if page.relative_to(PAGES).as_posix() not in generate.MEASURED}
    assert {str(page.relative_to(PAGES)) for page in there ^ made.keys()} == set(), "run: make docs"
    stale = [str(page.relative_to(PAGES)) for page, text in made.items() if page.read_text() != text]
    assert stale == [], "run: make docs"


def test_a_dimension_is_named_after_what_it_is(generate: ModuleType) -> None:
    probe = generate.probe
    expected: dict[str, tuple[lk.Method, dict[str, list[str]]]] = {
        "lora": (lk.LoRA(r=8), {"lora_A": ["r", "in"], "lora_B": ["out", "r"]}),
        "full": (lk.METHODS["full"](), {"change": ["out", "in"]}),
        "vera": (lk.METHODS["vera"](r=64), {"vera_lambda_b": ["out"], "vera_lambda_d": ["r"]}),
    }
    for method, closed in expected.values():
        found = probe.tensors(method)
        assert found.closed(found.trained) == closed
        for i, (out, width) in enumerate(probe.PROBES):
            sizes: dict[str, int] = {"out": out, "in": width, "r": vars(method).get("r", 0)}
            count = sum(math.prod(sizes[d] for d in dims) for dims in closed.values())
            assert found.count(i) == count
            if i < len(found.state):  # two means, and a count of steps for each tensor
                assert found.state[i] == 8 * count + 4 * len(closed)


def test_a_size_without_a_closed_form_has_none(generate: ModuleType) -> None:
    """A width that is a share of the outputs is `out/..` only if the number is a hyper-parameter of the method."""
    found = generate.probe.tensors(lk.METHODS["pfeiffer"](reduction_factor=16.0))
    assert found.closed(found.trained) is None


def test_a_refusal_comes_with_its_reason(generate: ModuleType) -> None:
    refused = generate.probe.layer_refusals(lk.METHODS["bitfit"]())
    assert refused["Linear"] is None
    assert "no bias" in refused["Embedding"]
    assert generate.probe.merge_refusal(lk.LoRA()) is None
    assert "nonlinearity" in generate.probe.merge_refusal(lk.METHODS["houlsby"]())


def test_names_with_one_reason_stand_together(generate: ModuleType) -> None:
    text = generate.listed({"a": None, "b": "it is wide (32)", "c": None, "d": "it is wide (64)", "e": "no"})
    assert text == "a, c.\n- Not b, d: it is wide (32).\n- Not e: no."


@pytest.mark.parametrize(
    ("docstring", "title"),
    [
        ("DoRA: Weight-Decomposed Adaptation. Liu et al. 2024, https://x.org/1\n\n    W' = 1", "DoRA: Weight-Decomposed Adaptation"),
        ("A uniform in ±1/sqrt(in), B zero: loralib's start.\n\nHu et al.", "A uniform in ±1/sqrt(in), B zero: loralib's start"),
        ("Muon on the factors: orthogonal. Jordan et al. 2024,\nhttps://y.org; Liu", "Muon on the factors: orthogonal"),
    ],
)  # fmt: skip
def test_the_title_is_the_first_sentence(generate: ModuleType, docstring: str, title: str) -> None:
    assert generate.title(docstring) == title


def test_a_file_without_advice_is_refused(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = lk.METHODS.module("lora")
    monkeypatch.setattr(module, "__doc__", "LoRA.\n\nNothing more.\n")
    with pytest.raises(generate.NoAdvice, match=r"methods/lora\.py"):
        generate.doc("method", "lora")


def test_what_is_probed_can_refuse(generate: ModuleType) -> None:
    """A method that refuses everything is on its page as such, not as working."""

    class No:
        def build(self, shape: object) -> lk.AbstractAdapter:
            raise UsageError("never", why="it says so")

    assert generate.probe.refusal(generate.probe.Holder(nn.Linear(4, 4)), No()) == "never (it says so)"
