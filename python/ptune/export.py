"""A shallow prompt for servers that take embeddings in place of tokens, such as vLLM (``prompt_embeds``)."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import replace_file
from .mixin import PTuneMixin

NAME = "prompt_embeds"


def export_prompt_embeds(model: Any, path: str | os.PathLike[str]) -> None:
    """Write the prompt rows of ``model``, [m, d] in the base's dtype, to a safetensors file as ``prompt_embeds``.

    Raises `TypeError` for a model without our prompts, and `ValueError` for others than shallow ones: embeddings cannot
    carry what deep prompts do to each block.
    """
    if not isinstance(model, PTuneMixin):
        raise TypeError(f"model: expected one with prompts, got {type(model).__name__}")
    mode = model.ptune_config.tuning_mode
    if mode != "ptune":
        raise ValueError(f"tuning_mode: expected 'ptune', got {mode!r}; only shallow prompts are embeddings")
    with torch.no_grad():
        prompts, _ = model.get_prompt(1)
    rows = prompts[0].cpu().contiguous()  # type: ignore[index]
    replace_file(Path(path), lambda scratch: save_file({NAME: rows}, scratch, metadata={"format": "pt"}))


def prompt_embeds(rows: Tensor, embedding: nn.Module, input_ids: Tensor) -> Tensor:
    """``[prompt ; text]`` as embeddings.

    rows [m, d], the base's input embedding (``get_input_embeddings()``, whatever scale it applies included), input_ids
    [n] → [m + n, d].
    """
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids: expected [n], one text, got shape {tuple(input_ids.shape)}")
    with torch.no_grad():
        text = embedding(input_ids)
    return torch.cat([rows.to(text.device, text.dtype), text])
