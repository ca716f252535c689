"""SST-2 with LoRA, lorakit beside PEFT: the same start, the same order, the same settings; nearly the same numbers must
come out.

    python benchmarks/peft_sst2.py --data DIR        # GLUE's SST-2 directory with train.tsv and dev.tsv

Ours is `lorakit.api.run`. PEFT's side is what its users write: `get_peft_model`, the transformers tokenizer and
padding collator, a plain torch loop; it reads the TSV files by itself. Both train the classifier in full beside the
adapters. The base keeps its own dropout, so both sides seed each step alike. 4,000 of the training rows are used:
`random.Random(0).sample` of the row numbers, sorted. Exit code 1 if the dev accuracies differ by more than one
point.
"""

import csv
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from _common import (
    StepClock,
    agreement,
    compare,
    environment,
    measured_with,
    megabytes,
    parser,
    peak_memory,
    serve_arm,
    table,
    write_results,
)

ROWS, DEV_ROWS = 4000, 872  # 872 is all of dev.tsv
SETTINGS: dict[str, Any] = {
    "r": 8,
    "alpha": 16,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "clip": 1.0,
    "schedule": "linear",
    "warmup": 0.06,
    "batch_size": 32,
    "epochs": 2,
    "max_length": 128,
}
WITHIN = 0.01  # of dev accuracy


def config(job: dict[str, Any], output: Path) -> Any:
    """Give our side's configuration."""
    import lorakit as lk
    from lorakit.train import config as c

    s = job["settings"]
    return c.RunConfig(
        model=c.ModelConfig(name=job["model"], dtype="float32"),
        data=c.DataConfig(
            path=f"{job['data']}/train.tsv#{job['rows']}", valid=f"{job['data']}/dev.tsv#{job['dev_rows']}"
        ),
        method=c.MethodConfig.of(lk.LoRA(r=s["r"], alpha=s["alpha"])),
        optim=c.OptimConfig(
            lr=s["lr"], weight_decay=s["weight_decay"], schedule=s["schedule"], warmup=s["warmup"], clip=s["clip"]
        ),
        train=c.TrainOptions(
            task="classification",
            batch_size=s["batch_size"],
            epochs=s["epochs"],
            max_length=s["max_length"],
            seed=job["seed"],
            save_steps=0,
        ),
        output=str(output),
    )


def prepare(seed: int, work: Path, options: Any) -> dict[str, Any]:
    """Make the job: settings, our start values as a PEFT directory, the order of the rows, rates, seeds of the steps."""
    import torch

    import lorakit as lk
    from lorakit.data import epoch_plan
    from lorakit.models import load
    from lorakit.optim import schedule
    from lorakit.train.loop import random_seed

    s = {**SETTINGS, "max_length": 64} if options.tiny else SETTINGS
    rows, dev_rows = (96, 48) if options.tiny else (ROWS, DEV_ROWS)
    name = options.model or "minilm"
    loaded = load(name, task="classification", dtype="float32", labels=["0", "1"], seed=seed, device="cpu")
    torch.manual_seed(seed)  # as train/run.py does before it attaches
    lk.attach(loaded.model, lk.LoRA(r=s["r"], alpha=s["alpha"]), modules_to_save=loaded.head_modules)
    lk.save(loaded.model, work / "start")
    plans = [epoch_plan(seed, epoch, [0] * rows, batch_size=s["batch_size"]) for epoch in range(s["epochs"])]
    total = sum(map(len, plans))
    rate = schedule(s["schedule"], total, s["warmup"])
    return {
        "model": name,
        "model_directory": str(loaded.path),
        "data": str(options.data),
        "rows": rows,
        "dev_rows": dev_rows,
        "seed": seed,
        "settings": s,
        "head": loaded.head_modules,
        "trainable": lk.summary(loaded.model).trainable,
        "plans": plans,
        "rates": [s["lr"] * rate(step) for step in range(total)],
        "step_seeds": [random_seed(seed, step, 0) for step in range(total)],
    }


