"""Transformer blocks of the Llama family, run by the fused operations of `kernels/`, in place of transformers' own forward.

A block's class is swapped in place, as `attach` does with layers: the modules, their names and their weights stay. In training

    q, k, v  = project(x; norm, W_qkv)                 saves x
    q, k     = rotate(q), rotate(k)                    saves cos, sin
    a        = the model's own attention function      saves q, k, v, and the probabilities or their sums
    x        = x + project(a; W_o)                     saves a
    g, u     = project(x; norm, W_gate, W_up)          saves x
    x        = x + project(g, u; gate, W_down)         saves g, u

and the low-rank changes of all seven layers with s h A^T, r numbers a token each. Whatever is not of this form at the moment of
the call (another kind of adapter, a hook, a cache, evaluation, torch.compile) runs transformers' forward as before.

A new family is a line in `FAMILIES`.
"""

import functools
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor, nn

from ..core.adapter import AbstractAdapter
from ..core.projection import hooked, projection
from ..kernels.choice import PLAIN, Kernels
from ..kernels.documents import Documents
from ..kernels.gated import GELU_TANH, SILU, Activation
from ..kernels.low_rank import SAME, Projection, Prologue, applies, project


@dataclass(frozen=True)
class Family:
    """What the blocks of a family add to Llama's.

    offset: the norms multiply by 1 + weight, in fp32, and call their epsilon `eps`
    sandwich: the outputs of attention and feed-forward are normed too before they are added
    qk_norm: queries and keys are normed, each head by itself
    attention: argument of the attention function -> attribute of the attention module that it is
    """

    offset: bool = False
    sandwich: bool = False
    qk_norm: bool = False
    attention: Mapping[str, str] = field(default_factory=dict)


_WINDOW = {"sliding_window": "sliding_window"}
FAMILIES: Mapping[str, Family] = {
    "LlamaDecoderLayer": Family(),
    "MistralDecoderLayer": Family(attention={"sliding_window": "config.sliding_window"}),
    "Qwen2DecoderLayer": Family(attention=_WINDOW),
    "Qwen3DecoderLayer": Family(qk_norm=True, attention=_WINDOW),
    "GemmaDecoderLayer": Family(offset=True),
    "Gemma2DecoderLayer": Family(
        offset=True, sandwich=True, attention={**_WINDOW, "softcap": "attn_logit_softcapping"}
    ),
    "Gemma3DecoderLayer": Family(offset=True, sandwich=True, qk_norm=True, attention=_WINDOW),
}
ACTIVATIONS: Mapping[str, Activation] = {"silu": SILU, "gelu_pytorch_tanh": GELU_TANH}


class Parts(NamedTuple):
    """What a block computes, as data."""

    qkv: list[Projection]
    o: list[Projection]
    gate_up: list[Projection]
    down: list[Projection]


class Shortcut(Protocol):
    """What knows the outputs of some blocks (`prefix.py`)."""

    def instead(self, block: int, x: Tensor) -> Tensor | None:
        """Give the output (B, T, n) of the block of this number for its input x, or None for it to run."""
        ...


