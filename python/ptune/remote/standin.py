"""What stands in a body's list of blocks for a block that is not here."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..cache import PrefixedCache
from ..inputs import CACHE


class StandIn(nn.Module):
    """Hands hidden states on, and keeps a cache's count of columns.

    In a cache it puts the number of each row, [b, 1, n, 1], by which it is seen how rows were selected since.
    """

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        self.index = index
        for name, value in vars(block).items():
            # what a body reads of its blocks: attention_type and the like
            if isinstance(value, str | int | float) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (cache := cache_in(args, kwargs)) is not None:
            count_columns(cache, self.index, hidden_states)
        return hidden_states


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache that a block is given, which each family calls or places as it likes, or ``None``."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def count_columns(cache: Any, index: int, hidden: Tensor) -> None:
    """Make the layer ``index`` of ``cache`` as long as the layers of blocks that ran on ``hidden`` [b, n, d]."""
    columns = hidden.shape[1]
    if isinstance(cache, PrefixedCache):
        cache, columns = cache.cache, columns + cache.prefix.num_columns
    if not isinstance(cache, DynamicCache):
        raise NotImplementedError(
            f"{CACHE}: expected a DynamicCache, got {type(cache).__name__}; keys and values of remote blocks "
            "are kept by their servers"
        )
    if index < len(cache.layers) and not hasattr(cache.layers[index], "update"):
        raise NotImplementedError(
            f"{CACHE}: expected keys and values in every layer, got {type(cache.layers[index]).__name__} in layer "
            f"{index}; without a cache (use_cache=False) none are kept"
        )
    rows = torch.arange(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    rows = rows[:, None, None, None].expand(-1, 1, columns, 1)
    cache.update(rows, rows, index)


def rows_in(cache: Any, index: int) -> Tensor | None:
    """Which rows of the batch that last passed `count_columns` the cache's [b] now are; ``None`` if it is empty."""
    if cache.get_seq_length(index) == 0:
        return None
    return cache.layers[index].keys[:, 0, -1, 0].long()
