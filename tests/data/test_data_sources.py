"""Reading: every format gives the same rows, every fault names file, line and column, nothing hangs or fills memory."""

import gzip
import importlib.util
import json
import os
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import DataError, LorakitError, UsageError
from lorakit.data import hold_out, read, read_train_valid, splits
from lorakit.data.rows import Row

ROWS = [
    {"text": 'first, "quoted"', "label": "a"},
    {"text": "zwei\tTabs: ä 🙂", "label": "b"},
    {"text": "3", "label": "a"},
]


def write_csv(rows, separator):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(rows[0]), *(separator.join(cell(value) for value in row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


FILES = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "ndjson": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "json": json.dumps(ROWS, indent=1),
    "csv": write_csv(ROWS, ","),
    "tsv": write_csv(ROWS, "\t"),
}


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("wrap", [str, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_gives_the_same_rows(tmp_path, suffix, wrap, packed):
    content = wrap(FILES[suffix]).encode()
    path = tmp_path / f"d.{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert [row.fields for row in read(path)] == ROWS


def test_rows_say_where_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}\n')
    (tmp_path / "a.json").write_text('[\n{"text": "x"},\n\n{"text":\n "y"}]')
    (tmp_path / "a.csv").write_text('text,label\nx,1\n"two\nlines",2\nz,3\n')
    assert [row.where for row in read("a.jsonl")] == ["a.jsonl:2", "a.jsonl:4"]
    assert [row.where for row in read("a.json")] == ["a.json:2", "a.json:4"]
    assert [row.where for row in read("a.csv")] == ["a.csv:2", "a.csv:3", "a.csv:5"]


GOOD = b'{"text": "fine"}\n'
FAULTS = {
    "broken": ("jsonl", GOOD + b'{"text": "a" "b"}\n' + GOOD, ":2:14", "broken JSON"),
    "cut off": ("jsonl", GOOD + b'{"text": "a', ":2:10", "broken JSON"),
    "not utf-8": ("jsonl", GOOD + '{"text": "ä'.encode() + b'\xff"}\n', ":2:12", "0xff is not UTF-8"),
    "key twice": ("jsonl", GOOD + b'{"text": "a", "text": "b"}\n', ":2:15", "'text' is given twice"),
    "deep": ("jsonl", GOOD + b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", ":2:1", "nested deeper"),
    "less deep": ("jsonl", GOOD + b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}\n", ":2:1", "nested deeper"),
    "NaN": ("jsonl", GOOD + b'{"text": NaN}\n', ":2:1", "NaN"),
    "surrogate": ("jsonl", GOOD + b'{"text": "\\ud800"}\n', ":2:11", "surrogate"),
    "long number": ("jsonl", GOOD + b'{"text": ' + b"1" * 5000 + b"}\n", ":2:1", "broken JSON"),
    "number": ("jsonl", GOOD + b"5\n", ":2", "a number, not an object"),
    "null": ("jsonl", GOOD + b"null\n", ":2", "null, not an object"),
    "two objects": ("jsonl", GOOD + GOOD.strip() + GOOD, ":2:17", "more text"),
    "array row": ("json", b'[{"text": "a"},\n 7]', ":2:2", "a number, not an object"),
    "cell count": ("csv", b"text,label\na,b\nc\n", ":3", "1 cells where the header has 2"),
    "quote": ("csv", b'text,label\n"a"b,c\nd,e\n', ":2", "broken row"),
    "open quote": ("csv", b'text,label\na,b\n"c,d\n', ":3", "broken row"),
    "tsv cells": ("tsv", b"text\tlabel\na\tb\nc\n", ":3", "1 cells where the header has 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, name):
    suffix, content, place, reason = FAULTS[name]
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path}{place}  " in str(error.value) and reason in str(error.value)
    assert "(1 of " in str(error.value) and "--skip-bad-rows" in str(error.value)
    rows = read(path, skip_bad_rows=True)
    assert len(rows) >= 1
    assert [bad.where for bad in rows.bad] == [f"{path}{place}"]


FATAL = {
    "utf-16": ("jsonl", GOOD.decode().encode("utf-16"), ":1:1", "UTF-16"),
    "utf-16 without mark": ("csv", "text\na\n".encode("utf-16-le"), ":1:1", "UTF-16"),
    "empty": ("jsonl", b"", "", "0 usable rows"),
    "blank": ("jsonl", b"\n \n\r\n", "", "0 usable rows"),
    "empty array": ("json", b" [ ] ", "", "0 usable rows"),
    "only a header": ("csv", b"text,label\n", "", "0 usable rows"),
    "array cut off": ("json", b'[{"text": "a"},\n{"text"', ":2:8", "broken JSON"),
    "no comma": ("json", b'[{"text": "a"}\n{"text": "b"}]', ":2:1", "expected ','"),
    "scalar": ("json", b"5", ":1:1", "expected an array"),
    "bad bytes in array": ("json", b'[{"text": "a"},\n{"text": "\xc3"}]', ":2:11", "0xc3 is not UTF-8"),
    "header twice": ("csv", b"text,text\na,b\n", ":1", "twice"),
    "unknown": ("pkl", b"cos\nsystem\n", "", "not read from .pkl"),
    "script": ("py", b"raise SystemExit", "", "not read from .py"),
    "no gzip": ("jsonl.gz", b"no gzip", "", "cannot be read"),
    "gzip cut off": ("jsonl.gz", gzip.compress(os.urandom(9999).hex().encode())[:-500], "", "cannot be read"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_cannot_be_read_at_all(tmp_path, name):
    suffix, content, place, reason = FATAL[name]
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError) as error:
            read(path, skip_bad_rows=skip)
        assert f"{path}{place}" in str(error.value) and reason in str(error.value)


def test_bombs_and_endless_lines_are_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.data.textfile.GZIP_FREE", 2**20)
    monkeypatch.setattr("lorakit.data.textfile.BLANK_LIMIT", 10**4)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 2**20, 9))
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2**26, 1))
    (tmp_path / "blank.jsonl").write_bytes(b"\n" * 2**21)
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a" * (17 * 2**20) + b'"}\n')
    begin = time.process_time()
    reasons = {
        "bomb.jsonl.gz": "unfolds to more",
        "bomb.json.gz": "unfolds",
        "blank.jsonl": "blank",
        "line.jsonl": "16 MiB",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=reason):
            read(tmp_path / name)
    assert time.process_time() - begin < 10


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "pipe.jsonl")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_give_rows_or_a_data_error(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray(FILES[suffix].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
        content = content or bytearray(b" ")
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        rows = read(path, skip_bad_rows=True)
    except LorakitError as error:
        assert isinstance(error, DataError)
    else:
        assert all(isinstance(row.fields, dict) and row.where.startswith(str(path)) for row in rows)


def test_glue_files_with_unbalanced_quotes(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\n"so bad \t0\nhe said "no" \t0\n"a "b"\t1\n')
    rows = read(path)
    assert [row.fields["sentence"] for row in rows] == ['"so bad ', 'he said "no" ', '"a "b"']
    assert any("QUOTE_NONE" in notice for notice in rows.notices)


def test_a_tsv_cell_may_hold_tabs_and_lines_when_quoted(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text('text\tlabel\n"a\tb\nc\td"\t0\ne\t1\n')
    assert [row.fields for row in read(path)] == [{"text": "a\tb\nc\td", "label": "0"}, {"text": "e", "label": "1"}]


def test_directories_of_splits(tmp_path):
    (tmp_path / "train-00000-of-00002.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "x.csv").write_text("text\nc\n")
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(b'[{"text": "d"}]'))
    (tmp_path / "notes.txt").write_text("no data")
    assert splits(tmp_path) == {"train", "valid", "test"}
    texts = {split: [row.fields["text"] for row in read(tmp_path, split)] for split in ("train", "valid", "test")}
    assert texts == {"train": ["a", "b"], "valid": ["c"], "test": ["d"]}
    train, valid = read_train_valid(tmp_path)
    assert (len(train), len(valid)) == (2, 1)


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    for path, hint in ((tmp_path / "trian.jsonl", "train.jsonl"), ("no/such.jsonl", "hf:no/such.jsonl")):
        with pytest.raises(DataError, match="does not exist") as error:
            read(path)
        assert hint in str(error.value)
    with pytest.raises(DataError, match="no valid split"):
        read(tmp_path, "valid")
    with pytest.raises(UsageError, match="unknown split"):
        read(tmp_path, "dev2")
    assert read_train_valid(tmp_path)[1] is None


def test_a_number_behind_the_path_draws_rows(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(100)))
    drawn = [int(row.fields["text"]) for row in read(f"{path}#10")]
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and drawn != list(range(10))
    assert drawn == [int(row.fields["text"]) for row in read(f"{path}#10")]
    assert "10 of 100 rows" in read(f"{path}#10").notices[0]
    assert len(read(f"{path}#1000")) == 100
    with pytest.raises(UsageError):
        read(f"{path}#0")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package is installed")
def test_parquet_names_the_extra(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    for source in (tmp_path / "d.parquet", "hf:someone/something"):
        with pytest.raises(UsageError, match="cannot be read") as error:
            read(source)
        assert "lorakit[data]" in str(error.value)


@settings(deadline=None)
@given(
    texts=st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 9),
)
def test_holding_out_splits_by_content(texts, fraction, seed):
    rows = [Row({"text": text}, f"x:{i}") for i, text in enumerate(texts)]
    try:
        train, valid = hold_out(rows, fraction, seed)
    except DataError:  # everything held out, as with one text many times
        assert len(set(texts)) < 3 or fraction > 0.3
        return
    assert sorted(r.where for r in (*train, *valid)) == sorted(r.where for r in rows)  # each row on one side
    assert not {r.fields["text"] for r in train} & {r.fields["text"] for r in valid}  # equal rows on the same
    assert len(valid) >= max(1, round(len(rows) * fraction))
    if len(set(texts)) == len(texts):
        assert len(valid) == max(1, round(len(rows) * fraction))
    backwards = hold_out(rows[::-1], fraction, seed)[1]
    assert {r.where for r in backwards} == {r.where for r in valid}  # the order of the file plays no part


def test_parquet_and_arrow_give_the_rows_a_jsonl_file_would(tmp_path):
    pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    table = pa.table({"text": ["a", "b", None], "label": [0, 1, -1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    expected = [{"text": "a", "label": "neg"}, {"text": "b", "label": "pos"}, {"label": -1}]
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pa.ipc.new_stream(str(tmp_path / "validation.arrow"), table.schema) as stream:
        stream.write_table(table)
    train, valid = read_train_valid(tmp_path)
    assert [row.fields for row in train] == [row.fields for row in valid] == expected
    assert train[1].where.endswith("train-00000-of-00001.parquet:2")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(tmp_path / "broken.parquet")
