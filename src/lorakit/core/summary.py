"""How much an adapter adds: parameters, compression, and work per token, from the formulas."""

from dataclasses import dataclass

from torch import nn

from .attach import Adapted, adapters, require
from .weight import shape_of


@dataclass(frozen=True)
class Summary:
    """Counts of one adapter on one model.

    For a matrix (d, k) and rank r: adapter parameters r(d + k), so compression d k / (r (d + k)), and forward work per token
    2 d k of the base against 2 r (d + k) of the adapter.
    """

    name: str
    trainable: int
    """Parameters that the optimizer moves."""
    adapter: int
    """Parameters of the adapter, frozen ones of its own included."""
    total: int
    """Parameters of the base model and this adapter."""
    layers: int
    """Adapted layers."""
    adapted_weights: int
    """Parameters of the base that lie in adapted layers."""
    base_flops: int
    """Forward floating-point operations per token in the base's adaptable matrices (embeddings look up: none)."""
    adapter_flops: int
    """The same for the adapter's matrices, unmerged; merged it is zero."""

    @property
    def share(self) -> float:
        """Trainable over total parameters."""
        return self.trainable / self.total

    @property
    def compression(self) -> float:
        """Weights of the adapted layers over the adapter's parameters."""
        return self.adapted_weights / max(self.adapter, 1)

    @property
    def flop_overhead(self) -> float:
        """Adapter work over base work, forward, unmerged."""
        return self.adapter_flops / max(self.base_flops, 1)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.trainable:,} trainable of {self.total:,} parameters ({self.share:.2%}) on {self.layers} layers, "
            f"{self.compression:.0f}x smaller than their weights, +{self.flop_overhead:.1%} forward work until merged"
        )


def summary(model: nn.Module, name: str = "default") -> Summary:
    """Count adapter `name` on `model`. Raises UsageError if it is not resident."""
    require(model, name)
    adapted = {path: adapter for path, _, adapter in adapters(model, name)}
    every_adapter = {id(p) for m in model.modules() if isinstance(m, Adapted) for p in m.adapters.parameters()}
    base = sum({id(p): shape_of(p).numel() for p in model.parameters() if id(p) not in every_adapter}.values())
    own = sum(p.numel() for a in adapted.values() for p in a.parameters())
    weights = base_flops = adapter_flops = 0
    for path, layer in model.named_modules():
        if ".adapters." in path or not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | Adapted):
            continue
        matrix = shape_of(layer.weight).numel() if isinstance(layer.weight, nn.Parameter) else 0
        lookup = isinstance(layer, nn.Embedding)
        base_flops += 0 if lookup else 2 * matrix
        if path in adapted:
            weights += matrix
            factors = [p for p in adapted[path].parameters() if p.dim() > 1]
            adapter_flops += sum(2 * p.numel() for p in (factors[1:] if lookup else factors))
    trainable = sum(p.numel() for a in adapted.values() for p in a.parameters() if p.requires_grad)
    return Summary(name, trainable, own, base + own, len(adapted), weights, base_flops, adapter_flops)
