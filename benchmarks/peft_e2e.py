"""E2E NLG with LoRA on SmolLM2, lorakit beside PEFT: same tokens, start and order, and the same validation loss.

    python benchmarks/peft_e2e.py --data DIR         # the E2E challenge's directory with devset.csv (columns mr, ref)

A row is a chat: the meaning representation `mr` is the user's message, the sentence `ref` the answer that is
trained. The challenge's training file is not used: rows come from the development file, split by `mr`, so that no
validation `mr` is trained. The validation rows are those of the mr's whose SHA-256 comes first. Both sides get the
token ids and labels that lorakit made. Ours is `lorakit.api.run` (packed rows); PEFT's side is what its users write:
`get_peft_model`, padded batches with an attention mask, the model's own loss, a plain torch loop. Exit code 1 if the
validation losses differ by more than 1 %.
"""

import csv
import hashlib
import json
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
    write_json,
    write_results,
)

SETTINGS: dict[str, Any] = {
    "r": 16,
    "alpha": 32,
    "lr": 2e-4,
    "weight_decay": 0.0,
    "clip": 1.0,
    "schedule": "cosine",
    "warmup": 0.1,
    "batch_size": 8,
    "steps": 60,
    "max_length": 256,
    "valid_rows": 128,
}
TINY = {"steps": 4, "batch_size": 4, "valid_rows": 8}
WITHIN = 0.01  # of the validation loss


