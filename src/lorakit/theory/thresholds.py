"""Every threshold a judgement or an alarm rests on, in one place, with the runs that it was calibrated on.

They separate runs that trained well from runs that did not on those runs, and prove nothing about others: what rests on them is
a `HEURISTIC`. `benchmarks/diagnostics_study.py` runs all of them again and says which fired where they should not have.

The character GPT: 165k parameters, LoRA of rank 16 (alpha 32, AdamW, 300 steps), seven runs of rates from 1e-3 to 1e-1 and one
on 3k characters, one or two seeds each.
"""

from dataclasses import dataclass

_GPT = "seven runs of a character GPT of 165k parameters"


@dataclass(frozen=True)
class Threshold:
    """Where a judgement begins (`value`), where an alarm that rests on it ends again (`clear`), and what set them.

    Above or below is told apart by the two: an alarm for large values clears at a smaller one.
    """

    value: float
    clear: float
    calibrated: str

    def crossed(self, measured: float) -> bool:
        """Whether `measured` lies on the side of the alarm; NaN does not."""
        return measured > self.value if self.clear <= self.value else measured < self.value

    def cleared(self, measured: float) -> bool:
        """Whether `measured` lies on the good side of `clear`; NaN does not."""
        return measured < self.clear if self.clear <= self.value else measured > self.clear


OVERFIT_STRENGTH = Threshold(0.7, 0.8, f"{_GPT}: best strength 0.25 of the overfit run, 0.9 to 1.0 of the others")
UNDERTRAINED_ELASTICITY = Threshold(
    0.1,
    0.05,
    "d ln(gain) / d ln γ on held-out rows: 0.14 to 0.33 of the runs on a tiny model that were stopped at a tenth, 0.03 at most of "
    "the finished ones; the best strength does not tell them apart, 1.08 to 1.16 and 1.02 to 1.09. A sign and no more: on SmolLM2 "
    "such runs had -0.18",
)
OVERFIT_SLOPE = Threshold(0.3, 0.15, f"{_GPT}: held-out dL/dγ 1.73 of the overfit run, -0.04 to 0.11 of the others")
GAIN_RATIO = Threshold(0.5, 0.65, f"{_GPT}: .98 .95 .95 .89 of the good rates, .56 and .24 of those too high")
CURVE_EXPONENT = Threshold(
    -0.01,
    0.0,
    "p of loss ~ steps^-p on validation rows: -0.02 to -0.17 of the overfit runs of the study, 0.00 to 0.5 of all others. It tells "
    "nothing of runs that were stopped early: 0.05 to 0.07, between finished ones",
)
SHARPNESS = Threshold(
    1.0, 0.8, "a quadratic with momentum, stable at 37.9/lr and diverging at 38.1/lr; arXiv 2207.14484"
)
MISMATCH = {
    "float32": Threshold(1e-4, 5e-5, "an identity: rounding alone, 3e-8 on SmolLM2-135M in float32"),
    "bfloat16": Threshold(5e-3, 3e-3, "an identity: rounding alone, 1.3e-4 on SmolLM2-135M in bfloat16"),
}
LEAST_CHANGE = {"float32": 1e-5, "bfloat16": 1e-3}
"""Expected change of the loss, relative to it, below which rounding decides what is measured of it."""
FIRST_UPDATE = Threshold(
    1e-2, 5e-3, "||ΔW_1|| over ||W|| that is predicted for Adam: a hundredth, a rule of thumb; small models bear more"
)
LARGE_UPDATE = Threshold(
    0.2,
    0.1,
    "||ΔW|| of a step over ||W||: 0.077 at most in the good and overfit runs of the study on a tiny model, 0.39 from the "
    "first step on in those too hot; 2e-4 on SmolLM2-135M",
)
INERT_UPDATE = Threshold(1e-6, 2e-6, "||ΔW|| of a step over ||W||: below what bfloat16 keeps of it; a rule of thumb")
BATCH_OVER_NOISE = Threshold(
    10.0, 5.0, "rows of a step over the noise scale; arXiv 1812.06162, an order of magnitude only"
)
BITS_PER_PARAMETER = Threshold(2.0, 1.8, "bits a run wrote per trained number; about 2 is what is said of full models")
AMPLE_BITS = 0.1
"""Below this many bits a parameter the rank is no limit."""
CAPTURED = 0.9
"""Share of the reproducible gradient that the advised rank must follow. On three small tasks that share of the gradient gave .78
to .98 of the gain of rank 32; in the study on a tiny model the gain was always above the share, by up to .57, and on SmolLM2-135M
below it, by up to .18 (after 32 steps, at one learning rate). So it errs to both sides."""
LIKELY_RANKS = (1, 2, 4, 8, 16, 32, 64)
GIVE_UP = 0.1
"""Share of the gain that a weaker adapter may give up for less forgetting, in what is proposed."""
