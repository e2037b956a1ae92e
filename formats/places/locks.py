"""Law: a lock that is free in the child of a fork: the parent's thread that held it does not exist there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ForkLock:
    """A lock that is replaced by a free one in every forked child; meant for module level, since it is never unregistered."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context that holds the lock."""
        with self._lock:
            yield
