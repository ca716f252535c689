"""`lorakit bench`: how fast this machine trains, beside PEFT where it is installed, and whether both compute the same."""

import importlib.util
import os
from importlib.metadata import version
from typing import Any, cast

import typer

from .output import json_result, note, notices, result, table


def bench(
    model: str = typer.Option("smollm2", "--model", help="Built-in name, directory or hub id of a causal model."),
    dtype: str = typer.Option(
        "auto", "--dtype", help="float32 or bfloat16; auto is what the hardware computes natively."
    ),
    batch: int = typer.Option(4, "--batch", min=1, help="Rows of a step."),
    length: int = typer.Option(256, "--length", min=2, help="Tokens of a row."),
    rank: int = typer.Option(16, "--rank", min=1, help="Rank of LoRA on all linear layers."),
    labels: str = typer.Option("all", "--labels", help="all, or half: only the second half of each row is trained."),
    threads: int = typer.Option(
        None, "--threads", min=1, help="Processor threads; as many as there are cores if absent."
    ),
    device: str = typer.Option("auto", "--device", help="cpu or cuda, for both; auto is cuda where there is one."),
    compile: bool = typer.Option(False, "--compile", help="lorakit with train.compile."),
    cuda_graph: bool = typer.Option(False, "--cuda-graph", help="lorakit with train.cuda_graph."),
    steps: int = typer.Option(3, "--steps", min=1, help="Timed steps of a run."),
    runs: int = typer.Option(3, "--runs", min=1, help="Runs of each program, in alternating order."),
    peer: bool = typer.Option(True, "--peer/--no-peer", help="Also run PEFT, if it is installed."),
    json: bool = typer.Option(False, "--json", help="Print JSON, with every step of every run."),
) -> None:
    """Measure training steps, beside PEFT's.

    Every run is a process of its own; both train the same random tokens from the same start. Exits with 8 if they do
    not compute the same: in float32 to 1e-4, in bfloat16 no further from float32 than PEFT is, but for luck.
    """
    from ..train.bench.compare import compare, require_agreement

    other = "peft" if peer and importlib.util.find_spec("peft") else None
    ways = {"compile": compile, "cuda_graph": cuda_graph}
    sizes = {"batch": batch, "length": length, "rank": rank, "threads": threads, "steps": steps}
    work = _work(model, dtype, labels, device, **sizes, **ways)
    found = compare(work, peer=other, runs=runs, say=note)
    found = {"machine": _machine(other), **found}
    if json:
        json_result(found)
    else:
        show(found)
        if peer and other is None:
            notices(["peft is not installed, so there is nothing beside lorakit and no check of the losses"])
    if other:
        require_agreement(found["agreement"], "PEFT")


def _work(model: str, dtype: str, labels: str, device: str, *, threads: int | None, **more: Any) -> Any:
    import torch

    from ..core.errors import UsageError
    from ..models.load import pick_dtype, read_config
    from ..models.resolve import resolve
    from ..train.bench.work import Work
    from .machine import cores

    if labels not in ("all", "half"):
        raise UsageError(f"no labels called {labels!r}", fix="choose all or half")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"no device called {device!r}", fix="choose auto, cpu or cuda")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UsageError("no NVIDIA GPU can be used here", fix="leave --device out")
    device = "cuda" if device != "cpu" and there else "cpu"
    path = resolve(model)
    kind = pick_dtype(dtype, torch.device(device), "causal", read_config(path))
    name = cast(Any, "bfloat16" if kind == torch.bfloat16 else "float32")
    return Work(
        model=str(path),
        dtype=name,
        device=cast(Any, device),
        labels=cast(Any, labels),
        threads=threads or cores(),
        **more,
    )


def _machine(peer: str | None) -> dict[str, Any]:
    from ..train.run_directory import environment

    found = environment()
    packages = {**cast(dict[str, str | None], found["packages"]), **({peer: version(peer)} if peer else {})}
    return {**found, "packages": packages, "load_average": os.getloadavg()[0]}


def show(found: dict[str, Any]) -> None:
    """Print the figures of each arm, the ratios, and how far both agree."""
    work, machine = found["work"], found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["packages"].items() if number)
    processor = machine["gpu"] if work["device"] == "cuda" else machine["processor"]
    result(f"{versions}\n{processor}, {work['threads']} threads, load average {machine['load_average']:.1f}")
    result(
        f"{work['batch']} x {work['length']} tokens, {work['labels']} labels, {work['dtype']}, "
        f"LoRA r {work['rank']}; medians, quartiles in brackets\n"
    )
    rows: list[tuple[object, ...]] = [("", "tokens/s", "CPU s/step", "peak MB", "of the matrix-multiply limit")]
    for arm, figures in found["arms"].items():
        share = _spread(figures["share_of_limit"], 100, "{:.0f}") + " %"
        memory = _spread(figures["peak_memory"], 1e-6, "{:.0f}")
        speed, cpu = _spread(figures["tokens_per_second"], 1, "{:.0f}"), _spread(figures["cpu_per_step"], 1, "{:.2f}")
        rows.append(("lorakit" if arm == "ours" else "PEFT", speed, cpu, memory, share))
    if "ratios" in found:
        columns = ("tokens_per_second", "cpu_per_step", "peak_memory")
        rows.append(("ours/peer", *(_spread(found["ratios"][c], 1, "{:.2f}") for c in columns), ""))
    result(table(rows))
    limit = found["arms"]["ours"]["runs"][0]["limit"]
    rate = found["arms"]["ours"]["gflops"][1]
    result(
        f"\nlimit: {limit['flops'] / 1e9:.0f} Gflop in the frozen matrices, {rate:.0f} Gflop/s "
        "measured at their shapes in the same process"
    )
    if "agreement" in found:
        _show_agreement(found["agreement"])


def _show_agreement(agreement: dict[str, Any]) -> None:
    peers = agreement.get("peer", {})
    parts = [
        f"{name} {m['error']:.1e}" + (f" (peer {peers[name]:.1e})" if peers else "")
        for name, m in agreement["measures"].items()
    ]
    result(f"{'agree' if agreement['agrees'] else 'DISAGREE'}: {', '.join(parts)}; {agreement['against']}")


def _spread(values: Any, factor: float, form: str) -> str:
    low, middle, high = (form.format(value * factor) for value in values)
    return f"{middle} ({low}-{high})"
