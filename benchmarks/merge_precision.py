"""What the predictions about shipping an adapter are worth: merging into 16 bits, and cutting the rank, predicted and measured.

    python benchmarks/merge_precision.py                                     # merging, on the weights of SmolLM2-135M; a minute
    python benchmarks/merge_precision.py --adapter RUN ... --data VALID [--calib TRAIN]   # and the loss of trained adapters

RUN, VALID and TRAIN can be what `diagnostics_study.py --keep DIR` leaves in DIR/smollm2: smollm2-good-*, held-out.jsonl, train.jsonl.

Merging: a random change of rank 16 with ||ΔW|| = rho ||W|| on the 7 linear layers of 3 blocks, written as an adapter and read by
`lorakit merge-check`: what is left after rounding W + ΔW (measured) beside the closed form over the histogram of ulp(W).
Compression: the share of energy that is discarded (predicted share of the gain lost) beside the share that is lost on the rows.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment, measured_with, table, write_results
from torch import nn

RHOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
DTYPES, BLOCKS, RANK = ("bf16", "fp16"), (0, 15, 29), 16
NAMES = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
COLORS = {"bf16": "#1f6fb4", "fp16": "#c2571a"}


def merging(model: str) -> list[dict[str, Any]]:
    """Give measured and predicted numbers for every dtype and rho."""
    from lorakit.analysis.base_weights import BaseWeights
    from lorakit.analysis.loaded import load_adapter
    from lorakit.analysis.merge_check import merge_check
    from lorakit.models import resolve

    base = BaseWeights(resolve(model))
    blocks = sorted({int(key.split(".")[2]) for key in base.declared if key.startswith("model.layers.")} & set(BLOCKS))
    paths = [f"model.layers.{block}.{name}" for block in blocks for name in NAMES]
    rows = []
    for rho in RHOS:
        with tempfile.TemporaryDirectory() as name:
            write_adapter(Path(name), base, paths, rho)
            adapter = load_adapter(name, base.layer)
            for dtype in DTYPES:
                start = time.perf_counter()
                found = merge_check(adapter, base, dtype)
                numbers = {key: number.value for key, number in found.numbers.items()}
                apart = [abs(m.numbers["predicted_noise"].value / m.numbers["noise"].value - 1) for m in found.modules]
                seconds = time.perf_counter() - start
                more = {"largest_gap": max(apart), "modules": len(found.modules), "seconds": seconds}
                rows.append({"dtype": dtype, "rho": rho, **numbers, **more})
    return rows


def write_adapter(directory: Path, base: Any, paths: Sequence[str], rho: float) -> None:
    """Write random factors whose change is rho of the layer's weight."""
    from lorakit.analysis.lora_files import Factors, Lora, write_lora

    generator = torch.Generator().manual_seed(0)
    layers = {}
    for path in paths:
        W = base.tensor(base.key(path)).double()
        A, B = torch.randn(RANK, W.shape[1], generator=generator), torch.randn(len(W), RANK, generator=generator)
        B *= rho * float(W.norm()) / float((B.double() @ A.double()).norm())
        layers[path] = Factors(nn.Linear(W.shape[1], len(W), bias=False, device="meta"), A, B)
    write_lora(directory, Lora(layers, 1.0, list(paths), base=None))


def compressing(adapter: str, data: str, calib: str | None, rows: int) -> Iterator[dict[str, Any]]:
    """Give the predicted and the measured share of the gain that lower ranks lose."""
    from lorakit.analysis.compress import Cut, as_lora, compress
    from lorakit.analysis.loaded import load_adapter
    from lorakit.analysis.lora_files import write_lora
    from lorakit.analysis.loss_rows import Losses, row_losses
    from lorakit.cli.compress import input_moments
    from lorakit.cli.held_out import held_out
    from lorakit.cli.opened import open_model, require_adapter
    from lorakit.core.attach import detach, disabled
    from lorakit.interop.adapter_directory import load

    directory = require_adapter(adapter)
    loaded, opened = load_adapter(directory), open_model(adapter, dtype="float32")
    chosen, _ = held_out(opened, data, None, rows)
    before = row_losses(chosen)
    with disabled(opened.model):
        base = row_losses(chosen)
    moments = None if calib is None else dict(input_moments(opened, calib, [m.layer for m in loaded]))
    most = max(m.rank or 1 for m in loaded)
    for rank in [2**i for i in range(12) if 2**i < most]:
        for name, seen in (("svd", None), ("activation", moments)):
            if name == "activation" and moments is None:
                continue
            made = compress(loaded, Cut(rank=rank), moments=seen)
            with tempfile.TemporaryDirectory() as scratch:
                write_lora(Path(scratch), as_lora(loaded, made))
                load(opened.model, scratch, "compressed")
                numbers = Losses(chosen.weights(), base, before, row_losses(chosen)).numbers()
                detach(opened.model, "compressed")
                opened.model.eval()
            losses = {key: number.json() for key, number in numbers.items()}
            yield {
                "adapter": Path(adapter).name,
                "rank": rank,
                "of": most,
                "by": name,
                "predicted": made.numbers["predicted_lost_gain"].value,
                **losses,
            }


