"""The CUDA kernels compiled for the CPU, so that their device code can be tested where there is no GPU.

`kernels()` has a function for each op, with the signature of `ptune_kernels.schema`. As on a GPU, nothing checks the
values of a placement or of ids.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from ctypes import Structure, c_bool, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ptune_kernels import schema

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "kernels.cu"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
GUARD = 64  # elements around an output that must stay as they are; a multiple of every alignment


# csrc/kernels.h, field by field


class View(Structure):
    _fields_ = (("data", c_void_p), ("dtype", c_int32), ("stride", c_int64 * 4))


class Int32s(Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64))


class Placement(Structure):
    _fields_ = (("start", Int32s), ("length", Int32s), ("column", Int32s), ("max_length", c_int64))


class Ids(Structure):
    _fields_ = (("data", c_void_p), ("wide", c_bool), ("stride", c_int64 * 2))


def _int64s(names):
    return tuple((name, c_int64) for name in names.split())


class Assemble(Structure):
    _fields_ = (
        ("out", View),
        ("prompts", View),
        ("text", View),
        ("ids", Ids),
        ("vocabulary", c_int64),
        ("scale", c_double),
        ("placement", Placement),
        *_int64s("batch heads text_rows pool_rows width"),
    )


class Strip(Structure):
    _fields_ = (("out", View), ("hidden", View), ("placement", Placement), *_int64s("batch heads text_rows width"))


class Overwrite(Structure):
    _fields_ = (
        ("out", View),
        ("hidden", View),
        ("prompts", View),
        ("add", c_bool),
        ("placement", Placement),
        *_int64s("batch rows pool_rows width"),
    )


class SumPrompts(Structure):
    _fields_ = (
        ("out", View),
        ("grad", View),
        ("last", View),
        ("prepended", c_bool),
        ("placement", Placement),
        *_int64s("batch heads rows pool_rows width"),
    )


class Cast(Structure):
    _fields_ = (("out", View), ("in_", View), *_int64s("batch heads rows width"))


def _batched(t):
    """[batch, rows, width] or [batch, heads, rows, width]."""
    batch, *head, row, col = t.stride()
    return View(t.data_ptr(), DTYPES[t.dtype], (batch, *(head or [0]), row, col))


def _pool(t):
    """[rows, width] or [heads, rows, width]."""
    *head, row, col = t.stride()
    return View(t.data_ptr(), DTYPES[t.dtype], (0, *(head or [0]), row, col))


def _placement(start, length, column, max_length):
    if start is None:
        return Placement(max_length=max_length)
    return Placement(*(Int32s(t.data_ptr(), t.stride(0)) for t in (start, length, column)), max_length)


class _Guarded:
    """Memory for an output in the middle of memory that nothing may write."""

    def __init__(self, like):
        self.memory = torch.full((like.numel() + 2 * GUARD,), 7, dtype=like.dtype)
        self.out = self.memory.as_strided(like.shape, like.stride(), GUARD).fill_(torch.nan)

    def checked(self):
        assert (self.memory[:GUARD] == 7).all(), "wrote before the output"
        assert (self.memory[len(self.memory) - GUARD :] == 7).all(), "wrote beyond the output"
        return self.out


@functools.cache
def kernels():
    """The ops, built on first use; skips the test where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "libptune_cuda_on_host.so")
        host = "-fPIC,-fno-strict-aliasing,-ffp-contract=off,-Wno-unknown-pragmas"
        defines = ("-DPTUNE_ON_HOST", '-DPTUNE_ARCHITECTURES="none"')
        command = (nvcc, "-std=c++17", "-O1", "-shared", "-Xcompiler", host, *defines, "-o", path, SOURCE)
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(path))
    return SimpleNamespace(**{name: functools.partial(function, library) for name, function in _OPS.items()})


