"""Reads training data from files, and says by file and line what is wrong with them.

Three kinds of example come out: `Labelled` texts (classification), `Tagged` sentences (tagging) and `Passage`s
(generation). A file is read whole: the data of a soft prompt fits in memory many times over.
"""

import csv
import io
import json
import math
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Example = TypeVar("Example")
Rows = list[tuple[int, dict[str, object]]]  # the number of a line, and its cells by column name

TEXT_NAMES = ("text", "sentence", "sms", "message", "content", "body", "document", "review", "tweet", "utterance")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic")
PROMPT_NAMES = ("prompt", "instruction", "question", "input", "source")
COMPLETION_NAMES = ("completion", "response", "answer", "output", "target")
TAG = re.compile(r"O|[BIES]-\S+")
_NOT_UTF8 = "not UTF-8; save it so, or convert it: iconv -f WINDOWS-1252 -t UTF-8 (-f UTF-16), say"


class DataError(ValueError):
    """A file that cannot be used as training data. The message names the file, and the line where there is one."""

    def __init__(self, path: Path | str, line: int | None, problem: str):
        super().__init__(f"{path}:{line}: {problem}" if line else f"{path}: {problem}")


@dataclass(frozen=True)
class Labelled:
    """A text and its class."""

    text: str
    label: str


@dataclass(frozen=True)
class Tagged:
    """The words of a sentence, and one BIO (or BIOES) tag for each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Passage:
    """A completion, and the prompt it follows ("" where the whole text is learnt)."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Columns:
    """The columns the user named; None is found by its usual names."""

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None


def read_labelled(path: Path, columns: Columns = Columns()) -> list[Labelled]:
    """Reads a text and a label column from a CSV, TSV or JSONL file.

    Raises: DataError for a file, column or line that cannot be used.
    """
    header, rows = _read_table(path)
    roles = {"text": (columns.text, TEXT_NAMES), "label": (columns.label, LABEL_NAMES)}
    text, label = _find_columns(path, header, roles)
    return [Labelled(_cell(path, line, row, text), _cell(path, line, row, label).strip()) for line, row in rows]


def read_passages(path: Path, columns: Columns = Columns(), pairs: bool = False) -> list[Passage]:
    """Reads a prompt and a completion column, or (unless `pairs`) a single text column, from a CSV, TSV or JSONL file.

    Raises: DataError for a file, column or line that cannot be used.
    """
    header, rows = _read_table(path)
    if pairs and (columns.text or len(header) == 1):
        raise DataError(path, None, "expected prompts and completions, for an encoder-decoder, got a text column alone")
    named = pairs or columns.prompt or columns.completion
    usual = _by_name(header, PROMPT_NAMES) and _by_name(header, COMPLETION_NAMES)
    text = _by_name(header, TEXT_NAMES)
    if usual and text and not (named or columns.text):
        hint = "name them with --text-column, or --prompt-column and --completion-column"
        raise DataError(
            path, None, f"texts, or prompts and completions? {hint}; the first line names {', '.join(header)}"
        )
    if columns.text or not (named or usual):
        (whole,) = _find_columns(path, header, {"text": (columns.text, TEXT_NAMES)})
        return [Passage("", _cell(path, line, row, whole)) for line, row in rows]
    roles = {"prompt": (columns.prompt, PROMPT_NAMES), "completion": (columns.completion, COMPLETION_NAMES)}
    prompt, completion = _find_columns(path, header, roles)
    return [Passage(_cell(path, line, row, prompt), _cell(path, line, row, completion)) for line, row in rows]


def read_inputs(path: Path, text: str | None = None) -> list[str]:
    """Reads texts to predict: the column ``text`` of a CSV, TSV or JSONL file, by default one named as texts or prompts
    are; the sentences of a CoNLL file (`.conll`); or the lines of any other. A text may be blank.

    Raises: DataError for a file, column or line that cannot be used.
    """
    if text is not None and path.suffix.lower() not in _TABLES:
        raise DataError(path, None, f"expected a {', '.join(_TABLES)} file, for a column is named")
    if path.suffix.lower() == ".conll":
        return [" ".join(sentence.words) for sentence in read_tagged(path)]
    if path.suffix.lower() not in _TABLES:
        return split_lines(read_text(path))
    header, rows = _read_table(path)
    (column,) = _find_columns(path, header, {"text": (text, TEXT_NAMES + PROMPT_NAMES)})
    return [_cell(path, line, row, column, blank=True) for line, row in rows]


