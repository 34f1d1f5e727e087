"""Prompt rows and the text of a whole batch in one pass: ``[1, m + b·n]``, which only attentions take apart again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .attention import KEYWORD, Attention, Prefix
from .concat import embed_behind


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
        self.mask = mask.bool()
        self.overwritten = overwritten
        self.own_mask: Any = None

    @property
    def rows(self) -> int:
        return self.num_prompts + self.batch_size * self.length

    def arguments(
        self, body: Any, given: dict[str, Any], prompts: Tensor, first_position: int, token_type: int | None
    ) -> dict[str, Any]:
        """Those of a call of ``body`` for the text, with prompts [m, d] before it."""
        count, mask, positions = self.num_prompts, given["attention_mask"], given["position_ids"]
        ids, embeds = (
            None if each is None else each.flatten(0, 1)[None]
            for each in (given.get("input_ids"), given.get("inputs_embeds"))
        )
        own_positions = torch.arange(count, device=positions.device) + first_position
        packed = {
            "input_ids": None,
            "inputs_embeds": embed_behind(prompts, body, ids, embeds),
            "attention_mask": self._join(mask.new_ones(count), mask),  # or positions would be read as packed texts
            "position_ids": self._join(own_positions, positions),
            KEYWORD: self,
        }
        if token_type is not None:
            types = given["token_type_ids"].to(mask.device)
            packed["token_type_ids"] = self._join(types.new_full((count,), token_type), types)
        return given | packed

    def leave(self, output: Any) -> None:
        """Make the states in ``output`` the text's."""
        output["last_hidden_state"] = self._text_of(output["last_hidden_state"])
        if (states := output.get("hidden_states")) is not None:
            output["hidden_states"] = tuple(map(self._text_of, states))
        if (routings := output.get("router_logits")) is not None:
            output["router_logits"] = tuple(logits[..., self.num_prompts :, :] for logits in routings)

    def _join(self, prompt: Tensor, text: Tensor) -> Tensor:
        """[m] and [b, n] or [1, n] → [1, m + b·n]."""
        return torch.cat([prompt, text.expand(self.batch_size, -1).flatten()])[None]

    def _text_of(self, states: Tensor) -> Tensor:
        """[1, m + b·n, d] → [b, n, d]."""
        return states[:, self.num_prompts :].reshape(self.batch_size, self.length, -1)

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
        ctx.packed = packed
        parts: list[Tensor] = []
        for each in states:
            own, text = each.split([packed.num_prompts, packed.rows - packed.num_prompts], 2)
            # attention keeps what it is given for its backward, and a view would keep the text's rows too
            own = own if packed.overwritten else own.clone()
            parts += [own, text.squeeze(0).unflatten(1, (packed.batch_size, packed.length)).transpose(0, 1)]
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(_joined(ctx.packed, *pair) for pair in zip(grads[::2], grads[1::2], strict=True))


def _joined(packed: Packed, *parts: Tensor | None) -> Tensor | None:
    """[1, h, m + b·n, head_dim], of gradients [1, h, m, head_dim] and [b, h, n, head_dim], where there are any."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    heads, head_dim = given.shape[1], given.shape[3]
    joined = given.new_empty(1, packed.rows, heads, head_dim)
    for first, batch_size, part in zip((0, packed.num_prompts), (1, packed.batch_size), parts, strict=True):
        length = packed.length if first else packed.num_prompts
        # a view for each write: where a graph of gradients is made, the last view is stale after the first write
        rows = joined[:, first : first + batch_size * length].view(batch_size, length, heads, head_dim)
        if part is None:
            rows.zero_()
        else:
            rows.copy_(part.transpose(1, 2))
    return joined.transpose(1, 2)
