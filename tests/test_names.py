"""Every method is `lorakit.<its dataclass>`, from its file alone, and asking for one imports no other."""

import subprocess
import sys

import pytest

import lorakit as lk
from lorakit.core.registry import METHODS


def test_every_method_has_its_name() -> None:
    """A class that is not named after its file could not be found without importing every file."""
    for file in METHODS:
        assert METHODS[file].__name__.lower() == file.replace("_", "")
        assert getattr(lk, METHODS[file].__name__) is METHODS[file]
        assert METHODS[file].__name__ in dir(lk)


def test_they_hide_nothing() -> None:
    assert {method.__name__ for method in METHODS.values()} & set(lk.__all__) == {"LoRA"}


@pytest.mark.parametrize("name", ["Dora", "dora", "LoRA_FA", "lora", "nothing", "__wrapped__"])
def test_what_is_no_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(lk, name)


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_names_cost_nothing_until_they_are_used() -> None:
    assert {name for name in loaded_after("import lorakit") if name.startswith("lorakit")} == {"lorakit"}
    loaded = loaded_after("from lorakit import DoRA")
    files = {name.rpartition(".")[2] for name in loaded if name.startswith("lorakit.methods.")}
    assert {name for name in files if not name.startswith("_")} == {"dora"}
    assert "torch" not in loaded_after("import lorakit\ntry:\n    lorakit.DoRa2\nexcept AttributeError:\n    pass")
