"""Ways to run a model that fails in half precision, from the cheapest on; the audit sees which of them works."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..half_attention import hybrid
from .casts import loaded_in, running_in
from .damage import POOLING, Outputs
from .sites import Site

SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Candidate:
    """A way to run a model.

    Attributes:
        name: what reports call it.
        how: the code that does it for good, to a ``model`` that was loaded in float32.
        applied: returns a context within which the model runs so.
    """

    name: str
    how: str
    applied: Callable[[], AbstractContextManager[Any]]


def whole(outputs: Outputs) -> list[Candidate]:
    """The four that every audit tries: all in half precision, or attention alone."""
    halves = [
        Candidate(SHORT[dtype], _code("model", dtype), lambda dtype=dtype: loaded_in(outputs, dtype))  # type: ignore[misc]
        for dtype in SHORT
    ]
    return [*halves, *(_hybrid(outputs, dtype) for dtype in SHORT)]


def repairs(outputs: Outputs, sites: Sequence[Site], dtype: torch.dtype) -> Iterator[Candidate]:
    """What may mend a model that fails in ``dtype``, wherever it does."""
    poolings = [site.name for site in sites if site.kind == "pooling"]
    norms = [site.name for site in sites if site.kind == "norm"]
    if poolings:
        yield _kept("fp32 pooling", outputs, poolings, dtype)
    if norms:
        yield _kept("fp32 pooling and norms" if poolings else "fp32 norms", outputs, poolings + norms, dtype)
    if dtype == torch.float16:
        how = _code(f"ptune.hybrid(model, attn_dtype={torch.bfloat16})", dtype)
        yield Candidate("bf16 attention", how, lambda: _half_attention(outputs, torch.bfloat16, dtype))
    yield from (_hybrid(outputs, other) for other in sorted(SHORT, key=lambda other: other != dtype))


def layers(outputs: Outputs, faulty: Sequence[Site], dtype: torch.dtype) -> Iterator[Candidate]:
    """The ``faulty`` sites' modules in float32; then what is around these, as values overflow at their borders too."""
    names: list[str] = []
    height = 0
    while (around := _outermost(_around(outputs, site, height) for site in faulty)) != names:
        names, height = around, height + 1
        title = ", ".join(names) if len(names) <= 2 else f"{len(names)} modules"
        yield _kept(f"fp32 {title}", outputs, names, dtype)


def _hybrid(outputs: Outputs, dtype: torch.dtype) -> Candidate:
    how = f"ptune.hybrid(model, attn_dtype={dtype})"
    return Candidate(f"hybrid-{SHORT[dtype]}", how, lambda: _half_attention(outputs, dtype))


@contextmanager
def _half_attention(outputs: Outputs, dtype: torch.dtype, rest: torch.dtype | None = None) -> Iterator[None]:
    """Within it, attention is in ``dtype``, and all else in ``rest`` (float32)."""
    model: Any = next((m for m in outputs.modules() if isinstance(m, PreTrainedModel)), outputs.model)
    hybrid(model, attn_dtype=dtype)
    try:
        with ExitStack() as stack:
            if rest is not None:
                stack.enter_context(loaded_in(outputs, rest))
            yield
    finally:
        hybrid(model, attn_dtype=None)


def _kept(name: str, outputs: Outputs, names: Sequence[str], dtype: torch.dtype) -> Candidate:
    """``names`` in float32, and all else in ``dtype``."""
    modules = [_module(outputs, name) for name in names]
    own = [name for name in names if _module(outputs, name) is not outputs.pooling]
    how = _code(f"ptune.precision.keep_fp32(model, {own})" if own else "model", dtype)
    if len(own) < len(names):
        how += ", and pooling(states.float(), mask)"

    @contextmanager
    def applied() -> Iterator[None]:
        with loaded_in(outputs, dtype, modules), running_in(modules, torch.float32, around=dtype):
            yield

    return Candidate(name, how, applied)


def _code(model: str, dtype: torch.dtype) -> str:
    return f"ptune.precision.to_half({model}, {dtype})"


def _module(outputs: Outputs, name: str) -> nn.Module:
    """By the name that a site has: the model's own, or that of the pooling on top of it."""
    return outputs.pooling if name == POOLING else outputs.model.get_submodule(name)


def _around(outputs: Outputs, site: Site, height: int) -> str:
    """The name of what holds a site's module, ``height`` modules further out; at most its block."""
    name = site.name
    for _ in range(height):
        if site.block is None or name == site.block:
            break
        name = name.rpartition(".")[0]
        while isinstance(outputs.model.get_submodule(name), nn.ModuleList):  # it has no forward
            name = name.rpartition(".")[0]
    return name


def _outermost(names: Iterator[str]) -> list[str]:
    """``names`` once each, without those that are inside another."""
    once = list(dict.fromkeys(names))
    return [name for name in once if not any(name.startswith(f"{other}.") for other in once)]
