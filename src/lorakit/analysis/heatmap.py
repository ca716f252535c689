"""A picture of one number over blocks and module names: inline SVG, a cell each, its value in the tip of the cell."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

CELL, GAP = 22, 2


def shaded(values: Mapping[tuple[str, str], float], *, log: bool) -> dict[tuple[str, str], float]:
    """Give the cells that have a shade."""
    return {key: v for key, v in values.items() if math.isfinite(v) and (v > 0 or not log)}


def heatmap(
    title: str,
    unit: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    *,
    label: Callable[[float], str],
    log: bool = False,
) -> str:
    """Draw values[row, column] as one HTML figure; cells that have none stay empty. An empty string if all are.

    log: shade by the logarithm. The shade runs from the smallest to the largest value; there is no good or bad end.
    """
    shown = shaded(values, log=log)
    if not shown:
        return ""
    at = math.log if log else float
    low, high = at(min(shown.values())), at(max(shown.values()))
    step, cells = CELL + GAP, []
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            place = f'x="{x * step}" y="{y * step}" width="{CELL}" height="{CELL}"'
            if (row, column) in shown:
                value = shown[row, column]
                share = (at(value) - low) / (high - low) if high > low else 1.0
                tip = f"<title>{escape(f'{row}, block {column}: {label(value)}')}</title>"
                cells.append(f'<rect {place} class="cell" fill-opacity="{0.06 + 0.94 * share:.3f}">{tip}</rect>')
            elif (row, column) in values:
                value = values[row, column]
                text = label(value) if math.isfinite(value) else "not measured"
                tip = f"<title>{escape(f'{row}, block {column}: {text}')}</title>"
                cells.append(f'<rect {place} class="none">{tip}</rect>')
    width, height = len(columns) * step, len(rows) * step
    names = "".join(f"<div>{escape(row)}</div>" for row in rows)
    every = max(1, len(columns) // 16)
    ticks = "".join(
        f'<text x="{x * step + CELL / 2}" y="{height + 12}">{escape(column)}</text>'
        for x, column in enumerate(columns)
        if x % every == 0
    )
    ends = [label(f(shown.values())) for f in (min, max)]
    aria = f"{title}: {len(rows)} kinds of module in {len(columns)} blocks, from {ends[0]} to {ends[1]}"
    unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    legend = f'<p class="heat-ends quiet">{escape(ends[0])} <i class="ramp"></i> {escape(ends[1])}</p>'
    return (
        f'<figure class="chart heat"><figcaption><b>{escape(title)}</b>{unit}</figcaption><div class="scroll" tabindex="0">'
        f'<div class="heat-grid"><div class="heat-names" aria-hidden="true">{names}</div>'
        f'<svg width="{width}" height="{height + 18}" viewBox="0 0 {width} {height + 18}" role="img" '
        f'aria-label="{escape(aria)}">{"".join(cells)}{ticks}</svg></div></div>{legend}</figure>'
    )
