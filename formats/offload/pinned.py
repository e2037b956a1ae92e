"""Law: all page-locked ("pinned") host memory of offload is allocated here, in one of two ways.

``PinnedArena`` is bounded: it pins its whole capacity once, because pinning takes about a second for a few gibibytes, and it
hands out slices, which their owners free when no transfer uses them any more. It registers memory of its own with CUDA, because
torch's allocator would round the capacity up to a power of two.

``GrowingArena`` has no bound: it adds a region whenever the last one is full. Its regions, and the small copies that
``pinned_like`` and ``pinned_copy`` make, come from torch's allocator, because that one keeps memory which is let go until the
transfers under way have ended: an owner drops its references and waits for nothing.

Memory of a pool or cache without a CUDA device is plain, not pinned.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from threading import Lock
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.events import event
from pqcodec.placed import aligned
from pqcodec.sizes import size_of

ALIGNMENT = 256  # bytes: slices of a PinnedArena begin at multiples of it, and take multiples of it
_REGION_BYTES = 2 << 20  # of a GrowingArena's region, at least: encoded chunks are smaller, and share one


# -- bounded -------------------------------------------------------------------------------------------------------
def slice_bytes(nbytes: int) -> int:
    """The bytes that a slice of ``nbytes`` takes in a PinnedArena."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


class ArenaFull(InvalidArgument):
    """No free run of a PinnedArena is as long as the slice that is asked for.

    >>> try:
    ...     PinnedArena(4096, pinned=False).allocate(8192)
    ... except ArenaFull as error:
    ...     print(error)
    8192 bytes are asked for; 4096 of 4096 are free, 4096 in one run: free slices, or make the arena larger
    """


class PinnedSlice:
    """``nbytes`` of a PinnedArena from byte ``offset`` on; ``tensor``: those bytes, uint8 [nbytes], valid until ``free``."""

    def __init__(self, arena: PinnedArena, offset: int, nbytes: int) -> None:
        self._arena: PinnedArena | None = arena
        self._memory = arena.tensor
        self.offset, self.nbytes = offset, nbytes

    @cached_property
    def tensor(self) -> Any:
        """The bytes: torch takes as long to cut them out as the arena to find them, so that is done when they are wanted."""
        return self._memory[self.offset : self.offset + self.nbytes]

    def free(self) -> None:
        """Give the memory back to the arena; a second call does nothing.

        No one may read or write the memory any more, and no transfer may be under way.
        """
        free_all([self])


def free_all(slices: Iterable[PinnedSlice]) -> None:
    """``PinnedSlice.free`` of each slice; those that lie one behind the other go back as one run."""
    runs: list[tuple[PinnedArena, int, int]] = []
    for part in slices:
        arena, part._arena = part._arena, None
        if arena is None:
            continue
        start, end = part.offset, part.offset + slice_bytes(part.nbytes)
        if runs and runs[-1][0] is arena and runs[-1][2] == start:
            start = runs.pop()[1]
        runs.append((arena, start, end))
    for arena, start, end in runs:
        arena._take_back(start, end - start)


