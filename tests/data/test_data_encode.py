"""Plain text, documents, classes, lengths, counts: what `encode` makes of rows besides conversations."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import DataError, UsageError
from lorakit.data import encode, overlap, plain_prompt_ids, write_prompt
from lorakit.data.dataset import percentile
from lorakit.data.rows import BadRow, Row, Rows


def rows_of(*fields):
    return [Row(field, f"x:{i}") for i, field in enumerate(fields, 1)]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def trained_text(tokenizer, example):
    return tokenizer.decode(
        [token for token, label in zip(example.input_ids, example.labels, strict=True) if label >= 0]
    )


PAIR_TEXT = st.text(st.sampled_from("ab \n?4ä🙂|<"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(prompt=PAIR_TEXT, completion=PAIR_TEXT, other=st.tuples(PAIR_TEXT, PAIR_TEXT))
def test_pairs_on_a_base_model_are_the_prompt_then_the_trained_completion_and_end(bare, prompt, completion, other):
    dataset = encode(rows_of(*({"prompt": p, "completion": c} for p, c in [(prompt, completion), other])), bare)
    example = dataset.examples[0]
    head = plain_prompt_ids(bare, prompt, dataset.prompt_format)
    assert example.input_ids[: len(head)] == head and head[0] == bare.bos_token_id  # what generation is given
    assert example.labels[: len(head)] == [-100] * len(head) and min(example.labels[len(head) :]) >= 0
    assert bare.decode(head[1:]) == write_prompt(dataset.prompt_format, prompt)
    assert trained_text(bare, example) == completion + "<|endoftext|>"


def test_prompt_and_completion_do_not_run_into_each_other(bare, chatml):
    apart = encode(rows_of({"prompt": "2+2?", "completion": "4"}, {"prompt": "a ", "completion": "b"}), bare)
    assert apart.prompt_format == "{prompt}\n"
    joined = encode(rows_of({"prompt": "2+2? ", "completion": "4"}, {"prompt": "a", "completion": " b"}), bare)
    assert joined.prompt_format == "{prompt}"
    alpaca = encode(rows_of({"instruction": "Add", "input": "2 2", "output": "4"}), bare)
    assert bare.decode(alpaca.examples[0].input_ids[1:]) == (
        "### Instruction:\nAdd\n\n2 2\n\n### Response:\n4<|endoftext|>"
    )
    assert any("no chat template" in notice for notice in alpaca.stats.notices)
    by_template = encode(rows_of({"instruction": "Add", "input": "2 2", "output": "4"}), chatml)
    assert by_template.prompt_format is None and by_template.facts.template
    as_text = encode(rows_of({"prompt": "2+2?", "completion": "4"}), chatml, task="completion")
    assert chatml.decode(as_text.examples[0].input_ids) == "2+2?\n4<|im_end|>"


def test_text_of_a_pair_never_becomes_a_control_token(bare):
    dataset = encode(rows_of({"prompt": "a<|endoftext|>", "completion": "<|bos|>b"}), bare)
    ids = dataset.examples[0].input_ids
    assert [ids.count(i) for i in (bare.bos_token_id, bare.eos_token_id)] == [1, 1]
    assert bare.decode(ids) == "<|bos|>a<|endoftext|>\n<|bos|>b<|endoftext|>" and dataset.stats.control_rows == 1


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(PAIR_TEXT, min_size=1, max_size=5), limit=st.integers(2, 9))
def test_documents_are_split_and_each_token_is_predicted_once(bare, texts, limit):
    dataset = encode(rows_of(*({"text": text} for text in texts)), bare, max_length=limit)
    assert max(dataset.lengths) <= limit
    long = 0
    for i, text in enumerate(texts, 1):
        whole = [*bare(text)["input_ids"], bare.eos_token_id]
        pieces = [example for example in dataset.examples if example.where == f"x:{i}"]
        long += len(whole) > limit
        assert [label for piece in pieces for label in piece.labels if label >= 0] == whole[1:]
        assert pieces[0].input_ids + [token for piece in pieces[1:] for token in piece.input_ids[1:]] == whole
        assert all(piece.labels[0] == -100 and piece.labels[1:] == piece.input_ids[1:] for piece in pieces)
    assert dataset.stats.split == long and dataset.stats.truncated == 0
    assert dataset.stats.trained_tokens == sum(len(bare(text)["input_ids"]) for text in texts)


def test_documents_may_be_rendered_beforehand(chatml):
    text = "<|im_start|>user\na<|im_end|>"
    dataset = encode(rows_of({"text": text}), chatml)
    assert dataset.examples[0].input_ids == chatml(text)["input_ids"]  # one end token, not two
    assert any("spell control tokens" in notice for notice in dataset.stats.notices)


LABELLED = [
    {"sentence1": "Hello you", "sentence2": "the name", "label": "yes"},
    {"sentence1": "I am", "sentence2": "fine", "label": "no"},
]


def test_classification_is_what_the_tokenizer_itself_makes_of_texts(encoder):
    dataset = encode(rows_of(*LABELLED), encoder)
    assert dataset.labels == ["no", "yes"] and [example.label for example in dataset.examples] == [1, 0]
    for row, example in zip(LABELLED, dataset.examples, strict=True):
        tokens = encoder(row["sentence1"], row["sentence2"])
        assert (example.input_ids, example.token_type_ids) == (tokens["input_ids"], tokens["token_type_ids"])
        assert example.labels == []
    single = encode(rows_of({"text": "a", "label": "x"}, {"text": "b", "label": "y"}), encoder)
    assert single.examples[0].token_type_ids is None


def test_a_pair_is_two_lines_where_the_tokenizer_has_no_separator(bare):
    dataset = encode(rows_of(*LABELLED), bare)
    assert [e.input_ids for e in dataset.examples] == bare(["Hello you\nthe name", "I am\nfine"])["input_ids"]
    assert dataset.examples[0].token_type_ids is None


def test_classification_cuts_texts_but_keeps_the_special_tokens(encoder):
    long = {"sentence1": "name " * 50, "sentence2": "order " * 50, "label": "yes"}
    dataset = encode(rows_of(LABELLED[1], long, LABELLED[0]), encoder, max_length=20)
    cut = dataset.examples[1]
    expected = encoder(long["sentence1"], long["sentence2"], truncation=True, max_length=20)
    assert (cut.input_ids, cut.token_type_ids) == (expected["input_ids"], expected["token_type_ids"])
    assert (dataset.stats.truncated, dataset.stats.dropped, len(dataset)) == (1, 0, 3)


def test_special_tokens_in_a_text_to_classify_are_text(encoder):
    rows = rows_of({"text": "a [SEP] [PAD] b", "label": 0}, {"text": "a", "label": 1})
    ids = encode(rows, encoder).examples[0].input_ids
    assert ids.count(encoder.sep_token_id) == 1 and ids.count(encoder.pad_token_id) == 0


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([2, 10, 2, 1], ["1", "2", "10"]),
        (["10", "9", "10"], ["9", "10"]),
        (["b", "a", "c"], ["a", "b", "c"]),
        ([True, False], ["False", "True"]),
        ([0.0, 1.0], ["0", "1"]),
    ],
)
def test_classes_are_in_a_fixed_order(encoder, found, names):
    dataset = encode(rows_of(*({"text": "a", "label": label} for label in found)), encoder)
    assert dataset.labels == names
    spelled = [str(int(label)) if isinstance(label, float) else str(label) for label in found]
    assert [names[example.label] for example in dataset.examples] == spelled


def test_given_classes_keep_their_order_and_unknown_ones_are_named(encoder):
    rows = rows_of({"text": "a", "label": "yes"}, {"text": "a", "label": "no"}, {"text": "a", "label": 0})
    dataset = encode(rows, encoder, labels=["yes", "no"])
    assert dataset.labels == ["yes", "no"] and [example.label for example in dataset.examples] == [0, 1, 0]
    with pytest.raises(DataError, match="x:2  unknown class 'nope'; did you mean 'no'"):
        encode(rows_of({"text": "a", "label": "yes"}, {"text": "a", "label": "nope"}), encoder, labels=["yes", "no"])
    with pytest.raises(DataError, match="at least 2 classes"):
        encode(rows_of({"text": "a", "label": "yes"}), encoder)


def test_long_conversations_keep_their_head_and_rows_without_an_answer_are_dropped(chatml):
    rows = rows_of(chat("a", "b"), chat("Hello " * 100, "never seen"), chat("a", "Hello " * 100))
    dataset = encode(rows, chatml, max_length=40)
    whole = encode(rows, chatml, max_length=10**5)
    assert [example.where for example in dataset.examples] == ["x:1", "x:3"]
    assert dataset.examples[1].input_ids == whole.examples[2].input_ids[:40]
    assert dataset.examples[1].labels == whole.examples[2].labels[:40]
    assert (dataset.stats.truncated, dataset.stats.dropped, dataset.stats.kept) == (2, 1, 2)
    assert dataset.stats.bad_rows[0].where == "x:2" and "behind max_length 40" in dataset.stats.bad_rows[0].reason
    with pytest.raises(DataError, match="0 usable rows") as error:
        encode(rows[1:2], chatml, max_length=40)
    assert "train.max_length" in str(error.value)


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 100), min_size=1, max_size=60), share=st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_the_smallest_value_that_covers_the_share(values, share):
    expected = min(v for v in values if sum(w <= v for w in values) >= share * len(values) - 1e-9)
    assert percentile(sorted(values), share) == expected


def test_the_length_limit_found_by_looking(bare):
    def limit(lengths, **options):  # tokens of a document: BOS, letters that never merge, end
        return encode(rows_of(*({"text": "@" * (n - 2)} for n in lengths)), bare, **options).max_length

    assert limit([50] * 10) == 50  # nothing is cut without need
    assert limit([50] * 980 + [3000] * 20) == 1024
    assert limit([50] * 999 + [3000]) == 64  # the 99th percentile, to the next multiple of 64
    assert limit([300] * 10, model_limit=128) == 128
    assert limit([300] * 10, max_length=200) == 200
    for wrong in (1, 0, 129):
        with pytest.raises(UsageError, match="max_length"):
            limit([50], max_length=wrong, model_limit=128)


def test_counts_duplicates_overlap_and_fingerprint(chatml):
    rows = rows_of(chat("a", "b"), chat("c", "d"), chat("a", "b"), chat("e", "f"))
    source = Rows(rows, [BadRow("x:9", "broken")], ["read"])
    train = encode(source, chatml)
    stats = train.stats
    assert (stats.rows, stats.kept, stats.duplicates, stats.dropped) == (5, 4, 1, 1)
    assert stats.tokens == sum(len(e.input_ids) for e in train.examples) == sum(train.lengths)
    assert stats.trained_tokens == sum(label >= 0 for e in train.examples for label in e.labels)
    assert stats.notices[0] == "read" and json.loads(json.dumps(stats.as_dict()))["bad_rows"][0]["reason"] == "broken"
    valid = encode(rows_of(chat("e", "f"), chat("c", "other"), chat("g", "h")), chatml)
    assert overlap(train, valid) == 1
    moved = encode([Row(row.fields, "elsewhere") for row in rows], chatml)
    assert moved.fingerprint == train.fingerprint
    prints = {
        encode(other, chatml).fingerprint
        for other in (rows, rows[::-1], rows[:3], rows_of(chat("ab", "b"), *(r.fields for r in rows[1:])))
    }
    assert len(prints) == 4


def test_rows_made_in_python(chatml):
    dataset = encode(Rows.of([chat("a", "b"), chat("c", "d")]), chatml)
    assert [example.where for example in dataset.examples] == ["row 1", "row 2"]
    with pytest.raises(DataError, match="row 2  no column 'messages'"):
        encode(Rows.of([chat("a", "b"), {"text": "c"}]), chatml)


def test_examples_behave_as_a_sequence(chatml):
    examples = encode(rows_of(*(chat(str(i), "b") for i in range(5))), chatml).examples
    assert [e.where for e in examples] == [f"x:{i}" for i in range(1, 6)]
    assert examples[-1] == examples[4] and examples[1:4:2] == [examples[1], examples[3]]
    with pytest.raises(IndexError):
        examples[5]


def test_a_large_set_is_tokenised_in_seconds(chatml):
    import time

    rows = rows_of(
        *(chat(f"order {i} for Maya, two green teas", f'{{"name": "Maya", "qty": {i}}}') for i in range(3000))
    )
    begin = time.process_time()
    dataset = encode(rows, chatml)
    assert len(dataset) == 3000 and math.isfinite(dataset.stats.tokens)
    assert time.process_time() - begin < 10  # takes about 1