class FastBlock(nn.Module):
    """Mixin in front of a decoder layer's class."""

    family: Family
    kernels: Kernels = PLAIN
    """What it runs on; `accelerate` may give it others of its own."""
    self_attn: Any
    mlp: Any
    compiled: Callable[..., Tensor] | None = None
    """transformers' forward of this block, compiled, for micro-batches of fixed sizes (`compiled.py`)."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        keep_rows: Tensor | None = None,
        prefix: Shortcut | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Give the block's output (B, T, n), without running it where `prefix` has it; of the last block only `keep_rows`, if given."""
        known = None if prefix is None else prefix.instead(self.self_attn.layer_idx, hidden_states)
        if known is not None:
            return known
        if self.self_attn.layer_idx + 1 < self.self_attn.config.num_hidden_layers:
            keep_rows = None
        trains = _trains(hidden_states, args, kwargs) and self.training
        if trains and self.compiled is not None and isinstance(kwargs.get("lengths"), Documents):
            out = self.compiled(hidden_states, **kwargs)
            return out if keep_rows is None else out[:, keep_rows]
        parts = self.parts() if trains else None
        if parts is not None:
            return self.fused(hidden_states, parts, keep_rows, **kwargs)
        out = super().forward(hidden_states, *args, **kwargs)
        return out if keep_rows is None else out[:, keep_rows]

    def fused(
        self,
        x: Tensor,
        parts: Parts,
        keep_rows: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the block by the fused operations."""
        a = self._attend(x, parts, position_embeddings, attention_mask, kwargs)
        if keep_rows is not None:  # keys and values of all positions have been seen; the rest is row by row
            a, x = a[:, keep_rows], x[:, keep_rows]
        x = self._added(x, [a], parts.o, SAME, "post_attention_layernorm")
        before = self._norm("pre_feedforward_layernorm" if self.family.sandwich else "post_attention_layernorm")
        gate_up = project([x], parts.gate_up, prologue=before)
        gated = self.kernels.gate(activation(self.mlp))
        return self._added(x, gate_up, parts.down, gated, "post_feedforward_layernorm")

    def _attend(
        self, x: Tensor, parts: Parts, position_embeddings: tuple[Tensor, Tensor], mask: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        attention, cos, sin = self.self_attn, *position_embeddings
        q, k, v = project([x], parts.qkv, prologue=self._norm("input_layernorm"))
        q, k, v = (y.view(*y.shape[:-1], -1, attention.head_dim) for y in (q, k, v))
        if self.family.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        own = {argument: operator.attrgetter(name)(attention) for argument, name in self.family.attention.items()}
        a, _ = _attention_function(attention)(
            attention,
            self.kernels.rotate(q, cos, sin),
            self.kernels.rotate(k, cos, sin),
            v.transpose(1, 2).contiguous(),  # or the whole of q, k, v would stay for the sake of v
            mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            **own,
            **kwargs,
        )
        return a.reshape(*x.shape[:-1], -1)

    def _added(self, x: Tensor, inputs: list[Tensor], layer: list[Projection], prologue: Prologue, norm: str) -> Tensor:
        """Give x plus the projection of the inputs, normed in between where the family does."""
        if not self.family.sandwich:
            return project(inputs, layer, prologue=prologue, residual=x)[0]
        return x + self.get_submodule(norm)(project(inputs, layer, prologue=prologue)[0])

    def _norm(self, name: str) -> Prologue:
        norm = cast(Any, self.get_submodule(name))
        if self.family.offset:
            return self.kernels.norm(1.0 + norm.weight.float(), norm.eps, wide=True)
        return self.kernels.norm(norm.weight, norm.variance_epsilon)

    def parts(self) -> Parts | None:
        """Give the seven layers as data, or None if one of them is not of that form or something wants to see it run."""
        attention, mlp = self.self_attn, self.mlp
        norms = [m for m in self.children() if m is not attention and m is not mlp]
        if any(map(hooked, (attention, mlp, *norms))) or any(p.requires_grad for m in norms for p in m.parameters()):
            return None
        groups = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
        found = [[projection(layer) for layer in group] for group in groups]
        if any(p is None for group in found for p in group):
            return None
        return Parts(*cast(list[list[Projection]], found))


def draws(module: nn.Module) -> bool:
    """Whether anything in a module is dropped at random in training."""
    return any(
        (isinstance(m, nn.Dropout) and m.p)
        or (isinstance(m, FastBlock) and m.self_attn.attention_dropout)
        or (isinstance(m, AbstractAdapter) and m.draws)
        for m in module.modules()
    )


def _trains(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one of training: no cache, nothing to be recorded, everything by name as transformers' models do."""
    return not args and kwargs.get("past_key_values") is None and not kwargs.get("output_attentions") and applies(x)


def activation(mlp: Any) -> Activation:
    """Give the activation of a fast block's feed-forward layer."""
    return ACTIVATIONS[_activation(mlp.config)]


def _activation(config: Any) -> str:
    named = vars(config)
    return named.get("hidden_activation") or named.get("hidden_act") or ""


def _attention_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = vars(sys.modules[type(attention).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get_interface(cast(Any, attention).config._attn_implementation, eager)


@functools.cache
def _fast_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fast{cls.__name__}", (FastBlock, cls), {"family": FAMILIES[cls.__name__], "__plain_class__": cls})


def swap(model: nn.Module) -> list[FastBlock]:
    """Make every block of a known family a fast one; give them all."""
    for block in model.modules():
        config = vars(block.get_submodule("mlp")).get("config") if type(block).__name__ in FAMILIES else None
        if config is not None and _activation(config) in ACTIVATIONS:
            block.__class__ = _fast_class(type(block))
    return [block for block in model.modules() if isinstance(block, FastBlock)]


def swap_back(model: nn.Module) -> None:
    """Give every fast block its own class back."""
    for block in model.modules():
        if isinstance(block, FastBlock):
            vars(block).pop("kernels", None)
            block.__class__ = vars(type(block))["__plain_class__"]
