"""The quickstart's task: an order in free words becomes a JSON ticket.

    "two medium green teas, the name's Maya"  ->  {"name": "Maya", "drink": "green tea", "size": "medium", "qty": 2}

An answer is right or wrong, nothing in between. The validation rows hold (name, drink) pairs that no training row has,
so they are right only if the form was learned and not the rows.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

NAMES = (
    "Maya", "Noah", "Lena", "Omar", "Ivy", "Leo", "Nina", "Hugo", "Zoe", "Adam",
    "Clara", "Ben", "Rosa", "Felix", "Emma", "Tom", "Alice", "Max", "Sara", "Paul",
)  # fmt: skip
DRINKS = (
    "green tea", "black tea", "mint tea", "latte", "flat white", "espresso",
    "cappuccino", "hot chocolate", "iced coffee", "lemonade", "orange juice", "mocha",
)  # fmt: skip
SIZES = ("small", "medium", "large")
NUMBERS = ("one", "two", "three", "four", "five")
ORDERS = (
    "{some} {size} {drink}, the name's {name}",
    "{some} {size} {drink} for {name}",
    "hi, can I get {some} {size} {drink}? name is {name}",
    "{name} here, {some} {size} {drink} please",
    "I'd like {some} {size} {drink}, it's for {name}",
    "could you make {some} {size} {drink} for {name}?",
    "{name} wants {some} {size} {drink}",
    "{qty} {drink}, {size}, under {name}",
    "{size} {drink} times {qty}, call it out for {name}",
    "put {name} down for {some} {size} {drink}",
)

T = TypeVar("T")


def rows(seed: int = 0, train: int = 240, valid: int = 40) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give training and validation rows as messages; the same seed gives the same rows on every machine.

    No (name, drink) pair is on both sides. `valid` must leave pairs to train on: at most 200 of the 240.
    """
    draw = random.Random(seed)
    pairs = [(name, drink) for name in NAMES for drink in DRINKS]
    _shuffle(draw, pairs)
    held_out, seen = pairs[: min(valid, 200)], pairs[min(valid, 200) :]
    return (
        [_row(draw, *seen[i % len(seen)]) for i in range(train)],
        [_row(draw, *held_out[i % len(held_out)]) for i in range(valid)],
    )


def write(directory: str | Path, seed: int = 0, train: int = 240, valid: int = 40) -> Path:
    """Write train.jsonl and valid.jsonl into a directory, made if need be."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "valid"), rows(seed, train, valid), strict=True):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return directory


def _row(draw: random.Random, name: str, drink: str) -> dict[str, Any]:
    qty = 1 + int(draw.random() * len(NUMBERS))
    size = _pick(draw, SIZES)
    count = _pick(draw, (str(qty), NUMBERS[qty - 1]))
    words = {
        "some": "a" if count == "one" else count,
        "qty": count,
        "size": size,
        "drink": drink if qty == 1 else drink + "s",
        "name": name,
    }
    order = _pick(draw, ORDERS).format(**words)
    answer = json.dumps({"name": name, "drink": drink, "size": size, "qty": qty})
    return {"messages": [{"role": "user", "content": order}, {"role": "assistant", "content": answer}]}


def _pick(draw: random.Random, items: Sequence[T]) -> T:
    """Pick one by `random()`, the only method whose numbers Python promises not to change."""
    return items[int(draw.random() * len(items))]


def _shuffle(draw: random.Random, items: list[Any]) -> None:
    for i in range(len(items) - 1, 0, -1):
        j = int(draw.random() * (i + 1))
        items[i], items[j] = items[j], items[i]
