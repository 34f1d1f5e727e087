"""A client's side of the servers of one model: which there are, what it has sent them, how many bytes travelled."""

import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
        self.causal = all(state["causal"] for state in states)
        self.client = uuid.uuid4().hex
        self.traffic: Counter[str] = Counter()
        self._sent: dict[tuple[int, int], tuple[Tensor, Prompts]] = {}

    def __len__(self) -> int:
        return self.spans[-1].last

    def legs(self, first: int, last: int) -> list[Leg]:
        """The way through blocks ``first`` … ``last - 1``."""
        return [
            Leg(span, max(first, span.first), min(last, span.last))
            for span in self.spans
            if span.first < last and first < span.last
        ]

    def prompts(self, first: int, last: int, rows: Tensor) -> Prompts:
        """Deep prompts [blocks, m, d] of blocks ``first`` … ``last - 1``, put into the object store if they changed."""
        rows = rows.detach().float().cpu()
        kept, sent = self._sent.get((first, last), (None, None))
        if sent is not None and kept is not None and torch.equal(kept, rows):
            return sent
        version = 0 if sent is None else sent.version + 1
        array = to_array(rows.clone(), "float32")
        self.traffic["prompts"] += array.nbytes
        prompts = Prompts(self.client, version, rows.shape[1], [ray.put(array)])
        self._sent[first, last] = torch.from_numpy(array), prompts
        return prompts


def call(server: Any, method: str, returns: int, *args: Any) -> list[Any]:
    """Ask an actor; references to what it returns."""
    return getattr(server, method).options(num_returns=returns).remote(*args)
