"""Order and batches: each row once an epoch, a pure function of seed and epoch, rows apart from their neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import UsageError
from lorakit.data import (
    Example,
    collate_classification,
    collate_packed,
    collate_padded,
    epoch_plan,
    steps_per_epoch,
    windows,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
NUMBER = st.integers(0, 2**40)


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    seed=NUMBER,
    epoch=st.integers(0, 50),
    size=st.integers(1, 9),
    tokens=st.booleans(),
    accumulate=st.integers(1, 5),
)
def test_each_epoch_visits_each_row_once_within_the_budget(lengths, seed, epoch, size, tokens, accumulate):
    budget = size * 10
    options = {"batch_tokens": budget} if tokens else {"batch_size": size}
    plan = epoch_plan(seed, epoch, lengths, **options)
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    assert all(plan)
    if tokens:
        used = [sum(lengths[row] for row in batch) for batch in plan]
        assert all(total <= budget or len(batch) == 1 for total, batch in zip(used, plan, strict=True))
        # greedy: the first row of a batch did not fit into the one before
        assert all(used[i] + lengths[plan[i + 1][0]] > budget for i in range(len(plan) - 1))
    else:
        assert [len(batch) for batch in plan[:-1]] == [size] * (len(plan) - 1) and len(plan[-1]) <= size
    steps = windows(plan, accumulate)
    assert [batch for step in steps for batch in step] == plan
    assert all(len(step) == accumulate for step in steps[:-1])
    assert len(steps) == steps_per_epoch(seed, epoch, lengths, **options, accumulate=accumulate)


def test_a_budget_is_filled_to_the_last_token():
    assert [len(batch) for batch in epoch_plan(0, 0, [5] * 5, batch_tokens=10)] == [2, 2, 1]
    assert [len(batch) for batch in epoch_plan(0, 0, [11, 12], batch_tokens=10)] == [1, 1]


@settings(deadline=None)
@given(seed=NUMBER, epoch=st.integers(0, 50), lengths=LENGTHS)
def test_the_order_depends_on_seed_and_epoch_alone(seed, epoch, lengths):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    plan = epoch_plan(seed, epoch, lengths, batch_size=4)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing global is drawn from
    torch.rand(3)
    epoch_plan(seed + 1, epoch, lengths, batch_size=2)
    assert epoch_plan(seed, epoch, lengths, batch_size=4) == plan
    flat = [row for batch in plan for row in batch]
    assert flat == [row for batch in epoch_plan(seed, epoch, lengths, batch_tokens=50) for row in batch]


def test_seeds_and_epochs_give_different_orders_and_the_same_ones_for_ever():
    orders = {tuple(epoch_plan(seed, epoch, [1] * 50, batch_size=50)[0]) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert epoch_plan(0, 0, [1] * 8, batch_size=3) == [[5, 4, 2], [6, 7, 3], [1, 0]]  # old runs resume on their rows
    assert epoch_plan(3, 2, [1] * 8, batch_size=8) == [[6, 2, 3, 0, 4, 5, 7, 1]]


def test_wrong_batch_options_are_usage_errors():
    for options in ({}, {"batch_size": 1, "batch_tokens": 1}, {"batch_size": 0}, {"batch_tokens": -1}):
        with pytest.raises(UsageError):
            epoch_plan(0, 0, [1, 2], **options)
    with pytest.raises(UsageError):
        windows([[0]], 0)


TOKEN = st.integers(0, 9)
ROW = st.lists(st.tuples(TOKEN, st.booleans()), min_size=1, max_size=12).map(
    lambda row: Example([t for t, _ in row], [-100, *(t if on else -100 for t, on in row[1:])], None, "x:1")
)
PAD = 2  # also an ordinary token of the rows, as where pad is the end token


@settings(deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=6))
def test_packed_rows_come_apart_again(rows):
    inputs, lengths = collate_packed(rows)
    assert lengths == [len(row.input_ids) for row in rows]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in inputs.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), (torch.int64, (1, sum(lengths)))
    )
    parts = {name: [part[0].tolist() for part in t.split(lengths, dim=1)] for name, t in inputs.items()}
    assert parts["input_ids"] == [row.input_ids for row in rows]
    assert parts["labels"] == [row.labels for row in rows]  # not shifted
    assert parts["position_ids"] == [list(range(n)) for n in lengths]


def test_no_row_is_predicted_from_the_one_before_it():
    rows = [Example([1, 2], [1, 2], None, "x:1"), Example([3, 4], [3, 4], None, "x:2")]
    assert collate_packed(rows)[0]["labels"].tolist() == [[-100, 2, -100, 4]]


@settings(deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=6))
def test_padding_is_masked_by_length_though_the_pad_token_occurs_in_rows(rows):
    inputs, lengths = collate_padded(rows, PAD)
    longest = max(lengths)
    assert all(t.dtype == torch.int64 and tuple(t.shape) == (len(rows), longest) for t in inputs.values())
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        rest = longest - length
        assert inputs["input_ids"][i].tolist() == row.input_ids + [PAD] * rest
        assert inputs["labels"][i].tolist() == row.labels + [-100] * rest
        assert inputs["attention_mask"][i].tolist() == [1] * length + [0] * rest


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(TOKEN, min_size=1, max_size=9), st.integers(0, 3)), min_size=1, max_size=6),
    types=st.booleans(),
)
def test_classification_batches(rows, types):
    examples = [Example(ids, [], label, "x:1", [1] * len(ids) if types else None) for ids, label in rows]
    inputs, lengths = collate_classification(examples, PAD)
    assert inputs["labels"].tolist() == [label for _, label in rows] and inputs["labels"].dtype == torch.int64
    assert inputs["attention_mask"].sum(1).tolist() == lengths == [len(ids) for ids, _ in rows]
    assert ("token_type_ids" in inputs) == types
    if types:
        assert torch.equal(inputs["token_type_ids"], inputs["attention_mask"])
