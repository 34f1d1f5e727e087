"""`keep_fp32`: named modules run in float32, in a model that is otherwise in half precision."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .casts import BORDERED, forward_in


def keep_fp32(model: Any, names: Sequence[str]) -> Any:
    """Have the modules ``names`` of ``model`` run in float32 from now on, whatever the rest runs in, and return it.

    Their inputs are cast to float32, and their outputs back to what came in (or to the dtype of the rest, for an
    embedding). Casts of the model that follow (``.half()``, ``.to(torch.bfloat16)``) pass them by; a model that is in
    half precision already gets float32 modules of rounded weights, so load it in float32. A weight that one of them
    shares with a module outside (a tied head) becomes its own.

    Raises `ValueError`, before anything changes, for names that the model does not have, or a list of modules.
    """
    modules = dict(model.named_modules())
    if isinstance(names, str) or not names:
        raise ValueError(f"names: expected a list of modules' names, got {names!r}")
    for name in names:
        if name not in modules or isinstance(modules[name], nn.ModuleList):
            raise ValueError(f"names: {name!r} is no module of {type(model).__name__} that runs")
    kept = {modules[name] for name in names}
    inside = {part for module in kept for part in module.modules()}
    outside = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    for part in inside:
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in outside:
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    for module in kept:
        module.float()
        # partials of module-level functions, and not closures, are copied and pickled with the model
        module.forward = partial(forward_in, module, vars(module).get("forward"), torch.float32, model)
        module._apply = partial(_apply, module)
        setattr(module, BORDERED, True)
    return model


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``module``'s own ``_apply``, without a change of dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = change(tensor)
        # from the original, as the cast has rounded it
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return type(module)._apply(module, move, recurse)
