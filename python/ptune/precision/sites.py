"""Where a float32 model's activations can lose precision, found by its structure, each rounded alone.

A site is a tensor at an attention function (query, key, value, its output), the state that a block hands on
(residual), or a module with weights, which is then run in the low precision by itself: inputs, weights and arithmetic.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..anatomy import find_body
from ..attention import eager_of
from .casts import BORDERED, rounded, running_in

QKV = ("query", "key", "value")
ATTENTION = (*QKV, "attention output")
KINDS = (*ATTENTION, "projection", "mlp in", "mlp out", "norm", "residual", "embedding", "pooling", "head")


@dataclass(frozen=True)
class Site:
    """A place where precision can be lost.

    Attributes:
        kind: one of `KINDS`. "mlp out" is what writes to the width of the blocks' state, "mlp in" the rest of an MLP;
            "projection" is what an attention has beside its function.
        layer: the number of the block that it is in, if any.
        block: the name of that block.
        name: its module's, in the model.
    """

    kind: str
    layer: int | None
    block: str | None
    name: str
    module: nn.Module

    def rounded(self, model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Within it, this place alone is in ``dtype``, and all else of ``model`` as before."""
        if self.kind in ATTENTION:
            return attention_calls(model, partial(_round_one, self, dtype))
        if self.kind == "residual":
            return _output_rounded(self.module, dtype)
        return running_in([self.module], dtype, around=torch.float32)