def merging_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the merging part."""
    head = ("dtype", "ΔW/W", "noise", "predicted", "retained", "predicted", "unmerge damage", "largest gap of a module")
    names = ("noise", "predicted_noise", "retained", "predicted_retained", "unmerge_damage")
    lines = [
        (row["dtype"], f"{row['rho']:g}", *(f"{row[name]:.4f}" for name in names), f"{100 * row['largest_gap']:.1f} %")
        for row in rows
    ]
    return table(head, lines)


def compressing_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the compression part."""
    head = ("adapter", "rank", "by", "predicted share of the gain lost", "measured", "95 %", "loss increase")
    lines = []
    for row in rows:
        low, high = row["lost_gain"]["ci"]
        lost, rise = row["lost_gain"]["value"], row["loss_increase"]["value"]
        measured = (
            "-" if lost is None else f"{lost:.3f}",
            "-" if low is None else f"{low:.3f} to {high:.3f}",
            f"{rise:+.4f}",
        )
        lines.append((row["adapter"], f"{row['rank']} of {row['of']}", row["by"], f"{row['predicted']:.3f}", *measured))
    return table(head, lines)


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw noise (and what is retained, hollow) over rho: predicted as a line, measured as dots."""
    from lorakit.analysis.charts import log_axis

    left, top, width, height = 52, 34, 460, 260
    axis = log_axis(min(RHOS), max(RHOS))

    def at(rho: float, value: float) -> tuple[float, float]:
        return left + width * axis.at(rho), top + height * (1 - value)

    parts = []
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        y = at(RHOS[0], value)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for rho in RHOS:
        parts.append(f'<text x="{at(rho, 0)[0]:.1f}" y="{top + height + 18}" text-anchor="middle">{rho:g}</text>')
    for turn, dtype in enumerate(DTYPES):
        its = [row for row in rows if row["dtype"] == dtype]
        for name, dash, fill in (("noise", "", COLORS[dtype]), ("retained", ' stroke-dasharray="5 4"', "none")):
            line = "L".join("{:.1f} {:.1f}".format(*at(row["rho"], row[f"predicted_{name}"])) for row in its)
            parts.append(f'<path fill="none" stroke="{COLORS[dtype]}" stroke-width="1.5"{dash} d="M{line}"/>')
            dots = (at(row["rho"], row[name]) for row in its)
            parts += [
                f'<circle fill="{fill}" stroke="{COLORS[dtype]}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in dots
            ]
        parts.append(f'<text x="{left + 60 * turn}" y="14" style="fill:{COLORS[dtype]}">{dtype}</text>')
    legend = "ΔW/W; full dots: noise over the update, hollow: share retained, lines: predicted"
    parts.append(f'<text x="{left}" y="{top + height + 40}">{escape(legend)}</text>')
    style = "text{font:11px sans-serif;fill:#333}.grid{stroke:#ddd}@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}}"
    box = f"0 0 {left + width + 24} {top + height + 50}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{escape(legend)}">\n'
        f"<style>{style}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """Run what was asked for and write JSON, Markdown and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="model whose weights are merged into")
    parser.add_argument("--adapter", nargs="+", default=[], help="trained adapters or their runs, for the second part")
    parser.add_argument("--data", help="held-out rows for it")
    parser.add_argument("--calib", help="rows to measure the inputs of its layers on")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows, evenly spaced; 0 for all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory for the results")
    given = parser.parse_args()
    if bool(given.adapter) != (given.data is not None):
        parser.error("--adapter and --data belong together")
    where = environment()
    content: dict[str, Any] = {"environment": where, "model": given.model, "merging": merging(given.model)}
    parts = [
        "# Merging into 16 bits: predicted and measured\n",
        measured_with(where),
        merging_table(content["merging"]),
    ]
    if given.adapter:
        content["compressing"] = [
            row for adapter in given.adapter for row in compressing(adapter, given.data, given.calib, given.rows)
        ]
        parts += [
            "## Cutting the rank: the share of the gain that is lost\n",
            compressing_table(content["compressing"]),
        ]
    content = json.loads(json.dumps(content, default=str))
    path = write_results("merge-precision", given.output, content, "\n".join(parts))
    path.with_suffix(".svg").write_text(plot(content["merging"]))
    print("\n".join(parts))


if __name__ == "__main__":
    main()
