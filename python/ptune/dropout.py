"""The frozen base's dropout, turned off without touching ``training`` (gradient checkpointing reads that)."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Modules keep probabilities of their own under such names: attention_dropout, attn_pdrop, layerdrop, drop_prob.
_MARK = "drop"


class FrozenDropout:
    """Every dropout probability of ``body``, as found; `freeze` makes them 0 and `restore` brings them back."""

    def __init__(self, body: nn.Module) -> None:
        self._found = list(_probabilities(body))

    def freeze(self) -> None:
        for owner, name, _ in self._found:
            setattr(owner, name, 0.0)

    def restore(self) -> None:
        for owner, name, value in self._found:
            setattr(owner, name, value)


def _probabilities(body: nn.Module) -> Iterator[tuple[Any, str, float]]:
    configs: dict[int, Any] = {}
    for module in body.modules():
        if isinstance(module, _DropoutNd):
            yield module, "p", module.p
            continue
        # GPT-J, Falcon and others read theirs from the config at every call
        if (config := getattr(module, "config", None)) is not None:
            configs[id(config)] = config
        yield from _named(module)
    for config in configs.values():
        yield from _named(config)


def _named(owner: Any) -> Iterator[tuple[Any, str, float]]:
    for name, value in vars(owner).items():
        if _MARK in name and isinstance(value, float):
            yield owner, name, value
