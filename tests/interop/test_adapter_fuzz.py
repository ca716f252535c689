"""Damaged adapter files, thousands of them: refused with a FileError, or loaded right."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit as lk
from lorakit.core.errors import FileError
from lorakit.interop.read import read_tensors

CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"


class Mutator:
    """Damages an adapter's files in ways that keep most of their structure."""

    ODD: tuple[Any, ...] = (
        None,
        True,
        False,
        0,
        -1,
        3,
        10**30,
        2.5,
        1e308,
        "",
        "q_proj",
        ".*",
        [],
        {},
        [[]],
        [0],
        ["q_proj"],
        {"": 0},
    )

    def __init__(self, good: dict[str, bytes], seed: int) -> None:
        self.files, self.random = dict(good), random.Random(seed)

    def run(self) -> dict[str, bytes]:
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            self.random.choice(
                (self.config, self.config, self.side, self.header, self.header, self.bytes, self.tensor)
            )()
        return self.files

    def odd(self, like: Any = None) -> Any:
        near = {int: (like, 1), float: (like, -1.0), str: (like, like)} if like is not None else {}
        if self.random.random() < 0.3 and type(like) in near:
            value, by = near[type(like)]
            return value + by if self.random.random() < 0.5 else value * 2
        return self.random.choice(self.ODD)

    def change(self, tree: Any) -> None:
        """Change, remove or add something anywhere in a JSON tree."""
        while True:
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            if not keys:
                return
            key = self.random.choice(keys)
            if isinstance(tree[key], dict | list) and tree[key] and self.random.random() < 0.7:
                tree = tree[key]
                continue
            what = self.random.random()
            if what < 0.7:
                tree[key] = self.odd(tree[key])
            elif what < 0.85:
                tree.pop(key)
            elif isinstance(tree, dict):
                tree[self.random.choice(("q_proj", "bias", "x", str(key) + "s"))] = tree[key]
            else:
                tree.append(tree[key])
            return

    def json_file(self, name: str) -> None:
        try:
            tree = json.loads(self.files[name])
        except ValueError:  # a change before this one broke it
            return
        self.change(tree)
        self.files[name] = json.dumps(tree).encode()

    def config(self) -> None:
        self.json_file(CONFIG)

    def side(self) -> None:
        self.json_file(SIDE)

    def header(self) -> None:
        content = self.files[WEIGHTS]
        length = int.from_bytes(content[:8], "little")
        try:
            tree = json.loads(content[8 : 8 + length])
        except ValueError:
            return
        self.change(tree)
        text = json.dumps(tree).encode()
        self.files[WEIGHTS] = struct.pack("<Q", len(text)) + text + content[8 + length :]

    def bytes(self) -> None:
        name = self.random.choice(list(self.files))
        content = bytearray(self.files[name])
        for _ in range(self.random.choice((1, 2, 8))):
            if content:
                content[self.random.randrange(len(content))] = self.random.randrange(256)
        self.files[name] = bytes(content[: self.random.choice((len(content), len(content), len(content) // 2))])

    def tensor(self) -> None:
        try:
            tensors = safetensors.torch.load(self.files[WEIGHTS])
        except safetensors.SafetensorError:
            return
        if not tensors:
            return
        key = self.random.choice(list(tensors))
        tensor = tensors.pop(key)
        changed = self.random.choice(
            (tensor.T.contiguous(), tensor.half(), tensor[:1].clone(), tensor.to(torch.int8), tensor / 0, None)
        )
        new = self.random.choice((key, key, key.replace("q_proj", "v_proj"), key.replace("0", "1"), key + ".x"))
        self.files[WEIGHTS] = safetensors.torch.save(tensors if changed is None else {**tensors, new: changed})


def test_damaged_files_are_refused_or_load_right(tmp_path: Path) -> None:
    """Whatever happens to the files: FileError, or exactly the tensors of the file on the layers that they name."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({n: nn.Linear(16, 16) for n in ("q_proj", "v_proj")}) for _ in range(2))}
    )
    lk.attach(model, lk.LoRA(r=4, alpha=16), target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.v_proj": 3})
    lk.save(model, tmp_path / "good")
    lk.detach(model)
    good = {file.name: file.read_bytes() for file in (tmp_path / "good").iterdir()}
    directory, loaded = tmp_path / "a", 0
    directory.mkdir()
    for seed in range(2000):
        files = Mutator(good, seed).run()
        for name, content in files.items():
            (directory / name).write_bytes(content)
        try:
            lk.load(model, directory)
        except FileError as error:
            assert str(error).isprintable() or "\n" in str(error), seed
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        else:
            loaded += 1
            tensors = {k: t for k, t in safetensors.torch.load(files[WEIGHTS]).items() if "base_layer" not in k}
            held = {
                f"base_model.model.{p}.{k}.weight": t
                for p, _, a in lk.adapters(model)
                for k, t in a.state_dict().items()
            }
            assert held.keys() == tensors.keys(), seed
            assert all(torch.equal(held[k], t.float()) for k, t in tensors.items()), seed
            assert all(torch.isfinite(layer(torch.ones(16))).all() for _, layer, _ in lk.adapters(model)), seed
            lk.detach(model)
        assert lk.names(model) == [], seed
    assert 200 < loaded < 1200, f"{loaded} of 2000 loaded: the damage is too strong or too weak to tell anything"


def test_tensors_are_read_as_the_safetensors_library_reads_them(tmp_path: Path) -> None:
    """The same files refused, the same tensors of the others; ours are memory of their own."""
    torch.manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    every = {f"{i}": torch.randn(i, 3).mul(100).to(kind) for i, kind in enumerate(kinds)}
    every |= {"bool": torch.rand(5) > 0.5, "bytes": torch.arange(7, dtype=torch.uint8), "one": torch.tensor(2.0)}
    every["small"] = torch.arange(-3, 4, dtype=torch.int8)
    good = safetensors.torch.save(every, metadata={"format": "pt"})
    file, read = tmp_path / WEIGHTS, 0
    for seed in range(1000):
        damage = Mutator({WEIGHTS: good}, seed)
        for _ in range(seed % 3):
            damage.random.choice((damage.header, damage.bytes))()
        file.write_bytes(damage.files[WEIGHTS])
        try:
            theirs = safetensors.torch.load(damage.files[WEIGHTS])
        except safetensors.SafetensorError:
            with pytest.raises(FileError):
                read_tensors(file)
            continue
        read += 1
        ours = read_tensors(file)
        assert {k: (t.dtype, t.shape, bits(t)) for k, t in ours.items()} == {
            k: (t.dtype, t.shape, bits(t)) for k, t in theirs.items()
        }, seed
        filled = [t.untyped_storage().data_ptr() for t in ours.values() if t.numel()]
        assert len(set(filled)) == len(filled)
    assert 334 < read < 900, read  # the 334 whole ones, and some of the damaged


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())
