"""The readers of training data: what they find, and what they say of a file that is wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest

from ptune.data import (
    Columns,
    DataError,
    Labelled,
    Passage,
    Tagged,
    hold_out,
    read_inputs,
    read_labelled,
    read_passages,
    read_tagged,
)


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_keeps_quoted_commas_and_line_ends(tmp_path):
    path = written(tmp_path, "a.csv", 'Text,Label\r\n"one, ""two""\nthree",x\r\nfour,y\r\n')
    assert read_labelled(path) == [Labelled('one, "two"\nthree', "x"), Labelled("four", "y")]


def test_tsv_takes_quotes_literally(tmp_path):
    path = written(tmp_path, "a.tsv", 'Label\tSMS\nham\t"never closed\nspam\tsays ""hi""\u2028there\n')
    assert read_labelled(path) == [Labelled('"never closed', "ham"), Labelled('says ""hi""\u2028there', "spam")]


def test_jsonl_takes_numbers_as_labels_and_skips_blank_lines(tmp_path):
    rows = [{"label": 1, "id": 7, "text": "a"}, {"text": "b", "label": True}]
    path = written(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert read_labelled(path) == [Labelled("a", "1"), Labelled("b", "true")]


@pytest.mark.parametrize(
    ("header", "columns", "text", "label"),
    [
        ("text,label", Columns(), 0, 1),
        ("class,whatever", Columns(), 1, 0),
        ("whatever,Sentence", Columns(), 1, 0),
        ("label,text", Columns(text="label"), 0, 1),
        ("text,label", Columns(label="text"), 1, 0),
        ("a,b,c", Columns(text="c", label="a"), 2, 0),
        ("a,label,text", Columns(), 2, 1),
        ("topic,label,body,text", Columns(), 3, 1),
    ],
)
def test_columns_are_found(tmp_path, header, columns, text, label):
    cells = [f"cell {index}" for index in range(header.count(",") + 1)]
    path = written(tmp_path, "a.csv", f"{header}\n{','.join(cells)}\n")
    assert read_labelled(path, columns) == [Labelled(cells[text], cells[label])]


@pytest.mark.parametrize(
    ("name", "content", "columns", "problem"),
    [
        ("a.csv", "", Columns(), "the file is empty"),
        ("a.csv", '""\n""\n', Columns(), "no lines with anything in them"),
        ("a.csv", "text,label\n", Columns(), "a header and no lines after it"),
        ("a.csv", "text,label\none,x\ntwo\n", Columns(), ":3: expected 2 columns (text, label), got 1"),
        ("a.csv", 'text,label\n"one"o,x\n', Columns(), ":2: ',' expected after '\"'"),
        ("a.csv", "text,text\na,b\n", Columns(), ":1: a column name stands twice"),
        ("a.csv", "text,label\na,b\n", Columns(text="txt"), "no column 'txt' for the text"),
        ("a.csv", "a,b\n1,2\n", Columns(), "which column is the text? name it with --text-column"),
        ("a.csv", "text,b,c\n1,2,3\n", Columns(), "which column is the label?"),
        ("a.csv", "text;label\nb;c\n", Columns(), "which column is the text? cells are separated by commas in .csv"),
        ("a.csv", "text,topic,class\n1,2,3\n", Columns(), "which column is the label?"),
        ("a.tsv", "text\tlabel\none\tx\n\n\ttwo\n", Columns(), ":4: column 'text' is empty"),
        ("a.tsv", "text\tlabel\none\tx\ty\n", Columns(), ":2: expected 2 columns"),
        ("a.tsv", b"text\tlabel\none\tx\ntw\xff\ty\n", Columns(), ":3: not UTF-8"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"\n', Columns(), ":2: not JSON"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n[1]\n', Columns(), ":2: expected a JSON object, got list"),
        (
            "a.jsonl",
            '{"text": "a", "label": "b"}\n{"text": "c"}\n',
            Columns(),
            ":2: expected a column 'label', got text",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": "b"}\n{"text": "\\ud83d", "label": "b"}\n',
            Columns(),
            ":2: column 'text' holds",
        ),
        ("a.jsonl", '{"text": "a", "label": "b"}\n' + "[" * 100_000, Columns(), ":2: JSON that cannot be read"),
        ("a.jsonl", '{"text": "a", "label": ' + "1" * 5_000 + "}", Columns(), ":1: JSON that cannot be read"),
        ("a.txt", "text\n", Columns(), "expected a .csv, .tsv, .jsonl file"),
    ],
)
def test_malformed_tables_are_named_by_line(tmp_path, name, content, columns, problem):
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        read_labelled(path, columns)
    assert str(error.value).startswith(str(path))
    assert problem in str(error.value)


def test_small_classes_are_held_out_too():
    examples = [f"{label} {i}" for label in range(50) for i in range(4)] + [f"big {i}" for i in range(20)]
    for seed in range(3):
        kept, held = hold_out(examples, 0.1, lambda example: example.split()[0], seed)
        counts = Counter(example.split()[0] for example in held)
        assert (len(held), counts.pop("big"), max(counts.values())) == (22, 2, 1)
        assert sorted(kept + held) == sorted(examples)
    singles = [f"a {i}" for i in range(100)] + [f"{i} only" for i in range(50)]
    assert len(hold_out(singles, 0.2, lambda example: example.split()[0], 0)[1]) == 21
    with pytest.raises(ValueError, match="of 30 examples 10% cannot be held out, as each label occurs only once"):
        hold_out(examples[::4][:30], 0.1, lambda example: example.split()[0], 0)
    with pytest.raises(ValueError, match="of 4 examples 10% cannot be held out, as they are too few"):
        hold_out(examples[:4], 0.1, lambda example: example.split()[0], 0)


def test_tables_as_people_have_them(tmp_path):
    long = "long " * 40_000  # more than Python's csv takes by itself
    for name, separator in (("a.csv", ","), ("b.tsv", "\t")):
        path = written(tmp_path, name, f"\n  \nlabel{separator}text\n  \nx{separator}{long}\n")
        assert read_labelled(path) == [Labelled(long, "x")]


def test_inputs_are_columns_sentences_or_lines(tmp_path):
    assert read_inputs(written(tmp_path, "a.csv", "Label,Sentence\nx,one two\ny,three\n")) == ["one two", "three"]
    assert read_inputs(written(tmp_path, "a.tsv", "id\tq\n1\tone\n"), "q") == ["one"]
    assert read_inputs(written(tmp_path, "a.jsonl", '{"prompt": "one", "completion": "two"}')) == ["one"]
    assert read_inputs(written(tmp_path, "a.conll", "one\tO\ntwo\tB-x\n\nthree\tO\n")) == ["one two", "three"]
    assert read_inputs(written(tmp_path, "a.txt", "text\tlabel\none\n")) == ["text\tlabel", "one"]
    with pytest.raises(DataError, match=r"a\.csv: which column is the text\? name it with --text-column"):
        read_inputs(written(tmp_path, "a.csv", "a,b\nx,y\n"))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_tagged(tmp_path / "none.conll")


def test_passages_are_pairs_or_whole_texts(tmp_path):
    pairs = written(tmp_path, "a.jsonl", '{"prompt": "p ", "completion": " c"}')
    assert read_passages(pairs) == [Passage("p ", " c")]
    whole = written(tmp_path, "b.csv", "id,text\n1,once\n2,twice\n")
    assert read_passages(whole) == [Passage("", "once"), Passage("", "twice")]
    assert read_passages(whole, Columns(prompt="id")) == [Passage("1", "once"), Passage("2", "twice")]
    assert read_passages(pairs, Columns(text="completion")) == [Passage("", " c")]
    either = written(tmp_path, "c.jsonl", '{"text": "once", "source": "web", "target": "train"}')
    with pytest.raises(DataError, match="texts, or prompts and completions"):
        read_passages(either)
    assert read_passages(either, Columns(text="text")) == [Passage("", "once")]
    assert read_passages(either, Columns(prompt="source")) == [Passage("web", "train")]
    assert read_passages(either, pairs=True) == [Passage("web", "train")]


def test_pairs_alone(tmp_path):
    """For encoder-decoders, which cannot read a whole text."""
    whole, named = written(tmp_path, "a.csv", "text\nonce\n"), written(tmp_path, "b.csv", "id,text,prompt\n1,a,b\n")
    for path, columns in ((whole, Columns()), (named, Columns(text="text"))):
        with pytest.raises(DataError, match=r"expected prompts and completions, .* got a text column alone"):
            read_passages(path, columns, pairs=True)
    assert read_passages(named, Columns(completion="text"), pairs=True) == [Passage("b", "a")]
    unnamed = written(tmp_path, "c.csv", "english,german\none,eins\n")
    with pytest.raises(DataError, match="which column is the prompt"):
        read_passages(unnamed, pairs=True)
    assert read_passages(unnamed, Columns(prompt="english"), pairs=True) == [Passage("one", "eins")]


def test_conll(tmp_path):
    content = "-DOCSTART- -X- O\n\nNew NNP B-place\nYork NNP I-place\n\n\n# O\nwith space\tX\tS-odd\r\n"
    content += "10\u00a0000  O\n\u3000\tO\n"
    path = written(tmp_path, "a.conll", content)
    assert read_tagged(path) == [
        Tagged(("New", "York"), ("B-place", "I-place")),
        Tagged(("#", "with space", "10\u00a0000", "\u3000"), ("O", "S-odd", "O", "O")),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("\n \n", "the file is empty"),
        ("-DOCSTART- O\n", "no sentences in it"),
        ("one O\n\ntwo\n", ":3: expected a word and its tag, got 'two'"),
        ("one\tO\ntwo\tB_x\n", ":2: expected a tag like O, B-name or I-name, got 'B_x'"),
        ("one\tO\n\tO\n", ":2: the word is empty"),
    ],
)
def test_malformed_conll_is_named_by_line(tmp_path, content, problem):
    with pytest.raises(DataError) as error:
        read_tagged(written(tmp_path, "a.conll", content))
    assert problem in str(error.value)


def test_hold_out_keeps_shares_and_order():
    examples = [("a", i) for i in range(40)] + [("b", i) for i in range(10)] + [("c", 0)]
    kept, held = hold_out(examples, 0.2, lambda example: example[0], seed=3)
    assert sorted(kept + held) == sorted(examples)
    assert kept == sorted(kept)
    assert held == sorted(held)
    assert Counter(name for name, _ in held) == {"a": 8, "b": 2}
    assert hold_out(examples, 0.2, lambda example: example[0], seed=4)[1] != held
    assert ("c", 0) in hold_out(examples, 0.9, lambda example: example[0], seed=3)[0]


def test_hold_out_refuses_what_leaves_a_part_empty():
    with pytest.raises(ValueError, match="too few"):
        hold_out(["a"], 0.5, lambda example: example, seed=0)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        hold_out(["a", "a"], 1.0, lambda example: example, seed=0)


def test_real_files(data_folder):
    messages = read_labelled(data_folder / "sms_spam" / "sms_spam.tsv")
    assert Counter(message.label for message in messages) == {"ham": 4827, "spam": 747}
    assert {part: len(read_tagged(data_folder / "wnut17" / f"{part}.conll")) for part in ("train", "dev", "test")} == {
        "train": 3394,
        "dev": 1009,
        "test": 1287,
    }
