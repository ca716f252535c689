"""One layer adapted here and by PEFT, with the same tensors: same outputs, same gradients."""

import copy

import peft
import torch
from torch import Tensor, nn

import lorakit as lk


class Twins:
    """A layer with an adapter of ours and a copy of it with PEFT's, whose random parameters ours has taken over."""

    def __init__(self, layer: nn.Module, method: lk.Method, config: peft.PeftConfig, by: float = 0.3) -> None:
        self.base = nn.Sequential(layer).eval()
        theirs = copy.deepcopy(self.base)
        config.target_modules = {"0"}
        single = layer.weight.dtype == torch.float32
        self.theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=single).eval()
        self.ours = lk.attach(copy.deepcopy(self.base), method, target_modules=["0"])
        ((_, _, self.adapter),) = lk.adapters(self.ours)
        torch.manual_seed(3)
        named = dict(self.theirs.named_parameters())
        self.pairs = {}
        for own, spelled in type(method).PEFT.tensors.items():
            head, _, tail = spelled.partition(".")
            parameter = named[".".join(filter(None, ["base_model.model.0", head, "default", tail]))]
            with torch.no_grad():
                parameter.add_(by * torch.randn_like(parameter))
                self.adapter.get_parameter(own).copy_(parameter.reshape(self.adapter.get_parameter(own).shape))
            self.pairs[own] = (self.adapter.get_parameter(own), parameter)

    def agree(self, x: Tensor, tolerance: float) -> None:
        """Compare outputs, and the gradients by parameters and input, relative to the largest entry of each."""
        a, b = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
        ours, theirs = self.ours(a), self.theirs(b)
        assert not torch.allclose(ours, self.base(x), atol=1e-3)
        weights = torch.randn_like(ours)
        (ours * weights).sum().backward()
        (theirs * weights).sum().backward()
        found = {"output": (ours, theirs), **{n: (p.grad, q.grad.reshape(p.shape)) for n, (p, q) in self.pairs.items()}}
        if a.grad is not None:
            found["input"] = (a.grad, b.grad)
        for name, (own, their) in found.items():
            off = float(((own - their).abs().max() / their.abs().max()).detach())
            assert off <= tolerance, f"{name} is off by {off:.1e}"
