"""How gradients reach the prompt rows where they would not by themselves: past checkpoints, into sharded blocks."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from .attention import Prefix
from .capture import Capture


def bridge(embeds: Tensor, prefix: Prefix) -> tuple[Tensor, Prefix]:
    """The text and the prefix, such that each layer's recomputation reaches leaves of its own, and no further.

    A reentrant checkpoint runs a backward for each layer, which must not free what the layers share: the graph behind
    the prefix. So the layers get detached leaves, and what these gather reaches that graph through the text, whose
    backward is the last of all.
    """
    tensors = prefix.tensors()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return _Bridge.apply(embeds, leaves, *tensors), Prefix.of(leaves)


class _Bridge(Function):
    @staticmethod
    def forward(ctx: Any, embeds: Tensor, leaves: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad if ctx.needs_input_grad[0] else None, None, *gathered)


def unshard_for_backward(body: nn.Module, capture: Capture) -> None:
    """Gather sharded weights (FSDP2) before a gradient enters a block by its keys and values.

    FSDP does so where it enters by the block's output, which is the only way that it knows.
    """
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return
    owners: dict[nn.Module, FSDPModule] = {}
    for module in body.modules():
        if isinstance(module, FSDPModule):
            owners |= dict.fromkeys(module.modules(), module)  # the innermost comes last
    for attention, tensors in zip(capture.modules, capture.layers, strict=True):
        if (owner := owners.get(attention)) is not None:
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(partial(_unshard, owner))


def _unshard(owner: FSDPModule, grad: Tensor) -> None:
    owner.unshard()
