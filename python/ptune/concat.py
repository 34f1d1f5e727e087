"""The concat path: prompt rows run through the body with the text.

The body is given ``[prompt ; text]``, and its outputs are made the text's alone, so that stock heads, losses and
pooling see what they always see.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ptune_kernels import Placement, embed_and_prepend, prepend, strip

from .anatomy import per_layer_input
from .call import Call
from .layout import Layout, positions_of


class ConcatPath:
    """What goes into the body of ``model`` (a `PTuneMixin` with prompts), and what comes out."""

    def __init__(self, model: Any, parameters: tuple[str, ...], first_position: int) -> None:
        self.model = model
        self.parameters = parameters
        self.first_position = first_position

    def enter(self, body: Any, arguments: dict[str, Any], layout: Layout, text: Tensor) -> tuple[Call, dict[str, Any]]:
        """The call, and the body's arguments for ``[prompt ; text]``."""
        placement = layout.placement()
        arguments = arguments | self._extended(layout, arguments, text)
        if (own := per_layer_input(body)) is not None:
            texts = body.get_per_layer_inputs(arguments.get("input_ids"), arguments.get("inputs_embeds"))
            arguments["per_layer_inputs"] = layout.extend_rows(texts, own)
        arguments |= {"input_ids": None, "inputs_embeds": self._embed(body, arguments, layout, placement)}
        return Call(layout, text.shape[1], placement), arguments

    def leave(self, call: Call, output: Any) -> None:
        """Make ``output`` the text's."""
        output["last_hidden_state"] = self._text_rows(call, output["last_hidden_state"])
        for name in ("hidden_states", "attentions", "cross_attentions", "router_logits"):
            if (states := output.get(name)) is not None:
                output[name] = tuple(self._text_of(call, state) for state in states)

    def _embed(self, body: Any, arguments: dict[str, Any], layout: Layout, placement: Placement | None) -> Tensor:
        prompts = self.model.prompt_embeddings.weight if layout.mixture is None else layout.mixture.prompts
        return embed_behind(prompts, body, arguments.get("input_ids"), arguments.get("inputs_embeds"), placement)

    def _extended(self, layout: Layout, arguments: dict[str, Any], text: Tensor) -> dict[str, Any]:
        """Mask, positions and token types of ``[prompt ; text]``, where the body's own defaults would not give them."""
        extended: dict[str, Any] = {}
        batch_size, length = text.shape[:2]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is not None or positions is not None:
            if mask is None:
                # positions without a mask would be read as packed texts
                mask = torch.ones(batch_size, length, dtype=torch.long, device=text.device)
            extended["attention_mask"] = layout.extend_mask(mask.to(text.device))
            if "position_ids" in self.parameters:
                if positions is None:
                    positions = positions_of(mask.to(text.device)) + self.first_position
                positions = positions.to(text.device).expand(batch_size, -1)
                extended["position_ids"] = layout.extend_positions(positions, self.first_position)
        if (types := arguments.get("token_type_ids")) is not None:
            extended["token_type_ids"] = layout.extend_types(types.to(text.device).expand(batch_size, -1))
        return extended

    def _text_rows(self, call: Call, hidden: Tensor) -> Tensor:
        return strip(hidden, call.layout.num_prompts, call.placement)

    def _text_of(self, call: Call, state: Tensor | None) -> Tensor | None:
        """The text rows of a recorded state: [b, S, d], attentions [b, h, S, K], or router logits [b·S, experts]."""
        if state is None:
            return None
        if state.dim() == 2:
            rows = state.view(call.layout.column.shape[0], -1, state.shape[-1])
            return self._text_rows(call, rows).reshape(-1, state.shape[-1])
        if state.dim() == 3:
            return self._text_rows(call, state)
        # attentions: a text token stands m rows below its column, and what padding before it attends to means nothing
        return state.narrow(2, call.layout.num_prompts, call.length)


def embed_behind(
    prompts: Tensor, body: Any, ids: Any, embeds: Tensor | None, placement: Placement | None = None
) -> Tensor:
    """[b, m + n, d]: ``prompts`` [m, d], and the text of ``ids`` [b, n] or of ``embeds`` [b, n, d] behind them."""
    embedding = body.get_input_embeddings()
    if embeds is None and (scale := fusible_scale(embedding)) is not None:
        weight = embedding.weight
        return embed_and_prepend(matching(prompts, weight), ids.to(weight.device), weight, placement, scale)
    if embeds is None:
        embeds = embedding(ids)
    return prepend(matching(prompts, embeds), embeds, placement)


def fusible_scale(embedding: Any) -> float | None:
    """The factor on top of which ``embedding`` is but a look-up, which an op may do itself; ``None`` if it is more."""
    weight = getattr(embedding, "weight", None)
    if (
        type(weight) is not nn.Parameter
        or embedding._forward_hooks
        or embedding._forward_pre_hooks
        or "forward" in vars(embedding)
        or getattr(embedding, "max_norm", None) is not None
    ):
        return None
    if type(embedding) is nn.Embedding:
        return 1.0
    # Gemma's: the look-up times a scale rounded to the weight's dtype, which is what the op computes
    if type(embedding).__name__.endswith("TextScaledWordEmbedding") and hasattr(embedding, "scalar_embed_scale"):
        return float(embedding.scalar_embed_scale)
    return None


def matching(prompts: Tensor, hidden: Tensor) -> Tensor:
    """Prompts where ``hidden`` lies, and as precise where it is float64."""
    if prompts.is_meta and not hidden.is_meta:
        raise NotImplementedError(
            "prompts: expected on a device, got none of their numbers, as accelerate's cpu_offload and disk_offload "
            "take them away; load the model with a device_map instead, which leaves prompts where they are"
        )
    return prompts.to(hidden.device, torch.float64 if hidden.dtype == torch.float64 else prompts.dtype)
