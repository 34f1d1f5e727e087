"""What an audit compares, a model's embeddings or logits without padding, and what these lost beside float32's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import first_column, states_at
from .statistics import without_padding

POOLING = "the pooling"  # what a site's name is, where the pooling is no part of the model


class Pooling(nn.Module):
    """A pooling of token states, as a module: one of the places where precision can be lost."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return self.function(states, mask)


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean [b, d] of the states [b, n, d] of real tokens, in their dtype."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def first(states: Tensor, mask: Tensor) -> Tensor:
    """The state [b, d] of each text's first real token."""
    return states_at(first_column(mask), states)


def last(states: Tensor, mask: Tensor) -> Tensor:
    """The state [b, d] of each text's last real token."""
    return first(states.flip(1), mask.flip(1))


def greatest(states: Tensor, mask: Tensor) -> Tensor:
    """The greatest value of each dimension [b, d] among the real tokens."""
    return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)


class Outputs(nn.Module):
    """``model``, and ``pooling`` on top of it where it gives token states.

    Attributes:
        kind: "embeddings" or "logits", known from the first call on.
    """

    def __init__(self, model: nn.Module, pooling: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        self.given = pooling is not None
        self.pooling = Pooling(pooling or mean)
        self.kind = "embeddings"

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """One row for each text, or for each real token where there are logits of tokens.

        A lone logit (a reranker's), and each of a multi-label classifier, is that of "yes", and gets the 0 of a "no"
        beside it.
        """
        output: Any = self.model(**batch)
        if isinstance(output, Tensor):
            if self.given:
                raise ValueError(f"pooling: expected None, as {type(self.model).__name__} returns a tensor by itself")
            return self._checked(output)
        self.kind = "embeddings"
        found = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        if not self.given and found.get("logits") is not None:
            self.kind = "logits"
            logits = without_padding(found["logits"], batch.get("attention_mask"))
            problem = getattr(getattr(self.model, "config", None), "problem_type", None)
            logits = logits.reshape(-1, 1 if problem == "multi_label_classification" else logits.shape[-1])
            return logits if logits.shape[1] > 1 else nn.functional.pad(logits, (0, 1))
        if not self.given and found.get("sentence_embedding") is not None:
            return self._checked(found["sentence_embedding"])
        states = found.get("last_hidden_state")
        if states is None:
            raise ValueError(
                f"model: expected logits, a sentence_embedding or a last_hidden_state of {type(self.model).__name__}, "
                f"got {', '.join(found) or type(output).__name__}"
            )
        mask = batch.get("attention_mask")
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
        return self._checked(self.pooling(states, mask))

    def _checked(self, embeddings: Any) -> Tensor:
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"pooling: expected embeddings of shape [b, d], got {got}")
        return embeddings


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
