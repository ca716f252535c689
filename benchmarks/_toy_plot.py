"""The picture of `methods_toy.py`: a line an arm, its error as a dot on a logarithmic scale, the optimum as a stroke."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

LEFT, WIDTH, ROW, TOP, RIGHT = 290, 520, 17, 44, 20
LEAST, MOST = 1e-3, 4.0
"""What is smaller or larger is drawn at the edge."""
COLORS = {
    "baseline": "#777777",
    "method": "#1f6fb4",
    "init": "#2a8a57",
    "optimizer": "#c2571a",
    "controller": "#8a4fb0",
    "anisotropic": "#a3850b",
}
STYLE = (
    "text{font:11px sans-serif;fill:#333}.grid{stroke:#ddd}.best{stroke:#000;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}.best{stroke:#fff}}"
)


def plot(arms: Sequence[Mapping[str, Any]]) -> str:
    """Draw the arms that ran as an SVG."""
    ran = [arm for arm in arms if "refused" not in arm]
    height = TOP + ROW * len(ran) + 12
    ticks = "".join(_tick(power, height) for power in range(-3, 1))
    rows = "".join(_row(arm, TOP + ROW * i + ROW // 2) for i, arm in enumerate(ran))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" role="img" '
        f'aria-label="Error of each arm and the least possible one, logarithmic">\n<style>{STYLE}</style>\n'
        f'<text x="10" y="14">error (dot: mean, line: the seeds) and optimum (stroke); '
        "0.001 or less at the left edge, 2.55 is doing nothing</text>\n"
        f"{ticks}{rows}</svg>\n"
    )


def _place(value: float) -> float:
    share = math.log(min(max(value, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LEFT + WIDTH * share


def _tick(power: int, height: int) -> str:
    x = _place(10.0**power)
    return (
        f'<path class="grid" d="M{x:.1f} {TOP - 6}V{height - 8}"/>'
        f'<text x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{10.0**power:g}</text>\n'
    )


def _row(arm: Mapping[str, Any], y: int) -> str:
    color, low, high = COLORS[arm["kind"]], _place(min(arm["errors"])), _place(max(arm["errors"]))
    parts = [
        f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(arm["name"].replace("`", ""))}</text>',
        f'<path stroke="{color}" d="M{low:.1f} {y}H{high:.1f}"/>',
        f'<circle fill="{color}" cx="{_place(arm["error"]):.1f}" cy="{y}" r="4"/>',
    ]
    if arm["optimum"] is not None:
        x = _place(arm["optimum"])
        parts.append(f'<path class="best" d="M{x:.1f} {y - 6}v12"/>')
    return "".join(parts) + "\n"
