"""Configuration: file and dataclasses say the same, every problem is reported at once, hostile files cost little."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lorakit.core.errors import UsageError
from lorakit.core.registry import METHODS
from lorakit.core.target import Target
from lorakit.train import aliases, config_check
from lorakit.train.config import SECTIONS, DataConfig, MethodConfig, ModelConfig, RunConfig, TrainOptions, as_tree
from lorakit.train.config_check import contradictions, diff, resume_conflicts
from lorakit.train.config_file import check, dump, load, loads
from lorakit.train.config_schema import all_keys, flat_names, key_help, schema, section_keys
from lorakit.train.controllers import CONTROLLERS
from lorakit.train.yaml_nodes import scalar

MINIMAL = "model: smollm2\ndata: rows.jsonl\n"


def config(text: str = MINIMAL, *overrides: str) -> RunConfig:
    return loads(text, overrides, "train.yaml")[0]


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        loads(text, overrides, "train.yaml")
    assert caught.value.exit_code == 2
    first, *others = caught.value.what.splitlines()
    return [line.strip() for line in others] or [first]


# --- values of every type the dataclasses use, made from their annotations ---


def values(hint: Any) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = {type(limit): limit for limit in arguments[1:]}
        if arguments[0] is int:
            return st.integers(
                limits[Ge].ge if Ge in limits else None, min(limits[Le].le if Le in limits else 10**6, 10**18)
            )
        if arguments[0] is float:
            return st.floats(
                limits[Ge].ge if Ge in limits else limits[Gt].gt,
                limits[Lt].lt if Lt in limits else None,
                exclude_min=Gt in limits,
                exclude_max=Lt in limits,
                allow_infinity=False,
            )
        return st.text(min_size=1)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, type(int | str)):
        return st.one_of(*map(values, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(values, arguments))
    if origin in (tuple, Sequence, list):
        return st.lists(values(arguments[0]), max_size=3).map(tuple if origin is tuple else list)
    if origin is Mapping:
        return st.dictionaries(st.text(max_size=20), values(arguments[1]), max_size=3)
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return {int: st.integers(1, 999), float: finite, str: st.text(), bool: st.booleans(), type(None): st.none()}[hint]


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    made = {}
    for section, cls in SECTIONS.items():
        own = ("controller", "options")  # the files that declare their settings check them: see below
        keys = {k.name: values(k.hint) for k in section_keys(section).values() if k.name not in own}
        required = {name: keys.pop(name) for name in ("name", "path") if section in ("model", "data") and name in keys}
        if section == "train":
            keys["controller"] = st.none() | st.sampled_from(sorted(CONTROLLERS))
        made[section] = cls(**draw(st.fixed_dictionaries(required, optional=keys)))
    name = draw(st.sampled_from(sorted(METHODS)))
    keys = {k.name: values(k.hint) for k in section_keys("method", name).values() if k.name not in ("name", "parts")}
    drawn = draw(st.fixed_dictionaries({}, optional=keys))
    shared = {
        key: drawn.pop(key)
        for key in section_keys("method", name)
        if key in drawn and key in Target.__dataclass_fields__
    }
    try:
        method = MethodConfig(name=name, config=METHODS[name](**drawn), target=Target(**shared))
    except ValueError:
        reject()
    found = RunConfig(
        **made, method=method, output=draw(st.text(min_size=1, max_size=40).filter(lambda t: "\0" not in t))
    )
    return without_contradictions(found)


def without_contradictions(found: RunConfig) -> RunConfig:
    train, target = found.train, found.method.target
    if train.max_steps is not None:
        train = replace(train, epochs=TrainOptions.epochs)
    if train.batch_tokens is not None:
        train = replace(train, batch_size=TrainOptions.batch_size)
    if target.layers is not None:
        target = replace(target, last_n_layers=None)
    if found.eval.patience is not None or found.eval.load_best:
        train = replace(train, eval_steps=None)
    if any(key == "train.controller" for key, _ in contradictions(found)):
        train = replace(train, controller=None)
    data = replace(found.data, valid=found.data.valid or 0.1, path=found.data.path.replace("\0", "0"))
    model = replace(found.model, name=found.model.name.replace("\0", "0"), quantize=None)
    found = replace(found, model=model, data=data, train=train, method=replace(found.method, target=target))
    if any(True for _ in contradictions(found)):  # such as a model called "/", which holds the output
        reject()
    return found


@given(run_configs())
@settings(max_examples=150, deadline=None)
def test_a_dumped_configuration_reads_back_equal(found: RunConfig) -> None:
    text = dump(found)
    again, notices = loads(text)
    assert again == found
    assert notices == []
    assert diff(again, found) == []
    assert dump(again) == text


def test_the_defaults_read_back_and_mean_the_same_in_python() -> None:
    made = RunConfig(
        model=ModelConfig(name="smollm2"),
        data=DataConfig(path="rows.jsonl"),
        method=MethodConfig.of(METHODS["lora"]()),
        output="runs/rows",
    )
    check(made)
    assert config() == made == config(dump(made))


# --- YAML 1.2 ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("1e-4", 1e-4),
            ("1E4", 1e4),
            ("-.5", -0.5),
            ("012", 12),
            ("0o17", 15),
            ("0x1F", 31),
            ("+7", 7),
            ("1_000", "1_000"),
        ],
        *[("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("true", True), ("False", False), ("~", None)],
        *[
            ("", None),
            ("2024-01-01", "2024-01-01"),
            ("12:30", "12:30"),
            ("0b1", "0b1"),
            ("=", "="),
            ("1e", "1e"),
            (".", "."),
        ],
    ],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", ".0001", "0.0001"])
def test_a_learning_rate_is_a_number_in_every_spelling(text: str) -> None:
    assert config(f"{MINIMAL}optim: {{lr: {text}}}").optim.lr == 1e-4


def test_a_count_may_be_spelled_as_a_float_without_a_fraction() -> None:
    assert config(f"{MINIMAL}train: {{max_steps: 1e3}}").train.max_steps == 1000
    assert "whole number" in problems(f"{MINIMAL}train: {{max_steps: 1.5}}")[0]


def test_anchors_flow_style_comments_bom_and_crlf_are_read(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    text = (
        "# c\r\nmodel: {name: m}\r\ndata: d # x\r\nmethod:\r\n  target_modules: &t [q, k]\r\n  modules_to_save: *t\r\n"
    )
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = load(file)[0]
    assert found.method.target.target_modules == found.method.target.modules_to_save == ["q", "k"]


def test_nothing_is_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    assert config("model: ${SECRET}\ndata: $SECRET\n").model.name == "${SECRET}"


# --- problems ---


def test_every_problem_is_reported_at_once_with_its_line_and_pointer() -> None:
    text = """\
