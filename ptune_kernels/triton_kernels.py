"""The ops in Triton, for NVIDIA and AMD GPUs; Triton's interpreter (``TRITON_INTERPRET=1``) runs them on the CPU.

Signatures and meaning are those of `schema`. Each op is one launch, whose programs compute a tile of output rows each.

Nothing here synchronises, so a placement or a token id out of range is no error on a GPU: nothing is read through it,
and the rows that depend on it become NaN (for ``overwrite``, the first ``max_length`` rows of ``hidden[i]``).

Triton compiles a variant for pointers and strides that are multiples of 16, which those of any usual width are: that
one moves 128 bits at a time, as ``python -m bench.aot`` shows. The other is scalar.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from . import schema

_TILE = 2048  # elements: with 4 warps, two to four accesses of 128 bits for each thread
# A sum has few output rows, and small tiles spread them over more of the GPU.
_SUM_TILING = {"elements": 512, "num_warps": 1}
OPTIONS = {"enable_fp_fusion": False}  # a * b + c is rounded twice, as the other backends do


class _View(NamedTuple):
    """A [batch, heads, rows, width] tensor and its strides."""

    data: Tensor
    batch: int
    head: int
    row: int
    col: int


class _Ids(NamedTuple):
    data: Tensor
    batch: int
    row: int
    vocabulary: int


class _Placement(NamedTuple):
    start: Tensor
    length: Tensor
    column: Tensor
    start_stride: int
    length_stride: int
    column_stride: int


class _Sizes(NamedTuple):
    batch: int
    heads: int
    rows: int
    width: int


@triton.jit
def _tile(rows, heads, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's batch row, head, output rows [ROWS] and columns [COLS]; int64, as all addresses are."""
    # A grid has less than 2^31 programs: dividing in int32, once for each tile, costs next to nothing.
    program, tiles = tl.program_id(0), tl.cdiv(rows, ROWS).to(tl.int32)
    group, tile = program // tiles, program % tiles
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    return (group // heads).to(tl.int64), (group % heads).to(tl.int64), row, col


@triton.jit
def _at(view, i, head, row, col):
    return view.data + i * view.batch + head * view.head + row[:, None] * view.row + col[None, :] * view.col


@triton.jit
def _span(placement, i, max_length, pool_rows, last, ENDS_WITHIN: tl.constexpr):
    """Row i's (start, length, column, whether they are in range); out of range they come back as 0, an empty span.

    ``column`` may be at most ``last``; with ENDS_WITHIN, ``column + length`` may.
    """
    if placement is None:
        zero = i * 0
        return zero, zero + max_length, zero, zero == 0
    else:
        start = tl.load(placement.start + i * placement.start_stride).to(tl.int64)
        length = tl.load(placement.length + i * placement.length_stride).to(tl.int64)
        column = tl.load(placement.column + i * placement.column_stride).to(tl.int64)
        end = column + length if ENDS_WITHIN else column
        valid = (start >= 0) & (length >= 0) & (column >= 0)
        valid = valid & (length <= max_length) & (start + length <= pool_rows) & (end <= last)
        return tl.where(valid, start, 0), tl.where(valid, length, 0), tl.where(valid, column, 0), valid


@triton.jit
def _poison(rows, value):
    """``value``, with NaN in the given rows."""
    # Made in fp32: Triton 3.6's interpreter has no bf16 constants.
    nan = tl.full((1, 1), float("nan"), tl.float32).to(value.dtype)
    return tl.where(rows[:, None], nan, value)


@triton.jit
def _wide(value):
    """``value`` in the dtype that arithmetic is done in."""
    return value if value.dtype == tl.float64 else value.to(tl.float32)


@triton.jit
def _assemble(
    out,
    prompts,
    text,
    ids,
    placement,
    max_length,
    heads,
    text_rows,
    pool_rows,
    width,
    SCALE: tl.constexpr,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[i] = [zeros(max_length - length) ; text[i, :column] ; prompts[start : start + length] ; text[i, column:]].

    With ``ids``, text row r is SIGN * SCALE * text[ids[i, r]].
    """
    rows = tl.cast(max_length, tl.int64) + text_rows
    i, head, row, col = _tile(rows, heads, ROWS, COLS)
    start, length, column, valid = _span(placement, i, max_length, pool_rows, text_rows, False)
    poisoned = row < tl.where(valid, 0, rows)

    place = row - (max_length - length)  # in the row without its zeros
    is_prompt = (place >= column) & (place < column + length)
    is_text = (place >= 0) & (row < rows) & ~is_prompt
    source = tl.where(place < column, place, place - length)
    if ids is not None:
        source = tl.load(ids.data + i * ids.batch + source * ids.row, mask=is_text, other=0).to(tl.int64)
        known = (source >= 0) & (source < ids.vocabulary)
        poisoned = poisoned | (is_text & ~known)
        is_text = is_text & known

    in_width = (col < width)[None, :]
    value = tl.load(_at(text, i, head, source, col), mask=is_text[:, None] & in_width, other=0.0)
    if SCALE != 1.0 or SIGN != 1.0:
        value = _wide(value) * SCALE * SIGN
    value = value.to(out.data.dtype.element_ty)
    prompt = tl.load(_at(prompts, i, head, start + place - column, col), mask=is_prompt[:, None] & in_width, other=0.0)
    value = tl.where(is_prompt[:, None], prompt.to(value.dtype), value)
    tl.store(_at(out, i, head, row, col), _poison(poisoned, value), mask=(row < rows)[:, None] & in_width)


@triton.jit(do_not_specialize=["max_length", "text_rows", "pool_rows"])
def _prepend_kernel(
    out,
    prompts,
    text,
    ids,
    placement,
    max_length,
    text_rows,
    pool_rows,
    width,
    SCALE: tl.constexpr,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    _assemble(out, prompts, text, ids, placement, max_length, 1, text_rows, pool_rows, width, SCALE, SIGN, ROWS, COLS)


@triton.jit(do_not_specialize=["max_length", "text_rows", "pool_rows"])
def _prepend_kv_kernel(
    out_k,
    out_v,
    prefix_k,
    prefix_v,
    key,
    value,
    placement,
    max_length,
    heads,
    text_rows,
    pool_rows,
    width_k,
    width_v,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    if tl.program_id(2) == 0:
        _assemble(
            out_k,
            prefix_k,
            key,
            None,
            placement,
            max_length,
            heads,
            text_rows,
            pool_rows,
            width_k,
            1.0,
            1.0,
            ROWS,
            COLS,
        )
    else:
        _assemble(
            out_v,
            prefix_v,
            value,
            None,
            placement,
            max_length,
            heads,
            text_rows,
            pool_rows,
            width_v,
            1.0,
            1.0,
            ROWS,
            COLS,
        )


@triton.jit
def _strip(out, hidden, placement, max_length, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[i] = hidden[i] without its prompt rows and the zeros before them; ``sizes`` are those of ``out``."""
    i, head, row, col = _tile(sizes.rows, sizes.heads, ROWS, COLS)
    # What the pool held does not matter here, so any start will do.
    _, length, column, valid = _span(placement, i, max_length, 2**32, sizes.rows, False)
    source = row + max_length - tl.where(row < column, length, 0)
    inside = (row < tl.where(i < sizes.batch, sizes.rows, 0))[:, None] & (col < sizes.width)[None, :]
    value = tl.load(_at(hidden, i, head, source, col), mask=inside, other=0.0).to(out.data.dtype.element_ty)
    tl.store(_at(out, i, head, row, col), _poison(row < tl.where(valid, 0, sizes.rows), value), mask=inside)


@triton.jit(do_not_specialize=["max_length"])
def _strip_kernel(out, hidden, placement, max_length, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    _strip(out, hidden, placement, max_length, sizes, ROWS, COLS)


@triton.jit
def _cast_kernel(
    out_q, out_k, out_v, query, key, value, sizes_q, sizes_k, sizes_v, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # A cast is a strip of no rows.
    if tl.program_id(2) == 0:
        _strip(out_q, query, None, 0, sizes_q, ROWS, COLS)
    elif tl.program_id(2) == 1:
        _strip(out_k, key, None, 0, sizes_k, ROWS, COLS)
    else:
        _strip(out_v, value, None, 0, sizes_v, ROWS, COLS)


@triton.jit(do_not_specialize=["max_length", "slots", "rows", "pool_rows"])
def _overwrite_kernel(
    out,
    hidden,
    prompts,
    placement,
    max_length,
    slots,
    rows,
    pool_rows,
    width,
    ADD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rows column : column + length of hidden[i] become prompts[start : start + length], or have it added.

    Runs over ``slots`` rows for each i: all rows of ``out``, or IN_PLACE the ``max_length`` from ``column`` on.
    """
    i, head, row, col = _tile(slots, 1, ROWS, COLS)
    start, length, column, valid = _span(placement, i, max_length, pool_rows, rows, True)
    if IN_PLACE:
        row += column
    is_prompt = (row >= column) & (row < column + length)
    poisoned = row < tl.where(valid, 0, tl.minimum(max_length, rows))
    written = is_prompt | poisoned if IN_PLACE else row < rows

    in_width = (col < width)[None, :]
    prompt = tl.load(_at(prompts, i, head, start + row - column, col), mask=is_prompt[:, None] & in_width, other=0.0)
    if ADD:
        value = tl.load(_at(hidden, i, head, row, col), mask=written[:, None] & in_width, other=0.0)
        prompt += _wide(value)
    else:
        value = tl.load(_at(hidden, i, head, row, col), mask=(written & ~is_prompt)[:, None] & in_width, other=0.0)
    value = tl.where(is_prompt[:, None], prompt.to(value.dtype), value)
    tl.store(_at(out, i, head, row, col), _poison(poisoned, value), mask=written[:, None] & in_width)


@triton.jit
def _sum(
    out,
    grad,
    last,
    placement,
    max_length,
    batch,
    heads,
    rows,
    pool_rows,
    width,
    PREPENDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[head, j] = the sum over i of the row of grad[i, head] that holds pool row j, i ascending, then last[head, j].

    The exact error of every addition is kept, so the result does not get worse with the batch.
    """
    _, head, row, col = _tile(pool_rows, heads, ROWS, COLS)
    latest = rows - max_length if PREPENDED else rows
    in_width = (col < width)[None, :]
    inside = (row < pool_rows)[:, None] & in_width
    total = tl.zeros([ROWS, COLS], tl.float64 if grad.data.dtype.element_ty == tl.float64 else tl.float32)
    lost = tl.zeros_like(total)
    poisoned = row < 0
    # Unrolled, so that the loads of several rows are under way at once.
    for b in tl.range(0, batch, loop_unroll_factor=4):
        i = tl.cast(b, tl.int64)
        start, length, column, valid = _span(placement, i, max_length, pool_rows, latest, not PREPENDED)
        poisoned = poisoned | (row < tl.where(valid, 0, pool_rows))
        first = column + max_length - length if PREPENDED else column
        held = ((row >= start) & (row < start + length))[:, None] & inside
        value = _wide(tl.load(_at(grad, i, head, first + row - start, col), mask=held, other=0.0))
        total, lost = _added(total, lost, value, held)
    if last is not None:
        value = _wide(tl.load(_at(last, 0, head, row, col), mask=inside, other=0.0))
        total, lost = _added(total, lost, value, inside)
    tl.store(_at(out, 0, head, row, col), _poison(poisoned, (total + lost).to(out.data.dtype.element_ty)), mask=inside)


@triton.jit
def _added(total, lost, value, held):
    """Knuth's TwoSum: the sum where ``held``, and the exact error of that addition with those of before."""
    raised = total + value
    added = raised - total
    error = (total - (raised - added)) + (value - added)
    lost = tl.where(held & (error == error), lost + error, lost)  # inf - inf: an infinite sum stays infinite
    return tl.where(held, raised, total), lost


@triton.jit(do_not_specialize=["max_length", "batch", "rows", "pool_rows"])
def _sum_kernel(
    out,
    grad,
    placement,
    max_length,
    batch,
    heads,
    rows,
    pool_rows,
    width,
    PREPENDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    _sum(out, grad, None, placement, max_length, batch, heads, rows, pool_rows, width, PREPENDED, ROWS, COLS)


@triton.jit
def _join(out, grad, last, num_prompts, batch, rows, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    # another part may have more heads, and this one may be empty
    has_work = tl.program_id(0) < sizes.batch * sizes.heads * tl.cdiv(num_prompts, ROWS)
    width = tl.where(has_work, sizes.width, 0)
    _sum(out, grad, last, None, num_prompts, batch, sizes.heads, rows, num_prompts, width, True, ROWS, COLS)


@triton.jit(do_not_specialize=["num_prompts", "batch", "rows"])
def _join_kernel(
    out_q,
    out_k,
    out_v,
    key,
    value,
    prompt_query,
    prompt_key,
    prompt_value,
    num_prompts,
    batch,
    rows,
    sizes_q,
    sizes_k,
    sizes_v,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # The texts have no gradient for the prompt's query.
    if tl.program_id(2) == 0:
        _join(out_q, key, prompt_query, num_prompts, 0, rows, sizes_q, ROWS, COLS)
    elif tl.program_id(2) == 1:
        _join(out_k, key, prompt_key, num_prompts, batch, rows, sizes_k, ROWS, COLS)
    else:
        _join(out_v, value, prompt_value, num_prompts, batch, rows, sizes_v, ROWS, COLS)


def _batched(t: Tensor) -> _View:
    """[batch, rows, width] or [batch, heads, rows, width]."""
    batch, *head, row, col = t.stride()
    return _View(t, batch, head[0] if head else 0, row, col)


def _pool(t: Tensor) -> _View:
    """[rows, width] or [heads, rows, width], the same for every row of the batch."""
    *head, row, col = t.stride()
    return _View(t, 0, head[0] if head else 0, row, col)


def _placement(start: Tensor | None, length: Tensor | None, column: Tensor | None) -> _Placement | None:
    if start is None or length is None or column is None:
        return None
    return _Placement(start, length, column, start.stride(0), length.stride(0), column.stride(0))


def _sizes(batch: int, heads: int, rows: int, width: int) -> _Sizes:
    # An empty tensor keeps the sizes that the kernels divide by above 0.
    return _Sizes(batch, heads, rows, width) if batch * heads * rows * width else _Sizes(0, 1, 1, 1)


def _sizes_of(t: Tensor) -> _Sizes:
    batch, *heads, rows, width = t.shape
    return _sizes(batch, heads[0] if heads else 1, rows, width)


def _run(kernel, outs: list[_Sizes], *args, elements: int = _TILE, num_warps: int = 4, **constants) -> None:
    """Launches ``kernel`` over tiles of about ``elements`` of its outputs, of which axis 2 of the grid chooses one."""
    rows, width = (max(sizes) for sizes in list(zip(*outs, strict=True))[2:])
    # Columns that leave no remainder, where the width has a divisor large enough; then rows to fill the tile up.
    divisor = width & -width
    cols = min(divisor if divisor >= 64 else triton.next_power_of_2(width), 1024, elements)
    block = {"ROWS": min(elements // cols, triton.next_power_of_2(rows)), "COLS": cols}
    tiles = max(out.batch * out.heads * triton.cdiv(out.rows, block["ROWS"]) for out in outs)
    if tiles:
        grid = (tiles, triton.cdiv(width, cols), len(outs))
        _launch(kernel, grid, *args, **constants, **block, num_warps=num_warps)


def _launch(kernel, grid: tuple[int, int, int], *args, **constants) -> None:
    device = args[0].data.device
    if device.type == "cpu" and isinstance(kernel, JITFunction):
        raise RuntimeError("the triton backend runs on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **OPTIONS, **constants)


def embed_and_prepend(prompts, input_ids, embedding, start=None, length=None, column=None, max_length=0, scale=1.0):
    out = schema.embed_and_prepend(prompts, input_ids, embedding, start, length, column, max_length, scale)
    schema.check_ids(input_ids, embedding.shape[0])
    if scale != 1.0:
        scale = float(torch.tensor(scale, dtype=embedding.dtype, device="cpu"))
    ids = _Ids(input_ids, input_ids.stride(0), input_ids.stride(1), embedding.shape[0])
    _prepend(out, prompts, _pool(embedding), ids, input_ids.shape[1], start, length, column, max_length, scale)
    return out


def prepend(prompts, hidden, start=None, length=None, column=None, max_length=0):
    out = schema.prepend(prompts, hidden, start, length, column, max_length)
    _prepend(out, prompts, _batched(hidden), None, hidden.shape[1], start, length, column, max_length, 1.0)
    return out


def _prepend(out, prompts, text, ids, text_rows, start, length, column, max_length, scale):
    pool_rows, width = prompts.shape
    schema.check_values(start, length, column, max_length, pool_rows, text_rows, ends_within=False)
    if start is None:
        max_length = pool_rows
    views = _batched(out), _pool(prompts), text, ids, _placement(start, length, column)
    # The scale is a constant, because a float argument would reach the kernel in fp32 only; its sign is another one, as
    # Triton 3.6 takes -0.0 for 0.0.
    constants = {"SCALE": abs(scale), "SIGN": math.copysign(1.0, scale)}
    _run(_prepend_kernel, [_sizes_of(out)], *views, max_length, text_rows, pool_rows, width, **constants)


def prepend_kv(prefix_k, prefix_v, key, value, start=None, length=None, column=None, max_length=0, dtype=None):
    k, v = schema.prepend_kv(prefix_k, prefix_v, key, value, start, length, column, max_length, dtype)
    _prepend_both(k, v, prefix_k, prefix_v, key, value, start, length, column, max_length)
    return k, v


def _prepend_both(k, v, prefix_k, prefix_v, key, value, start=None, length=None, column=None, max_length=0):
    (_, heads, text_rows, width_k), width_v, pool_rows = key.shape, value.shape[3], prefix_k.shape[1]
    schema.check_values(start, length, column, max_length, pool_rows, text_rows, ends_within=False)
    if start is None:
        max_length = pool_rows
    views = _batched(k), _batched(v), _pool(prefix_k), _pool(prefix_v), _batched(key), _batched(value)
    where = _placement(start, length, column), max_length
    _run(
        _prepend_kv_kernel, [_sizes_of(k), _sizes_of(v)], *views, *where, heads, text_rows, pool_rows, width_k, width_v
    )


def spread_kv(key, value, num_prompts, batch_size, dtype=None):
    outs = schema.spread_kv(key, value, num_prompts, batch_size, dtype)
    k, v = (_by_text(out, batch_size) for out in outs)
    length = k.shape[2] - num_prompts
    prefix_k, key = _parted(key, num_prompts, batch_size, length)
    prefix_v, value = _parted(value, num_prompts, batch_size, length)
    _prepend_both(k, v, prefix_k, prefix_v, key, value)
    return outs


def _by_text(rows: Tensor, batch_size: int) -> Tensor:
    """[b, h, r, hd], a view of [b·r, h, hd]."""
    return rows.unflatten(0, (batch_size, rows.shape[0] // batch_size)).transpose(1, 2)


def _parted(packed: Tensor, num_prompts: int, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """[h, m, hd] and [b, h, n, hd], views of [1, h, m + b·n, hd]."""
    prompt, texts = packed[0].split([num_prompts, packed.shape[2] - num_prompts], 1)
    return prompt, texts.unflatten(1, (batch_size, length)).transpose(0, 1)


def strip(hidden, start, length, column, max_length, dtype):
    out = schema.strip(hidden, start, length, column, max_length, dtype)
    schema.check_values(start, length, column, max_length, 2**32, out.shape[-2], ends_within=False)
    views, where = (_batched(out), _batched(hidden)), _placement(start, length, column)
    sizes = _sizes_of(out)
    _run(_strip_kernel, [sizes], *views, where, max_length, sizes)
    return out


def cast_qkv(query, key, value, dtype):
    outs = schema.cast_qkv(query, key, value, dtype)
    sizes = [_sizes_of(out) for out in outs]
    _run(_cast_kernel, sizes, *map(_batched, (*outs, query, key, value)), *sizes)
    return outs


def overwrite(hidden, prompts, start=None, length=None, column=None, max_length=0, add=False):
    out = schema.overwrite(hidden, prompts, start, length, column, max_length, add)
    _overwrite(out, hidden, prompts, start, length, column, max_length, add)
    return out


def overwrite_(hidden, prompts, start=None, length=None, column=None, max_length=0, add=False):
    schema.overwrite_(hidden, prompts, start, length, column, max_length, add)
    _overwrite(hidden, hidden, prompts, start, length, column, max_length, add)


def _overwrite(out, hidden, prompts, start, length, column, max_length, add):
    (batch, rows, width), pool_rows = hidden.shape, prompts.shape[0]
    schema.check_values(start, length, column, max_length, pool_rows, rows, ends_within=True)
    if start is None:
        max_length = pool_rows
    in_place = out is hidden
    slots = max_length if in_place else rows
    views = _batched(out), _batched(hidden), _pool(prompts), _placement(start, length, column)
    sizes = _sizes(batch, 1, slots, width)
    _run(_overwrite_kernel, [sizes], *views, max_length, slots, rows, pool_rows, width, ADD=add, IN_PLACE=in_place)


def sum_prompts(grad, num_prompts, start, length, column, max_length, prepended, dtype):
    out = schema.sum_prompts(grad, num_prompts, start, length, column, max_length, prepended, dtype)
    batch, *has_heads, rows, width = grad.shape
    heads = has_heads[0] if has_heads else 1
    if start is None:
        max_length = num_prompts
    last = rows - max_length if prepended else rows
    schema.check_values(start, length, column, max_length, num_prompts, last, ends_within=not prepended)
    views, where = (_pool(out), _batched(grad)), (_placement(start, length, column), max_length)
    counts = batch, heads, rows, num_prompts, width
    _run(
        _sum_kernel, [_sizes(1, heads, num_prompts, width)], *views, *where, *counts, PREPENDED=prepended, **_SUM_TILING
    )
    return out


def unspread_kv(key, value, num_prompts, batch_size, dtype):
    schema.unspread_kv(key, value, num_prompts, batch_size, dtype)
    key, value = (_by_text(t, batch_size) for t in (key, value))
    no_query = key[:, :0, num_prompts:]
    return join_qkv(no_query, key, value, None, None, None, num_prompts, dtype)[1:]


def join_qkv(query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype):
    outs = schema.join_qkv(query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype)
    batch, _, length, _ = query.shape
    prompts = [None if prompt is None else _batched(prompt) for prompt in (prompt_query, prompt_key, prompt_value)]
    owns, texts = zip(*(_parted(out, num_prompts, batch, length) for out in outs), strict=True)
    grads = query, key[:, :, num_prompts:], value[:, :, num_prompts:]
    sizes = [_sizes_of(text) for text in texts]
    _run(_cast_kernel, sizes, *map(_batched, (*texts, *grads)), *sizes)
    sizes = [_sizes_of(own[None]) for own in owns]
    counts = num_prompts, batch, num_prompts + length
    _run(
        _join_kernel, sizes, *map(_pool, owns), _batched(key), _batched(value), *prompts, *counts, *sizes, **_SUM_TILING
    )
    return outs


schema.register("triton", globals())
