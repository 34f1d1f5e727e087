"""A small labelled corpus that every Python installation has: the docstrings of its standard library.

Two data sets come of it. `topics`: which area a docstring belongs to, by its module. `parameters`: which words of a
function's docstring are its own parameters' names, by its signature. Both hold out whole modules, and no text stands in
both parts.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
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
MIN_WORDS = 4
WORD = re.compile(r"\w+|[^\w\s]")
Example = TypeVar("Example", Labelled, Tagged)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def topics(max_words: int = 40) -> tuple[list[Labelled], list[Labelled]]:
    """(training, held-out) docstrings of functions and classes: their first `max_words` words, and their area."""
    parts = []
    for part in range(2):
        examples = []
        for area, modules in MODULES.items():
            for definition in _definitions(modules[part]):
                words = _docstring(definition).split()[:max_words]
                if len(words) >= MIN_WORDS:
                    examples.append(Labelled(" ".join(words), area))
        parts.append(examples)
    return _apart(*parts)


def parameters(max_words: int = 60) -> tuple[list[Tagged], list[Tagged]]:
    """(training, held-out) docstrings of functions, their first `max_words` words; their parameters are B-parameter."""
    parts = []
    for part in range(2):
        examples = []
        for modules in MODULES.values():
            for definition in _definitions(modules[part]):
                if isinstance(definition, ast.ClassDef):
                    continue
                names = {node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)} - {"self", "cls"}
                words = WORD.findall(_docstring(definition))[:max_words]
                if names and len(words) >= MIN_WORDS:
                    tags = ["B-parameter" if word in names else "O" for word in words]
                    examples.append(Tagged(tuple(words), tuple(tags)))
        parts.append(examples)
    return _apart(*parts)


def _definitions(modules: Sequence[str]) -> Iterator[Definition]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in modules:
        files = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
        for file in files:
            if file.is_file() and "test" not in file.relative_to(library).parts:
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                    if isinstance(node, Definition) and ast.get_docstring(node):
                        yield node


def _docstring(definition: Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(definition) or "")


def _apart(train: list[Example], held_out: list[Example]) -> tuple[list[Example], list[Example]]:
    """Each part without its repetitions, and the held-out part without anything that stands in training."""

    def text(example: Example) -> object:
        return example.text if isinstance(example, Labelled) else example.words

    unique = {text(example): example for example in train}
    new = {text(example): example for example in held_out if text(example) not in unique}
    return list(unique.values()), list(new.values())
