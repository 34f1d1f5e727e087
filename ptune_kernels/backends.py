"""Which implementation of the ops serves which device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native, reference, schema  # noqa: F401  (reference registers itself)


class Ops:
    """The ops of one backend, each bound once: looking one up in ``torch.ops`` on every call costs more than a small
    op."""

    def __init__(self, backend: str):
        self.backend = backend
        namespace = getattr(torch.ops, f"ptune_{backend}")
        vars(self).update({name: getattr(namespace, name).default for name in schema.SCHEMAS})

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


_ops = {backend: Ops(backend) for backend in schema.BACKENDS}
_serving: dict[str, Ops] = {}  # by device type, filled as devices are met
_forced: Ops | None = None


def ops_for(tensor: Tensor) -> Ops:
    """The ops that serve the device of ``tensor``."""
    # to ask a tensor for its device takes a tenth of the time of a small op
    try:
        return _forced or _serving_type("cpu" if tensor.is_cpu else tensor.device.type)
    except AttributeError:
        raise TypeError(f"expected a tensor, got {type(tensor).__name__}") from None


def _serving_type(device_type: str) -> Ops:
    return _serving.get(device_type) or _serving.setdefault(device_type, _ops[_ready(_default_backend(device_type))])


def backend_for(device: torch.device | str) -> str:
    """The name of the backend that serves ``device``: native where its library holds code for it; else a GPU → Triton;
    else reference."""
    return (_forced or _serving_type(torch.device(device).type)).backend


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Within the block, for the whole process, every op runs on ``backend``; ``None`` is the default choice again."""
    global _forced
    if backend is not None and backend not in schema.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(schema.BACKENDS)} or None, got {backend!r}")
    before = _forced
    _forced = None if backend is None else _ops[_ready(backend)]
    try:
        yield
    finally:
        _forced = before


def _default_backend(device_type: str) -> str:
    if native.loaded(device_type) and (device_type != "cuda" or native.hindrance() is None):
        return "native"
    return "triton" if device_type == "cuda" and find_spec("triton") else "reference"


def _ready(backend: str) -> str:
    """``backend``, once its ops are registered."""
    if backend == "triton":
        if not find_spec("triton"):
            raise RuntimeError("the triton backend needs the triton package: pip install triton")
        from . import triton_kernels  # noqa: F401  (registers itself; importing triton takes a second)
    if backend == "native" and not native.libraries:
        raise RuntimeError("the native backend needs the compiled libraries: this installation has none")
    return backend