def ours(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train with lorakit."""
    import lorakit.api

    clock = StepClock()
    result = lorakit.api.run(config(job, work / "run"))
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "eval_loss" in line]
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "epochs": [{"loss": line["eval_loss"], "accuracy": line["eval_accuracy"]} for line in epochs],
        "trainable": result.summary.trainable,
        "time": clock.seconds(skip=[line["step"] for line in epochs]),
        "peak_memory": peak_memory(),
    }


def peft(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    s, clock = job["settings"], StepClock()
    tokenizer = AutoTokenizer.from_pretrained(job["model_directory"])
    files = (("train.tsv", job["rows"]), ("dev.tsv", job["dev_rows"]))
    train, dev = (tokenised(read_rows(Path(job["data"]) / f, n), tokenizer, s["max_length"]) for f, n in files)
    collate = DataCollatorWithPadding(tokenizer)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForSequenceClassification.from_pretrained(job["model_directory"], num_labels=2, dtype=torch.float32)
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=s["r"],
        lora_alpha=s["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=job["head"],
    )
    model = get_peft_model(base, lora).to(device)
    start = set_peft_model_state_dict(model, load_file(work / "start" / "adapter_model.safetensors"))
    missing = [key for key in start.missing_keys if "lora_" in key or "modules_to_save" in key]
    if missing or start.unexpected_keys:
        raise SystemExit(f"the start values do not fit PEFT's model: {missing} {start.unexpected_keys}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses, epochs, step = [], [], 0
    for plan in job["plans"]:
        model.train()
        for indices in plan:
            for group in optimizer.param_groups:
                group["lr"] = job["rates"][step]
            batch = collate([train[i] for i in indices]).to(device)
            torch.manual_seed(job["step_seeds"][step])
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, s["clip"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
        epochs.append({**evaluate(model, dev, collate, s["batch_size"], device), "step": step})
    return {
        "losses": losses,
        "epochs": [{"loss": e["loss"], "accuracy": e["accuracy"]} for e in epochs],
        "trainable": sum(p.numel() for p in parameters),
        "time": clock.seconds(skip=[e["step"] for e in epochs]),
        "peak_memory": peak_memory(),
    }


def read_rows(file: Path, count: int) -> list[dict[str, str]]:
    """Read `count` rows of a GLUE file, by a fixed draw."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]


def tokenised(rows: list[dict[str, str]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Give the features of each row, with its label."""
    encoded = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=max_length)
    return [{**{k: v[i] for k, v in encoded.items()}, "labels": int(row["label"])} for i, row in enumerate(rows)]


def evaluate(model: Any, rows: list[dict[str, Any]], collate: Any, size: int, device: str) -> dict[str, float]:
    """Give the mean loss and the accuracy."""
    import torch

    model.eval()
    total, right = 0.0, 0
    with torch.no_grad():
        for begin in range(0, len(rows), size):
            batch = collate(rows[begin : begin + size]).to(device)
            out = model(**batch)
            total += out.loss.item() * len(batch["labels"])
            right += int((out.logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": total / len(rows), "accuracy": right / len(rows)}


def report(runs: list[dict[str, Any]], job: dict[str, Any], where: dict[str, Any]) -> str:
    """Give the results in words and tables."""
    s = job["settings"]
    rows = []
    for run in runs:
        for arm, name in (("ours", "lorakit"), ("peft", "PEFT")):
            last, time = run[arm]["epochs"][-1], run[arm]["time"]
            rows.append(
                [
                    str(run["seed"]),
                    name,
                    f"{last['accuracy']:.2%}",
                    f"{last['loss']:.5f}",
                    f"{1000 * time['step_wall_median']:.0f} ms",
                    f"{1000 * time['step_cpu_median']:.0f} ms",
                    f"{time['wall']:.0f} s",
                    megabytes(run[arm]["peak_memory"]),
                ]
            )
    curves = [
        [
            str(run["seed"]),
            f"{run['agreement']['first_step_relative']:.1e}",
            f"{run['agreement']['mean_relative']:.1e}",
            f"{run['agreement']['largest_relative']:.1e} (step {run['agreement']['at_step']})",
            f"{run['accuracy_gap']:.2%}",
            f"{run['loss_gap']:.1e}",
        ]
        for run in runs
    ]
    header = ["seed", "", "dev accuracy", "dev loss", "step wall", "step CPU", "all steps", "peak memory"]
    compared = ["seed", "step 1", "mean of steps", "largest", "dev accuracy", "dev loss"]
    return "\n".join(
        [
            f"# SST-2, {job['model']}: lorakit and PEFT\n",
            f"{job['rows']} training rows (`random.Random(0).sample` of the row numbers, sorted), {job['dev_rows']} dev "
            f"rows, {len(job['rates'])} steps of {s['batch_size']} rows, fp32, LoRA r {s['r']}, alpha {s['alpha']}, all "
            f"linear layers, the classifier in full ({job['trainable']:,} trainable parameters), AdamW, lr {s['lr']}, "
            f"{s['schedule']}, warm-up {s['warmup']}, clip {s['clip']}. Same start values, order of "
            "rows and dropout seeds on both sides.\n",
            table(header, rows),
            "Step times are medians between two optimizer steps, evaluations left out; each side ran in a process of "
            "its own.\n",
            "Relative differences of the training loss, and absolute ones on the dev set:\n",
            table(compared, curves),
            measured_with(where),
        ]
    )


def main() -> None:
    """Compare."""
    options = parser(__doc__, "GLUE's SST-2 directory with train.tsv and dev.tsv").parse_args()
    if options.arm:
        serve_arm(options, {"ours": ours, "peft": peft})
        return
    if options.data is None:
        raise SystemExit("--data DIR: where GLUE's SST-2 lies")
    jobs: list[dict[str, Any]] = []

    def make_job(seed: int, work: Path) -> dict[str, Any]:
        jobs.append(prepare(seed, work, options))
        return jobs[-1]

    where = environment()
    with tempfile.TemporaryDirectory() as work:
        runs = compare(make_job, options.seeds, Path(work))
    for run in runs:
        run["agreement"] = agreement(run["ours"]["losses"], run["peft"]["losses"])
        ends = [run[arm]["epochs"][-1] for arm in ("ours", "peft")]
        run["accuracy_gap"] = abs(ends[0]["accuracy"] - ends[1]["accuracy"])
        run["loss_gap"] = abs(ends[0]["loss"] - ends[1]["loss"])
    job = jobs[0]
    text = report(runs, job, where)
    facts = {key: job[key] for key in ("model", "rows", "dev_rows", "settings", "head", "trainable")}
    content = {"benchmark": "sst2", "environment": where, **facts, "runs": runs}
    print(text, write_results("sst2", options.output, content, text).name, sep="\n")
    if any(run["accuracy_gap"] > WITHIN for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
