"""``python -m bench``: every case of `bench.cases`, interleaved, as one dated table and picture in bench/results/."""

import argparse
import datetime
from functools import partial
from pathlib import Path

import matplotlib
import torch

import ptune_kernels

from .cases import OURS, THREADS, cases
from .timing import RESULTS, about, interleaved, write_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATIO = "time / ours"


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
        medians = interleaved({way: partial(case.run, way) for way in case.ways}, options.rounds)
        for way, seconds in medians.items():
            row = {"case": case.name, "way": way, "ms": f"{seconds * 1e3:.3f}", RATIO: f"{seconds / medians[OURS]:.2f}"}
            print(f"{row['case']:<38} {way:<26} {row['ms']:>9} ms {row[RATIO]:>7}")
            rows.append(row)

    line = about(options.threads, f"{ptune_kernels.backend_for('cpu')} backend", options.rounds)
    table = write_table(options.out / f"ops-cpu-{datetime.date.today().isoformat()}.csv", line, rows)
    draw(rows, table.with_suffix(".png"), line.replace("medians", "\nmedians"))
    print(f"{line}\n{table}")


if __name__ == "__main__":
    main()
