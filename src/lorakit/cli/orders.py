"""The task of `lorakit quickstart`: free-text orders to JSON tickets, made by rule, so an answer is right or wrong.

A held-out order has a (name, drink) pair that no training row has: the model must learn the form, not the rows.
"""

import json
import random

NAMES = "Maya Noah Liam Ava Zoe Omar Ines Ravi Lena Hugo Aiko Tom Sara Finn Nora Eli Ruth Ivan Mila Otto".split()
DRINKS = ("green tea", "black tea", "latte", "espresso", "cocoa", "flat white", "lemonade", "mocha")
SIZES = ("small", "medium", "large")
NUMBERS = ("one", "two", "three", "four", "five")
PHRASES = (
    "{n} {size} {drinks}, the name's {name}",
    "hi, {n} {size} {drinks} for {name} please",
    "{name} here: {n} {drinks}, {size}",
    "can I get {n} {drinks} in {size}? I'm {name}",
    "{n} {drinks} for {name}, make it {size}",
    "put {name} down for {n} {size} {drinks}",
)

Row = dict[str, list[dict[str, str]]]


def orders(train: int = 240, held_out: int = 40, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Give training and held-out rows in the form {"messages": [user, assistant]}."""
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = [(str(name), drink) for name in NAMES for drink in DRINKS]
    draw.shuffle(pairs)
    unseen = held_out // 2
    known, new = pairs[unseen:], pairs[:unseen]
    return [order(draw, known) for _ in range(train)], [order(draw, [new[i % unseen]]) for i in range(held_out)]


def order(draw: random.Random, pairs: list[tuple[str, str]]) -> Row:
    """Make one order and its ticket."""
    name, drink = draw.choice(pairs)
    quantity, size = draw.randrange(len(NUMBERS)) + 1, draw.choice(SIZES)
    drinks = drink if quantity == 1 else f"{drink}s"
    text = draw.choice(PHRASES).format(n=NUMBERS[quantity - 1], size=size, drinks=drinks, name=name)
    ticket = json.dumps({"name": name, "drink": drink, "size": size, "qty": quantity})
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ticket}]}
