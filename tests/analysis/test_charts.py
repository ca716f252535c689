"""Axes, running means and thinning by their laws; curves by their coordinates."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.analysis.charts import Series, chart, linear_axis, log_axis, scientific, short, smooth, step_axis, thin


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_a_linear_axis_holds_its_range_between_round_ticks(low: float, span: float) -> None:
    axis = linear_axis(low, low + span)
    slack = 1e-6 * max(abs(low), span, 1e-3)
    assert axis.low <= low + slack and axis.high >= low + span - slack
    assert 2 <= len(axis.ticks) <= 8
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps) + 4 * math.ulp(max(map(abs, axis.ticks)))
    assert (axis.at(axis.low), axis.at(axis.high)) == (0.0, 1.0)
    if span > 1e-3 * abs(low):
        step = axis.ticks[1] - axis.ticks[0]
        assert round(step / 10 ** math.floor(math.log10(step * 1.0001))) in (1, 2, 5)


@given(st.floats(1e-9, 1e9), st.floats(1, 1e6))
def test_a_logarithmic_axis_holds_its_range(low: float, ratio: float) -> None:
    axis = log_axis(low, low * ratio)
    assert axis.low <= low and axis.high >= low * ratio
    assert axis.high / axis.low <= 1000 * ratio
    assert axis.at(math.sqrt(axis.low * axis.high)) == pytest.approx(0.5)
    assert axis.ticks == sorted(axis.ticks)


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_steps_have_whole_ticks_inside_the_axis(low: int, span: int) -> None:
    axis = step_axis(low, low + span)
    assert all(axis.low <= t <= axis.high and t == int(t) for t in axis.ticks)
    assert 1 <= len(axis.ticks) <= 11


@given(st.lists(st.floats(-100, 100), max_size=90))
def test_the_running_mean_is_its_kernel(values: list[float]) -> None:
    means, reach = smooth(values)
    assert reach == max(len(values) // 20, 1)
    keep = (reach - 1) / (reach + 1)
    for i, mean in enumerate(means):
        weights = [keep ** abs(i - j) for j in range(len(values))]
        assert mean == pytest.approx(
            math.fsum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights), abs=1e-9
        )


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    y = [math.sin(i / 500) for i in range(10_000)]
    y[1234], y[7777] = 50.0, -50.0
    x, kept = thin(list(range(10_000)), y)
    assert len(x) <= 602
    assert (x[0], x[-1]) == (0, 9_999)
    assert (max(kept), min(kept)) == (50.0, -50.0)
    assert x == sorted(x) and all(y[int(i)] == v for i, v in zip(x, kept, strict=True))
    assert thin([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_numbers_are_short() -> None:
    values = [0, 0.03125, 2.034, 1250, 12_345, 2_437_120, 3e9, 2e-4, 1.5e20, -0.5]
    assert [short(v) for v in values] == [
        *("0", "0.0312", "2.03", "1,250", "12.35k", "2.437M", "3G", "2e-4", "1.5e20", "-0.5"),
    ]
    assert [scientific(v) for v in (0, 2e-4, 1.25e-3, 1)] == ["0", "2e-4", "1.25e-3", "1e0"]


def test_a_curve_goes_through_its_points() -> None:
    html = chart(
        "Loss", "nats", [Series("a", [0, 5, 10], [1.0, 4.0, 2.0]), Series("b", [0, 10], [0.0, 4.0], 2, "marked")]
    )
    (line,) = re.findall(r'class="line c1" d="([^"]+)"', html)
    assert line == "M0.0 750.0L500.0 0.0L1000.0 500.0"
    assert re.findall(r'class="marks c2" d="([^"]+)"', html) == ["M0.0 1000.0h0M1000.0 0.0h0"]
    assert '<span style="bottom:50.00%">2</span>' in html
    log = chart("Loss", "", [Series("a", [0, 1, 2, 3], [0.01, 0.1, 1.0, -1.0])], log=True)
    assert re.findall(r'class="line c1" d="([^"]+)"', log) == ["M0.0 1000.0L500.0 500.0L1000.0 0.0"]


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart("x", "", []) == ""
    assert chart("x", "", [Series("a", [1, 2], [math.nan, math.inf])]) == ""
    assert chart("x", "", [Series("a", [1], [-1.0])], log=True) == ""
    for y in ([5.0], [0.0, 0.0], [-3.0, -3.0], [1e99, -1e99], [1e-99, 2e-99]):
        html = chart("x", "", [Series("a", range(len(y)), y)])
        assert "nan" not in html.lower().replace("inance", "") and "inf" not in html.lower()
