"""The sections of the report, each a function from runs to HTML. Every text that comes from a run is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .charts import Series, chart, percent, scientific, smooth
from .run_files import Adapter, Run, number

LOG_FROM = 20.0  # ratio of the largest to the smallest loss from which the logarithmic scale is shown first
NEWEST = 3  # answers to a prompt that are not folded away
NONE = "–"


def swatch(index: int) -> str:
    """Give the colour of the run with this index."""
    return f'<span class="swatch c{index % 8 + 1}"></span>'


def file_size(count: float) -> str:
    """Write a number of bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


# --- curves -------------------------------------------------------------------------------------------------------


def loss(runs: Sequence[Run]) -> str:
    """Draw training and evaluation loss on a linear and on a logarithmic scale; the reader chooses between them."""
    series = _curves(runs, "loss", "training")
    for i, run in enumerate(runs):
        color = i + 1 if len(runs) > 1 else 2
        series.append(Series(_of(run, runs, "evaluation"), *run.evaluated("eval_loss"), color, "marked"))
    values = [v for s in series for v in s.y]
    if not values:
        return ""
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    tasks = {run.config.get("train.task") for run in runs}
    unit = "mean over the rows" if tasks == {"classification"} else "nats per trained token"
    choice = "".join(
        f'<label><input type="radio" name="scale" id="{name}"{" checked" if chosen else ""}> {text}</label>'
        for name, text, chosen in (("linear", "linear", not log), ("log", "logarithmic", log))
    )
    reach = max(smooth(run.points("loss")[1])[1] for run in runs)
    note = f'<p class="quiet">The line is the running mean over about {reach} steps.</p>' if reach > 1 else ""
    return (
        f'<section class="loss"><fieldset class="scale"><legend>Scale</legend>{choice}</fieldset><h2>Loss</h2>'
        f"{_legend(runs)}{chart('Loss', unit, series, css='tall linear')}"
        f"{chart('Loss', unit, series, log=True, css='tall log')}{note}</section>"
    )


def charts(runs: Sequence[Run]) -> str:
    """Draw the course of everything else that was recorded."""
    accuracy = [
        Series(_of(run, runs, "accuracy"), *run.evaluated("eval_accuracy"), i + 1, "marked")
        for i, run in enumerate(runs)
    ]
    drawn = [
        chart("Accuracy", "of the validation rows", accuracy, label=percent),
        chart("Learning rate", "", _plain(runs, "lr", "learning rate"), label=scientific),
        chart("Gradient norm", "before clipping", _curves(runs, "grad_norm", "norm")),
        chart("Speed", "tokens per second", _curves(runs, "tok_s", "tokens per second")),
        chart("Memory", "GB, the highest so far", _plain(runs, "mem_gb", "GB")),
    ]
    return f'<section><h2>Course</h2><div class="charts">{"".join(drawn)}</div></section>' if any(drawn) else ""


def evaluations(run: Run) -> str:
    """List the evaluations, for readers who cannot see the curve or want the figures."""
    keys = [key for key in ("eval_loss", "eval_accuracy") if run.evaluated(key)[0]]
    if not keys:
        return ""
    best = min(run.evaluated("eval_loss")[1], default=None)
    rows = []
    for record in run.evaluations:
        star = " ★" if best is not None and number(record.get("eval_loss")) == best else ""
        cells = "".join(f'<td class="figure">{_written(number(record.get(key)))}</td>' for key in keys)
        rows.append(f'<tr><th scope="row">{record["step"]:,}{star}</th>{cells}</tr>')
    head = [("Step", ""), *((key.removeprefix("eval_").capitalize(), "figure") for key in keys)]
    return f"<details><summary>Evaluations as a table</summary>{_table(head, rows)}</details>"


def _of(run: Run, runs: Sequence[Run], what: str) -> str:
    return f"{run.name}: {what}" if len(runs) > 1 else what


def _plain(runs: Sequence[Run], key: str, name: str) -> list[Series]:
    return [Series(_of(run, runs, name), *run.points(key), i + 1) for i, run in enumerate(runs)]


def _curves(runs: Sequence[Run], key: str, name: str) -> list[Series]:
    """Give the running mean of each run, and of a single run also the points it is the mean of."""
    series = []
    for i, run in enumerate(runs):
        steps, values = run.points(key)
        means, reach = smooth(values)
        if reach > 1 and len(runs) == 1:
            series.append(Series(f"{name} of this step", steps, values, 1, "points"))
        series.append(Series(_of(run, runs, f"{name}, running mean" if reach > 1 else name), steps, means, i + 1))
    return series


def _legend(runs: Sequence[Run]) -> str:
    def line(color: int, dashed: str = "", marks: str = "") -> str:
        path = f'<path class="line {dashed} c{color}" d="M1 5h24"/>{marks}'
        return f'<svg viewBox="0 0 26 10" aria-hidden="true">{path}</svg>'

    single = len(runs) == 1
    entries = [line(i % 8 + 1) + ("training" if single else escape(run.name)) for i, run in enumerate(runs)]
    if any(run.evaluated("eval_loss")[0] for run in runs):
        color = 2 if single else 8
        entries.append(line(color, "dashed", f'<path class="marks c{color}" d="M13 5h0"/>') + "evaluation")
    return '<ul class="legend">' + "".join(f"<li>{entry}</li>" for entry in entries) + "</ul>"


