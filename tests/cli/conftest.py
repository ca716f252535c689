"""The command line called in this process: exit code, stdout, stderr; and one tiny trained run for all tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from lorakit.cli.main import run


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def lorakit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def orders_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lorakit.data import orders_task

    file = tmp_path_factory.mktemp("rows") / "orders.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in orders_task.rows(0, 16, 4)[0]))
    return file


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, orders_file: Path) -> Path:
    """A finished run of `lorakit train` on the tiny model, large enough a change to be seen in bfloat16."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    flags = [
        "--model",
        tiny_model,
        "--data",
        orders_file,
        "--output",
        output,
        "--max-steps",
        5,
        "--learning_rate",
        0.05,
    ]
    more = ["--dtype", "float32", "lora_r=4", "train.batch_size=4", "schedule=constant"]
    assert run(["train", "-q", *map(str, flags), *more]) == 0
    return output
