"""What a strength measurement means, each statement with its number, what would refute it, and what to do next."""

from collections.abc import Iterator
from dataclasses import replace

from ..theory.judgement import Judgement
from ..theory.number import Kind
from ..theory.thresholds import GIVE_UP, OVERFIT_STRENGTH, UNDERTRAINED_ELASTICITY
from .strength import Strength


def judged(found: Strength) -> Strength:
    """Give the measurement with what it means."""
    return replace(found, judgements=(_fit(found), *_worth(found), *_forgetting(found)))


def _fit(found: Strength) -> Judgement:
    best = found.task.best()
    low, high = best.interval or (best.value, best.value)
    rule = replace(best, kind=Kind.HEURISTIC)
    at = f"the best strength on held-out rows is {best.value:.2f} ({low:.2f} to {high:.2f})"
    slope = f"dL/dγ there is {found.slope.value:+.3g}"
    other = "rows that share sources with the training rows, or too few of them: measure on other held-out rows"
    elastic = found.elasticity()
    least, most = elastic.interval or (elastic.value, elastic.value)
    over, under = best.value < OVERFIT_STRENGTH.value, elastic.value > UNDERTRAINED_ELASTICITY.value
    if (over and low <= 1 <= high) or (under and least <= 0 <= most):
        statement = f"these rows cannot tell whether it is too strong or too weak: {at}; {slope}"
        return Judgement("undecided", statement, rule, "more held-out rows", "measure on more rows: --rows")
    if over:
        sure = "" if high < OVERFIT_STRENGTH.value else "probably "
        action = (
            "if the training loss is below the held-out one it is overfitted: train shorter or on more rows (eval.load_best, "
            "eval.patience); if not, lower optim.lr or alpha. Or take the weaker adapter: --output DIR"
        )
        return Judgement("too_strong", f"{sure}too strong: {at}; {slope}", rule, other, action)
    if under:
        sure = "" if least > UNDERTRAINED_ELASTICITY.value else "probably "
        more = f"a strength larger by 1 % would bring {elastic.value:.2f} % more gain ({least:.2f} to {most:.2f})"
        action = "train longer or at a higher optim.lr; a stronger adapter (--output DIR) is the smaller part of it"
        refuted = "a longer run whose held-out loss is no lower"
        grows = replace(elastic, kind=Kind.HEURISTIC)
        return Judgement("undertrained", f"{sure}undertrained: {more}; {slope}", grows, refuted, action)
    action = (
        "keep it as it is; whether the learning rate was right, the gain ratio says (train.diagnose); whether more steps would "
        "help, only more steps"
    )
    return Judgement("strength_right", f"neither too strong nor too weak: {at}", rule, other, action)


def _worth(found: Strength) -> Iterator[Judgement]:
    """Judge what the adapter is worth at the strength it has."""
    losses = found.task.losses()
    grid = min(losses, key=lambda g: losses[g].value)
    gain, most = found.task.gain(1.0), found.task.gain(grid)
    low, high = gain.interval or (gain.value, gain.value)
    if high < 0:
        statement = f"worse than its base model on held-out rows by {-gain.value:.3g} nats"
        action = (
            "do not ship it" if grid == 0 else f"do not ship it as it is: at γ = {grid:g} it gains {most.value:.3g}"
        )
        yield Judgement("worse_than_base", statement, gain, "held-out rows nearer to its use", f"{action}; train again")
    elif low <= 0:
        statement = f"no gain over the base model that these rows could show: {gain.value:.3g} nats"
        yield Judgement("no_gain", statement, gain, "more held-out rows", "measure on more rows, or train longer")


def _forgetting(found: Strength) -> Iterator[Judgement]:
    """Judge what the base model loses, and by how much less strength that would be less."""
    if found.retain is None:
        return
    loss = found.retain.over_base(1.0)
    kls = found.retain.kls()
    if loss is None or kls is None:
        return
    low, _ = loss.interval or (loss.value, loss.value)
    if low <= 0:
        statement = f"no forgetting that these rows could show: {loss.value:+.3g} nats, KL {kls[1.0].value:.3g}"
        yield Judgement("retained", statement, loss, "more or other rows to retain", "nothing to do")
        return
    statement = f"the rows to retain cost {loss.value:.3g} nats more than with the base model, KL {kls[1.0].value:.3g}"
    offer = _offer(found)
    if offer is None:
        action = f"no weaker strength keeps {1 - GIVE_UP:.0%} of the gain: mix such rows into training, or train less"
    else:
        gamma, gain, kept = offer
        action = (
            f"at γ = {gamma:g} it gives up {gain:.0%} of the gain and {kept:.0%} of the damage goes "
            f"(--gamma {gamma:g} --output DIR); or mix such rows into training"
        )
    yield Judgement("forgetting", statement, loss, "tasks of the kind to retain, scored before and after", action)


def _offer(found: Strength) -> tuple[float, float, float] | None:
    """Give (γ, share of the gain given up, share of the damage removed) of the weakest strength that gives up little."""
    if found.retain is None or found.task.gain(1.0).value <= 0:
        return None
    whole = found.task.gain(1.0).value
    damage = found.retain.over_base(1.0)
    for gamma in sorted(g for g in found.task.nll if 0 < g < 1):
        given_up = 1 - found.task.gain(gamma).value / whole
        less = found.retain.over_base(gamma)
        if given_up <= GIVE_UP and damage is not None and less is not None and less.value < damage.value:
            return gamma, max(given_up, 0.0), 1 - less.value / damage.value
    return None
