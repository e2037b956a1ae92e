"""Law: a server that did not answer is not asked again for a while: it costs one time-out, and not one with each call."""

from __future__ import annotations

import time

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds


class CircuitBreaker:
    """When to ask a server again: each failure in a row doubles the pause, and an answer ends it.

    Safe for threads, without a lock that a fork could keep.

    >>> breaker = CircuitBreaker()
    >>> breaker.failed()
    >>> 0 < breaker.remaining() <= FIRST_PAUSE
    True
    >>> breaker.answered()
    >>> breaker.remaining()
    0.0
    """

    def __init__(self) -> None:
        self._pause = self._until = 0.0

    def remaining(self) -> float:
        """Seconds for which the server is not to be asked; 0.0: it may be."""
        return max(0.0, self._until - time.monotonic())

    def failed(self) -> None:
        """Note that the server could not be reached, or did not answer in time."""
        if not self.remaining():  # calls that were under way together are one failure
            self._pause = min(2 * self._pause, LONGEST_PAUSE) or FIRST_PAUSE
            self._until = time.monotonic() + self._pause

    def answered(self) -> None:
        """Note that the server has answered."""
        self._pause = self._until = 0.0
