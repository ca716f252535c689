"""The section of the report on what a run said about itself (`train.diagnose`): its alarms, and the course of what was watched."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from ..theory.alarms import RULES
from ..theory.thresholds import GAIN_RATIO, OVERFIT_SLOPE
from .charts import Series, chart, scientific, short
from .run_files import Run

STATEMENTS = {rule.name: rule for rule in RULES}


def diagnostics(runs: Sequence[Run]) -> str:
    """Draw what was watched, below what was said; an empty string for runs that were not watched."""
    drawn = list(filter(None, _charts(runs)))
    if not drawn:
        return ""
    return f'<section><h2>Diagnostics</h2>{_alarms(runs)}<div class="charts">{"".join(drawn)}</div></section>'


def _charts(runs: Sequence[Run]) -> Iterator[str]:
    def curves(*keys: tuple[str, str], evaluated: bool = False) -> list[Series]:
        found = []
        for i, run in enumerate(runs):
            for j, (key, name) in enumerate(keys):
                points = run.evaluated(key) if evaluated else run.points(key)
                label = f"{run.name}: {name}" if len(runs) > 1 else name
                found.append(Series(label, *points, i + j + 1, "marked"))
        return found

    unit = f"loss of the batch, of what the gradient promised; alarm below {GAIN_RATIO.value:g}"
    yield chart("Gain ratio of a step", unit, curves(("gain_ratio", "gain ratio")))
    slopes = [*curves(("train_slope", "training")), *curves(("eval_slope", "validation"), evaluated=True)]
    slopes = [Series(s.name, s.x, s.y, 1 + k, s.style) for k, s in enumerate(slopes)]
    unit = f"by the strength of the adapter; alarm above {OVERFIT_SLOPE.value:g} on validation rows"
    yield chart("Slope of the loss", unit, slopes)
    yield chart("Size of the change", "of the adapted weights", curves(("rho", "||ΔW|| / ||W||")), label=scientific)
    yield chart("Size of a step", "of the adapted weights", curves(("rho_step", "step")), label=scientific)
    yield chart("Movement of A", "from its start, of its start's size", curves(("A_movement", "A")))
    yield chart("Gradients", "||dA|| over ||dB||", curves(("grad_ratio", "ratio")), label=short)
    yield chart("Noise scale", "rows", curves(("noise_scale", "rows")))
    yield chart("Description length", "bits a parameter", curves(("bits_per_parameter", "bits"), evaluated=True))
    yield chart("What weight decay has left", "of a weight", curves(("decay_survival", "share")), zero=False)
    yield chart(
        "Backward pass", "<A, dA> against <B, dB>; rounding", curves(("slope_mismatch", "difference")), label=scientific
    )


def _alarms(runs: Sequence[Run]) -> str:
    """List when each alarm was on, with what to do about it."""
    items = []
    for run in runs:
        for name, spans in _spans(run).items():
            rule = STATEMENTS.get(name)
            when = ", ".join(f"step {a:,}" if a == b else f"steps {a:,} to {b:,}" for a, b in spans)
            whose = f"{escape(run.name)}: " if len(runs) > 1 else ""
            what = f"{escape(rule.statement)}. <b>Next:</b> {escape(rule.after)}." if rule else ""
            items.append(f"<li>{whose}<b>{escape(name.replace('_', ' '))}</b> ({when}). {what}</li>")
    return f'<ul class="alarms">{"".join(items)}</ul>' if items else "<p>No alarm at any look.</p>"


def _spans(run: Run) -> dict[str, list[tuple[int, int]]]:
    """Give name -> (first, last) look of each time an alarm was on."""
    looks: list[dict[str, Any]] = sorted(
        (r for r in [*run.steps, *run.evaluations] if isinstance(r.get("alarms"), list)), key=lambda r: r["step"]
    )
    spans: dict[str, list[tuple[int, int]]] = {}
    on: set[str] = set()
    for record in looks:
        names = [name for name in record["alarms"] if isinstance(name, str)]
        for name in names:
            if name in on:
                spans[name][-1] = (spans[name][-1][0], record["step"])
            else:
                spans.setdefault(name, []).append((record["step"], record["step"]))
        on = set(names)
    return spans
