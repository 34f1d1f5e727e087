"""The ops in plain PyTorch, row by row: the oracle that the other backends are tested against, and the fallback
anywhere.

Signatures and meaning are those of `schema`. With a placement these loops read it on the host, which synchronises a
GPU.
"""

import torch

from . import schema


def _rows(start, length, column, batch, pool_rows):
    """Yields (i, start, length, column) for each row of the batch."""
    if start is None:
        return [(i, 0, pool_rows, 0) for i in range(batch)]
    return list(zip(range(batch), start.tolist(), length.tolist(), column.tolist(), strict=True))


def _assemble(out, prompts, text, rows):
    """Writes ``[zeros ; text[:column] ; prompts[start : start + length] ; text[column:]]`` along dimension -2 of each
    row."""
    max_length = out.shape[-2] - text.shape[-2]
    for i, start, length, column in rows:
        first = max_length - length + column
        out[i, ..., : max_length - length, :] = 0
        out[i, ..., max_length - length : first, :] = text[i, ..., :column, :]
        out[i, ..., first : first + length, :] = prompts[..., start : start + length, :]
        out[i, ..., first + length :, :] = text[i, ..., column:, :]
    return out


def embed_and_prepend(prompts, input_ids, embedding, start=None, length=None, column=None, max_length=0, scale=1.0):
    out = schema.embed_and_prepend(prompts, input_ids, embedding, start, length, column, max_length, scale)
    schema.check_ids(input_ids, embedding.shape[0])
    schema.check_values(start, length, column, max_length, prompts.shape[0], input_ids.shape[1], ends_within=False)
    text = embedding[input_ids]
    if scale != 1.0:
        text = text * torch.tensor(scale, dtype=text.dtype, device=text.device)
    return _assemble(out, prompts, text, _rows(start, length, column, len(text), len(prompts)))


def prepend(prompts, hidden, start=None, length=None, column=None, max_length=0):
    out = schema.prepend(prompts, hidden, start, length, column, max_length)
    schema.check_values(start, length, column, max_length, prompts.shape[0], hidden.shape[1], ends_within=False)
    return _assemble(out, prompts, hidden, _rows(start, length, column, len(hidden), len(prompts)))


def strip(hidden, start, length, column, max_length, dtype):
    out = schema.strip(hidden, start, length, column, max_length, dtype)
    # Any start would do: what the pool held does not matter here.
    schema.check_values(start, length, column, max_length, 2**32, out.shape[-2], ends_within=False)
    for i, _, m, c in _rows(start, length, column, len(hidden), max_length):
        first = max_length - m
        out[i, ..., :c, :] = hidden[i, ..., first : first + c, :]
        out[i, ..., c:, :] = hidden[i, ..., first + c + m :, :]
    return out


def overwrite(hidden, prompts, start=None, length=None, column=None, max_length=0, add=False):
    out = schema.overwrite(hidden, prompts, start, length, column, max_length, add)
    out.copy_(hidden)
    overwrite_(out, prompts, start, length, column, max_length, add)
    return out


def overwrite_(hidden, prompts, start=None, length=None, column=None, max_length=0, add=False):
    schema.overwrite_(hidden, prompts, start, length, column, max_length, add)
    schema.check_values(start, length, column, max_length, prompts.shape[0], hidden.shape[1], ends_within=True)
    for i, s, m, c in _rows(start, length, column, len(hidden), len(prompts)):
        rows = prompts[s : s + m]
        hidden[i, c : c + m] = hidden[i, c : c + m].to(rows.dtype) + rows if add else rows


def prepend_kv(prefix_k, prefix_v, key, value, start=None, length=None, column=None, max_length=0, dtype=None):
    k, v = schema.prepend_kv(prefix_k, prefix_v, key, value, start, length, column, max_length, dtype)
    pool_rows = prefix_k.shape[1]
    schema.check_values(start, length, column, max_length, pool_rows, key.shape[2], ends_within=False)
    rows = _rows(start, length, column, len(key), pool_rows)
    return _assemble(k, prefix_k, key, rows), _assemble(v, prefix_v, value, rows)


def sum_prompts(grad, num_prompts, start, length, column, max_length, prepended, dtype):
    out = schema.sum_prompts(grad, num_prompts, start, length, column, max_length, prepended, dtype)
    last = grad.shape[-2] - max_length if prepended else grad.shape[-2]
    schema.check_values(start, length, column, max_length, num_prompts, last, ends_within=not prepended)
    total = torch.zeros_like(out, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    lost = torch.zeros_like(total)
    for i, s, m, c in _rows(start, length, column, len(grad), num_prompts):
        first = c + max_length - m if prepended and start is not None else c
        _add(total[..., s : s + m, :], lost[..., s : s + m, :], grad[i, ..., first : first + m, :])
    return out.copy_(total + lost)


def _add(total, lost, addend):
    """Adds to ``total``, and the exact error of that (Knuth's TwoSum) to ``lost``: no sum gets worse with the batch."""
    addend = addend.to(total.dtype)
    raised = total + addend
    added = raised - total
    error = (total - (raised - added)) + (addend - added)
    lost += torch.where(error.isnan(), 0, error)  # inf - inf: an infinite sum stays infinite
    total.copy_(raised)


def cast_qkv(query, key, value, dtype):
    outs = schema.cast_qkv(query, key, value, dtype)
    return tuple(out.copy_(t) for out, t in zip(outs, (query, key, value), strict=True))


def spread_kv(key, value, num_prompts, batch_size, dtype=None):
    outs = schema.spread_kv(key, value, num_prompts, batch_size, dtype)
    for out, packed in zip(outs, (key, value), strict=True):
        rows = packed[0].transpose(0, 1)
        prompt, texts = rows[:num_prompts], rows[num_prompts:]
        length = len(out) // batch_size - num_prompts
        for i, row in enumerate(out.unflatten(0, (batch_size, num_prompts + length))):
            row[:num_prompts] = prompt
            row[num_prompts:] = texts[i * length : (i + 1) * length]
    return outs


def unspread_kv(key, value, num_prompts, batch_size, dtype):
    schema.unspread_kv(key, value, num_prompts, batch_size, dtype)
    shape = batch_size, key.shape[0] // batch_size
    key, value = (t.unflatten(0, shape).transpose(1, 2) for t in (key, value))
    no_query = key[:, :0, num_prompts:]
    return join_qkv(no_query, key, value, None, None, None, num_prompts, dtype)[1:]


def join_qkv(query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype):
    outs = schema.join_qkv(query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype)
    prompts = prompt_query, prompt_key, prompt_value
    for out, text, prompt in zip(outs, (query, key, value), prompts, strict=True):
        own, texts = out[0].split([num_prompts, out.shape[2] - num_prompts], 1)
        total = torch.zeros_like(own, dtype=torch.float64 if text.dtype == torch.float64 else torch.float32)
        lost = torch.zeros_like(total)
        if text is not query:
            for row in text:
                _add(total, lost, row[:, :num_prompts])
            text = text[:, :, num_prompts:]
        if prompt is not None:
            _add(total, lost, prompt[0])
        own.copy_(total + lost)
        texts.unflatten(1, text.shape[::2]).copy_(text.transpose(0, 1))
    return outs


schema.register("reference", globals())
