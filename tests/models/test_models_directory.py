import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lorakit.core.errors import FileError
from lorakit.models.directory import check_directory, fingerprint, tensors


@pytest.fixture
def model(tmp_path, tiny_model):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_headers_say_what_safetensors_says(model):
    found = tensors(model)
    with safe_open(model / "model.safetensors", "pt") as file:
        assert found.keys() == set(file.keys())
        for name, tensor in found.items():
            assert list(tensor.shape) == file.get_slice(name).get_shape()
            raw = (model / "model.safetensors").read_bytes()[tensor.start : tensor.stop]
            stored = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(tensor.shape)
            assert torch.equal(stored, file.get_tensor(name))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_file_cut_short_is_refused(model, keep):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.raises(FileError, match="damaged"):
        check_directory(model)
    file.write_bytes(whole + b"\0")
    with pytest.raises(FileError, match="damaged"):
        check_directory(model)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_header_raises_anything_but_a_file_error(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4)}, directory / "model.safetensors")
    raw = bytearray((directory / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(raw)
    try:
        check_directory(directory)
    except FileError:
        pass


def test_pickles_are_never_opened(model, tmp_path):
    class Canary:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(FileError, match="only as pickles"):
        check_directory(model)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model_directory_is_named(model):
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="is an adapter, not a model"):
        check_directory(model)
    (model / "adapter_config.json").unlink()
    for content in ("", "[]", '{"a":', "[" * 100_000):
        (model / "config.json").write_text(content)
        with pytest.raises(FileError, match=r"config\.json"):
            check_directory(model)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")  # reading it would wait for ever
    with pytest.raises(FileError, match="not a regular file"):
        check_directory(model)


def test_a_huge_json_file_is_refused_unread(model):
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(300 << 20)  # a sparse file: it takes no room
    with pytest.raises(FileError, match=r"tokenizer\.json is larger than 256 MB"):
        check_directory(model)


def shard(model):
    """Split the weights into two files, in another order."""
    with safe_open(model / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in sorted(file.keys(), reverse=True)}
    (model / "model.safetensors").unlink()
    names = list(weights)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == part}, model / part)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_must_all_be_there_and_inside(model):
    shard(model)
    check_directory(model)
    (model / "part-1.safetensors").unlink()
    with pytest.raises(FileError, match=r"missing: part-1\.safetensors"):
        check_directory(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(FileError, match="index of the weight shards is damaged"):
        check_directory(model)


def test_the_fingerprint_follows_the_content_not_the_files(model):
    before = fingerprint(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "x"}))
    shard(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("change", ["scale one tensor a little", "rename a tensor", "another dtype", "rope"])
def test_the_fingerprint_changes_with_the_model(model, change):
    before, file = fingerprint(model), model / "model.safetensors"
    with safe_open(file, "pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "rope":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    elif change == "rename a tensor":
        weights["other"] = weights.pop(name)
    else:
        weights[name] = weights[name].half() if "dtype" in change else weights[name] * 1.001
    save_file(weights, file)
    assert fingerprint(model) != before