model: {name: smollm2, dtype: fp32}
data: rows.jsonl
optim:
  lr: "1e-4"
  schedule: cosin
  learnig_rate: 1
train:
  epochs: -1
  seed: yes
  batch_size: .nan
  lr: 1
  checkpointing: on
  accumulate: 0
method: {r: 0, dropout: 1.5}
evl: {}
"""
    found = problems(text)
    expected = [
        ("train.yaml:1  /model/dtype: must be one of auto, float32, bfloat16", "'fp32'"),
        ("train.yaml:4  /optim/lr: must be a number greater than 0", "the text '1e-4'"),
        ("train.yaml:5  /optim/schedule: must be one of ", "did you mean 'cosine'?"),
        ("train.yaml:6  /optim/learnig_rate: unknown key 'learnig_rate'", "did you mean 'learning_rate'?"),
        ("train.yaml:8  /train/epochs: must be a number greater than 0", "got -1"),
        ("train.yaml:9  /train/seed: must be a whole number at least 0", "the text 'yes'"),
        ("train.yaml:10  /train/batch_size: must be a whole number at least 1", "NaN"),
        ("train.yaml:11  /train/lr: unknown key 'lr' in train", "it is optim.lr"),
        ("train.yaml:12  /train/checkpointing: must be true or false", "the text 'on'"),
        ("train.yaml:13  /train/accumulate: must be a whole number at least 1", "got 0"),
        ("train.yaml:14  /method/r: ", "0"),
        ("train.yaml:14  /method/dropout: ", "1.5"),
        ("train.yaml:15  /evl: unknown key 'evl'", "did you mean 'eval'?"),
    ]
    assert len(found) == len(expected)
    for line, (start, end) in zip(found, expected, strict=True):
        assert line.startswith(start)
        assert end in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'train.yaml  /model/name: is missing; for example "model: smollm2"'),
        ("# nothing\n", "/data/path: is missing"),
        ("- a\n", "train.yaml:1  a configuration is a mapping"),
        ("model:\n\tname: x\n", "train.yaml:2  a tab is used for indentation"),
        ("model: m\ndata: d\nmodel: n\n", "train.yaml:3  /model: given twice, first at train.yaml:1"),
        ("model: {name: m, name: n}\ndata: d\n", "/model/name: given twice"),
        ("model: {<<: {name: m}}\ndata: d\n", "merge keys"),
        ("model: m\n---\ndata: d\n", "train.yaml:2  a second document"),
        ("model: m\x00\n", "special characters are not allowed"),
        ("model: *m\n", "*m refers to nothing"),
        ("model: &m [*m]\n", "*m refers to nothing"),
        ("? [a]\n: b\n", "train.yaml:1  a key must be a plain text"),
        ("model: [m]\ndata: d\n", "train.yaml:1  /model: must be a mapping of keys"),
        (f"{MINIMAL}method: loar\n", "did you mean 'lora'?"),
        (f"{MINIMAL}method: {{init: kaimin}}\n", "did you mean 'kaiming'?"),
        (f"{MINIMAL}lr: .inf\n", "/optim/lr: must be a number greater than 0, got Infinity"),
        (f"{MINIMAL}lr: 1e999\n", "/optim/lr: must be a number greater than 0, got Infinity"),
        (f"{MINIMAL}seed: {'9' * 5000}\n", "/train/seed: must be a whole number"),
        (f"{MINIMAL}output: 7\n", "/output: must be a text that is not empty, got 7"),
        (f"{MINIMAL}train: {{max_steps: 3, epochs: 1}}\n", "both given; give one of them"),
        (f"{MINIMAL}train: {{batch_tokens: 3, batch_size: 8}}\n", "both given; give one of them"),
        (f"{MINIMAL}method: {{layers: [1], last_n_layers: 2}}\n", "both given; give one of them"),
        (f"{MINIMAL}eval: {{patience: 3}}\n", "train.yaml:3  /eval/patience: needs a validation loss, but there is no"),
        (f"{MINIMAL}eval: {{load_best: true}}\ntrain: {{eval_steps: 0}}\n", "but train.eval_steps is 0"),
        (f"{MINIMAL}train: {{eval_steps: 5}}\n", "there is nothing to evaluate"),
        (f"{MINIMAL}learning_rate: 1\noptim: {{lr: 1}}\n", "means optim.lr, which is already given at train.yaml:3"),
        (f"{MINIMAL}fp16: true\n", "use model.dtype: bfloat16"),
        (f"{MINIMAL}warmup_ratio: 5\n", "must be a fraction"),
        (f"{MINIMAL}init_lora_weights: false\n", "would change the model before training"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    assert any(said in line for line in problems(text)), problems(text)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!!set {{a}}", "!x y"]
)
def test_tags_are_refused_and_run_nothing(tag: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    assert any("is not allowed" in line for line in problems(f"{MINIMAL}output: {tag.format(canary)}\n"))
    assert not canary.exists()


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [BOMB, "[" * 100_000, "{a: " * 10_000, "- " * 100_000, "a: 1\n" * 200_000, f"[{'1,' * 400_000}]", "x" * 2_000_000],
    ids=["aliases", "lists", "mappings", "blocks", "keys", "items", "size"],
)
def test_a_hostile_file_is_refused_quickly(text: str) -> None:
    start = time.process_time()
    assert len(problems(text)) == 1
    assert time.process_time() - start < 3  # measured: at most 0.5


def test_unreadable_files_are_usage_errors(tmp_path: Path) -> None:
    utf16, large = tmp_path / "utf16.yaml", tmp_path / "large.yaml"
    utf16.write_text(MINIMAL, encoding="utf-16")
    large.write_bytes(b"#" * 50_000_000)
    for path, said in [
        (utf16, "UTF-8"),
        (large, "larger than"),
        (tmp_path, "cannot read"),
        (tmp_path / "no", "cannot read"),
    ]:
        with pytest.raises(UsageError, match=said):
            load(path)


def test_a_format_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_check, "find_spec", lambda name: None)
    found = problems("model: {name: m, quantize: nf4}\ndata: d\n")
    assert found == ["train.yaml:1  /model/quantize: nf4 needs the package bitsandbytes: pip install 'lorakit[quant]'"]


def test_the_output_must_be_a_directory_outside_the_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in problems(MINIMAL, f"output={tmp_path}/file")[0]
    assert "cannot be a directory" in problems(MINIMAL, f"output={'x' * 300}")[0]
    assert config(f"model: {'m' * 300}\ndata: {'d' * 300}\noutput: o").train.max_steps is None
    assert "inside the base model's directory" in problems(f"model: {tmp_path}\ndata: d\noutput: {tmp_path}/run\n")[0]


# --- other tools' names, short forms, overrides ---

SAMPLES: dict[str, Any] = {
    "model.name": "m",
    "model.dtype": "bfloat16",
    "data.path": "d",
    "data.valid": 0.1,
    "method.name": "lora",
}
SAMPLES |= {
    "method.rank_stabilized": True,
    "method.modules_to_save": ["score"],
    "method.layers": [1, 2],
    "optim.schedule": "linear",
}
SAMPLES |= {
    "train.checkpointing": True,
    "eval.load_best": True,
    "output": "out",
    "optim.lr": 0.01,
    "method.dropout": 0.25,
}


@pytest.mark.parametrize("alias", aliases.RENAMED)
def test_another_tools_name_means_our_key_and_is_noticed_once(alias: str) -> None:
    dotted = aliases.RENAMED[alias]
    section, _, key = dotted.partition(".")
    base = {"model": {"name": "m"}, "data": {"path": "d", "valid": 0.5}}
    base.get(section, {}).pop(key, None)
    sample = SAMPLES.get(dotted, 3)
    ours = json.loads(json.dumps(base))
    if key:
        ours.setdefault(section, {})[key] = sample
    else:
        ours[section] = sample
    expected, no_notices = loads(json.dumps(ours))
    found, notices = loads(json.dumps({**base, alias: sample}), name="f")
    assert found == expected
    assert no_notices == []
    assert notices == [f"f:1: {alias} is read as {dotted}"]
    inside = json.loads(json.dumps(base))
    inside.setdefault("train", {})[alias] = sample
    assert loads(json.dumps(inside))[0] == expected


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lora_target: all", "method: {target_modules: all-linear}"),
        ("lora_target: q_proj, v_proj", "method: {target_modules: [q_proj, v_proj]}"),
        ("lora_target_modules: [q_proj]", "method: {target_modules: [q_proj]}"),
        ("lora_target_linear: true", ""),
        ("init_lora_weights: Gaussian", "method: {init: gaussian}"),
        ("init_lora_weights: true", ""),
        ("bf16: true", "model.dtype: bfloat16"),
        ("bf16: false", "model.dtype: float32"),
        ("bf16: auto", ""),
        ("fp16: false", ""),
        ("num_layers: 4", "method: {last_n_layers: 4}"),
        ("num_layers: -1", ""),
        ("warmup_ratio: 0.1", "optim: {warmup: 0.1}"),
        ("warmup_steps: 10", "optim: {warmup: 10}"),
        ("logging_steps: 10", ""),
    ],
)
def test_what_other_tools_say_in_another_way(theirs: str, ours: str) -> None:
    found, notices = loads(MINIMAL + theirs)
    assert len(notices) == 1
    if ours.startswith("model."):
        assert found == config(MINIMAL, ours.replace(": ", "="))
    else:
        assert found == config(MINIMAL + ours)


def test_every_alias_leads_to_a_key_that_exists_and_hides_none() -> None:
    keys = {f"{section}.{key}" for section, names in all_keys().items() for key in names} | {"output"}
    assert set(aliases.RENAMED.values()) <= keys
    assert not set(aliases.OTHER_NAMES) & set(flat_names())


def test_a_key_needs_no_section_where_only_one_has_it() -> None:
    found, notices = loads(f"{MINIMAL}lr: 0.5\nr: 3\nlayers: [1]\n")
    assert (found.optim.lr, found.method.config, found.method.target.layers) == (0.5, METHODS["lora"](r=3), [1])
    assert len(notices) == 3


def test_overrides_win_over_the_file_and_the_file_over_defaults() -> None:
    text = f"{MINIMAL}optim: {{lr: 0.1, clip: 2}}\nmethod: {{rank_pattern: {{a.b: 2, c: 3}}}}\ntrain: {{epochs: 4}}\n"
    found = config(
        text, "learning_rate=5", "optim.lr=0.5", "model.name=x", "method.rank_pattern.a.b=9", "train.max_steps=7",
        'eval.prompts=["a, b"]', "output=a: b",
    )  # fmt: skip
    assert (found.optim.lr, found.optim.clip, found.optim.eps) == (0.5, 2.0, 1e-8)
    assert found.model.name == "x"
    assert found.method.target.rank_pattern == {"a.b": 9, "c": 3}
    assert (found.train.max_steps, found.train.epochs) == (7, 1.0)  # the file's epochs gave way
    assert found.eval.prompts == ("a, b",)
    assert config(text, "method.rank_pattern=null").method.target.rank_pattern is None


def test_a_wrong_override_is_shown_as_it_was_typed() -> None:
    found = problems(MINIMAL, "optim.lr=fast", "trian.seed=1", "seed", "learnin_rate=1")
    assert any(f.startswith("command line (optim.lr=fast)  /optim/lr: must be a number greater than 0") for f in found)
    assert "must have the form key=value" in "".join(found)
    assert "did you mean 'train'?" in "".join(found)
    assert "did you mean 'learning_rate'?" in "".join(found)
    assert len(found) == 4


def test_the_output_is_named_after_the_data_when_absent() -> None:
    assert [config(f"model: m\ndata: {d}").output for d in ("a/b.jsonl.gz", "a/b/", "'x.jsonl#20'")] == [
        "runs/b",
        "runs/b",
        "runs/x",
    ]


# --- comparing, describing ---


def test_only_what_is_looked_at_may_change_on_resume() -> None:
    a = config()
    b = config(MINIMAL, "output=elsewhere", "save_steps=3", "prompts=[x]", "lr=1", "r=4", "max_steps=9")
    assert diff(a, a) == []
    assert diff(a, b) == ["method.r", "optim.lr", "train.max_steps", "train.save_steps", "eval.prompts", "output"]
    assert resume_conflicts(a, b) == ["method.r", "optim.lr", "train.max_steps"]


def test_a_configuration_made_in_python_is_checked_by_the_same_rules() -> None:
    made = config()
    with pytest.raises(UsageError, match="/train/batch_size: must be a whole number at least 1, got 0"):
        check(replace(made, train=replace(made.train, batch_size=0)))
    with pytest.raises(UsageError, match="/train/max_steps: max_steps and epochs are both given"):
        check(replace(made, train=replace(made.train, max_steps=3, epochs=2.0)))
    assert list(contradictions(made)) == []


def test_every_key_is_described() -> None:
    for section in SECTIONS:
        assert all(key.help for key in section_keys(section).values())
    for name in METHODS:
        missing = {key.name for key in section_keys("method", name).values() if not key.help}
        assert not missing - {"rank_stabilized"}, (name, missing)
    assert key_help(Target)["rank_pattern"].startswith("name or regular expression")


SCHEMA = schema()


def accepts(rule: dict[str, Any], value: Any) -> bool:
    """Judge a value by the part of JSON Schema that ours uses: an independent reading of the same rules."""
    kinds = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None), "number": (int, float)}
    if rule.get("type") == "integer":
        ok = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    elif "type" in rule:
        ok = isinstance(value, kinds[rule["type"]]) and (rule["type"] == "boolean" or not isinstance(value, bool))
    else:
        ok = True
    if not ok:
        return False
    if isinstance(value, dict) and "properties" in rule:
        extra = set(value) - set(rule["properties"])
        if extra and rule.get("additionalProperties") is False:
            return False
        if not all(accepts(rule["properties"][k], v) for k, v in value.items() if k in rule["properties"]):
            return False
    elif isinstance(value, dict) and isinstance(rule.get("additionalProperties"), dict):
        if not all(accepts(rule["additionalProperties"], v) for v in value.values()):
            return False
    if isinstance(value, list):
        prefix = rule.get("prefixItems", [])
        rules = [*prefix, *[rule.get("items", {})] * (len(value) - len(prefix))]
        if not all(map(accepts, rules, value)) or not rule.get("minItems", 0) <= len(value) <= rule.get(
            "maxItems", 10**9
        ):
            return False
    return all(
        [
            "const" not in rule or value == rule["const"],
            "enum" not in rule or value in rule["enum"],
            "anyOf" not in rule or any(accepts(r, value) for r in rule["anyOf"]),
            "minLength" not in rule or len(value) >= rule["minLength"],
            "minimum" not in rule or value >= rule["minimum"],
            "maximum" not in rule or value <= rule["maximum"],
            "exclusiveMinimum" not in rule or value > rule["exclusiveMinimum"],
            "exclusiveMaximum" not in rule or value < rule["exclusiveMaximum"],
            set(rule.get("required", [])) <= set(value if isinstance(value, dict) else rule.get("required", [])),
        ]
    )


JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2,
    0.5,
    1.5,
    3.0,
    1e-4,
    2**70,
    "",
    "x",
    "1e-4",
    "cosine",
    "float32",
    "auto",
    "sft",
    "lora",
]
JUNK += [[], [0.5], [0.5, 0.9], [0.5, 2], ["x"], [1], [None], {}, {"a": 1}, {"a": "x"}]
# Left out: keys whose value another key can contradict, and ranges that only the method itself knows.
FREE = [
    ("model", "name"),
    ("model", "dtype"),
    ("data", "format"),
    ("data", "valid"),
    ("data", "skip_bad_rows"),
    ("eval", "prompts"),
]
FREE += [("optim", key) for key in section_keys("optim")] + [
    ("train", key) for key in ("task", "accumulate", "max_length", "seed")
]
FREE += [("method", key) for key in ("target_modules", "rank_pattern", "modules_to_save", "layers", "init", "nonsense")]


@given(
    st.lists(st.tuples(st.sampled_from(FREE), st.sampled_from(JUNK)), max_size=2),
    st.sampled_from([None, *SECTIONS, "method"]),
)
@settings(max_examples=600, deadline=None)
def test_the_schema_and_the_parser_accept_the_same_files(changes: list, short: str | None) -> None:
    tree: dict[str, Any] = as_tree(config(f"{MINIMAL}data.valid: 0.1\n".replace("data.valid", "val_size")))
    tree = json.loads(json.dumps(tree))
    for (section, key), value in changes:
        tree[section][key] = value
    if short is not None:
        tree[short] = changes[0][1] if changes else "adamw"
    for section in [s for s, value in tree.items() if value == {} and s not in ("model", "data")]:
        del tree[section]
    try:
        parsed = bool(loads(json.dumps(tree)))
    except UsageError:
        parsed = False
    assert accepts(SCHEMA, tree) == parsed


# --- settings that one controller or one optimizer declares ---

OWN: list[tuple[str, str, Any]] = [
    ("train: {controller: cola}", "train.controller", {"name": "cola", "links": 3, "step_down": 1.0}),
    ("train: {controller: {name: cola, links: 2}}", "train.controller", {"name": "cola", "links": 2, "step_down": 1.0}),
    (
        "train: {controller: {name: cola, links: 2.0}}",
        "train.controller",
        {"name": "cola", "links": 2, "step_down": 1.0},
    ),
    ("train: {controller: null}", "train.controller", None),
    ("controller: plora", "train.controller", {"name": "plora", "stages": 4, "momentum": 1.0}),
    ("optim: {name: riemannian}", "optim.options", {"reg": 0.01}),
    ("optim: {name: lora_pro, options: {adam: false}}", "optim.options", {"adam": False}),
    ("optim: {options: {}}", "optim.options", {}),
]


@pytest.mark.parametrize(("line", "key", "value"), OWN)
def test_own_settings_come_from_the_dataclass_of_the_file(line: str, key: str, value: Any) -> None:
    found = config(f"{MINIMAL}{line}\n")
    section, _, name = key.partition(".")
    assert as_tree(found)[section][name] == value
    assert config(dump(found)) == found
    check(found)
    tree = json.loads(json.dumps(as_tree(found)))
    assert accepts(SCHEMA, tree)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {controller: col}", "/train/controller: must be one of adalora, cola, molora, plora, relora"),
        ("train: {controller: {name: col}}", "unknown controller 'col'"),
        ("train: {controller: {links: 2}}", "a controller needs a name"),
        ("train: {controller: {name: cola, lnks: 2}}", "cola has no setting 'lnks'"),
        ("train: {controller: {name: cola, links: two}}", "cola.links: Input should be a valid integer"),
        ("train: {controller: {name: cola, links: 0}}", "links must be at least 1, not 0"),
        ("train: {controller: {name: plora, momentum: .inf}}", "no settings"),
        ("optim: {options: {rank: 2}}", "adamw has no options"),
        ("optim: {name: galore, options: {rnk: 2}}", "galore has no setting 'rnk'"),
        ("optim: {name: galore, options: {rank: 0}}", "rank and refresh must be at least 1"),
        ("{train: {controller: relora}, method: dora}", "relora cannot train the method dora: "),
    ],
)
def test_own_settings_that_are_wrong_are_named_with_their_line(line: str, message: str) -> None:
    text = f"{MINIMAL}{line}\n" if not line.startswith("{") else f"{{model: smollm2, data: rows.jsonl, {line[1:]}"
    (problem,) = problems(text)
    assert message in problem
    assert problem.startswith("train.yaml:")


STACKS = [
    ("[{name: lora, r: 4}, {name: houlsby}]", None),
    ("[{name: lora}]", "needs at least two methods, not 1"),
    ("[{name: lora, rr: 3}, {name: bitfit}]", "lora has no setting 'rr'; did you mean 'r'?"),
    ("[{name: lora, r: x}, {name: bitfit}]", "lora.r: Input should be a valid integer; it is 'x'"),
    ("[{name: lora, r: 0}, {name: bitfit}]", "r must be at least 1, not 0"),
    ("[{name: lora, init: nix}, {name: bitfit}]", "unknown init 'nix'"),
    ("[{name: lora, init: eva}, {name: bitfit}]", "goes by the one rank of a layer"),
    ("[{name: lorra}, {name: bitfit}]", "unknown method 'lorra'; did you mean 'lora'?"),
    ("[{r: 4}, {name: bitfit}]", "a part of a stack needs a name"),
    ("[1, 2]", "1 is no method"),
    ("[{name: stack}, {name: lora}]", "list its parts"),
    ("[{name: houlsby}, {name: lora}]", "LoRA cannot come after Houlsby; it changes the layer's matrix"),
    ("[{name: adalora}, {name: molora, top_k: 1}]", "each has a controller of its own"),
]


@pytest.mark.parametrize(("parts", "message"), STACKS)
def test_the_parts_of_a_stack_are_read_checked_and_written(parts: str, message: str | None) -> None:
    text = f"{MINIMAL}method: {{name: stack, parts: {parts}}}\n"
    if message is None:
        found = config(text)
        stack = METHODS["stack"]([METHODS["lora"](r=4), METHODS["houlsby"]()])
        assert found.method.config == stack
        assert loads(dump(found))[0] == found
        assert accepts(SCHEMA, json.loads(json.dumps(as_tree(found))))
    else:
        (problem,) = problems(text)
        assert message in problem
        assert problem.startswith("train.yaml:3  /method/")


def test_one_setting_of_a_controller_can_be_overridden() -> None:
    file = f"{MINIMAL}train: {{controller: cola}}\n"
    assert config(file, "train.controller.links=5").train.controller == {"name": "cola", "links": 5, "step_down": 1.0}
    both = config(
        MINIMAL, "train.controller=plora", "train.controller.stages=2", "optim=galore", "optim.options.rank=8"
    )
    assert both.train.controller == {"name": "plora", "stages": 2, "momentum": 1.0}
    assert both.optim.options is not None and both.optim.options["rank"] == 8
    assert resume_conflicts(config(file), config(file, "train.controller.links=5")) == ["train.controller"]
