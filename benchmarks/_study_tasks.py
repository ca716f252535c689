"""The two tasks of `diagnostics_study.py`: sentences of a made-up language on a tiny model, and E2E on SmolLM2."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft_e2e import split_by_mr
from torch import Tensor

WORDS, LENGTH = 64, 24
KINDS = ("good", "too hot", "overfit", "undertrained")


@dataclass(frozen=True)
class Study:
    """A model with its files, and how the four kinds of run differ."""

    name: str
    model: str
    train: Path
    few: Path
    """A small part of the training rows, for the run that is to overfit."""
    valid: Path
    retain: Path
    settings: Mapping[str, Any]
    """Of every run."""
    runs: Mapping[str, Mapping[str, Any]]
    """By kind."""
    ranks: Sequence[int]
    probe_rows: int
    strength_rows: int
    sharpness: bool = False
    eval_rows: int = field(default=0)


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- a made-up language ----------------------------------------------------------------------------------------------------


def chain(seed: int) -> Tensor:
    """Give transition probabilities (WORDS, WORDS): each word has a few likely followers."""
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(WORDS, WORDS, generator=generator)).softmax(-1)


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Give a language that is `b` for the first words of the vocabulary and `a` for the rest."""
    new = a.clone()
    cut = int(share * WORDS)
    new[:cut] = b[:cut]
    return new


def sentences(table: Tensor, count: int, seed: int) -> Tensor:
    """Draw sentences (count, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(WORDS, (count, 1), generator=generator)
    for _ in range(LENGTH - 1):
        rows = torch.cat([rows, torch.multinomial(table[rows[:, -1]], 1, generator=generator)], 1)
    return rows


def as_rows(ids: Tensor) -> list[dict[str, str]]:
    """Write sentences as texts."""
    return [{"text": " ".join(f"w{i}" for i in row)} for row in ids.tolist()]


def pretrained(directory: Path, table: Tensor, steps: int) -> Path:
    """Train a Llama of two layers on a language from scratch; what is there is taken."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (directory / "config.json").exists():
        return directory
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<pad>": WORDS, "<end>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=WORDS,
        eos_token_id=WORDS + 1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = torch.cat([sentences(table, 32, 1000 + step), torch.full((32, 1), WORDS + 1)], 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    wrapped.save_pretrained(directory)
    return directory


def synthetic(work: Path) -> Study:
    """Give the made-up language: half of its words get new followers."""
    old, new = chain(1), mixed(chain(1), chain(2), 0.5)
    model = pretrained(work / "tiny", old, steps=600)
    return Study(
        name="synthetic",
        model=str(model),
        train=write_rows(work / "train.jsonl", as_rows(sentences(new, 1280, 10))),
        few=write_rows(work / "few.jsonl", as_rows(sentences(new, 16, 10))),
        valid=write_rows(work / "valid.jsonl", as_rows(sentences(new, 96, 11))),
        retain=write_rows(work / "retain.jsonl", as_rows(sentences(old, 64, 12))),
        settings={
            "model.dtype": "float32",
            "method.r": 8,
            "method.alpha": 16,
            "optim.lr": 1e-2,
            "train.batch_size": 16,
            "train.max_steps": 160,
            "train.save_steps": 80,
            "train.eval_steps": 40,
            "train.diagnose_steps": 20,
        },
        runs={
            "good": {},
            "too hot": {"optim.lr": 0.3},
            "overfit": {"data.path": "few"},
            "undertrained": {
                "train.max_steps": 12,
                "train.save_steps": 6,
                "train.eval_steps": 6,
                "train.diagnose_steps": 4,
            },
        },
        ranks=(1, 2, 4, 8, 16, 32),
        probe_rows=64,
        strength_rows=96,
        sharpness=True,
    )


# --- E2E on SmolLM2 ----------------------------------------------------------------------------------------------------------

GENERAL = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("Name three primary colors.", "Red, blue and yellow are the three primary colors."),
    ("Why is the sky blue?", "Air scatters short wavelengths of sunlight more than long ones, so the sky looks blue."),
    ("Write a short sentence about the sea.", "The sea was calm, and the waves rolled slowly towards the shore."),
    ("What do plants need to grow?", "Plants need light, water, air and nutrients from the soil."),
    (
        "Explain what a computer program is.",
        "A computer program is a list of instructions that a computer can carry out.",
    ),
    ("Give me an example of a mammal.", "A dolphin is a mammal that lives in the sea."),
)


def chats(rows: Sequence[Mapping[str, str]], question: str, answer: str) -> list[dict[str, Any]]:
    """Write rows as conversations of one turn."""
    return [
        {"messages": [{"role": "user", "content": r[question]}, {"role": "assistant", "content": r[answer]}]}
        for r in rows
    ]


def e2e(work: Path, data: Path, model: str) -> Study:
    """Give E2E rows from the challenge's development file, no meaning representation on both sides."""
    train, valid = split_by_mr(data / "devset.csv", 48)
    general = [{"q": q, "a": a} for q, a in GENERAL]
    write_rows(work / "held-out.jsonl", chats(valid[1 :: max(1, len(valid) // 64)][:64], "mr", "ref"))
    spaced = [train[i * len(train) // 128] for i in range(128)]
    return Study(
        name="smollm2",
        model=model,
        train=write_rows(work / "train.jsonl", chats(spaced, "mr", "ref")),
        few=write_rows(work / "few.jsonl", chats(train[:: len(train) // 8][:8], "mr", "ref")),
        valid=write_rows(work / "valid.jsonl", chats(valid[:: max(1, len(valid) // 16)][:16], "mr", "ref")),
        retain=write_rows(work / "retain.jsonl", chats(general, "q", "a")),
        settings={
            "model.dtype": "float32",
            "method.r": 16,
            "method.alpha": 32,
            "optim.lr": 1e-3,
            "train.batch_size": 4,
            "train.max_steps": 32,
            "train.save_steps": 0,
            "train.eval_steps": 0,
            "train.diagnose_steps": 8,
        },
        runs={
            "good": {"train.eval_steps": 16},
            "too hot": {"optim.lr": 1e-2, "train.eval_steps": 16},
            "overfit": {"data.path": "few", "optim.lr": 2e-3, "train.eval_steps": 16},
            "undertrained": {"train.max_steps": 6, "train.eval_steps": 3, "train.diagnose_steps": 2},
        },
        ranks=(1, 4, 16),
        probe_rows=16,
        strength_rows=16,
    )
