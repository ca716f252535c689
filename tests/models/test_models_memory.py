"""The estimate against closed forms, against the same step with data, and against a process that trains."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lorakit.core.attach import attach, place, trainable, use
from lorakit.core.target import Target
from lorakit.methods.lora import LoRA
from lorakit.models import anatomy, enable_packing, estimate, load, skeleton
from lorakit.models.fast import ORDINARY, accelerate
from lorakit.models.ledger import Ledger, heap_factor
from lorakit.models.memory import resident_bytes


def adapted(model, r=4, **target):
    place(model, LoRA(r=r), Target(**target), "default")
    use(model, "default")
    return trainable(model, "default")


def no_dropout(model):
    """With dropout SDPA has no fused kernel on a processor: other memory, other operations."""
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0


def test_the_ledger_counts_what_autograd_keeps():
    """y = relu(x W^T) needs x (given) and relu's output for the backward pass; the product is gone after relu."""
    layer, x = nn.Linear(64, 256, bias=False), torch.randn(32, 64)
    ledger = Ledger(layer, 1.0)
    with ledger:
        y = layer(x).relu()
        assert ledger.live == 32 * 256 * 4
        assert ledger.peak == 2 * 32 * 256 * 4
        loss = y.sum()
        del y
        assert ledger.live == 32 * 256 * 4 + 4
        loss.backward()
        del loss
    assert ledger.live == layer.weight.nbytes  # its gradient
    layer.weight.grad = None
    assert ledger.live == 0


def test_blocks_of_the_heap_cost_more_than_mapped_ones():
    ledger = Ledger(nn.Identity(), 2.0)
    with ledger:
        small, large = torch.empty(1 << 20), torch.empty(9 << 20)
    assert ledger.held == 2 * small.nbytes + large.nbytes and ledger.live == small.nbytes + large.nbytes


