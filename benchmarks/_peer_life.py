"""Arms around training: attaching, loading and switching adapters, many adapters in one batch, memory kept for backward.

Each arm is one process's work and gives samples in seconds (or bytes) by name.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Samples = dict[str, Any]


@contextmanager
def clocked(into: list[float]) -> Iterator[None]:
    """Append the processor seconds of the block."""
    began = time.process_time()
    yield
    into.append(time.process_time() - began)


def many_layers(count: int) -> Any:
    """Give `count` linear layers as a mixture of experts has them: three in each of many small modules."""
    import torch
    from torch import nn

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32, bias=False) for _ in range(3))

    class Block(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(experts))

    torch.manual_seed(0)
    blocks = 32 if count >= 96 else 1
    return nn.ModuleDict({"layers": nn.ModuleList(Block(round(count / blocks / 3)) for _ in range(blocks))})


PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


def attach_ours(job: dict[str, Any], scratch: Path) -> Samples:
    """`lk.attach`, twice."""
    import lorakit as lk

    model, first, second = many_layers(job["layers"]), list[float](), list[float]()
    with clocked(first):
        lk.attach(model, lk.LoRA(r=8), target_modules=PROJECTIONS, name="first")
    with clocked(second):
        lk.attach(model, lk.LoRA(r=8), target_modules=PROJECTIONS, name="second")
    return {"first": first, "second": second, "layers": sum(1 for _ in lk.adapters(model, "second"))}


def attach_peft(job: dict[str, Any], scratch: Path) -> Samples:
    """`get_peft_model`, then `add_adapter`."""
    from peft import LoraConfig, get_peft_model

    model, first, second = many_layers(job["layers"]), list[float](), list[float]()
    with clocked(first):
        wrapped: Any = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS), adapter_name="first")
    with clocked(second):
        wrapped.add_adapter("second", LoraConfig(r=8, target_modules=PROJECTIONS))
    layers = sum(name.endswith("lora_A.second") for name, _ in wrapped.named_modules())
    return {"first": first, "second": second, "layers": layers}


def saved_adapter(model: str, rank: int, directory: Path) -> int:
    """Write an adapter on all linear layers of a model, as a PEFT directory; gives its bytes."""
    import lorakit as lk
    from lorakit.models import load

    loaded = load(model, dtype="bfloat16")
    lk.attach(loaded.model, lk.LoRA(r=rank))
    lk.save(loaded.model, directory)
    return (directory / "adapter_model.safetensors").stat().st_size


def load_ours(job: dict[str, Any], scratch: Path) -> Samples:
    """`lk.load` into a model in memory, several times, then `lk.use` back and forth."""
    import lorakit as lk
    from lorakit.models import load

    model, loads, switches = load(job["work"]["model"], dtype="bfloat16").model, list[float](), list[float]()
    for number in range(job["adapters"]):
        with clocked(loads):
            lk.load(model, job["adapter"], name=f"a{number}")
    for turn in range(20):
        with clocked(switches):
            lk.use(model, f"a{turn % 2}")
    return {"load": loads, "switch": switches}


def load_peft(job: dict[str, Any], scratch: Path) -> Samples:
    """`PeftModel.from_pretrained` (the first, not timed: it also wraps the model), `load_adapter`, `set_adapter`."""
    from peft import PeftModel

    from lorakit.train.bench import peft
    from lorakit.train.bench.work import Work

    base, _ = peft.load(Work(**job["work"]))
    model: Any = PeftModel.from_pretrained(base, job["adapter"], adapter_name="first")
    loads, switches = list[float](), list[float]()
    for number in range(job["adapters"]):
        with clocked(loads):
            model.load_adapter(job["adapter"], adapter_name=f"a{number}")
    for turn in range(20):
        with clocked(switches):
            model.set_adapter(f"a{turn % 2}", inference_mode=True)
    return {"load": loads, "switch": switches}


def small_llama() -> Any:
    """Give a Llama with the layers of SmolLM2-135M, but 8 of its 30 blocks, and a vocabulary of 1024."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def wrapped_with(count: int) -> Any:
    """Give that model with `count` PEFT adapters, "a0" and so on, each with a B of its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model: Any = get_peft_model(small_llama(), lora, adapter_name="a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def mixed_peft(job: dict[str, Any], scratch: Path) -> Samples:
    """A batch whose rows each have their own adapter (`adapter_names`), and the same batch with one for all."""
    import torch

    count, rows = job["adapters"], job["adapters"]
    model = wrapped_with(count).eval()
    ids = torch.randint(1024, (rows, job["length"]), generator=torch.Generator().manual_seed(0))
    names = [f"a{i % count}" for i in range(rows)]
    mixed, one = list[float](), list[float]()
    with torch.no_grad():
        for _ in range(job["repeats"] + 1):
            with clocked(mixed):
                model(ids, adapter_names=names, use_cache=False)
            with clocked(one):
                model(ids, use_cache=False)
    return {"mixed": mixed[1:], "one": one[1:]}


def together_peft(job: dict[str, Any], scratch: Path) -> Samples:
    """A step of each of several adapters, one after the other: PEFT trains one at a time."""
    import torch

    model = wrapped_with(job["adapters"]).train()
    ids = torch.randint(1024, (job["adapters"], 2, 64), generator=torch.Generator().manual_seed(0))
    steps, optimizers = list[float](), dict[str, Any]()
    for _ in range(job["repeats"] + 1):
        with clocked(steps):
            for number in range(job["adapters"]):
                name = f"a{number}"
                model.set_adapter(name)
                own = [p for key, p in model.named_parameters() if f".{name}." in key]
                optimizer = optimizers.setdefault(name, torch.optim.AdamW(own, lr=1e-4, fused=True))
                model(ids[number], labels=ids[number], use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return {"step": steps[1:]}


def adapted_with(count: int) -> Any:
    """Give that model with `count` adapters of ours, "a0" and so on, each with a B of its own."""
    import torch

    import lorakit as lk

    model = small_llama()
    for number in range(count):
        lk.attach(model, lk.LoRA(r=8, alpha=16), name=f"a{number}")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def mixed_ours(job: dict[str, Any], scratch: Path) -> Samples:
    """A bank (`lk.bank`) whose rows are routed each to its own adapter, and the same batch with one adapter, without a bank."""
    import torch

    import lorakit as lk

    count, rows = job["adapters"], job["adapters"]
    model = adapted_with(count).eval()
    ids = torch.randint(1024, (rows, job["length"]), generator=torch.Generator().manual_seed(0))
    bank = lk.bank(model, lk.names(model))
    mixed, one = list[float](), list[float]()
    with torch.no_grad():
        for _ in range(job["repeats"] + 1):
            lk.use(model, "bank")
            with clocked(mixed):
                bank.route([f"a{i % count}" for i in range(rows)])
                model(ids, use_cache=False)
            lk.use(model, "a0")
            with clocked(one):
                model(ids, use_cache=False)
    return {"mixed": mixed[1:], "one": one[1:]}


def together_ours(job: dict[str, Any], scratch: Path) -> Samples:
    """A step of several adapters at once: one pass for all, an optimizer for each, as `lk.train_many` does it."""
    import torch

    import lorakit as lk
    from lorakit.core.together import NAME, Part, together
    from lorakit.data.dataset import Example
    from lorakit.models.fast import accelerate
    from lorakit.models.packing import enable_packing
    from lorakit.train.task import LanguageModelling, predicted

    model = adapted_with(job["adapters"])
    assert enable_packing(model)
    task = LanguageModelling(1024, 0, packed=True, fast=accelerate(model))
    ids = torch.randint(1024, (job["adapters"], 2, 64), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [[Example(row, row, None, "") for row in rows] for rows in ids]
    optimizers = []
    for name in lk.names(model):
        own = [p for _, _, adapter in lk.adapters(model, name) for p in adapter.parameters()]
        optimizers.append(torch.optim.AdamW([p.requires_grad_() for p in own], lr=1e-4, fused=True))
    weights = [predicted(rows) for rows in groups]
    parts = [Part(n, 128, w, 0) for n, w in zip(lk.names(model), weights, strict=True)]
    steps = list[float]()
    model.train()
    with together(model, lk.names(model)) as current:
        for _ in range(job["repeats"] + 1):
            with clocked(steps):
                current.begin(parts, model.device)
                losses = task.losses(lk.use(model, NAME), groups)
                sum(loss / weight for loss, weight in zip(losses, weights, strict=True)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    return {"step": steps[1:]}


LIFE: dict[str, Callable[[dict[str, Any], Path], Samples]] = {
    "attach lorakit": attach_ours,
    "attach PEFT": attach_peft,
    "load lorakit": load_ours,
    "load PEFT": load_peft,
    "mixed lorakit": mixed_ours,
    "mixed PEFT": mixed_peft,
    "together lorakit": together_ours,
    "together PEFT": together_peft,
}
