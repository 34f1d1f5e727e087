"""The prompts of a batch whose rows have prompts of their own."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ptune_kernels import Placement


@dataclass
class Overwriting:
    """Pools of deep prompts, one for each block, and the rows of a batch that they are set over, or added to.

    Attributes:
        mode: ``"overwrite"`` or ``"add"``.
        pools: [M, d] for each block.
        start, length: int32 [b]; a length of 0 in rows without such prompts.
    """

    mode: str
    pools: Sequence[Tensor]
    start: Tensor
    length: Tensor


@dataclass
class Mixture:
    """Which rows of a pool of prompts each row of a batch has: ``start[i] : start[i] + length[i]``.

    Attributes:
        start, length: int32 [b].
        max_length: the greatest length.
        prefix: the pool, as keys and values; ``None`` where prompt rows run with the text.
        prompts: the pool, as float32 rows [M, d] before the first block, where they do.
        deep: what is done to these at the blocks.
    """

    start: Tensor
    length: Tensor
    max_length: int
    prefix: Any = None
    prompts: Any = None
    deep: Sequence[Overwriting] = ()

    def expanded(self, batch_size: int) -> "Mixture":
        """For a batch in which each row was repeated, as beam search does."""
        times, rest = divmod(batch_size, self.start.shape[0])
        if rest:
            raise ValueError(f"input_ids: expected a multiple of {self.start.shape[0]} rows, got {batch_size}")
        if times == 1:
            return self
        deep = [_repeated(each, times) for each in self.deep]
        return replace(_repeated(self, times), deep=deep)

    def place_over(self, deep: Overwriting, column: Tensor) -> Placement:
        """Where ``deep`` stands among prompts that `prepend` set before ``column`` [b] of the text."""
        return Placement(deep.start, deep.length, column + self.max_length - self.length, self.max_length)


def _repeated(part: Any, times: int) -> Any:
    start, length = (rows.repeat_interleave(times) for rows in (part.start, part.length))
    return replace(part, start=start, length=length)


_thread = threading.local()


def current_mixture(model: Any) -> Mixture | None:
    """The prompts that ``model`` has for now in place of its own."""
    owner, mixture = getattr(_thread, "mixing", (None, None))
    return mixture if owner is model else None


@contextmanager
def mixing(model: Any, mixture: Mixture) -> Iterator[None]:
    """Within it, calls of ``model`` by this thread bear the prompts of ``mixture`` in place of its own."""
    outer, _thread.mixing = getattr(_thread, "mixing", (None, None)), (model, mixture)
    try:
        yield
    finally:
        _thread.mixing = outer
