"""Every op, once: its schema, its checks and its fake.

The same schemas are defined in three namespaces of ``torch.ops``, one for each backend: ``ptune_reference``,
``ptune_native`` and ``ptune_triton``. Backends written in Python are registered here with ``register``; the compiled
libraries register themselves for their device's key when they are loaded, and make the same checks in C++.

``start``, ``length``, ``column`` and ``max_length`` are the fields of a `Placement`, or ``None, None, None`` for the
whole pool at column 0 (then ``max_length`` counts only for ``strip``, which has no pool to take it from).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BACKENDS = ("reference", "native", "triton")

_PLACEMENT = "Tensor? start, Tensor? length, Tensor? column, int max_length"
_OR_POOL = "Tensor? start=None, Tensor? length=None, Tensor? column=None, int max_length=0"
SCHEMAS = {
    "embed_and_prepend": f"(Tensor prompts, Tensor input_ids, Tensor embedding, {_OR_POOL}, float scale=1.0) -> Tensor",
    "prepend": f"(Tensor prompts, Tensor hidden, {_OR_POOL}) -> Tensor",
    "strip": f"(Tensor hidden, {_PLACEMENT}, ScalarType? dtype) -> Tensor",
    "overwrite": f"(Tensor hidden, Tensor prompts, {_OR_POOL}, bool add=False) -> Tensor",
    "overwrite_": f"(Tensor(a!) hidden, Tensor prompts, {_OR_POOL}, bool add=False) -> ()",
    "prepend_kv": (
        f"(Tensor prefix_k, Tensor prefix_v, Tensor key, Tensor value, {_OR_POOL}, ScalarType? dtype=None)"
        " -> (Tensor, Tensor)"
    ),
    "sum_prompts": f"(Tensor grad, int num_prompts, {_PLACEMENT}, bool prepended, ScalarType dtype) -> Tensor",
    "cast_qkv": "(Tensor query, Tensor key, Tensor value, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    "spread_kv": (
        "(Tensor key, Tensor value, int num_prompts, SymInt batch_size, ScalarType? dtype=None) -> (Tensor, Tensor)"
    ),
    "unspread_kv": (
        "(Tensor key, Tensor value, int num_prompts, SymInt batch_size, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "join_qkv": (
        "(Tensor query, Tensor key, Tensor value, Tensor? prompt_query, Tensor? prompt_key, Tensor? prompt_value,"
        " int num_prompts, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
    ),
}

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Checks: each names the argument, what was expected and what came.


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def _check_rank(name: str, t: Tensor, *ranks: int) -> None:
    if t.dim() not in ranks:
        raise ValueError(f"{name}: expected {' or '.join(map(str, ranks))} dimensions, got shape {_shape(t)}")
    if t.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided (dense) tensor, got layout {t.layout}")


def _check_size(name: str, t: Tensor, dim: int, size: int, reason: str) -> None:
    torch._check_value(
        t.shape[dim] == size, lambda: f"{name}: expected size {size} in dimension {dim} ({reason}), got {_shape(t)}"
    )


def _check_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {t.device}")


def _check_dtype(name: str, dtype: torch.dtype, expected: Sequence[torch.dtype]) -> None:
    if dtype not in expected:
        raise ValueError(f"{name}: expected {' or '.join(map(str, expected))}, got {dtype}")


def _check_prompt_dtype(prompts: Tensor, text_name: str, text: Tensor) -> None:
    _check_dtype(text_name, text.dtype, (*FLOATS, torch.float64))
    _check_dtype("prompts", prompts.dtype, (torch.float64 if text.dtype == torch.float64 else torch.float32,))


def _check_placement(
    like: Tensor, start: Tensor | None, length: Tensor | None, column: Tensor | None, max_length: int
) -> None:
    if start is None or length is None or column is None:
        if not (start is None and length is None and column is None):
            raise ValueError("placement: expected start, length and column together, got only some of them")
        return
    for name, t in (("start", start), ("length", length), ("column", column)):
        _check_rank(f"placement.{name}", t, 1)
        _check_size(f"placement.{name}", t, 0, like.shape[0], "one for each row of the batch")
        _check_device(f"placement.{name}", t, "the batch", like)
        _check_dtype(f"placement.{name}", t.dtype, (torch.int32,))
    torch._check_value(max_length >= 0, lambda: f"placement.max_length: expected at least 0, got {max_length}")


def check_values(
    start: Tensor | None,
    length: Tensor | None,
    column: Tensor | None,
    max_length: int,
    pool_rows: int,
    last: int,
    ends_within: bool,
) -> None:
    """Checks a placement's values where reading them costs no synchronisation, that is on the CPU.

    ``column`` may be at most ``last``; with ``ends_within``, ``column + length`` may.
    """
    if start is None or length is None or column is None or start.device.type != "cpu" or start.numel() == 0:
        return
    start, length, column = start.long(), length.long(), column.long()  # int32 sums could wrap around
    end = column + length if ends_within else column
    for name, values, low, high in (
        ("length", length, 0, max_length),
        ("start", start, 0, None),
        ("start + length", start + length, 0, pool_rows),
        ("column", column, 0, None),
        ("column + length" if ends_within else "column", end, 0, last),
    ):
        least, most = int(values.min()), int(values.max())
        if least < low or (high is not None and most > high):
            upper = "" if high is None else f" and at most {high}"
            raise IndexError(f"placement.{name}: expected at least {low}{upper}, got {least} to {most}")


def check_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Checks token ids where reading them costs no synchronisation, that is on the CPU."""
    if input_ids.device.type != "cpu" or input_ids.numel() == 0:
        return
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= vocabulary:
        raise IndexError(f"input_ids: expected ids from 0 to {vocabulary - 1}, got {least} to {most}")


