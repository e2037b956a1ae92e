"""Law: two buffers on a GPU, into which the streams that layers keep in host memory are copied, one layer ahead of decoding.

The copies run on a stream of their own. Two events for each buffer keep them apart from the decoding: a decoder waits for
``ready``, which is recorded behind the copy into the buffer, and the next copy waits for ``free``, which is recorded behind the
last decoding from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pqcodec.formats.offload.events import event
from pqcodec.formats.offload.graphs import Launch, PreparedLaunches, copy_pinned
from pqcodec.formats.offload.pinned import GrowingArena

SPARE = 1 / 32  # share of a buffer that is allocated beyond what is needed, so that a growing text rarely needs another
_SPARE_BYTES = 512 << 10  # ... and bytes beyond that


def device_bytes(size: int, device: Any) -> Any:
    """Uninitialised memory on a device, uint8 [size]; usable in and out of inference mode, wherever it is allocated."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


@dataclass
class Slot:
    """One of the two buffers, with the launches that fill it and those that decode from it."""

    number: int
    ready: Any  # event behind the last copy into the buffer
    free: Any  # event behind the last decoding from the buffer
    buffer: Any = None  # uint8 [bytes] on the device
    holds: GrowingArena | None = None  # whose streams are in the buffer, or are being copied there
    decodings: PreparedLaunches = field(default_factory=PreparedLaunches)
    copies: dict[GrowingArena, Launch] = field(default_factory=dict)


class Staging:
    """The two slots of a device, which its layers use by turns. ``layers``: the host memory of each layer, in their order."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.layers: list[GrowingArena] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots = [Slot(number, event(device), event(device)) for number in range(2)]
        self._last = self.slots[1]  # that was decoded from

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(0 if slot.buffer is None else slot.buffer.numel() for slot in self.slots)

    def current(self) -> Any:
        """The device's current stream, which the methods below are given; None on a CPU."""
        return None if self._side is None else torch.cuda.current_stream(self._device)

    def load(self, layer: GrowingArena, current: Any) -> Slot:
        """The slot with a layer's streams; a copy of them begins now if neither slot has them. Decode behind its ``ready``."""
        self._last = self._slot(layer, current)
        return self._last

    def prefetch_behind(self, layer: GrowingArena, current: Any) -> None:
        """Begin to copy the streams of the next layer that has any; the first layer follows the last one."""
        count, at = len(self.layers), self.layers.index(layer)
        for step in range(1, count):
            following = self.layers[(at + step) % count]
            if following.size:
                self._slot(following, current)
                return

    def forget(self, layer: GrowingArena) -> None:
        """Copy a layer's streams anew the next time, because they or their places have changed."""
        for slot in self.slots:
            slot.copies.pop(layer, None)
            if slot.holds is layer:
                slot.holds = None

    def _slot(self, layer: GrowingArena, current: Any) -> Slot:
        """The slot that holds a layer's streams; if none does, they are copied to the one that was not decoded from last."""
        for slot in self.slots:
            if slot.holds is layer:
                return slot
        slot = self.slots[1 - self._last.number]
        self._copy(layer, slot, current)
        return slot

    def _copy(self, layer: GrowingArena, slot: Slot, current: Any) -> None:
        slot.holds = None
        if slot.buffer is None or slot.buffer.numel() < layer.size:
            self._enlarge(slot, layer.size, current)
        copy = slot.copies.get(layer)
        if copy is None:
            run = partial(_copy_all, layer.copies(slot.buffer))
            slot.copies[layer] = copy = Launch(run, self._device, stream=self._side)
        slot.free.wait(self._side)
        layer.stored.wait(self._side)
        copy()
        slot.ready.record(self._side)
        slot.holds = layer

    def _enlarge(self, slot: Slot, size: int, current: Any) -> None:
        slot.buffer = None
        slot.decodings.clear()
        slot.copies.clear()
        slot.buffer = device_bytes(size + int(size * SPARE) + _SPARE_BYTES, self._device)
        if self._side is not None:
            slot.buffer.record_stream(self._side)  # whenever it is freed, a copy into it may still be under way
        slot.free.record(current)


def _copy_all(copies: Sequence[tuple[Any, Any]]) -> None:
    for target, source in copies:
        copy_pinned(target, source)