def _prepend(library, parts, start, length, column, max_length):
    """``parts``: (out, prompts, text or table, ids or None, scale)."""
    params = []
    for out, prompts, text, ids, scale in parts:
        pool_rows = prompts.shape[-2]
        where = _placement(start, length, column, pool_rows if start is None else max_length)
        looked_up = ids is not None
        batch, *heads, text_rows = (*ids.shape,) if looked_up else text.shape[:-1]
        params.append(
            Assemble(
                out=_batched(out),
                prompts=_pool(prompts),
                text=_pool(text) if looked_up else _batched(text),
                ids=Ids(ids.data_ptr(), ids.dtype == torch.int64, ids.stride()) if looked_up else Ids(),
                vocabulary=len(text) if looked_up else 0,
                scale=scale,
                placement=where,
                batch=batch,
                heads=heads[0] if heads else 1,
                text_rows=text_rows,
                pool_rows=pool_rows,
                width=prompts.shape[-1],
            )
        )
    count = len(params)
    assert library._ZN5ptune8assembleEPKNS_8AssembleEiPv((Assemble * count)(*params), count, None) == 0


def embed_and_prepend(library, prompts, input_ids, embedding, start, length, column, max_length, scale):
    out = _Guarded(schema.embed_and_prepend(prompts, input_ids, embedding, start, length, column, max_length, scale))
    rounded = torch.tensor(scale, dtype=embedding.dtype).item()
    _prepend(library, [(out.out, prompts, embedding, input_ids, rounded)], start, length, column, max_length)
    return out.checked()


def prepend(library, prompts, hidden, start, length, column, max_length):
    out = _Guarded(schema.prepend(prompts, hidden, start, length, column, max_length))
    _prepend(library, [(out.out, prompts, hidden, None, 1.0)], start, length, column, max_length)
    return out.checked()


def prepend_kv(library, prefix_k, prefix_v, key, value, start, length, column, max_length, dtype):
    outs = [
        _Guarded(like)
        for like in schema.prepend_kv(prefix_k, prefix_v, key, value, start, length, column, max_length, dtype)
    ]
    k, v = (out.out for out in outs)
    parts = [(k, prefix_k, key, None, 1.0), (v, prefix_v, value, None, 1.0)]
    _prepend(library, parts, start, length, column, max_length)
    return tuple(out.checked() for out in outs)


def spread_kv(library, key, value, num_prompts, batch_size, dtype):
    outs = [_Guarded(like) for like in schema.spread_kv(key, value, num_prompts, batch_size, dtype)]
    parts = []
    for out, packed in zip(outs, (key, value), strict=True):
        by_text = _by_text(out.out, batch_size)
        parted = _parted(packed, num_prompts, batch_size, by_text.shape[2] - num_prompts)
        parts.append((by_text, *parted, None, 1.0))
    _prepend(library, parts, None, None, None, 0)
    return tuple(out.checked() for out in outs)


def unspread_kv(library, key, value, num_prompts, batch_size, dtype):
    key, value = (_by_text(t, batch_size) for t in (key, value))
    return join_qkv(library, key[:, :0, num_prompts:], key, value, None, None, None, num_prompts, dtype)[1:]