def read_tagged(path: Path) -> list[Tagged]:
    """Reads a CoNLL file: a word per line, its tag in the last column, a blank line between sentences.

    Columns are split at tabs where a line has one, else at spaces. `-DOCSTART-` lines are skipped.
    Raises: DataError for a file or line that cannot be used.
    """
    sentences = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in [*_read_lines(path), (0, "")]:
        if not line.strip():
            if words:
                sentences.append(Tagged(tuple(words), tuple(tags)))
            words, tags = [], []
            continue
        # Words may hold other white space (U+00A0, U+3000), so only ASCII's separates.
        cells = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))
        if cells[0] == "-DOCSTART-":
            continue
        if len(cells) < 2:
            raise DataError(path, number, f"expected a word and its tag, got {line!r}")
        word, tag = cells[0].strip(" "), cells[-1].strip(" ")
        if not word:
            raise DataError(path, number, "the word is empty")
        if not TAG.fullmatch(tag):
            raise DataError(path, number, f"expected a tag like O, B-name or I-name, got {tag!r}")
        words.append(word)
        tags.append(tag)
    if not sentences:
        raise DataError(path, None, "no sentences in it")
    return sentences


def hold_out(
    examples: Sequence[Example], share: float, stratum: Callable[[Example], Hashable], seed: int
) -> tuple[list[Example], list[Example]]:
    """Splits examples into (kept, held out), with `share` of every stratum held out, or one more or less.

    At least one of each is kept. Both parts keep the order of `examples`. Raises: ValueError if either were empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"hold_out: expected a number above 0 and below 1, got {share}")
    strata: dict[Hashable, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        strata[stratum(example)].append(index)
    chooser = random.Random(seed)
    wanted = {key: share * len(indices) for key, indices in strata.items()}
    sizes = {key: min(math.floor(number), len(strata[key]) - 1) for key, number in wanted.items()}
    # what rounding down left over goes to the strata that lost most; ties are broken by lot
    lots = random.Random(f"lots {seed}")
    able = [key for key in wanted if sizes[key] + 1 < len(strata[key])]
    lacking = sorted(able, key=lambda key: (sizes[key] - wanted[key], lots.random()))
    for key in lacking[: round(share * len(examples)) - sum(sizes.values())]:
        sizes[key] += 1
    held = {index for key, indices in strata.items() for index in chooser.sample(indices, sizes[key])}
    if not held:
        why = "each label occurs only once" if len(strata) == len(examples) > 1 else "they are too few"
        raise ValueError(f"of {len(examples)} examples {share:.0%} cannot be held out, as {why}: give evaluation data")
    kept = [example for index, example in enumerate(examples) if index not in held]
    return kept, [examples[index] for index in sorted(held)]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises: DataError if there is none."""
    if not path.is_file():
        raise DataError(path, None, "no such file")
    text = decode(path.read_bytes(), path)
    if not text.strip():
        raise DataError(path, None, "the file is empty")
    return text


def decode(content: bytes, source: Path | str) -> str:
    """UTF-8 text, without its byte order mark. Raises: DataError that names `source` and the line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(source, content.count(b"\n", 0, error.start) + 1, _NOT_UTF8) from None


def split_lines(text: str) -> list[str]:
    """The lines without their ends. Only \\n and \\r\\n end lines: texts may hold other separators."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    return enumerate(split_lines(read_text(path)), 1)


def _read_table(path: Path) -> tuple[list[str], Rows]:
    reader = _TABLES.get(path.suffix.lower())
    if reader is None:
        raise DataError(path, None, f"expected a {', '.join(_TABLES)} file")
    header, rows = reader(path)
    if not rows:
        raise DataError(path, None, "a header and no lines after it")
    return header, rows


