"""One call of a body that bears prompts: what its hooks, masks and recomputations need to know of it.

It travels in a thread-local, never on modules.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
        begun: of a capture: whether the body's pre-hook has let it pass.
        prefix: whether the prompt is a prefix, of text that is run alone.
        injected: how many rows of a prefix the attention functions prepend; 0 where none do.
        padded: whether there is padding among the injected call's text.
        columns: [b, m + n], the column of ``[pad ; prompt ; text]`` of each key in ``[prefix ; text]``, where these
            differ.
        packed: what takes prompt rows and text apart, where they run as one sequence.
        cache: the cache that the caller gave, where a `PrefixedCache` stands in for it.
        depth: how many blocks have had their deep prompts.
        deep: those of each block, once the first has had its own; empty where checkpoints run blocks again.
        recomputed: whether they do.
        body: whose call it is; ``None`` of blocks on a server.
        outer: the call that was running when this one began, such as that of another model whose hook made this call.
    """

    layout: Layout
    length: int
    placement: Placement | None = None
    as_tuple: bool = False
    capture: Any = None
    begun: bool = False
    prefix: bool = False
    injected: int = 0
    padded: bool = False
    columns: Tensor | None = None
    packed: Any = None
    cache: Any = None
    depth: int = 0
    deep: tuple[Tensor, ...] = ()
    recomputed: bool = False
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


def call_of(body: nn.Module) -> Call | Bare | None:
    """The innermost call of ``body``, below what an interrupted call may have left."""
    call = running()
    while call is not None and call.body is not body:
        call = call.outer
    return call


def end_call(call: Call | Bare) -> None:
    set_call(call.outer)
    call.outer = None  # a checkpoint may keep the call, and need not keep that one too


def still_running(body: nn.Module | None = None) -> Call | Bare | None:
    """The innermost call, at the beginning of one of ``body``, without those that were interrupted.

    Hooks do not see a KeyboardInterrupt. What it leaves behind is told by the stack, which is read where anything is
    left, or where a hook calls another model.
    """
    call = running()
    if call is None:
        return None
    if torch.compiler.is_compiling():  # no stack to be read
        while call is not None and call.body is body:
            call = call.outer
        return call
    frames: Counter[int] = Counter()
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            frames[id(frame.f_locals["self"])] += 1
        elif frame.f_code is _run_in.__code__:
            frames[id(frame.f_locals["call"].body)] += 1
        frame = frame.f_back
    frames[id(body)] -= 1
    found = []
    while call is not None:
        found.append(call)
        call = call.outer
    for each in reversed(found):  # the outer ones first: of two calls of one body, the later was interrupted
        if each.body is None or frames[id(each.body)] > 0:
            frames[id(each.body)] -= 1
            each.outer, call = call, each
    return call


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
