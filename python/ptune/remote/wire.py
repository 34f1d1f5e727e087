"""What travels between a client and its servers: plain arrays, and a `Request` that is checked where it arrives."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import SHORT_DTYPES

# numpy has no bfloat16: its bits travel
_ARRAYS: dict[str, tuple[torch.dtype, Any]] = {
    "float64": (torch.float64, np.float64),
    "float32": (torch.float32, np.float32),
    "float16": (torch.float16, np.float16),
    "bfloat16": (torch.bfloat16, np.uint16),
}


def checked_dtype(name: str, dtype: Any) -> str:
    """The name of a dtype that can travel: itself, a short one, or torch's. Raises `ValueError` for any other."""
    given = str(dtype).removeprefix("torch.")
    known = SHORT_DTYPES.get(given, given)
    if known not in _ARRAYS:
        raise ValueError(f"{name}: expected one of {', '.join(_ARRAYS)}, got {dtype!r}")
    return known


class SessionGone(Exception):
    """A server no longer holds a session, or not the state of it that the client expects; its history makes it anew."""


class TooLarge(ValueError):
    """A request over a limit of the server; the message has the limit."""


@dataclass(frozen=True)
class Prompts:
    """Deep prompts of some blocks, sent once per version.

    Attributes:
        client: who trains them.
        version: a number for each value that they have had.
        count: rows m.
        source: a list with a reference to the float32 array [blocks, m, d]; in a list, so that Ray does not fetch it
            for a server that has this version.
    """

    client: str
    version: int
    count: int
    source: list[Any] = field(repr=False)


@dataclass(frozen=True)
class Shared:
    """Prompt rows that a server runs once, for all requests whose text attends to them.

    Attributes:
        name: under which it keeps their keys and values.
        request: for the rows alone: float32 or float64, ``shape`` (1, m), with the deep prompts of these blocks.
        source: a list with a reference to the rows [1, m, d], as they come to these blocks; in a list as in `Prompts`.
    """

    name: str
    request: "Request"
    source: list[Any] = field(repr=False)

    def check(self, first: int, last: int) -> None:
        """Raises `ValueError` where these are no rows for a server of blocks ``first`` … ``last - 1``."""
        if type(self.request) is not Request or self.request.shared is not None:
            raise ValueError(f"shared: expected prompt rows and a Request for them alone, got {self!r}")
        self.request.check(first, last)
        if self.request.shape[0] != 1 or self.request.dtype not in ("float32", "float64"):
            raise ValueError(
                f"shared: expected float32 or float64 of shape (1, m), got {self.request.dtype} of shape "
                f"{self.request.shape}"
            )
        if any(getattr(self.request, name) is not None for name in ("mask", "positions", "starts")):
            raise ValueError("shared: expected rows at positions 0 to m - 1, got a mask, positions or starts")
        if not self.request.differentiable:
            raise ValueError("differentiable: expected True for shared rows, got False")
        prompts, count = self.request.prompts, self.request.shape[1]
        if prompts is not None and prompts.count != count:
            raise ValueError(f"prompts: expected {count} rows, as shared has, got {prompts.count}")


