"""The demo's corpora, and the demo itself at a hundredth of its budget."""

import ast
import inspect
import io
import sysconfig
from pathlib import Path

import pytest
from rich.console import Console

from ptune import corpora
from ptune.data import Labelled, Tagged
from ptune.demo import _majority, run_demo
from ptune.tasks import Classification, Tagging

from .tiny import word_tokenizer


def test_topics_hold_out_whole_modules():
    train, held_out = corpora.topics()
    assert len(train) > 1000
    assert len(held_out) > 400
    assert {example.label for example in train} == {example.label for example in held_out} == set(corpora.MODULES)
    assert not {example.text for example in train} & {example.text for example in held_out}
    for area, (learnt, kept) in corpora.MODULES.items():
        assert not set(learnt) & set(kept), area
    by_text = {example.text: example.label for example in held_out}
    source = Path(sysconfig.get_path("stdlib"), "statistics.py").read_text(encoding="utf-8")
    median = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "median")
    assert by_text[" ".join(inspect.cleandoc(ast.get_docstring(median)).split()[:40])] == "numbers"


def test_code_is_what_the_manual_quotes(monkeypatch):
    manual = {
        "a": 'Held out\n********\n\nThis is "one()".',
        "b": 'A "for" loop\nruns. \n\n   x ::= "y" | "z".\n\n   print("Hello.")\n\n'
        'No code here. The "is not" operator, and "x.y": right.',
        "c": 'This is "one()". An odd " is left out.',
    }
    monkeypatch.setattr(corpora, "chapters", manual)
    train, held_out = corpora.code()
    assert [e.words for e in held_out] == []  # it stands in training
    assert [e.words for e in train] == [
        ("A", "for", "loop", "runs", "."),
        ("The", "is", "not", "operator", ",", "and", "x", ".", "y", ":", "right", "."),
        ("This", "is", "one", "(", ")", "."),
    ]
    assert train[0].tags == ("O", "B-code", "O", "O", "O")
    assert train[1].tags == ("O", "B-code", "I-code", *"OOO", "B-code", "I-code", "I-code", *"OOO")


def test_code_is_in_every_python():
    train, held_out = corpora.code()
    assert len(train) > 700
    assert len(held_out) > 200
    assert not {example.words for example in train} & {example.words for example in held_out}


def test_the_majority_class_by_hand():
    tagging = Tagging(word_tokenizer(), 20, ["O", "B-code"])
    held_out = [Tagged(("one", "two"), ("B-code", "O")), Tagged(("one", "red", "a"), ("B-code", "B-code", "O"))]
    scores = _majority(tagging, [Tagged(("one", "in", "two"), ("B-code", "O", "B-code"))], held_out)
    assert (scores["entity_precision"], scores["entity_recall"]) == (3 / 5, 1)
    task = Classification(word_tokenizer(), 20, ["x", "y"])
    texts = [Labelled("one", "x"), Labelled("two", "y"), Labelled("red", "y")]
    assert _majority(task, texts, texts)["accuracy"] == pytest.approx(2 / 3)


def test_demo_prints_a_table_for_each_task(minilm):
    output = io.StringIO()
    run_demo(Console(file=output, width=80), budget=0.01)
    lines = output.getvalue().splitlines()
    assert not any("…" in line for line in lines if line.startswith(("┃", "│")))
    for row in ("majority class", "head only", "shallow prompts", "deep prompts"):
        assert sum(f"│ {row} " in line for line in lines) == 2, output.getvalue()
    for row in ("head only", "shallow prompts", "deep prompts"):  # said as they finish: this is no terminal
        assert sum(line.startswith(f"  {row}: ") for line in lines) == 2, output.getvalue()
    # 16 rows for the text and for each of 6 blocks, of width 384, and a head for six areas
    assert any(f"{16 * 7 * 384 + 6 * 385:,}" in line for line in lines)
    assert sum("bit for bit what they were" in line for line in lines) == 2
