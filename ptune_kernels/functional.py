"""The public ops: differentiable, on whichever backend serves the device.

Shapes: ``b`` batch, ``n`` text length, ``M`` rows in the pool of prompts, ``m = max_length`` prompt columns, ``d``
width, ``h`` heads. ``placement=None`` puts the whole pool at column 0 of every row (``m = M``).

Dtypes: prompts are float32 over float32, float16 or bfloat16 text (float64 over float64). Arithmetic is in float32 and
is rounded once, to nearest even; prompt gradients are summed over the batch in float32, in a fixed order, compensated
(Neumaier 1974). Inputs may have any strides and are never copied first; outputs are contiguous and never alias inputs,
but for `overwrite_`, which returns its input, and the views that `part_qkv` returns.

Errors: `ValueError` for shapes, dtypes, devices and layouts, `IndexError` for values out of range, `TypeError` for
arguments of another class (torch's own `RuntimeError` for numbers of one). Each names the argument, what was expected
and what came, before anything is written. The values of a placement and of ``input_ids`` are checked on the CPU only:
on a GPU that would synchronise, so there a row out of range is never read and comes out as NaN (`Placement.of` checks
on the host, before the copy).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.torch_version import TorchVersion

from .backends import Ops, ops_for

# Through what a Function wrote in place, where the caller goes on with its own name for it.
_COMPILER_LOSES_GRADIENTS = TorchVersion(torch.__version__) < "2.13"


class Placement(NamedTuple):
    """Which rows of the prompt pool each row of a batch uses, and where they stand.

    Row ``i`` uses ``prompts[start[i] : start[i] + length[i]]``, set before the text column ``column[i]``; an op that
    prepends makes room for ``max_length`` rows and fills what ``length[i]`` leaves with zeros, on the left.

    start, length, column: int32 [b], on the device of the batch.
    """

    start: Tensor
    length: Tensor
    column: Tensor
    max_length: int

    @classmethod
    def of(
        cls,
        start: Sequence[int],
        length: Sequence[int],
        column: Sequence[int],
        *,
        pool_rows: int,
        device: torch.device | str | None = None,
    ) -> "Placement":
        """A placement from host numbers, checked against a pool of ``pool_rows`` rows before it goes to ``device``."""
        if not len(start) == len(length) == len(column):
            raise ValueError(
                "start, length and column: expected one number each for every row of the batch, got "
                f"{len(start)}, {len(length)} and {len(column)}"
            )
        rows = []
        for i, (s, m, c) in enumerate(zip(start, length, column, strict=True)):
            try:
                whole = int(s) == s and int(m) == m and int(c) == c
            except (TypeError, ValueError, OverflowError):  # None, NaN, infinity
                whole = False
            if not whole:
                raise TypeError(f"row {i}: expected integers, got start {s!r}, length {m!r}, column {c!r}")
            s, m, c = int(s), int(m), int(c)
            rows.append((s, m, c))
            if not all(0 <= number < 2**31 for number in (s, m, c)) or s + m > pool_rows:
                raise IndexError(
                    f"row {i}: expected start, length and column of at least 0 (and of 31 bits), and start + length of "
                    f"at most {pool_rows}, got start {s}, length {m}, column {c}"
                )
        numbers = torch.tensor(rows, dtype=torch.int32).view(-1, 3).T.contiguous().to(device)
        return cls(numbers[0], numbers[1], numbers[2], max([m for _, m, _ in rows], default=0))


def embed_and_prepend(
    prompts: Tensor, input_ids: Tensor, embedding: Tensor, placement: Placement | None = None, scale: float = 1.0
) -> Tensor:
    """``[prompts ; scale * embedding[input_ids]]`` in one launch.

    prompts [M, d], input_ids [b, n] int64 or int32, embedding [V, d] → [b, m + n, d] in the embedding's dtype.
    ``scale`` is rounded to that dtype first, as Gemma's embedding does. The embedding is taken as frozen; where it
    requires a gradient the look-up is torch's own.
    """
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding: expected a tensor [V, d], got {type(embedding).__name__}; pass its .weight")
    if embedding.requires_grad and torch.is_grad_enabled():
        text = torch.nn.functional.embedding(input_ids, embedding)
        if scale != 1.0:
            text = text * torch.tensor(scale, dtype=text.dtype, device=text.device)
        return prepend(prompts, text, placement)
    ops = ops_for(embedding)
    arguments = (input_ids, embedding, *_arguments(placement, scale, 1.0))
    if _needs_grad(prompts):
        return _EmbedAndPrepend.apply(ops, prompts, *arguments)
    return ops.embed_and_prepend(prompts, *arguments)


def prepend(prompts: Tensor, hidden: Tensor, placement: Placement | None = None) -> Tensor:
    """``[prompts ; hidden]`` for every row, in one launch.

    prompts [M, d], hidden [b, n, d] → [b, m + n, d] in hidden's dtype. ``n`` may be 0: the prompts expanded over the
    batch.
    """
    ops = ops_for(hidden)
    where = _arguments(placement)
    if _needs_grad(prompts, hidden):
        return _Prepend.apply(ops, prompts, hidden, *where)
    return ops.prepend(prompts, hidden, *where)


def strip(hidden: Tensor, max_length: int, placement: Placement | None = None) -> Tensor:
    """The text rows of what `prepend` made: its inverse, and its transpose.

    hidden [b, m + n, d] → [b, n, d]. Without a placement the first ``max_length`` rows go.
    """
    if isinstance(max_length, Placement):
        raise TypeError("max_length: expected a number of rows, got a Placement, which comes after it")
    where = _arguments(placement) or (None, None, None, max_length)
    if where[3] != max_length:
        raise ValueError(f"max_length: expected {where[3]} (that of placement), got {max_length}")
    ops = ops_for(hidden)
    if hidden.ndim != 3:
        raise ValueError(f"hidden: expected 3 dimensions, got shape {list(hidden.shape)}")
    if _needs_grad(hidden):
        return _Strip.apply(ops, hidden, *where)
    return ops.strip(hidden, *where, None)


def overwrite(hidden: Tensor, prompts: Tensor, placement: Placement | None = None, mode: str = "overwrite") -> Tensor:
    """A copy of ``hidden`` whose prompt rows became ``prompts`` (``"overwrite"``) or had them added (``"add"``).

    hidden [b, S, d], prompts [M, d] → [b, S, d]. Writes rows ``column[i] : column[i] + length[i]`` of each row: for
    what `prepend` made, that is its own column plus ``max_length - length``. Backward of ``"overwrite"`` zeroes the
    gradient of the rows that were lost.
    """
    ops = ops_for(hidden)
    arguments = _arguments(placement, _is_add(mode), False)
    if _needs_grad(prompts, hidden):
        return _Overwrite.apply(ops, hidden, prompts, *arguments)
    return ops.overwrite(hidden, prompts, *arguments)


def overwrite_(hidden: Tensor, prompts: Tensor, placement: Placement | None = None, mode: str = "overwrite") -> Tensor:
    """`overwrite` in place: touches the prompt rows alone, and returns ``hidden``.

    Under autograd ``hidden`` must be no leaf, and no view of one or of what `unbind` and its like return, and nothing
    may have saved it for its backward; a region that is recomputed (gradient checkpointing) needs `overwrite`.
    """
    ops = ops_for(hidden)
    arguments = _arguments(placement, _is_add(mode), False)
    if not _needs_grad(prompts, hidden):
        ops.overwrite_(hidden, prompts, *arguments)
        increment_version(hidden)
        return hidden
    if _COMPILER_LOSES_GRADIENTS and torch.compiler.is_compiling():
        return hidden.copy_(overwrite(hidden, prompts, placement, mode))
    if hidden.requires_grad and (hidden if hidden._base is None else hidden._base).is_leaf:
        raise RuntimeError("hidden: expected no leaf that requires grad, nor a view of one, got one; use overwrite")
    return _OverwriteInPlace.apply(ops, hidden, prompts, *arguments)


def prepend_kv(
    prefix_k: Tensor,
    prefix_v: Tensor,
    key: Tensor,
    value: Tensor,
    placement: Placement | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``[prefix_k ; key]`` and ``[prefix_v ; value]`` for every row, K and V in one launch, cast to ``dtype``.

    prefix_k [h, M, hd_k], prefix_v [h, M, hd_v], key [b, h, n, hd_k], value [b, h, n, hd_v] → [b, h, m + n, hd_k] and
    [b, h, m + n, hd_v]. The prefix may be float32, float16 or bfloat16; ``dtype`` is key's unless given.
    """
    if dtype is not None:
        _check_dtype(dtype)
    ops = ops_for(key)
    arguments = _arguments(placement, dtype)
    if _needs_grad(prefix_k, prefix_v, key, value):
        return _PrependKV.apply(ops, prefix_k, prefix_v, key, value, *arguments)
    return ops.prepend_kv(prefix_k, prefix_v, key, value, *arguments)


