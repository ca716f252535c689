"""The page of `lorakit compare --html`: heat maps over the blocks and a table, in one file that needs no network."""

import math
from html import escape
from pathlib import Path

from .. import __version__
from ..core.files import atomic_write
from ..theory.number import Number
from .charts import Series, chart, short
from .compare import Comparison, Pair, over_pairs
from .heatmap import heatmap
from .loaded import block_of
from .report_page import page

MAPS = (
    ("replicated", "Replicated rank", "directions in common beyond chance"),
    ("phi_left", "φ, left", "what is written"),
    ("phi_right", "φ, right", "what is read"),
    ("interference", "Interference", "⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)"),
)
COLUMNS = ("phi_left", "phi_right", "replicated_left", "replicated_right", "interference")


def write_page(found: Comparison, output: Path) -> Path:
    """Write the page."""
    atomic_write(output, render(found))
    return output


def render(found: Comparison) -> str:
    """Give the page as HTML."""
    names = " · ".join(escape(name) for name in found.names)
    header = f'<h1>{len(found.names)} adapters compared</h1><p class="quiet">{names}</p>'
    body = [
        _summary(found),
        _maps(found),
        _curves(found),
        *(_table(found, pair) for pair in found.pairs),
        _notes(found),
    ]
    footer = (
        f"Written by lorakit {escape(__version__)}. Random directions of the same shapes are the null of every number."
    )
    return page("Adapters compared", header, "".join(body), footer)


def _summary(found: Comparison) -> str:
    head = "".join(f'<th scope="col" class="figure">{escape(title)}</th>' for _, title, _ in MAPS)
    rows = []
    for pair in found.pairs:
        cells = "".join(f'<td class="figure">{_beside(pair.numbers[name])}</td>' for name, _, _ in MAPS)
        rows.append(f'<tr><th scope="row">{escape(_title(found, pair))}</th>{cells}</tr>')
    return (
        '<section><h2>Pairs</h2><p class="quiet">Means over the modules; below each the value for random directions.</p>'
        f'<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">Pair</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _maps(found: Comparison) -> str:
    drawn = []
    for name, title, unit in MAPS:
        values = over_pairs(found, name)
        places = {path: block_of(path) for path in values}
        blocks = sorted({b for b, _ in places.values() if b is not None})
        columns = [str(b) for b in blocks] + (["–"] if any(b is None for b, _ in places.values()) else [])
        rows = list(dict.fromkeys(inside for _, inside in places.values()))
        cells = {(places[p][1], "–" if places[p][0] is None else str(places[p][0])): v for p, v in values.items()}
        drawn.append(heatmap(title, unit, rows, columns, cells, label=short))
    what = "Means over the pairs. " if len(found.pairs) > 1 else ""
    note = f'<p class="quiet">{what}A row for each kind of module, a column for each block.</p>'
    return f'<section><h2>By block</h2><div class="charts wide">{"".join(drawn)}</div>{note}</section>'


def _curves(found: Comparison) -> str:
    """Draw φ(i) of the i leading directions, the mean over the modules of the first pair, beside what random ones give."""
    modules = found.pairs[0].modules
    series = []
    for color, side in enumerate(("left", "right"), 1):
        counts = sorted(set.intersection(*(set(m.curves[side]) for m in modules)))
        its = [[m.curves[side][i] for m in modules] for i in counts]
        x = [float(i) for i in counts]
        series.append(Series(side, x, [sum(n.value for n in row) / len(row) for row in its], color))
        null = [sum(n.null or 0.0 for n in row) / len(row) for row in its]
        series.append(Series(f"{side}, random", x, null, color, "marked"))
    drawn = chart("φ of the leading directions", "mean over the modules", series, over="direction", css="tall")
    swatches = "".join(
        f'<li><span class="swatch c{s.color}"></span>{escape(s.name)}</li>' for s in series if s.style == "line"
    )
    note = f'<p class="quiet">{escape(_title(found, found.pairs[0]))}; dashed: random directions.</p>'
    return f'<section><h2>Leading directions</h2><ul class="legend">{swatches}</ul>{drawn}{note}</section>'


def _table(found: Comparison, pair: Pair) -> str:
    head = "".join(f'<th scope="col" class="figure">{escape(name.replace("_", " "))}</th>' for name in COLUMNS)
    rows = []
    for module in pair.modules:
        cells = "".join(f'<td class="figure">{_beside(module.numbers[name])}</td>' for name in COLUMNS)
        rows.append(f'<tr><th scope="row">{escape(module.path)}</th>{cells}</tr>')
    return (
        f"<section><h2>{escape(_title(found, pair))}</h2><details><summary>Every module</summary>"
        f'<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">Module</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details></section>"
    )


def _notes(found: Comparison) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return f'<section><h2>Notes</h2><ul class="quiet">{items}</ul></section>' if items else ""


def _title(found: Comparison, pair: Pair) -> str:
    return f"{found.names[pair.first]} and {found.names[pair.second]}"


def _beside(number: Number) -> str:
    if math.isnan(number.value):
        return "–"
    null = "" if number.null is None else f'<div class="quiet">{escape(short(number.null))}</div>'
    return f"{escape(short(number.value))}{null}"
