"""What a model's outputs lost beside those of float32."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """The damage up to which outputs count as right; inf and NaN never do.

    Attributes:
        cosine: the least cosine of an embedding with that of float32.
        kl: the greatest mean KL divergence of float32's distributions to those of the logits, in nats.
        same_top1: the least share of logits with float32's greatest entry; of few rows, one is a large share.
    """

    cosine: float = 0.999
    kl: float = 0.01
    same_top1: float = 0.98


DEFAULT_LIMITS = Limits()


class Damage:
    """Gathered over batches of rows: embeddings [rows, d] or logits [rows, vocabulary]."""

    def __init__(self, kind: str) -> None:
        self.kind = kind  # "embeddings" or "logits"
        self.rows = 0
        self.nonfinite = 0
        self.changed = 0
        self._cosines: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._same: list[Tensor] = []

    def add(self, reference: Tensor, rows: Tensor) -> None:
        finite = rows.isfinite().all(-1)
        self.rows += rows.shape[0]
        self.nonfinite += int((~finite).sum())
        self.changed += int((rows != reference).any(-1).sum())
        reference, rows = reference[finite], rows[finite].float()
        if self.kind == "embeddings":
            self._cosines.append(torch.cosine_similarity(reference.double(), rows.double(), dim=-1).cpu())
            return
        log_p, log_q = reference.log_softmax(-1), rows.log_softmax(-1)
        self._divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu())
        self._same.append((reference.argmax(-1) == rows.argmax(-1)).float().cpu())

    def figures(self) -> dict[str, float | None]:
        """By name: the shares of rows that are inf or NaN, and that changed at all; and what the finite ones lost.

        ``None`` where no row is finite.
        """
        figures: dict[str, float | None] = {
            "nonfinite": self.nonfinite / self.rows,
            "changed": self.changed / self.rows,
        }
        if self.kind == "embeddings":
            cosines = torch.cat(self._cosines)
            figures |= {"cosine_min": _of(cosines, torch.min), "cosine_mean": _of(cosines, torch.mean)}
        else:
            divergences, same = torch.cat(self._divergences), torch.cat(self._same)
            figures |= {
                "kl_mean": _of(divergences, torch.mean),
                "kl_max": _of(divergences, torch.max),
                "same_top1": _of(same, torch.mean),
            }
        return figures


def _of(values: Tensor, reduce: Any) -> float | None:
    return reduce(values).item() if len(values) else None


def loss(figures: dict[str, float | None]) -> float:
    """One number to rank finite damage by: 1 - the least cosine, or the mean divergence; inf without a finite row."""
    if "cosine_min" in figures:
        cosine = figures["cosine_min"]
        return float("inf") if cosine is None else 1 - cosine
    divergence = figures["kl_mean"]
    return float("inf") if divergence is None else divergence


def severity(figures: dict[str, float | None]) -> tuple[float, float]:
    """What sites are ranked by: the share of rows that are inf or NaN, then `loss`."""
    return figures["nonfinite"] or 0.0, loss(figures)


def passes(figures: dict[str, float | None], limits: Limits) -> bool:
    if figures["nonfinite"]:
        return False
    if "cosine_min" in figures:
        return loss(figures) <= 1 - limits.cosine
    return loss(figures) <= limits.kl and (figures["same_top1"] or 0) >= limits.same_top1
