"""An audit as tables in the terminal, as ``report.json`` and as one picture, ``report.png``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from ..checkpoint import replace_file
from .damage import loss
from .passes import Audit
from .sites import KINDS
from .statistics import FLOAT16_MAX, HEADROOM

SHOWN = 10  # places in the table
FLOOR = 1e-10  # of the picture's scale
_FIGURES = {
    "embeddings": {"nonfinite": "inf, NaN", "cosine_min": "least cosine", "cosine_mean": "mean cosine"},
    "logits": {"nonfinite": "inf, NaN", "kl_mean": "KL divergence", "same_top1": "same top-1"},
}
_CURVES = {
    "residual": ("residual",),
    "MLP": ("mlp in", "mlp out"),
    "attention": ("query", "key", "value", "attention output", "projection"),
    "norm": ("norm",),
}


def print_audit(audit: Audit, console: Console) -> None:
    """Tables of the worst places, the whole model and the repairs; then the verdict."""
    figures = _FIGURES[audit.compares]
    places = _table(f"The worst places, each alone in {audit.dtype}", "place", "module", "amax", *figures.values())
    for site in audit.sites[:SHOWN]:
        place = site["kind"] if site["layer"] is None else f"{site['kind']}, layer {site['layer']}"
        places.add_row(place, site["name"], f"{_amax(audit, site):.4g}", *_cells(site, figures))
    console.print(places)
    for title, rows in (
        ("The whole model", audit.whole.items()),
        ("Repairs, the cheapest first", [(tried["name"], tried) for tried in audit.repairs]),
    ):
        table = _table(title, "in", "works", *figures.values())
        for name, tried in rows:
            refused = "refused" in tried
            cells = _cells(tried, figures) if not refused else [""] * len(figures)
            table.add_row(name, "yes" if tried["works"] else "refused" if refused else "no", *cells)
        if table.rows:
            console.print(table)
    console.print(f"To work is to have no inf or NaN, and {_wanted(audit)}.", soft_wrap=True)
    console.print(audit.verdict, soft_wrap=True, markup=False)


def write_audit(audit: Audit, folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.png`` into ``folder``, each whole or not at all; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    record = asdict(audit) | {"repair": audit.repair and audit.repair["name"], "verdict": audit.verdict}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    figure = _draw(audit)
    data, picture = folder / "report.json", folder / "report.png"
    replace_file(data, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    replace_file(picture, lambda scratch: figure.savefig(scratch, format="png", dpi=120))
    return data, picture


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _wanted(audit: Audit) -> str:
    if audit.compares == "embeddings":
        return f"cosines of {audit.limits['cosine']} at least"
    return f"a KL divergence of {audit.limits['kl']} at most, with {audit.limits['same_top1']:.0%} of top-1 the same"


def _cells(figures: dict[str, Any], names: Mapping[str, str]) -> list[str]:
    return ["-" if figures[name] is None else _digits(name, figures[name]) for name in names]


def _digits(name: str, figure: float) -> str:
    if name in ("nonfinite", "same_top1"):
        return f"{figure:.1%}"
    return f"{figure:.2g}" if name == "kl_mean" else f"{figure:.7f}"


def _amax(audit: Audit, site: dict[str, Any]) -> float:
    same = (s for s in audit.statistics if (s["kind"], s["name"]) == (site["kind"], site["name"]))
    return max((record["amax"] for record in same), default=0.0)


def _draw(audit: Audit) -> Figure:
    """amax per layer beside float16's limits, and the damage that each kind of site does in each layer."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    magnitudes, damage = figure.subplots(1, 2)
    for label, kinds in _CURVES.items():
        peaks: dict[int, float] = {}
        for record in audit.statistics:
            if record["kind"] in kinds and record["layer"] is not None:
                peaks[record["layer"]] = max(peaks.get(record["layer"], 0.0), record["amax"])
        if peaks:
            magnitudes.plot(*zip(*sorted(peaks.items()), strict=True), marker=".", label=label)
    magnitudes.axhline(FLOAT16_MAX, color="black", label="float16's greatest number")
    magnitudes.axhline(HEADROOM, color="black", linestyle="--", label="an eighth of it")
    magnitudes.set(yscale="log", xlabel="layer", ylabel="amax in float32")
    magnitudes.xaxis.set_major_locator(MaxNLocator(integer=True))
    magnitudes.legend(fontsize=8)
    _draw_damage(audit.sites, damage)
    measure = "1 - least cosine" if audit.compares == "embeddings" else "mean KL divergence"
    colours = damage.collections[0]
    figure.colorbar(colours, ax=damage, label=f"{measure}, one place in {audit.dtype}; red: inf or NaN")
    return figure


def _draw_damage(sites: Sequence[dict[str, Any]], axes: Any) -> None:
    kinds = [kind for kind in KINDS if any(site["kind"] == kind for site in sites)]
    layers = sorted({site["layer"] for site in sites if site["layer"] is not None})
    columns = [*layers, None]
    worst = np.full((len(kinds), len(columns)), np.nan)
    for site in sites:
        cell = kinds.index(site["kind"]), columns.index(site["layer"])
        value = math.inf if site["nonfinite"] else max(FLOOR, loss(site))
        worst[cell] = value if np.isnan(worst[cell]) else max(worst[cell], value)
    finite = worst[np.isfinite(worst)]
    scale = LogNorm(FLOOR, max(finite.max(initial=FLOOR), 10 * FLOOR))
    axes.pcolormesh(np.ma.masked_invalid(worst), norm=scale, cmap="viridis", edgecolors="white", linewidth=0.5)
    for row, column in np.argwhere(np.isposinf(worst)):
        axes.fill_between([column, column + 1], row, row + 1, color="tab:red")
    axes.set_xticks(np.arange(len(columns)) + 0.5, [*map(str, layers), "none"])
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
