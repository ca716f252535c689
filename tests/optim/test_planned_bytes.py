"""What each optimizer says its state will take is what it takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problem import Settings, advance, mixed

import lorakit as lk
from lorakit.core.attach import place, trainable, use
from lorakit.core.errors import UsageError
from lorakit.core.target import Target
from lorakit.optim import OPTIMIZERS, parameter_groups, state_bytes

CASES: dict[str, dict[str, Any]] = {
    "sgd plain": {"betas": (0.0, 0.0)},
    "lora_pro sgd": {"options": {"adam": False}},
    "galore": {"options": {"rank": 2}},
    "galore sgd": {"options": {"rank": 3, "inner": "sgd"}},
    "galore plain": {"options": {"rank": 2, "inner": "sgd"}, "betas": (0.0, 0.0)},
    "flora": {"options": {"rank": 2}},
    "flora without momentum": {"betas": (0.0, 0.999)},
}
NAMES = sorted({*OPTIMIZERS, *CASES} - {"paged_adamw"})  # that one needs a GPU


@pytest.mark.parametrize("method", ["lora", "dora", "full", "molora", "stack"])
@pytest.mark.parametrize("case", NAMES)
def test_the_state_is_as_large_as_planned(case: str, method: str) -> None:
    name, settings = case.split()[0], Settings(**CASES.get(case, {}))
    model = mixed(lk.METHODS[method]())
    try:
        optimizer = OPTIMIZERS[name](parameter_groups(model, "default", settings), settings)
    except UsageError as refusal:
        pytest.skip(str(refusal))
    advance(model, optimizer, 0, 3)  # galore looks for directions when there is a gradient: that of A comes second
    assert planned(name, mixed(lk.METHODS[method]()), settings) == state_bytes(optimizer)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_it_is_known_without_weights(name: str) -> None:
    with torch.device("meta"):
        skeleton = type(mixed())()
    place(skeleton, lk.LoRA(r=2), Target(target_modules=["one", "two"]), "default")
    trainable(use(skeleton, "default"), "default")
    model = lk.attach(type(skeleton)(), lk.LoRA(r=2), target_modules=["one", "two"])
    assert planned(name, skeleton, Settings()) == planned(name, model, Settings()) > 0


def planned(name: str, model: torch.nn.Module, settings: Settings) -> int:
    return vars(OPTIMIZERS.module(name))["planned_bytes"](parameter_groups(model, "default", settings), settings)


@pytest.mark.parametrize(("name", "factor"), [("adamw", 8), ("sgd", 4)])
def test_the_plan_counts_what_the_optimizer_says(name: str, factor: int, tiny_model: Path, rows: Any) -> None:
    from lorakit.cli.planning import make_plan
    from lorakit.train.config_file import loads

    given = {
        "model": str(tiny_model),
        "data": str(rows(6)),
        "optim": name,
        "method.r": 4,
        "method.target_modules": ["q_proj"],
    }
    plan = make_plan(loads("", [f"{key}={json.dumps(value)}" for key, value in given.items()])[0])
    counts = 4 * 2 * 3 if name == "adamw" else 0  # torch's AdamW counts the steps of each of 2 tensors in 3 blocks
    assert plan.as_dict()["memory_bytes"]["optimizer"] == factor * plan.summary.trainable + counts
