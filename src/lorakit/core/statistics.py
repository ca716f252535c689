"""What is measured of a layer on some batches before an adapter starts, for the starts that look at data (EVA, CorDA, LoRA-GA)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Statistics:
    """Measurements of one layer, in fp32. None: not measured.

    inputs: second moment of its inputs, mean of x x^T over tokens, (in, in)
    gradient: mean over batches of the gradient of the loss by its matrix, (out, in)
    """

    inputs: Tensor | None = None
    gradient: Tensor | None = None
