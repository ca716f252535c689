"""The fast way through a model in training, proved on the model at hand before it is used.

Two parts, each of which can be missing: blocks of a known family run by fused operations (`blocks.py`), and the loss taken from
the last hidden state and the frozen head without storing logits (`kernels/cross_entropy.py`). A model of which neither is known
runs the ordinary way; `Fast.words` says which way it is.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..core.projection import projection
from ..kernels import cross_entropy
from ..kernels.choice import PLAIN, TORCH, Choice
from ..kernels.low_rank import plain
from .blocks import FastBlock, draws, swap, swap_back
from .measured import measured
from .modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 16  # tokens
# transformers norms in fp32 also where the model is fp64
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Fast:
    """What of a model runs the fast way. blocks: how many, of how many; head: whether the loss does without logits."""

    blocks: int
    of: int
    head: bool
    rows: bool
    """Whether the last block can be told which positions are needed."""
    separable: bool = False
    """Whether several threads can each train rows of their own at once: nothing remembers a pass or draws random numbers."""
    choice: Choice = TORCH
    """What the operations are; anything but torch's only on a GPU."""

    @property
    def words(self) -> str:
        """Say it."""
        if not self.blocks and not self.head:
            return "the model runs the ordinary way: neither its blocks nor its head are of a known form"
        blocks = f"{self.blocks} of {self.of} blocks fused" if self.blocks else "blocks run the ordinary way"
        head = "loss without stored logits" if self.head else "logits as the model gives them"
        return "; ".join(filter(None, (f"{blocks}, {head}", self.choice.words)))

    def loss(
        self, model: "PreTrainedModel", inputs: dict[str, Tensor], rows: Tensor, targets: Tensor, **how: Any
    ) -> Tensor:
        """Give the summed cross entropy of the positions `rows` of one row of tokens (1, T), for the model's next-token head."""
        return self.row_losses(model, inputs, rows, targets, **how).sum()

    def row_losses(
        self, model: "PreTrainedModel", inputs: dict[str, Tensor], rows: Tensor, targets: Tensor, **how: Any
    ) -> Tensor:
        """Give the cross entropy of each of these positions (n,), in fp32 at least."""
        if not self.head or (head := plain_head(model)) is None:
            logits = model(**inputs, **how, logits_to_keep=rows, use_cache=False).logits[0]
            return surprise(logits, targets)
        kept = {"keep_rows": rows} if self.rows and model.training else {}
        hidden = cast(Any, model).base_model(**inputs, **how, **kept, use_cache=False).last_hidden_state[0]
        hidden = hidden if kept else hidden[rows]
        return cross_entropy.row_losses(hidden, head, targets, self.choice.kernels.softmax)


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the cross entropy of each row (n,), in fp32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(wide), targets, reduction="none")


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the summed cross entropy, in fp32 at least."""
    return surprise(logits, targets).sum()


ORDINARY = Fast(0, 0, head=False, rows=False)


def plain_head(model: "PreTrainedModel") -> Tensor | None:
    """Give the weight (vocabulary, n) of the model's head, if it is a frozen matrix and nothing else."""
    head = cast(nn.Module | None, model.get_output_embeddings())
    found = projection(head) if head is not None else None
    return None if found is None or found.change is not None or found.bias is not None else found.matrix()


def accelerate(model: "PreTrainedModel", known: Collection[str] | None = None) -> Fast:
    """Let `model` train the fast way as far as it is known, and prove on 16 tokens that nothing changes by it.

    Compared are logits and the gradient of the embedded tokens. What does not agree is undone. On a GPU the operations are
    chosen by trial (`measured.py`), or they are those `known` from before.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = swap(model)
    try:
        model.requires_grad_(False)  # as it will be, before anything is attached
        if blocks and not _agree(model, blocks):
            swap_back(model)
            blocks = []
        head, choice = _head_agrees(model), TORCH
        if model.device.type == "cuda" and (blocks or head):
            choice = measured(model, blocks, plain_head(model) if head else None, lambda: _agree(model, blocks), known)
    finally:
        for p in trained:
            p.requires_grad = True
    return _found(model, blocks, head, choice)


def presumed(model: "PreTrainedModel", device: torch.device | None = None) -> Fast:
    """Give what `accelerate` would, for a model without data (`skeleton`), where nothing can be proved or measured.

    `device` is where it would run: the loss takes the logits in other pieces on a GPU.
    """
    blocks, config = swap(model), cast(Any, model.config.get_text_config())
    capped = "final_logit_softcapping" in config.to_dict() and config.final_logit_softcapping is not None
    choice = Choice(PLAIN._replace(softmax=cross_entropy.usual(device or model.device)))
    return _found(model, blocks, bool(blocks) and not capped and plain_head(model) is not None, choice)


def _found(model: "PreTrainedModel", blocks: list[FastBlock], head: bool, choice: Choice) -> Fast:
    layers = cast(Any, model.config.get_text_config()).num_hidden_layers
    fused = sum(block.parts() is not None for block in blocks)  # none with an adapter of another form, or in 8 bits
    separable = head and fused == layers and not draws(model) and model.device.type in ("cpu", "meta")
    return Fast(fused, layers, head, head and len(blocks) == layers, separable, choice)


def probe_tokens(model: "PreTrainedModel") -> Tensor:
    """Give the tokens (1, 16) on which a model is tried out."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    ids = torch.randint(embedding.num_embeddings, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def _run(model: "PreTrainedModel") -> tuple[Tensor, Tensor]:
    """Give the logits and the gradient of the embedded tokens of the sum of their squares."""
    with torch.no_grad():
        embedded = cast(Any, model.get_input_embeddings())(probe_tokens(model))
    embedded.requires_grad_()
    with torch.enable_grad():
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.float().square().mean(), embedded)
    return logits.detach(), gradient


def _agree(model: "PreTrainedModel", blocks: list[FastBlock]) -> bool:
    try:
        with evaluating(model):
            with plain():
                expected = _run(model)
            for block in blocks:
                block.training = True  # the block alone: nothing in it is dropped
            try:
                found = _run(model)
            finally:
                for block in blocks:
                    block.training = False
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False  # another version of transformers calls its blocks in another way
    return all(map(_close, found, expected))


@torch.no_grad()
def _head_agrees(model: "PreTrainedModel") -> bool:
    head, ids = plain_head(model), probe_tokens(model)
    if head is None:
        return False
    try:
        with evaluating(model):
            hidden = cast(Any, model).base_model(ids, use_cache=False).last_hidden_state
            logits = model(ids, use_cache=False).logits
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    return hidden.shape[-1] == head.shape[1] and _close(nn.functional.linear(hidden, head), logits)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= _TOLERANCE[b.dtype] * b.abs().max())
