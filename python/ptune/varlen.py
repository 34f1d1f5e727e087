"""One attention over a packed sequence, by FlashAttention's sequences of variable length: torch's kernel for GPUs.

The prompt and the first text are one of these sequences, since the prompt is what stands before that text; of the other
texts each is one, whose keys begin with the prompt's. Queries stay where they are, and so do outputs.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.backends.cuda import flash_sdp_enabled, is_flash_attention_available

from ptune_kernels import spread_kv

HALVES = (torch.float16, torch.bfloat16)
_WIDEST = 128  # of a head: wider ones have no backward on every GPU


@dataclass
class Lengths:
    """Where sequences begin, and end: int32 [b + 1] on the device of the batch; and the longest."""

    queries: Tensor
    keys: Tensor
    longest: int

    @classmethod
    def of(cls, num_prompts: int, batch_size: int, length: int, device: torch.device) -> "Lengths":
        count = torch.arange(batch_size + 1, dtype=torch.int32, device=device)
        keys = count * (num_prompts + length)
        # all but the first are shorter by the prompt
        return cls(keys - (count - 1).clamp(min=0) * num_prompts, keys, num_prompts + length)


def serves(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for heads as wide as these, in ``dtype``, and the user has not switched it off."""
    width = query.shape[3]
    return (
        dtype in HALVES
        and width == key.shape[3] == value.shape[3] <= _WIDEST
        and width % 8 == 0
        and query.device.type == "cuda"
        and _has_kernel(query.device)
    )


@torch.compiler.assume_constant_result  # it cannot be traced
def _has_kernel(device: torch.device) -> bool:
    return flash_sdp_enabled() and _is_new_enough(device)


@cache
def _is_new_enough(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    num_prompts: int,
    batch_size: int,
    causal: bool,
    scaling: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """query [1, h, m + b·n, hd], key and value [1, h_kv, m + b·n, hd] → [1, m + b·n, h, hd], in ``dtype``."""
    keys, values = spread_kv(key, value, num_prompts, batch_size, dtype)
    queries = query.to(dtype).squeeze(0).transpose(0, 1)
    return flash(queries, keys, values, lengths, causal, scaling).unsqueeze(0)


def flash(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, causal: bool, scaling: float | None
) -> Tensor:
    """queries [·, h, hd], keys and values [·, h_kv, hd] → as the queries."""
    # as torch's attention over nested tensors calls it: its public function costs the host as much as half a layer
    starts = lengths.queries.to(queries.device), lengths.keys.to(queries.device)
    longest = lengths.longest, lengths.longest
    return torch.ops.aten._flash_attention_forward(
        queries, keys, values, *starts, *longest, 0.0, causal, False, scale=scaling
    )[0]