@dataclass(frozen=True)
class Request:
    """What is to be done with hidden states [b, S, d], beside these.

    Attributes:
        first, last: blocks ``first`` … ``last - 1`` of the model.
        dtype: of hidden states on the wire.
        shape: b and S.
        mask: bool [b, N], which of the columns, those of a session's past included, hold tokens; ``None`` where all do.
        positions: int64 [b, S] or [1, S]; ``None`` for 0, 1, …
        prompts: deep prompts of these blocks.
        starts: int32 [b], the column of each row at which they begin; ``None`` for 0.
        mode: ``"overwrite"`` or ``"add"``.
        shared: prompt rows that every row attends to, as if they stood before its first token; ``mask`` is then
            [b, m + S], and the first m columns are theirs.
        differentiable: whether a gradient of the hidden states is wanted, and not only of prompts.
        identity: what the server is taken to serve; ``None`` for whatever it does.
    """

    first: int
    last: int
    dtype: str
    shape: tuple[int, int]
    mask: np.ndarray | None = None
    positions: np.ndarray | None = None
    prompts: Prompts | None = None
    starts: np.ndarray | None = None
    mode: str = "overwrite"
    shared: Shared | None = None
    differentiable: bool = True
    identity: str | None = None

    def check(self, first: int, last: int, seen: int = 0) -> None:
        """Raises `ValueError` where this is no request for a server of blocks ``first`` … ``last - 1``.

        ``seen``: how many columns its session has had.
        """
        if not (_is_count(self.first) and _is_count(self.last) and first <= self.first < self.last <= last):
            raise ValueError(f"blocks: expected a range within {first} to {last}, got {self.first!r} to {self.last!r}")
        if self.dtype not in _ARRAYS:
            raise ValueError(f"dtype: expected one of {', '.join(_ARRAYS)}, got {self.dtype!r}")
        if not (isinstance(self.shape, tuple) and len(self.shape) == 2 and all(map(_is_count, self.shape))):
            raise ValueError(f"shape: expected (b, S), got {self.shape!r}")
        if self.mode not in ("overwrite", "add"):
            raise ValueError(f"mode: expected 'overwrite' or 'add', got {self.mode!r}")
        if not isinstance(self.differentiable, bool):
            raise ValueError(f"differentiable: expected True or False, got {self.differentiable!r}")
        rows, length = self.shape
        if min(self.shape) < 1:
            raise ValueError(f"shape: expected at least one row and one column, got {self.shape!r}")
        if self.mask is not None and self.shared is None:
            _check_array("mask", self.mask, np.bool_, (rows, seen + length))
        if self.positions is not None:
            one = np.shape(self.positions)[:1] == (1,)
            _check_array("positions", self.positions, np.int64, (1 if one else rows, length))
        if self.shared is not None:
            if type(self.shared) is not Shared:
                raise ValueError(f"shared: expected Shared, got {type(self.shared).__name__}")
            self._check_shared(self.shared)
        if self.prompts is None:
            return
        if type(self.prompts) is not Prompts:
            raise ValueError(f"prompts: expected Prompts, got {type(self.prompts).__name__}")
        count = self.prompts.count
        if not _is_count(count) or not 1 <= count <= length:
            raise ValueError(f"prompts: expected 1 to {length} rows, got {count!r}")
        if self.starts is not None:
            _check_array("starts", self.starts, np.int32, (rows,))
            if self.starts.min() < 0 or self.starts.max() > length - count:
                raise ValueError(
                    f"starts: expected columns 0 to {length - count}, got {self.starts.min()} to {self.starts.max()}"
                )

    def _check_shared(self, shared: Shared) -> None:
        shared.check(self.first, self.last)
        rows = shared.request
        if (rows.first, rows.last) != (self.first, self.last):
            raise ValueError(
                f"shared: expected rows for blocks {self.first} to {self.last - 1}, got some for {rows.first} to "
                f"{rows.last - 1}"
            )
        if self.prompts is not None:
            raise ValueError("prompts: expected in the request of the shared rows, got some beside it")
        _check_array("mask", self.mask, np.bool_, (self.shape[0], rows.shape[1] + self.shape[1]))


def check_shapes(hidden: Tensor, prompts: Tensor | None, shared: Tensor | None, blocks: int) -> None:
    """Raises `ValueError` for what is not [b, S, d], [``blocks``, m, d] and [1, m, d]."""
    if hidden.dim() != 3 or 0 in hidden.shape:
        raise ValueError(f"hidden: expected [b, S, d], all above 0, got shape {tuple(hidden.shape)}")
    for name, rows, first in (("prompts", prompts, blocks), ("shared", shared, 1)):
        if rows is None:
            continue
        if rows.dim() != 3 or 0 in rows.shape or (rows.shape[0], rows.shape[2]) != (first, hidden.shape[2]):
            raise ValueError(
                f"{name}: expected [{first}, m, {hidden.shape[2]}], m above 0, got shape {tuple(rows.shape)}"
            )


def to_array(tensor: Tensor, dtype: str) -> np.ndarray:
    """A copy of ``tensor`` in ``dtype``, on the CPU: what may be sent again must not change with it."""
    tensor = tensor.detach().to("cpu", _ARRAYS[dtype][0], copy=True, memory_format=torch.contiguous_format)
    return tensor.view(torch.uint16).numpy() if dtype == "bfloat16" else tensor.numpy()


def to_tensor(name: str, array: Any, dtype: str, shape: Sequence[int]) -> Tensor:
    """A copy of what `to_array` made. Raises `ValueError` where it is not of ``dtype`` and ``shape``."""
    kind, stored = _ARRAYS[dtype]
    _check_array(name, array, stored, shape)
    tensor = torch.from_numpy(array.copy())  # what Ray hands over may not be written to
    return tensor.view(kind)


def name_of(dtype: torch.dtype) -> str:
    """Raises `ValueError` for a dtype that does not travel."""
    name = str(dtype).removeprefix("torch.")
    if name not in _ARRAYS:
        raise ValueError(f"dtype: expected one of {', '.join(_ARRAYS)}, got {name}")
    return name


def geometry(mask: Tensor | None, positions: Tensor | None, starts: Tensor | None) -> dict[str, Any]:
    """Copies, as a `Request` has them."""
    arrays = {"mask": (mask, torch.bool), "positions": (positions, torch.long), "starts": (starts, torch.int32)}
    return {
        name: None if value is None else value.detach().to("cpu", dtype, copy=True).numpy()
        for name, (value, dtype) in arrays.items()
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_array(name: str, array: Any, dtype: Any, shape: Sequence[int]) -> None:
    if type(array) is not np.ndarray:
        raise ValueError(f"{name}: expected an array of shape {tuple(shape)}, got {type(array).__name__}")
    if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(
            f"{name}: expected {np.dtype(dtype)} of shape {tuple(shape)}, got {array.dtype} of shape {array.shape}"
        )
