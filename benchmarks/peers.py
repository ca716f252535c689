"""lorakit and what else trains LoRA, side by side on this machine: the whole table, as a page and as raw numbers.

    python benchmarks/peers.py --data DIR [--peers DIR] [--threads N] [--only ROW ...] [--quick]

DIR of --data holds the E2E challenge's devset.csv; --peers is a directory with what is not installed here (it must be
called site-packages, since dill takes modules elsewhere for the user's own):
`pip install --no-deps --target DIR/site-packages trl datasets pyarrow pandas dill multiprocess xxhash python-dateutil six`.
It takes about 20 minutes on two free cores. A row that the result file has is not run again (--only ROW runs it anyway),
so an interrupted call goes on.
Each arm is a fresh process; arms of a row alternate. "Same tokens" compares programs on equal work, "same data set"
what a user gets who only names the data: keep the two apart. Exit code 8 if arms did not compute the same loss.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _common import RESULTS, environment, measured_with, table, write_json
from _peer_rows import Options, Target, command_row, data_row, import_row, life_row, saved_row, step_row

SPEED, MEMORY, CPU = "tokens/s", "peak MB", "CPU s/step"
CASTS, COMPILED = "PEFT, factors in the base's dtype", "PEFT, blocks compiled"


class Row(NamedTuple):
    """One row: which table it belongs to, what it says, and how it is run."""

    table: str
    title: str
    run: Callable[[Options], dict[str, Any]]


def steps(peers: Mapping[str, int], targets: Mapping[tuple[str, str], Target], **work: Any) -> Any:
    """Give the run of a row of steps on the same tokens."""
    return lambda options: step_row(options, options.work(**work), peers, targets)


def _faster(speed: float, memory: float | None = None, peer: str = "PEFT") -> dict[tuple[str, str], Target]:
    found = {(peer, SPEED): Target(speed)}
    return found if memory is None else {**found, (peer, MEMORY): Target(memory, most=True)}


SAME_TOKENS, SAME_DATA, AROUND = "Same tokens", "Same data set", "Around training"
ROWS: dict[str, Row] = {
    "4x256": Row(SAME_TOKENS, "4 x 256 tokens, all labels, bfloat16", steps({"PEFT": 2}, _faster(2.2), batch=4)),
    "4x256-half": Row(
        SAME_TOKENS, "4 x 256, half the labels", steps({"PEFT": 2}, _faster(2.2), batch=4, labels="half")
    ),
    "8x256": Row(SAME_TOKENS, "8 x 256, all labels", steps({"PEFT": 2}, _faster(2.2, 0.5), batch=8, steps=2)),
    "8x256-half": Row(
        SAME_TOKENS,
        "8 x 256, half the labels",
        steps({"PEFT": 1}, _faster(2.2, 0.5), batch=8, labels="half"),
    ),
    "4x256-float32": Row(
        SAME_TOKENS,
        "4 x 256, all labels, float32",
        steps({"PEFT": 2}, _faster(1.6), batch=4, steps=2, dtype="float32"),
    ),
    "variants": Row(
        SAME_TOKENS,
        "4 x 256, all labels, other programs",
        steps(
            {CASTS: 1, "loralib": 1, COMPILED: 1},
            {**_faster(2.0, peer=CASTS), **_faster(2.0, peer="loralib"), **_faster(2.0, peer=COMPILED)},
            batch=4,
        ),
    ),
    "dora": Row(
        SAME_TOKENS,
        "DoRA, 2 x 128, all labels",
        steps({"PEFT": 2}, _faster(2.0), batch=2, length=128, method="dora"),
    ),
    "chats": Row(
        SAME_DATA,
        "E2E as chats, prompts masked, one pass",
        lambda options: data_row(
            options,
            ["data PEFT + Trainer", "data TRL", "data TRL, packed"],
            1,
            {**_faster(4.0, peer="PEFT + Trainer"), **_faster(4.0, peer="TRL"), **_faster(2.0, peer="TRL, packed")},
        ),
    ),
    "talks": Row(
        SAME_DATA,
        "E2E as chats of 1 to 8 turns, prompts masked, one pass",
        lambda options: data_row(
            options,
            ["data PEFT + Trainer", "data TRL", "data TRL, packed"],
            1,
            {**_faster(4.0, peer="PEFT + Trainer"), **_faster(4.0, peer="TRL"), **_faster(2.0, peer="TRL, packed")},
            turns=(1, 1, 1, 2, 2, 3, 5, 8),
        ),
    ),
    "attach": Row(
        AROUND,
        "attach to 7,000 linear layers",
        lambda options: life_row(
            options,
            "attach",
            {"first": "CPU s, first adapter", "second": "CPU s, second adapter"},
            {"first": Target(2.0, most=True, own=True), "second": Target(2.0, most=True, own=True)},
            layers=700 if options.quick else 7000,
        ),
    ),
    "load": Row(
        AROUND,
        "a 40 MB adapter into a resident model",
        lambda options: load_row(options),
    ),
    "help": Row(AROUND, "`lorakit --help`", partial(command_row, target=Target(0.3, most=True, own=True))),
    "import": Row(AROUND, "import, on top of torch", partial(import_row, target=Target(0.1, most=True, own=True))),
    "mixed": Row(
        AROUND,
        "forward of 32 rows x 16 tokens with 32 adapters",
        lambda options: life_row(
            options,
            "mixed",
            {"mixed": "CPU s, an adapter a row", "one": "CPU s, one adapter for all"},
            {"mixed": Target(0.2, most=True), "one": Target(1.0, most=True)},
            adapters=4 if options.quick else 32,
            length=16,
            repeats=2 if options.quick else 5,
        ),
    ),
    "together": Row(
        AROUND,
        "a step of 8 adapters, 2 x 64 tokens each",
        lambda options: life_row(
            options,
            "together",
            {"step": "CPU s, all adapters"},
            {"step": Target(0.6, most=True)},
            adapters=2 if options.quick else 8,
            repeats=1 if options.quick else 3,
        ),
    ),
    "saved": Row(
        AROUND,
        "kept for backward, a Llama-8B-shaped block",
        partial(saved_row, target=Target(5.5, most=True, own=True)),
    ),
}


def load_row(options: Options) -> dict[str, Any]:
    """Load the same adapter several times into a model in memory, and switch between two that are there."""
    from _peer_life import saved_adapter

    directory = options.scratch / "adapter"
    size = saved_adapter(options.model, 4 if options.quick else 33, directory)
    figures = {"load": "CPU s to load", "switch": "CPU s to switch"}
    targets = {"load": Target(0.15, most=True, own=True), "switch": Target(0.001, most=True, own=True)}
    adapters = 2 if options.quick else 4
    return {
        "bytes": size,
        **life_row(options, "load", figures, targets, adapter=str(directory), adapters=adapters),
    }


def main() -> None:
    """Run the rows that are missing and write the page."""
    options = parse()
    file = options.output / f"{'peers-quick' if options.quick else 'peers'}-{options.threads}t.json"
    options.output.mkdir(parents=True, exist_ok=True)
    content = (
        json.loads(file.read_text()) if file.exists() else {"benchmark": "peers", "model": options.model, "rows": {}}
    )
    if content["model"] != options.model:
        raise SystemExit(f"{file} holds the rows of {content['model']}; give another --output")
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(options, Path(scratch))
        for name in options.only or [name for name in ROWS if name not in content["rows"]]:
            print(f"{name}: {ROWS[name].title}", file=sys.stderr, flush=True)
            began, where = time.monotonic(), place(options)
            found = ROWS[name].run(prepared)
            content["rows"][name] = {**found, "environment": where, "seconds": round(time.monotonic() - began, 1)}
            write_json(file, content)
    text = page(json.loads(file.read_text()), options.threads, options.quick)
    file.with_suffix(".md").write_text(text)
    print(text)
    if not all(row.get("agreement", {"agrees": True})["agrees"] for row in content["rows"].values()):
        raise SystemExit(8)


def parse() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--data", type=Path, help="the E2E challenge's directory with devset.csv")
    options.add_argument("--peers", type=Path, help="directory with trl, datasets and what they need")
    options.add_argument("--model", default="smollm2", help="built-in name or directory of the base")
    options.add_argument("--rows", type=int, default=64, help="chats of the same data set")
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every arm")
    options.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    options.add_argument("--quick", action="store_true", help="tiny sizes, one run: does it work?")
    options.add_argument("--output", type=Path, default=RESULTS, help="directory for the results")
    return options.parse_args()


def prepare(options: argparse.Namespace, scratch: Path) -> Options:
    """Find the model and set what all processes share."""
    from lorakit.models import resolve

    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    peers = options.peers.resolve() if options.peers else None
    return Options(
        str(resolve(options.model)), scratch, options.threads, options.quick, options.data, peers, options.rows
    )


def place(options: argparse.Namespace) -> dict[str, Any]:
    """Give versions and hardware, the peers' own included, and what else the machine did when the row began."""
    paths = [*sys.path, *([str(options.peers)] if options.peers else [])]
    found = environment()
    for distribution in importlib.metadata.distributions(path=paths):
        if distribution.name in ("trl", "loralib", "datasets", "accelerate"):
            found["versions"].setdefault(distribution.name, distribution.version)
    return {**found, "threads": options.threads}