# --- samples ------------------------------------------------------------------------------------------------------


def samples(runs: Sequence[Run]) -> str:
    """List answers by prompt: of one run the first and the newest, of several the newest of each; the rest folded."""
    cards = []
    for prompt in dict.fromkeys(sample["prompt"] for run in runs for sample in run.samples):
        shown: list[tuple[int, dict[str, Any]]] = []
        folded: list[tuple[int, dict[str, Any]]] = []
        for i, run in enumerate(runs):
            own = [(i, sample) for sample in run.samples if sample["prompt"] == prompt]
            first, newest = (1, NEWEST) if len(runs) == 1 else (0, 1)
            cut = max(len(own) - newest, first)
            shown += [*own[:first], *own[cut:]]
            folded += own[first:cut]
        more = f"<details><summary>{len(folded)} more</summary>{_answers(runs, folded)}</details>" if folded else ""
        question = f'<div class="prompt"><pre>{escape(prompt)}</pre></div>'
        cards.append(f'<div class="card sample">{question}{_answers(runs, shown)}{more}</div>')
    return f"<section><h2>Answers to the fixed prompts</h2>{''.join(cards)}</section>" if cards else ""


def _answers(runs: Sequence[Run], found: Iterable[tuple[int, dict[str, Any]]]) -> str:
    rows = []
    for i, sample in found:
        name = f'<th scope="row">{swatch(i)}{escape(runs[i].name)}</th>' if len(runs) > 1 else ""
        text = f"<td><pre>{escape(str(sample.get('text', '')))}</pre></td>"
        rows.append(f'<tr>{name}<td class="figure">{sample["step"]:,}</td>{text}</tr>')
    head = [("Run", ""), ("Step", "figure"), ("Answer", "wide")]
    return _table(head if len(runs) > 1 else head[1:], rows)


# --- what the run was made of -------------------------------------------------------------------------------------


def adapter(found: Adapter) -> str:
    """Describe the trained adapter by its tensors and its settings."""
    what = found.problem or f"{found.parameters:,} parameters in {found.tensors:,} tensors, {file_size(found.size)}"
    rows = [
        f'<tr><th scope="row">{escape(kind)}</th><td class="figure">{layers:,}</td>'
        f'<td class="figure">{parameters:,}</td></tr>'
        for kind, (layers, parameters) in found.kinds.items()
    ]
    head = [("Layer", ""), ("Layers", "figure"), ("Parameters", "figure")]
    table = f'<div class="card">{_table(head, rows)}</div>' if rows else ""
    keys = _table([("Key", ""), ("Value", "wide")], [_row(k, [v]) for k, v in sorted(found.settings.items())])
    return (
        f"<section><h2>Adapter</h2><p>{escape(what)}</p>{table}"
        f"<details><summary>adapter_config.json</summary>{keys}</details></section>"
    )


def settings(title: str, runs: Sequence[Run], trees: Sequence[dict[str, Any]]) -> str:
    """List settings by section; of several runs those that differ first and marked, the others folded away."""
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    if not keys:
        return ""
    if len(runs) == 1:
        return f'<section><h2>{title}</h2><div class="card columns">{_by_section(trees[0])}</div></section>'
    rows = {key: [tree.get(key, NONE) for tree in trees] for key in keys}
    differing = [key for key in keys if any(value != rows[key][0] for value in rows[key])]
    same = [key for key in keys if key not in differing]
    head = [("Key", ""), *((f"{swatch(i)}{escape(run.name)}", "") for i, run in enumerate(runs))]
    shown = '<p class="quiet">Nothing differs.</p>'
    if differing:
        shown = (
            f'<div class="scroll" tabindex="0">{_table(head, [_row(k, rows[k], "differs") for k in differing])}</div>'
        )
    folded = ""
    if same:
        table = _table([("Key", ""), ("Value in all runs", "wide")], [_row(k, rows[k][:1]) for k in same])
        folded = f"<details><summary>{len(same)} that agree</summary>{table}</details>"
    return f'<section><h2>{title}: differences</h2><div class="card">{shown}</div>{folded}</section>'


def _by_section(tree: dict[str, Any]) -> str:
    sections: dict[str, list[str]] = {}
    for key, value in tree.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section or "run", []).append(_row(name, [value]))
    return "".join(f"<section><h3>{escape(name)}</h3>{_table([], rows)}</section>" for name, rows in sections.items())


def _table(head: Sequence[tuple[str, str]], rows: Sequence[str]) -> str:
    """Put rows under a head of (HTML, class) cells."""
    cells = "".join(f'<th scope="col" class="{css}">{html}</th>' for html, css in head)
    return f"<table>{f'<thead><tr>{cells}</tr></thead>' if head else ''}<tbody>{''.join(rows)}</tbody></table>"


def _row(key: str, values: Sequence[object], css: str = "") -> str:
    cells = "".join(f'<td class="value">{escape(_written(value))}</td>' for value in values)
    return f'<tr class="{css}"><th scope="row">{escape(key)}</th>{cells}</tr>'


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NONE
    if isinstance(value, float):
        return f"{value:.6g}"
    return NONE if value is None else str(value)
