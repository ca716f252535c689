"""A model runs on the operations that were chosen for it, and on torch's where it then does not agree with itself."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorakit as lk
from lorakit.kernels import gated, norm, rotary
from lorakit.kernels.choice import PLAIN, TORCH, Choice, Kernels, Trial, choose
from lorakit.kernels.cross_entropy import BLOCKS, WHOLE
from lorakit.models.blocks import FastBlock, swap_back
from lorakit.models.fast import Fast, accelerate, plain_head, presumed
from lorakit.models.measured import measured


def model_of(name: str = "Llama", **more: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")(**sizes, **heads, **more)
    model = lk.attach(getattr(transformers, f"{name}ForCausalLM")(config), lk.LoRA(r=3))
    for _, _, adapter in lk.adapters(model):
        for p in adapter.parameters():
            p.data += torch.randn_like(p) * 0.1
    return model.train()


def step(model: Any, fast: Fast) -> list[torch.Tensor]:
    ids = torch.arange(20)[None] % 7
    loss = fast.loss(model, {"input_ids": ids}, torch.arange(3, 19), ids[0, 4:20])
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


class Counted:
    """Torch's operations, counted."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(Kernels._fields, 0)
        self.kernels = Kernels(
            self.count("norm", norm.RMSNorm),
            self.count("gate", gated.Gated),
            self.count("rotate", rotary.rotate),
            WHOLE._replace(run=self.count("softmax", WHOLE.run)),
        )

    def count(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted


def accelerated(model: nn.Module, chosen: Choice, *, agrees: bool = True) -> Fast:
    """As `accelerate` does on a GPU, with the outcome of the trials given."""
    fast = accelerate(model)  # type: ignore[arg-type]
    blocks = [m for m in model.modules() if isinstance(m, FastBlock)]
    head = plain_head(model) if fast.head else None  # type: ignore[arg-type]
    return dataclasses.replace(fast, choice=measured(model, blocks, head, lambda: agrees, choose=lambda *_: chosen))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Gemma3", "Qwen3"])
def test_a_step_runs_on_what_was_chosen(name: str) -> None:
    model, counted = model_of(name), Counted()
    expected = step(model, accelerate(model))
    fast = accelerated(model, Choice(counted.kernels, "Triton: all 2.0x"))
    assert fast.words.endswith("loss without stored logits; Triton: all 2.0x")
    found = step(model, fast)
    # two norms, one gate and two rotations a block; the prologues are made once a pass
    assert counted.calls == {"norm": 4, "gate": 2, "rotate": 4, "softmax": 1}
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    swap_back(model)
    accelerate(model)
    assert all(m.kernels is PLAIN for m in model.modules() if isinstance(m, FastBlock))


def test_blocks_that_do_not_agree_run_on_torchs_and_the_loss_on_its_own() -> None:
    model, counted = model_of(), Counted()
    fast = accelerated(model, Choice(counted.kernels, "Triton: all 2.0x"), agrees=False)
    assert "torch in the blocks" in fast.words
    step(model, fast)
    assert counted.calls == {"norm": 0, "gate": 0, "rotate": 0, "softmax": 1}


def test_an_error_in_the_blocks_is_no_agreement() -> None:
    def broken(*_: Any) -> Any:
        raise AssertionError("no such instruction")

    model = model_of()
    accelerate(model)
    blocks = [m for m in model.modules() if isinstance(m, FastBlock)]
    assert (
        measured(model, blocks, None, broken, choose=lambda *_: Choice(Counted().kernels, "")).kernels.norm
        is PLAIN.norm
    )
    assert all(block.kernels is PLAIN for block in blocks)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Gemma3"])
@pytest.mark.parametrize("head", [True, False])
def test_trials_are_those_of_the_model(name: str, head: bool) -> None:
    """And run: of what is not the model's nothing is tried."""
    model, counted, seen = model_of(name), Counted(), list[Trial]()
    accelerate(model)
    blocks = [m for m in model.modules() if isinstance(m, FastBlock)]

    def chooses(trials: list[Trial], known: Any) -> Choice:
        seen.extend(trials)
        return choose(trials, offered=lambda: counted.kernels, timer=lambda run: 1.0)

    weight = model.get_output_embeddings().weight if head else None
    assert "Error" not in measured(model, blocks, weight, lambda: True, choose=chooses).words
    assert [trial.name for trial in seen] == ["norm", "gate", "rotate", "softmax"][: 3 + head]
    assert [t.shape[-1] for trial in seen for t in trial.make()[:1]] == [32, 48, 8, 64][: 3 + head]
    assert seen[1].make()[0].shape == (2048, 48) and seen[2].make()[0].shape == (1, 2048, 4, 8)


def test_a_model_without_known_blocks_has_a_loss_to_choose() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model, seen = transformers.GPT2LMHeadModel(config), list[Trial]()
    measured(model, [], model.lm_head.weight, lambda: True, choose=lambda trials, _: seen.extend(trials) or TORCH)
    assert [trial.name for trial in seen] == ["softmax"]


def test_on_a_processor_nothing_is_chosen_and_triton_not_imported() -> None:
    fast = accelerate(model_of())
    assert fast.choice is TORCH and "Triton" not in fast.words
    code = "import sys, lorakit.models.fast, lorakit.models.measured\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lorakit.kernels.choice" in done.stdout.split() and "lorakit.kernels.triton_ops" not in done.stdout.split()


def test_memory_is_foretold_for_the_loss_of_the_device() -> None:
    with torch.device("meta"):
        model = model_of()
    assert presumed(model).choice.kernels.softmax is BLOCKS
    assert presumed(model, torch.device("cpu")).choice.kernels.softmax is BLOCKS
    assert presumed(model, torch.device("cuda")).choice.kernels.softmax is WHOLE


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_the_ordinary_step() -> None:
    pytest.importorskip("triton", exc_type=ImportError)
    model = model_of().to("cuda")
    fast = accelerate(model)
    assert (fast.blocks, fast.head) == (2, True) and "Triton" in fast.words
    own = dataclasses.replace(fast, choice=TORCH)
    inputs, rows = {"input_ids": (torch.arange(20) % 7)[None].cuda()}, torch.arange(3, 19).cuda()
    found = fast.loss(model, inputs, rows, inputs["input_ids"][0, 4:20])
    for m in model.modules():
        if isinstance(m, FastBlock):
            m.kernels = PLAIN
    assert torch.allclose(found, own.loss(model, inputs, rows, inputs["input_ids"][0, 4:20]), rtol=1e-4)
