"""What an optimizer thinks of a method, found out before there is a model: on one layer without data."""

import torch
from torch import nn

from ..core.adapter import Method
from ..core.attach import place, trainable, use
from ..core.errors import UsageError
from ..core.registry import INITS, Registry
from ..core.stack import parts_of
from ..core.target import Target
from .groups import OptimSettings, parameter_groups

SIZE = 1024


def refusal(optimizers: Registry, name: str, settings: OptimSettings, method: Method) -> str | None:
    """Give the reason why no layer of this method can be trained by the optimizer `name`; None if some may be.

    Only optimizers are asked whose file says `BY_METHOD = True`: what they refuse does not depend on the sizes of layers.
    """
    declared = vars(optimizers.module(name))
    if not declared.get("BY_METHOD", False):
        return None
    for init in (vars(part)["init"] for part in parts_of(method) if "init" in vars(part)):
        if "FREEZES" in declared and vars(INITS.module(init)).get("ZERO") == declared["FREEZES"]:
            return f"init {init} starts {declared['FREEZES']} at zero, and {name} leaves it there"
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(SIZE, SIZE))
        try:
            place(model, method, Target(target_modules=["0"]), "probe")
        except UsageError:  # the layers of the model may be others; those that are refused say so themselves
            return None
    groups = parameter_groups(trainable(use(model, "probe"), "probe"), "probe", settings)
    try:
        optimizers[name](groups, settings)
    except UsageError as error:
        reason = "; ".join(part for part in (error.what.removeprefix("optim.name: "), error.why) if part)
        return reason.replace("0.adapters.probe.", "").replace("0.adapters.probe", "each layer")
    return None
