"""Modules that run in another precision than the rest of their model, with casts at their borders."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache, PreTrainedModel

from ..attention import no_autocast
from ..mixin import PTuneMixin

BORDERED = "_ptune_bordered"  # set on modules that run in float32 by `keep_fp32`: their own forward, if they have one
_WITNESS = "_ptune_witness"  # a buffer of models that have some, empty: its dtype is that of what is around these

_Place = tuple[dict[str, Any], str]  # a module's parameters or buffers, and a name of theirs


def keep_fp32(model: Any, names: Sequence[str]) -> Any:
    """Have the modules ``names`` of ``model`` run in float32 from now on, whatever the rest runs in, and return it.

    Their inputs are cast to float32, autocast has no say in them, and their outputs are cast to the dtype of the rest.
    Casts of the model that follow (`to_half`, ``.half()``) pass them by; a model that is in half precision already gets
    float32 modules of rounded weights, so load it in float32. A weight that one of them shares with a module outside (a
    tied head) becomes its own.

    Raises `ValueError`, before anything changes, for names that the model does not have, or a list of modules.
    """
    modules = dict(model.named_modules())
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a list of modules' names, got {names!r}")
    for name in names:
        if name not in modules or isinstance(modules[name], nn.ModuleList):
            raise ValueError(f"names: {name!r} is no module of {type(model).__name__} that runs")
    wanted = dict.fromkeys([*(m for m in modules.values() if hasattr(m, BORDERED)), *(modules[name] for name in names)])
    parts = {part for module in wanted for part in module.modules() if part is not module}
    kept = [module for module in wanted if module not in parts]  # the border is around the outermost
    inside = {*kept, *parts}
    outside = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    for part in inside:
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in outside:
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for module in wanted:
        if hasattr(module, BORDERED):
            _set_forward(module, getattr(module, BORDERED))
            del module._apply
            delattr(module, BORDERED)
    for module in kept:
        module.float()
        # partials of module-level functions, and not closures, are copied and pickled with the model
        setattr(module, BORDERED, vars(module).get("forward"))
        module.forward = partial(_forward_kept, module, vars(module).get("forward"), model)
        module._apply = partial(_apply, module)
    around = (tensors[name].new_empty(0) for tensors, name in _cast_when_loaded(model, torch.float16))
    model.register_buffer(_WITNESS, next(around, torch.empty(0)), persistent=False)
    return model


def to_half(model: Any, dtype: torch.dtype) -> Any:
    """Cast the weights of a float32 ``model`` to ``dtype``, in place, and return it.

    Other than ``.half()`` and ``.to(…)``, it leaves in float32 what ``from_pretrained(dtype=dtype)`` would: weights
    that the model's class keeps so (T5's ``wo``) and buffers that no checkpoint holds (rotary frequencies, which
    bfloat16 would make useless far into a text); and prompts and their head, and what `keep_fp32` was told of.

    Raises `ValueError` for a dtype other than ``torch.float16`` and ``torch.bfloat16``.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
    for tensors, name in _cast_when_loaded(model, dtype):
        tensors[name].data = tensors[name].data.to(dtype)
    return model


def _forward_kept(module: Any, inner: Callable[..., Any] | None, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _forward_in(module, inner, torch.float32, model.get_buffer(_WITNESS).dtype, *args, **kwargs)


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``module``'s own ``_apply``, without a change of dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = change(tensor)
        # from the original, as the cast has rounded it
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return type(module)._apply(module, move, recurse)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating point tensor in it in ``dtype``."""
    return _mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def rounded(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating point tensor in it rounded to ``dtype``, and in the dtype that it has."""
    return _mapped(lambda x: x.to(dtype).to(x.dtype) if x.is_floating_point() else x, value)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    # a cache is filled in place, so a copy would be filled for nobody; to torch.export it is a tree of tensors
    return tree_map_only(Tensor, change, value, is_leaf=lambda each: isinstance(each, Cache))


def _forward_in(
    module: Any, inner: Callable[..., Any] | None, dtype: torch.dtype, around: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    """``module``'s forward on inputs cast to ``dtype``, and its outputs in the dtype ``around``.

    That is not always the inputs' own: blocks of T5 and Mamba cast these to what the weights of ``module`` are in.
    ``inner``: the instance's own forward, where it has one beside its class's.
    """
    forward = partial(type(module).forward, module) if inner is None else inner
    device = next((x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), "cpu")
    with no_autocast(device):
        return cast(forward(*cast(args, dtype), **cast(kwargs, dtype)), around)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """``forward`` of the instance, beside its class's; ``None`` for none."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


@contextmanager
def running_in(modules: Iterable[nn.Module], dtype: torch.dtype, around: torch.dtype) -> Iterator[None]:
    """Within it, each of ``modules`` runs in ``dtype`` by itself: inputs, weights and arithmetic; and what is around
    them in ``around``."""
    modules = list(modules)
    parts = [part for module in modules for part in module.modules()]
    within = {part: getattr(part, BORDERED) for part in parts if hasattr(part, BORDERED)}  # have no border there
    own = {module: vars(module).get("forward") for module in (*within, *modules)}
    with _replaced(_floating(parts), dtype):
        try:
            for part, forward in within.items():
                _set_forward(part, forward)
            for module in modules:
                _set_forward(module, partial(_forward_in, module, own[module], dtype, around))
            yield
        finally:
            for module, forward in own.items():
                _set_forward(module, forward)


@contextmanager
def loaded_in(model: nn.Module, dtype: torch.dtype, keep: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Within it, the weights of ``model`` are what `to_half` makes of them, but for those of ``keep``."""
    with _replaced(_cast_when_loaded(model, dtype, keep), dtype):
        yield


def _cast_when_loaded(model: nn.Module, dtype: torch.dtype, keep: Iterable[nn.Module] = ()) -> Iterator[_Place]:
    """What `to_half` casts."""
    stay: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            plan = [re.compile(pattern.replace("*", ".*")) for pattern in module._get_dtype_plan(dtype)]
            for name, parameter in module.named_parameters():
                own = isinstance(module, PTuneMixin) and parameter.requires_grad
                if own or any(pattern.search(name) for pattern in plan):
                    stay.add(id(parameter))
            if isinstance(module, PTuneMixin) and module.compiled_prefix is not None:
                stay.update(map(id, module.compiled_prefix.parameters()))
    whole = [*keep, *(module for module in model.modules() if hasattr(module, BORDERED))]
    kept = {part for module in whole for part in module.modules()}
    places = _floating(module for module in model.modules() if module not in kept)
    return ((tensors, name) for tensors, name in places if id(tensors[name]) not in stay)


def _floating(modules: Iterable[nn.Module]) -> Iterator[_Place]:
    """Where the parameters and saved buffers are that hold floating point numbers, and the witness."""
    for module in dict.fromkeys(modules):
        for tensors, unsaved in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and (name not in unsaved or name == _WITNESS):
                    yield tensors, name


@contextmanager
def _replaced(places: Iterable[_Place], dtype: torch.dtype) -> Iterator[None]:
    """Within it, the tensors at ``places`` are in ``dtype``; then they are the same objects again.

    A parameter that several modules share is cast once for those given, and for no other.
    """
    before = [(tensors, name, tensors[name]) for tensors, name in places]
    others: dict[int, Tensor] = {}
    try:
        for tensors, name, tensor in before:
            if id(tensor) not in others:
                other = tensor.to(dtype)
                parameter = isinstance(tensor, nn.Parameter) and other is not tensor
                others[id(tensor)] = nn.Parameter(other, requires_grad=False) if parameter else other
            tensors[name] = others[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor
