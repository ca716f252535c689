"""The picture of `lorakit inspect --png`: the heat maps and spectra of the page, for slides and papers. Needs the extra `plot`."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError
from ..core.files import atomic_write
from .heatmap import shaded
from .inspect_page import Map, maps, spectra
from .inspection import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_picture(found: Mapping[str, Any], inspection: Inspection, output: Path) -> Path:
    """Draw an adapter as PNG; `found`: the facts that `lorakit inspect` shows. UsageError without matplotlib or anything to draw."""
    content = io.BytesIO()
    draw(found, inspection).savefig(content, format="png", dpi=150)
    atomic_write(output, content.getvalue())
    return output


def figure_class() -> "type[Figure]":
    """Give matplotlib's figure. UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    except ImportError:
        raise UsageError("--png needs matplotlib", fix="pip install 'lorakit[plot]', or take --html") from None
    return Figure


def draw(found: Mapping[str, Any], inspection: Inspection) -> "Figure":
    """Give the figure: a heat map for each number that was measured, the spectra below."""
    Figure = figure_class()
    if not inspection.modules:
        raise UsageError("there is nothing to draw", why="no matrix of this adapter was measured")
    rows, columns, every = maps(inspection)
    shown, curves = [m for m in every if shaded(m.values, log=m.log)], spectra(inspection)
    height = 0.7 + 0.24 * len(rows)
    size = (max(6.0, 2.2 + 0.24 * len(columns)), height * len(shown) + 3.6)
    figure = Figure(figsize=size, layout="constrained")
    name = Path(str(found["directory"])).resolve().name
    figure.suptitle(f"{name}: {found['method']}")
    axes = figure.subplots(len(shown) + 1, 1, squeeze=False, height_ratios=[height] * len(shown) + [3.0])[:, 0]
    for axis, one in zip(axes, shown, strict=False):
        _heat(figure, axis, one, rows, columns)
    for series in curves:
        style = {"color": "gray", "linestyle": "--"} if series.style == "marked" else {}
        axes[-1].plot(series.x, series.y, label=series.name, **style)
    axes[-1].set_title("Singular values σ / ‖ΔW‖, median over the blocks", fontsize=9, loc="left")
    axes[-1].set_xlabel("component", fontsize=8)
    if curves:  # a method without factors has none
        axes[-1].legend(fontsize=7)
    axes[-1].tick_params(labelsize=7)
    return figure


def _heat(figure: "Figure", axis: "Axes", one: Map, rows: list[str], columns: list[str]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    cells = shaded(one.values, log=one.log)
    grid = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
    low, high = min(cells.values()), max(cells.values())
    image = axis.imshow(grid, cmap="Blues", aspect="auto", norm=(LogNorm if one.log else Normalize)(low, high))
    axis.set_title(f"{one.title}: {one.label(low)} to {one.label(high)}", fontsize=9, loc="left")
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    every = max(1, len(columns) // 16)
    axis.set_xticks(range(0, len(columns), every), columns[::every], fontsize=7)
    figure.colorbar(image, ax=axis, format=lambda value, _: one.label(value)).ax.tick_params(labelsize=6, which="both")
