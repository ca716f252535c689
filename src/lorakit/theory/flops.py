"""Counts from shapes: parameters, degrees of freedom, work. d outputs, k inputs, rank r; a product of (a, b) and (b,) is 2ab."""


def parameters(d: int, k: int, r: int) -> int:
    """Give r (d + k)."""
    return r * (d + k)


def degrees_of_freedom(d: int, k: int, r: int) -> int:
    """Give r (d + k - r), the dimension of the matrices of rank r: r^2 of the parameters only change the factors (gauge)."""
    return r * (d + k - r)


def compression(d: int, k: int, r: int) -> float:
    """Give d k / (r (d + k))."""
    return d * k / parameters(d, k, r)


def break_even_rank(d: int, k: int) -> float:
    """Give d k / (d + k): from that rank on the factors are larger than the matrix, and slower."""
    return d * k / (d + k)


def forward(d: int, k: int, r: int = 0) -> int:
    """Give the forward operations per token, 2 d k + 2 r (d + k); merged, or without an adapter, r = 0."""
    return 2 * d * k + 2 * r * (d + k)


def training(d: int, k: int, r: int) -> int:
    """Give forward and backward of a frozen W with an adapter per token: 4 d k + 6 r (d + k).

    The frozen matrix needs no gradient of its own, but its input does: 2 of 3 products. The first layer, whose input needs
    none, does not pay 2 d k of it, nor 2 r k for A's part.
    """
    return 4 * d * k + 6 * r * (d + k)


def full_training(d: int, k: int) -> int:
    """Give forward and backward of full fine-tuning per token: 6 d k."""
    return 6 * d * k


def training_ratio(d: int, k: int, r: int) -> float:
    """Give LoRA's over full fine-tuning's work on this layer, 2/3 + r (d + k) / (d k): at best a third is saved."""
    return training(d, k, r) / full_training(d, k)