def _by_text(rows, batch_size):
    """[b, h, r, hd], a view of [b·r, h, hd]."""
    return rows.unflatten(0, (batch_size, rows.shape[0] // batch_size)).transpose(1, 2)


def _parted(packed, num_prompts, batch_size, length):
    """[h, m, hd] and [b, h, n, hd], views of [1, h, m + b·n, hd]."""
    prompt, texts = packed[0].split([num_prompts, packed.shape[2] - num_prompts], 1)
    return prompt, texts.unflatten(1, (batch_size, length)).transpose(0, 1)


def strip(library, hidden, start, length, column, max_length, dtype):
    out = _Guarded(schema.strip(hidden, start, length, column, max_length, dtype))
    batch, *heads, rows, width = out.out.shape
    params = Strip(
        out=_batched(out.out),
        hidden=_batched(hidden),
        placement=_placement(start, length, column, max_length),
        batch=batch,
        heads=heads[0] if heads else 1,
        text_rows=rows,
        width=width,
    )
    assert library._ZN5ptune5stripERKNS_5StripEPv(ctypes.byref(params), None) == 0
    return out.checked()


def _overwrite(library, out, hidden, prompts, start, length, column, max_length, add):
    batch, rows, width = hidden.shape
    params = Overwrite(
        out=_batched(out),
        hidden=_batched(hidden),
        prompts=_pool(prompts),
        add=add,
        placement=_placement(start, length, column, len(prompts) if start is None else max_length),
        batch=batch,
        rows=rows,
        pool_rows=len(prompts),
        width=width,
    )
    assert library._ZN5ptune9overwriteERKNS_9OverwriteEPv(ctypes.byref(params), None) == 0


def overwrite(library, hidden, prompts, start, length, column, max_length, add):
    out = _Guarded(schema.overwrite(hidden, prompts, start, length, column, max_length, add))
    _overwrite(library, out.out, hidden, prompts, start, length, column, max_length, add)
    return out.checked()


def overwrite_(library, hidden, prompts, start, length, column, max_length, add):
    schema.overwrite_(hidden, prompts, start, length, column, max_length, add)
    _overwrite(library, hidden, hidden, prompts, start, length, column, max_length, add)


def sum_prompts(library, grad, num_prompts, start, length, column, max_length, prepended, dtype):
    out = _Guarded(schema.sum_prompts(grad, num_prompts, start, length, column, max_length, prepended, dtype))
    batch, *heads, rows, width = grad.shape
    params = SumPrompts(
        out=_pool(out.out),
        grad=_batched(grad),
        prepended=prepended,
        placement=_placement(start, length, column, num_prompts if start is None else max_length),
        batch=batch,
        heads=heads[0] if heads else 1,
        rows=rows,
        pool_rows=num_prompts,
        width=width,
    )
    _sum(library, params)
    return out.checked()


def _sum(library, *params):
    count = len(params)
    assert library._ZN5ptune11sum_promptsEPKNS_10SumPromptsEiPv((SumPrompts * count)(*params), count, None) == 0


def cast_qkv(library, query, key, value, dtype):
    outs = [_Guarded(like) for like in schema.cast_qkv(query, key, value, dtype)]
    _cast(library, [out.out for out in outs], (query, key, value))
    return tuple(out.checked() for out in outs)


def _cast(library, outs, tensors):
    params = [Cast(_batched(out), _batched(t), *t.shape) for out, t in zip(outs, tensors, strict=True)]
    assert library._ZN5ptune4castEPKNS_4CastEiPv((Cast * 3)(*params), 3, None) == 0


def join_qkv(library, query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype):
    outs = [
        _Guarded(like)
        for like in schema.join_qkv(query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype)
    ]
    (batch, _, length, _), m = query.shape, num_prompts
    owns, texts = zip(*(_parted(out.out, m, batch, length) for out in outs), strict=True)
    _cast(library, texts, (query, key[:, :, m:], value[:, :, m:]))
    sums = [
        SumPrompts(
            out=_pool(own),
            grad=_batched(key if grad is query else grad),  # no text has one for the prompt's query
            last=View() if prompt is None else _batched(prompt),
            prepended=True,
            placement=_placement(None, None, None, m),
            batch=0 if grad is query else batch,
            heads=grad.shape[1],
            rows=grad.shape[2],
            pool_rows=m,
            width=grad.shape[3],
        )
        for own, grad, prompt in zip(owns, (query, key, value), (prompt_query, prompt_key, prompt_value), strict=True)
    ]
    _sum(library, *sums)
    return tuple(out.checked() for out in outs)


_OPS = {name: globals()[name] for name in schema.SCHEMAS}