class PinnedArena:
    """``capacity_bytes`` of host memory (rounded down to a multiple of 256), given out in slices. Thread-safe.

    A slice is cut from the shortest free run that holds it, the first one of equals; free runs that touch are joined.
    ``pinned``: whether the memory is page-locked, for all GPUs (None: if torch finds a CUDA device). ``device``: the GPU whose
    context registers the memory (None: the current one). ``tensor``: all of the memory, uint8 [capacity_bytes]. Raises
    InvalidArgument for less than 256 bytes, and MemoryError where so much cannot be pinned.

    >>> arena = PinnedArena(1 << 20, pinned=False)
    >>> part = arena.allocate(1000)
    >>> part.tensor.numel(), arena.used_bytes, arena.largest_free
    (1000, 1024, 1047552)
    >>> part.free()
    >>> arena.used_bytes
    0
    """

    def __init__(self, capacity_bytes: int | str, *, pinned: bool | None = None, device: Any = None) -> None:
        import torch

        capacity_bytes = size_of(capacity_bytes, "capacity_bytes")
        if capacity_bytes < ALIGNMENT:
            raise InvalidArgument(f"capacity_bytes {capacity_bytes}: at least {ALIGNMENT} are expected")
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        # numpy's memory begins at any multiple of 16 bytes; torch's pinned memory would be rounded up to a power of two
        raw = np.empty(self.capacity_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        with torch.inference_mode(False):  # so that the memory can be written outside of that mode, too
            self.tensor = torch.from_numpy(raw[start : start + self.capacity_bytes])
        self.pinned = torch.cuda.is_available() if pinned is None else pinned
        if self.pinned:
            _pin(raw, self.tensor, device)
        self._lock = Lock()
        self._starts = [0]  # of the free runs, ascending
        self._sizes = {0: self.capacity_bytes}  # of a free run, by its start

    @property
    def free_bytes(self) -> int:
        """Bytes in no slice, in all free runs together."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def used_bytes(self) -> int:
        """Bytes in slices, with the bytes that align them."""
        return self.capacity_bytes - self.free_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the longest free run: the largest slice that can be allocated."""
        with self._lock:
            return max(self._sizes.values(), default=0)

    def allocate(self, nbytes: int) -> PinnedSlice:
        """A slice of ``nbytes`` that begins at a multiple of 256 bytes.

        Raises ArenaFull where no free run is long enough, and InvalidArgument for a negative size; nothing is taken then.
        """
        if nbytes < 0:
            raise InvalidArgument(f"a slice of {nbytes} bytes is asked for; 0 and more are possible")
        start = self._take(slice_bytes(nbytes))
        if start is None:
            free = f"{self.free_bytes} of {self.capacity_bytes} are free, {self.largest_free} in one run"
            raise ArenaFull(f"{nbytes} bytes are asked for; {free}: free slices, or make the arena larger")
        return PinnedSlice(self, start, nbytes)

    def _take(self, wanted: int) -> int | None:
        """The first of ``wanted`` bytes, which are taken; None where no free run is so long."""
        with self._lock:
            fitting = [(size, start) for start, size in self._sizes.items() if size >= wanted]
            if not fitting:
                return None
            size, start = min(fitting)
            self._remove(start)
            if size > wanted:
                self._add(start + wanted, size - wanted)
        return start

    def allocate_all(self, sizes: Sequence[int]) -> list[PinnedSlice] | None:
        """A slice of each size (bytes), one behind the other where a free run holds all of them.

        None, and nothing is taken, if there is no room for them even apart.
        """
        ends = list(accumulate(map(slice_bytes, sizes), initial=0))
        start = self._take(ends[-1])
        if start is not None:
            return [PinnedSlice(self, start + at, size) for at, size in zip(ends, sizes, strict=False)]
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
    """Page-lock ``tensor``, a part of ``memory``, until ``memory`` is freed; with unified addresses, for all GPUs."""
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


# -- growing -------------------------------------------------------------------------------------------------------
class Region:
    """Bytes that streams are stored in one behind the other: ``tensor``, uint8 [room], of which the first ``used`` are taken.

    ``offset``: where the region begins when the used bytes of all regions of its arena are laid end to end. A copy or a pickle
    of a pinned region is pinned.
    """

    def __init__(self, tensor: Any, used: int = 0) -> None:
        self.tensor, self.used, self.offset = tensor, used, 0

    def __getstate__(self) -> tuple[Any, int, int, bool]:
        return self.tensor, self.used, self.offset, self.tensor.is_pinned()

    def __setstate__(self, state: tuple[Any, int, int, bool]) -> None:
        import torch

        tensor, self.used, self.offset, pinned = state
        with torch.inference_mode(False):
            self.tensor = pinned_copy(tensor) if pinned else tensor

    def take(self, size: int) -> int | None:
        """Take ``size`` bytes; the byte where they begin, or None if there is no room for them."""
        start = aligned(self.used)
        if start + size > self.tensor.numel():
            return None
        self.used = start + size
        return start


class GrowingArena:
    """Host memory for the streams of one layer, pinned if ``device`` is a GPU; a region goes when nothing in it is used.

    ``size``: bytes of all regions laid end to end. ``stored``: an event that the owner records behind its last copy into the
    arena; a copy or a pickle of the arena waits for it.
    """

    def __init__(self, device: Any) -> None:
        self._device, self._pin = device, device.type == "cuda"
        self._regions: list[Region] = []
        self._laid_out: list[tuple[Region, int]] = []  # the regions and how much of each was used at the last ``keep``
        self.size = 0
        self.stored = event(device)

    def __getstate__(self) -> dict[str, Any]:
        self.stored.synchronize()  # so that copies into the arena that are under way, from any GPU, are part of the state
        return {key: value for key, value in vars(self).items() if key != "stored"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.stored = event(self._device)

    def take(self, size: int) -> tuple[Region, int]:
        """Take ``size`` bytes: a region, and the byte of it where they begin.

        A new region has room for twice that, or as much as is used already, or 2 MiB, whichever is most.
        """
        import torch

        start = self._regions[-1].take(size) if self._regions else None
        if start is None:
            used = sum(region.used for region in self._regions)
            with torch.inference_mode(False):
                room = max(2 * aligned(size), used, _REGION_BYTES)
                self._regions.append(Region(torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=self._pin)))
            start = self._regions[-1].take(size)
        assert start is not None
        return self._regions[-1], start

    def keep(self, used: Iterable[Region]) -> bool:
        """Let go of all regions but those ``used``, and lay these end to end; whether anything has changed by that.

        Bytes that were taken since the last call are a change, too.
        """
        wanted = {id(region) for region in used}
        self._regions = [region for region in self._regions if id(region) in wanted]
        self.size = 0
        for region in self._regions:
            region.offset = self.size
            self.size = aligned(self.size + region.used)
        before, self._laid_out = self._laid_out, [(region, region.used) for region in self._regions]
        return before != self._laid_out

    def copies(self, buffer: Any) -> list[tuple[Any, Any]]:
        """(target, source) of the copy of each region to its offset in ``buffer``, uint8 [at least ``size``]."""
        return [(buffer[region.offset :][:used], region.tensor[:used]) for region, used in self._laid_out]


# -- small copies --------------------------------------------------------------------------------------------------
def pinned_like(x: Any) -> Any:
    """Uninitialised pinned memory of the shape and dtype of ``x``."""
    import torch

    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)


def pinned_copy(x: Any) -> Any:
    """A copy of ``x``, a tensor in host memory, in pinned memory."""
    return x.pin_memory()
