"""How the benchmarks time and report."""

import argparse
import csv
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
THREADS = 2


def options(program: str, about: str | None, rounds: int) -> argparse.Namespace:
    """The command line that the benchmarks share; torch then has its threads."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def interleaved(ways: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each way; every round times all of them, so that what disturbs one disturbs the others."""
    times: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for run in ways.values():
            run()
    gc.disable()
    try:
        for _ in range(rounds):
            for way, run in ways.items():
                begin = time.perf_counter()
                run()
                times[way].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return {way: statistics.median(taken) for way, taken in times.items()}


def report(chosen: argparse.Namespace, name: str, what: str, rows: list[dict[str, str]]) -> tuple[Path, str]:
    """Write ``name``-cpu-DATE.csv, under a comment that says where and how it was made; return its path and that."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    date = datetime.date.today().isoformat()
    about = (
        f"{names[0] if names else platform.processor()}, {chosen.threads} threads, torch {torch.__version__}, {what}, "
        f"medians of {chosen.rounds} interleaved rounds, {date}"
    )
    return write_table(chosen.out / f"{name}-cpu-{date}.csv", about, rows), about


def write_table(path: Path, about: str, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {about}\n")
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"{about}\n{path}")
    return path
