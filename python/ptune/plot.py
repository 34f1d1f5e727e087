"""Draws the curves of a training log."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .checkpoint import replace_file


def plot_log(log: Sequence[dict[str, float]], metrics: Sequence[str], path: Path) -> None:
    """Writes a PNG with the training and evaluation loss, and beside it each metric, over the steps.

    Args:
        log: Trainer's log, as `train.fit` returns it.
        metrics: the names of the metrics, without `eval_`.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for axes, curves in (
        (losses, {"loss": "training", "eval_loss": "evaluation"}),
        (scores, {f"eval_{name}": name.replace("_", " ") for name in metrics}),
    ):
        for key, label in curves.items():
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_xlabel("step")
        axes.legend()
    losses.set_ylabel("loss")
    scores.set_ylabel("metric")
    replace_file(path, lambda scratch: figure.savefig(scratch, format="png"))
