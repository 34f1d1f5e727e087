"""What a call of a body may be given where it bears prompts: whatever describes the text, and nothing but it."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

# transformers 5.24 renamed the cache that models take and return, and has checkpointing keep it without gradients.
BEFORE_5_24 = "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "past_key_values" if BEFORE_5_24 else "cache"
_NO_TEXT = ("pixel_values", "image_", "video_", "audio_", "input_features")
_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def named(parameters: Iterable[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of its ``parameters``; that of a cache is `CACHE`."""
    arguments = dict(zip(parameters, args, strict=False)) | kwargs
    if not BEFORE_5_24 and "past_key_values" in arguments:
        arguments.setdefault(CACHE, arguments.pop("past_key_values"))
    return arguments


def check_inputs(arguments: dict[str, Any], parameters: tuple[str, ...]) -> None:
    """Raises `TypeError`, `ValueError` or `NotImplementedError` for a call of the body that prompts do not cover.

    ``parameters``: the names of the body's own; others in ``arguments`` are for the loss.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    for name, text, shape in (("input_ids", ids, "[b, n]"), ("inputs_embeds", embeds, "[b, n, d]")):
        if text is not None and not isinstance(text, Tensor):
            raise TypeError(f"{name}: expected a tensor {shape}, got {type(text).__name__}")
        if text is not None and (text.dim() != shape.count(",") + 1 or 0 in text.shape[:2]):
            raise ValueError(f"{name}: expected {shape} with at least one token, got shape {tuple(text.shape)}")
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask: expected [b, n], got {got}; a mask made for text has no prompt columns"
        )
    check_mask(arguments)
    if isinstance(positions, Tensor) and positions.dim() != 2:
        raise NotImplementedError(f"position_ids: expected [b, n], got shape {tuple(positions.shape)}")
    size = (arguments["inputs_embeds"] if ids is None else ids).shape[:2]
    for name in ("position_ids", "token_type_ids"):
        given = arguments.get(name)
        if name not in parameters or given is None:
            continue
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor [b, n], got {type(given).__name__}")
        if tuple(given.shape) not in (tuple(size), (1, size[1])):
            raise ValueError(f"{name}: expected shape {tuple(size)}, as the text has, got {tuple(given.shape)}")
    for name in parameters:
        value = arguments.get(name)
        # the sequence of a cross-attention may be as long by chance
        if not isinstance(value, Tensor) or name in _TEXT or name.startswith("encoder_"):
            continue
        if value.shape[:2] == size or name == "lengths":
            raise NotImplementedError(f"{name}: not supported, because it describes the text, and not the prompt")
    if arguments.get("adapter_names") is not None:
        raise NotImplementedError(
            "adapter_names: not supported, as all rows have the one prompt of the model; use a PromptBank"
        )
    other = [name for name in arguments if name.startswith(_NO_TEXT) and arguments[name] is not None]
    if other:
        raise NotImplementedError(f"{other[0]}: not supported, as prompts are put on language models alone; give text")
    packed = [name for name in arguments if name.startswith("cu_seq_lens") and arguments[name] is not None]
    if packed:
        raise NotImplementedError(
            f"{packed[0]}: packed batches are not supported, for each packed text needs its own prompt; TRL makes none "
            "with packing=False and padding_free=False"
        )
    check_unpacked(positions, mask, "each packed text needs its own prompt")


def check_unpacked(positions: Tensor | None, mask: Tensor | None, reason: str) -> None:
    """Raises `NotImplementedError`, with the ``reason``, for what transformers reads as packed texts."""
    if positions is not None and mask is None and _restarts(positions):
        raise NotImplementedError(
            "position_ids: packed batches (positions that restart, without an attention_mask) are not supported, for "
            + reason
        )


def check_mask(arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for a two-dimensional attention_mask of another shape than the text's."""
    mask, past = arguments.get("attention_mask"), arguments.get(CACHE)
    ids = arguments.get("input_ids")
    text = arguments.get("inputs_embeds") if ids is None else ids
    if mask is None or text is None:
        return
    # with text in a cache (or in a static one, perhaps) the mask covers that too: see the hooks
    seen = 0 if past is None else past.get_seq_length()
    resumed = not isinstance(seen, int) or seen > 0
    if mask.shape[0] != text.shape[0] or (not resumed and mask.shape[1] != text.shape[1]):
        columns = "at least " * resumed + str(text.shape[1])
        raise ValueError(f"attention_mask: expected shape ({text.shape[0]}, {columns}), got {tuple(mask.shape)}")


def _restarts(positions: Tensor) -> bool:
    if positions.shape[1] == 1 or torch.compiler.is_compiling():
        return False
    return bool((positions[:, 1:] <= positions[:, :-1]).any())
