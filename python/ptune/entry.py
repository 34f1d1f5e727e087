"""What a `PromptBank` holds: prompts with their heads, and those in use compiled to keys and values."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .attention import Prefix
from .cache import prefix_in
from .config import PTuneConfig
from .heads import Head
from .watched import Watched


@dataclass(eq=False)
class Entry:
    """A prompt of a bank, or a head alone: float32, on the CPU unless it trains, with what its folder says."""

    head: Head
    settings: PTuneConfig
    saved: dict[str, Any]
    prompts: Any = None  # [m, d]; None where a compiled prefix was loaded
    deep: Any = None  # [L·m, d], or None
    compiled: Sequence[Tensor] = ()
    shared: bool = False
    trains: bool = False
    removed: bool = False

    @property
    def count(self) -> int:
        """How many prompt rows stand before the text."""
        return self.settings.pre_seq_len

    @property
    def deep_mode(self) -> str | None:
        """What its deep prompts do at the blocks; ``None`` without such."""
        return self.settings.deep_prompt_mode if self.settings.deep else None

    @property
    def tables(self) -> dict[str, Any]:
        """Its rows, or keys and values, by the names that a folder has."""
        names = checkpoint.compiled_names(self.settings, self.saved["num_layers"])
        tables = zip((*checkpoint.PROMPTS, *names), (self.prompts, self.deep, *self.compiled), strict=False)
        return {name: its for name, its in tables if its is not None}


class CompiledEntries:
    """The keys and values of prompts, compiled on ``runner`` when first used; the least recently used make room.

    Attributes:
        kept: those of now, the longest unused first.
        nbytes: how much memory they take.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.nbytes = 0
        self.kept: OrderedDict[Entry, Prefix] = OrderedDict()
        self._base = self._watched()

    def prefix_of(self, entry: Entry, max_bytes: int | None) -> Prefix:
        """The keys and values of ``entry``; kept, if all that are kept can then be within ``max_bytes``.

        Those of before the base was changed in place are dropped.
        """
        if not self._base.is_still((), ()):
            for other in list(self.kept):
                self.drop(other)
            self._base = self._watched()
        if entry.trains:
            dtype = self.runner.get_input_embeddings().weight.dtype
            return prefix_in(dtype, entry.compiled) if entry.compiled else self._capture(entry)
        if entry in self.kept:
            self.kept.move_to_end(entry)
            return self.kept[entry]
        prefix = self._compile(entry)
        if not entry.removed and (max_bytes is None or prefix.nbytes <= max_bytes):
            self.kept[entry] = prefix
            self.nbytes += prefix.nbytes
            while max_bytes is not None and self.nbytes > max_bytes:
                self.drop(next(iter(self.kept)))
        return prefix

    def drop(self, entry: Entry) -> None:
        """Keep nothing of ``entry``."""
        if (prefix := self.kept.pop(entry, None)) is not None:
            self.nbytes -= prefix.nbytes

    def _watched(self) -> Watched:
        return Watched((), (), self.runner._hooks.body)

    def _compile(self, entry: Entry) -> Prefix:
        weight = self.runner.get_input_embeddings().weight
        # neither inference tensors nor rounded by autocast: they are kept for calls of any kind
        exact = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), exact:
            if entry.compiled:
                return Prefix.of([tensor.to(weight.device, weight.dtype, copy=True) for tensor in entry.compiled])
            # copies: a view would keep the queries with it
            views = self._capture(entry).tensors()
            return Prefix.of([view.clone(memory_format=torch.contiguous_format) for view in views])

    def _capture(self, entry: Entry) -> Prefix:
        return self.runner._hooks.prefix.capture(entry.prompts, entry.deep, entry.settings.deep_prompt_mode).prefix()
