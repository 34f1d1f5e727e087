"""A client's side of the servers of one model: which there are, what it has sent them, how many bytes travelled."""

import itertools
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from .relay import Leg, Replicas, Retries
from .wire import Prompts, to_array


class Link:
    """What the `RemoteSequential`s of one client share.

    Attributes:
        spans: the servers of all blocks, in order.
        max_tokens: b · S of a request that all of them take.
        fingerprint: of the config of the model that they serve (`ptune.checkpoint`).
        dtype: in which they compute; the least precise where they differ.
        unshared: why they do not run prompt rows once for a batch; ``None`` where they do.
        causal: whether their blocks read text from left to right.
        weights: a few numbers of the first and the last block (see `ptune.likeness`).
        traffic: bytes of arrays, by what they were: ``"hidden"``, ``"gradients"``, ``"prompts"`` and ``"prompt
            gradients"`` between client and servers, and each of them with ``" between servers"``.
    """

    def __init__(self, spans: Sequence[Replicas], retries: Retries, states: Sequence[dict[str, Any]]) -> None:
        self.spans = list(spans)
        self.retries = retries
        self.max_tokens = min(state["max_tokens"] for state in states)
        self.fingerprint = states[0]["fingerprint"]
        dtypes = [getattr(torch, state["dtype"]) for state in states]
        self.dtype: torch.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.unshared = next((state["unshared"] for state in states if state["unshared"] is not None), None)
        self.weights: list[str] = [states[0]["weights"][0], states[-1]["weights"][1]]
        self.causal = all(state["causal"] for state in states)
        self.client = uuid.uuid4().hex
        self.traffic: Counter[str] = Counter()
        self._versions = itertools.count()  # no two threads get the same
        self._sent: dict[tuple[int, int], tuple[np.ndarray, Prompts]] = {}

    def __len__(self) -> int:
        return self.spans[-1].last

    def __deepcopy__(self, memo: Any) -> "Link":
        return self  # a copy would count versions of prompts that servers take for this one's

    def __reduce__(self) -> Any:
        raise TypeError("a model whose blocks are on servers cannot be pickled; save_prompts writes what is here")

    def legs(self, first: int, last: int) -> list[Leg]:
        """The way through blocks ``first`` … ``last - 1``."""
        return [
            Leg(span, max(first, span.first), min(last, span.last))
            for span in self.spans
            if span.first < last and first < span.last
        ]

    def prompts(self, legs: Sequence[Leg], prompts: Tensor | None) -> list[Prompts | None]:
        """Each leg's part of deep prompts [blocks, m, d], put into the object store if it changed."""
        if prompts is None:
            return [None] * len(legs)
        first = legs[0].first
        return [self._prompts_of(leg, prompts[leg.first - first : leg.last - first]) for leg in legs]

    def count(self, name: str, here: int, between: int = 0) -> None:
        """Note bytes that travelled between client and servers, and ``between`` servers."""
        self.traffic[name] += here
        if between:
            self.traffic[f"{name} between servers"] += between

    def _prompts_of(self, leg: Leg, rows: Tensor) -> Prompts:
        array = to_array(rows, "float32")
        kept, sent = self._sent.get((leg.first, leg.last), (None, None))
        if sent is None or kept is None or not np.array_equal(kept, array):
            self.count("prompts", array.nbytes)
            sent = Prompts(self.client, next(self._versions), array.shape[1], [ray.put(array)])
            self._sent[leg.first, leg.last] = array, sent
        return sent


def call(server: Any, method: str, returns: int, *args: Any) -> list[Any]:
    """Ask an actor; references to what it returns."""
    return getattr(server, method).options(num_returns=returns).remote(*args)


def tell(server: Any, method: str, name: str) -> None:
    """Ask an actor for nothing in return, if it is still there: its cluster may have been left for another."""
    if ray.is_initialized():
        with suppress(Exception):
            getattr(server, method).remote(name)