# One function for each op: checks shapes, dtypes and devices, and returns outputs of the right kind, uninitialised.


def embed_and_prepend(prompts, input_ids, embedding, start=None, length=None, column=None, max_length=0, scale=1.0):
    _check_rank("prompts", prompts, 2)
    _check_rank("input_ids", input_ids, 2)
    _check_rank("embedding", embedding, 2)
    _check_size("embedding", embedding, 1, prompts.shape[1], "the width of prompts")
    _check_dtype("input_ids", input_ids.dtype, (torch.int64, torch.int32))
    _check_prompt_dtype(prompts, "embedding", embedding)
    _check_device("embedding", embedding, "prompts", prompts)
    _check_device("input_ids", input_ids, "prompts", prompts)
    _check_placement(input_ids, start, length, column, max_length)
    b, n = input_ids.shape
    rows = (prompts.shape[0] if start is None else max_length) + n
    return embedding.new_empty(b, rows, prompts.shape[1])


def prepend(prompts, hidden, start=None, length=None, column=None, max_length=0):
    _check_rank("prompts", prompts, 2)
    _check_rank("hidden", hidden, 3)
    _check_size("prompts", prompts, 1, hidden.shape[2], "the width of hidden")
    _check_prompt_dtype(prompts, "hidden", hidden)
    _check_device("prompts", prompts, "hidden", hidden)
    _check_placement(hidden, start, length, column, max_length)
    b, n, d = hidden.shape
    return hidden.new_empty(b, (prompts.shape[0] if start is None else max_length) + n, d)


def strip(hidden, start, length, column, max_length, dtype):
    _check_rank("hidden", hidden, 3, 4)
    _check_dtype("hidden", hidden.dtype, (*FLOATS, torch.float64))
    _check_cast("dtype", hidden.dtype, dtype)
    _check_placement(hidden, start, length, column, max_length)
    rows = hidden.shape[-2]
    torch._check_value(
        0 <= max_length <= rows, lambda: f"max_length: expected 0 to {rows} (the rows of hidden), got {max_length}"
    )
    return hidden.new_empty(*hidden.shape[:-2], rows - max_length, hidden.shape[-1], dtype=dtype or hidden.dtype)


def overwrite(hidden, prompts, start=None, length=None, column=None, max_length=0, add=False):
    _check_overwrite(hidden, prompts, start, length, column, max_length)
    return hidden.new_empty(hidden.shape)


def overwrite_(hidden, prompts, start=None, length=None, column=None, max_length=0, add=False):
    _check_overwrite(hidden, prompts, start, length, column, max_length)
    for dim, stride in enumerate(hidden.stride()):
        if stride == 0 and hidden.shape[dim] > 1:
            raise ValueError(f"hidden: expected every element to have its own memory, got dimension {dim} expanded")


