"""`lorakit report`: one HTML page about one run or several, without any network."""

from pathlib import Path

import typer

from ..core.errors import FileError
from .output import result


def report(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Run directories.", show_default=False),
    output: Path = typer.Option(None, "--output", "-o", help="File to write; RUN/report.html when absent."),
) -> None:
    """Write an HTML report about runs.

    Loss curves, settings and samples; several runs side by side. The page needs no network.
    """
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise FileError(
                f"{run} is no run", why="there is no metrics.jsonl in it", fix="give a directory of `lorakit train`"
            )
    from ..analysis.report import write_report

    result(str(write_report(runs, output or runs[0] / "report.html")))
