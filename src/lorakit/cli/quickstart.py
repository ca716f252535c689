"""`lorakit quickstart`: the whole story in a minute, on any machine and offline: data, training, proof, result."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from ..core.errors import CheckError
from .output import result

if TYPE_CHECKING:
    from ..train.config import RunConfig

MODEL = "smollm2"
ROWS, HELD_OUT, ASKED, NEEDED = 240, 40, 16, 14
STEPS = 39
MAX_TOKENS = 44  # a ticket has about 30


def quickstart(
    output: Path = typer.Option(Path("runs/quickstart"), "--output", "-o", help="Directory of the run."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Run again in a directory with a finished run."),
    seed: int = typer.Option(0, "--seed", min=0, help="Start of every random number."),
) -> None:
    """Train the built-in model in a minute, with proof.

    It learns to turn orders into JSON tickets; you see what it answers before and after. Needs no network.
    """
    from ..api import run
    from ..data import orders_task
    from ..train.run_directory import RunDirectory
    from .machine import set_threads

    threads = set_threads()
    RunDirectory(output, overwrite=overwrite)  # refuses a finished run before anything is computed
    show_machine(threads)
    show_model()
    data = orders_task.write(output.with_name(f"{output.name}-data"), seed, ROWS, HELD_OUT)
    config = configuration(data / "train.jsonl", output, seed)
    show_data(data)
    show_plan(config)
    asked = read_questions(data / "valid.jsonl")
    before = ask(MODEL, asked)
    show_answer("BEFORE", asked, before)
    done = run(config, overwrite=overwrite)
    after = ask(str(output), asked)
    show_answer("AFTER ", asked, after)
    right = count_right(asked, after)
    show_next(done, output)
    if right < NEEDED:
        raise CheckError(f"only {right} of {ASKED} answers are right after training, expected at least {NEEDED}")


def configuration(data: Path, output: Path, seed: int) -> "RunConfig":
    """Give the settings: only the last 12 blocks are trained, which is nearly twice as fast and nearly as good."""
    from ..core.registry import METHODS
    from ..core.target import Target
    from ..train import config as c

    method = METHODS[c.DEFAULT_METHOD](r=8, alpha=16.0)
    return c.RunConfig(
        model=c.ModelConfig(name=MODEL),
        data=c.DataConfig(path=str(data)),
        method=c.MethodConfig.of(method, Target(last_n_layers=12)),
        optim=c.OptimConfig(lr=1e-3, schedule="linear"),
        train=c.TrainOptions(task="sft", batch_size=8, max_steps=STEPS, save_steps=13, eval_steps=0, seed=seed),
        output=str(output),
    )


def read_questions(file: Path) -> list[Any]:
    """Give the (prompt, answer) pairs that are asked before and after."""
    from ..data import read
    from .measure import questions

    return questions(read(file), None)[:ASKED]


def ask(name: str, asked: list[Any]) -> list[str]:
    """Answer the held-out prompts with a model or an adapter."""
    from .measure import answers
    from .opened import open_model

    return answers(open_model(name), [prompt for prompt, _ in asked], MAX_TOKENS)


def count_right(asked: list[Any], texts: list[str]) -> int:
    """Count the exact answers."""
    from .measure import exact

    return exact(texts, [right for _, right in asked])


def show_machine(threads: int) -> None:
    """Print what this runs on."""
    import torch

    from .. import __version__

    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads"
    result(f"lorakit {__version__} · {place} · no network needed")


def show_model() -> None:
    """Find the base model (converted on first use) and print where it is."""
    from ..models import resolve

    path = resolve(MODEL)
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    result(f"● model   SmolLM2-135M-Instruct ({path}, {size:.0f} MB)")


def show_data(data: Path) -> None:
    """Print what the rows look like to the model."""
    import sys

    from ..data import preview, to_plain
    from .data import colored
    from .output import styled
    from .rows import Source, tokenised

    dataset, tokenizer = tokenised(Source(str(data / "train.jsonl"), MODEL))
    stats, color = dataset.stats, styled(sys.stdout)
    share = stats.trained_tokens / stats.tokens
    result(
        f"● data    {stats.rows} rows to train, {HELD_OUT} held out · detected: {dataset.format} · "
        f"{stats.tokens / stats.kept:.0f} tokens per row, {share:.0%} trained (answers only)"
    )
    row = preview(dataset, tokenizer, 1)[0]
    result("          row 1: " + ("green is trained, grey is not" if color else "trained is what stands in [[ ]]"))
    for line in (colored(row) if color else to_plain(row)).splitlines():
        result(f"          │ {line}")


def show_plan(config: "RunConfig") -> None:
    """Print what will be trained, and what that needs."""
    from .plan import duration, gigabytes
    from .planning import make_plan

    plan = make_plan(config)
    made, method = plan.summary, cast(Any, config.method.config)
    counts = f"{made.trainable / 1e6:.2f} M of {made.total / 1e6:.0f} M parameters ({made.share:.2%})"
    result(
        f"● plan    {type(method).__name__} r={method.r} α={method.alpha:g} on {made.layers} linear layers "
        f"(last {config.method.target.last_n_layers} blocks) · {counts} · "
        f"{plan.steps} steps · ~{gigabytes(plan.need.total)} GB · ~{duration(plan.seconds)}"
    )


def show_answer(when: str, asked: list[Any], texts: list[str]) -> None:
    """Print the first question with its answer, and how many of all are exactly right."""
    prompt, text = asked[0][0][-1]["content"], " ".join(texts[0].split())
    shown = text if len(text) <= 90 else text[:87] + "..."
    result(f'\n{when}  "{prompt}"\n        → {shown}\n        exact match {count_right(asked, texts)}/{len(asked)}')


def show_next(done: Any, output: Path) -> None:
    """Print what was proved and what to try."""
    result("")
    result(f"✓ {done.checks[-1]}")  # the others were said as they were made
    result(f"""
Try next:  lorakit chat {output} --compare
           lorakit merge {output} -o merged
           lorakit report {output}
           lorakit init my.jsonl        a commented train.yaml for your own data""")
