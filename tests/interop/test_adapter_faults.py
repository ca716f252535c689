"""Adapter files from strangers: each fault is refused with a FileError that names it, fast, and the model is as it was."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.core.errors import DivergenceError, FileError, UsageError
from lorakit.interop import read

CONFIG, WEIGHTS, SIDE = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ESC = "\x1b[31m"


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1)).eval()


@pytest.fixture
def model(base: nn.Module) -> Iterator[nn.Module]:
    yield base
    lk.detach(base)


@pytest.fixture(scope="module")
def good(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a good adapter, r 4, on q_proj and v_proj."""
    lk.attach(base, lk.LoRA(r=4, alpha=16), target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for _, _, adapter in lk.adapters(base):
            adapter.lora_B.normal_()
    directory = tmp_path_factory.mktemp("good") / "a"
    lk.save(base, directory)
    lk.detach(base)
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def adapter(good: dict[str, bytes], tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name, content in good.items():
        (directory / name).write_bytes(content)
    return directory


def resident(field: str) -> int:
    """Bytes of memory now (VmRSS) or at the most (VmHWM)."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field)) * 1024


def refused(model: nn.Module, directory: Path, *words: str, megabytes: float = 50) -> FileError:
    """Load, and see that it is refused: with these words, printable, in time and memory, the model untouched.

    In time: not in what a file can make of it (minutes to years); all take below two seconds on a free core.
    """
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    if STATUS.exists():
        CLEAR.write_text("5")  # start the high-water mark anew
    memory, began = resident("VmRSS") if STATUS.exists() else 0, time.process_time()
    with pytest.raises(FileError) as caught:
        lk.load(model, directory)
    assert time.process_time() - began < 20
    assert not STATUS.exists() or resident("VmHWM") - memory < megabytes * 1e6
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert [w for w in words if w not in text] == [], text
    assert len(text) < 5000
    assert all(c.isprintable() or c == "\n" for c in text)
    assert lk.names(model) == []
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    return caught.value


def configure(directory: Path, file: str = CONFIG, **values: Any) -> None:
    content = json.loads((directory / file).read_text()) | values
    (directory / file).write_text(json.dumps(content))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of the file."""
    tensors = safetensors.torch.load((directory / WEIGHTS).read_bytes())
    safetensors.torch.save_file(change(tensors), directory / WEIGHTS)


def raw(directory: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file byte by byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def split(directory: Path) -> tuple[dict[str, Any], bytes]:
    content = (directory / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_the_good_one_loads(model: nn.Module, adapter: Path) -> None:
    tensors = safetensors.torch.load((adapter / WEIGHTS).read_bytes())
    lk.load(model, adapter)
    assert len(list(lk.adapters(model))) == 4
    assert all(torch.equal(a.lora_A, tensors[f"base_model.model.{p}.lora_A.weight"]) for p, _, a in lk.adapters(model))


# A01, A02: no safetensors file

NOT_SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "7 bytes": b"1234567",
    "length 0": struct.pack("<Q", 0),
    "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "longer than the file": struct.pack("<Q", 1000) + b"{}",
    "101 MB": struct.pack("<Q", 101 << 20) + b"{}",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "not JSON": struct.pack("<Q", 4) + b"{,,}",
    "array": struct.pack("<Q", 4) + b"[{}]",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "deep object": struct.pack("<Q", 500_000) + b'{"a":' * 100_000,
    "long number": struct.pack("<Q", 100_006) + b'{"a":' + b"9" * 100_000 + b"}",
    "ZIP": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("case", NOT_SAFETENSORS)
def test_no_safetensors_file(model: nn.Module, adapter: Path, case: str) -> None:
    (adapter / WEIGHTS).write_bytes(NOT_SAFETENSORS[case])
    refused(model, adapter, WEIGHTS)


# A03: headers that do not say what the data is

ENTRIES: dict[str, dict[str, Any]] = {
    "negative": {"shape": [-4, -16]},
    "float": {"shape": [4.0, 16]},
    "boolean": {"shape": [True, 64]},
    "text": {"shape": "64"},
    "object": {"shape": {"4": 16}},
    "overflow": {"shape": [1 << 62, 1 << 62]},
    "huge": {"shape": [1 << 39, 1 << 39]},
    "nothing": {"shape": None},
    "dtype": {"dtype": "F13"},
    "no dtype": {"dtype": None},
    "list as dtype": {"dtype": ["F32"]},
    "offsets": {"data_offsets": [0, 1 << 60]},
    "offsets turned round": {"data_offsets": [256, 0]},
    "offsets as text": {"data_offsets": "0,256"},
    "overlap": {"data_offsets": [0, 256]},
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_wrong_entry(model: nn.Module, adapter: Path, case: str) -> None:
    header, data = split(adapter)
    last = list(header)[-1] if case == "overlap" else Q0
    header[last] |= ENTRIES[case]
    raw(adapter, header, data)
    refused(model, adapter, WEIGHTS)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"PK\x05\x06" + bytes(18), lambda d: b""])
def test_data_of_another_length(model: nn.Module, adapter: Path, change: Callable[[bytes], bytes]) -> None:
    header, data = split(adapter)
    raw(adapter, header, change(data))
    refused(model, adapter, WEIGHTS, "bytes")


# A04, A05, A06: names


@pytest.mark.parametrize("same", [True, False])
def test_a_name_twice(model: nn.Module, adapter: Path, same: bool) -> None:
    header, data = split(adapter)
    again = header[Q0] if same else {**header[Q0], "data_offsets": [0, 0], "shape": [0]}
    raw(adapter, json.dumps(header)[:-1].encode() + f", {json.dumps(Q0)}: {json.dumps(again)}}}".encode(), data)
    refused(model, adapter, "twice", Q0)


def test_a_name_twice_among_very_many(model: nn.Module, adapter: Path) -> None:
    """Looking for the one that is there twice must not take the square of their number."""
    entry = ':{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"{i}"{entry}' for i in range(100_000)]
    raw(adapter, ("{" + ",".join([*names, names[-1]]) + "}").encode())
    refused(model, adapter, "99999", megabytes=200)


@pytest.mark.parametrize("count", [60_000, 1_000_000])
def test_a_million_empty_tensors(model: nn.Module, adapter: Path, count: int) -> None:
    entries = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    raw(adapter, f"{{{entries}}}".encode())
    refused(model, adapter, WEIGHTS, megabytes=150)


@pytest.mark.parametrize(
    "name", ["../../canary", "a\0b", f"{ESC}red\n", "x" * 1_000_000, "\u202etxt.exe", f"{ESC}.base_layer.weight", ""]
)
def test_an_evil_name(model: nn.Module, adapter: Path, name: str) -> None:
    rewrite(adapter, lambda tensors: {**tensors, name: torch.zeros(1)})
    refused(model, adapter, WEIGHTS, "base weight" if "base_layer" in name else "not used")
    assert not (adapter / "../../canary").exists()


# A07-A12: tensors that are not those of this model and configuration


def halves(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "half", dict(list(tensors.items())[: len(tensors) // 2])
    yield "only A", {k: t for k, t in tensors.items() if "lora_A" in k}
    yield "none", {}


@pytest.mark.parametrize("case", ["half", "only A", "none"])
def test_tensors_are_missing(model: nn.Module, adapter: Path, case: str) -> None:
    rewrite(adapter, lambda tensors: dict(halves(tensors))[case])
    refused(model, adapter, "missing", "lora_B")


EXTRA = {
    "layer": "base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight",
    "prefix": Q0.removeprefix("base_model.model."),
    "magnitude": Q0.replace("lora_A.weight", "lora_magnitude_vector"),
    "bias": Q0.replace("lora_A.weight", "lora_B.bias"),
    "adapter's name": Q0.replace("lora_A", "lora_A.default"),
}


@pytest.mark.parametrize("case", EXTRA)
def test_a_tensor_too_many(model: nn.Module, adapter: Path, case: str) -> None:
    rewrite(adapter, lambda tensors: {**tensors, EXTRA[case]: torch.zeros(4, 16)})
    refused(model, adapter, "not used", EXTRA[case])


def test_targets_narrower_and_wider_than_the_file(model: nn.Module, adapter: Path) -> None:
    configure(adapter, target_modules=["q_proj"])
    refused(model, adapter, "not used", "v_proj")
    configure(adapter, target_modules=["q_proj", "v_proj", "k_proj"])
    refused(model, adapter, "missing", "k_proj")
    configure(adapter, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    refused(model, adapter, "not used", "layers.1.self_attn.q_proj")
    configure(adapter, exclude_modules=None, layers_to_transform=[0])
    refused(model, adapter, "not used", "layers.1.")


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda A: torch.zeros(2, 16),
    "width": lambda A: torch.zeros(4, 32),
    "transposed": lambda A: A.T.contiguous(),
    "flat": lambda A: A.flatten(),
    "one more dimension": lambda A: A[None],
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_wrong_shape(model: nn.Module, adapter: Path, case: str) -> None:
    rewrite(adapter, lambda tensors: {**tensors, Q0: SHAPES[case](tensors[Q0])})
    refused(model, adapter, "wrong shape", Q0, "[4, 16]")


def test_A_and_B_exchanged(model: nn.Module, adapter: Path) -> None:
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    rewrite(adapter, lambda tensors: {k.replace(f := k.split(".")[-2], swap[f]): t for k, t in tensors.items()})
    refused(model, adapter, "wrong shape", Q0)


def test_a_rank_that_is_not_the_files(model: nn.Module, adapter: Path) -> None:
    configure(adapter, r=8)
    refused(model, adapter, "wrong shape", "expected [8, 16]")
    configure(adapter, r=4, rank_pattern={"v_proj": 2})
    refused(model, adapter, "wrong shape", "v_proj", "expected [2, 16]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number(model: nn.Module, adapter: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[Q0][1, 2] = tensors[Q0][3, 4] = value
        return tensors

    rewrite(adapter, spoil)
    refused(model, adapter, Q0, "2 NaN or infinite")


def test_a_double_that_is_infinite_as_a_float(model: nn.Module, adapter: Path) -> None:
    rewrite(adapter, lambda tensors: {**tensors, Q0: torch.full((4, 16), 1e300, dtype=torch.float64)})
    refused(model, adapter, Q0, "64 NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_a_dtype_that_is_no_plain_float(model: nn.Module, adapter: Path, dtype: torch.dtype) -> None:
    rewrite(adapter, lambda tensors: {**tensors, Q0: tensors[Q0].to(dtype)})
    refused(model, adapter, Q0, "dtype")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_plain_floats_are_cast(model: nn.Module, adapter: Path, dtype: torch.dtype) -> None:
    kept = safetensors.torch.load((adapter / WEIGHTS).read_bytes())[Q0].to(dtype)
    rewrite(adapter, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    lk.load(model, adapter)
    loaded = next(a for path, _, a in lk.adapters(model) if path == "model.layers.0.self_attn.q_proj").lora_A
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, kept.float())


# A13-A17: adapter_config.json


def without(key: str) -> dict[str, Any]:
    return {"__without__": key}


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"alpha {value!r}"[:30]: ({"lora_alpha": value}, "alpha")
        for value in (float("nan"), float("inf"), 1e38, -16, 0)
    },
    **{f"alpha {value!r}"[:30]: ({"lora_alpha": value}, "alpha") for value in ("16", None, True, [16], 10**400)},
    **{f"r {value!r}"[:30]: ({"r": value}, "") for value in (0, -8, 2.5, True, "4", None, [4], 10**400)},
    **{f"r {value}": ({"r": value}, f"rank {value}") for value in (5_000_000, 2**63)},
    "no r": (without("r"), "lacks r"),
    "no alpha": (without("lora_alpha"), "lacks lora_alpha"),
    "no peft_type": (without("peft_type"), "peft_type"),
    "no targets": (without("target_modules"), "target_modules"),
    "rank in a pattern": ({"rank_pattern": {"q_proj": 5_000_000}}, "rank 5000000"),
    "rank below 0 in a pattern": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": 1e38}}, "alpha_pattern.q_proj"),
    "alpha in a pattern, endless": ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern.q_proj"),
    "text in a pattern": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj"),
    "list as pattern": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    "rank pattern for nothing": ({"rank_pattern": {"w_proj": 2}}, "w_proj"),
    "dropout": ({"lora_dropout": 1.5}, "dropout"),
    "rslora as text": ({"use_rslora": "yes"}, "rank_stabilized"),
    "peft_type": ({"peft_type": "BOGUS"}, "BOGUS"),
    "peft_type escape": ({"peft_type": ESC + "x" * 100_000}, "peft_type"),
    "peft_type list": ({"peft_type": ["LORA"]}, "peft_type"),
    "targets of numbers": ({"target_modules": [1, 2]}, "target_modules"),
    "targets null": ({"target_modules": None}, "target_modules"),
    "targets an object": ({"target_modules": {"q_proj": 1}}, "target_modules"),
    "targets unknown": ({"target_modules": ["q_proj", "v_proj", "w_proj"]}, "w_proj"),
    "targets escape": ({"target_modules": [ESC + "q_proj"]}, "q_proj"),
    "targets very many": ({"target_modules": [f"w{i}" for i in range(49_999)]}, "w0"),
    "targets more than tensors": ({"target_modules": ["q_proj"] * 60_000}, "target_modules"),
    "excluded number": ({"exclude_modules": 5}, "exclude_modules"),
    "saved number": ({"modules_to_save": [5]}, "modules_to_save"),
    "saved text": ({"modules_to_save": "lm_head"}, "modules_to_save"),
    "saved unknown": ({"modules_to_save": ["score"]}, "score"),
    "saved but not there": ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "everything saved": ({"modules_to_save": ["model"]}, "model"),
    "layers": ({"layers_to_transform": [0, 7]}, "7"),
    "layers below 0": ({"layers_to_transform": -1}, "layers_to_transform"),
    "bias": ({"bias": "all"}, "bias"),
    "another method than the side file's": ({"use_dora": True}, "lorakit.json says that the method is 'lora'"),
    "unknown setting": ({"use_qdora": {"a": 1}}, "use_qdora"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting(model: nn.Module, adapter: Path, case: str) -> None:
    values, word = SETTINGS[case]
    config = json.loads((adapter / CONFIG).read_text()) | values
    config.pop(config.pop("__without__", ""), None)
    (adapter / CONFIG).write_text(json.dumps(config))
    refused(model, adapter, word)


def test_dora_without_magnitudes(model: nn.Module, adapter: Path) -> None:
    (adapter / SIDE).unlink()
    configure(adapter, use_dora=True)
    refused(model, adapter, "missing", "lora_magnitude_vector")


@pytest.mark.parametrize(
    "side",
    [
        {"method": "lora"},
        {"method": {"name": "bogus"}},
        {"method": {"name": 3}},
        {"method": {"name": "lora", "init": 5}},
        {"parts": []},
        {"parts": {"model.layers.0.self_attn.q_proj": {"q": {"r": "4"}}}},
        {"parts": {"model.layers.0.self_attn.q_proj": {"q": {"r": 5_000_000}}}},
        {"parts": {"model.layers.0.self_attn.q_proj": {"nowhere": {"r": 2, "alpha": 2}}}},
        {"fused": {"q_proj": 5}},
        {"fused": {"q_proj": {"q": -5, "k": 21}}},
        {"fused": {"q_proj": {"q": [[0, 1 << 40]]}}},
        {"fused": {"q_proj": {"q": [[0, 2_000_000_000]]}}},
        {"fused": {"q_proj": {"q": [[0, 16]] * 100_000}}},
        {"fused": {"q_proj": {"q": [[0, 4, 8]]}}},
        {"fused": {"q_proj": {"q": []}}},
        {"format": 2},
        {"format": ESC * 1000},
    ],
    ids=lambda side: str(side)[:50],
)
def test_a_wrong_side_file(model: nn.Module, adapter: Path, side: dict[str, Any]) -> None:
    configure(adapter, SIDE, **side)
    refused(model, adapter)


REDOS = [
    "((a+)+)+Z",
    "(([a-z_.0-9]+)+)+Z",
    ".?" * 30 + "Z",
    "(?:.|..)" * 30 + "Z",
    "(?:.?){40}Z",
    ".*.*.*.*.*.*Z",
    "(a*)*" * 300 + "Z",
]
REDOS += [
    "(?:" * 90 + ".*" + ")*" * 90 + "Z",
    "(" * 5000,
    "x{100000000}",
    "(){4000000000}q",
    r"(.+)\1Z",
    "(?>.*)Z",
    "(?i)Q_PROJ",
    "[" * 1000,
    "a" * 3000,
]


@pytest.mark.parametrize("pattern", REDOS, ids=lambda p: p[:20])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_never_ends(model: nn.Module, adapter: Path, field: str, pattern: str) -> None:
    configure(adapter, **{field: {pattern: 4} if field.endswith("_pattern") else pattern})
    refused(model, adapter)


def test_patterns_that_are_too_many(model: nn.Module, adapter: Path) -> None:
    configure(adapter, rank_pattern={f".*.*.*{i}": 4 for i in range(100_000)})
    refused(model, adapter)


def text_files() -> Iterator[tuple[str, bytes]]:
    yield "not JSON", b"r: 4"
    yield "list", b"[]"
    yield "empty", b""
    yield "100 MB", b'{"r":4,' + b" " * (100 << 20) + b"}"
    yield "twice", b'{"r": 4, "r": 8}'
    yield "UTF-16", '{"r": 4}'.encode("utf-16")
    yield "deep", b'{"a":' * 200_000
    yield "number", b'{"r":' + b"9" * 100_000 + b"}"


@pytest.mark.parametrize("case", dict(text_files()))
@pytest.mark.parametrize("name", [CONFIG, SIDE])
def test_a_text_file_that_is_none(model: nn.Module, adapter: Path, name: str, case: str) -> None:
    (adapter / name).write_bytes(dict(text_files())[case])
    refused(model, adapter, name)


def test_a_byte_order_mark_and_fields_without_effect_are_fine(model: nn.Module, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text()) | {
        "revision": "main",
        "inference_mode": False,
        "loftq_config": {},
    }
    (adapter / CONFIG).write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    lk.load(model, adapter)


def test_nothing_that_a_config_names_is_imported(
    model: nn.Module, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "canary_module.py").write_text("raise SystemExit('a file of the adapter was run')")
    monkeypatch.syspath_prepend(adapter)
    mapping = {"parent_library": "canary_module", "base_model_class": "Evil"}
    configure(adapter, auto_mapping=mapping, megatron_core="canary_module")
    configure(adapter, SIDE, auto_map={"AutoModel": "canary_module.Evil"})
    lk.load(model, adapter)
    lk.detach(model)
    assert "canary_module" not in sys.modules
    configure(adapter, peft_type="canary_module", tokenizer_kwargs={"trust_remote_code": True})
    refused(model, adapter, "canary_module")
    configure(adapter, SIDE, method={"name": "canary_module"})
    refused(model, adapter)
    assert "canary_module" not in sys.modules


# A20, A21: the directory


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


def test_a_pickle_is_never_opened(model: nn.Module, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter.parent)
    torch.save(Canary(), adapter / "adapter_model.bin")
    lk.load(model, adapter)  # the safetensors file is there too, and is the one that counts
    lk.detach(model)
    (adapter / WEIGHTS).unlink()
    refused(model, adapter, "pickle", "safetensors")
    (adapter / "adapter_model.bin").rename(adapter / WEIGHTS)
    refused(model, adapter, WEIGHTS)
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SIDE])
@pytest.mark.parametrize(
    "what", ["FIFO", "link out", "link to nothing", "link to itself", "directory", "device", "unreadable"]
)
def test_a_file_that_is_no_file(model: nn.Module, adapter: Path, name: str, what: str) -> None:
    file = adapter / name
    content = file.read_bytes()
    file.unlink()
    outside = adapter.parent / "outside"
    outside.write_bytes(content)
    make: dict[str, Callable[[], Any]] = {
        "FIFO": lambda: os.mkfifo(file),
        "link out": lambda: file.symlink_to(outside),
        "link to nothing": lambda: file.symlink_to(adapter / "nowhere"),
        "link to itself": lambda: file.symlink_to(file),
        "directory": file.mkdir,
        "device": lambda: file.symlink_to("/dev/zero"),
        "unreadable": lambda: (file.write_bytes(content), file.chmod(0)),
    }
    make[what]()
    if what == "unreadable" and os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    refused(model, adapter, name)


def test_links_inside_are_followed_as_the_hub_makes_them(model: nn.Module, adapter: Path) -> None:
    """models--org--name/snapshots/<revision>/<file> -> ../../blobs/<digest>"""
    root = adapter.parent / "models--org--name"
    snapshot, blobs = root / "snapshots" / "abc123", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(adapter.iterdir()):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    lk.load(model, snapshot)
    lk.detach(model)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("/dev/zero")
    refused(model, snapshot, WEIGHTS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, ""])
def test_a_file_is_missing(model: nn.Module, adapter: Path, name: str) -> None:
    if name:
        (adapter / name).unlink()
        refused(model, adapter, name)
    else:
        refused(model, adapter.parent / "nowhere", "nowhere")
        refused(model, adapter / CONFIG, CONFIG)


def test_a_base_weight_beside_the_adapter_must_be_the_bases(model: nn.Module, adapter: Path) -> None:
    key, path = Q0.replace("lora_A", "base_layer"), "model.layers.0.self_attn.q_proj.weight"
    weight = model.get_parameter(path).detach()
    rewrite(adapter, lambda tensors: {**tensors, key: weight.clone()})
    lk.load(model, adapter)
    lk.detach(model)
    for other in (weight + 1e-3, weight[:8].clone(), weight[None].clone()):
        rewrite(adapter, lambda tensors, other=other: {**tensors, key: other})
        refused(model, adapter, key, "base weight")
    rewrite(
        adapter,
        lambda tensors: {k: t for k, t in tensors.items() if k != key} | {"nowhere.base_layer.weight": weight.clone()},
    )
    refused(model, adapter, "nowhere.base_layer.weight")


# A22: files that change


def test_a_file_changed_after_loading_changes_nothing(model: nn.Module, adapter: Path) -> None:
    lk.load(model, adapter)
    before = [p.clone() for _, _, a in lk.adapters(model) for p in a.parameters()]
    with (adapter / WEIGHTS).open("r+b") as file:
        file.write(bytes(100_000))
        file.truncate(10)
    assert all(
        torch.equal(p, q)
        for p, q in zip(before, (p for _, _, a in lk.adapters(model) for p in a.parameters()), strict=True)
    )


def test_a_file_replaced_while_it_is_read(model: nn.Module, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check of the header and the reading of the data another, well-formed file takes its place."""
    other = safetensors.torch.save({"evil": torch.zeros(3)})
    header = read.read_header(adapter / WEIGHTS)
    monkeypatch.setattr(
        "lorakit.interop.adapter_directory.read_header", lambda path: (path.write_bytes(other), header)[1]
    )
    refused(model, adapter, "changed while it was read")


def test_an_error_in_the_middle_of_filling_leaves_nothing(
    model: nn.Module, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.interop import adapter_directory

    fill, calls = adapter_directory.fill, []

    def fails(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        fill(*arguments)

    monkeypatch.setattr(adapter_directory, "fill", fails)
    with pytest.raises(KeyboardInterrupt):
        lk.load(model, adapter)
    assert lk.names(model) == []
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


# A24: saving


def test_saving_does_not_replace_what_is_no_adapter(model: nn.Module, adapter: Path, tmp_path: Path) -> None:
    lk.load(model, adapter)
    (tmp_path / "project").mkdir()
    lk.save(model, tmp_path / "project")  # empty: fine
    lk.save(model, tmp_path / "project")  # an adapter: fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="something else"):
        lk.save(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"


def test_saving_refuses_what_could_not_be_loaded(model: nn.Module, adapter: Path) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    lk.load(model, adapter)
    with torch.no_grad():
        next(lk.adapters(model))[2].lora_B[0, 0] = float("nan")
    with pytest.raises(DivergenceError, match=r"q_proj\.lora_B\.weight.*1 NaN"):
        lk.save(model, adapter)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before


KILLED = """
import os, sys, warnings
from pathlib import Path
import torch
import lorakit as lk

target = Path(sys.argv[1])
model = lk.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), lk.LoRA(r=2), target_modules=["0"])

def version(number):  # in the tensors, in the configuration and in the side file
    torch.nn.init.constant_(model[0].adapters.default.lora_A, number)
    return {"base": f"base-{number}", "extra": {"version": number}}

def die_at(event):
    def hook(name, arguments):
        nonlocal event
        if name.startswith(("open", "os.", "shutil.")):
            event -= 1
            if event < 0:
                os._exit(9)
    sys.addaudithook(hook)

lk.save(model, target, **version(1))
after = version(2)
survived = 0
for event in range(10_000):
    child = os.fork()
    if not child:
        die_at(event)
        lk.save(model, target, **after)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(event, status, flush=True)
    if status == 0:
        break
    survived += 1
    loaded = lk.load(torch.nn.Sequential(torch.nn.Linear(8, 8)), target)
    number = int(loaded[0].adapters.default.lora_A[0, 0])
    assert bool((loaded[0].adapters.default.lora_A == number).all())
    assert f"base-{number}" in (target / "adapter_config.json").read_text(), "config and weights of two versions"
    assert f'"version": {number}' in (target / "lorakit.json").read_text()
    if number == 2:  # the new one arrived whole before the kill
        lk.save(model, target, **version(1))
        after = version(2)
assert status == 0, status
lk.save(model, target, **version(3))
left = sorted(p.name for p in target.parent.iterdir())
assert left == [target.name], left
print("kills", survived)
"""


def test_a_kill_at_any_point_of_saving_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """A child is killed at its first file operation, at its second, and so on until it gets through."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "adapters" / "a")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 20
