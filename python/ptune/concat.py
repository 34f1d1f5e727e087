"""The concat path: prompt rows run through the body with the text.

Hooks around the body turn its text into ``[prompt ; text]`` and its outputs back into the text's alone, so that stock
heads, losses and pooling see what they always see; hooks before the blocks set deep prompts. What a call needs to know
travels in a thread-local, never on modules.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ptune_kernels import Placement, embed_and_prepend, overwrite, prepend, strip

from .layout import Layout, positions_of
from .support import check_inputs, find_blocks, find_body, position_limit


@dataclass
class _Call:
    """One call of a body whose batch bears prompt rows."""

    layout: Layout
    placement: Placement | None
    length: int
    as_tuple: bool
    depth: int = 0


# Not a subclass with defaults: torch.compile reads those where an instance has its own.
_thread = threading.local()


def _current_call() -> _Call | None:
    return getattr(_thread, "call", None)


class ConcatPath:
    """Hooks on the body of ``model`` (a `PTuneMixin` with prompts) and on its blocks, removable together."""

    def __init__(self, model: Any) -> None:
        body = find_body(model)
        self.model = model
        self.parameters = tuple(inspect.signature(body.forward).parameters)
        self.first_position, self.position_limit = position_limit(body)
        self.num_prompts = model.ptune_config.pre_seq_len
        self.num_layers = model.config.num_hidden_layers
        self.handles = [
            body.register_forward_pre_hook(self.before_body, with_kwargs=True),
            body.register_forward_hook(self.after_body),
        ]
        if body is not model:
            self.handles += [
                model.register_forward_pre_hook(_before_model),
                model.register_forward_hook(self.after_model),
            ]
        if model.ptune_config.deep:
            blocks = find_blocks(body, model.config)
            self.handles += [block.register_forward_pre_hook(self.before_block, with_kwargs=True) for block in blocks]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def before_body(self, body: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        _thread.call, _thread.reached = None, True
        if not self.model.prompts_enabled:
            return None
        arguments = dict(zip(self.parameters, args, strict=False)) | kwargs
        check_inputs(arguments)
        text = arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]
        mask = arguments.get("attention_mask")
        layout = Layout(self.num_prompts, text.shape[0], mask, text.device)
        past = arguments.get("past_key_values")
        if past is not None and _is_resumed(past, mask, text.shape[1]):
            # the prompt is in the cache: only what is said about the text's place changes
            self._check_resumed(past, mask, text.shape[1])
            return (), arguments | self._resumed_positions(layout, arguments, text.shape[1])
        self._check_length(self.num_prompts + text.shape[1])
        placement = layout.placement()
        if (return_dict := arguments.get("return_dict")) is None:
            return_dict = getattr(body.config, "return_dict", True)
        _thread.call = _Call(layout, placement, text.shape[1], as_tuple=not return_dict)
        arguments |= self._extended_positions(layout, arguments, text)
        arguments |= {"input_ids": None, "inputs_embeds": self._embed(body, arguments, placement), "return_dict": True}
        return (), arguments

    def before_block(
        self, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if (call := _current_call()) is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        expected = (call.layout.column.shape[0], self.num_prompts + call.length)
        if hidden.dim() != 3 or hidden.shape[:2] != expected:
            raise NotImplementedError(
                f"{type(block).__name__}: deep prompts need block inputs of shape [{expected[0]}, {expected[1]}, d], "
                f"got {tuple(hidden.shape)}"
            )
        # read from the leaf: a recomputing checkpoint must see the parameter, not a view made outside it
        rows = slice(call.depth * self.num_prompts, (call.depth + 1) * self.num_prompts)
        prompts = self.model.intermediate_prompt_embeddings.weight[rows]
        mode = "add" if call.depth == 0 else self.model.ptune_config.deep_prompt_mode
        call.depth += 1
        hidden = overwrite(hidden, _for(prompts, hidden), call.placement, mode)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def after_body(self, body: nn.Module, args: tuple, output: Any) -> Any:
        if (call := _current_call()) is None:
            return None
        _thread.call = None
        if not isinstance(output, ModelOutput):
            raise NotImplementedError(f"{type(body).__name__}: expected a ModelOutput, got {type(output).__name__}")
        if self.model.ptune_config.deep and call.depth != self.num_layers:
            raise RuntimeError(f"{type(body).__name__}: expected {self.num_layers} blocks to run, {call.depth} did")
        text = output["last_hidden_state"] = self._text_rows(call, output["last_hidden_state"])
        for name in ("hidden_states", "attentions", "cross_attentions", "router_logits"):
            if (states := output.get(name)) is not None:
                output[name] = tuple(self._text_of(call, state) for state in states)
        if output.get("pooler_output") is not None:
            output["pooler_output"] = _pool(body, call.layout.first_token(text))
        return output.to_tuple() if call.as_tuple else output

    def after_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        if not _thread.reached:
            raise NotImplementedError(
                f"{type(model).__name__}: its forward goes past the body, where prompts are put in"
            )

    def _embed(self, body: Any, arguments: dict[str, Any], placement: Placement | None) -> Tensor:
        prompts = self.model.prompt_embeddings.weight
        if (embeds := arguments.get("inputs_embeds")) is not None:
            return prepend(_for(prompts, embeds), embeds, placement)
        embedding = body.get_input_embeddings()
        scale = fusible_scale(embedding)
        if scale is None:
            embeds = embedding(arguments["input_ids"])
            return prepend(_for(prompts, embeds), embeds, placement)
        weight = embedding.weight
        return embed_and_prepend(
            _for(prompts, weight), arguments["input_ids"].to(weight.device), weight, placement, scale
        )

    def _extended_positions(self, layout: Layout, arguments: dict[str, Any], text: Tensor) -> dict[str, Any]:
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

    def _resumed_positions(self, layout: Layout, arguments: dict[str, Any], length: int) -> dict[str, Any]:
        """Mask and positions of text that follows what the cache holds."""
        resumed: dict[str, Any] = {}
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is not None:
            resumed["attention_mask"] = layout.extend_mask(mask)
        if "position_ids" in self.parameters:
            if positions is None and mask is not None:
                positions = positions_of(mask)[:, -length:] + self.first_position
            if positions is not None:
                resumed["position_ids"] = positions + self.num_prompts
        return resumed

    def _check_resumed(self, past: Any, mask: Tensor | None, length: int) -> None:
        seen, static = past.get_seq_length(), past.is_compileable
        if not isinstance(seen, int):
            return  # a static cache counts in a tensor, which is left alone: reading it would synchronise
        self._check_length(seen + length)
        text_length = seen - self.num_prompts + length
        # a static cache's mask may be as wide as the cache
        if mask is not None and mask.shape[1] != text_length and not (static and mask.shape[1] > text_length):
            raise ValueError(
                f"attention_mask: expected {text_length} columns, for {text_length - length} text tokens in "
                f"past_key_values and {length} new ones, got {mask.shape[1]}"
            )

    def _check_length(self, length: int) -> None:
        if self.position_limit is not None and length > self.position_limit:
            raise ValueError(
                f"input too long: {self.num_prompts} prompt rows and the text make {length} positions, "
                f"and {type(self.model).__name__} has learned {self.position_limit}"
            )

    def _text_rows(self, call: _Call, hidden: Tensor) -> Tensor:
        return strip(hidden, self.num_prompts, call.placement)

    def _text_of(self, call: _Call, state: Tensor | None) -> Tensor | None:
        """The text rows of a recorded state: [b, S, d], attentions [b, h, S, K], or router logits [b·S, experts]."""
        if state is None:
            return None
        if state.dim() == 2:
            rows = state.view(call.layout.column.shape[0], -1, state.shape[-1])
            return self._text_rows(call, rows).reshape(-1, state.shape[-1])
        if state.dim() == 3:
            return self._text_rows(call, state)
        # attentions: a text token stands m rows below its column, and what padding before it attends to means nothing
        return state.narrow(2, self.num_prompts, call.length)


def _before_model(model: nn.Module, args: tuple) -> None:
    _thread.reached = False


class CheckpointWithCall:
    """A checkpoint function under which a block's recomputation sees the call that it first ran in.

    Whether a block's hooks lie inside the recomputed region differs between versions of transformers.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (call := _current_call()) is not None:
            function = partial(_run_in, call, call.depth, function)
        return self.checkpoint(function, *args, **kwargs)


def _run_in(call: _Call, depth: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    outer, inner = _current_call(), replace(call, depth=depth)
    _thread.call = inner
    try:
        return function(*args, **kwargs)
    finally:
        call.depth = max(call.depth, inner.depth)
        _thread.call = outer


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


def _is_resumed(past: Any, mask: Tensor | None, length: int) -> bool:
    """Whether the cache holds tokens already, and with them the prompt."""
    seen = past.get_seq_length()
    if isinstance(seen, int):
        return seen > 0
    # a static cache counts in a tensor: the mask, which covers the past, tells without a host synchronisation
    return mask.shape[1] > length if mask is not None else bool(seen > 0)


def _for(prompts: Tensor, hidden: Tensor) -> Tensor:
    """Prompts where ``hidden`` lies, and as precise where it is float64."""
    return prompts.to(hidden.device, torch.float64 if hidden.dtype == torch.float64 else prompts.dtype)


def _pool(body: Any, first: Tensor) -> Tensor:
    """The body's own pooling of each row's first token, [b, d]."""
    if isinstance(body.pooler, nn.Linear):
        activation = body.pooler_activation if hasattr(body, "pooler_activation") else body.activation
        return activation(body.pooler(first))
    return body.pooler(first[:, None])
