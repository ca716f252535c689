"""The table of formulas: what each number is, when it holds, whose it is, and the check that proves it.

One line of it per quantity a user may see; `lorakit selftest` runs the checks. W (d, k) is the base matrix, ΔW = s·B·A of rank r,
σ its singular values, G = dL/dW, ρ = ||ΔW||_F / ||W||_F.
"""

from typing import NamedTuple


class Formula(NamedTuple):
    """text: the formula. holds: its conditions, empty if none. source: paper or book. test: check of `lorakit selftest`."""

    text: str
    holds: str
    source: str
    test: str


_HU = "Hu et al. 2021, arXiv 2106.09685"
_GD = "Gavish and Donoho 2014, arXiv 1305.5870"
_LINEAR = "linear layer"

FORMULAS: dict[str, Formula] = {
    # the spectrum of ΔW
    "singular_values": Formula("σ_i(ΔW) from the r x r core s R_B R_A^T", "", "Golub and Van Loan, 5.4", "T3"),
    "frobenius": Formula("||ΔW||_F = sqrt(sum σ^2)", "", "", "T1"),
    "spectral": Formula("||ΔW||_2 = σ_1", "", "", "T1"),
    "nuclear": Formula("||ΔW||_* = sum σ", "", "", "T1"),
    "stable_rank": Formula("||ΔW||_F^2 / ||ΔW||_2^2", "compare with the null of random factors", "", "T1"),
    "effective_rank": Formula("exp H(σ / sum σ)", "compare with the null", "Roy and Vetterli 2007", "T1"),
    "participation": Formula("(sum σ^2)^2 / sum σ^4", "compare with the null", "", "T1"),
    "energy_rank": Formula("least q with sum_{i<=q} σ_i^2 >= share of all", "compare with the null", "", "T1"),
    "numerical_rank": Formula(
        "count σ_i > max(d, k) eps σ_1", "about storage, not usefulness", "Golub and Van Loan", "T3"
    ),
    "condition": Formula("σ_1 / smallest nonzero σ", "high is normal: spectra decay", "", "T1"),
    "truncation": Formula(
        "||ΔW - X|| >= sqrt(sum_{i>q} σ^2), attained", "best in weights, not in loss", "Mirsky 1960", "T2"
    ),
    "null_random_factors": Formula("mean over Gaussian B, A of the shape", "", "Bartlett 1933", "T1"),
    # the parametrisation
    "imbalance": Formula(
        "||A A^T - B^T B|| / (||A A^T|| + ||B^T B||)", "of these factors only", "arXiv 1806.00900", "T8"
    ),
    "nuclear_gap": Formula("(||A||^2 + ||B||^2) / 2 / ||B A||_* >= 1", "of these factors only", "", "T25"),
    "conserved": Formula("A A^T / lr_A - B^T B / lr_B", "gradient flow; no decay, no Adam", "arXiv 1802.06509", "T9"),
    "decay_survival": Formula("prod (1 - lr_t λ)", "decoupled weight decay", "arXiv 1711.05101", "T25"),
    "norm": Formula("||A||_F, ||B||_F", "of these factors only", "", "T30"),
    # counts
    "parameters": Formula("r (d + k)", "", _HU, "T4"),
    "degrees_of_freedom": Formula("r (d + k - r)", "", "", "T10"),
    "break_even_rank": Formula("d k / (d + k)", "", "", "T4"),
    "training_flops": Formula("4 d k + 6 r (d + k) per token", _LINEAR, "", "T4"),
    # gradients
    "factor_gradients": Formula("dB = s G A^T, dA = s B^T G", "", "", "T5"),
    "scale_derivative": Formula("dL/dγ = <A, dA> = <B, dB>", "γ scales ΔW; both of one pass", "", "T6"),
    "component_sensitivity": Formula("u^T G v = u^T dB c / s, A^T c = v", "σ above rounding", "", "T7"),
    "first_update": Formula("||ΔW_1|| = s lr sqrt(d r / 3)", "Adam, B = 0, Kaiming A", "", "T17"),
    "capture": Formula("||G P_A||^2 / ||G||^2, random A: r/k", "", "FLORA, arXiv 2402.03293", "T16"),
    "tangent_capture": Formula("(||P_B G||^2 + ||G P_A||^2 - ||P_B G P_A||^2) / ||G||^2", "", "", "T16"),
    "movement": Formula("||A - A_0|| / ||A_0||", "", "", "T16"),
    "coupling": Formula(
        "||E dA dB|| / sqrt(||E dA dA|| ||E dB dB||)", "g independent of x: false in models", "", "T15"
    ),
    # curvature and steps
    "bilinear_spectrum": Formula("s (σ_i ± σ_j), s σ_i, 0", "1/2 ||s B A - M||^2, balanced", "", "T10"),
    "saddle": Formula("s (σ_i - σ_j), i kept, j missing", "1/2 ||s B A - M||^2, balanced", "arXiv 1605.07110", "T11"),
    "sharpness": Formula("λ_max(H) by Lanczos", "one fixed batch", "Lanczos 1950", "T12"),
    "trace": Formula("mean v^T H v over signs v", "", "Hutchinson 1990", "T12"),
    "adam_threshold": Formula(
        "(2 + 2 β1) / ((1 - β1) lr) for λ_max(P^-1 H)", "quadratic, slow v", "arXiv 2207.14484", "T13"
    ),
    "gain_ratio": Formula(
        "(L(θ + step) - L(θ)) / <g, step>", "same batch, same dropout mask", "Conn et al. 2000", "T14"
    ),
    "noise_scale": Formula("tr(Σ) / |μ|^2, by <G1, G2>", "unit: sequence", "arXiv 1812.06162", "T26"),
    # noise
    "hard_threshold": Formula("λ*(β) τ sqrt(max(d, k))", "full-rank noise, not B A", _GD, "T18"),
    "median_threshold": Formula("ω(β) median(σ)", "full-rank noise, not B A", _GD, "T18"),
    "keep_cost": Formula("2 + 3/y^2 (β = 1)", "one component above the edge", "arXiv 1103.2221", "T19"),
    # coding and bounds
    "water_filling": Formula("D_i = min(θ, σ_i^2)", "Gaussian components", "Cover and Thomas, 10.3", "T20"),
    "gaussian_information": Formula("1/2 ln det(I + A Σ A^T / ν^2)", "ν is invented", "", "T21"),
    "excess_description_length": Formula("sum (L_t - L_final) n_t / ln 2", "first epoch", "arXiv 2601.04728", "T32"),
    "rademacher": Formula("(F/n) E||sum ε X||_(r)", "linear functionals", "", "T27"),
    "information_bound": Formula("sqrt(2 σ^2 ln2 q p / n)", "vacuous for models", "arXiv 2402.16842", "T32"),
    "occam_bound": Formula("sqrt((K ln2 + ln 1/δ) / 2n)", "", "", "T32"),
    # rounding
    "rounding_closed_form": Formula(
        "c(t), e(t) over the histogram of ulp(W)", "ΔW about normal; bf16, fp16", "", "T22"
    ),
    "rounding_measured": Formula("(round(W + ΔW) - W) against ΔW", "", "", "T22"),
    "storage_floor": Formula("sqrt2 rms(ulp(x)) / sqrt12, x normal", "entries of B, A about normal", "", "T22"),
    "rounding_off_grid": Formula(
        "e(t)^2 = E f(1 - f) / t^2, retained 1", "W finer than the grid, ΔW about normal", "", "T40"
    ),
    "unmerge_damage": Formula("||round(W' - ΔW) - round(W)|| / ||ΔW||", "unmerging by subtraction", "", "T40"),
    "storage_error": Formula("||B A - B' A'|| / ||B A||", "factors stored in that dtype", "", "T22"),
    # directions
    "subspace_similarity": Formula("||U1^T U2||^2 / min(i, j), random: max(i, j)/n", "orthonormal", _HU, "T23"),
    "amplification": Formula("||ΔW|| / ||U^T W V||, random: q ||W|| / sqrt(d k) below", "", _HU, "T24"),
    "relative_norm": Formula("ρ = ||ΔW||_F / ||W||_F", "no measure of forgetting", "", "T24"),
    "dominance": Formula("max σ_i / ||u_i^T W||", "", "", "T28"),
    "intruders": Formula("top u of W + ΔW with max |<u, u_j(W)>| < 0.5", "", "arXiv 2410.21228", "T28"),
    "interference": Formula("<ΔW1, ΔW2> / (||ΔW1|| ||ΔW2||), random: 0 ± 1/sqrt(d k)", "", "", "T42"),
    "replicated_rank": Formula(
        "principal cosines above those of random subspaces, one after the other", "i + j < n", "Muirhead 1982", "T42"
    ),
    # lower rank
    "weight_error": Formula("||ΔW - X||_F / ||ΔW||_F of X as written", "says little about the loss", "", "T41"),
    "output_error": Formula(
        "sqrt(tr(E Σ E^T) / tr(ΔW Σ ΔW^T)), E = ΔW - X", "Σ of the inputs of the calibration rows", "", "T41"
    ),
    "lost_gain": Formula(
        "share of the gain lost = share of the energy discarded, in outputs if measured",
        "off by factors, to both sides: only the loss itself tells",
        "",
        "T41",
    ),
    # measured on data
    "loss_difference": Formula("L(after) - L(before)", "paired, interval over rows", "", "T34"),
    "gain_share": Formula("(L_after - L_before) / (L_base - L_before)", "where the adapter has a gain", "", "T34"),
    "gradient_capture": Formula("sum s_i u_i^T G2 v_i / <G1, G2>", "gradient at the start", "", "T26"),
    "kl": Formula("KL(base || adapted)", "", "Shenfeld et al. 2025, arXiv 2509.04259", "T29"),
    "loss": Formula("sum of -ln p over the trained tokens, over their number", "interval over rows", "", "T34"),
    "strength_gain": Formula("L(0) - L(γ)", "paired over rows", "", "T34"),
    "best_strength": Formula("least point of the parabola at the lowest of the measured γ", "", "", "T33"),
    "curve_exponent": Formula(
        "ln(L(t0) / L(T)) / ln(T / t0), t0 near T / 2",
        "validation rows; a power law",
        "Hestness et al. 2017, arXiv 1712.00409",
        "T36",
    ),
    "elasticity": Formula("-dL/dγ / (L(0) - L(1)) at γ = 1", "d ln(gain) / d ln γ, on held-out rows", "", "T35"),
    "relative_update": Formula("||ΔW_{t+1} - ΔW_t||_F / ||W||_F", "", "", "T3"),
    "tokens_per_parameter": Formula("trained tokens / trained numbers", "a rule of thumb", "", "T4"),
    "loaded_delta": Formula("ΔW as the method merges it", "", "", "T31"),
    # what is only taught
    "matrix_rank": Formula("least r with W = B A, B (d, r), A (r, k)", "", "Golub and Van Loan, 2.4", "T50"),
    "compression_ratio": Formula("d k / (r (d + k))", "", _HU, "T50"),
    "logit_curvature": Formula("λ_max(diag(p) - p p^T) <= 1/2", "softmax and cross entropy", "", "T51"),
    "spectral_ratio": Formula("||W + ΔW||_2 / ||W||_2", "||W||_2 from below, by Lanczos", "Weyl 1912", "T51"),
    "factor_curvature": Formula(
        "λ_max <= s^2 (||A||_2^2 + ||B||_2^2) L_W + s ||G||_2", "at one point; H_W positive semidefinite", "", "T51"
    ),
    "contraction": Formula("(1 - lr s σ_r)^2 of the loss is left by a step", "at the balanced optimum", "", "T52"),
    "scalar_flow": Formula("du/dt = sqrt(a_0^4 + 4 u^2) (m - u)", "one number, B = 0 at the start", "", "T52"),
    "oracle_risk": Formula("sum_{i>r} σ_i^2 + τ^2 r (d + k - r)", "if the directions were known", "", "T53"),
    "tail_exponent": Formula("1 + n / sum ln(x_i / x_min) ± (α - 1) / sqrt n", "", "arXiv 0706.1062", "T54"),
}