@contextmanager
def attention_calls(model: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within it, attentions of ``model`` call ``function(stock, module, query, key, value, mask, **kwargs)``.

    ``stock`` is the attention function that the model is set to. Other models' attentions pass by. Several may be
    entered at a time, and left in any order: models are watched by threads.
    """
    listener = {id(module) for module in model.modules()}, function
    names = {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)} - {None}
    with _lock:
        for name in names:
            if name not in _listeners:
                _overrides[name] = _pop_override(name)
                stock = _overrides[name] or ALL_ATTENTION_FUNCTIONS.get(name)
                ALL_ATTENTION_FUNCTIONS[name] = partial(_call, name, stock)
            _listeners[name] = (*_listeners.get(name, ()), listener)
    try:
        yield
    finally:
        with _lock:
            for name in names:
                _listeners[name] = tuple(other for other in _listeners[name] if other is not listener)
                if not _listeners[name]:
                    del _listeners[name], ALL_ATTENTION_FUNCTIONS[name]
                    if (override := _overrides.pop(name)) is not None:
                        ALL_ATTENTION_FUNCTIONS[name] = override


# By implementation: who listens to its calls, and what stood before the registered function, if anything did.
_listeners: dict[str, tuple[tuple[set[int], Callable[..., Any]], ...]] = {}
_overrides: dict[str, Any] = {}
_lock = threading.Lock()


def _call(name: str, stock: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    function = eager_of(module) if stock is None else stock
    for modules, listener in _listeners.get(name, ()):
        if id(module) in modules:
            function = partial(listener, function)
    return function(module, *args, **kwargs)


def _pop_override(name: str) -> Any:
    """Remove and return the function that stands before the one registered under ``name``, if there is one."""
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    try:
        del ALL_ATTENTION_FUNCTIONS[name]
    except KeyError:
        return None
    return found


def find_sites(model: nn.Module, run: Callable[[], Any]) -> list[Site]:
    """The sites of ``model`` that ``run()``, a call of it, passes, in the order in which it does."""
    parts = Parts(model)
    passed: dict[tuple[nn.Module, str], None] = {}  # ordered
    widths: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        passed.setdefault((module, "output"))
        widths[module] = next((x.shape[-1] for x in tree_leaves(output) if isinstance(x, Tensor) and x.dim()), 0)

    def note_attention(stock: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        parts.attentions.add(module)
        for kind in ATTENTION:
            passed.setdefault((module, kind))
        return stock(module, *args, **kwargs)

    watched = [m for m in model.modules() if m in parts.blocks or m in parts.poolings or has_weights(m)]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        with attention_calls(model, note_attention):
            run()
    finally:
        for handle in handles:
            handle.remove()
    sites = []
    for module, what in passed:
        kind = what if what in ATTENTION else parts.kind(module, widths)
        if kind is not None and not parts.is_kept(module):
            block = parts.block(module)
            layer, name = (None, None) if block is None else (parts.blocks[block], parts.names[block])
            sites.append(Site(kind, layer, name, parts.names[module], module))
    return sites


def _flat(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The blocks of a list, or of lists in it (Funnel's)."""
    for block in blocks:
        yield from _flat(block) if isinstance(block, nn.ModuleList) else [block]


class Parts:
    """Which part of a model each module is."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.modules = {name: module for module, name in self.names.items()}
        self.blocks = {
            child: int(index)
            for module in model.modules()
            if isinstance(module, nn.ModuleList) and self._within(module, nn.ModuleList) is None
            for index, child in enumerate(_flat(module))
        }
        self.poolings = {m for m in self.names if "Pool" in type(m).__name__ and m is not model}
        self.kept = {module for module in self.names if hasattr(module, BORDERED)}
        body = next((m for m in self.names if isinstance(m, PreTrainedModel)), model)
        self.body = find_body(body) if isinstance(body, PreTrainedModel) else body
        self.attentions: set[nn.Module] = set()

    def kind(self, module: nn.Module, widths: dict[nn.Module, int]) -> str | None:
        """What kind of site a module with weights (or a block, or a pooling) is; ``None`` for a part of another."""
        if self._within(module, self.poolings) is not None:
            return None
        if module in self.poolings:
            return "pooling"
        if module in self.blocks:
            return "residual"
        if "Norm" in type(module).__name__:
            return "norm"
        block = self._within(module, self.blocks)
        if block is None:
            return "embedding" if self._within(module, {self.body}) is not None else "head"
        if self._is_of_attention(module, block):
            return "projection"
        return "mlp out" if widths[module] == widths[block] else "mlp in"

    def _is_of_attention(self, module: nn.Module, block: nn.Module) -> bool:
        # by name too: what BERT projects its output with is beside the module that calls the attention function
        around: nn.Module | None = module
        while around is not None and around is not block:
            if around in self.attentions or "Attention" in type(around).__name__:
                return True
            around = self._within(around, nn.Module)
        return False

    def block(self, module: nn.Module) -> nn.Module | None:
        """The block that ``module`` is, or is in."""
        return module if module in self.blocks else self._within(module, self.blocks)

    def is_kept(self, module: nn.Module) -> bool:
        """Whether ``module`` runs in float32 for good, by `keep_fp32`."""
        return hasattr(module, BORDERED) or self._within(module, self.kept) is not None

    def _within(self, module: nn.Module, found: Any) -> nn.Module | None:
        """The innermost module around ``module`` that is one of ``found``, or an instance of it."""
        name = self.names[module]
        while name:
            name = name.rpartition(".")[0]
            around = self.modules[name]
            if isinstance(around, found) if isinstance(found, type) else around in found:
                return around
        return None


def has_weights(module: nn.Module) -> bool:
    return any(parameter.is_floating_point() for parameter in module.parameters(recurse=False))


def _round_one(site: Site, dtype: torch.dtype, stock: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """An attention function whose query, key, value or output is rounded where ``module`` is the site's."""
    if module is not site.module:
        return stock(module, *args, **kwargs)
    if site.kind == "attention output":
        output, *rest = stock(module, *args, **kwargs)
        return rounded(output, dtype), *rest
    index = QKV.index(site.kind)
    return stock(module, *args[:index], rounded(args[index], dtype), *args[index + 1 :], **kwargs)


@contextmanager
def _output_rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, output: rounded(output, dtype))
    try:
        yield
    finally:
        handle.remove()
