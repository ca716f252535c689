"""lorakit's ways of running on an NVIDIA GPU and PEFT's loop, on equal tokens: as it is, compiled, recorded, both.

    python benchmarks/gpu.py [--model smollm2] [--shapes 4x256 8x512 2x2048] [--llama-8b] [--runs 3]

Every run is a fresh process (`lorakit bench`). --llama-8b takes a model of Llama 3.1 8B's shape with random weights instead: 16 GB
on the disk while it runs. Writes results/gpu.json and gpu.md. Exit code 8 if a row did not run, or if lorakit and PEFT did
not compute the same.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import RESULTS, environment, table, write_json

WAYS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "compiled": {"compile": True},
    "recorded": {"cuda_graph": True},
    "compiled and recorded": {"compile": True, "cuda_graph": True},
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def main() -> None:
    """Run every way at every shape."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--model", default="smollm2", help="built-in name or directory")
    options.add_argument("--llama-8b", action="store_true", help="random weights of that shape instead")
    options.add_argument("--shapes", nargs="+", default=["4x256", "8x512", "2x2048"], metavar="ROWSxTOKENS")
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: does this script work?")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(chosen, random_llama(Path(scratch)) if chosen.llama_8b else chosen.model)
    name = "gpu-llama-8b" if chosen.llama_8b else "gpu"
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_json(chosen.output / f"{name}.json", found)
    text = page(found)
    (chosen.output / f"{name}.md").write_text(text)
    print(text)
    if not all(map(agrees, found["rows"])):
        raise SystemExit(8)


def agrees(row: dict[str, Any]) -> bool:
    """Whether a row ran and both computed the same; without a reference in float32, to a rounding of bfloat16 in the loss."""
    if "agreement" in row:
        return row["agreement"]["agrees"]
    return "failed" not in row and row["loss_off"] <= 2.0**-7


def measure(chosen: argparse.Namespace, model: str) -> dict[str, Any]:
    """Compare every way with PEFT at every shape; one that cannot run is kept with the reason."""
    from lorakit.core.errors import LorakitError
    from lorakit.models.resolve import resolve
    from lorakit.train.bench.compare import compare
    from lorakit.train.bench.work import Work

    rows = []
    for shape in chosen.shapes:
        batch, length = map(int, shape.split("x"))
        for way, flags in WAYS.items():
            if chosen.device == "cpu" and "cuda_graph" in flags:
                continue
            print(f"{shape}, {way}", file=sys.stderr, flush=True)
            sizes: Any = {"batch": batch, "length": length, "steps": chosen.steps, "device": chosen.device}
            work = Work(model=str(resolve(model)), dtype="bfloat16", **sizes, **flags)
            try:
                found = compare(work, runs=chosen.runs, say=_say, reference=not chosen.llama_8b)
            except LorakitError as error:
                found = {"failed": str(error)}
            rows.append({"shape": shape, "way": way, **found})
    return {
        "benchmark": "gpu",
        "model": "Llama-8B-shaped, random" if chosen.llama_8b else model,
        "rows": rows,
        **place(),
    }


def _say(text: str) -> None:
    print("  " + text, file=sys.stderr, flush=True)


def place() -> dict[str, Any]:
    """Give versions and hardware."""
    from lorakit.train.run_directory import environment as of_run

    return {"environment": {**environment(), "gpu": of_run()["gpu"]}}


def random_llama(directory: Path) -> str:
    """Write a model of Llama 3.1 8B's shape with random weights in bfloat16: some minutes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from lorakit.models.resolve import resolve

    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B))  # not on the GPU: the arms need all of it
    model.save_pretrained(directory / "llama-8b")
    AutoTokenizer.from_pretrained(resolve("smollm2")).save_pretrained(directory / "llama-8b")
    return str(directory / "llama-8b")


def page(found: dict[str, Any]) -> str:
    """Write the results as a table."""
    header = ["tokens", "lorakit", "tokens/s", "PEFT's", "ratio", "peak MB", "PEFT's", "agree"]
    cells = []
    for row in found["rows"]:
        if "failed" in row:
            cells.append([row["shape"], row["way"], row["failed"].splitlines()[0], "", "", "", "", ""])
            continue
        ours, theirs = row["arms"]["ours"], row["arms"]["peft"]
        speed, memory = (
            [f"{arm[key][1] * factor:.0f}" for arm in (ours, theirs)]
            for key, factor in (("tokens_per_second", 1), ("peak_memory", 1e-6))
        )
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*(row["ratios"]["tokens_per_second"][i] for i in (1, 0, 2)))
        cells.append([row["shape"], row["way"], *speed, ratio, *memory, "yes" if agrees(row) else "**NO**"])
    where = json.dumps(found["environment"], indent=1)
    title = f"# On a GPU: {found['model']}, bfloat16, LoRA r 16 on all linear layers\n"
    return "\n".join([title, table(header, cells), "```json", where, "```", ""])


if __name__ == "__main__":
    main()
