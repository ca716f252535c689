"""Arms that train on the same tokens: each is one process's work, and gives what `lorakit.train.bench` measures."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.train.bench import peft
from lorakit.train.bench.clock import Arm, Build
from lorakit.train.bench.work import Work


def loralib(work: Work, scratch: Path) -> Arm:
    """microsoft/LoRA: every linear layer but the head replaced by `loralib.Linear`, factors in the base's dtype."""
    import loralib as lora
    from torch import nn

    model, config = peft.load(work)
    head = model.get_output_embeddings()
    for path, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and old is not head:
            size = (old.in_features, old.out_features)
            new = lora.Linear(*size, r=work.rank, lora_alpha=work.alpha, merge_weights=False, bias=old.bias is not None)
            new.weight = old.weight
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.to(old.weight.dtype))
    lora.mark_only_lora_as_trainable(model)
    factors = {
        "/".join(name.rsplit(".", 1)): parameter for name, parameter in model.named_parameters() if "lora_" in name
    }
    return peft.plain_loop(model.train(), work, config.vocab_size, factors)


def compiled(work: Work, scratch: Path) -> Arm:
    """PEFT with each block compiled: inductor compiles one and uses it 30 times; the whole model takes many minutes."""
    model, vocabulary = peft.wrap(work)
    for block in model.get_base_model().model.layers:
        block.compile()
    return peft.plain_loop(model, work, vocabulary, peft.factors(model))


BUILDS: dict[str, Build] = {
    "PEFT, factors in the base's dtype": partial(peft.build, autocast=False),
    "PEFT, blocks compiled": compiled,
    "loralib": loralib,
}


def step_arm(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Give what does a job of an arm: one of lorakit's own two, or one of those above."""
    from lorakit.train.bench import worker

    own = {"lorakit": "ours", "PEFT": "peft"}
    if name in own:
        return lambda job: worker.run({**job, "arm": own[name]})
    return lambda job: worker.run(job, BUILDS[name])
