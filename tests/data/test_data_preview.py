"""The preview shows all of the text, marks exactly what is trained, and cannot steer a terminal."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data import Example, encode, preview, read_train_valid, segments, to_plain, to_rich
from lorakit.data import orders_task as orders
from lorakit.data.rows import Row


def chat(question, answer):
    return Row({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}, "x:1")


def test_the_marks_are_around_the_answer(chatml):
    dataset = encode([chat("hi", "hello"), chat("a", "b")], chatml)
    first, second = preview(dataset, chatml, 5)
    assert first == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("hello<|im_end|>", True),
        ("\n", False),
    ]
    assert to_plain(second) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
    assert len(preview(dataset, chatml, 1)) == 1


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aä🙂\n\u202e"), min_size=1, max_size=8), data=st.data())
def test_runs_join_to_the_text_even_where_a_character_is_split(chatml, text, data):
    ids = chatml(text, add_special_tokens=False)["input_ids"]
    on = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    example = Example(ids, [i if t else -100 for i, t in zip(ids, on, strict=True)], None, "x:1")
    runs = segments(example, chatml)
    assert "".join(piece for piece, _ in runs) == text
    assert not any("\ufffd" in piece for piece, _ in runs)


def test_control_characters_are_shown_and_not_sent(chatml):
    dataset = encode([chat("a\x1b[31mred\x07", "b\tc")], chatml)
    runs = preview(dataset, chatml, 1)[0]
    for shown in (to_plain(runs), to_rich(runs).plain):
        assert "a\\x1b[31mred\\x07" in shown and "\x1b" not in shown and "\t" in shown


def test_colours_are_green_for_trained_and_grey_for_the_rest(chatml):
    text = to_rich(preview(encode([chat("hi", "hello")], chatml), chatml, 1)[0])
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["hello<|im_end|>"] == "green" and styles["\n"] == "grey50"


def test_a_class_is_shown_as_what_is_trained(encoder):
    rows = [Row({"text": "Hello", "label": label}, "x:1") for label in ("good", "bad")]
    assert preview(encode(rows, encoder), encoder, 1)[0][-1] == ("good", True)


def test_orders_are_stable_and_the_held_out_pairs_unseen(tmp_path):
    train, valid = orders.rows()
    assert (len(train), len(valid)) == (240, 40)
    assert orders.rows() == (train, valid) and orders.rows(seed=1) != (train, valid)

    def pairs(rows):
        answers = [json.loads(row["messages"][1]["content"]) for row in rows]
        return {(answer["name"], answer["drink"]) for answer in answers}

    assert not pairs(train) & pairs(valid) and len(pairs(valid)) == 40
    for i in (0, 1):  # every name and every drink of the held-out rows is known from other pairs
        assert {pair[i] for pair in pairs(valid)} <= {pair[i] for pair in pairs(train)}
    read_train, read_valid = read_train_valid(orders.write(tmp_path / "orders"))
    assert [row.fields for row in read_train] == train and [row.fields for row in read_valid] == valid


def test_each_order_says_what_its_answer_says():
    for row in (row for part in orders.rows() for row in part):
        order, answer = row["messages"][0]["content"], json.loads(row["messages"][1]["content"])
        number = {str(answer["qty"]), orders.NUMBERS[answer["qty"] - 1], *(["a"] if answer["qty"] == 1 else [])}
        words = set(order.replace(",", " ").replace("?", " ").split())
        assert {answer["name"], answer["size"]} <= words and answer["drink"] in order and number & words