def page(content: Mapping[str, Any], threads: int, quick: bool) -> str:
    """Write the results in words and tables."""
    parts = ["# lorakit and its peers\n"]
    if quick:
        parts.append("A quick run with tiny sizes: it shows that everything works, and no figure means anything.\n")
    for name in (SAME_TOKENS, SAME_DATA, AROUND):
        rows = {key: content["rows"][key] for key in ROWS if ROWS[key].table == name and key in content["rows"]}
        if rows:
            parts += [
                f"## {name}\n",
                *(text.format(model=content["model"]) for text in WORDS[name]),
                table(HEADER, [cells for key in rows for cells in _cells(key, rows[key])]),
            ]
            parts += [*_agreements(rows)]
    places = {
        json.dumps({**row["environment"], "load_average": 0}): row["environment"] for row in content["rows"].values()
    }
    loads = [row["environment"]["load_average"] for row in content["rows"].values()]
    parts += ["## Measured with\n", *(measured_with(place) for place in places.values())]
    parts.append(f"Load average before the rows: {min(loads)} to {max(loads)}, with {threads} threads used.\n")
    return "\n".join(parts)


WORDS = {
    SAME_TOKENS: [
        "{model}, LoRA r 16 on all linear layers, AdamW; equal random tokens without padding, the same start values, "
        "the first step not timed. Peers use AdamW's fused form and no attention mask.\n"
    ],
    SAME_DATA: [
        "Every arm reads the same chats, once, and trains the same tokens: rows of E2E's development set, one a chat "
        "(lengths differ little) or 1, 1, 1, 2, 2, 3, 5 and 8 of them. lorakit packs rows to a budget of tokens (the mean "
        "of the others' batches); the others have 8 rows a batch, TRL packed one row of the budget's length. "
        "tokens/s counts no padding. The first two steps are not timed.\n"
    ],
    AROUND: ["Processor seconds of one process, unless said otherwise.\n"],
}
HEADER = ["row", "work", "peer", "figure", "lorakit", "peer's", "ours/peer", "target", "reached"]


