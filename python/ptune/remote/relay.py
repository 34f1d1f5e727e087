"""Work that passes from server to server, and goes on at another where one fails."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from .wire import SessionGone

_SERVER_FAILED = (
    RayActorError, GetTimeoutError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError, WorkerCrashedError,
)  # fmt: skip

_ALIVE_SECONDS = 10.0


class RemoteError(ConnectionError):
    """Blocks that could not be run, with all that went wrong on the way."""


@dataclass(frozen=True)
class Retries:
    """How often and for how long a client tries.

    Attributes:
        attempts: for each span of one call. Other replicas are tried at once, the same ones again after a delay.
        first_delay, max_delay: seconds; delays double.
        timeout: seconds until a server that does not answer has failed.
    """

    attempts: int = 10
    first_delay: float = 0.25
    max_delay: float = 16.0
    timeout: float = 120.0

    def delay(self, failures: int, replicas: int) -> float:
        """How long to wait after so many failures of one span."""
        rounds = failures - replicas
        return 0.0 if rounds < 0 else min(self.max_delay, self.first_delay * 2**rounds)


class Replicas:
    """Servers of the same blocks ``first`` … ``last - 1``; requests go to one of them, until it fails.

    Args:
        find: returns each by its name.

    Attributes:
        identity: of what they served when they were found (`Span`).
        where: this process is, in their cluster.
    """

    def __init__(self, first: int, last: int, find: Sequence[Callable[[], Any]]) -> None:
        self.first, self.last = first, last
        self.servers = [each() for each in find]
        self.identity: str | None = None
        self.where = _here()
        self._find = find
        self._turn = random.randrange(len(self.servers))  # clients spread

    @property
    def server(self) -> Any:
        """The actor that is asked now."""
        return self.servers[self._turn]

    def failed(self, server: Any) -> None:
        """Ask another from now on, if it is ``server`` that is being asked."""
        if server is self.server:
            with suppress(ValueError, RayError):  # if there is none of that name now, it may come
                self.servers[self._turn] = self._find[self._turn]()
            self._turn = (self._turn + 1) % len(self.servers)


class Leg:
    """Blocks ``first`` … ``last - 1`` on a way through a model, at ``server``, one of their ``replicas``."""

    def __init__(self, replicas: Replicas, first: int, last: int, server: Any = None) -> None:
        self.replicas = replicas
        self.first, self.last = first, last
        self.server = replicas.server if server is None else server

    def turn_away(self) -> None:
        """Go to another server, if there is one."""
        self.replicas.failed(self.server)
        self.server = self.replicas.server

    def __str__(self) -> str:
        return f"block {self.first}" if self.last == self.first + 1 else f"blocks {self.first} to {self.last - 1}"


def _here() -> tuple[str, str]:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()  # each cluster numbers its jobs from 1


def wait_for(receipt: Any, server: Any, timeout: float) -> None:
    """Until ``receipt`` has come: as long as that takes, if ``server`` answers beside it. Raises `RayError`."""
    while True:
        try:
            ray.get(receipt, timeout=timeout)
            return
        except GetTimeoutError:
            ray.get(server.status.remote(), timeout=min(timeout, _ALIVE_SECONDS))  # in a thread of its own


def way_back(legs: Sequence[Leg]) -> list[Leg]:
    """Copies of ``legs``, from the last to the first, at the servers where they are now."""
    return [Leg(leg.replicas, leg.first, leg.last, leg.server) for leg in reversed(legs)]


class Relay:
    """Sends states through ``legs`` in turn; what one server returns goes to the next without passing the client.

    Args:
        begin: puts the states into the object store.
        send: asks a leg's server, ``send(leg, states)``; returns references to the next leg's states, to what else is
            wanted by the client, and to the receipt.
        lost: called where an object was lost, before all begins again.
    """

    def __init__(
        self,
        legs: Sequence[Leg],
        retries: Retries,
        begin: Callable[[], Any],
        send: Callable[[Leg, Any], list[Any]],
        lost: Callable[[], None] | None = None,
    ) -> None:
        here = _here() if ray.is_initialized() else None
        if any(leg.replicas.where != here for leg in legs):
            now = "none" if here is None else "another"
            raise RemoteError(f"expected the Ray cluster of the servers, got {now}: it was left (ray.shutdown)")
        self.legs = legs
        self.retries = retries
        self._begin, self._send, self._lost = begin, send, lost
        self.states: list[Any] = [begin()] + [None] * len(legs)
        self._extras: list[list[Any]] = [[] for _ in legs]
        self._receipts: list[Any] = [None] * len(legs)
        self._asked: list[Any] = [None] * len(legs)  # other relays turn the legs too
        self._causes: list[list[str]] = [[] for _ in legs]
        self._reached = 0
        self._sent = False
        try:
            self._send_from(0)
        except RayError as error:
            self._recover(error)

    def settle(self) -> None:
        """Wait until the last leg has made its states. Raises `RemoteError`, or what a server says is wrong."""
        while self._reached < len(self.legs):
            try:
                if not self._sent:
                    self._send_from(self._reached)
                wait_for(self._receipts[self._reached], self._asked[self._reached], self.retries.timeout)
                self._reached += 1
            except RayError as error:
                self._recover(error)

    def wait(self) -> list[Any]:
        """The last leg's states, and what else the legs returned, in their order; raises as `settle` does."""
        while True:
            self.settle()
            try:
                wanted = [self.states[-1], *(extra for extras in self._extras for extra in extras)]
                return ray.get(wanted, timeout=self.retries.timeout)
            except RayError as error:
                self._recover(error)

    def given_to(self, leg: Leg) -> Any:
        """The states that came to the leg of the same blocks."""
        return self.states[[own.first for own in self.legs].index(leg.first)]

    def begin_again(self) -> None:
        """Let the next `wait` send everything anew."""
        self.states[0] = self._begin()
        self._reached, self._sent = 0, False

    def _send_from(self, index: int) -> None:
        for i in range(index, len(self.legs)):
            self._reached = i  # where it fails, if it does
            self._asked[i] = self.legs[i].server
            self.states[i + 1], *self._extras[i], self._receipts[i] = self._send(self.legs[i], self.states[i])
        self._reached, self._sent = index, True

    def _recover(self, error: RayError) -> None:
        """Turn to another server, wait, or give up."""
        i = min(self._reached, len(self.legs) - 1)
        leg = self.legs[i]
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, (*_SERVER_FAILED, ObjectLostError, SessionGone)):
            raise cause from error  # which has the server's own traceback
        causes = self._causes[i]
        said = str(cause).partition("\n")[0]
        if isinstance(cause, GetTimeoutError):
            said = f"no answer in {self.retries.timeout:g} s (timeout)"
        causes.append(f"{type(cause).__name__}: {said}")
        if len(causes) >= self.retries.attempts:
            raise RemoteError(f"{leg}: {len(causes)} attempts failed: " + "; ".join(causes)) from error
        self._reached, self._sent = i, False
        if isinstance(cause, _SERVER_FAILED) and leg.server is self._asked[i]:
            leg.turn_away()
        if not isinstance(cause, SessionGone):  # of which its server has just told
            time.sleep(self.retries.delay(len(causes), len(leg.replicas.servers)))
        if isinstance(cause, ObjectLostError):
            if self._lost is not None:
                self._lost()
            self.begin_again()
