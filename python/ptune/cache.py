"""Where the keys and values of prompt rows are kept: in a module, and with the text's in a cache of transformers'."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from ptune_kernels import Placement

from .attention import Prefix, cast_kv, no_autocast


class CompiledPrefix(nn.Module):
    """The keys and values of prompt rows, as parameters ``key_l`` and ``value_l`` [h, m, head_dim] of each layer l.

    Those that were loaded are float32, whatever the base is in: attention rounds them as it prepends them. They train
    as the prefix of Li & Liang (2021) does.
    """

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        for depth, (key, value) in enumerate(prefix.layers):
            self.register_parameter(f"key_{depth}", nn.Parameter(key))
            self.register_parameter(f"value_{depth}", nn.Parameter(value))

    @classmethod
    def of(cls, tensors: Sequence[Tensor], device: torch.device) -> "CompiledPrefix":
        """From what `tensors` returns."""
        return cls(Prefix.of([tensor.to(device) for tensor in tensors]))

    def tensors(self) -> list[Tensor]:
        """The key of layer 0, its value, the key of layer 1, …"""
        return list(self.parameters())

    def prefix(self, dtype: torch.dtype) -> Prefix:
        """As a base in ``dtype`` takes it."""
        return prefix_in(dtype, self.tensors())


def prefix_in(dtype: torch.dtype, tensors: Sequence[Tensor]) -> Prefix:
    """From float32 keys and values, what a base in ``dtype`` takes, with gradients in float32."""
    return Prefix.of([tensor.double() for tensor in tensors] if dtype == torch.float64 else tensors)


class _CacheProxy(Cache):
    """Stands in for ``cache``, and is it but for what a subclass says."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.cache.get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, layer_idx)

    def __getattr__(self, name: str) -> Any:
        if name == "cache":
            raise AttributeError(name)
        return getattr(self.cache, name)


class PrefixedCache(_CacheProxy):
    """Stands in for an empty cache while text is run, and writes the prefix with it, in its place in each row.

    In ``dtype``, which is by default that of the text.
    """

    def __init__(self, cache: Any, prefix: Prefix, dtype: torch.dtype | None = None) -> None:
        super().__init__(cache)
        self.prefix, self.dtype = prefix, dtype

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self.prefix.before(layer_idx, key_states, value_states, self.dtype)
        return _update(self.cache, self.dtype, key, value, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.cache.get_seq_length(layer_idx) + self.prefix.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length + self.prefix.num_columns, layer_idx)


class PackedCache(_CacheProxy):
    """Stands in for an empty cache while prompt rows and texts run as one sequence (see `Packed`), and writes both.

    It returns keys and values [b, h, m + n, head_dim], of each row's prompt and text; `own_like`, the prompt rows' own.
    ``texts``: b, n.
    """

    def __init__(
        self,
        cache: Any,
        num_prompts: int,
        texts: torch.Size,
        placement: Placement | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(cache)
        self.num_prompts, self.texts, self.placement, self.dtype = num_prompts, texts, placement, dtype
        self._own: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        (own_key, key), (own_value, value) = (self.part(states) for states in (key_states, value_states))
        self._own[own_key.shape[1], own_key.shape[3]] = own_key, own_value
        prefix = Prefix([(own_key[0], own_value[0])], self.placement)
        key, value = prefix.before(0, key, value, self.dtype)
        return _update(self.cache, self.dtype, key, value, layer_idx, *args, **kwargs)

    def own_like(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt rows' key and value [1, h, m, head_dim] that were last written, of a ``key`` of these heads.

        A layer that reads the keys of another gets the wrong ones where a third came in between; but all behind it read
        those of others too, so that nothing of the text depends on what becomes of prompt rows there.
        """
        return self._own[key.shape[1], key.shape[3]]

    def part(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[1, h, m + b·n, head_dim] → [1, h, m, head_dim] and [b, h, n, head_dim], views."""
        text = states[0, :, self.num_prompts :].unflatten(1, self.texts)
        return states[:, :, : self.num_prompts], text.transpose(0, 1)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.cache.get_seq_length(layer_idx) + self.num_prompts

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of a text's own mask, however many rows there are of all."""
        return self.cache.get_mask_sizes(self.num_prompts + self.texts[1], layer_idx)


class CastCache(_CacheProxy):
    """Stands in for a cache in one attention, and has it keep keys and values in ``dtype``.

    ``returns_whole``: whether what it returns is in the dtype of what it was given.
    """

    def __init__(self, cache: Any, dtype: torch.dtype, returns_whole: bool = False) -> None:
        super().__init__(cache)
        self.dtype, self.returns_whole = dtype, returns_whole

    @classmethod
    def of(cls, cache: Any, *how: Any) -> Any:
        """For any cache; that of an encoder-decoder is two."""
        if isinstance(cache, EncoderDecoderCache):
            both: Any = copy.copy(cache)  # what it knows of its layers is shared
            both.self_attention_cache = cls(cache.self_attention_cache, *how)
            both.cross_attention_cache = cls(cache.cross_attention_cache, *how)
            return both
        return cls(cache, *how)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = cast_kv(key_states, value_states, self.dtype)
        key, value = _update(self.cache, self.dtype, key, value, layer_idx, *args, **kwargs)
        return (key.to(key_states.dtype), value.to(value_states.dtype)) if self.returns_whole else (key, value)


def _update(
    cache: Any, dtype: torch.dtype | None, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Write to ``cache``; a layer that was made or filled in another dtype goes over to ``dtype``."""
    if dtype is None:
        return cache.update(key, value, layer_idx, *args, **kwargs)
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.dtype != dtype:
        layer.keys, layer.values, layer.dtype = keys.to(dtype), layer.values.to(dtype), dtype
    with no_autocast(key.device.type):  # it would not concatenate float16 on a CPU
        return cache.update(key, value, layer_idx, *args, **kwargs)
