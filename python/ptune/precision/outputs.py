"""What an audit compares: the embeddings or the logits that a model gives a batch, without padding."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        """One row for each text, or for each real token where there are logits of tokens."""
        output: Any = self.model(**batch)
        if isinstance(output, Tensor):
            return self._checked(output)
        self.kind = "embeddings"
        found = output if isinstance(output, Mapping) else vars(output)
        if not self.given and found.get("logits") is not None:
            self.kind = "logits"
            logits = without_padding(found["logits"], batch.get("attention_mask"))
            return logits.reshape(-1, logits.shape[-1])
        if not self.given and found.get("sentence_embedding") is not None:
            return self._checked(found["sentence_embedding"])
        states = found.get("last_hidden_state")
        if states is None:
            raise ValueError(
                f"model: expected logits, a sentence_embedding or a last_hidden_state of {type(self.model).__name__}, "
                f"got {', '.join(found)}"
            )
        mask = batch.get("attention_mask")
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
        return self._checked(self.pooling(states, mask))

    def _checked(self, embeddings: Any) -> Tensor:
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"pooling: expected embeddings of shape [b, d], got {got}")
        return embeddings
