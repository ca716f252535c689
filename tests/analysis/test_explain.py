"""`lorakit explain`: every topic is whole in both languages, its example runs, its check passes, its figures are computed."""

import doctest
import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from planted import adapter, llama, normal
from safetensors.torch import load_file

from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.explain import LABELS, LANGUAGES, Text, Topic, find, nearest, read, topics
from lorakit.analysis.explain_numbers import RECORDED, middle, names, own_numbers
from lorakit.analysis.loader_check import LOADER
from lorakit.cli.explain import wrapped
from lorakit.cli.main import make_app
from lorakit.core.errors import FileError, UsageError
from lorakit.theory import coding, gradients, rounding
from lorakit.theory.formulas import FORMULAS
from lorakit.theory.number import Kind, Number
from lorakit.theory.selftest import CHECKS, selftest

ROOT = Path(__file__).parents[2]
ALL = list(topics().values())
FIGURE = re.compile(r"(?<![\w.])(?:\d[\d_]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?![\w])", re.ASCII)
SUBJECTS = (
    "rank svd compression-ratio flops scale-identity coupling first-step random-projection lipschitz pl optimal-rank condition "
    "nuclear-norm generalisation-bounds retention critical-points hessian sharpness gain-ratio noise-scale balance noise-edge "
    "effective-rank heavy-tails gradient-probe strength information-bottleneck description-length rate-distortion lower-rank "
    "merge-precision numerical-rank subspace-similarity amplification intruders intrinsic-rank gauge learning-curve"
).split()

each = pytest.mark.parametrize("topic", ALL, ids=lambda topic: topic.name)


def figures(text: str) -> set[float]:
    """Give the numbers that somebody could have mistyped: decimals, and whole ones from 10 on."""
    return {float(t) for t in FIGURE.findall(text) if float(t) >= 10 or not t.isdigit()}


def every_number(text: str) -> set[float]:
    return {float(t) for t in FIGURE.findall(text)}


# --- the texts ----------------------------------------------------------------------------------------------------------


def test_every_subject_has_a_topic_in_its_order() -> None:
    assert [topic.name for topic in ALL] == SUBJECTS
    assert [topic.order for topic in ALL] == list(range(1, len(SUBJECTS) + 1))


@each
def test_both_languages_are_whole_and_have_the_same_figures(topic: Topic) -> None:
    english, chinese = (topic.texts[language] for language in ("en", "zh"))
    assert LANGUAGES == ("en", "zh") and LABELS["en"].keys() == LABELS["zh"].keys()
    for name, said in vars(english).items():
        other = vars(chinese)[name]
        assert bool(said) == bool(other) and (said or name == "evidence"), name
        assert figures(said) == figures(other), name
        assert re.findall("`[^`]+`", said) == re.findall("`[^`]+`", other), name
        assert not re.search(r"[\u4e00-\u9fff]", said) and (not other or re.search(r"[\u4e00-\u9fff]", other)), name
    assert all(meaning.keys() == {"en", "zh"} and all(meaning.values()) for meaning in topic.symbols.values())
    assert topic.formula and topic.sources and topic.words


@each
def test_every_figure_is_an_input_or_a_result_of_the_example(topic: Topic) -> None:
    text = topic.texts["en"]
    prose = " ".join(said for name, said in vars(text).items() if name not in ("title", "evidence"))
    assert figures(prose) - every_number(topic.example) == set()


@each
def test_the_example_gives_what_it_says(topic: Topic) -> None:
    example = doctest.DocTestParser().get_doctest(topic.example, {}, topic.name, None, 0)
    said: list[str] = []
    done = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert done.failed == 0, "".join(said)
    assert any(step.want for step in example.examples) and "lorakit.theory" in topic.example


def test_a_wrong_figure_and_a_wrong_example_are_found() -> None:
    assert figures("r = 8 of 4096, 0.5, .98, bf16, k99, 2e-4 and 1_000 之12.5以") == {4096, 0.5, 0.98, 2e-4, 1000, 12.5}
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda _: None).failed == 1


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [("  limits:", "  limit:", TypeError), ("order:", "number:", TypeError), ("symbols: W", "symbols: W Ω", KeyError)],
)
def test_a_field_or_symbol_too_many_or_too_few_is_refused(old: str, new: str, error: type[Exception]) -> None:
    import yaml

    folder = ROOT / "src/lorakit/analysis/topics"
    glossary = yaml.safe_load((folder / "_symbols.yaml").read_text("utf-8"))
    text = (folder / "rank.yaml").read_text("utf-8")
    assert read("rank", text, glossary) == topics()["rank"]
    with pytest.raises(error):
        read("rank", text.replace(old, new, 1), glossary)


