"""Attention whose keys and values begin with a prefix that all rows of a batch share.

One attention function and one mask function for each implementation of transformers', registered beside it. The prefix
travels as the keyword argument ``ptune_prefix`` through the model's own forward; without it a pair is the stock one.
Further pairs do the same in half precision (see `half_attention`): what they do is all in their names, so that a
model's config, which holds one, is all that knows of it.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptune_kernels import Placement, cast_qkv, prepend_kv

from .call import Call, running

KEYWORD = "ptune_prefix"

# Not by the stock names: "sdpa", "flash" or "flex_attention" within a name makes transformers do further things.
_NAMES = {
    "sdpa": "ptune_torch",
    "eager": "ptune_eager",
    "flex_attention": "ptune_flex",
    "flash_attention_2": "ptune_fa2",
    "flash_attention_3": "ptune_fa3",
}
_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Attention:
    """What a registered pair does.

    Attributes:
        stock: the implementation of transformers' that it stands for.
        dtype: that of its arithmetic, float16 or bfloat16; ``None`` for what the model has.
        cache_dtype: that in which caches keep keys and values; ``None`` for what the model has.
    """

    stock: str
    dtype: torch.dtype | None = None
    cache_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The name that it is registered by."""
        parts = [_NAMES[self.stock]]
        if self.dtype is not None:
            parts.append(_SHORT[self.dtype])
        if self.cache_dtype is not None and self.cache_dtype != self.dtype:
            parts += ["kv", _SHORT[self.cache_dtype]]
        return "_".join(parts)

    def function(self, module: Any) -> Callable[..., Any]:
        """The stock function, for ``module``."""
        return eager_of(module) if self.stock == "eager" else ALL_ATTENTION_FUNCTIONS[self.stock]

    def behind_prefix(self, module: Any) -> Callable[..., Any]:
        """That for keys which begin with a prefix that no mask counts."""
        return _sdpa if self.stock == "sdpa" else self.function(module)

    def run(
        self,
        function: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """``function`` in this attention's dtype, and its output in the query's; autocast has no say in between."""
        if self.dtype is None:
            return function(module, query, key, value, mask, **kwargs)
        cast = _cast(query, key, value, self.dtype)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"].to(self.dtype)
        with no_autocast(query.device.type):
            output, weights = function(module, *cast, _additive_in(self.dtype, mask), **kwargs)
        return output.to(query.dtype), weights


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """That in which autocast has matrices multiplied; ``None`` where it is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within it, dtypes are what they are said to be."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _cast(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if dtype not in (query.dtype, key.dtype, value.dtype):
        return cast_qkv(query, key, value, dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)  # a prefix or a cache has made keys and values so


def cast_kv(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Key and value [b, h, n, head_dim] in ``dtype``, in one launch."""
    if key.dtype != value.dtype or key.dtype == dtype:
        return key.to(dtype), value.to(dtype)  # they differ under autocast
    no_k, no_v = (x.new_empty(x.shape[1], 0, x.shape[3]) for x in (key, value))
    return prepend_kv(no_k, no_v, key, value, dtype=dtype)


def agreeing(key: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Key and value of one dtype: where they differ, ``dtype`` or autocast's.

    Under autocast rotated keys are float32, until the attention rounds them as it does the values.
    """
    if key.dtype == value.dtype:
        return key, value
    dtype = dtype or autocast_dtype(key.device.type) or key.dtype
    return key.to(dtype), value.to(dtype)


def _additive_in(dtype: torch.dtype | None, mask: Any) -> Any:
    """An additive mask in ``dtype``, if there is one.

    Its least number leaves room, or float16 scores added to it would be infinite.
    """
    if dtype is None or not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.dtype == dtype:
        return mask
    least = torch.finfo(dtype).min / 2
    hidden = mask <= max(least, torch.finfo(mask.dtype).min / 2)  # a float16 mask's least would not hide from bfloat16
    return mask.masked_fill(hidden, 0).to(dtype).masked_fill(hidden, least)


_PAIRS = {
    pair.name: pair
    for stock in _NAMES
    for pair in (
        Attention(stock),
        *(Attention(stock, dtype, cache_dtype) for dtype in (torch.float16, torch.bfloat16) for cache_dtype in _SHORT),
    )
}


def attention_of(implementation: str | None) -> Attention | None:
    """What one of our pairs, or of transformers' implementations, does; ``None`` where we have no pair for it."""
    if implementation in _NAMES:
        return Attention(implementation)
    return _PAIRS.get(implementation or "")


def sharing_name(implementation: str | None) -> str | None:
    """The pair of ours for one of transformers' implementations (or for ours itself); ``None`` if there is none."""
    attention = attention_of(implementation)
    return None if attention is None else attention.name


def stock_name(implementation: str) -> str:
    """The implementation that a pair of ours stands for."""
    attention = attention_of(implementation)
    return implementation if attention is None else attention.stock


def unshared_name(implementation: str) -> str:
    """What ``implementation`` is where nothing is shared: a pair of ours only where it is in half precision."""
    attention = attention_of(implementation)
    return implementation if attention is None or attention.dtype is not None else attention.stock


def cache_dtype_of(implementation: str) -> torch.dtype | None:
    """The dtype in which caches are to keep keys and values; ``None`` for that in which these come."""
    attention = attention_of(implementation)
    return None if attention is None else attention.cache_dtype


class Prefix:
    """Keys and values [h, M, head_dim] of prompt rows at every attention, by depth in execution order.

    ``placement`` says which of these rows stand where in each row of a batch; by default all, and before the text.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], placement: Placement | None = None) -> None:
        self.layers = layers
        self.placement = placement

    @classmethod
    def joined(cls, prefixes: Sequence["Prefix"]) -> "Prefix":
        """One pool of the rows of several."""
        if len(prefixes) == 1:
            return prefixes[0]
        layers = zip(*(prefix.layers for prefix in prefixes), strict=True)
        return cls([(torch.cat([k for k, _ in pairs], 1), torch.cat([v for _, v in pairs], 1)) for pairs in layers])

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Prefix":
        """From what `tensors` returns."""
        return cls(list(zip(tensors[::2], tensors[1::2], strict=True)))

    def tensors(self) -> list[Tensor]:
        """The key of layer 0, its value, the key of layer 1, …"""
        return [tensor for layer in self.layers for tensor in layer]

    def placed(self, placement: Placement | None) -> "Prefix":
        return Prefix(self.layers, placement)

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def num_columns(self) -> int:
        """How many columns it takes."""
        return self.layers[0][0].shape[1] if self.placement is None else self.placement.max_length

    def before(self, depth: int, key: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """``[prefix ; text]`` keys and values [b, h, m + n, head_dim] of the attention at ``depth``.

        In ``dtype``, which is by default that of the text.
        """
        key, value = agreeing(key, value, dtype)
        prefix_k, prefix_v = (tensor.to(key.device) for tensor in self.layers[depth])
        return prepend_kv(prefix_k, prefix_v, key, value, self.placement, dtype)

    def attend(
        self,
        attention: Attention,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        depth: int | None = None,
        **kwargs: Any,
    ) -> Any:
        key, value = self.before(module.ptune_depth if depth is None else depth, key, value, attention.dtype)
        return attention.run(attention.behind_prefix(module), module, query, key, value, mask, **kwargs)


class Behind:
    """Given to the attention functions in place of a `Prefix` where their cache has set it before the text already."""

    def attend(self, attention: Attention, module: Any, *states: Any, **kwargs: Any) -> Any:
        return attention.run(attention.behind_prefix(module), module, *states, **kwargs)


def _attention(
    attention: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    prefix = kwargs.pop(KEYWORD, None)
    if prefix is None:
        return attention.run(attention.function(module), module, query, key, value, attention_mask, **kwargs)
    return prefix.attend(attention, module, query, key, value, attention_mask, **kwargs)


def eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention of the file that ``module``'s class is written in: each has its own."""
    for ancestor in type(module).__mro__:
        function = getattr(sys.modules[ancestor.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotImplementedError(f"{type(module).__name__}: its file has no eager_attention_forward")


def is_causal_in(module: Any, given: bool | None) -> bool:
    """Whether ``module`` attends to what came before alone, unless it is ``given``."""
    return getattr(module, "is_causal", True) if given is None else given


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stock sdpa, where no mask means causal with the triangle at the lower right, and heads are grouped natively."""
    causal = is_causal_in(module, is_causal)
    device = query.device.type
    bias: Any = mask
    if mask is None and causal and query.shape[2] > 1:
        size = query.shape[2], key.shape[2]
        if device == "cpu" or torch.compiler.is_compiling():
            bias = torch.ones(size, dtype=torch.bool, device=query.device).tril(size[1] - size[0])
        else:
            bias = causal_lower_right(*size)
            if dtype := autocast_dtype(device):  # which comes too late: the bias calls the kernels itself
                query, key, value = (x.to(dtype) for x in (query, key, value))
    shape, groups = query.shape, query.shape[1] // key.shape[1]
    if groups > 1 and device == "cpu":
        # one product per key head serves all its query heads: a CPU does grouped heads one by one
        query = query.reshape(shape[0], key.shape[1], groups * shape[2], shape[3])
        bias = bias if bias is None else torch.cat([bias] * groups, dim=-2)
    elif groups > 1 and type(bias) is Tensor:
        # a GPU has no fused kernel for grouped heads and a mask
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    ).reshape(*shape[:3], value.shape[3])
    return output.transpose(1, 2).contiguous(), None


_OF_TEXT = {"q_offset", "kv_offset", "mask_function", "attention_mask"}


def _mask(attention: Attention, **given: Any) -> Any:
    """The stock mask, and in a call that injects a prefix, its rows of text over prefix and text."""
    stock, call = ALL_MASK_ATTENTION_FUNCTIONS[attention.stock], running()
    if call is not None and call.body is not None and given.get("config", call.body.config) is not call.body.config:
        call = None  # that of another model, which calls this one or was interrupted
    if isinstance(call, Call) and call.capture is not None:
        call.capture.note_window(given.get("local_size"))
    if not isinstance(call, Call) or not (call.injected or call.cache is not None or call.packed):
        return _additive_in(attention.dtype, stock(**given))
    if (packed := call.packed) is not None:
        if packed.own_mask is None and not packed.overwritten:
            # causal, as no window is narrower (see `PrefixPath.discover`)
            own = {"batch_size": 1, "q_length": packed.num_prompts, "kv_length": packed.num_prompts}
            own = {name: value for name, value in given.items() if name not in _OF_TEXT} | own
            packed.own_mask = _additive_in(attention.dtype, stock(**own))
        keys = packed.mask if given.get("attention_mask") is None else packed.mask.to(given["attention_mask"].device)
        given |= {"batch_size": packed.batch_size, "q_length": packed.length, "attention_mask": keys}
        if packed.cache is None:
            given["kv_length"] = keys.shape[1]
    given["q_offset"] = given.get("q_offset", 0) + call.injected
    if call.columns is not None:
        given["mask_function"] = partial(_by_column, given["mask_function"], call.columns)
    window = given.get("local_size")
    skip = given.get("allow_is_causal_skip", True) or given.get("allow_is_bidirectional_skip", False)
    plain = attention.stock == "sdpa" and skip and (window is None or given["kv_length"] < window)
    if call.cache is not None:  # a static one is longer than what it holds
        plain = plain and given["kv_length"] == call.layout.num_prompts + call.length
    mask = None
    if call.padded or not plain:
        mask = _additive_in(attention.dtype, stock(**given | {"allow_is_causal_skip": False}))
    if packed is not None and plain:
        packed.plain_mask = mask
    return mask


def _by_column(mask_function: Any, columns: Tensor, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return mask_function(batch, head, query, columns[batch, key])


def _register() -> None:
    for name, attention in _PAIRS.items():
        if attention.stock == "eager" or attention.stock in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, attention))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(_mask, attention))


_register()
