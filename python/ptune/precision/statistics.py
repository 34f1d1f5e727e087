"""The magnitudes of activations beside what float16 can hold."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

FLOAT16_MAX = torch.finfo(torch.float16).max
HEADROOM = FLOAT16_MAX / 8
# the least magnitude that float16 has a number for, a subnormal one
FLOAT16_LEAST = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
# Sun et al., Massive Activations in Large Language Models, 2024
MASSIVE, MASSIVE_RATIO = 100, 1000


class Tally:
    """Counts over the values of one tensor, gathered over batches."""

    def __init__(self) -> None:
        self.amax = 0.0
        self.values = self.large = self.lost = self.massive = 0
        self._channels: Counter[int] = Counter()

    def add(self, tensor: Tensor) -> None:
        """``tensor`` [rows, …, channels], without padding."""
        magnitudes = tensor.detach().float().abs()
        magnitudes = magnitudes.where(magnitudes.isfinite(), 0)  # what masks with -inf is no activation
        if not tensor.numel():
            return
        self.amax = max(self.amax, magnitudes.max().item())
        self.values += magnitudes.numel()
        self.large += int((magnitudes > HEADROOM).sum())
        self.lost += int(((magnitudes < FLOAT16_LEAST) & (magnitudes > 0)).sum())
        if self.amax > MASSIVE:
            massive = (magnitudes > MASSIVE) & (magnitudes > MASSIVE_RATIO * magnitudes.median())
            self.massive += int(massive.sum())
            self._channels.update(massive.nonzero()[:, -1].tolist())

    def figures(self) -> dict[str, Any]:
        """amax; the shares of values above 65504/8 and of those, not zero, below float16's least subnormal; how many
        massive activations there are, and their commonest channels."""
        values = max(1, self.values)
        return {
            "amax": self.amax,
            "large": self.large / values,
            "lost": self.lost / values,
            "massive": self.massive,
            "massive_channels": [channel for channel, _ in self._channels.most_common(5)],
        }


def without_padding(tensor: Tensor, *masks: Tensor | None) -> Tensor:
    """The entries of ``tensor`` of real tokens of the first mask [b, n] that fits, as [tokens, …, channels].

    States are [b, n, …], rows of experts [b * n, d]. What has no axis of tokens, or one that is not the text's, is
    returned as it is.
    """
    for mask in masks:
        if mask is not None and tensor.dim() > 2 and tensor.shape[:2] == mask.shape:
            return tensor[mask.bool().to(tensor.device)]
        if mask is not None and tensor.dim() == 2 and tensor.shape[0] == mask.numel():
            return tensor[mask.flatten().bool().to(tensor.device)]
    return tensor
