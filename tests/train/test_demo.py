"""The demo's corpus, and the demo itself at a hundredth of its budget."""

import ast
import inspect
import io
import sysconfig
from pathlib import Path

from rich.console import Console

from ptune import docstrings
from ptune.demo import run_demo


def test_topics_hold_out_whole_modules():
    train, held_out = docstrings.topics()
    assert len(train) > 1000
    assert len(held_out) > 400
    assert {example.label for example in train} == {example.label for example in held_out} == set(docstrings.MODULES)
    assert not {example.text for example in train} & {example.text for example in held_out}
    for area, (learnt, kept) in docstrings.MODULES.items():
        assert not set(learnt) & set(kept), area
    by_text = {example.text: example.label for example in held_out}
    source = Path(sysconfig.get_path("stdlib"), "statistics.py").read_text(encoding="utf-8")
    median = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "median")
    assert by_text[" ".join(inspect.cleandoc(ast.get_docstring(median)).split()[:40])] == "numbers"


def test_parameters_are_the_functions_own(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text(
        "class A:\n"
        '    def run(self, text, *rest, key=None, **more):\n        """Reads text by key, self and more and other."""\n'
        'def none():\n    """Has no text to speak of."""\n'
        'async def two(a, /, text):\n    """Only text: the_text is b."""\n'
    )
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(docstrings, "MODULES", {"x": (["one"], ["absent"])})
    train, held_out = docstrings.parameters()
    assert held_out == []
    marked = [[word for word, tag in zip(e.words, e.tags, strict=True) if tag == "B-parameter"] for e in train]
    assert sorted(marked) == [["text"], ["text", "key", "more"]]
    assert next(e for e in train if "Only" in e.words).words == ("Only", "text", ":", "the_text", "is", "b", ".")


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
