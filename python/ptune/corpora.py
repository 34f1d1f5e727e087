"""Two small labelled corpora that every Python installation has: its library's docstrings, and its reference manual.

`topics`: which area of the library a docstring is from, by its module. `code`: which words of the manual are code, by
the quotes around them, which are taken away. Both hold out whole modules or chapters, and no text stands in both parts.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics as chapters
from typing import TypeVar

from .data import Labelled, Tagged

# area: (modules to learn from, modules held out). A module that this Python does not have is left out.
MODULES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "concurrency": (("asyncio", "concurrent", "queue", "subprocess"), ("multiprocessing", "sched", "threading")),
    "files": (
        ("_pyio", "bz2", "fileinput", "genericpath", "glob", "gzip", "os", "pathlib", "posixpath", "shutil", "tarfile"),
        ("filecmp", "fnmatch", "lzma", "ntpath", "tempfile", "zipfile"),
    ),
    "formats": (
        ("configparser", "email", "html", "pickletools", "plistlib", "quopri", "xml/dom", "xml/sax"),
        ("base64", "csv", "json", "pickle", "tomllib", "xml/etree"),
    ),
    "networking": (
        ("ftplib", "http", "imaplib", "ipaddress", "poplib", "socket", "ssl", "wsgiref", "xmlrpc"),
        ("smtplib", "socketserver", "urllib", "webbrowser"),
    ),
    "numbers": (
        ("_pydatetime", "_pydecimal", "calendar", "datetime", "numbers"),
        ("fractions", "random", "statistics"),
    ),
    "testing": (("pdb", "timeit", "unittest"), ("bdb", "cProfile", "doctest", "profile", "pstats", "trace")),
}
MIN_WORDS, MAX_WORDS = 4, 40
WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.:])\s+(?=[A-Z])")
Example = TypeVar("Example", Labelled, Tagged)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def topics() -> tuple[list[Labelled], list[Labelled]]:
    """(training, held-out) docstrings of functions and classes: their first words, and their area."""
    parts = []
    for part in range(2):
        examples = []
        for area, modules in MODULES.items():
            for docstring in _docstrings(modules[part]):
                words = docstring.split()[:MAX_WORDS]
                if len(words) >= MIN_WORDS:
                    examples.append(Labelled(" ".join(words), area))
        parts.append(examples)
    return _apart(*parts)


def code() -> tuple[list[Tagged], list[Tagged]]:
    """(training, held-out) sentences that name code: their first words, of which code is B-code, I-code, I-code, …"""
    parts: tuple[list[Tagged], list[Tagged]] = ([], [])
    for number, name in enumerate(sorted(chapters)):
        for sentence in _sentences(chapters[name]):
            words, tags = [], []
            for place, span in enumerate(sentence.split('"')):
                found = WORD.findall(span)
                words += found
                tags += ["O"] * len(found) if place % 2 == 0 else ["B-code", *["I-code"] * len(found)][: len(found)]
            if len(words) >= MIN_WORDS:
                parts[number % 3 == 0].append(Tagged(tuple(words[:MAX_WORDS]), tuple(tags[:MAX_WORDS])))
    return _apart(*parts)


def _sentences(chapter: str) -> Iterator[str]:
    """Those in which something is quoted; grammars and programs are none."""
    for paragraph in re.split(r"\n\s*\n", chapter):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            quotes = sentence.count('"')
            if quotes and quotes % 2 == 0 and "::=" not in sentence and re.match(r'[A-Z"].*[.:]$', sentence):
                yield sentence


def _docstrings(modules: Sequence[str]) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        files = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
        for file in files:
            if file.is_file() and "test" not in file.relative_to(library).parts:
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    if isinstance(node, Definition) and (docstring := ast.get_docstring(node)):
                        yield docstring


def _apart(train: list[Example], held_out: list[Example]) -> tuple[list[Example], list[Example]]:
    """Each part without its repetitions, and the held-out part without anything that stands in training."""

    def text(example: Example) -> object:
        return example.text if isinstance(example, Labelled) else example.words

    unique = {text(example): example for example in train}
    new = {text(example): example for example in held_out if text(example) not in unique}
    return list(unique.values()), list(new.values())
