"""Formats: found by looking, overridden by name or by a map of columns; every row that disagrees is named."""

import pytest

from lorakit.core.errors import DataError, UsageError
from lorakit.data import encode, find_format, find_task, parse_rows
from lorakit.data.formats import Chat, Labelled, Pair, Text, rename_columns
from lorakit.data.rows import Row

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def parsed(fields, format=None):
    rows, format = rename_columns([Row(fields, "x:1")], format)
    fmt = find_format(rows, format)
    good, bad = parse_rows(rows, fmt)
    assert not bad, bad
    return fmt, good[0][0]


EXCHANGE = Chat([USER, ANSWER], [False, True])
KNOWN = [
    ("messages (OpenAI chat)", "sft", {"messages": [USER, ANSWER], "id": 1}, EXCHANGE),
    (
        "conversations (ShareGPT)",
        "sft",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        EXCHANGE,
    ),
    ("prompt + completion", "sft", {"prompt": "hi", "completion": "hello"}, Pair("hi", "hello")),
    ("prompt + completion", "sft", {"prompt": [USER], "completion": [ANSWER]}, EXCHANGE),
    (
        "instruction + output (Alpaca)",
        "sft",
        {"instruction": "Add", "input": "2 2", "output": "4"},
        Pair("Add\n\n2 2", "4"),
    ),
    ("instruction + output (Alpaca)", "sft", {"instruction": "Add", "input": "", "output": "4"}, Pair("Add", "4")),
    ("text (plain documents)", "completion", {"text": "a b"}, Text("a b")),
    ("classification (text + label)", "classification", {"text": "a", "label": 1}, Labelled("a", None, 1)),
    ("classification (sentence + label)", "classification", {"sentence": "a", "label": "1"}, Labelled("a", None, "1")),
    (
        "classification (sentence1 + sentence2 + label)",
        "classification",
        {"index": "0", "sentence1": "a", "sentence2": "b", "label": "entailment"},
        Labelled("a", "b", "entailment"),
    ),
    ("question and answer, taken as prompt and completion", "sft", {"question": "q", "answer": "a"}, Pair("q", "a")),
    ("input and output, taken as prompt and completion", "sft", {"input": "q", "output": "a"}, Pair("q", "a")),
    ("query and response, taken as prompt and completion", "sft", {"query": "q", "response": "a"}, Pair("q", "a")),
    ("mr and ref, taken as prompt and completion", "sft", {"mr": "q", "ref": "a"}, Pair("q", "a")),
]


@pytest.mark.parametrize(("words", "task", "fields", "record"), KNOWN)
def test_formats_are_found_by_looking(words, task, fields, record):
    fmt, found = parsed(fields)
    assert (fmt.words, fmt.task, found) == (words, task, record)
    assert find_task([Row(fields, "x:1")]) == task


def test_a_named_format_or_a_map_of_columns_wins():
    both = {"text": "document", "label": "a", "q": "hi", "a": "hello"}
    assert parsed(both)[1] == Labelled("document", None, "a")
    assert parsed(both, "text")[1] == Text("document")
    assert parsed(both, "prompt=q,completion=a")[1] == Pair("hi", "hello")
    assert parsed({"chat": [USER, ANSWER]}, "messages=chat")[1] == EXCHANGE
    assert parsed({"messages": [USER, ANSWER]}, "OpenAI")[1] == EXCHANGE


def test_unknown_formats_and_columns_say_what_there_is():
    rows = [Row({"messages": [USER, ANSWER]}, "x:1")]
    with pytest.raises(UsageError, match="unknown format 'mesages'") as error:
        find_format(rows, "mesages")
    assert "did you mean 'messages'?" in str(error.value)
    with pytest.raises(DataError, match="no known format") as error:
        find_format([Row({"promt": "a", "completions": "b"}, "x:1")])
    assert "prompt=promt,completion=completions" in str(error.value)
    with pytest.raises(DataError) as error:
        find_format([Row({"prompt": "a", "chosen": "b", "rejected": "c"}, "x:1")])
    assert "completion=chosen" in str(error.value)
    with pytest.raises(UsageError, match="no map of columns"):
        rename_columns(rows, "a=b=c")