def test_a_fixed_threshold_gives_blocks_back(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    assert heap_factor() == 1.45
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    assert heap_factor() == 1.0


def test_a_skeleton_is_the_model_without_memory(tiny_model, tiny_encoder):
    before = resident_bytes()
    for path, options in ((tiny_model, {}), (tiny_encoder, {"task": "classification", "labels": ["a", "b"]})):
        real, bare = load(path, device="cpu", **options).model, skeleton(path, device="cpu", **options)
        assert {name: (w.shape, w.dtype) for name, w in bare.named_parameters()} == {
            name: (w.shape, w.dtype) for name, w in real.named_parameters()
        }
        assert all(weight.is_meta for weight in bare.parameters())
        parts = anatomy(bare, path)
        assert parts.total == sum(weight.numel() for weight in real.parameters())
        assert parts.layers == real.config.num_hidden_layers
        assert parts.embedding == sum(m.weight.numel() for m in real.modules() if isinstance(m, nn.Embedding))
        for matrix in parts.matrices:
            found = [m for n, m in real.named_modules() if n.endswith(matrix.name) and isinstance(m, nn.Linear)]
            assert sum(tuple(m.weight.shape) == matrix.shape for m in found) == matrix.count
    assert resident_bytes() - before < 100 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_without_data_is_as_with_data(tiny_model, packed, dtype):
    """The same training step on real tensors, with its own attention, allocates the same."""
    rows, length, trained = 3, 40, 50
    bare = adapted(skeleton(tiny_model, dtype=dtype), layers=[1, 2])
    real = attach(load(tiny_model, dtype=dtype, device="cpu").model, LoRA(r=4), layers=[1, 2])
    no_dropout(bare)
    no_dropout(real)
    found = estimate(bare, rows=rows, length=length, trained_tokens=trained, packed=packed)
    assert not packed or enable_packing(real)
    fast = accelerate(real) if packed else ORDINARY
    kept = torch.arange(trained)
    ledger, real = Ledger(real, 1.0), real.train()
    after_body = []
    real.base_model.register_forward_hook(lambda *_: after_body.append(ledger.live))
    with ledger:
        if packed:
            ids, positions = torch.zeros(1, rows * length, dtype=torch.long), torch.arange(length).repeat(rows)[None]
            inputs = {"input_ids": ids, "position_ids": positions}
            loss = fast.loss(real, inputs, kept, kept, lengths=[length] * rows)
        else:
            ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
            mask[0, -1] = 0  # one place of padding, as padded batches have
            logits = real(ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)[kept]
            loss = nn.functional.cross_entropy(logits.float(), kept, reduction="sum")
            del logits
        loss.backward()
    near = {"rel": 0.02 if packed else 0.08}  # a padded batch also has masks
    assert found.activations == pytest.approx(after_body[0], **near)
    assert found.activations + found.logits + found.temporary + found.gradients == pytest.approx(ledger.peak, **near)


def test_what_the_figures_must_obey(tiny_model):
    def need(checkpointing=False, r=4, rows=4, length=64, trained=None, **target):
        model = adapted(skeleton(tiny_model, dtype="float32"), r=r, **target)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return estimate(model, rows=rows, length=length, trained_tokens=trained, packed=True, runtime=0)

    every, last = need(), need(last_n_layers=1)
    frozen = sum(weight.nbytes for weight in skeleton(tiny_model, dtype="float32").parameters())
    assert frozen <= every.weights < frozen + 1000  # and small buffers
    assert every.adapter == every.gradients == every.optimizer / 2 == 3 * last.adapter
    assert last.activations < every.activations / 2  # what lies below the lowest adapter is not kept
    assert last.flops_forward < every.flops_forward and last.flops_backward < every.flops_backward / 1.5
    assert need(rows=8).activations == pytest.approx(2 * every.activations, rel=0.05)
    assert every.logits == 0  # they are never kept
    assert need(trained=16).activations < every.activations  # of the last block only the rows that are needed
    assert need(r=8).adapter == 2 * every.adapter


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointing_trades_memory_for_another_forward_pass(tiny_model):
    plain, checkpointed = (adapted(skeleton(tiny_model, dtype="float32")) for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before, after = (estimate(model, rows=4, length=64, runtime=0) for model in (plain, checkpointed))
    assert after.activations < before.activations / 2 and after.total < before.total
    body = before.flops_forward - 4 * 256 * plain.config.hidden_size * plain.config.vocab_size
    assert after.flops_backward - before.flops_backward == pytest.approx(body, rel=0.1)


def test_operations_by_the_formula(tiny_model):
    """Forward: 2 per weight and token, LoRA 2 r (in + out), attention 4 T^2 H D; the last block after its keys and values, and
    the head, for the trained tokens only.

    Backward: the same again for the inputs' gradients, but for q, k, v of the first layer, whose input needs none; LoRA's own
    gradients as much as its forward pass; attention twice its forward pass; the frozen weights nothing. The head's gradient is
    computed on the way forward, while its probabilities are there.
    """
    model = skeleton(tiny_model, dtype="float32")
    no_dropout(model)
    rows, length, trained, r = 2, 64, 30, 4
    config, last = model.config, f".layers.{model.config.num_hidden_layers - 1}."
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    short = {n for n in linear if last in n and (".mlp." in n or "o_proj" in n)}
    tokens = {n: trained if n in short else rows * length for n in linear}
    first = {n for n in linear if ".layers.0.self_attn." in n and "o_proj" not in n}
    base = {n: 2 * tokens[n] * m.weight.numel() for n, m in linear.items()}
    lora = sum(2 * tokens[n] * r * (m.in_features + m.out_features) for n, m in linear.items())
    head = 2 * trained * model.lm_head.weight.numel()
    attention = rows * 4 * length**2 * config.hidden_size * config.num_hidden_layers
    unneeded = sum(base[n] + 2 * tokens[n] * r * linear[n].in_features for n in first)
    found = estimate(adapted(model, r=r), rows=rows, length=length, trained_tokens=trained, accumulate=3)
    forward = sum(base.values()) + lora + 2 * head + attention
    assert found.flops_forward == pytest.approx(3 * forward, rel=1e-3)  # and positions
    backward = sum(base.values()) + 2 * lora - unneeded + 2 * attention
    assert found.flops_backward == pytest.approx(3 * backward, rel=1e-3)


TRAIN = """
import json, sys
import lorakit.train.run
import torch
from lorakit.core.attach import attach, place, trainable, use
from lorakit.core.target import Target
from lorakit.methods.lora import LoRA
from lorakit.models import enable_packing, estimate, load, resolve, skeleton
from lorakit.models.fast import accelerate
case = json.loads(sys.argv[1])
options = {"task": case["task"], "dtype": case["dtype"]}
if case["task"] == "classification":
    options["labels"] = ["a", "b", "c"]
measure = sys.argv[2] == "measure"
model = load(case["model"], device="cpu", **options).model if measure else skeleton(resolve(case["model"]), **options)
saved = ["classifier"] if case["task"] == "classification" else None
target = {"last_n_layers": case["last"], "modules_to_save": saved}
if measure:
    attach(model, LoRA(r=8), **target)
else:
    place(model, LoRA(r=8), Target(**target), "default")
    use(model, "default")
    trainable(model, "default")
rows, length, trained = case["rows"], case["length"], case["trained"]
if not measure:
    print(estimate(model, rows=rows, length=length, trained_tokens=trained).total)
    sys.exit()
if case["task"] == "causal":
    assert enable_packing(model)
    fast = accelerate(model)
adapter = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(adapter, fused=True)
model.train()
def loss():
    if case["task"] == "classification":
        logits = model(torch.randint(200, 20000, (rows, length))).logits
        return torch.nn.functional.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))
    positions = torch.arange(length).repeat(rows)[None]
    inputs = {"input_ids": torch.randint(200, 20000, (1, rows * length)), "position_ids": positions}
    targets = torch.zeros(trained, dtype=torch.long)
    return fast.loss(model, inputs, torch.arange(trained), targets, lengths=[length] * rows)
for _ in range(4):
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
SMALL = {
    "model": "minilm",
    "task": "classification",
    "dtype": "float32",
    "last": None,
    "rows": 16,
    "length": 64,
    "trained": 16,
}
CHAT = {"model": "smollm2", "task": "causal", "dtype": "bfloat16", "last": 12, "rows": 8, "length": 49, "trained": 240}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "case", [pytest.param(SMALL, id="minilm"), pytest.param(CHAT, id="smollm2", marks=pytest.mark.slow)]
)
def test_a_process_that_trains_takes_what_was_said(case, built_in):
    built_in(case["model"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def result(what):
        command = [sys.executable, "-c", TRAIN, json.dumps(case), what]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return int(ran.stdout)

    assert result("estimate") == pytest.approx(result("measure"), rel=0.15)
