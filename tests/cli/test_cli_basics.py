"""What holds for every command: help without torch, exit codes, the shape of errors, plain text, valid JSON."""

import errno
import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from lorakit.cli import errors, output
from lorakit.cli.doctor import EXTRAS
from lorakit.cli.machine import cores, memory_available, memory_limit, wait_politely
from lorakit.cli.main import COMMANDS, run
from lorakit.core import errors as core_errors
from lorakit.core.errors import LorakitError

HEAVY = {"torch", "transformers", "yaml", "rich", "safetensors", "numpy"}
NAMES = [name for name, _, _ in COMMANDS]
ALIASES = [alias for _, _, aliases in COMMANDS for alias in aliases]


def modules_after(code: str) -> set[str]:
    text = f"{code}\nimport sys\nprint('loaded', *sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_of_every_command_loads_nothing_heavy() -> None:
    calls = [["--help"], ["--version"], ["data", "--help"], ["data", "preview", "--help"]]
    calls += [
        [name, "--help"] for name in NAMES if name not in ("train", "plan", "sweep")
    ]  # these list the configuration's keys
    loaded = modules_after(f"from lorakit.cli.main import run\nfor call in {calls!r}: assert run(call) == 0, call")
    assert loaded & HEAVY == set()
    assert "typer" in loaded


def test_the_test_of_imports_can_fail() -> None:
    assert modules_after("from lorakit.cli.main import run\nrun(['schema'])") & HEAVY >= {"torch"}


def test_help_lists_the_commands_but_not_their_other_names(lorakit: Callable) -> None:
    done = lorakit("--help")
    listed = {line.split()[0] for line in done.out.partition("Commands:")[2].splitlines() if line.startswith("  ")}
    assert {*NAMES, "data"} <= listed
    assert not set(ALIASES) & listed
    assert "Exit codes: 0 done" in done.out


@pytest.mark.parametrize("alias", [*ALIASES, "merge_lora"])
def test_other_names_of_commands_work(alias: str, lorakit: Callable) -> None:
    assert lorakit(alias, "--help").code == 0


