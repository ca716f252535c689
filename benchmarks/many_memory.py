"""What another adapter costs when several train in one pass: peak memory of 1, 2, 4 and 8 runs on one base, as `lorakit sweep` trains them.

    python benchmarks/many_memory.py [--rows 4] [--words 60] [--counts 1 2 4 8] [--pass-tokens 256]

SmolLM2 in bfloat16, LoRA r 16 on all linear layers, two steps; every run has rows, an optimizer and a directory of its own. Each
count is a fresh process. Target: at most 10 % of the memory of one run for each adapter more.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import RESULTS, environment, measured_with, peak_memory, table, write_json

TARGET = 0.10


def main() -> None:
    """Measure every count and write the page."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--rows", type=int, default=4, help="rows of a run's step")
    options.add_argument("--words", type=int, default=60, help="words of a row")
    options.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--output", type=Path, default=RESULTS)
    options.add_argument("--pass-tokens", type=int, default=256, help="0 for no limit")
    options.add_argument("--child", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        print(json.dumps(train(chosen.child, chosen.rows, chosen.words, chosen.pass_tokens or None)))
        return
    found = []
    for count in chosen.counts:
        sizes = ["--rows", str(chosen.rows), "--words", str(chosen.words), "--pass-tokens", str(chosen.pass_tokens)]
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(count), *sizes], capture_output=True, text=True, check=True
        )
        found.append({"adapters": count, **json.loads(done.stdout.splitlines()[-1])})
        print(f"{count} adapters: {found[-1]['peak'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    write(chosen, found)


def train(count: int, rows: int, words: int, pass_tokens: int | None) -> dict[str, Any]:
    """Train `count` adapters at once; gives the peak memory of this process and the tokens of a run's step."""
    import lorakit as lk
    from lorakit.train import config as c
    from lorakit.train.many import run_many

    with tempfile.TemporaryDirectory() as directory:
        file, draw = Path(directory, "rows.jsonl"), random.Random(0)
        texts = [
            " ".join(draw.choice(("red", "blue", "green", "seven")) for _ in range(words)) for _ in range(2 * rows)
        ]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        configs = {
            f"a{i}": c.RunConfig(
                model=c.ModelConfig(name="smollm2", dtype="bfloat16"),
                data=c.DataConfig(path=str(file)),
                method=c.MethodConfig.of(lk.LoRA(r=16, alpha=32)),
                train=c.TrainOptions(batch_size=rows, max_steps=2, save_steps=0, eval_steps=0, seed=i),
                output=str(Path(directory, f"run{i}")),
            )
            for i in range(count)
        }
        results = run_many(configs, pass_tokens=pass_tokens)
        steps = (Path(directory, "run0") / "metrics.jsonl").read_text().splitlines()
    return {"peak": peak_memory(), "finished": len(results), "tokens": json.loads(steps[0])["tokens"]}


def write(chosen: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Write the figures, and each as a share of one run's."""
    one, where = found[0]["peak"], environment()
    for row in found:
        more = row["adapters"] - found[0]["adapters"]
        row["each"] = (row["peak"] / one - 1) / more if more else None
    chosen.output.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": "many_memory",
        "rows": chosen.rows,
        "words": chosen.words,
        "found": found,
        "environment": where,
    }
    write_json(chosen.output / "many_memory.json", content)
    cells = [
        [str(row["adapters"]), f"{row['peak'] / 1e6:.0f}", "" if row["each"] is None else f"{row['each']:.1%}"]
        for row in found
    ]
    text = "\n".join(
        [
            "# Peak memory of several adapters trained in one pass\n",
            f"SmolLM2, bfloat16, LoRA r 16 on all linear layers; {found[0]['tokens']} tokens a step and adapter, at "
            f"most {chosen.pass_tokens or 'all'} tokens in a pass. "
            f"Target: {TARGET:.0%} of one run for each adapter more.\n",
            table(["adapters", "peak MB", "of one run, for each more"], cells),
            measured_with(where),
            "",
        ]
    )
    (chosen.output / "many_memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
