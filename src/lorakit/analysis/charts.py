"""Line charts as HTML with inline SVG: no library, no network, sharp at any size.

The SVG holds only the curves and stretches to the width of the page; its strokes do not scale (`vector-effect`), and
points are strokes of length zero with round ends, so that they stay round. Labels are HTML beside it and keep their
size on a phone. The values under the pointer are shown by a script that reads `data-chart`; only that needs it.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from typing import Literal

SIZE = 1000  # of the SVG's coordinate square
MOST_POINTS = 600  # drawn per curve; a screen has not many more columns


@dataclass(frozen=True)
class Series:
    """One curve. `color` counts from 1; `style`: bare points, a line, or a dashed line with points (evaluations)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 1
    style: Literal["points", "line", "marked"] = "line"


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high` with its ticks."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        """Give the place of a value as a fraction of the axis."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    zero: bool = True,
    label: Callable[[float], str] | None = None,
    over: str = "step",
    css: str = "",
) -> str:
    """Draw series over the step (or another counter, `over`) as one HTML figure; an empty string if there is no point to draw.

    log: logarithmic values; points that are not positive are left out. zero: let a linear axis begin at zero.
    label: how to write a value.
    """
    label = label or short
    series = [s for s in (_drawable(s, log) for s in series) if s.x]
    if not series:
        return ""
    x = step_axis(min(min(s.x) for s in series), max(max(s.x) for s in series))
    low, high = min(min(s.y) for s in series), max(max(s.y) for s in series)
    y = log_axis(low, high) if log else linear_axis(min(low, 0.0) if zero else low, high)
    spoken = "; ".join(f"{s.name}: {label(s.y[0])} to {label(s.y[-1])}" for s in series if s.style != "points")
    y_ticks = "".join(f'<span style="bottom:{100 * y.at(t):.2f}%">{escape(label(t))}</span>' for t in y.ticks)
    x_ticks = "".join(f'<span style="left:{100 * x.at(t):.2f}%">{t:,.0f}</span>' for t in x.ticks)
    data = {
        "x": [x.low, x.high],
        "over": over,
        "series": [
            {"name": s.name, "color": s.color, "x": [round(v) for v in s.x], "y": [label(v) for v in s.y]}
            for s in series
        ],
    }
    aria = f"{title} over {over}s {x.low:,.0f} to {x.high:,.0f}. {spoken}"
    unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<figure class="chart {css}"><figcaption><b>{escape(title)}</b>{unit}</figcaption>'
        f'<div class="plot" tabindex="0" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<div class="y-ticks" aria-hidden="true">{y_ticks}</div>'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(aria)}">'
        f'<path class="grid" d="{_grid(x, y)}"/>{"".join(_curve(s, x, y) for s in series)}</svg>'
        f'<div class="x-ticks" aria-hidden="true">{x_ticks}</div></div></figure>'
    )


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Give the running mean of values and over about how many of them it reaches (a twentieth of all).

    The mean of v[j] with weights k^|i-j|, by one pass in each direction; it does not lag as a one-sided mean does.
    """
    reach = max(len(values) // 20, 1)
    keep = (reach - 1) / (reach + 1)

    def pass_over(order: Iterable[float]) -> list[float]:
        return list(accumulate(order, lambda total, value: keep * total + value))

    sums = pass_over(values), pass_over(reversed(values))[::-1]
    ones = [1.0] * len(values)
    weights = pass_over(ones), pass_over(ones)[::-1]
    return [
        (before + after - value) / (w_before + w_after - 1)
        for value, before, after, w_before, w_after in zip(values, *sums, *weights, strict=True)
    ], reach


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Keep at most about `most` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(x) <= most:
        return list(x), list(y)
    stretches = most // 2
    edges = [i * len(x) // stretches for i in range(stretches + 1)]
    kept = {0, len(x) - 1}
    for a, b in pairwise(edges):
        kept |= {min(range(a, b), key=y.__getitem__), max(range(a, b), key=y.__getitem__)}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def linear_axis(low: float, high: float) -> Axis:
    """Give an axis that holds `low` to `high` and begins and ends at ticks of 1, 2 or 5 times a power of ten."""
    if high - low <= max(1e-9 * abs(low), 1e-9 * abs(high), 1e-100):
        spread = abs(low) / 2 or 1.0
        low, high = (0.0, low + spread) if low == 0 else (low - spread, low + spread)
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """Give a logarithmic axis that holds `low` to `high`, both positive, with ticks at powers of ten or 1-2-5 steps."""
    low, high = (low / 2, high * 2) if high <= low * 1.0001 else (low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    each = (1, 2, 5) if last - first <= 2 else (1,)
    every = max((last - first) // 6, 1)
    ticks = [m * 10.0**p for p in range(first, last + 1, every) for m in each]
    lower = max((t for t in ticks if t <= low * 1.0001), default=low)
    upper = min((t for t in ticks if t >= high * 0.9999), default=high)
    return Axis(min(lower, low), max(upper, high), [t for t in ticks if lower <= t <= upper], log=True)


def step_axis(low: float, high: float) -> Axis:
    """Give the axis of the steps, exactly from the first to the last one, with ticks at whole numbers."""
    if high <= low:
        return Axis(low - 1, low + 1, [low])
    step = max(_round_step((high - low) / 5), 1.0)
    return Axis(low, high, [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)])


def short(value: float) -> str:
    """Write a value with three or four figures: 0.0312, 2.03, 1,250, 12.35k, 2e-4."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        return scientific(value)
    for least, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """Write a share: 97.5%."""
    return f"{100 * value:.3g}%"


def scientific(value: float) -> str:
    """Write a learning rate: 2e-4."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.9999)


def _drawable(series: Series, log: bool) -> Series:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y) and (y > 0 or not log)]
    x, y = thin([x for x, _ in points], [y for _, y in points])
    return Series(series.name, x, y, series.color, series.style)


def _grid(x: Axis, y: Axis) -> str:
    rows = (f"M0 {SIZE * (1 - y.at(t)):.1f}h{SIZE}" for t in y.ticks)
    columns = (f"M{SIZE * x.at(t):.1f} 0v{SIZE}" for t in x.ticks)
    return "".join([*rows, *columns])


def _curve(series: Series, x: Axis, y: Axis) -> str:
    places = [(SIZE * x.at(a), SIZE * (1 - y.at(b))) for a, b in zip(series.x, series.y, strict=True)]
    line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    points = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
    color = f"c{(series.color - 1) % 8 + 1}"
    if series.style == "points":
        return f'<path class="points {color}" d="{points}"/>'
    if series.style == "line" and len(places) > 1:
        return f'<path class="line {color}" d="{line}"/>'
    return f'<path class="line dashed {color}" d="{line}"/><path class="marks {color}" d="{points}"/>'
