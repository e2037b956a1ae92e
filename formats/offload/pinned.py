"""Law: one large allocation of pinned host memory, given away in slices and taken back; nothing else allocates such memory.

Pinning takes a second a few gibibytes, so it is done once. Without a CUDA device the memory is plain.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument

ALIGNMENT = 256  # bytes: of a slice's beginning and of its size


def aligned(nbytes: int) -> int:
    """Bytes that a slice of ``nbytes`` takes."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class ArenaFull(InvalidArgument):
    """No run of free memory is as long as the slice that is asked for."""


class PinnedSlice:
    """A run of an arena's bytes; ``tensor``: uint8 [nbytes], valid until ``free``, which may be called again."""

    def __init__(self, arena: PinnedArena, offset: int, nbytes: int) -> None:
        self._arena: PinnedArena | None = arena
        self.offset, self.nbytes = offset, nbytes
        self.tensor = arena.tensor[offset : offset + nbytes]

    def free(self) -> None:
        """Give the memory back; nobody may be reading or writing it any more, copies under way included."""
        arena, self._arena = self._arena, None
        if arena is not None:
            arena._take_back(self.offset, aligned(self.nbytes))


def free_all(slices: Iterable[PinnedSlice]) -> None:
    """Give the memory of slices back, as ``PinnedSlice.free`` does."""
    for part in slices:
        part.free()


class PinnedArena:
    """``capacity_bytes`` of host memory, in slices. Any thread may allocate and free.

    A slice is cut from the shortest free run that holds it, the first of equals; free neighbours join. ``pinned``: whether
    the memory is page-locked, for all GPUs (None: where torch finds a CUDA device); ``device``: the one that asks for it (None:
    the current one). Raises InvalidArgument, or MemoryError where the system does not give that much.

    >>> arena = PinnedArena(1 << 20, pinned=False)
    >>> part = arena.allocate(1000)
    >>> part.tensor.numel(), arena.used_bytes, arena.largest_free
    (1000, 1024, 1047552)
    >>> part.free()
    >>> arena.used_bytes
    0
    """

    def __init__(self, capacity_bytes: int, *, pinned: bool | None = None, device: Any = None) -> None:
        import torch

        if capacity_bytes < ALIGNMENT:
            raise InvalidArgument(f"capacity_bytes {capacity_bytes}: at least {ALIGNMENT} are expected")
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        # numpy's memory begins at any multiple of 16 bytes; torch's pinned memory would be rounded up to a power of two
        raw = np.empty(self.capacity_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.tensor = torch.from_numpy(raw[start : start + self.capacity_bytes])
        self.pinned = torch.cuda.is_available() if pinned is None else pinned
        if self.pinned:
            _pin(raw, self.tensor, device)
        self._lock = Lock()
        self._starts = [0]  # of the free runs, ascending
        self._sizes = {0: self.capacity_bytes}  # of a free run, by its start

    @property
    def free_bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    @property
    def used_bytes(self) -> int:
        return self.capacity_bytes - self.free_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run."""
        with self._lock:
            return max(self._sizes.values(), default=0)

    def allocate(self, nbytes: int) -> PinnedSlice:
        """A slice of ``nbytes``, aligned to 256 bytes; raises ArenaFull, and nothing is taken."""
        if nbytes < 0:
            raise InvalidArgument(f"a slice of {nbytes} bytes is asked for; 0 and more are possible")
        wanted = aligned(nbytes)
        with self._lock:
            fitting = [(size, start) for start, size in self._sizes.items() if size >= wanted]
            if not fitting:
                free, largest = sum(self._sizes.values()), max(self._sizes.values(), default=0)
                raise ArenaFull(
                    f"{nbytes} bytes are asked for; {free} of {self.capacity_bytes} are free, {largest} in one run: "
                    "free slices, or make the arena larger"
                )
            size, start = min(fitting)
            self._remove(start)
            if size > wanted:
                self._add(start + wanted, size - wanted)
        return PinnedSlice(self, start, nbytes)

    def allocate_all(self, sizes: Sequence[int]) -> list[PinnedSlice] | None:
        """A slice of each size; None if there is no room for all, and nothing is taken."""
        slices: list[PinnedSlice] = []
        try:
            for size in sizes:
                slices.append(self.allocate(size))
        except ArenaFull:
            free_all(slices)
            return None
        return slices

    def _take_back(self, start: int, size: int) -> None:
        with self._lock:
            at = bisect.bisect_left(self._starts, start)
            if at < len(self._starts) and self._starts[at] == start + size:
                size += self._remove(self._starts[at])
            if at and (before := self._starts[at - 1]) + self._sizes[before] == start:
                size += self._remove(before)
                start = before
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        bisect.insort(self._starts, start)
        self._sizes[start] = size

    def _remove(self, start: int) -> int:
        del self._starts[bisect.bisect_left(self._starts, start)]
        return self._sizes.pop(start)


def _pin(memory: np.ndarray, tensor: Any, device: Any) -> None:
    """Page-lock a tensor's part of ``memory`` for as long as that lives; with unified addresses, all devices' contexts know."""
    import torch

    with torch.cuda.device(device):
        torch.zeros(1, device="cuda")  # a context for the driver
        error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0))
    if error:
        raise MemoryError(f"{tensor.numel()} bytes cannot be pinned (CUDA error {error}); choose a smaller capacity_bytes")
    weakref.finalize(memory, _unpin, tensor.data_ptr()).atexit = False


def _unpin(address: int) -> None:
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)
