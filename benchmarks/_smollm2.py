"""What `methods_smollm2.py` does in processes of its own: `train` one arm, and `check` in a fresh one what it left.

Rights and wrongs are counted by teacher forcing: a greedy answer is exactly right if and only if at each of its places the
right token is the likeliest one after the right tokens before it, so one forward pass over all questions says how many are.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import peak_memory


def configuration(job: Mapping[str, Any], output: Path) -> Any:
    """Give the run of a job."""
    import lorakit as lk
    from lorakit.core.start import needs
    from lorakit.core.target import Target
    from lorakit.train import config as c

    arm, s, data = job["arm"], job["settings"], Path(job["data"])
    method = lk.METHODS[arm["method"]](**arm["options"])
    own = {"target_modules": arm["target"]} if arm["target"] else {}
    mixes = "experts" in needs(method)  # then it adapts the layers that its experts adapt
    if mixes:
        method = replace(method, adapters=tuple(map(str, sorted(output.parent.glob("expert-*/adapter")))))
    target = Target() if mixes else Target(last_n_layers=s["last_n_layers"], **own)
    questions = [row["messages"][0]["content"] for row in read_rows(data / "valid.jsonl")]
    return c.RunConfig(
        model=c.ModelConfig(name=job["model"], dtype=job["dtype"], quantize=arm["quantize"]),
        data=c.DataConfig(path=str(data / "train.jsonl"), valid=str(data / "valid.jsonl")),
        method=c.MethodConfig.of(method, target),
        optim=c.OptimConfig(lr=arm["lr"], schedule="linear", **arm["optim"]),
        train=c.TrainOptions(
            task="sft",
            batch_size=s["batch_size"],
            max_steps=s["steps"],
            save_steps=max(1, s["steps"] - s["again"]),
            seed=job["seed"],
            controller=arm["controller"],
        ),
        eval=c.EvalConfig(prompts=tuple(questions[: s["written"]]), max_tokens=s["max_tokens"]),
        output=str(output),
    )


def train(job: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Train the arm; at the end the run evaluates and answers with the model in memory. A refusal is a result too."""
    import torch

    import lorakit as lk
    import lorakit.api
    from lorakit.core.errors import DivergenceError, UsageError
    from lorakit.core.start import needs
    from lorakit.train.config_file import check

    torch.set_num_threads(job["threads"])
    try:
        if "experts" in needs(lk.METHODS[job["arm"]["method"]]()):
            train_experts(job, work)
        config = configuration(job, work / "run")
        check(config)
        began, cpu = time.perf_counter(), time.process_time()
        result = lorakit.api.run(config)
    except (UsageError, DivergenceError) as error:
        return {"refused": ": ".join(filter(None, (error.what, error.why)))}
    lines = read_rows(result.directory / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "losses": [round(loss, 4) for loss in losses],
        "eval_loss": result.evaluation["eval_loss"],
        "answers": [
            line["text"] for line in read_rows(result.directory / "samples.jsonl")[-job["settings"]["written"] :]
        ],
        "trainable": result.summary.trainable,
        "layers": result.summary.layers,
        "steps_seconds": lines[-1]["t"],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory": peak_memory(),
    }


def train_experts(job: Mapping[str, Any], work: Path) -> None:
    """Train the two LoRAs that a mixture is made of, with half of the steps each and other seeds."""
    import lorakit.api

    for i in (1, 2):
        arm = {**job["arm"], "method": "lora", "options": {}, "lr": job["rate"]}
        settings = {**job["settings"], "steps": max(2, job["settings"]["steps"] // 2), "written": 0}
        config = configuration({**job, "arm": arm, "settings": settings, "seed": job["seed"] + i}, work / f"expert-{i}")
        whole = replace(
            config, train=replace(config.train, save_steps=0, eval_steps=0), data=replace(config.data, valid=None)
        )
        lorakit.api.run(whole)


def check(job: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Open what was trained as a user would: is it right, does it write the same, does it merge, does the run go on?"""
    import torch

    import lorakit as lk
    from lorakit.cli.opened import open_model
    from lorakit.core.errors import UsageError
    from lorakit.models import generate

    torch.set_num_threads(job["threads"])
    s, valid = job["settings"], Path(job["data"]) / "valid.jsonl"
    opened = open_model(str(work / "run"), dtype=job["dtype"])
    questions = [row["messages"][0]["content"] for row in read_rows(valid)]
    with lk.disabled(opened.model):
        before = forced(opened.model, opened.tokenizer, valid)
    after = forced(opened.model, opened.tokenizer, valid)
    found = {
        "before": before,
        "after": after,
        "answers": generate(opened.model, opened.tokenizer, questions[: s["written"]], max_tokens=s["max_tokens"]),
    }
    try:
        lk.merge(opened.model)
        found["merged"] = forced(opened.model, opened.tokenizer, valid)
    except UsageError as error:
        found["merged"] = {"refused": error.why or error.what}
    del opened
    return {**found, "resumed_is_the_same": resumed(job, work)}


def resumed(job: Mapping[str, Any], work: Path) -> bool:
    """Take the run as it lay on disk after a kill behind its first checkpoint, let it go on, and compare the file."""
    import lorakit.api

    whole, killed = work / "run", work / "killed"
    first = min((whole / "checkpoints").iterdir(), key=lambda path: path.name)
    killed.mkdir()
    for name in ("config.yaml", "env.json", "metrics.jsonl", "samples.jsonl"):
        if (whole / name).exists():
            shutil.copy(whole / name, killed / name)
    shutil.copytree(first, killed / "checkpoints" / first.name)
    config = configuration(job, killed)
    result = lorakit.api.run(replace(config, eval=replace(config.eval, prompts=())))
    if result.resumed_from is None:
        raise SystemExit("the killed run was started anew")
    file = Path("adapter") / "adapter_model.safetensors"
    return (whole / file).read_bytes() == (killed / file).read_bytes()


def forced(model: Any, tokenizer: Any, valid: Path) -> dict[str, Any]:
    """Give the mean loss of the answers' tokens and the number of answers that greedy decoding gets exactly right."""
    import torch

    from lorakit.data import collate_padded, encode, read

    examples = encode(read(valid), tokenizer, task="sft").examples
    inputs, _ = collate_padded(examples, tokenizer.pad_token_id)
    labels = inputs.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    trained = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[trained].float(), labels[trained])
    right = ((logits.argmax(-1) == labels) | ~trained).all(dim=1)
    return {"loss": float(loss), "right": int(right.sum()), "of": len(examples)}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def verdict(arm: Mapping[str, Any], least_loss: float, least_right: int) -> Sequence[str]:
    """Give what is wrong with an arm's result; nothing if all is right."""
    after, merged = arm["check"]["after"], arm["check"]["merged"]
    wrong = []
    if after["loss"] > least_loss:
        wrong.append(f"not learned: the loss is {after['loss']:.2f}")
    elif after["right"] < least_right:
        wrong.append(f"hardly learned: {after['right']} right")
    if arm["check"]["answers"] != arm["train"]["answers"]:
        wrong.append("other answers after loading")
    if not arm["check"]["resumed_is_the_same"]:
        wrong.append("another file after resuming")
    if "right" in merged and merged["right"] < after["right"] - 2:  # rounding may cost a little
        wrong.append(f"{after['right'] - merged['right']} fewer right after merging")
    return wrong
