"""`InferenceSession`: text that grows, whose keys and values servers keep, and whose history can make them again."""

import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from .link import Link, call, tell
from .relay import Leg, Relay, wait_for
from .shared import SharedRows
from .wire import Prompts, Request, TooLarge, check_shapes, geometry, name_of, to_array, to_tensor


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
        self._past = _Past()
        self._prompts: dict[int, Prompts | None] = {}
        self._mode = "overwrite"
        self._dtype = ""
        self._places: dict[int, tuple[Any, str]] = {}
        self._shared: list[SharedRows] = []  # at most one, kept for servers that must begin anew
        self._finalizer = weakref.finalize(self, _close, self._places, self._shared)

    @property
    def length(self) -> int:
        return self._prompt_columns + self._past.columns if self._past.steps else 0

    @property
    def rows(self) -> int:
        """How many rows the batch of the last step had."""
        return self._past.rows

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
        first step alone; rows that are shared take m columns before each row's first token. Raises as that does, and
        the session is then as it was.
        """
        self._check(hidden, prompts, shared, rows)
        arrays = geometry(attention_mask, position_ids, starts if prompts is not None else None)
        selected = None if rows is None else rows.detach().cpu().numpy()
        past = self._past if selected is None else self._past.of_rows(selected)
        if not self._past.steps:
            self._dtype = self.wire_dtype or name_of(hidden.dtype)
            self._begin(prompts, shared, mode)
            past = _Past(starts=arrays["starts"], first=self._prompt_columns)
        array = to_array(hidden, self._dtype)
        sending = _Step(self, past, array, arrays, selected)
        relay = Relay(self.legs, self.link.retries, lambda: ray.put(array), sending.send, self._lost)
        if shared is not None:
            self._shared[0].relay.settle()
        output = relay.wait()[0]
        for each in self._shared:
            each.forget()  # the caches have them now
        self._past = past.then(array, arrays["positions"])
        self.link.count("hidden", array.nbytes + output.nbytes, array.nbytes * (len(self.legs) - 1))
        return to_tensor("hidden", output, self._dtype, array.shape).to(hidden.device, hidden.dtype)

    def _check(self, hidden: Tensor, prompts: Tensor | None, shared: Tensor | None, rows: Tensor | None) -> None:
        """Raises `ValueError` for what cannot be the next step."""
        if not self._finalizer.alive:
            raise ValueError("session: expected an open one, got one that was closed")
        check_shapes(hidden, prompts, shared, self.last - self.first)
        seen = self.length
        if rows is not None:
            if not seen:
                raise ValueError("rows: expected in a later step than the first")
            if rows.dtype.is_floating_point or rows.dim() != 1 or not bool(((rows >= 0) & (rows < self.rows)).all()):
                raise ValueError(f"rows: expected numbers [b] from 0 to {self.rows - 1}, got {rows}")
        expected = self.rows if rows is None else len(rows)
        if seen and len(hidden) != expected:
            raise ValueError(f"hidden: expected {expected} rows, as the session has, got {len(hidden)}")
        added = hidden.shape[1] + (0 if shared is None else shared.shape[1])
        total = seen + added
        if self.max_length is not None and total > self.max_length:
            raise ValueError(f"hidden: expected at most {self.max_length - seen} more columns, got {added}")
        if (tokens := hidden.shape[0] * total) > self.link.max_tokens:
            raise TooLarge(
                f"hidden: expected at most {self.link.max_tokens} tokens in all (max_tokens), got {tokens}; without a "
                "cache (use_cache=False) rows travel in parts"
            )
        if seen and (prompts is not None or shared is not None):
            name = "prompts" if prompts is not None else "shared"
            raise ValueError(f"{name}: expected in the first step of a session alone")

    def _begin(self, prompts: Tensor | None, shared: Tensor | None, mode: str) -> None:
        """Take what the first step has beside hidden states, in place of what one that failed had."""
        sent = self.link.prompts(self.legs, prompts)
        self._mode = mode
        while self._shared:
            self._shared.pop().release()
        if shared is not None:
            self._shared.append(SharedRows(self.link, self.legs, shared, sent, mode))
        self._prompts = {} if shared is not None else {leg.first: own for leg, own in zip(self.legs, sent, strict=True)}

    @property
    def _lost(self) -> Callable[[], None] | None:
        """What makes shared rows anew."""
        return self._shared[0].again if self._shared else None


@dataclass(frozen=True)
class _Past:
    """What a session has been given, by which a server begins it anew.

    Attributes:
        steps: of each its hidden states [b, S, d], its positions as in `Request`, and the rows of both that are now the
            batch's; ``None`` for all. They are put together only where a server needs them.
        starts: as in `Request`.
        first: the column of the first step's first.
        columns: those of all steps.
        rows: of the batch.
    """

    steps: tuple[tuple[np.ndarray, np.ndarray | None, np.ndarray | None], ...] = ()
    starts: np.ndarray | None = None
    first: int = 0
    columns: int = 0
    rows: int = 0

    def of_rows(self, rows: np.ndarray) -> "_Past":
        steps = tuple((hidden, positions, rows if own is None else own[rows]) for hidden, positions, own in self.steps)
        starts = None if self.starts is None else self.starts[rows]
        return replace(self, steps=steps, starts=starts, rows=len(rows))

    def then(self, hidden: np.ndarray, positions: np.ndarray | None) -> "_Past":
        columns = self.columns + hidden.shape[1]
        return replace(self, steps=(*self.steps, (hidden, positions, None)), columns=columns, rows=len(hidden))

    def hidden(self) -> np.ndarray:
        """[b, n, d]."""
        return np.concatenate([hidden if rows is None else hidden[rows] for hidden, _, rows in self.steps], 1)

    def positions(self) -> np.ndarray | None:
        """[b, n] or [1, n]. Those that some steps lack are those of their columns; ``None`` where all do."""
        if all(positions is None for _, positions, _ in self.steps):
            return None
        parts, column = [], self.first
        for hidden, positions, rows in self.steps:
            after = column + hidden.shape[1]
            part = np.arange(column, after)[None] if positions is None else positions
            parts.append(part if rows is None or len(part) == 1 else part[rows])
            column = after
        count = max(map(len, parts))
        return np.concatenate([np.broadcast_to(part, (count, part.shape[1])) for part in parts], 1)


class _Step:
    """One step of a session, and before it, where a server does not have the session, all that went before."""

    def __init__(
        self,
        session: InferenceSession,
        past: _Past,
        hidden: np.ndarray,
        arrays: dict[str, Any],
        rows: np.ndarray | None,
    ) -> None:
        self.session, self.past, self.seen = session, past, session.length
        self.hidden, self.arrays, self.rows = hidden, arrays, rows
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
            session._dtype,
            self.hidden.shape[:2],
            mask=self.arrays["mask"],
            positions=self.arrays["positions"],
            mode=session._mode,
            identity=leg.replicas.identity,
        )
        if self.seen == 0:
            request = self._with_prompts(request, leg)
        return call(leg.server, "step", 2, request, states, name, self.seen, rows)

    def _with_prompts(self, request: Request, leg: Leg) -> Request:
        """The request for a session's first columns, which has its prompts."""
        session = self.session
        if not session._shared:
            return replace(request, prompts=session._prompts.get(leg.first), starts=self.past.starts)
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
        session, mask = self.session, self.arrays["mask"]
        history, positions = self.past.hidden(), self.past.positions()

        def request(leg: Leg) -> Request:
            past = Request(
                leg.first,
                leg.last,
                session._dtype,
                history.shape[:2],
                mask=None if mask is None else mask[:, : self.seen],
                positions=positions,
                mode=session._mode,
                identity=leg.replicas.identity,
            )
            return self._with_prompts(past, leg)

        def forward(before: Leg, states: Any) -> list[Any]:
            return call(before.server, "forward", 2, request(before), states)

        legs = session.link.legs(session.first, leg.first)
        before = Relay(legs, session.link.retries, lambda: ray.put(history), forward, session._lost)
        before.settle()
        _, receipt = call(leg.server, "step", 2, request(leg), before.states[-1], name, 0)
        wait_for(receipt, leg.server, session.link.retries.timeout)


def _close(places: dict[int, tuple[Any, str]], shared: list[SharedRows]) -> None:
    for rows in shared:
        rows.release()
    for server, name in places.values():
        tell(server, "close", name)
