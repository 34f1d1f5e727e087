"""`InferenceSession`: text that grows, whose keys and values servers keep, and whose history can make them again."""

import uuid
import weakref
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from .link import Link, call
from .relay import Leg, Relay
from .wire import Prompts, Request, TooLarge, geometry, name_of, to_array, to_tensor


class InferenceSession:
    """Made by `RemoteSequential.inference_session`; a context manager, which closes it.

    The client keeps what it has sent, as long as the session lives: where a server fails, another is given it again.

    Attributes:
        length: how many columns have been run.
    """

    def __init__(self, link: Link, first: int, last: int, wire_dtype: str | None, max_length: int | None) -> None:
        self.link = link
        self.legs = link.legs(first, last)
        self.first, self.last = first, last
        self.wire_dtype = wire_dtype
        self.max_length = max_length
        self._history: np.ndarray | None = None
        self._positions: np.ndarray | None = None
        self._prompts: dict[int, Prompts] = {}
        self._starts: np.ndarray | None = None
        self._mode = "overwrite"
        self._places: dict[int, tuple[Any, str]] = {}
        self._finalizer = weakref.finalize(self, _close, self._places)

    @property
    def length(self) -> int:
        return 0 if self._history is None else self._history.shape[1]

    def __enter__(self) -> "InferenceSession":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let the servers forget it."""
        self._finalizer()

    @torch.no_grad()
    def step(
        self,
        hidden: Tensor,
        prompts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        starts: Tensor | None = None,
        mode: str = "overwrite",
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run the next columns ``hidden`` [b, S, d]; returns their states, without gradients.

        ``attention_mask`` [b, N] covers all columns so far and these. ``rows`` [b]: which rows of the batch before are
        continued (beams). ``prompts``, ``starts`` and ``mode`` as in `RemoteSequential.forward`, in the first step
        alone. Raises as that does.
        """
        if not self._finalizer.alive:
            raise ValueError("session: expected an open one, got one that was closed")
        dtype = self.wire_dtype or name_of(hidden.dtype)
        seen, total = self.length, self.length + hidden.shape[1]
        if self.max_length is not None and total > self.max_length:
            raise ValueError(f"hidden: expected at most {self.max_length - seen} more columns, got {hidden.shape[1]}")
        if (tokens := hidden.shape[0] * total) > self.link.max_tokens:
            raise TooLarge(f"hidden: expected at most {self.link.max_tokens} tokens in all (max_tokens), got {tokens}")
        if prompts is not None and seen:
            raise ValueError("prompts: expected in the first step of a session alone")
        if prompts is not None:
            for leg in self.legs:
                part = prompts[leg.first - self.first : leg.last - self.first]
                self._prompts[leg.first] = self.link.prompts(leg.first, leg.last, part)
        arrays = geometry(attention_mask, position_ids, starts if prompts is not None else None)
        selected = None if rows is None else rows.detach().cpu().numpy()
        if selected is not None:
            self._select(selected)
        if not seen:
            self._starts, self._mode = arrays["starts"], mode
        array = to_array(hidden, dtype)
        sending = _Step(self, array, dtype, arrays, seen, selected)
        relay = Relay(self.legs, self.link.retries, lambda: ray.put(array), sending.send)
        output = relay.wait()[0]
        self._remember(array, arrays["positions"])
        self.link.traffic["hidden"] += array.nbytes + output.nbytes
        self.link.traffic["hidden between servers"] += array.nbytes * (len(self.legs) - 1)
        return to_tensor("hidden", output, dtype, array.shape).to(hidden.device, hidden.dtype)

    def _select(self, rows: np.ndarray) -> None:
        if self._history is None:
            raise ValueError("rows: expected in a later step than the first")
        self._history = self._history[rows]
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions[rows]
        if self._starts is not None:
            self._starts = self._starts[rows]

    def _remember(self, array: np.ndarray, positions: np.ndarray | None) -> None:
        if self._history is None:
            self._history, self._positions = array.copy(), positions
            return
        self._history = np.concatenate([self._history, array], 1)
        if self._positions is not None and positions is not None:
            count = max(len(self._positions), len(positions))
            both = [np.broadcast_to(part, (count, part.shape[1])) for part in (self._positions, positions)]
            self._positions = np.concatenate(both, 1)


class _Step:
    """One step of a session, and before it, where a server does not have the session, all that went before."""

    def __init__(
        self,
        session: InferenceSession,
        hidden: np.ndarray,
        dtype: str,
        arrays: dict[str, Any],
        seen: int,
        rows: np.ndarray | None,
    ) -> None:
        self.session = session
        self.hidden, self.dtype, self.arrays = hidden, dtype, arrays
        self.seen, self.rows = seen, rows
        self._tried: set[int] = set()

    def send(self, leg: Leg, states: Any) -> list[Any]:
        session = self.session
        server, name = session._places.get(leg.first, (None, ""))
        rows = self.rows
        if server is None or leg.first in self._tried:
            if server is not None:
                server.close.remote(name)
            name = uuid.uuid4().hex
            session._places[leg.first] = leg.server, name
            rows = None
            if self.seen:
                self._replay(leg, name)
        self._tried.add(leg.first)
        begins = self.seen == 0
        request = Request(
            leg.first,
            leg.last,
            self.dtype,
            self.hidden.shape[:2],
            mask=self.arrays["mask"],
            positions=self.arrays["positions"],
            prompts=session._prompts.get(leg.first) if begins else None,
            starts=session._starts if begins else None,
            mode=session._mode,
        )
        return call(leg.server, "step", 2, request, states, name, self.seen, rows)

    def _replay(self, leg: Leg, name: str) -> None:
        """Give a server the history, as the blocks before its own make it."""
        session = self.session
        history = session._history
        assert history is not None
        mask = self.arrays["mask"]

        def request(leg: Leg) -> Request:
            return Request(
                leg.first,
                leg.last,
                self.dtype,
                history.shape[:2],
                mask=None if mask is None else mask[:, : history.shape[1]],
                positions=session._positions,
                prompts=session._prompts.get(leg.first),
                starts=session._starts,
                mode=session._mode,
            )

        def forward(before: Leg, states: Any) -> list[Any]:
            return call(before.server, "forward", 2, request(before), states)

        before = Relay(
            session.link.legs(session.first, leg.first), session.link.retries, lambda: ray.put(history), forward
        )
        before.settle()
        _, receipt = call(leg.server, "step", 2, request(leg), before.states[-1], name, 0)
        ray.get(receipt, timeout=session.link.retries.timeout)


def _close(places: dict[int, tuple[Any, str]]) -> None:
    if ray.is_initialized():
        for server, name in places.values():
            server.close.remote(name)
