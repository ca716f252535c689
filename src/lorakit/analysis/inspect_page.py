"""The page of `lorakit inspect --html`: verdicts, heat maps, spectra and a table, in one file that needs no network."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .. import __version__
from ..core.files import atomic_write
from .charts import Series, chart, percent, scientific, short
from .heatmap import heatmap
from .inspection import Inspection, Measured, by_name
from .loaded import block_of
from .report_page import page
from .report_sections import file_size

SHOWN: Sequence[tuple[str, str, Callable[[float], str], bool]] = (
    ("relative_norm", "Relative norm ‖ΔW‖ / ‖W‖", scientific, True),
    ("frobenius", "Norm ‖ΔW‖", short, True),
    ("dominance", "Dominance: largest σ over ‖uᵀW‖", short, True),
    ("amplification", "Amplification ‖ΔW‖ / ‖UᵀWV‖", short, True),
    ("intruders_attributable", "Intruder dimensions of the change", short, False),
    ("imbalance", "Imbalance of the factors", short, False),
)
"""Heat maps: number, title, how it is written, whether the shade is logarithmic."""
OVER_NULL = (
    ("effective_rank", "Effective rank over that of random factors"),
    ("stable_rank", "Stable rank over that of random factors"),
    ("energy_rank_90", "Rank with 90 % of the energy over that of random factors"),
)
TABLE = (
    "frobenius",
    "spectral",
    "effective_rank",
    "stable_rank",
    "energy_rank_90",
    "energy_rank_99",
    "condition",
    "imbalance",
    "relative_norm",
    "amplification",
    "dominance",
)


def write_page(found: Mapping[str, Any], inspection: Inspection, output: Path) -> Path:
    """Write the page about an adapter; `found`: the facts that `lorakit inspect` shows."""
    atomic_write(output, render(found, inspection))
    return output


def render(found: Mapping[str, Any], inspection: Inspection) -> str:
    """Give the page as HTML."""
    body = [
        _verdicts(found, inspection),
        _maps(inspection),
        _spectra(inspection),
        _table(inspection),
        _missing(inspection),
    ]
    name = Path(str(found["directory"])).resolve().name
    about = " · ".join(escape(str(found[k])) for k in ("method", "base", "task") if found[k])
    header = f'<h1>{escape(name)}</h1><p class="quiet">{about}</p>{_tiles(found, inspection)}'
    footer = (
        f"Written by lorakit {escape(__version__)}. Shades compare the modules of this adapter with each other only."
    )
    return page(f"{name}: adapter", header, "".join(body), footer)


def _tiles(found: Mapping[str, Any], inspection: Inspection) -> str:
    ranks = sorted({m.module.rank for m in inspection.modules if m.module.rank is not None})
    tiles: list[tuple[str, str]] = [
        ("Parameters", f"{found['parameters']:,}"),
        ("Size", file_size(found["bytes"])),
        ("Stored as", found["dtype"] or "–"),
        ("Changed matrices", f"{len(inspection.modules):,}"),
        ("Rank", "–" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"),
    ]
    scales = sorted({m.module.scale for m in inspection.modules if m.module.A is not None})
    if scales:
        tiles.append(
            ("Scale s", short(scales[0]) if len(scales) == 1 else f"{short(scales[0])} to {short(scales[-1])}")
        )
    if "decay_survival" in inspection.numbers:
        tiles.append(("Left by weight decay", percent(inspection.numbers["decay_survival"].value)))
    cards = "".join(f'<div class="card"><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in tiles)
    return f'<dl class="tiles">{cards}</dl>'


def _verdicts(found: Mapping[str, Any], inspection: Inspection) -> str:
    items = [f"<li><b>{escape(v.kind)}</b> {escape(str(v))}</li>" for v in inspection.verdicts]
    items += [f"<li>{escape(text)}</li>" for text in found["warnings"] if not inspection.modules]
    text = f'<ul class="verdicts">{"".join(items)}</ul>' if items else "<p>Nothing that is certainly wrong.</p>"
    note = (
        '<p class="quiet">Only what needs no judgement stands here: dead modules, NaN, contradictions about the scale, '
        "unconverted starts, storage precision. There is no score.</p>"
    )
    return f'<section><h2>Certain</h2><div class="card">{text}</div>{note}</section>'


class Map(NamedTuple):
    """One number over kinds of module and blocks."""

    title: str
    label: Callable[[float], str]
    log: bool
    values: Mapping[tuple[str, str], float]
    """By (kind of module, block)."""


def maps(inspection: Inspection) -> tuple[list[str], list[str], list[Map]]:
    """Give the kinds of module, the blocks, and every number that is drawn over them."""
    places = {m.module.path: block_of(m.module.path) for m in inspection.modules}
    blocks = sorted({b for b, _ in places.values() if b is not None})
    columns = [str(b) for b in blocks] + (["–"] if any(b is None for b, _ in places.values()) else [])
    rows = list(dict.fromkeys(name for _, name in places.values()))

    def values(of: Callable[[Measured], float]) -> dict[tuple[str, str], float]:
        cells = {}
        for m in inspection.modules:
            block, name = places[m.module.path]
            cells[name, "–" if block is None else str(block)] = of(m)
        return cells

    found = [Map(title, f, log, values(lambda m, name=name: _value(m, name))) for name, title, f, log in SHOWN]
    found += [Map(title, percent, False, values(lambda m, name=name: _over_null(m, name))) for name, title in OVER_NULL]
    return rows, columns, found


def _maps(inspection: Inspection) -> str:
    if not inspection.modules:
        return ""
    rows, columns, found = maps(inspection)
    drawn = [heatmap(m.title, "", rows, columns, m.values, label=m.label, log=m.log) for m in found]
    note = (
        '<p class="quiet">A row for each kind of module, a column for each block. 100 % of a null means: as spread out as '
        "random factors of the same shape, which is what an untrained direction looks like.</p>"
    )
    return f'<section><h2>By block</h2><div class="charts wide">{"".join(drawn)}</div>{note}</section>'


def spectra(inspection: Inspection) -> list[Series]:
    """Give σ_i over ||ΔW|| by module name, the median over blocks, and of random factors."""
    series, null = [], ()
    for i, (name, its) in enumerate(list(by_name(inspection.modules).items())[:7]):
        rows = [[s / math.hypot(*m.spectrum) for s in m.spectrum] for m in its if m.spectrum and not m.dead]
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:  # ranks differ over the blocks: a median over components has no meaning
            continue
        curve = [median(column) for column in zip(*rows, strict=True)]
        series.append(Series(name, [float(j + 1) for j in range(len(curve))], curve, i + 1))
        null = max(null, next((m.null_spectrum for m in its if m.null_spectrum), ()), key=len)
    if series and null:
        series.append(Series("random factors", [float(j + 1) for j in range(len(null))], null, 8, "marked"))
    return series


def _spectra(inspection: Inspection) -> str:
    series = spectra(inspection)
    if not series:
        return ""
    drawn = chart("Singular values σ / ‖ΔW‖", "median over the blocks", series, over="component", css="tall")
    swatches = "".join(f'<li><span class="swatch c{s.color}"></span>{escape(s.name)}</li>' for s in series)
    return f'<section><h2>Spectra</h2><ul class="legend">{swatches}</ul>{drawn}</section>'


def _table(inspection: Inspection) -> str:
    names = [n for n in TABLE if any(n in m.numbers for m in inspection.modules)]
    if not names:
        return ""
    head = "".join(f'<th scope="col" class="figure">{escape(n.replace("_", " "))}</th>' for n in names)
    rows = []
    for m in inspection.modules:
        cells = "".join(f'<td class="figure">{_cell(m, name)}</td>' for name in names)
        rows.append(f'<tr><th scope="row">{escape(m.module.path)}</th>{cells}</tr>')
    return (
        "<section><h2>Every module</h2><details><summary>Table</summary>"
        '<p class="quiet">Below each value stands its null: the value for random factors or directions of the same shape.</p>'
        f'<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">Module</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details></section>"
    )


def _missing(inspection: Inspection) -> str:
    items = [f"<li>{escape(what)}: {escape(why)}</li>" for what, why in list(inspection.not_measured.items())[:40]]
    items += [f"<li>{escape(note)}</li>" for note in inspection.notes]
    return f'<section><h2>Not measured</h2><ul class="quiet">{"".join(items)}</ul></section>' if items else ""


def _cell(m: Measured, name: str) -> str:
    if name not in m.numbers or not math.isfinite(m.numbers[name].value):
        return "–"
    number = m.numbers[name]
    null = f'<div class="quiet">{escape(short(number.null))}</div>' if number.null is not None else ""
    return f"{escape(short(number.value))}{null}"


def _value(m: Measured, name: str) -> float:
    return m.numbers[name].value if name in m.numbers else math.nan


def _over_null(m: Measured, name: str) -> float:
    number = m.numbers.get(name)
    return number.value / number.null if number is not None and number.null else math.nan