def test_train_help_lists_every_configuration_key(lorakit: Callable) -> None:
    from lorakit.train.config import SECTIONS
    from lorakit.train.config_schema import section_keys

    done = lorakit("train", "-h")
    for section in (*SECTIONS, "method"):
        for key in section_keys(section):
            assert f"--{section}.{key.replace('_', '-')}" in done.out
    assert done.out.startswith("Usage: lorakit train")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["docter"], 2, "Did you mean 'doctor'?"),
        (["doctor", "--jsn"], 2, "--json"),
        (["generate"], 2, "ADAPTER"),
        (["generate", "x", "--max-tokens", "0"], 2, "max-tokens"),
        (["train", "nowhere.yaml"], 2, "cannot read the configuration nowhere.yaml"),
        (["train", "--learning-rat", "1"], 2, "did you mean --learning-rate?"),
        (["train", "--lr"], 2, "--lr needs a value"),
        (["train", "a.yaml", "b.yaml"], 2, "more than one configuration file: a.yaml b.yaml"),
        (["train", "lr=fast", "model=m"], 2, "/optim/lr: must be a number greater than 0"),
        (["plan", "--model", "smollm2"], 2, "/data/path: is missing"),
        (["data", "preview", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["init", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["inspect", "nowhere"], 4, "nowhere is no adapter"),
        (["merge", "nowhere", "-o", "x"], 4, "nowhere is no adapter"),
        (["generate", "nowhere", "-p", "x"], 2, "nowhere"),
        (["report", "nowhere"], 4, "nowhere is no run"),
    ],
)
def test_mistakes_end_with_their_exit_code_and_a_fix(
    arguments: list[str], code: int, said: str, lorakit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lorakit(*arguments)
    assert done.code == code
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert said in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_no_arguments_show_the_help_and_are_an_error(lorakit: Callable) -> None:
    for arguments in ([], ["data"]):
        done = lorakit(*arguments)
        assert done.code == 2
        assert done.err.startswith("Usage: lorakit")


def test_tracebacks_are_shown_on_request_only(lorakit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in lorakit("inspect", "nowhere").err
    assert "Traceback" in lorakit("inspect", "nowhere", "--debug").err
    monkeypatch.setenv("LORAKIT_DEBUG", "1")
    assert "Traceback" in lorakit("inspect", "nowhere").err
    monkeypatch.setenv("LORAKIT_DEBUG", "0")
    assert "Traceback" not in lorakit("inspect", "nowhere").err


def test_an_error_has_four_parts() -> None:
    error = LorakitError("it broke", why="because", fix="mend it", where="here")
    assert errors.message(error) == "it broke\n  why   : because\n  fix   : mend it\n  where : here"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *[(cls("x"), cls.exit_code) for cls in vars(core_errors).values() if isinstance(cls, type)],
        (MemoryError("x"), 5),
        (OSError(errno.ENOSPC, "No space left on device"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 1),
        (KeyboardInterrupt(), 130),
        (typer.BadParameter("x"), 2),
        (SystemExit(143), 143),
        (BrokenPipeError(), 141),
        (RuntimeError("x"), 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert errors.exit_code(error) == code
    assert "Traceback" not in errors.message(error)


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from lorakit.cli.main import main; main(['schema'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert said == ""


def test_doctor_tells_the_truth(lorakit: Callable) -> None:
    import torch

    found = json.loads(lorakit("doctor", "--json").out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["machine"]["cores"] <= (os.cpu_count() or 1)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert 0 < found["machine"]["memory_available_gb"] <= found["machine"]["memory_gb"]
    assert set(found["models"]) == {"smollm2", "minilm"}
    for extra in found["extras"].values():
        assert extra["adds"]
    text = lorakit("doctor").out
    assert f"torch         {torch.__version__}" in text
    for name, extra in found["extras"].items():
        assert (f'pip install "lorakit[{name}]"' in text) == (not extra["installed"])


def test_doctor_knows_the_extras_that_can_be_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name, (packages, _) in EXTRAS.items():
        listed = " ".join(project["optional-dependencies"][name])
        assert all(package in listed for package in packages)


def test_the_schema_is_printed_as_json(lorakit: Callable) -> None:
    from lorakit.train.config_schema import schema

    assert json.loads(lorakit("schema").out) == schema()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "terminal", "pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"CI": "true"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    variables: dict[str, str], terminal: bool, pipe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b" in output.style("x", "red", Terminal())) == terminal
    assert ("\x1b" in output.style("x", "red", io.StringIO())) == pipe


def test_tables_align_words_left_and_numbers_right() -> None:
    assert output.table([("name", "count"), ("a", 5), ("long", 1234)]) == "name  count\na         5\nlong  1,234"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.json_result({"a": float("nan"), "b": [float("inf"), 1.5], "c": (1,)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [1]}


def test_quiet_keeps_notes_away(lorakit: Callable, tmp_path: Path, orders_file: Path, tiny_model: Path) -> None:
    for flags in (["-q"], []):
        done = lorakit("init", orders_file, "--model", tiny_model, "-o", tmp_path / "a.yaml", "--overwrite", *flags)
        assert done.code == 0
        assert ("wrote" in done.err) == (not flags)


# --- cores and memory ---


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "900000000 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cores_follow_the_containers_quota(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))


def test_memory_follows_the_containers_limit(tmp_path: Path) -> None:
    whole = memory_limit(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == whole > 0
    (tmp_path / "memory.max").write_text(str(10**9))
    (tmp_path / "memory.current").write_text(str(4 * 10**8))
    assert memory_limit(tmp_path) == 10**9
    assert memory_available(tmp_path) == 6 * 10**8


def test_the_users_own_waiting_policy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    wait_politely()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delenv("GOMP_SPINCOUNT")
    wait_politely()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_global_flags_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "schema"]) == run(["schema", "--quiet"]) == run(["--verbose", "schema", "-q"]) == 0
