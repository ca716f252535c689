"""Bytes that autograd keeps for the backward pass of one block with the proportions of Llama-3-8B.

Each arm trains two models as it trains any, of two blocks and of one; the difference is a block with gradients flowing
through it, without embedding and loss. Every storage counts once; what was there before the step does not count. Unit: one
hidden activation in bfloat16, tokens x 4096 x 2 bytes. The adapter's own share is what is above the frozen base.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

HIDDEN, INNER, HEADS, GROUPS, VOCABULARY = 4096, 14336, 32, 8, 256


def make_model(directory: Path, layers: int) -> None:
    """Write a model of so many blocks, with a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    words = Tokenizer(WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token=chr(0)))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=chr(0), bos_token=chr(0), eos_token=chr(1), pad_token=chr(1)
    ).save_pretrained(directory)


def saved(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Give what one block of an arm keeps, in units, and the loss of its two-block model."""
    from lorakit.train.bench.work import Work

    work, units, loss = Work(**job["work"]), {}, 0.0
    for layers in (1, 2):
        place = scratch / str(layers)
        place.mkdir()
        size, loss = kept(job["arm"], replace(work, model=f"{work.model}/{layers}"), place)
        units[layers] = size / (work.tokens * HIDDEN * 2)
    return {"units": [units[2] - units[1]], "loss": loss}


def kept(name: str, work: Any, scratch: Path) -> tuple[int, float]:
    """Take two steps of an arm; give the bytes that the second one's forward pass kept, and its loss."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from lorakit.train.bench import ours, peft
    from lorakit.train.bench.work import set_start

    torch.set_num_threads(work.threads)
    arm = {"lorakit": ours.build, "PEFT": peft.build, "base": frozen}[name.removeprefix("saved ")](work, scratch)
    set_start(arm.factors)
    arm.step()  # what an arm makes once and keeps is not part of a step
    own = {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            found[address] = tensor.detach()  # holds the storage, so that its address is not given to another
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = arm.step()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()), loss


def live_tensors() -> list[Any]:
    """Give every tensor alive in this process: weights in whatever form an arm keeps them."""
    import gc

    import torch
    from torch._subclasses.fake_tensor import FakeTensor  # what planning leaves behind: no memory of its own

    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor)
    ]


def frozen(work: Any, scratch: Path) -> Any:
    """The base alone: nothing of it is trained, but gradients flow through it from the embedding's output on."""
    import torch

    from lorakit.train.bench import peft
    from lorakit.train.bench.clock import Arm

    model, config = peft.load(work)
    model.requires_grad_(False).train()
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    rows = work.rows(config.vocab_size)
    inputs, labels = torch.tensor(rows), torch.tensor(work.labelled(rows))

    def step() -> tuple[float, float]:
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item(), 0.0

    return Arm(step, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), {})
