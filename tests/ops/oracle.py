"""What every op means, written as plain PyTorch on one row of the batch at a time.

Nothing here calls ptune_kernels. Every function is differentiable, so that autograd on float64 copies of the inputs
gives exact gradients, and casts are torch's own `.to`.
"""

import torch


def cast(tensor, dtype):
    """torch's own cast; with float64 inputs (exact gradients) everything stays float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def rows_of(placement, num_prompts, batch):
    """(start, length, column) of each row of the batch as ints, and max_length."""
    if placement is None:
        return [(0, num_prompts, 0)] * batch, num_prompts
    columns = (placement.start.tolist(), placement.length.tolist(), placement.column.tolist())
    return list(zip(*columns, strict=True)), placement.max_length


def stack(rows, like, length):
    """`torch.stack` that also stacks no rows at all; a row is [length, d] or [h, length, d]."""
    if rows:
        return torch.stack(rows)
    shape = list(like.shape)
    shape[-2] = length
    return like.new_empty(shape)


def prepend(prompts, hidden, placement=None):
    rows, max_length = rows_of(placement, prompts.shape[-2], len(hidden))
    out = []
    for text, (start, length, column) in zip(hidden, rows, strict=True):
        zeros = text.new_zeros(*text.shape[:-2], max_length - length, text.shape[-1])
        prompt = cast(prompts[..., start : start + length, :], hidden.dtype)
        out.append(torch.cat([zeros, text[..., :column, :], prompt, text[..., column:, :]], dim=-2))
    return stack(out, hidden, max_length + hidden.shape[-2])


def embed_and_prepend(prompts, input_ids, embedding, placement=None, scale=1.0):
    text = (
        torch.stack([torch.stack([embedding[i] for i in row]) for row in input_ids.tolist()])
        if input_ids.numel()
        else (embedding.new_empty(*input_ids.shape, embedding.shape[1]))
    )
    if embedding.dtype == torch.float64:
        return prepend(prompts, text * scale, placement)
    rounded_scale = torch.tensor(scale).to(embedding.dtype).float()
    return prepend(prompts, (text.float() * rounded_scale).to(embedding.dtype), placement)


def strip(hidden, max_length, placement=None):
    out = []
    rows, _ = rows_of(placement, max_length, len(hidden))
    for row, (_, length, column) in zip(hidden, rows, strict=True):
        first = max_length - length
        out.append(torch.cat([row[first : first + column], row[max_length + column :]]))
    return stack(out, hidden, hidden.shape[1] - max_length)


def overwrite(hidden, prompts, placement=None, mode="overwrite"):
    rows, _ = rows_of(placement, len(prompts), len(hidden))
    out = []
    for row, (start, length, column) in zip(hidden, rows, strict=True):
        prompt = prompts[start : start + length]
        if mode == "add":
            prompt = row[column : column + length].to(prompts.dtype) + prompt
        out.append(torch.cat([row[:column], cast(prompt, hidden.dtype), row[column + length :]]))
    return stack(out, hidden, hidden.shape[1])


def prepend_kv(prefix_k, prefix_v, key, value, placement=None, dtype=None):
    return tuple(
        prepend(prefix, cast(text, dtype or text.dtype), placement)
        for prefix, text in ((prefix_k, key), (prefix_v, value))
    )


def cast_qkv(query, key, value, dtype):
    return tuple(cast(tensor, dtype) for tensor in (query, key, value))


def part_qkv(query, key, value, num_prompts, batch_size, dtype=None):
    prompts, texts = [], []
    for t in (query, key, value):
        to = dtype or t.dtype if t is not query else t.dtype
        own, rest = t[:, :, :num_prompts], t[0, :, num_prompts:]
        rows = list(rest.split([rest.shape[1] // batch_size] * batch_size, 1))
        prompts.append(cast(own, to))
        texts.append(torch.stack(rows if t is query else [cast(torch.cat([own[0], row], 1), to) for row in rows]))
    return (*prompts, *texts)


def spread_kv(key, value, num_prompts, batch_size, dtype=None):
    parts = part_qkv(key[:, :0], key, value, num_prompts, batch_size, dtype)[4:]
    return tuple(torch.cat([row.transpose(0, 1) for row in part]) for part in parts)