MESSAGES = {
    "messages are text, not a list": "hi",
    "the list of messages is empty": [],
    "message 2: unknown role 'assitant'; did you mean 'assistant'?": [USER, {"role": "assitant", "content": "x"}],
    "message 1: the role is null": [{"content": "x"}, ANSWER],
    "message 1: text, not an object": ["hi", ANSWER],
    "message 1: the content of 'user' is empty": [{"role": "user", "content": " \n"}, ANSWER],
    "message 2: the content of 'assistant' is empty": [USER, {"role": "assistant", "content": ""}],
    "message 2: the content is null, not text": [USER, {"role": "assistant", "content": None}],
    "message 2: the content is a number, not text": [USER, {"role": "assistant", "content": 5}],
    "message 1: the content has 'image_url' as a part": [
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        ANSWER,
    ],
    "2 system messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER, ANSWER],
    "the system message is number 2": [USER, {"role": "system", "content": "a"}, ANSWER],
    "no message is from 'assistant'; nothing to train on in this row": [USER],
    "last message is from 'user'; nothing to train on in this row": [USER, ANSWER, USER],
    "no answer is trained; nothing to train on in this row": [USER, {**ANSWER, "train": False}],
    "nothing comes before the answer; nothing to train on in this row": [ANSWER],
    "message 2: weight is 0.5": [USER, {**ANSWER, "weight": 0.5}],
}


@pytest.mark.parametrize("reason", MESSAGES)
def test_bad_conversations_name_the_row_and_the_turn(chatml, reason):
    good = Row({"messages": [USER, ANSWER]}, "x:1")
    rows = [good, Row({"messages": MESSAGES[reason]}, "x:2"), good, Row({"messages": MESSAGES[reason]}, "x:4")]
    with pytest.raises(DataError) as error:
        encode(rows, chatml)
    assert str(error.value).startswith(f"x:2  {reason}") and "(2 of 4 rows)" in str(error.value)
    assert "x:2, x:4" in str(error.value) and "--skip-bad-rows" in str(error.value)
    dataset = encode(rows, chatml, skip_bad_rows=True)
    assert (len(dataset), dataset.stats.rows, dataset.stats.dropped) == (2, 4, 2)
    assert [bad.where for bad in dataset.stats.bad_rows] == ["x:2", "x:4"]


def test_messages_are_brought_to_one_form():
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    rows = [
        {"role": "developer", "content": "be nice"},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": parts, "train": True, "weight": 1.0},
    ]
    _, chat = parsed({"messages": rows, "tools": [{"type": "function"}]})
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[1] == {"role": "user", "content": "hi"}
    assert chat.messages[4] == {"role": "assistant", "content": "hello"}
    assert chat.trained == [False, False, False, False, True]
    assert chat.tools == [{"type": "function"}]
    _, chat = parsed({"conversations": [USER, ANSWER], "system": "be nice"})
    assert chat.messages[0] == {"role": "system", "content": "be nice"} and chat.trained == [False, False, True]


def test_answers_in_a_list_prompt_are_context():
    _, chat = parsed({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert chat.trained == [False, False, False, True]


@pytest.mark.parametrize(
    ("first", "odd", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "no column 'completion'"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5}, "'completion' is a number, not text"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}, "'output' is empty"),
        ({"text": "a"}, {"text": None}, "'text' is null, not text"),
        ({"text": "a"}, {"messages": [USER, ANSWER]}, "no column 'text'"),
        ({"text": "a", "label": 0}, {"text": "b", "label": 0.5}, "'label' is 0.5, not a class"),
        ({"text": "a", "label": 0}, {"text": "b", "label": -1}, "'label' is -1, which marks a row without a label"),
        ({"text": "a", "label": 0}, {"text": "b"}, "no column 'label'"),
    ],
)
def test_rows_that_disagree_with_the_format_are_named(bare, first, odd, reason):
    with pytest.raises(DataError) as error:
        encode([Row(first, "x:1"), Row(first, "x:2"), Row(odd, "x:3")], bare)
    assert f"x:3  {reason}" in str(error.value) and "(1 of 3 rows)" in str(error.value)


def test_what_was_guessed_or_not_used_is_said(chatml):
    dataset = encode([Row({"question": "q", "answer": "a", "context": "c"}, "x:1")], chatml)
    assert any("guessed" in notice for notice in dataset.stats.notices)
    assert "columns not used: context" in dataset.stats.notices


def test_a_task_that_cannot_use_the_rows_is_a_usage_error(chatml):
    chat, text = Row({"messages": [USER, ANSWER]}, "x:1"), Row({"text": "a"}, "x:1")
    for rows, task in (([chat], "completion"), ([chat], "classification"), ([text], "sft"), ([text], "regression")):
        with pytest.raises(UsageError, match=rf"train.task: .*{task}"):
            encode(rows, chatml, task=task)
