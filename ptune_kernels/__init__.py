"""Fused ops for soft prompts: cast, expand and concatenate, or overwrite, each in one launch and differentiable."""

from .backends import backend_for, use_backend
from .functional import (
    Placement,
    cast_qkv,
    embed_and_prepend,
    overwrite,
    overwrite_,
    part_qkv,
    prepend,
    prepend_kv,
    spread_kv,
    strip,
)
from .version import __version__

__all__ = [
    "Placement",
    "__version__",
    "backend_for",
    "cast_qkv",
    "embed_and_prepend",
    "overwrite",
    "overwrite_",
    "part_qkv",
    "prepend",
    "prepend_kv",
    "spread_kv",
    "strip",
    "use_backend",
]
