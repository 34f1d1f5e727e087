"""How the benchmarks time and report."""

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


def about(threads: int, what: str, rounds: int) -> str:
    """Where and how a table was made."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {threads} threads, torch {torch.__version__}, {what}, "
        f"medians of {rounds} interleaved rounds, {datetime.date.today().isoformat()}"
    )


def write_table(path: Path, line: str, rows: list[dict[str, str]]) -> Path:
    """Write ``rows`` as CSV under a comment, and return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {line}\n")
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path
