"""One HTML file about a run, or about several side by side: no network, nothing to install, fit to be mailed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .. import __version__
from ..core.errors import UsageError
from ..core.files import atomic_write
from .charts import percent, short
from .report_diagnostics import diagnostics
from .report_page import page
from .report_sections import adapter, charts, evaluations, file_size, loss, samples, settings, swatch
from .run_files import Run, read_runs


@dataclass(frozen=True)
class Figure:
    """A headline number: how to find it in a run, how to write it, and which of several is the best, if one is."""

    label: str
    of: Callable[[Run], float | None]
    write: Callable[[float], str]
    best: Callable[[list[float]], float] | None = None


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one or several run directories to `output` (`report.html` in the first one); give its path.

    An unfinished or empty run gives a report of what there is. Raises FileError if a directory does not exist.
    """
    if not runs:
        raise UsageError("there is no run to report on", fix="give at least one run directory")
    output = output or Path(runs[0]) / "report.html"
    atomic_write(output, render([Path(run) for run in runs]))
    return output


def render(paths: Sequence[Path]) -> str:
    """Give the report as HTML."""
    runs = read_runs(paths)
    one = runs[0] if len(runs) == 1 else None
    body = [
        loss(runs),
        charts(runs),
        diagnostics(runs),
        evaluations(one) if one else "",
        samples(runs),
        adapter(one.adapter) if one and one.adapter else "",
        settings("Settings", runs, [run.config for run in runs]),
        settings("Machine and versions", runs, [run.environment for run in runs]),
    ]
    title = f"{one.name}: training report" if one else f"{len(runs)} runs: training report"
    header = _headline(one) if one else _comparison(runs)
    return page(title, header, "".join(body), f"Written by lorakit {escape(__version__)}.")


def clock(seconds: float) -> str:
    """Write a duration as hours:minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _tokens_per_second(run: Run) -> float | None:
    tokens, seconds = run.last("tokens"), run.last("t")
    return tokens / seconds if tokens is not None and seconds else None


FIGURES = [
    Figure("Final loss", lambda run: run.last("loss"), short, min),
    Figure("Best evaluation loss", lambda run: min(run.evaluated("eval_loss")[1], default=None), short, min),
    Figure("Best accuracy", lambda run: max(run.evaluated("eval_accuracy")[1], default=None), percent, max),
    Figure("Optimizer steps", lambda run: run.last_step or None, "{:,.0f}".format),
    Figure("Tokens", lambda run: run.last("tokens"), "{:,.0f}".format),
    Figure("Trained tokens", lambda run: run.last("trained_tokens"), "{:,.0f}".format),
    Figure("Time", lambda run: run.last("t"), clock),
    Figure("Tokens per second", _tokens_per_second, short, max),
    Figure("Peak memory", lambda run: max(run.points("mem_gb")[1], default=None), "{:.2f} GB".format),
    Figure("Adapter parameters", lambda run: run.adapter.parameters if run.adapter else None, "{:,.0f}".format),
    Figure("Adapter file", lambda run: run.adapter.size if run.adapter else None, file_size),
]


def _state(run: Run) -> str:
    if run.adapter:
        return '<span class="state done">finished</span>'
    return f'<span class="state">unfinished</span>, at step {run.last_step:,}'


def _headline(run: Run) -> str:
    facts = [run.config.get(key) for key in ("model.name", "data.path", "method.name")]
    about = " · ".join([_state(run), *(escape(str(fact)) for fact in facts if fact is not None)])
    tiles = "".join(
        f'<div class="card"><dt>{figure.label}</dt><dd>{escape(figure.write(value))}</dd></div>'
        for figure in FIGURES
        if (value := figure.of(run)) is not None
    )
    numbers = f'<dl class="tiles">{tiles}</dl>' if tiles else '<p class="quiet">Nothing has been recorded yet.</p>'
    return f'<h1>{escape(run.name)}</h1><p class="quiet">{about}</p>{numbers}'


def _comparison(runs: Sequence[Run]) -> str:
    rows = [
        f'<th scope="row">{swatch(i)}{escape(run.name)}<div class="quiet">{_state(run)}</div></th>'
        for i, run in enumerate(runs)
    ]
    head = '<th scope="col">Run</th>'
    for figure in FIGURES:
        values = [figure.of(run) for run in runs]
        present = [v for v in values if v is not None]
        if present:
            head += f'<th scope="col" class="figure">{figure.label}</th>'
            differ = figure.best is not None and min(present) < max(present)
            best = figure.best(present) if figure.best and differ else None
            rows = [row + _figure(value, figure, best) for row, value in zip(rows, values, strict=True)]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<h1>{len(runs)} runs compared</h1><div class="card scroll lead" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="quiet">★ the best of the runs</p>'
    )


def _figure(value: float | None, figure: Figure, best: float | None) -> str:
    if value is None:
        return '<td class="figure">–</td>'
    text = escape(figure.write(value))
    return f'<td class="figure best">{text} ★</td>' if value == best else f'<td class="figure">{text}</td>'
