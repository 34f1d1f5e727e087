"""Encoder-decoders: prompts stand in the encoder's text, and the decoder reads them with it (Lester et al. 2021).

Encoder states are therefore of ``[prompt ; text]``, wherever they are seen: out of ``get_encoder()``, as
``encoder_last_hidden_state``, and as the ``encoder_outputs`` that `generate` hands from step to step. Masks are the
text's, and are extended where the decoder takes them.
"""

from typing import Any

import torch
from torch import Tensor

from .call import Call
from .hooks import PromptHooks, note_body
from .inputs import named
from .layout import Layout, ones_and_zeros
from .support import BY_DISTANCE


class EncoderHooks(PromptHooks):
    """The hooks on an encoder-decoder: around its encoder and that one's blocks, and before its decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.handles.append(model.get_decoder().register_forward_pre_hook(self.before_decoder, with_kwargs=True))

    def before_body(self, body: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        mask = named(self.parameters, args, kwargs).get("attention_mask")
        by_column = self.model.config.model_type not in BY_DISTANCE
        if torch.compiler.is_compiling():  # reading the mask would break the graph
            mask = None
        if by_column and self.model.prompts_enabled and isinstance(mask, Tensor) and not bool(mask[:, 0].all()):
            raise NotImplementedError(
                f"attention_mask: left padding is not supported, as the encoder of {type(self.model).__name__} numbers "
                "columns, padding included; pad on the right"
            )
        return super().before_body(body, args, kwargs)

    def before_model(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        note_body(reached=False)  # labels are the decoder's, where no prompt stands

    def before_decoder(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        note_body(reached=True)  # the encoder may have run earlier
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not self.model.prompts_enabled or states is None or mask is None:
            return None
        expected = self.num_prompts + mask.shape[1]
        if states.shape[1] != expected:
            raise ValueError(
                f"encoder_outputs: expected {expected} columns, {self.num_prompts} of them of the prompt, as "
                f"get_encoder() returns them, got {states.shape[1]}"
            )
        mask = ones_and_zeros(mask)
        layout = Layout(self.num_prompts, mask.shape[0], mask, mask.device)
        return args, kwargs | {"encoder_attention_mask": layout.extend_mask(mask)}

    def leave_concat(self, call: Call, output: Any) -> None:
        """The decoder reads the states of prompt rows too: they are left in."""
