"""A second model on the weights of a base, which a bank may change while the base stays as it is."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def twin_of(base: Any) -> Any:
    """A model of the same class and weights, whose modules are its own."""
    weights = {id(parameter): _sharing_memory(parameter) for parameter in base.parameters()}
    shared = {id(tensor): tensor for tensor in (*base.buffers(), *_taken_scales(base))}
    twin = copy.deepcopy(base, weights | shared).eval()
    for module in twin.modules():
        # LLM.int8's modules take the scales from their weights at the first call, which threads would race for
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()
    return twin


def _sharing_memory(parameter: Any) -> nn.Parameter:
    """A frozen parameter of the same values, in the same memory."""
    if not hasattr(parameter, "SCB"):
        return nn.Parameter(parameter.detach(), requires_grad=False)
    # LLM.int8's scales are on the parameter until its module takes them
    return type(parameter)(parameter.data, requires_grad=False, CB=parameter.CB, SCB=parameter.SCB)


def _taken_scales(model: Any) -> Iterator[Tensor]:
    """What LLM.int8's modules took from their weights."""
    for module in model.modules():
        if hasattr(getattr(module, "state", None), "SCB"):
            yield from (tensor for tensor in (module.state.CB, module.state.SCB) if tensor is not None)
