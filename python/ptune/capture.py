"""The keys and values of prompt rows, taken while these run alone."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import Attention, Prefix, autocast_dtype

_UNREAD = "ptune_unread"


class Capture:
    """Given to the attention functions in place of a `Prefix`, while prompt rows run as a batch of one.

    Where every block overwrites its prompt rows (``overwritten``), what a block makes of them after its keys and values
    is lost, and neither that nor any query is computed.

    Args:
        deep: the rows [m, d] of each block, if there are deep prompts.
        overwritten: whether they become the rows, rather than being added to them.
    """

    def __init__(self, deep: Sequence[Tensor], overwritten: bool) -> None:
        self.deep = deep
        self.overwritten = overwritten
        self.modules: list[nn.Module] = []
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.products: list[tuple[Tensor, Tensor]] | None = None
        self.marked = False
        self.lost = False
        self.window: int | None = None

    def note_window(self, window: int | None) -> None:
        """Keep the narrowest sliding window of the attentions."""
        if window:  # 0 says that no block has one
            self.window = window if self.window is None else min(window, self.window)

    def prefix(self) -> Prefix:
        return Prefix(self.layers)

    @property
    def mode(self) -> str:
        """What deep prompts do to rows that a block made."""
        return "overwrite" if self.overwritten else "add"

    def before_block(self, hidden: Tensor) -> Tensor:
        """The input of a block, without the graph of what it is about to lose."""
        self.lost = False
        return hidden.detach() if self.overwritten and self.layers else hidden

    def attend(
        self,
        attention: Attention,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        self.modules.append(module)
        self.layers.append((key[0], value[0]))
        if not self.overwritten:
            return attention.run(attention.function(module), module, query, key, value, mask, **kwargs)
        self.lost = True
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    def skipping(self) -> AbstractContextManager[Any]:
        """Within it, no matrices are multiplied for what nobody reads; a compiler finds that out by itself."""
        if not self.overwritten or torch.compiler.is_compiling():
            return nullcontext()
        return _SkipUnread(self)

    def mark_unread(self) -> None:
        """Mark the weights, of those that `products` lists, whose products reach no key or value: the queries'."""
        if not self.overwritten:
            return
        products = [(weight, product) for weight, product in self.products or [] if product.requires_grad]
        reached = [tensor for layer in self.layers for tensor in layer if tensor.requires_grad]
        if not products or not reached:
            return
        gradients = torch.autograd.grad(
            reached, [product for _, product in products], [torch.zeros_like(t) for t in reached], allow_unused=True
        )
        read = {id(weight) for (weight, _), gradient in zip(products, gradients, strict=True) if gradient is not None}
        for weight, _ in products:
            vars(weight)[_UNREAD] = id(weight) not in read


class _SkipUnread(TorchFunctionMode):
    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture = capture

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        capture = self.capture
        if func is nn.functional.linear and not kwargs:
            if capture.lost or (capture.marked and capture.products is None and getattr(args[1], _UNREAD, False)):
                return _no_product(args[0], *args[0].shape[:-1], args[1].shape[0])
            product = func(*args)
            if capture.products is not None:
                capture.products.append((args[1], product))
            return product
        if func is torch.addmm and not kwargs and capture.lost:
            return _no_product(args[1], args[1].shape[0], args[2].shape[1])
        return func(*args, **(kwargs or {}))


def _no_product(of: Tensor, *shape: int) -> Tensor:
    """Zeros in the dtype that a product would have, which autocast has a say in."""
    dtype = None if of.dtype == torch.float64 else autocast_dtype(of.device.type)
    return of.new_zeros(*shape, dtype=dtype)
