"""`InferenceSession`: text that grows, whose keys and values servers keep, and whose history can make them again."""

import uuid
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from .link import Link, call
from .relay import Leg, Relay
from .shared import SharedRows
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
        self._prompts: dict[int, Prompts | None] = {}
        self._starts: np.ndarray | None = None
        self._mode = "overwrite"
        self._places: dict[int, tuple[Any, str]] = {}
        self._shared: list[SharedRows] = []  # at most one, kept for servers that must begin anew
        self._finalizer = weakref.finalize(self, _close, self._places, self._shared)

    @property
    def length(self) -> int:
        return 0 if self._history is None else self._prompt_columns + self._history.shape[1]

    @property
    def _prompt_columns(self) -> int:
        return sum(shared.shape[1] for shared in self._shared)

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
        shared: Tensor | None = None,
    ) -> Tensor:
        """Run the next columns ``hidden`` [b, S, d]; returns their states, without gradients.

        ``attention_mask`` [b, N] covers all columns so far and these. ``rows`` [b]: which rows of the batch before are
        continued (beams). ``prompts``, ``starts``, ``mode`` and ``shared`` as in `RemoteSequential.forward`, in the
        first step alone; rows that are shared take m columns before each row's first token. Raises as that does.
        """
        if not self._finalizer.alive:
            raise ValueError("session: expected an open one, got one that was closed")
        dtype = self.wire_dtype or name_of(hidden.dtype)
        seen = self.length
        added = hidden.shape[1] + (0 if shared is None else shared.shape[1])
        total = seen + added
        if self.max_length is not None and total > self.max_length:
            raise ValueError(f"hidden: expected at most {self.max_length - seen} more columns, got {added}")
        if (tokens := hidden.shape[0] * total) > self.link.max_tokens:
            raise TooLarge(f"hidden: expected at most {self.link.max_tokens} tokens in all (max_tokens), got {tokens}")
        if seen and (prompts is not None or shared is not None):
            name = "prompts" if prompts is not None else "shared"
            raise ValueError(f"{name}: expected in the first step of a session alone")
        arrays = geometry(attention_mask, position_ids, starts if prompts is not None else None)
        selected = None if rows is None else rows.detach().cpu().numpy()
        if selected is not None:
            self._select(selected)
        if not seen:
            self._begin(prompts, shared, arrays["starts"], mode)
        array = to_array(hidden, dtype)
        sending = _Step(self, array, dtype, arrays, seen, selected)
        relay = Relay(self.legs, self.link.retries, lambda: ray.put(array), sending.send, self._lost)
        if shared is not None:
            self._shared[0].relay.settle()
        output = relay.wait()[0]
        for each in self._shared:
            each.forget()  # the caches have them now
        self._remember(array, arrays["positions"])
        self.link.traffic["hidden"] += array.nbytes + output.nbytes
        self.link.traffic["hidden between servers"] += array.nbytes * (len(self.legs) - 1)
        return to_tensor("hidden", output, dtype, array.shape).to(hidden.device, hidden.dtype)

    def _begin(self, prompts: Tensor | None, shared: Tensor | None, starts: np.ndarray | None, mode: str) -> None:
        """Take what the first step has beside hidden states, in place of what one that failed had."""
        sent = self.link.prompts(self.legs, prompts)
        self._starts, self._mode = starts, mode
        while self._shared:
            self._shared.pop().release()
        if shared is not None:
            self._shared.append(SharedRows(self.link, self.legs, shared, sent, mode))
        self._prompts = {} if shared is not None else {leg.first: own for leg, own in zip(self.legs, sent, strict=True)}

    @property
    def _lost(self) -> Callable[[], None] | None:
        """What makes shared rows anew."""
        return self._shared[0].again if self._shared else None

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
            self._history, self._positions = array, positions
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
        request = Request(
            leg.first,
            leg.last,
            self.dtype,
            self.hidden.shape[:2],
            mask=self.arrays["mask"],
            positions=self.arrays["positions"],
            mode=session._mode,
        )
        if self.seen == 0:
            request = self._with_prompts(request, leg)
        return call(leg.server, "step", 2, request, states, name, self.seen, rows)

    def _with_prompts(self, request: Request, leg: Leg) -> Request:
        """The request for a session's first columns, which has its prompts."""
        session = self.session
        if not session._shared:
            return replace(request, prompts=session._prompts.get(leg.first), starts=session._starts)
        count, mask = session._prompt_columns, request.mask
        if mask is None:
            mask = np.ones((request.shape[0], count + request.shape[1]), np.bool_)
        # the rows' columns, which stand before each row's first token, are put before all text
        offset = np.arange(mask.shape[1]) - mask.argmax(1)[:, None]
        text = mask[(offset < 0) | (offset >= count)].reshape(len(mask), -1)
        mask = np.concatenate([np.ones((len(mask), count), np.bool_), text], 1)
        return replace(request, mask=mask, shared=session._shared[0].for_request(leg))

    def _replay(self, leg: Leg, name: str) -> None:
        """Give a server the history, as the blocks before its own make it."""
        session = self.session
        history = session._history
        assert history is not None
        mask = self.arrays["mask"]

        def request(leg: Leg) -> Request:
            past = Request(
                leg.first,
                leg.last,
                self.dtype,
                history.shape[:2],
                mask=None if mask is None else mask[:, : session.length],
                positions=session._positions,
                mode=session._mode,
            )
            return self._with_prompts(past, leg)

        def forward(before: Leg, states: Any) -> list[Any]:
            return call(before.server, "forward", 2, request(before), states)

        legs = session.link.legs(session.first, leg.first)
        before = Relay(legs, session.link.retries, lambda: ray.put(history), forward, session._lost)
        before.settle()
        _, receipt = call(leg.server, "step", 2, request(leg), before.states[-1], name, 0)
        ray.get(receipt, timeout=session.link.retries.timeout)


def _close(places: dict[int, tuple[Any, str]], shared: list[SharedRows]) -> None:
    for rows in shared:
        rows.release()
    if ray.is_initialized():
        for server, name in places.values():
            server.close.remote(name)
