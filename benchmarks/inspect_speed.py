"""How long `lorakit inspect` takes on an adapter of a 7-billion-parameter model, and what the factors save.

Writes an all-linear LoRA of rank 16 in the shapes of Llama-2-7B (224 modules, 40 million parameters, random factors), measures
it, and times the singular values of one 4096 x 4096 change from its factors against the full SVD of the dense matrix.

    python benchmarks/inspect_speed.py [--json FILE] [--blocks 32] [--no-dense]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorakit.analysis.inspection import inspect_adapter
from lorakit.interop.adapter_directory import CONFIG, WEIGHTS
from lorakit.interop.read import read_header
from lorakit.theory import nulls, spectrum

HIDDEN, INNER, R = 4096, 11008, 16
SHAPES = {
    **{f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write_adapter(directory: Path, blocks: int) -> int:
    torch.manual_seed(0)
    tensors = {}
    for block in range(blocks):
        for name, (out, inner) in SHAPES.items():
            path = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(R, inner) * inner**-0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, R) * 0.01
    save_file(tensors, directory / WEIGHTS)
    leaves = [name.rpartition(".")[2] for name in SHAPES]
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "lora_dropout": 0.0, "target_modules": leaves}
    (directory / CONFIG).write_text(json.dumps(config))
    return len(tensors) // 2


def timed(work: Callable[[], object], least: float = 0.3) -> float:
    """Give the processor seconds of one call: the least of as many as fit, at least one."""
    times: list[float] = []
    while not times or sum(times) < least:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def inspecting(blocks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        modules = write_adapter(directory, blocks)
        header, config = read_header(directory / WEIGHTS), json.loads((directory / CONFIG).read_text())
        nulls.random_factors.cache_clear()
        start, processor = time.perf_counter(), time.process_time()
        found = inspect_adapter(directory, header, config)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    if len(found.modules) != modules or any(len(m.spectrum) != R for m in found.modules):
        raise SystemExit("not every module was measured")
    return {"modules": modules, "seconds": seconds, "processor_seconds": processor}


def combining(dense: bool) -> dict[str, float]:
    torch.manual_seed(0)
    A, B = torch.randn(R, HIDDEN, dtype=torch.float64), torch.randn(HIDDEN, R, dtype=torch.float64)
    found = {"factors_processor_seconds": timed(lambda: spectrum.singular_values(A, B))}
    found["factors_with_vectors_processor_seconds"] = timed(lambda: spectrum.svd(A, B))
    if dense:
        delta = (B @ A).float()  # single precision, which flatters the dense way by two
        found["dense_float32_processor_seconds"] = timed(lambda: torch.linalg.svdvals(delta), least=0.0)
        found["times_faster"] = found["dense_float32_processor_seconds"] / found["factors_processor_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument(
        "--no-dense", action="store_true", help="skip the SVD of the dense matrix, which takes a minute"
    )
    given = parser.parse_args()
    found = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "inspect": inspecting(given.blocks),
        "combine": combining(not given.no_dense),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
