"""What prompts mean, written without ptune: every row of a batch alone, unpadded, through the stock body.

Prompt and text are concatenated by hand, and deep prompts are set by a hook of this file's own on each stock block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Row:
    """One text's states [n, d], at the input of each block and out of the body; and what the stock body returned."""

    states: list[Tensor]
    output: Any


@dataclass
class Prompt:
    """Leaves to differentiate: ``shallow`` [m, d_embedding], ``deep`` [L, m, d] or ``None``."""

    shallow: Tensor
    deep: Tensor | None = None
    mode: str = "overwrite"


def run_row(body: nn.Module, blocks: Sequence[nn.Module], prompt: Prompt, ids: Tensor, **kwargs: Any) -> Row:
    """One unpadded text ``ids`` [n]; ``kwargs`` are for the stock body."""
    count = prompt.shallow.shape[0]
    if hasattr(body, "get_per_layer_inputs"):  # Gemma 4's; soft tokens have those of padding
        tokens = torch.cat([torch.full((count,), body.config.pad_token_id), ids])[None]
        kwargs["per_layer_inputs"] = body.get_per_layer_inputs(tokens, None)
    embedded = body.get_input_embeddings()(ids)
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        depth = len(inputs)
        if prompt.deep is not None:
            rows = prompt.deep[depth]
            if depth == 0 or prompt.mode == "add":
                rows = hidden[0, :count] + rows
            hidden = torch.cat([rows.to(hidden.dtype), hidden[0, count:]])[None]
        inputs.append(hidden[0, count:])
        return (hidden, *args[1:]), kwargs

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    try:
        joined = torch.cat([prompt.shallow.to(embedded.dtype), embedded])[None]
        output = body(inputs_embeds=joined, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Row([*inputs, output.last_hidden_state[0, count:]], output)


def pad(texts: Sequence[Tensor], side: str, filler: int) -> tuple[Tensor, Tensor | None]:
    """A batch [b, n] and its mask; ``side`` "none" wants texts of one length, and gives no mask."""
    if side == "none":
        return torch.stack(list(texts)), None
    length = max(len(ids) for ids in texts)
    ids = torch.full((len(texts), length), filler)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        columns = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, columns], mask[row, columns] = text, 1
    return ids, mask


def real(batch: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows of ``batch`` [b, n, …] without padding."""
    return [row if mask is None else row[mask[i].bool()] for i, row in enumerate(batch)]