def _cells(name: str, row: Mapping[str, Any]) -> list[list[str]]:
    title = ROWS[name].title
    if "skipped" in row:
        return [[name, title, "", "", row["skipped"], "", "", "", ""]]
    cells = []
    for found in row["lines"]:
        ours = _spread(found["ours"]) if found["ours"] else f"not built ({row['not_built']})"
        reached = {True: "yes", False: "NO", None: ""}[found.get("reached")]
        figures = [ours, _spread(found.get("theirs")), _spread(found.get("ratio"))]
        cells.append([name, title, found["peer"] or "", found["figure"], *figures, found.get("target", ""), reached])
        name = title = ""
    return cells


def _agreements(rows: Mapping[str, Any]) -> list[str]:
    said = []
    for name, row in rows.items():
        if "agreement" in row:
            found = row["agreement"]
            off = ", ".join(f"{peer} {value:.1e}" for peer, value in found["loss_off"].items())
            said.append(
                f"- {name}: {'agree' if found['agrees'] else '**DISAGREE**'}: {off} (allowed {found['within']:.1e})"
            )
    return ["Relative difference of the loss to lorakit's:\n", *said, ""] if said else []


def _spread(values: Any) -> str:
    """Write a median with its quartiles."""
    if not values:
        return ""
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)
    return middle if low == high else f"{middle} ({low}-{high})"


if __name__ == "__main__":
    main()
