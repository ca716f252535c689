"""Ways of running a model: in evaluation for a while, with its activations recomputed."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put every module into eval mode, and afterwards exactly those back into training mode that were in it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Recompute each block's activations in the backward pass instead of keeping them."""
    settings = {"use_reentrant": False}  # the other kind needs inputs with gradients, which a frozen base does not have
    if "activation_checkpointing_enable" in dir(model):
        model.activation_checkpointing_enable(settings)
    else:  # transformers before 5.20 has it under this name only
        model.gradient_checkpointing_enable(settings)
