"""``python -m bench``: every case of `bench.cases`, interleaved, as one dated table and picture in bench/results/."""

from functools import partial
from pathlib import Path

import matplotlib
import torch

import ptune_kernels

from .cases import COPY, OURS, cases
from .roofline import work_of
from .timing import interleaved, options, report

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RATIO, FLOOR = "time / ours", "time / floor"


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
    chosen = options("python -m bench", __doc__, 100)
    torch.manual_seed(0)

    rows: list[dict[str, str]] = []
    for case in cases():
        case.check()
        medians = interleaved({way: partial(case.run, way) for way in case.ways}, chosen.rounds)
        # a copy reads and writes what the forward puts out
        floor = work_of(case).floor(2 * case.output_bytes / medians[COPY])
        for way, seconds in medians.items():
            if way == COPY and case.trained:
                continue
            row = {
                "case": case.name, "way": way, "ms": f"{seconds * 1e3:.3f}", RATIO: f"{seconds / medians[OURS]:.2f}",
                FLOOR: f"{seconds / floor:.2f}",
            }  # fmt: skip
            print(f"{row['case']:<38} {way:<26} {row['ms']:>9} ms {row[RATIO]:>7} {row[FLOOR]:>7}")
            rows.append(row)

    table, line = report(chosen, "ops", f"{ptune_kernels.backend_for('cpu')} backend", rows)
    draw(rows, table.with_suffix(".png"), line.replace("medians", "\nmedians"))


if __name__ == "__main__":
    main()
