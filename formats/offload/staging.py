"""Law: streams in pinned memory, and slots on the device that they are copied to, one layer's while another computes.

Two slots are filled by turns on a stream of their own. ``ready`` and ``free`` keep the two streams apart: who decodes from a
slot waits for ``ready``, and what is copied there next waits for ``free``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pqcodec.formats.offload.graphs import Replayed, copy_pinned
from pqcodec.formats.offload.launches import PLAIN_RUNS, Prepared
from pqcodec.placed import aligned

SPARE = 1 / 32  # of memory that is laid out: so much longer a sequence can become before it is laid out again
_HOME_BYTES = 2 << 20  # of pinned memory, at least: chunks share one, and the next is as large as all before


def memory(size: int, device: Any) -> Any:
    """Bytes on a device; whoever holds them may be in inference mode or not."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


class Home:
    """Memory that streams lie in: a uint8 tensor of which the first ``used`` bytes are taken, and go to ``place`` in a slot."""

    def __init__(self, tensor: Any, used: int = 0) -> None:
        self.tensor, self.used, self.place = tensor, used, 0

    def __getstate__(self) -> tuple[Any, int, int, bool]:
        return self.tensor, self.used, self.place, self.tensor.is_pinned()

    def __setstate__(self, state: tuple[Any, int, int, bool]) -> None:
        tensor, self.used, self.place, pinned = state
        with torch.inference_mode(False):
            self.tensor = tensor.pin_memory() if pinned else tensor

    def take(self, size: int) -> int | None:
        """Where so many bytes begin; None if there is no room."""
        start = aligned(self.used)
        if start + size > self.tensor.numel():
            return None
        self.used = start + size
        return start


class Homes:
    """All pinned memory of one layer; ``size``: the bytes of a slot that its streams take."""

    def __init__(self, device: Any) -> None:
        self._device, self._pin = device, device.type == "cuda"
        self._homes: list[Home] = []
        self._told: list[tuple[Home, int]] = []
        self.size = 0
        self.stored = event(device)  # behind the last copy to the host

    def __getstate__(self) -> dict[str, Any]:
        self.stored.synchronize()  # what is on its way to the homes, from whichever GPU, is copied too
        return {key: value for key, value in vars(self).items() if key != "stored"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.stored = event(self._device)

    def take(self, size: int) -> tuple[Home, int]:
        """A home with room for so many bytes, and where they begin."""
        start = self._homes[-1].take(size) if self._homes else None
        if start is None:
            taken = sum(home.used for home in self._homes)
            with torch.inference_mode(False):
                room = max(2 * aligned(size), taken, _HOME_BYTES)
                self._homes.append(Home(torch.empty(room, dtype=torch.uint8, pin_memory=self._pin)))
            start = self._homes[-1].take(size)
        assert start is not None
        return self._homes[-1], start

    def settle(self, used: Iterable[Home]) -> bool:
        """Let go of homes that are not used; whether what a slot has to hold has changed."""
        wanted = {id(home) for home in used}
        self._homes = [home for home in self._homes if id(home) in wanted]
        self.size = 0
        for home in self._homes:
            home.place = self.size
            self.size = aligned(self.size + home.used)
        before, self._told = self._told, [(home, home.used) for home in self._homes]
        return before != self._told

    def copies(self, buffer: Any) -> list[tuple[Any, Any]]:
        """(target, source) of each home."""
        return [(buffer[home.place :][:used], home.tensor[:used]) for home, used in self._told]


class NoEvent:
    """What a CPU needs in the place of a CUDA event."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def event(device: Any) -> Any:
    return torch.cuda.Event() if device.type == "cuda" else NoEvent()


@dataclass
class Slot:
    """Memory on the device that one layer's streams are copied to, and what is prepared to fill it and to decode from it."""

    number: int
    ready: Any  # the event behind the copy
    free: Any  # ... and the one behind the last decoding from here
    buffer: Any = None
    holds: Homes | None = None
    prepared: Prepared = field(default_factory=Prepared)
    loads: dict[Homes, Replayed] = field(default_factory=dict)


class Staging:
    """Two slots, which the layers' streams are copied to by turns, on a stream of their own."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.layers: list[Homes] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots = [Slot(number, event(device), event(device)) for number in range(2)]
        self._last = self.slots[1]  # that was decoded from

    @property
    def nbytes(self) -> int:
        return sum(0 if slot.buffer is None else slot.buffer.numel() for slot in self.slots)

    def current(self) -> Any:
        """The device's current stream, which callers tell below; None on a CPU."""
        return None if self._side is None else torch.cuda.current_stream(self._device)

    def load(self, layer: Homes, current: Any) -> Slot:
        """The slot that a layer's streams are in, or are being copied to from now on: behind ``ready``."""
        self._last = self._slot(layer, current)
        return self._last

    def prefetch_behind(self, layer: Homes, current: Any) -> None:
        """Begin to copy what the layer behind this one has; behind the last comes the first."""
        count, at = len(self.layers), self.layers.index(layer)
        for step in range(1, count):
            following = self.layers[(at + step) % count]
            if following.size:
                self._slot(following, current)
                return

    def forget(self, layer: Homes) -> None:
        """Let go of what is prepared for, and held of, a layer whose homes have changed."""
        for slot in self.slots:
            slot.loads.pop(layer, None)
            if slot.holds is layer:
                slot.holds = None

    def _slot(self, layer: Homes, current: Any) -> Slot:
        """The slot that holds a layer's streams; if none does, they are copied to the one that was not used last."""
        for slot in self.slots:
            if slot.holds is layer:
                return slot
        slot = self.slots[1 - self._last.number]
        self._copy(layer, slot, current)
        return slot

    def _copy(self, layer: Homes, slot: Slot, current: Any) -> None:
        slot.holds = None
        if slot.buffer is None or slot.buffer.numel() < layer.size:
            self._enlarge(slot, layer.size, current)
        load = slot.loads.get(layer)
        if load is None:
            run = partial(_run, layer.copies(slot.buffer))
            slot.loads[layer] = load = Replayed(run, self._device, PLAIN_RUNS, self._side)
        slot.free.wait(self._side)
        layer.stored.wait(self._side)
        load()
        slot.ready.record(self._side)
        slot.holds = layer

    def _enlarge(self, slot: Slot, size: int, current: Any) -> None:
        slot.buffer = None
        slot.prepared.clear()
        slot.loads.clear()
        slot.buffer = memory(size + int(size * SPARE) + _HOME_BYTES // 4, self._device)
        if self._side is not None:
            slot.buffer.record_stream(self._side)  # whenever it goes, a copy to it may still be under way
        slot.free.record(current)


def _run(copies: Sequence[tuple[Any, Any]]) -> None:
    for target, source in copies:
        copy_pinned(target, source)