# --- what proves them ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passed() -> set[str]:
    wanted = {topic.test for topic in ALL}
    return {r.id for r in selftest([check for check in (*CHECKS, LOADER) if check.id in wanted]) if r.ok}


@each
def test_the_named_check_passes_and_proves_one_of_its_formulas(topic: Topic, passed: set[str]) -> None:
    assert topic.test in passed
    assert topic.test in {FORMULAS[name].test for name in topic.formulas}


def test_every_formula_and_every_own_number_is_explained() -> None:
    assert FORMULAS.keys() - {name for topic in ALL for name in topic.formulas} == set()
    assert names() == {name for topic in ALL for name in topic.own}


def test_the_commands_in_the_texts_are_there() -> None:
    app: Any = typer.main.get_command(make_app())
    for topic in ALL:
        said = [topic.command, *re.findall("`(lorakit [^`]+)`", " ".join(vars(topic.texts["en"]).values()))]
        for line in said:
            words = line.split()
            command = app.commands[words[1]]
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line
            if words[1] == "explain":
                assert words[2] == topic.name


def test_the_pages_are_those_of_the_topics() -> None:
    generate = module(ROOT / "docs" / "generate_theory.py")
    made = {generate.PAGES / path: text for path, text in generate.pages()}
    assert set(generate.PAGES.rglob("*.md")) == made.keys(), "run docs/generate_theory.py"
    for path, text in made.items():
        assert path.read_text("utf-8") == text, f"{path.name}: run docs/generate_theory.py"


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# --- finding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (["gain"], ["gain-ratio"]),
        (["Merge", "precision"], ["merge-precision"]),
        (["merge_precision"], ["merge-precision"]),
        (["marchenko", "pastur"], ["noise-edge"]),
        (["eckart-young"], ["svd"]),
        (["stable_rank"], ["effective-rank"]),
        (["decay_survival"], ["nuclear-norm"]),
        (["遗忘"], ["retention"]),
        (["学习率过高"], ["sharpness"]),
    ],
)
def test_a_topic_is_found_by_name_word_or_formula(query: list[str], found: list[str]) -> None:
    assert [topic.name for topic in find(query)] == found


def test_several_topics_are_listed_and_near_misses_named() -> None:
    assert {"first-step", "sharpness", "gain-ratio"} <= {topic.name for topic in find(["learning", "rate"])}
    assert "strength" not in {topic.name for topic in find(["gain"])}, "again is not gain"
    assert nearest("amplifcation")[0] == "amplification" and nearest("stable-rnak")[0] == "effective-rank"
    with pytest.raises(UsageError, match="no topic") as error:
        find(["intruderz"])
    assert "intruders" in str(error.value)
    with pytest.raises(UsageError, match="no topic"):
        find([" "])


# --- the user's own numbers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planted")
    base = llama(folder / "base", torch.bfloat16)
    return adapter(base, folder / "adapter", normal(1, 5e-6), target_modules=["q_proj", "down_proj"]), base


