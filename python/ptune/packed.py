"""Prompt rows and the text of a whole batch in one pass: ``[1, m + b·n]``, which only attentions take apart again."""

from typing import Any

import torch
from torch import Tensor, nn

from ptune_kernels import part_qkv, spread_kv

from . import varlen
from .anatomy import per_layer_input
from .attention import KEYWORD, Attention, agreeing, is_causal_in
from .cache import PackedCache
from .concat import embed_behind, fusible_scale


class Packed:
    """Given to the attention functions in place of a `Prefix` whose keys and values this very pass computes.

    All that a model does token by token it does to the m prompt rows and to the ``b·n`` rows of text at once, so that
    it launches what one call of the text alone would. Attention is where they part: prompt rows attend to themselves,
    and each text to the prompt rows and to itself.

    Args:
        num_prompts: m.
        mask: [b, m + n], 1 for what may be attended to; its columns are those of ``cache``, if there is one.
        padded: whether it hides anything.
        overwritten: whether every block overwrites its prompt rows, so that what attention makes of them is lost.
        cache: what keeps keys and values.
    """

    def __init__(
        self, num_prompts: int, mask: Tensor, padded: bool, overwritten: bool, cache: PackedCache | None = None
    ) -> None:
        self.num_prompts = num_prompts
        self.batch_size, self.length = mask.shape[0], mask.shape[1] - num_prompts
        self.mask = mask.bool()
        self.overwritten = overwritten
        self.cache = cache
        self.own_mask: Any = None
        self.plain_mask: Any = ...  # what attentions get where `mask` and causality are all that hides; not known yet
        # made outside the blocks, which may be compiled one by one
        self.lengths = None if cache is not None else varlen.Lengths.of(num_prompts, self.mask[:, num_prompts:], padded)

    @property
    def rows(self) -> int:
        return self.num_prompts + self.batch_size * self.length

    def arguments(
        self, body: Any, given: dict[str, Any], prompts: Tensor, first_position: int, token_type: int | None
    ) -> dict[str, Any]:
        """Those of a call of ``body`` for the text, with prompts [m, d] before it."""
        count, mask, positions = self.num_prompts, given["attention_mask"], given["position_ids"]
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        per_layer = None
        if (own := per_layer_input(body)) is not None:
            texts = body.get_per_layer_inputs(ids, embeds).flatten(0, 1)
            per_layer = torch.cat([own.expand(count, *own.shape), texts])[None]
        if embeds is None and fusible_scale(body.get_input_embeddings()) is None:
            # what is done beyond a look-up may depend on a text's length, as NEFTune's noise does
            ids, embeds = None, body.get_input_embeddings()(ids)
        ids, embeds = (None if each is None else each.flatten(0, 1)[None] for each in (ids, embeds))
        own_positions = torch.arange(count, device=positions.device) + first_position
        packed = {
            "input_ids": None,
            "inputs_embeds": embed_behind(prompts, body, ids, embeds),
            "attention_mask": self._join(mask.new_ones(count), mask),  # or positions would be read as packed texts
            "position_ids": self._join(own_positions, positions),
            KEYWORD: self,
        }
        if per_layer is not None:
            packed["per_layer_inputs"] = per_layer
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
        if self.cache is not None:
            own_query, query = self.cache.part(query)
            own = own_query, *self.cache.own_like(key)
            return self._attend_apart(attention, module, own, (query, key, value), mask, **kwargs)
        key, value = agreeing(key, value, attention.dtype)
        dtype = attention.dtype or key.dtype
        plain = attention.stock == "sdpa" and not kwargs.get("dropout") and kwargs.get("position_bias") is None
        lengths = self.lengths if mask is self.plain_mask else None
        if lengths is not None and plain and varlen.serves(query, key, value, dtype):
            keys, values = spread_kv(key, value, self.num_prompts, self.batch_size, dtype)
            queries = query.to(dtype).squeeze(0).transpose(0, 1)
            causal = is_causal_in(module, kwargs.get("is_causal"))
            output = varlen.flash(queries, keys, values, lengths, causal, kwargs.get("scaling"))[None]
            return output if attention.dtype is None else output.to(query.dtype), None
        own_query, own_key, own_value, query, key, value = part_qkv(
            query, key, value, self.num_prompts, self.batch_size, attention.dtype
        )
        if attention.stock == "eager" or query.device.type == "cpu":
            # they keep copies of the texts' queries for backward; a view of the prompt's would keep the rest as well
            own_query = own_query.clone()
        own = own_query, own_key, own_value
        return self._attend_apart(attention, module, own, (query, key, value), mask, **kwargs)

    def _attend_apart(
        self,
        attention: Attention,
        module: nn.Module,
        own: tuple[Tensor, Tensor, Tensor],
        of_text: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Queries, keys and values of the prompt rows, and of the texts behind them."""
        output, weights = attention.run(attention.behind_prefix(module), module, *of_text, mask, **kwargs)
        output = output.reshape(1, -1, *output.shape[2:])
        if self.overwritten:
            return nn.functional.pad(output, (0, 0, 0, 0, self.num_prompts, 0)), weights
        own_output, _ = attention.run(attention.function(module), module, *own, self.own_mask, **kwargs)
        return torch.cat([own_output, output], 1), weights
