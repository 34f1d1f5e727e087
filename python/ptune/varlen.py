"""One attention over a packed sequence, by FlashAttention's sequences of variable length: torch's kernel for GPUs.

The prompt and the first text are one of these sequences, since the prompt is what stands before that text; of the other
texts each is one, whose keys begin with the prompt's (see `spread_kv`). Padding behind a text is a sequence of its own,
which nothing else reads, and which is not what other ways make of it. Queries and outputs stay in place.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.backends.cuda import flash_sdp_enabled, is_flash_attention_available

HALVES = (torch.float16, torch.bfloat16)
_WIDEST = 128  # of a head: wider ones have no backward on every GPU


@dataclass
class Lengths:
    """Where sequences begin and end, int32 [b + 1], or [2b + 1] of padded texts, and the longest."""

    queries: Tensor
    keys: Tensor
    longest: int

    @classmethod
    def of(cls, num_prompts: int, mask: Tensor, padded: bool) -> "Lengths | None":
        """For texts under ``mask`` [b, n], bool; ``None`` where it hides more than is behind them."""
        batch_size, length = mask.shape
        count = torch.arange(batch_size + 1, dtype=torch.int32, device=mask.device)
        keys = count * (num_prompts + length)
        # all but the first are shorter by the prompt
        queries = keys - (count - 1).clamp(min=0) * num_prompts
        if padded:
            if torch.compiler.is_compiling() or not bool((mask[:, 1:] <= mask[:, :-1]).all()):
                return None
            # where there is no text it stays in place of one: no sequence of keys is without queries
            padding = (~mask).sum(1, dtype=torch.int32) * mask[:, 0]
            queries, keys = (
                torch.cat([torch.stack([ends[:-1], ends[1:] - padding], 1).flatten(), ends[-1:]])
                for ends in (queries, keys)
            )
        return cls(queries, keys, num_prompts + length)


def serves(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for heads as wide as these, in ``dtype``, and the user has not switched it off."""
    width = query.shape[3]
    return (
        dtype in HALVES
        and width == key.shape[3] == value.shape[3] <= _WIDEST
        and width % 8 == 0
        and query.device.type == "cuda"
        and not torch.compiler.is_exporting()  # for who knows which device
        and _has_kernel(query.device)
    )


@torch.compiler.assume_constant_result  # it cannot be traced
def _has_kernel(device: torch.device) -> bool:
    return flash_sdp_enabled() and _is_new_enough(device) and is_right_on(device)


@cache  # every attention asks
def _is_new_enough(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@cache
def is_right_on(device: torch.device) -> bool:
    """Whether `flash`, which calls a function that torch keeps to itself, does there what is said of it.

    Once for each device: outputs and gradients of a prompt of 2 rows, a text of 3 and one of 2 and padding, beside
    torch's public attention.
    """
    rows = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 5, 5, 7, 8], [0, 5, 5, 9, 10])
    )
    lengths = Lengths(queries, keys, 5)
    tensors = [torch.randn(count, heads, 8, generator=rows) for count, heads in ((8, 4), (10, 2), (10, 2), (8, 4))]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        query, key, value, grad = (t.to(device, torch.bfloat16).requires_grad_() for t in tensors)
        parts = query.split((5, 2, 1)), key.split((5, 4, 1)), value.split((5, 4, 1))
        expected = torch.cat([_public(*part) for part in zip(*parts, strict=True)])
        wanted = expected, *torch.autograd.grad(expected, (query, key, value), grad)
        try:
            output = flash(query, key, value, lengths, True, 0.5)
            found = output, *torch.autograd.grad(output, (query, key, value), grad)
        except torch.OutOfMemoryError:
            raise  # which says nothing of it
        except (AttributeError, TypeError, RuntimeError):  # it is not there, takes other arguments, or refuses these
            return False
    return all(bool((a.float() - b.float()).abs().max() < 0.1) for a, b in zip(found, wanted, strict=True))


def _public(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What `flash` does, for one sequence."""
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    ends = query.shape[2], key.shape[2]
    mask = torch.ones(ends, dtype=torch.bool, device=query.device).tril(ends[1] - ends[0])
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)
    return output[0].transpose(0, 1)


def flash(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, causal: bool, scaling: float | None
) -> Tensor:
    """queries [·, h, hd], keys and values [·, h_kv, hd] → as the queries."""
    # as torch's attention over nested tensors calls it: its public function goes through an op in Python
    starts = lengths.queries.to(queries.device), lengths.keys.to(queries.device)
    longest = lengths.longest, lengths.longest
    return torch.ops.aten._flash_attention_forward(
        queries, keys, values, *starts, *longest, 0.0, causal, False, scale=scaling
    )[0]
