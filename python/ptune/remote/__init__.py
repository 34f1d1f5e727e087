"""Blocks on other machines: a client holds embeddings, prompts and head, and Ray actors the frozen blocks.

A Ray cluster must be a trusted network: whoever can reach it can run code on its machines, and its members read what
clients send. What is checked here, sizes, dtypes and shapes, keeps out mistakes, and not an attacker.
"""

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError("ptune.remote needs Ray: pip install 'ptune-kernels[remote]'") from error

from .link import Link
from .model import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    AutoDistributedModelForTokenClassification,
    distributed_class,
)
from .relay import RemoteError, Retries
from .sequential import RemoteSequential
from .serve import ServeConfig, Servers, connect, join, serve_blocks, status
from .server import BlockServer, ServerLimits
from .session import InferenceSession

__all__ = [
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedModelForTokenClassification",
    "BlockServer",
    "InferenceSession",
    "Link",
    "RemoteError",
    "RemoteSequential",
    "Retries",
    "ServeConfig",
    "ServerLimits",
    "Servers",
    "connect",
    "distributed_class",
    "join",
    "serve_blocks",
    "status",
]
