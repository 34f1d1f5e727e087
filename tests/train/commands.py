"""How the tests run commands, and the data that they give them."""

import itertools
import json
import random
from pathlib import Path

from transformers import Trainer
from typer.testing import CliRunner

from ptune.cli import app

from .tiny import WORDS

KINDS = {"good": "yes", "bad": "no"}
TAGS = {"Ann": "B-person", "Bob": "B-person", "Rome": "B-place", "Oslo": "B-place"}


def ptune(*arguments, text: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def succeed(*arguments, text: str | None = None) -> str:
    result = ptune(*arguments, text=text)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def sentences(count: int, seed: int) -> list[list[str]]:
    chooser = random.Random(seed)
    return [chooser.choices(WORDS[2:], k=chooser.randint(2, 7)) for _ in range(count)]


def classification_file(folder: Path, count: int = 90, seed: int = 0) -> Path:
    path = folder / f"sentiment{seed}.tsv"
    lines = ["label\ttext"]
    for index, words in enumerate(sentences(count, seed)):
        sign = ("good", "bad")[index % 2]
        lines.append(f"{KINDS[sign]}\t{' '.join([sign, *words])}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tagging_file(folder: Path, count: int = 90, seed: int = 0) -> Path:
    path = folder / f"names{seed}.conll"
    blocks = ["\n".join(f"{word}\t{TAGS.get(word, 'O')}" for word in words) for words in sentences(count, seed)]
    path.write_text("\n\n".join(blocks) + "\n")
    return path


def generation_file(folder: Path, count: int = 90, seed: int = 0) -> Path:
    path = folder / f"stories{seed}.jsonl"
    rows = [{"prompt": " ".join(words), "completion": "one two three"} for words in sentences(count, seed)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


FILES = {"classification": classification_file, "tagging": tagging_file, "generation": generation_file}


def interrupt(patch, *arguments, step: int) -> None:
    """Runs `ptune train`, and presses Ctrl-C in a step of it."""
    count, run_step = itertools.count(1), Trainer.training_step

    def training_step(*arguments, **options):
        if next(count) == step:
            raise KeyboardInterrupt
        return run_step(*arguments, **options)

    with patch.context() as inside:
        inside.setattr(Trainer, "training_step", training_step)
        assert ptune("train", *arguments).exit_code != 0


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "train.json").read_text())["metrics"]