def _check_overwrite(hidden, prompts, start, length, column, max_length):
    _check_rank("hidden", hidden, 3)
    _check_rank("prompts", prompts, 2)
    _check_size("prompts", prompts, 1, hidden.shape[2], "the width of hidden")
    _check_prompt_dtype(prompts, "hidden", hidden)
    _check_device("prompts", prompts, "hidden", hidden)
    _check_placement(hidden, start, length, column, max_length)
    if start is None:
        m, rows = prompts.shape[0], hidden.shape[1]
        torch._check_value(m <= rows, lambda: f"prompts: expected at most {rows} rows (the rows of hidden), got {m}")


def prepend_kv(prefix_k, prefix_v, key, value, start=None, length=None, column=None, max_length=0, dtype=None):
    for name, t, rank in (("prefix_k", prefix_k, 3), ("prefix_v", prefix_v, 3), ("key", key, 4), ("value", value, 4)):
        _check_rank(name, t, rank)
        _check_dtype(name, t.dtype, (torch.float64,) if key.dtype == torch.float64 else FLOATS)
        _check_device(name, t, "key", key)
    _check_cast("dtype", key.dtype, dtype)
    if value.dtype != key.dtype:
        raise ValueError(f"value: expected {key.dtype} (the dtype of key), got {value.dtype}")
    for dim, what in ((0, "batch"), (1, "heads"), (2, "rows")):
        _check_size("value", value, dim, key.shape[dim], f"the {what} of key")
    _check_size("prefix_k", prefix_k, 0, key.shape[1], "the heads of key")
    _check_size("prefix_v", prefix_v, 0, key.shape[1], "the heads of key")
    _check_size("prefix_v", prefix_v, 1, prefix_k.shape[1], "the rows of prefix_k")
    _check_size("prefix_k", prefix_k, 2, key.shape[3], "the head width of key")
    _check_size("prefix_v", prefix_v, 2, value.shape[3], "the head width of value")
    _check_placement(key, start, length, column, max_length)
    b, h, n, _ = key.shape
    rows = (prefix_k.shape[1] if start is None else max_length) + n
    dtype = dtype or key.dtype
    return (
        key.new_empty(b, h, rows, key.shape[3], dtype=dtype),
        value.new_empty(b, h, rows, value.shape[3], dtype=dtype),
    )


def sum_prompts(grad, num_prompts, start, length, column, max_length, prepended, dtype):
    _check_rank("grad", grad, 3, 4)
    _check_dtype("grad", grad.dtype, (*FLOATS, torch.float64))
    _check_dtype("dtype", dtype, (torch.float64,) if grad.dtype == torch.float64 else FLOATS)
    _check_placement(grad, start, length, column, max_length)
    torch._check_value(num_prompts >= 0, lambda: f"num_prompts: expected at least 0, got {num_prompts}")
    if start is None:
        rows = grad.shape[-2]
        torch._check_value(
            num_prompts <= rows, lambda: f"num_prompts: expected at most {rows} (the rows of grad), got {num_prompts}"
        )
    return grad.new_empty(*grad.shape[1:-2], num_prompts, grad.shape[-1], dtype=dtype)


def cast_qkv(query, key, value, dtype):
    for name, t in (("query", query), ("key", key), ("value", value)):
        _check_rank(name, t, 4)
        _check_device(name, t, "query", query)
        _check_dtype(name, t.dtype, (*FLOATS, torch.float64))
        _check_cast("dtype", t.dtype, dtype)
    return tuple(t.new_empty(t.shape, dtype=dtype) for t in (query, key, value))


def spread_kv(key, value, num_prompts, batch_size, dtype=None):
    for name, t in (("key", key), ("value", value)):
        _check_rank(name, t, 4)
        _check_size(name, t, 0, 1, "one sequence")
    _check_device("value", value, "key", key)
    _check_dtype("key", key.dtype, (*FLOATS, torch.float64))
    if value.dtype != key.dtype:
        raise ValueError(f"value: expected {key.dtype} (the dtype of key), got {value.dtype}")
    _check_cast("dtype", key.dtype, dtype)
    _check_size("value", value, 1, key.shape[1], "the heads of key")
    _check_size("value", value, 2, key.shape[2], "the rows of key")
    rows = key.shape[2]
    torch._check_value(
        0 <= num_prompts <= rows, lambda: f"num_prompts: expected 0 to {rows} (the rows of key), got {num_prompts}"
    )
    torch._check_value(
        batch_size >= 1 and (rows - num_prompts) % batch_size == 0,
        lambda: f"batch_size: expected a divisor of {rows - num_prompts} rows of text, got {batch_size}",
    )
    rows = batch_size * num_prompts + rows - num_prompts
    return tuple(t.new_empty(rows, t.shape[1], t.shape[3], dtype=dtype or key.dtype) for t in (key, value))


