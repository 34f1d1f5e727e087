"""What clients leave on a server, for as long as they use it and it fits."""

import threading
import time
from collections import OrderedDict
from typing import Any


class Keeping:
    """Values by key, of which the longest unused are dropped when all take more than ``budget`` bytes, and any that
    were not used for ``idle`` seconds: their client may have vanished.
    """

    def __init__(self, budget: int, idle: float) -> None:
        self.budget = budget
        self.idle = idle
        self._values: OrderedDict[Any, tuple[Any, int, float]] = OrderedDict()
        self._unwanted: dict[Any, float] = {}
        self._lock = threading.Lock()  # status is read beside a running request

    def put(self, key: Any, value: Any, nbytes: int) -> None:
        """Keep ``value``, unless it alone is over the budget."""
        with self._lock:
            self._values.pop(key, None)
            if nbytes <= self.budget and self._unwanted.pop(key, None) is None:
                self._values[key] = value, nbytes, time.monotonic()
            while self._nbytes() > self.budget:
                self._values.popitem(last=False)

    def get(self, key: Any) -> Any:
        """The value, or ``None``."""
        with self._lock:
            if key not in self._values:
                return None
            value, nbytes, _ = self._values.pop(key)
            self._values[key] = value, nbytes, time.monotonic()
            return value

    def take(self, key: Any) -> Any:
        """The value, which is then no longer kept, or ``None``."""
        with self._lock:
            return self._values.pop(key, (None,))[0]

    def drop(self, key: Any) -> None:
        """Keep the value no longer, nor one that a running request puts there yet."""
        with self._lock:
            if key not in self._values:
                self._unwanted[key] = time.monotonic()
            self._values.pop(key, None)

    def drop_idle(self) -> None:
        before = time.monotonic() - self.idle
        with self._lock:
            for key in [key for key, since in self._unwanted.items() if since < before]:
                del self._unwanted[key]
            for key in [key for key, (_, _, used) in self._values.items() if used < before]:
                del self._values[key]

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def __len__(self) -> int:
        return len(self._values)

    def _nbytes(self) -> int:
        return sum(nbytes for _, nbytes, _ in self._values.values())
