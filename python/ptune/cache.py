"""Where the keys and values of prompt rows are kept: in a module, and with the text's in a cache of transformers'."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from .attention import Prefix


class CompiledPrefix(nn.Module):
    """The keys and values of prompt rows, as buffers ``key_l`` and ``value_l`` [h, m, head_dim] of each layer l."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.num_layers = len(prefix.layers)
        for depth, (key, value) in enumerate(prefix.layers):
            self.register_buffer(f"key_{depth}", key)
            self.register_buffer(f"value_{depth}", value)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], like: Tensor) -> "CompiledPrefix":
        """From what `tensors` returns, where ``like`` lies and in its dtype."""
        moved = [tensor.to(like.device, like.dtype) for tensor in tensors]
        return cls(Prefix(list(zip(moved[::2], moved[1::2], strict=True))))

    def tensors(self) -> list[Tensor]:
        """The key of layer 0, its value, the key of layer 1, …"""
        return [getattr(self, f"{kind}_{depth}") for depth in range(self.num_layers) for kind in ("key", "value")]

    def prefix(self) -> Prefix:
        tensors = self.tensors()
        return Prefix(list(zip(tensors[::2], tensors[1::2], strict=True)))


class PrefixedCache(Cache):
    """Stands in for an empty cache while text is run, and writes the prefix with it, in its place in each row."""

    def __init__(self, cache: Any, prefix: Prefix) -> None:
        self.cache, self.prefix = cache, prefix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self.prefix.before(layer_idx, key_states, value_states)
        return self.cache.update(key, value, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.cache.get_seq_length(layer_idx) + self.prefix.num_columns

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length + self.prefix.num_columns, layer_idx)

    def __getattr__(self, name: str) -> Any:
        if name == "cache":
            raise AttributeError(name)
        return getattr(self.cache, name)
