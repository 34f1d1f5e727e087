"""Prompt rows and the text of a whole batch in one pass: ``[1, m + b·n]``, which only attentions take apart again."""

from typing import Any

import torch
from torch import Tensor, nn

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
        (own_query, query), (own_key, key), (own_value, value) = map(self._parts, (query, key, value))
        prefix = Prefix([(own_key.squeeze(0), own_value.squeeze(0))])
        output, weights = prefix.attend(attention, module, query, key, value, mask, depth=0, **kwargs)
        output = output.flatten(0, 1)[None]
        if self.overwritten:
            return nn.functional.pad(output, (0, 0, 0, 0, self.num_prompts, 0)), weights
        function = attention.function(module)
        own, _ = attention.run(function, module, own_query, own_key, own_value, self.own_mask, **kwargs)
        return torch.cat([own, output], 1), weights

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[1, h, m + b·n, head_dim] → [1, h, m, head_dim] and [b, h, n, head_dim]."""
        prompt, text = states.split([self.num_prompts, self.batch_size * self.length], 2)
        return prompt, text.squeeze(0).unflatten(1, (self.batch_size, self.length)).transpose(0, 1)
