"""Law: how many threads a call on the CPU may use."""

from __future__ import annotations

import os

from pqcodec.errors import InvalidArgument


def threads() -> int:
    """Threads to use: PQCODEC_THREADS, or the processors that this process may run on."""
    wanted = os.environ.get("PQCODEC_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or not 1 <= int(wanted) <= 1024:
        raise InvalidArgument(f"PQCODEC_THREADS is {wanted!r}; a number from 1 to 1024 is expected")
    return int(wanted)