def _read_csv(path: Path) -> tuple[list[str], Rows]:
    # newline="" leaves line ends inside quoted cells to the csv reader; `line_num` then points at a record's last line.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        found = [(reader.line_num, its) for its in reader if len(its) > 1 or "".join(its).strip()]
    except csv.Error as error:
        raise DataError(path, reader.line_num, str(error)) from None
    finally:
        csv.field_size_limit(limit)
    if not found:
        raise DataError(path, None, "no lines with anything in them")
    (_, header), *records = found
    return header, _to_rows(path, header, records)


def _read_tsv(path: Path) -> tuple[list[str], Rows]:
    # Quotes are text in TSV: a message may open one and never close it.
    (_, header), *records = ((number, line.split("\t")) for number, line in _read_lines(path) if line.strip())
    return header, _to_rows(path, header, records)


def _to_rows(path: Path, header: list[str], records: list[tuple[int, list[str]]]) -> Rows:
    if len(set(header)) < len(header):
        raise DataError(path, 1, f"a column name stands twice in the header {header}")
    for number, cells in records:
        if len(cells) != len(header):
            raise DataError(path, number, f"expected {len(header)} columns ({', '.join(header)}), got {len(cells)}")
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in records]


def _read_jsonl(path: Path) -> tuple[list[str], Rows]:
    rows: Rows = []
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(path, number, f"not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
            raise DataError(path, number, f"JSON that cannot be read: {error}") from None
        if not isinstance(row, dict):
            raise DataError(path, number, f"expected a JSON object, got {type(row).__name__}")
        rows.append((number, row))
    return list(rows[0][1]), rows


_TABLES = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl}


def _by_name(header: list[str], names: Sequence[str]) -> list[str]:
    """The columns with a usual name: that of the first name alone, where there is one."""
    lowered = {column.strip().lower(): column for column in reversed(header)}
    found = [lowered[name] for name in names if name in lowered]
    return found[:1] if names[0] in lowered else found


def _find_columns(path: Path, header: list[str], roles: Mapping[str, tuple[str | None, Sequence[str]]]) -> list[str]:
    """The column of each role: the one the user named, else one with a usual name, else the only one that is left.

    Of two usual names (`instruction` and `input`) neither is chosen.
    """
    found = {role: named for role, (named, _) in roles.items() if named is not None}
    for role, named in found.items():
        if named not in header:
            raise DataError(path, None, f"no column {named!r} for the {role}; the first line names {', '.join(header)}")
    for role, (_, usual) in roles.items():
        columns = _by_name([column for column in header if column not in found.values()], usual)
        if role not in found and len(columns) == 1:
            found[role] = columns[0]
    missing = [role for role in roles if role not in found]
    free = [column for column in header if column not in found.values()]
    if len(missing) == 1 and len(free) == 1:
        found[missing[0]] = free[0]
    elif missing:
        hint = f"name it with --{missing[0]}-column; the first line names {', '.join(header)}"
        if len(header) == 1 and ";" in header[0]:
            hint = f"cells are separated by commas in .csv, and by tabs in .tsv; the first line is {header[0]}"
        raise DataError(path, None, f"which column is the {missing[0]}? {hint}")
    return [found[role] for role in roles]


def _cell(path: Path, line: int, row: dict[str, object], column: str, blank: bool = False) -> str:
    if column not in row:
        raise DataError(path, line, f"expected a column {column!r}, got {', '.join(row) or 'none'}")
    value = row[column]
    if not isinstance(value, str | int | float):
        raise DataError(path, line, f"column {column!r}: expected text, got {value!r}")
    text = value if isinstance(value, str) else json.dumps(value)
    if not text.strip() and not blank:
        raise DataError(path, line, f"column {column!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape one half of a pair
        raise DataError(path, line, f"column {column!r} holds half a surrogate pair, which is no text") from None
    return text
