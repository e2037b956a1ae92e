"""Law: the machine's memory, beside which a figure is read: how fast it is, and that it is there before the clock runs."""

from __future__ import annotations

import time

import numpy as np

TOUCHED_BYTES = 3 << 30  # more than what is measured takes


def touch_memory() -> None:
    """Have the machine give memory before the clock runs: a virtual one takes back what was freed, and is slow to give."""
    np.ones(TOUCHED_BYTES // 8)


def copy_speed() -> float:
    """GB/s at which numpy copies 256 MiB, reading and writing counted once."""
    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return source.nbytes / best / 1e9
