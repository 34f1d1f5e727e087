"""Modules that run in another precision than the rest of their model, with casts at their borders."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

from ..mixin import PTuneMixin

BORDERED = "_ptune_bordered"  # set on modules that run in a dtype of their own


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating point tensor in it in ``dtype``."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating point tensor in it rounded to ``dtype``, and in the dtype that it has."""
    return tree_map_only(Tensor, lambda x: x.to(dtype).to(x.dtype) if x.is_floating_point() else x, value)


def forward_in(
    module: Any, inner: Callable[..., Any] | None, dtype: torch.dtype, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """``module``'s forward on inputs cast to ``dtype``; outputs come in the dtype of the first floating input.

    ``inner``: the instance's own forward, where it has one beside its class's. ``model``: what it is part of; an
    embedding's output comes in the dtype of that.
    """
    floating = (x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point())
    around = next(floating, None) or _dtype_around(model)
    forward = partial(type(module).forward, module) if inner is None else inner
    return cast(forward(*cast(args, dtype), **cast(kwargs, dtype)), around)


def _dtype_around(model: nn.Module) -> torch.dtype:
    """The dtype of what runs in no dtype of its own."""
    within = {part for module in model.modules() if hasattr(module, BORDERED) for part in module.modules()}
    around = (module for module in model.modules() if module not in within)
    floating = (p.dtype for module in around for p in module.parameters(recurse=False) if p.is_floating_point())
    return next(floating, torch.float32)


@contextmanager
def running_in(model: nn.Module, modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within it, each of ``modules`` of ``model`` runs in ``dtype`` by itself: inputs, weights and arithmetic."""
    modules = list(modules)
    own = [vars(module).get("forward") for module in modules]
    with _replaced((m for module in modules for m in module.modules()), lambda tensor: tensor.to(dtype)):
        for module, inner in zip(modules, own, strict=True):
            module.forward = partial(forward_in, module, inner, dtype, model)
            setattr(module, BORDERED, True)
        try:
            yield
        finally:
            for module, inner in zip(modules, own, strict=True):
                delattr(module, BORDERED)
                del module.forward
                if inner is not None:
                    module.forward = inner


@contextmanager
def loaded_in(model: nn.Module, dtype: torch.dtype, keep: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Within it, the weights of ``model`` have the dtypes that ``from_pretrained(dtype=dtype)`` would give them.

    So those that the model's class keeps in float32 stay (T5's ``wo``), and so do prompts and their heads, buffers that
    no checkpoint holds (rotary frequencies), modules that `keep_fp32` was told of, and ``keep``.
    """
    stay: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            plan = [re.compile(pattern.replace("*", ".*")) for pattern in module._get_dtype_plan(dtype)]
            for name, parameter in module.named_parameters():
                own = isinstance(module, PTuneMixin) and parameter.requires_grad
                if own or any(pattern.search(name) for pattern in plan):
                    stay.add(id(parameter))
    whole = [*keep, *(module for module in model.modules() if hasattr(module, BORDERED))]
    kept = {part for module in whole for part in module.modules()}
    others = (module for module in model.modules() if module not in kept)
    with _replaced(others, lambda tensor: tensor if id(tensor) in stay else tensor.to(dtype)):
        yield


@contextmanager
def _replaced(modules: Iterable[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, parameters and saved buffers are what ``change`` makes of them; then they are the same objects again.

    A parameter that several modules share is changed once in those given, and in no other.
    """
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in dict.fromkeys(modules)]
    changed: dict[int, Any] = {}

    def replace(tensor: Tensor) -> Tensor:
        if id(tensor) not in changed:
            other = change(tensor)
            parameter = isinstance(tensor, nn.Parameter) and other is not tensor
            changed[id(tensor)] = nn.Parameter(other, requires_grad=False) if parameter else other
        return changed[id(tensor)]

    try:
        for module, parameters, buffers in before:
            for name, parameter in parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    module._parameters[name] = replace(parameter)  # type: ignore[assignment]
            for name, buffer in buffers.items():
                saved = name not in module._non_persistent_buffers_set
                if saved and buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = replace(buffer)
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
