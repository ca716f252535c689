"""The command `lorakit`: which subcommands there are, the options of all of them, and what an error looks like.

Results go to stdout, progress and logs to stderr. The exit codes are listed in `--help`.
"""

import io
import sys
from collections.abc import Sequence

import typer

from .. import __version__
from . import (
    advise,
    bench,
    chat,
    compare,
    compress,
    data,
    doctor,
    evaluate,
    explain,
    extract,
    generate,
    init,
    inspect,
    merge,
    merge_check,
    plan,
    quickstart,
    report,
    schema,
    selftest,
    sharpness,
    strength,
    sweep,
    train,
)
from .errors import exit_code, show
from .machine import wait_politely
from .output import set_verbosity

EPILOG = (
    "Exit codes: 0 done, 1 unexpected error, 2 usage or configuration, 3 data, 4 model, adapter or checkpoint file, "
    "5 memory or disk, 6 NaN or divergence, 7 directory in use, 8 a check failed, 130/143 interrupted after saving."
)
# Accepted before and after the subcommand.
GLOBAL_FLAGS = ("--debug", "-q", "--quiet", "-v", "--verbose")

COMMANDS = (
    ("quickstart", quickstart.quickstart, ()),
    ("init", init.init, ()),
    ("plan", plan.plan, ()),
    ("advise", advise.advise, ()),
    ("train", train.train, ("finetune", "sft")),
    ("sweep", sweep.sweep, ()),
    ("eval", evaluate.evaluate, ("evaluate",)),
    ("generate", generate.generate, ("infer",)),
    ("chat", chat.chat, ()),
    ("merge", merge.merge, ("fuse", "merge-lora")),
    ("inspect", inspect.inspect, ()),
    ("strength", strength.strength, ()),
    ("sharpness", sharpness.sharpness, ()),
    ("merge-check", merge_check.merge_check, ()),
    ("compress", compress.compress, ()),
    ("compare", compare.compare, ()),
    ("extract", extract.extract, ()),
    ("explain", explain.explain, ()),
    ("report", report.report, ()),
    ("bench", bench.bench, ()),
    ("doctor", doctor.doctor, ()),
    ("selftest", selftest.selftest, ()),
    ("schema", schema.schema, ()),
)
FREE_FORM = {"allow_extra_args": True, "ignore_unknown_options": True}
TAKES_CONFIG_KEYS = (plan.plan, train.train, sweep.sweep)


def make_app() -> typer.Typer:
    """Put the subcommands together."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": dashes},
    )
    app.callback(epilog=EPILOG)(common)
    for name, function, others in COMMANDS:
        settings = FREE_FORM if function in TAKES_CONFIG_KEYS else {}
        for spelling in (name, *others):
            add = app.command(
                spelling,
                hidden=spelling != name,
                context_settings=settings,
                add_help_option=function not in TAKES_CONFIG_KEYS,
            )
            add(function)
    app.add_typer(data.app, name="data")
    return app


def dashes(token: str) -> str:
    """Read `--max_tokens` as `--max-tokens` and `merge_lora` as `merge-lora`."""
    return token.replace("_", "-")


def show_version(wanted: bool) -> None:
    """Print the version and stop, if that is wanted."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def common(
    version: bool = typer.Option(
        False, "--version", help="Show the version and stop.", is_eager=True, callback=show_version
    ),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress and no notes, only results and errors."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say more on stderr."),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors (also LORAKIT_DEBUG=1)."),
) -> None:
    """Train, understand and ship low-rank adapters, with proof at each step.

    First steps: `lorakit quickstart`, then `lorakit init my.jsonl`.
    """
    set_verbosity(quiet=quiet, verbose=verbose)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    wait_politely()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and give its exit code; what went wrong has then been said on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode gets ? instead of an error
            stream.reconfigure(errors="replace")
    moved = [a for a in arguments if a in GLOBAL_FLAGS]
    arguments = [*moved, *(a for a in arguments if a not in GLOBAL_FLAGS)]
    try:
        code = make_app()(list(arguments), prog_name="lorakit", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        show(error, debug="--debug" in moved)
        return exit_code(error)