def cast_qkv(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in ``dtype``, in one launch; their gradients come back in their own dtypes.

    Each of 4 dimensions and any strides.
    """
    _check_dtype(dtype)
    ops = ops_for(query)
    if _needs_grad(query, key, value):
        return _CastQKV.apply(ops, query, key, value, dtype)
    return ops.cast_qkv(query, key, value, dtype)


def part_qkv(
    query: Tensor, key: Tensor, value: Tensor, num_prompts: int, batch_size: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What attentions need of one sequence that holds a prompt of m rows and then b texts of n, which share it.

    query [1, h, m + b·n, hd_k], key [1, h_kv, m + b·n, hd_k], value [1, h_kv, m + b·n, hd_v] → query, key and value of
    the prompt, [1, ·, m, ·]; query of the texts, [b, h, n, hd_k], and their keys and values behind the prompt's,
    [b, h_kv, m + n, ·]. Keys and values are written in one launch, cast to ``dtype`` if given; the prompt's are views
    of the first text's. Queries are views of ``query``.

    In backward one op joins the six gradients, those of prompt rows summed over the texts and the prompt itself, in the
    order of rows: as [m + b·n, h, hd], which is how projections read them.
    """
    if dtype is not None:
        _check_dtype(dtype)
    ops = ops_for(query)
    if _needs_grad(query, key, value):
        return _PartQKV.apply(ops, query, key, value, num_prompts, batch_size, dtype)
    return _part(ops, query, key, value, num_prompts, batch_size, dtype)


def spread_kv(
    key: Tensor, value: Tensor, num_prompts: int, batch_size: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The keys and values of one sequence that holds a prompt of m rows and then b texts of n, the prompt's repeated
    before each text's: what attention over sequences of variable length reads, in one launch.

    key [1, h, m + b·n, hd_k], value [1, h, m + b·n, hd_v] → [b·(m + n), h, ·], in ``dtype`` if given. The prompt and
    the first text are one sequence of m + n queries, and each other text is one of n, all behind m + n keys.

    In backward one op adds up the gradients of the prompt rows, and puts all rows in their order.
    """
    if dtype is not None:
        _check_dtype(dtype)
    ops = ops_for(key)
    if _needs_grad(key, value):
        return _SpreadKV.apply(ops, key, value, num_prompts, batch_size, dtype)
    return ops.spread_kv(key, value, num_prompts, batch_size, dtype)


def _part(ops: Ops, query: Tensor, key: Tensor, value: Tensor, m: int, b: int, dtype: torch.dtype | None) -> tuple:
    if key.dim() == 4:  # or the op says so
        _check_query(query, key)
    keys, values = ops.spread_kv(key, value, m, b, dtype)
    _, heads, _, width = query.shape
    n = keys.shape[0] // b - m
    own_query, texts = query.narrow(2, 0, m), query.narrow(2, m, b * n).view(heads, b, n, width).transpose(0, 1)
    own_key, own_value = (t.narrow(0, 0, m).transpose(0, 1).unsqueeze(0) for t in (keys, values))
    key, value = (t.view(b, m + n, *t.shape[1:]).transpose(1, 2) for t in (keys, values))
    return own_query, own_key, own_value, texts, key, value


def _check_query(query: Tensor, key: Tensor) -> None:
    shape, (_, heads, rows, width) = query.shape, key.shape
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(f"query: expected 4 dimensions, the first of size 1, got shape {list(shape)}")
    if shape[2] != rows or shape[3] != width or (heads > 0 and shape[1] % heads):
        raise ValueError(
            f"query: expected [1, a multiple of {heads}, {rows}, {width}] (as key has it), got {list(shape)}"
        )
    if query.device != key.device:
        raise ValueError(f"query: expected device {key.device} (that of key), got {query.device}")
    if query.dtype != key.dtype and (not query.is_floating_point() or torch.float64 in (query.dtype, key.dtype)):
        raise ValueError(f"query: expected a dtype that goes with key's {key.dtype}, got {query.dtype}")


def _needs_grad(*tensors: Tensor) -> bool:
    if forward_ad._current_level >= 0:
        return True  # the ops would drop tangents in silence, and the Functions refuse them
    if torch.is_grad_enabled():
        try:
            for tensor in tensors:
                if tensor.requires_grad:
                    return True
        except AttributeError:
            kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
            raise TypeError(f"expected tensors alone, got {kinds}") from None
    return False


def _arguments(placement: Placement | None, last=None, default=None) -> tuple:
    """What an op takes for ``placement``, and last.

    What its schema says anyway is left out, as torch takes a tenth of a small op's time to read an argument.
    """
    if placement is None:
        return () if last == default else (None, None, None, 0, last)
    if not isinstance(placement, Placement):
        raise TypeError(f"placement: expected a Placement or None, got {type(placement).__name__}")
    return placement if last == default else (*placement, last)


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")


def _is_add(mode: str) -> bool:
    if mode not in ("overwrite", "add"):
        raise ValueError(f'mode: expected "overwrite" or "add", got {mode!r}')
    return mode == "add"


# Every Function takes the backend's ops first, so that its backward, which may run in another thread, uses the same
# ones.


def _remember(ctx, ops: Ops, pool_rows: int, start=None, length=None, column=None, max_length=0, *_) -> None:
    ctx.save_for_backward(start, length, column)
    ctx.ops, ctx.pool_rows = ops, pool_rows
    ctx.max_length = pool_rows if start is None else max_length


def _where(ctx):
    """What `_remember` kept; once in each backward, since checkpointing recomputes saved tensors for one reading."""
    return (*ctx.saved_tensors, ctx.max_length)


def _text_gradient(ops: Ops, grad: Tensor, where, dtype: torch.dtype | None = None) -> Tensor:
    start, _, _, max_length = where
    if start is None and dtype in (None, grad.dtype):
        return grad[..., max_length:, :]
    return ops.strip(grad, *where, dtype)


class _EmbedAndPrepend(Function):
    @staticmethod
    def forward(ctx, ops: Ops, prompts, input_ids, embedding, *arguments):
        _remember(ctx, ops, prompts.shape[0], *arguments)
        ctx.prompt_dtype = prompts.dtype
        return ops.embed_and_prepend(prompts, input_ids, embedding, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        prompts = ctx.ops.sum_prompts(grad, ctx.pool_rows, *_where(ctx), True, ctx.prompt_dtype)
        return None, prompts, *[None] * 7


class _Prepend(Function):
    @staticmethod
    def forward(ctx, ops: Ops, prompts, hidden, *arguments):
        _remember(ctx, ops, prompts.shape[0], *arguments)
        ctx.prompt_dtype = prompts.dtype
        return ops.prepend(prompts, hidden, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        where = _where(ctx)
        prompts = hidden = None
        if ctx.needs_input_grad[1]:
            prompts = ctx.ops.sum_prompts(grad, ctx.pool_rows, *where, True, ctx.prompt_dtype)
        if ctx.needs_input_grad[2]:
            hidden = _text_gradient(ctx.ops, grad, where)
        return None, prompts, hidden, *[None] * 4


class _Strip(Function):
    @staticmethod
    def forward(ctx, ops: Ops, hidden, start, length, column, max_length):
        _remember(ctx, ops, max_length, start, length, column, max_length)
        return ops.strip(hidden, start, length, column, max_length, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        start, length, column, max_length = _where(ctx)
        if start is not None:
            start = torch.zeros_like(start)  # into the zeros below, wherever the prompts themselves came from
        zeros = _zero_prompts(grad, max_length)
        return None, ctx.ops.prepend(zeros, grad, start, length, column, max_length), *[None] * 4


def _zero_prompts(grad: Tensor, rows: int) -> Tensor:
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.new_zeros(1, grad.shape[-1], dtype=dtype).expand(rows, -1)


class _Overwrite(Function):
    @staticmethod
    def forward(ctx, ops: Ops, hidden, prompts, *arguments):
        _remember(ctx, ops, prompts.shape[0], *arguments)
        ctx.prompt_dtype, ctx.add = prompts.dtype, arguments[4:] == (True,)
        return ops.overwrite(hidden, prompts, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        where = _where(ctx)
        hidden = prompts = None
        if ctx.needs_input_grad[1]:
            lost = _zero_prompts(grad, ctx.pool_rows)
            hidden = grad if ctx.add else ctx.ops.overwrite(grad, lost, *where, False)
        if ctx.needs_input_grad[2]:
            prompts = ctx.ops.sum_prompts(grad, ctx.pool_rows, *where, False, ctx.prompt_dtype)
        return None, hidden, prompts, *[None] * 5


class _OverwriteInPlace(_Overwrite):
    @staticmethod
    def forward(ctx, ops: Ops, hidden, prompts, *arguments):
        _remember(ctx, ops, prompts.shape[0], *arguments)
        ctx.prompt_dtype, ctx.add = prompts.dtype, arguments[4:] == (True,)
        ctx.mark_dirty(hidden)
        ops.overwrite_(hidden, prompts, *arguments)
        return hidden


class _PrependKV(Function):
    @staticmethod
    def forward(ctx, ops: Ops, prefix_k, prefix_v, key, value, *arguments):
        _remember(ctx, ops, prefix_k.shape[1], *arguments)
        ctx.dtypes = prefix_k.dtype, prefix_v.dtype, key.dtype, value.dtype
        return ops.prepend_kv(prefix_k, prefix_v, key, value, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        where = _where(ctx)
        prefixes: list[Tensor | None] = [None, None]
        texts: list[Tensor | None] = [None, None]
        for i, grad in enumerate(grads):
            if ctx.needs_input_grad[1 + i]:
                prefixes[i] = ctx.ops.sum_prompts(grad, ctx.pool_rows, *where, True, ctx.dtypes[i])
            if ctx.needs_input_grad[3 + i]:
                texts[i] = _text_gradient(ctx.ops, grad, where, ctx.dtypes[2 + i])
        return None, *prefixes, *texts, *[None] * 5


class _CastQKV(Function):
    @staticmethod
    def forward(ctx, ops: Ops, query, key, value, dtype):
        ctx.ops, ctx.dtypes = ops, (query.dtype, key.dtype, value.dtype)
        return ops.cast_qkv(query, key, value, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if len(set(ctx.dtypes)) == 1:
            return None, *ctx.ops.cast_qkv(*grads, ctx.dtypes[0]), None
        return None, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None


class _SpreadKV(Function):
    @staticmethod
    def forward(ctx, ops: Ops, key, value, num_prompts, batch_size, dtype):
        ctx.ops, ctx.sizes, ctx.dtype = ops, (num_prompts, batch_size), key.dtype
        return ops.spread_kv(key, value, num_prompts, batch_size, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, key, value):
        key, value = ctx.ops.unspread_kv(key, value, *ctx.sizes, ctx.dtype)
        return None, key, value, None, None, None


class _PartQKV(Function):
    @staticmethod
    def forward(ctx, ops: Ops, query, key, value, num_prompts, batch_size, dtype):
        ctx.set_materialize_grads(False)
        ctx.ops, ctx.num_prompts, ctx.dtypes = ops, num_prompts, (query.dtype, key.dtype, value.dtype)
        parts = _part(ops, query, key, value, num_prompts, batch_size, dtype)
        ctx.like = [(t.shape, t.dtype, t.device) for t in parts[3:]]
        # autograd would look after views one by one; all belong to this node alone
        return tuple(t.detach() for t in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        texts = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads[3:], ctx.like, strict=True)
        ]
        wide = functools.reduce(torch.promote_types, ctx.dtypes)
        joined = ctx.ops.join_qkv(*texts, *grads[:3], ctx.num_prompts, wide)
        packed = (t if t.dtype == dtype else t.to(dtype) for t, dtype in zip(joined, ctx.dtypes, strict=True))
        return None, *packed, None, None, None