def split_by_mr(file: Path, valid_rows: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Give training and validation rows with no `mr` in both: whole mr's, in the order of their hashes."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    held_out: set[str] = set()
    count = 0
    for mr in sorted({row["mr"] for row in rows}, key=lambda mr: hashlib.sha256(mr.encode()).hexdigest()):
        if count >= valid_rows:
            break
        held_out.add(mr)
        count += sum(row["mr"] == mr for row in rows)
    return [row for row in rows if row["mr"] not in held_out], [row for row in rows if row["mr"] in held_out]


def write_chats(rows: list[dict[str, str]], file: Path) -> None:
    """Write rows as `messages`."""
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            chat = [{"role": "user", "content": row["mr"]}, {"role": "assistant", "content": row["ref"]}]
            out.write(json.dumps({"messages": chat}) + "\n")


def config(job: dict[str, Any], work: Path) -> Any:
    """Give our side's configuration."""
    import lorakit as lk
    from lorakit.train import config as c

    s = job["settings"]
    return c.RunConfig(
        model=c.ModelConfig(name=job["model"], dtype=job["dtype"]),
        data=c.DataConfig(path=str(work / "train.jsonl"), valid=str(work / "valid.jsonl")),
        method=c.MethodConfig.of(lk.LoRA(r=s["r"], alpha=s["alpha"])),
        optim=c.OptimConfig(
            lr=s["lr"], weight_decay=s["weight_decay"], schedule=s["schedule"], warmup=s["warmup"], clip=s["clip"]
        ),
        train=c.TrainOptions(
            batch_size=s["batch_size"],
            max_steps=s["steps"],
            max_length=s["max_length"],
            seed=job["seed"],
            save_steps=0,
        ),
        output=str(work / "run"),
    )


def prepare(seed: int, work: Path, options: Any) -> dict[str, Any]:
    """Make the job: rows as files for us and as tokens for PEFT, our start values, the order of the rows, the rates."""
    import torch

    import lorakit as lk
    from lorakit.data import encode, epoch_plan, read
    from lorakit.models import load
    from lorakit.optim import schedule

    s = {**SETTINGS, **TINY} if options.tiny else SETTINGS
    train, valid = split_by_mr(options.data / "devset.csv", s["valid_rows"])
    write_chats(train, work / "train.jsonl")
    write_chats(valid, work / "valid.jsonl")
    name = options.model or "smollm2"
    loaded = load(name, dtype=options.dtype, device="cpu")
    torch.manual_seed(seed)  # as train/run.py does before it attaches
    lk.attach(loaded.model, lk.LoRA(r=s["r"], alpha=s["alpha"]))
    lk.save(loaded.model, work / "start")
    data, held_out = (
        encode(read(work / f"{part}.jsonl"), loaded.tokenizer, max_length=s["max_length"])
        for part in ("train", "valid")
    )
    plan = epoch_plan(seed, 0, data.lengths, batch_size=s["batch_size"])[: s["steps"]]
    if len(plan) < s["steps"]:
        raise SystemExit(f"{len(data)} training rows are too few for {s['steps']} steps of {s['batch_size']}")
    tokens = {
        "train": {i: (data.examples[i].input_ids, data.examples[i].labels) for batch in plan for i in batch},
        "valid": [(row.input_ids, row.labels) for row in held_out.examples],
    }
    write_json(work / "tokens.json", tokens)
    rate = schedule(s["schedule"], s["steps"], s["warmup"])
    return {
        "model": name,
        "model_directory": str(loaded.path),
        "dtype": options.dtype,
        "seed": seed,
        "settings": s,
        "rows": {"train": len(train), "trained": sum(map(len, plan)), "valid": len(valid)},
        "template": data.facts.template,
        "fingerprints": {"train": data.fingerprint, "valid": held_out.fingerprint},
        "pad_id": loaded.tokenizer.pad_token_id,
        "trainable": lk.summary(loaded.model).trainable,
        "plan": plan,
        "step_tokens": [sum(data.lengths[i] for i in batch) for batch in plan],
        "trained_tokens": sum(sum(y != -100 for y in data.examples[i].labels) for batch in plan for i in batch),
        "rates": [s["lr"] * rate(step) for step in range(s["steps"])],
    }


def ours(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train with lorakit."""
    import torch

    import lorakit as lk
    import lorakit.api
    from lorakit.data import encode, read
    from lorakit.models import load
    from lorakit.train.task import LanguageModelling

    clock, s = StepClock(), job["settings"]
    loaded = load(job["model"], dtype=job["dtype"])
    loading = peak_memory()
    result = lorakit.api.run(config(job, work), model=(loaded.model, loaded.tokenizer))
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    time, memory = clock.seconds(), peak_memory()

    task = LanguageModelling(loaded.model.vocab_size, job["pad_id"], packed=True)
    rows = list(encode(read(work / "valid.jsonl"), loaded.tokenizer, max_length=s["max_length"]).examples)
    batches = [rows[i : i + s["batch_size"]] for i in range(0, len(rows), s["batch_size"])]
    with lk.disabled(loaded.model.eval()), torch.no_grad():
        before = sum(float(task.loss(loaded.model, batch)[0]) for batch in batches)
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "valid_before": before / sum(map(task.weight, rows)),
        "valid_after": result.evaluation["eval_loss"],
        "trainable": result.summary.trainable,
        "time": time,
        "peak_memory": memory,
        "peak_memory_of_loading": loading,
    }


def peft(job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    s, clock = job["settings"], StepClock()
    tokens = json.loads((work / "tokens.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(job["model_directory"], dtype=getattr(torch, job["dtype"]))
    loading = peak_memory()
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=s["r"], lora_alpha=s["alpha"], lora_dropout=0.0, target_modules="all-linear"
    )
    model = get_peft_model(base, lora).to(device)
    start = set_peft_model_state_dict(model, load_file(work / "start" / "adapter_model.safetensors"))
    missing = [key for key in start.missing_keys if "lora_" in key]
    if missing or start.unexpected_keys:
        raise SystemExit(f"the start values do not fit PEFT's model: {missing} {start.unexpected_keys}")

    def evaluate() -> float:
        model.eval()
        rows, size, total = tokens["valid"], s["batch_size"], 0.0
        with torch.no_grad():
            for begin in range(0, len(rows), size):
                batch, count = padded(rows[begin : begin + size], job["pad_id"])
                total += model(**batch.to(device), num_items_in_batch=count, use_cache=False).loss.item() * count
        model.train()
        return total / sum(trained(row) for row in rows)

    before = evaluate()
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for plan, rate in zip(job["plan"], job["rates"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch, count = padded([tokens["train"][str(i)] for i in plan], job["pad_id"])
        loss = model(**batch.to(device), num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, s["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    time = clock.seconds()
    return {
        "losses": losses,
        "valid_before": before,
        "valid_after": evaluate(),
        "trainable": sum(p.numel() for p in parameters),
        "time": time,
        "peak_memory": peak_memory(),
        "peak_memory_of_loading": loading,
    }


def padded(rows: list[Any], pad_id: int) -> tuple[Any, int]:
    """Give a batch padded on the right, and the number of its trained tokens."""
    import torch
    from transformers import BatchEncoding

    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": [ids + [pad_id] * (longest - len(ids)) for ids, _ in rows],
        "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows],
        "labels": [labels + [-100] * (longest - len(labels)) for _, labels in rows],
    }
    return BatchEncoding({k: torch.tensor(v) for k, v in batch.items()}), sum(map(trained, rows))


def trained(row: tuple[list[int], list[int]]) -> int:
    """Count the trained tokens of a row; the first token has nothing before it."""
    return sum(label != -100 for label in row[1][1:])


def speed(job: dict[str, Any], time: dict[str, Any]) -> dict[str, float]:
    """Give tokens (without padding) per second of wall and of processor time."""
    tokens = sum(job["step_tokens"][i] for i in time["timed_steps"])
    return {"tokens_per_second": tokens / time["wall"], "tokens_per_cpu_second": tokens / time["cpu"]}


def report(runs: list[dict[str, Any]], job: dict[str, Any], where: dict[str, Any]) -> str:
    """Give the results in words and tables."""
    s, rows = job["settings"], []
    for run in runs:
        for arm, name in (("ours", "lorakit"), ("peft", "PEFT")):
            side = run[arm]
            rows.append(
                [
                    str(run["seed"]),
                    name,
                    f"{side['valid_before']:.4f}",
                    f"{side['valid_after']:.4f}",
                    f"{side['time']['wall']:.0f} s",
                    f"{side['time']['cpu']:.0f} s",
                    f"{side['tokens_per_second']:.0f}",
                    f"{side['tokens_per_cpu_second']:.0f}",
                    megabytes(side["peak_memory"]),
                ]
            )
    curves = [
        [
            str(run["seed"]),
            f"{run['agreement']['first_step_relative']:.1e}",
            f"{run['agreement']['mean_relative']:.1e}",
            f"{run['agreement']['largest_relative']:.1e} (step {run['agreement']['at_step']})",
            f"{run['valid_gap']:.1e}",
            f"{run['speedup_cpu']:.2f}",
        ]
        for run in runs
    ]
    header = ["seed", "", "valid before", "after", "wall", "CPU", "tokens/s", "tokens/CPU s", "peak memory"]
    compared = ["seed", "step 1", "mean of steps", "largest", "validation after", "PEFT's CPU time / ours"]
    return "\n".join(
        [
            f"# E2E NLG, {job['model']} in {job['dtype']}: lorakit and PEFT\n",
            f"Chats from the development file, split by mr: {job['rows']['trained']} rows trained of "
            f"{job['rows']['train']}, {job['rows']['valid']} validation rows of other mr's; {s['steps']} steps of {s['batch_size']} rows "
            f"({sum(job['step_tokens']):,} tokens without padding, {job['trained_tokens']:,} trained), LoRA r {s['r']}, "
            f"alpha {s['alpha']}, fp32, on all linear layers ({job['trainable']:,} parameters), AdamW, lr {s['lr']}, "
            f"{s['schedule']}, warm-up {s['warmup']}, clip {s['clip']}. Same tokens, labels, start values and order on both sides.\n",
            table(header, rows),
            f"Validation loss: nats per token. Times are those of steps 2 to {s['steps']}, evaluations left out; each "
            "side ran in a process of its own; peak memory is that of the whole process.\n",
            "Relative differences of the losses:\n",
            table(compared, curves),
            measured_with(where),
        ]
    )


def main() -> None:
    """Compare."""
    options = parser(__doc__, "the E2E challenge's directory with devset.csv")
    options.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base, on both sides"
    )
    options = options.parse_args()
    if options.arm:
        serve_arm(options, {"ours": ours, "peft": peft})
        return
    if options.data is None:
        raise SystemExit("--data DIR: where the E2E challenge's files lie")
    jobs: list[dict[str, Any]] = []

    def make_job(seed: int, work: Path) -> dict[str, Any]:
        jobs.append(prepare(seed, work, options))
        return jobs[-1]

    where = environment()
    with tempfile.TemporaryDirectory() as work:
        runs = compare(make_job, options.seeds, Path(work))
    for run, job in zip(runs, jobs, strict=True):
        run["agreement"] = agreement(run["ours"]["losses"], run["peft"]["losses"])
        run["valid_gap"] = abs(run["ours"]["valid_after"] / run["peft"]["valid_after"] - 1)
        run["speedup_cpu"] = run["peft"]["time"]["cpu"] / run["ours"]["time"]["cpu"]
        for arm in ("ours", "peft"):
            run[arm] |= speed(job, run[arm]["time"])
    job = jobs[0]
    text = report(runs, job, where)
    keys = (
        "model",
        "dtype",
        "settings",
        "rows",
        "template",
        "fingerprints",
        "trainable",
        "step_tokens",
        "trained_tokens",
    )
    content = {"benchmark": "e2e", "environment": where, **{key: job[key] for key in keys}, "runs": runs}
    print(text, write_results(f"e2e-{options.dtype}", options.output, content, text).name, sep="\n")
    if any(run["valid_gap"] > WITHIN for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
