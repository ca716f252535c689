"""What is known of a layer before an adapter starts: measured on some batches (EVA, CorDA, LoRA-GA), or lost in rounding (LoftQ)."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass
class Statistics:
    """Measurements of one layer, in fp32. None: not measured.

    inputs: second moment of its inputs, mean of x x^T over tokens, (in, in)
    mean: mean of its inputs over tokens, (in,); measured with `inputs`
    gradient: mean over batches of the gradient of the loss by its matrix, (out, in)
    residual: what its matrix lost when it was quantized, W - dense(stored), (out, in)
    experts: factors of adapters that were trained before, A (n, r, in) and B (n, out, r); no measurement, but a start too
    """

    inputs: Tensor | None = None
    mean: Tensor | None = None
    gradient: Tensor | None = None
    residual: Tensor | None = None
    experts: tuple[Tensor, Tensor] | None = None

    def rows(self, rows: Tensor) -> "Statistics":
        """Give the statistics of some rows of the matrix: the inputs are the same, the rest is (out, in)."""
        gradient = None if self.gradient is None else self.gradient[rows]
        residual = None if self.residual is None else self.residual[rows]
        experts = None if self.experts is None else (self.experts[0], self.experts[1][:, rows])
        return replace(self, gradient=gradient, residual=residual, experts=experts)
