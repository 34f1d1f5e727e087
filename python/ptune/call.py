"""One call of a body that bears prompts: what its hooks, masks and recomputations need to know of it.

It travels in a thread-local, never on modules.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ptune_kernels import Placement

from .layout import Layout


@dataclass
class Call:
    """A running call.

    Attributes:
        layout: where prompts stand.
        length: columns of text, n; 0 while a prefix is captured.
        placement: for the ops on ``[prompt ; text]``.
        as_tuple: whether the caller wants a tuple.
        capture: what takes the keys and values of prompt rows that run alone.
        prefix: whether the prompt is a prefix, of text that is run alone.
        injected: how many rows of a prefix the attention functions prepend; 0 where none do.
        padded: whether there is padding among the injected call's text.
        columns: [b, m + n], the column of ``[pad ; prompt ; text]`` of each key in ``[prefix ; text]``, where these
            differ.
        packed: what takes prompt rows and text apart, where they run as one sequence.
        cache: the cache that the caller gave, where a `PrefixedCache` stands in for it.
        depth: how many blocks have had their deep prompts.
        body: whose call it is; ``None`` of blocks on a server.
        outer: what ran when it began, such as a call of another model, a hook of which this is.
    """

    layout: Layout
    length: int
    placement: Placement | None = None
    as_tuple: bool = False
    capture: Any = None
    prefix: bool = False
    injected: int = 0
    padded: bool = False
    columns: Tensor | None = None
    packed: Any = None
    cache: Any = None
    depth: int = 0
    body: Any = None
    outer: "Call | Bare | None" = None


@dataclass
class Bare:
    """A running call of a body without prompts, or behind prompts in a cache."""

    body: Any
    outer: "Call | Bare | None"


# Not a subclass with defaults: torch.compile reads those where an instance has its own.
_thread = threading.local()


def running() -> Call | Bare | None:
    return getattr(_thread, "call", None)


def current_call() -> Call | None:
    return call if isinstance(call := running(), Call) else None


def set_call(call: Call | Bare | None) -> None:
    _thread.call = call


class CheckpointWithCall:
    """A checkpoint function under which a block's recomputation sees the call that it first ran in.

    Whether a block's hooks lie inside the recomputed region differs between versions of transformers. What is captured
    of a prefix is not recomputed.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (call := current_call()) is not None:
            if call.capture is not None:
                return function(*args)
            function = partial(_run_in, call, call.depth, function)
        return self.checkpoint(function, *args, **kwargs)


def _run_in(call: Call, depth: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    outer, inner = running(), replace(call, depth=depth)
    set_call(inner)
    try:
        return function(*args, **kwargs)
    finally:
        call.depth = max(call.depth, inner.depth)
        set_call(outer)
