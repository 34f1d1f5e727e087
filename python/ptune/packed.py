"""Prompt rows and the text of a whole batch in one pass: ``[1, m + b·n]``, which only attentions take apart again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .attention import Attention, Prefix


class Packed:
    """Given to the attention functions in place of a `Prefix` whose keys and values this very pass computes.

    All that a model does token by token it does to the m prompt rows and to the ``b·n`` rows of text at once, so that
    it launches what one call of the text alone would. Attention is where they part: prompt rows attend to themselves,
    and each text to the prompt rows and to itself.

    Args:
        num_prompts: m.
        batch_size: b.
        length: n.
        mask: [b, m + n], 1 for what may be attended to.
        overwritten: whether every block overwrites its prompt rows, so that what attention makes of them is lost.
    """

    def __init__(self, num_prompts: int, batch_size: int, length: int, mask: Tensor, overwritten: bool) -> None:
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.length = length
        self.mask = mask
        self.overwritten = overwritten
        self.own_mask: Any = None

    @property
    def rows(self) -> int:
        return self.num_prompts + self.batch_size * self.length

    def join(self, prompt: Tensor, text: Tensor) -> Tensor:
        """[m] and [b, n] or [1, n] → [1, m + b·n]."""
        return torch.cat([prompt, text.expand(self.batch_size, -1).flatten()])[None]

    def text_of(self, states: Tensor) -> Tensor:
        """[1, m + b·n, …] → [b, n, …]."""
        return states[:, self.num_prompts :].reshape(self.batch_size, self.length, *states.shape[2:])

    def attend(
        self,
        attention: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("position_ids", None)  # they restart where a text begins, which flash attention would act on
        own_query, query, own_key, key, own_value, value = _Part.apply(self, query, key, value)
        prefix = Prefix([(own_key.squeeze(0), own_value.squeeze(0))])
        output, weights = prefix.attend(attention, module, query, key, value, mask, depth=0, **kwargs)
        output = output.reshape(1, -1, *output.shape[2:])
        if self.overwritten:
            return nn.functional.pad(output, (0, 0, 0, 0, self.num_prompts, 0)), weights
        own_output, _ = attention.run(
            attention.function(module), module, own_query, own_key, own_value, self.own_mask, **kwargs
        )
        return torch.cat([own_output, output], 1), weights


class _Part(Function):
    """One node of the graph for a dozen, whose gradients are in the order of rows, as projections read them."""

    @staticmethod
    def forward(ctx: Any, packed: Packed, *states: Tensor) -> tuple[Tensor, ...]:
        """Of each [1, h, m + b·n, head_dim] the prompt's [1, h, m, head_dim] and the texts' [b, h, n, head_dim]."""
        ctx.set_materialize_grads(False)
        ctx.num_prompts, ctx.rows = packed.num_prompts, packed.rows
        parts: list[Tensor] = []
        for each in states:
            own, text = each.split([packed.num_prompts, packed.rows - packed.num_prompts], 2)
            # attention keeps what it is given for its backward, and a view would keep the text's rows too
            own = own if packed.overwritten else own.clone()
            parts += [own, text.squeeze(0).unflatten(1, (packed.batch_size, packed.length)).transpose(0, 1)]
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(_Part.joined(ctx, *pair) for pair in zip(grads[::2], grads[1::2], strict=True))

    @staticmethod
    def joined(ctx: Any, own: Tensor | None, text: Tensor | None) -> Tensor | None:
        if text is None:
            return None  # a prompt without a text to read it is read by nobody
        batch_size, heads, length, head_dim = text.shape
        grad = text.new_empty(1, ctx.rows, heads, head_dim)
        prompt = grad[:, : ctx.num_prompts]
        if own is None:
            prompt.zero_()
        else:
            prompt.copy_(own.transpose(1, 2))
        grad[:, ctx.num_prompts :].view(batch_size, length, heads, head_dim).copy_(text.transpose(1, 2))
        return grad.transpose(1, 2)
