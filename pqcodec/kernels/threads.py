"""Law: how many threads a call on the CPU may use: all cores, or its own alone where the caller is one of many."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pqcodec.errors import InvalidArgument

_local = threading.local()


def threads() -> int:
    """Threads to use: PQCODEC_THREADS, or the processors that this process may run on; 1 inside ``one_thread``."""
    if getattr(_local, "alone", False):
        return 1
    wanted = os.environ.get("PQCODEC_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or not 1 <= int(wanted) <= 1024:
        raise InvalidArgument(f"PQCODEC_THREADS is {wanted!r}; a number from 1 to 1024 is expected")
    return int(wanted)


@contextmanager
def one_thread() -> Iterator[None]:
    """Calls of this thread use no others: many small tensors are quicker in threads of the caller's, a tensor at a time."""
    before = getattr(_local, "alone", False)
    _local.alone = True
    try:
        yield
    finally:
        _local.alone = before
