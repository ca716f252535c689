"""Every block of code in the README and the guides is run, in order, in one directory, as a reader would."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from lorakit.cli.main import run

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ["README.md", "docs/add-a-method.md"]


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


def shell(line: str) -> None:
    """Run a line of a console block: our command for real, the others as far as they can be checked without a network."""
    words = line.split()
    if words[0] == "lorakit":
        assert run(words[1:]) == 0, line
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"lorakit\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys()
        for pinned in re.findall(r"[\w-]+==[\d.]+", line):
            assert pinned in (ROOT / "Makefile").read_text(), "another version than the one that is tested"
    else:
        pytest.fail(f"a command nobody runs: {line}")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from lorakit.data import orders_task

    rows = orders_task.rows(0, 20, 4)[0]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page: str, workplace: Path) -> None:
    from lorakit.core.errors import LorakitError
    from lorakit.models.resolve import resolve

    if page == "README.md":
        try:
            resolve("smollm2")
        except LorakitError as error:
            pytest.skip(f"the README's model is not installed: {error.what}")
    found = blocks(page)
    assert found
    names: dict[str, object] = {"__name__": "docs"}
    for language, text in found:
        if language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "console":
            for line in text.splitlines():
                shell(line.removeprefix("$ "))
        else:
            assert language == "text", f"a {language} block that nobody runs"
    shutil.rmtree(workplace / "runs", ignore_errors=True)


def test_files_that_are_linked_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