def dense(planted: tuple[Path, Path], path: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give A, B, ΔW and W of a layer, straight from the files."""
    tensors = load_file(planted[0] / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    return A, B, 2.0 * B @ A, load_file(planted[1] / "model.safetensors")[f"{path}.weight"]


def test_own_numbers_are_those_of_the_dense_matrices(planted: tuple[Path, Path]) -> None:
    wanted = ["stable_rank", "half_rank_error", "nuclear_gap", "retained_bfloat16", "error_float16", "spectral_ratio"]
    wanted += ["compression_ratio", "gauge_difference", "bits_at_1_percent", "dominance", "intruders_attributable"]
    own = own_numbers(wanted, planted[0], BaseWeights(planted[1]))
    assert own.missing == {} and own.numbers.keys() == set(wanted)
    for name, number in own.numbers.items():
        assert (
            number.inputs["modules"] == 4 and number.inputs["lowest"][1] <= number.value <= number.inputs["highest"][1]
        ), name
    at = {name: dense(planted, number.inputs["module"]) for name, number in own.numbers.items()}
    value = {name: number.value for name, number in own.numbers.items()}
    S = {name: torch.linalg.svdvals(of[2])[:4] for name, of in at.items()}
    assert value["stable_rank"] == pytest.approx(float(S["stable_rank"].square().sum() / S["stable_rank"][0] ** 2))
    half = S["half_rank_error"]
    assert value["half_rank_error"] == pytest.approx(float(half[2:].norm() / half.norm()))
    A, B, delta, _ = at["nuclear_gap"]
    assert value["nuclear_gap"] == pytest.approx(
        float((A.square().sum() + B.square().sum()) / torch.linalg.svdvals(delta).sum())  # s = 2 and the half cancel
    )
    _, _, delta, W = at["retained_bfloat16"]
    assert value["retained_bfloat16"] == pytest.approx(rounding.measure(W, delta, torch.bfloat16).retained, abs=1e-9)
    assert 0.05 < value["retained_bfloat16"] < 0.999, "a change that rounding is seen to touch"
    _, _, delta, W = at["spectral_ratio"]
    norms = [float(torch.linalg.matrix_norm(m, ord=2)) for m in (W.double() + delta, W.double())]
    assert value["spectral_ratio"] == pytest.approx(norms[0] / norms[1], rel=1e-4)
    assert value["gauge_difference"] < 1e-12
    rate = coding.water_filling(
        S["bits_at_1_percent"].square(), 0.01 * float(S["bits_at_1_percent"].square().sum())
    ).rate
    assert value["bits_at_1_percent"] == pytest.approx(rate)
    assert own.numbers["stable_rank"].null is not None


def test_what_is_not_there_says_what_to_give(planted: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = ["stable_rank", "amplification", "gain_ratio", "information_bound"]
    assert own_numbers(wanted).missing == {
        "stable_rank": "--adapter DIR",
        "amplification": "--adapter DIR --base MODEL",
        "gain_ratio": "--run DIR",
        "information_bound": "--run DIR",
    }
    own = own_numbers(wanted, planted[0])
    assert own.numbers.keys() == {"stable_rank"} and own.missing["amplification"] == "--base MODEL"
    with pytest.raises(FileError, match="not a run directory"):
        own_numbers(["gain_ratio"], run=tmp_path)


def test_numbers_of_a_run_are_its_last_records(planted: tuple[Path, Path], tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.0, "gain_ratio": 0.9, "trained_tokens": 500, "lr": 0.0005},
        {"step": 2, "loss": 2.0, "gain_ratio": 0.4, "trained_tokens": 1000},
        {"step": 2, "eval_loss": 2.0, "eval_slope": 0.5, "eval_slope_se": 0.1},
        {"step": 3, "loss": 2.0, "gain_ratio": None, "trained_tokens": 1500},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "config.yaml").write_text("optim: {name: adamw, lr: 0.001, b_ratio: 2.0}\nmethod: {init: kaiming}\n")
    wanted = ["gain_ratio", "eval_slope", "noise_scale", "first_update", "information_bound"]
    own = own_numbers(wanted, planted[0], run=tmp_path)
    ratio, slope = own.numbers["gain_ratio"], own.numbers["eval_slope"]
    assert (ratio.value, ratio.null, ratio.inputs["step"], ratio.inputs["smallest"]) == (0.4, 1.0, 2, 0.4)
    assert slope.interval == pytest.approx((0.304, 0.696)) and slope.kind is Kind.ESTIMATE
    assert own.missing == {"noise_scale": "train.diagnose: true"}
    shapes = [(64, 64, 4), (64, 96, 4)] * 2
    first = own.numbers["first_update"]
    assert first.value == pytest.approx(gradients.adam_first_update(64, 4, 2.0, 1e-3)) and first.inputs["modules"] == 4
    bound = own.numbers["information_bound"]
    count = sum(r * (d + k) for d, k, r in shapes)
    assert bound.value == pytest.approx(coding.information_bound(count, 32, 1500))
    assert bound.kind is Kind.BOUND and bound.inputs["vacuity"] == bound.value > 1


def test_records_are_those_a_run_writes() -> None:
    from lorakit.train.diagnostics import FIELDS

    written = {field.name for field in RECORDED.values()} | {f.error for f in RECORDED.values() if f.error}
    assert written <= FIELDS.keys()


def test_the_middle_is_a_module_and_not_an_average() -> None:
    numbers = [Number(v, Kind.EXACT, "condition", null=v / 2) for v in (9.0, math.nan, 1.0, 4.0)]
    found = middle(list(zip("abcd", numbers, strict=True)))
    assert (found.value, found.null, found.inputs["module"], found.inputs["modules"]) == (4.0, 2.0, "d", 3)
    assert found.inputs["lowest"] == ["c", 1.0] and found.inputs["highest"] == ["a", 9.0]


def test_long_lines_are_broken_in_both_languages() -> None:
    for topic in ALL:
        for text in topic.texts.values():
            assert isinstance(text, Text)
            lines = wrapped(text.use, 60)
            assert all(len(line) + sum("\u2e80" <= c <= "\uffef" for c in line) <= 62 for line in lines), lines
            assert not any(line[0] in "，。；：、）,.;:" for line in lines)
            assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text.use)
