"""Law: words of memory read at many addresses at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from pqcodec.kernels.cpu.disk_cache import kept
from pqcodec.kernels.cpu.lane_memory import pointer


@kept(nogil=True)
def words_at(addresses: Any) -> Any:
    """The 64-bit words at ``addresses`` (int64 [n], multiples of 8), uint64 [n]. All of them must be readable."""
    words = np.empty(len(addresses), np.uint64)
    for i in range(len(addresses)):
        words[i] = carray(pointer(addresses[i]), (1,), np.uint64)[0]  # type: ignore[call-arg]
    return words
