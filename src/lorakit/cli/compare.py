"""`lorakit compare`: which directions adapters share beyond chance, and whether they add up or cancel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..core.errors import UsageError
from .output import json_result, note, result, table

if TYPE_CHECKING:
    from ..analysis.compare import Comparison, Pair
    from ..theory.number import Number

SHADES = " .:-=+*#%@"
COLUMNS = 64
"""Blocks that a line of the map has room for."""


def compare(
    adapters: list[str] = typer.Argument(
        ..., metavar="A B [C ...]", help="Adapter or run directories.", show_default=False
    ),
    base: str = typer.Option(
        None, "--base", "--model", help="Base model, for methods whose change depends on its weights."
    ),
    html: Path = typer.Option(None, "--html", metavar="FILE", help="Write a page with heat maps and every module."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Compare adapters of one base.

    φ of the left and right singular vectors of the changes beside that of random ones, how many directions replicate (of two
    seeds: how many the data support), and interference: whether the changes add up or cancel. No data is read.
    """
    from ..analysis.compare import compare as compared
    from .machine import set_threads
    from .opened import require_adapter
    from .weights import open_adapter, open_base

    if len(adapters) < 2:
        raise UsageError("there is nothing to compare", fix="give two adapters or more")
    set_threads()
    found = [require_adapter(name) for name in adapters]
    loaded = [open_adapter(path, base) for path in found]
    found_base = open_base(base) if base is not None else None
    made = compared(loaded, short_names(adapters), found_base)
    if html is not None:
        from ..analysis.compare_page import write_page

        note(f"page: {write_page(made, html)}")
    if json:
        json_result(made.json())
    else:
        show(made)


def short_names(paths: Sequence[str]) -> list[str]:
    """Give as many last components of each path as it takes to tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(paths)


def show(made: "Comparison") -> None:
    """Print every pair, each number beside its null, and a map of what replicates."""
    from ..analysis.compare import over_pairs

    lines: list[tuple[object, ...]] = [("pair", "modules", "φ left", "φ right", "replicated", "interference")]
    for pair in made.pairs:
        title = f"{made.names[pair.first]}, {made.names[pair.second]}"
        cells = [_beside(pair.numbers[name]) for name in ("phi_left", "phi_right")]
        replicated = f"{pair.numbers['replicated'].value:.3g} of {_rank(pair)}"
        lines.append((title, len(pair.modules), *cells, replicated, f"{pair.numbers['interference'].value:+.3g}"))
    result(table(lines))
    result("in brackets: random directions of the same shapes; means over the modules")
    result("\n" + table(list(_by_name(made))))
    result("")
    result(shade_map("replicated directions by block", over_pairs(made, "replicated")))
    for text in made.notes:
        result(f"note: {text}")


def _by_name(made: "Comparison") -> "list[tuple[object, ...]]":
    """Give a row for each kind of module: means over blocks and pairs."""
    from ..analysis.compare import over_pairs
    from ..analysis.loaded import block_of

    names = ("phi_left", "phi_right", "replicated", "interference")
    means = {name: over_pairs(made, name) for name in names}
    groups: dict[str, list[str]] = {}
    for path in means["replicated"]:
        groups.setdefault(block_of(path)[1], []).append(path)
    rows: list[tuple[object, ...]] = [("module", "count", "φ left", "φ right", "replicated", "interference")]
    for kind, paths in groups.items():
        cells = [sum(means[name][path] for path in paths) / len(paths) for name in names]
        rows.append((kind, len(paths), *(f"{value:.3g}" for value in cells)))
    return rows


def shade_map(title: str, values: Mapping[str, float]) -> str:
    """Draw values by module path with characters: a row for each kind of module, a column for each block."""
    from ..analysis.loaded import block_of

    places = {path: block_of(path) for path in values}
    blocks = sorted({block for block, _ in places.values() if block is not None})[:COLUMNS]
    kinds = list(dict.fromkeys(kind for block, kind in places.values() if block is not None))
    if not kinds:
        return ""
    top = max(values.values(), default=0.0)
    at = {(places[path][1], places[path][0]): value for path, value in values.items()}
    width = max(map(len, kinds))
    lines = [f"{title} (blank 0, {SHADES[-1]} {top:.3g}; . is more than 0)"]
    for kind in kinds:
        cells = "".join(_shade(at.get((kind, block)), top) for block in blocks)
        lines.append(f"{kind.ljust(width)}  |{cells}|")
    return "\n".join(lines)


def _shade(value: float | None, top: float) -> str:
    if value is None:
        return "?"
    if value <= 0 or top <= 0:
        return SHADES[0]
    return SHADES[max(1, min(len(SHADES) - 1, round(value / top * (len(SHADES) - 1))))]


def _beside(number: "Number") -> str:
    return f"{number.value:.3g} ({number.null:.3g})" if number.null is not None else f"{number.value:.3g}"


def _rank(pair: "Pair") -> str:
    ranks = sorted({min(module.ranks) for module in pair.modules})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
