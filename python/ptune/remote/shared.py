"""The prompt rows of one step: they pass the blocks once for all rows of the batch, and their gradients once back."""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from .link import Link, call, tell
from .relay import Leg, Relay, way_back
from .wire import Prompts, Request, Shared, to_array, to_tensor


class SharedRows:
    """``rows`` [1, m, d] on their way through ``legs``, whose servers keep the keys and values that they make of them.

    Args:
        prompts: deep prompts of each leg's blocks, or ``None``.
        mode: what these do to the rows.

    Attributes:
        relay: what waits for the servers, and goes on at others.
    """

    def __init__(
        self, link: Link, legs: Sequence[Leg], rows: Tensor, prompts: Sequence[Prompts | None], mode: str
    ) -> None:
        self.link, self.legs = link, legs
        # as precise as their gradients, whatever travels beside them
        self.dtype = "float64" if rows.dtype == torch.float64 else "float32"
        self.shape = rows.shape
        self._array = to_array(rows, self.dtype)
        self._name = uuid.uuid4().hex
        self._requests = {
            leg.first: Request(
                leg.first,
                leg.last,
                self.dtype,
                (1, rows.shape[1]),
                prompts=prompt,
                mode=mode,
                identity=leg.replicas.identity,
            )
            for leg, prompt in zip(legs, prompts, strict=True)
        }
        self._holders: list[Any] = []
        self.relay = Relay(legs, link.retries, lambda: ray.put(self._array), self._send)
        link.count("prompts", self._array.nbytes, self._array.nbytes * (len(legs) - 1))

    def for_request(self, leg: Leg) -> Shared:
        """What a request to ``leg``'s server has of the rows."""
        return self._shared(leg, self.relay.given_to(leg))

    def again(self) -> None:
        """Make anew what each leg was given."""
        self.relay.begin_again()
        self.relay.settle()

    def backward(self, parts: Callable[[Leg], list[Any]], makers: Sequence[Relay]) -> tuple[Tensor, Tensor | None]:
        """Gradients of the rows [1, m, d], and of all deep prompts [blocks, m, d].

        ``parts``: references to the gradients of a leg's keys and values, which ``makers`` have made.
        """

        def send(leg: Leg, gradient: Any) -> list[Any]:
            return call(leg.server, "backward_shared", 3, self.for_request(leg), gradient, parts(leg))

        def lost() -> None:
            self.again()
            for maker in makers:
                maker.begin_again()
                maker.settle()

        own, *of_legs = Relay(way_back(self.legs), self.link.retries, lambda: None, send, lost).wait()
        deep = deep_gradient(of_legs)
        here = own.nbytes + (0 if deep is None else deep.nbytes)
        self.link.count("prompt gradients", here, own.nbytes * (len(self.legs) - 1))
        return to_tensor("gradient", own, self.dtype, self.shape), deep

    def release(self) -> None:
        """Let go of what stands between the servers, and of what they keep."""
        self.forget()
        del self.relay  # which holds this in turn

    def forget(self) -> None:
        """Let the servers forget keys and values; they make them again if they must."""
        for server in self._holders:
            tell(server, "forget", self._name)
        self._holders.clear()

    def _send(self, leg: Leg, rows: Any) -> list[Any]:
        return call(leg.server, "share", 2, self._shared(leg, rows), rows)

    def _shared(self, leg: Leg, rows: Any) -> Shared:
        if leg.server not in self._holders:
            self._holders.append(leg.server)
        return Shared(self._name, self._requests[leg.first], [rows])


def deep_gradient(of_legs: Sequence[np.ndarray | None]) -> Tensor | None:
    """Of all deep prompts [blocks, m, d], from what legs return on the way back; ``None`` where there are none."""
    parts = [torch.from_numpy(rows.copy()) for rows in reversed(of_legs) if rows is not None]
    return torch.cat(parts) if parts else None
