"""`hybrid`: float32 weights and activations, and attention in half precision.

After the hybrid dtype proposed for vLLM, where fast attention kernels refuse float32 and some models fail in float16.
"""

import inspect
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .attention import Attention, attention_of, cache_dtype_of
from .cache import CastCache, PackedCache, PrefixedCache
from .config import SHORT_DTYPES
from .inputs import CACHE
from .quantised import is_quantised

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CACHES = HALVES | {"float32": torch.float32}
SETTINGS = ("attn_dtype", "kv_cache_dtype")
# float32 weights of an attention that take what its cache returns: DeepSeek's (MLA), which compress it, and Doge's
_BEHIND_THE_CACHE = ("kv_b_proj", "dt_proj")
_CACHE_ARGUMENTS = (CACHE, "layer_past")


def hybrid(
    model: Any,
    attn_dtype: torch.dtype | str | None = torch.bfloat16,
    kv_cache_dtype: torch.dtype | str | None = None,
) -> Any:
    """Have a float32 model compute its attention in ``attn_dtype``, and return it.

    Queries, keys and values are cast in one launch, and what attention makes of them comes back in float32; all else,
    gradients included, is float32 throughout. Under autocast, attention is in ``attn_dtype`` all the same. Attention
    weights, where ``output_attentions`` asks for them, are in ``attn_dtype``.

    Args:
        model: any transformers model whose attention is on its attention interface, with prompts or without.
        attn_dtype: ``torch.bfloat16`` or ``torch.float16``, or its name; ``None`` takes it all back.
        kv_cache_dtype: that in which caches keep keys and values, by default ``attn_dtype``; ``torch.float32`` keeps
            them whole. A cache that was begun in another dtype is cast when it is next written.

    It lasts until ``model.set_attn_implementation(…)``, which sets just what it names. Raises `TypeError`,
    `ValueError` or `NotImplementedError`, naming the argument, and changes nothing then.
    """
    dtype, cache_dtype = checked_dtypes(attn_dtype, kv_cache_dtype)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    before = model.config._attn_implementation
    if dtype is None:
        if any(_is_half(part) for part in parts):
            model.set_attn_implementation(attention_of(before).stock)  # type: ignore[union-attr]
        for module in model.modules():
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _cast_cache]:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        return model
    _check(model, parts)
    attention = Attention(attention_of(before).stock, dtype, cache_dtype)  # type: ignore[union-attr]
    model.set_attn_implementation(attention.name)
    if any(attention_of(part.config._attn_implementation) != attention for part in parts):
        model.set_attn_implementation(before)
        _refuse(model, "its attention implementation cannot be set")
    for module in model.modules():
        if _takes_cache(module) and _cast_cache not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_cache, with_kwargs=True)
    return model


def checked_dtypes(attn_dtype: Any, kv_cache_dtype: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Both as dtypes, the second by default the first. Raises `ValueError` for what `hybrid` does not take."""
    attn_dtype, kv_cache_dtype = (SHORT_DTYPES.get(str(given), given) for given in (attn_dtype, kv_cache_dtype))
    for name, given, choices in (("attn_dtype", attn_dtype, HALVES), ("kv_cache_dtype", kv_cache_dtype, CACHES)):
        if given not in (None, *choices, *choices.values()):
            raise ValueError(f"{name}: expected one of {', '.join(choices)} or None, got {given!r}")
    if attn_dtype is None and kv_cache_dtype is not None:
        raise ValueError(f"kv_cache_dtype: expected with an attn_dtype, got {kv_cache_dtype!r} alone")
    dtype, cache_dtype = CACHES.get(attn_dtype, attn_dtype), CACHES.get(kv_cache_dtype, kv_cache_dtype)
    return dtype, cache_dtype or dtype


def dtypes_of(model: Any) -> dict[str, str | None]:
    """The `SETTINGS` of ``model``: what `hybrid` was given, by their names."""
    attention = attention_of(model.config._attn_implementation)
    dtypes = (None, None) if attention is None else (attention.dtype, attention.cache_dtype)
    names = {dtype: name for name, dtype in CACHES.items()}
    return dict(zip(SETTINGS, (None if dtype is None else names[dtype] for dtype in dtypes), strict=True))


def _check(model: Any, parts: list[Any]) -> None:
    if not getattr(model, "blocks_are_here", True):
        _refuse(model, "it runs on servers, in the dtype of their weights; attn_dtype=None goes on without")
    if is_quantised(model):
        _refuse(model, "a quantised model decides the dtypes of its own modules")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(f"model: expected float32 weights, got {parameter.dtype} in {name}; load it in float32")
    if not all(part._can_set_attn_implementation() for part in parts) or not any(map(_is_attention, model.modules())):
        _refuse(model, "its attention is not on transformers' attention interface")
    implementations = {part.config._attn_implementation for part in parts}
    if len(implementations) > 1:
        _refuse(model, f"its parts have several attention implementations ({', '.join(sorted(implementations))})")
    if attention_of(model.config._attn_implementation) is None:
        _refuse(model, f"attn_implementation {implementations.pop()!r} has no counterpart in half precision")


def _is_half(part: Any) -> bool:
    attention = attention_of(part.config._attn_implementation)
    return attention is not None and attention.dtype is not None


def _is_attention(module: nn.Module) -> bool:
    """Whether the file that ``module``'s class is written in knows the interface."""
    return not isinstance(module, PreTrainedModel) and hasattr(
        inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS"
    )


def _takes_cache(module: Any) -> bool:
    if isinstance(module, PreTrainedModel) or not hasattr(module, "config"):
        return False
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in _CACHE_ARGUMENTS)


def _cast_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before an attention: its cache is to keep what the model's attention implementation says."""
    dtype = cache_dtype_of(module.config._attn_implementation)
    if dtype is None:
        return None
    how = dtype, any(hasattr(module, name) for name in _BEHIND_THE_CACHE)
    return tuple(_casting(x, how) for x in args), {name: _casting(x, how) for name, x in kwargs.items()}


def _casting(argument: Any, how: tuple[torch.dtype, bool]) -> Any:
    # a prefix is cast as it is written
    return (
        CastCache.of(argument, *how)
        if isinstance(argument, Cache) and not isinstance(argument, PackedCache | PrefixedCache)
        else argument
    )


def _refuse(model: Any, reason: str) -> NoReturn:
    raise NotImplementedError(f"{type(model).__name__}: attention in half precision is not supported, because {reason}")
