"""Ways of running a model: in evaluation for a while, with its activations recomputed."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import UsageError

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


def checkpoint_activations(model: "PreTrainedModel", count: int = True) -> None:
    """Recompute activations in the backward pass instead of keeping them: of every block (True), of the lowest `count`, of none.

    The lowest of those that keep anything: blocks below the lowest trained parameter do not. Lowest first, because the
    backward pass recomputes them last, when what the others kept is gone. UsageError for more blocks than there are.
    """
    every = _blocks(model)
    if count is not True and count > len(every):
        raise UsageError(
            f"train.checkpointing is {count}, and this {type(model).__name__} has {len(every)} blocks that can be chosen",
            fix="true for all of its blocks, or a smaller number",
        )
    if count:
        _enable(model)
    if count is not True:
        chosen = set(recomputable(model)[:count])
        for block in every:
            block.gradient_checkpointing = block in chosen


def recomputable(model: "PreTrainedModel") -> list[nn.Module]:
    """The blocks that keep something for the backward pass and can be recomputed one by one, lowest first."""
    every = _blocks(model)
    place = {id(p): i for i, block in enumerate(every) for p in block.parameters()}
    trained = (place.get(id(p), 0) for p in model.parameters() if p.requires_grad)  # in the order of the model
    return every[next(trained, 0) :]


def _blocks(model: "PreTrainedModel") -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _enable(model: "PreTrainedModel") -> None:
    settings = {"use_reentrant": False}  # the other kind needs inputs with gradients, which a frozen base does not have
    if "activation_checkpointing_enable" in dir(model):
        model.activation_checkpointing_enable(settings)
    else:  # transformers before 5.20 has it under this name only
        model.gradient_checkpointing_enable(settings)
    if "_require_grads_hooks" in vars(model):
        # They come with it, for that other kind. Here they would make frozen blocks at the bottom keep their activations.
        model.disable_input_require_grads()
