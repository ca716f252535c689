"""Arms that make one pass over the same chats: what a user gets who only names the data.

All train the same tokens (those of the answers), from a fresh adapter, at a rate so small that the loss stays that of
the base. So the mean loss of a trained token must come out the same whatever the batches are; it differs where an arm
trains other tokens, or lets padding or a neighbour in the same row into the attention.
"""

import csv
import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import StepClock, peak_memory

RATE = 1e-8
WARM = 2  # steps that are not timed; lorakit's test save falls into the second


def prepare(data: Path, rows: int, model: str, directory: Path, turns: Sequence[int] = (1,)) -> dict[str, Any]:
    """Write `rows` chats of a fixed shuffle, and the tokens and labels lorakit makes of them.

    turns: how many questions and answers a chat has, for one chat after the other, over and over; then all are shuffled.
    """
    from transformers import AutoTokenizer

    from lorakit.data import encode, read

    with (data / "devset.csv").open(newline="", encoding="utf-8") as lines:
        table = list(csv.DictReader(lines))
    draw, counts = random.Random(0), [turns[i % len(turns)] for i in range(rows)]
    chosen = iter(draw.sample(table, sum(counts)))
    chats = [{"messages": [message for _ in range(count) for message in _turn(next(chosen))]} for count in counts]
    draw.shuffle(chats)
    file = directory / "train.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    encoded = encode(read(file), AutoTokenizer.from_pretrained(model))
    tokens = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded.examples]
    (directory / "tokens.json").write_text(json.dumps(tokens))
    return {
        "rows": rows,
        "tokens": encoded.stats.tokens,
        "trained": encoded.stats.trained_tokens,
        "longest": max(encoded.lengths),
        "fingerprint": encoded.fingerprint,
    }


def _turn(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["mr"]}, {"role": "assistant", "content": row["ref"]}]


def ours(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """`lorakit train`: the file in, rows packed to a budget of tokens."""
    import torch

    import lorakit as lk
    import lorakit.api
    from lorakit.train import config as c

    torch.set_num_threads(job["work"]["threads"])
    clock = StepClock()
    result = lorakit.api.run(
        c.RunConfig(
            model=c.ModelConfig(name=job["work"]["model"], dtype=job["work"]["dtype"]),
            data=c.DataConfig(path=f"{job['directory']}/train.jsonl"),
            method=c.MethodConfig.of(lk.LoRA(r=job["work"]["rank"], alpha=job["work"]["alpha"])),
            optim=c.OptimConfig(lr=RATE, schedule="constant", warmup=0),
            train=c.TrainOptions(batch_tokens=job["budget"], max_length=job["longest"], save_steps=0, eval_steps=0),
            output=str(scratch / "run"),
        )
    )
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    ends = {kind: [0, *(line[kind] for line in lines)] for kind in ("tokens", "trained_tokens")}
    counts = {kind: [b - a for a, b in pairwise(e)] for kind, e in ends.items()}
    return summary(clock, counts["tokens"], counts["trained_tokens"], [line["loss"] for line in lines])


class Counted:
    """A collator that notes what each batch holds: tokens that are not padding, and trained ones."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.tokens, self.trained, self.cells = collator, list[int](), list[int](), list[int]()

    def __call__(self, rows: list[Any]) -> Any:
        """Collate."""
        batch = self.collator(rows)
        mask = batch.get("attention_mask")
        self.tokens.append(int(mask.sum() if mask is not None else batch["input_ids"].numel()))
        self.trained.append(int((batch["labels"][:, 1:] != -100).sum()))
        self.cells.append(batch["input_ids"].numel())
        return batch


def base(job: dict[str, Any]) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
    """Give the model, its tokenizer, PEFT's configuration and the rows, for the arms of others."""
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from lorakit.train.bench import peft
    from lorakit.train.bench.work import Work

    torch.set_num_threads(job["work"]["threads"])
    work = Work(**job["work"])
    model, _ = peft.load(work)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=work.rank, lora_alpha=work.alpha, lora_dropout=0.0, target_modules="all-linear"
    )
    rows = json.loads(Path(job["directory"], "tokens.json").read_text())
    return model, AutoTokenizer.from_pretrained(work.model), lora, rows


def settings(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Give the arguments that transformers' trainer and TRL's share."""
    return {
        "output_dir": str(scratch / "out"),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not job["cuda"],
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def trainer(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """PEFT and transformers' Trainer, with the collator that pads to the longest row of the batch."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, lora, rows = base(job)
    collator = Counted(DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100))
    clock = StepClock()
    run: Any = Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(**settings(job, scratch), per_device_train_batch_size=job["batch"]),
        train_dataset=rows,
        data_collator=collator,
    )
    run.train()
    return trained(clock, collator, run)


def trl(job: dict[str, Any], scratch: Path, *, packing: bool) -> dict[str, Any]:
    """TRL's SFTTrainer on the same tokens and labels; packing fills rows of the budget's length, best fit first."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, lora, rows = base(job)
    shape = {"per_device_train_batch_size": 1, "max_length": job["budget"]}
    if not packing:
        shape = {"per_device_train_batch_size": job["batch"], "max_length": job["longest"]}
    common = {**settings(job, scratch), "remove_unused_columns": True, "bf16": False, "gradient_checkpointing": False}
    arguments = SFTConfig(**common, **shape, packing=packing)
    clock = StepClock()
    run = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    run.data_collator = Counted(run.data_collator)
    run.train()
    return trained(clock, run.data_collator, run)


def trained(clock: StepClock, collator: Counted, run: Any) -> dict[str, Any]:
    """Put together what a trainer logged."""
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    return {
        **summary(clock, collator.tokens, collator.trained, losses),
        "fill": sum(collator.tokens) / sum(collator.cells),
    }


def summary(clock: StepClock, tokens: list[int], counted: list[int], losses: list[float]) -> dict[str, Any]:
    """Give tokens (without padding) and seconds of each timed step, and the mean loss of a trained token of the pass."""
    time = clock.seconds(skip=range(1, WARM))
    steps = time["timed_steps"]
    wall = [clock.wall[i] - clock.wall[i - 1] for i in steps]
    cpu = [clock.cpu[i] - clock.cpu[i - 1] for i in steps]
    return {
        "steps": len(losses),
        "tokens": [tokens[i] for i in steps],
        "all_tokens": sum(tokens),
        "trained_tokens": sum(counted),
        "wall": wall,
        "cpu": cpu,
        "loss": sum(loss * n for loss, n in zip(losses, counted, strict=True)) / sum(counted),
        "peak_memory": peak_memory(),
        "whole_cpu": clock.cpu[-1],
    }