def unspread_kv(key, value, num_prompts, batch_size, dtype):
    for name, t in (("key", key), ("value", value)):
        _check_rank(name, t, 3)
        _check_dtype(name, t.dtype, (*FLOATS, torch.float64))
    _check_device("value", value, "key", key)
    if value.dtype != key.dtype:
        raise ValueError(f"value: expected {key.dtype} (the dtype of key), got {value.dtype}")
    _check_cast("dtype", key.dtype, dtype)
    _check_size("value", value, 0, key.shape[0], "the rows of key")
    total = key.shape[0]
    torch._check_value(
        batch_size >= 1 and total % batch_size == 0,
        lambda: f"batch_size: expected a divisor of {total} rows, got {batch_size}",
    )
    rows = total // batch_size
    torch._check_value(
        0 <= num_prompts <= rows, lambda: f"num_prompts: expected 0 to {rows} (the rows of a text), got {num_prompts}"
    )
    packed = num_prompts + batch_size * (rows - num_prompts)
    return tuple(t.new_empty(packed, *t.shape[1:], dtype=dtype).transpose(0, 1)[None] for t in (key, value))


def join_qkv(query, key, value, prompt_query, prompt_key, prompt_value, num_prompts, dtype):
    torch._check_value(num_prompts >= 0, lambda: f"num_prompts: expected at least 0, got {num_prompts}")
    outs = []
    for name, t, prompt in (
        ("query", query, prompt_query),
        ("key", key, prompt_key),
        ("value", value, prompt_value),
    ):
        _check_rank(name, t, 4)
        _check_device(name, t, "query", query)
        _check_dtype(name, t.dtype, (*FLOATS, torch.float64))
        _check_cast("dtype", t.dtype, dtype)
        _check_size(name, t, 0, query.shape[0], "the batch of query")
        if name != "query":
            _check_size(name, t, 2, num_prompts + query.shape[2], "num_prompts and the rows of query")
        if prompt is not None:
            name = f"prompt_{name}"
            _check_rank(name, prompt, 4)
            _check_device(name, prompt, "query", query)
            _check_cast(name, t.dtype, prompt.dtype)
            _check_size(name, prompt, 0, 1, "one prompt")
            _check_size(name, prompt, 1, t.shape[1], "the heads of its text")
            _check_size(name, prompt, 2, num_prompts, "num_prompts")
            _check_size(name, prompt, 3, t.shape[3], "the head width of its text")
        rows = num_prompts + query.shape[0] * query.shape[2]
        outs.append(t.new_empty(rows, t.shape[1], t.shape[3], dtype=dtype).transpose(0, 1)[None])
    if value.dtype != key.dtype:
        raise ValueError(f"value: expected {key.dtype} (the dtype of key), got {value.dtype}")
    return tuple(outs)


def _check_cast(name: str, source: torch.dtype, target: torch.dtype | None) -> None:
    if target is not None:
        _check_dtype(name, target, (torch.float64,) if source == torch.float64 else FLOATS)


# Registration.

CHECKS: dict[str, Callable] = {name: globals()[name] for name in SCHEMAS}
_libraries = {backend: torch.library.Library(f"ptune_{backend}", "DEF") for backend in BACKENDS}

for _backend, _library in _libraries.items():
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"ptune_{_backend}::{_name}", CHECKS[_name], lib=_library)


def register(backend: str, implementations: dict[str, Callable]) -> None:
    """Registers Python implementations of every op of ``backend``, for any device.

    Each begins by calling its namesake here, which checks its arguments and allocates its outputs, and `check_values`.
    """
    for name in SCHEMAS:
        _libraries[backend].impl(name, implementations[name], "CompositeExplicitAutograd")
