"""``python -m bench``: every case of `bench.cases`, interleaved, as one dated table and picture in bench/results/."""

import argparse
import csv
import datetime
import gc
import platform
import statistics
import time
from pathlib import Path

import matplotlib
import torch

import ptune_kernels

from .cases import OURS, THREADS, Case, cases

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATIO = "time / ours"
RESULTS = Path(__file__).with_name("results")


def interleaved(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of each way; every round times all of them, so that what disturbs one disturbs the others."""
    times: dict[str, list[float]] = {way: [] for way in case.ways}
    for _ in range(3):
        for way in times:
            case.run(way)
    gc.disable()
    try:
        for _ in range(rounds):
            for way, taken in times.items():
                begin = time.perf_counter()
                case.run(way)
                taken.append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return {way: statistics.median(taken) for way, taken in times.items()}


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def draw(rows: list[dict[str, str]], path: Path, title: str) -> None:
    rows = [row for row in rows if row["way"] != OURS]
    labels = [f"{row['case']}: {row['way']}" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    axes.barh(labels, [float(row[RATIO]) for row in rows], color="tab:blue")
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("time / ours (right of the line: slower than ours)")
    axes.margins(y=0.01)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table and the picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    rows: list[dict[str, str]] = []
    for case in cases():
        case.check()
        medians = interleaved(case, options.rounds)
        for way, seconds in medians.items():
            row = {"case": case.name, "way": way, "ms": f"{seconds * 1e3:.3f}", RATIO: f"{seconds / medians[OURS]:.2f}"}
            print(f"{row['case']:<38} {way:<26} {row['ms']:>9} ms {row[RATIO]:>7}")
            rows.append(row)

    date = datetime.date.today().isoformat()
    about = (
        f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}, "
        f"{ptune_kernels.backend_for('cpu')} backend, medians of {options.rounds} interleaved rounds, {date}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / f"ops-cpu-{date}.csv"
    with table.open("w", newline="") as file:
        file.write(f"# {about}\n")
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, table.with_suffix(".png"), about.replace("medians", "\nmedians"))
    print(f"{about}\n{table}")


if __name__ == "__main__":
    main()
