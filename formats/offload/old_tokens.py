"""Law: old tokens of one attention layer, kept as streams and decoded in place; where the streams lie is a class each.

Tokens come in chunks. A sequence's keys and its values of a chunk are one stream each [heads, tokens, head_dim], so a batch
is reordered by exchanging references, and sequences that share a beginning share its streams. ``OnDevice`` keeps streams on
the GPU; ``OnHost`` in pinned memory, of which the next layer's are copied while a layer computes (``Staging``); ``OnCPU`` is
for tensors of the CPU. Nothing here waits for the device but the encoder's check for NaN and Inf.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pqcodec import codec
from pqcodec.batch import DecodeBatch, EncodeBatch, aligned
from pqcodec.centre import Rope
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.graphs import Replayed
from pqcodec.header import Header
from pqcodec.kernels import ON_DEVICE

PLACES = ("host", "device")
_HOME_BYTES = 2 << 20  # of pinned memory, at least: chunks share one, and the next is as large as all before
_SPARE = 1 / 32  # of the scratch: so much longer a sequence can become before it is laid out again
_SPARE_TOKENS = 256  # ... and at least so many tokens
_MOST_BATCHES = 256  # prepared launches that are kept
_PLAIN_RUNS = 2  # of launches, before they are captured in a CUDA graph
_numbers = itertools.count()


@dataclass(frozen=True)
class Coding:
    """How a layer's keys and values are encoded; ``ropes``: of those that went through RoPE."""

    presets: Mapping[str, str]  # by role, "keys" and "values"
    ropes: Mapping[str, Rope]
    seed: int = 0
    backend: str = "auto"

    def options(self, role: str) -> dict[str, Any]:
        """Options of ``encode`` and ``EncodeBatch``: keys are centred, values are not, as in a file."""
        rope = self.ropes.get(role)
        center = "rope" if rope else "mean" if role == "keys" else None
        return {"preset": self.presets[role], "center": center, "rope": rope, "seed": self.seed, "backend": self.backend}


class Home:
    """Memory that streams lie in: a uint8 tensor of which the first ``used`` bytes are taken."""

    def __init__(self, tensor: Any, used: int = 0) -> None:
        self.tensor, self.used = tensor, used

    def take(self, size: int) -> int | None:
        """Where so many bytes begin; None if there is no room."""
        start = aligned(self.used)
        if start + size > self.tensor.numel():
            return None
        self.used = start + size
        return start


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream of a GPU's tensor, wherever it lies."""

    header: Header
    home: Home
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.header.stream_bytes

    @property
    def data(self) -> Any:
        return self.home.tensor[self.start : self.stop]

    def __len__(self) -> int:
        return self.header.stream_bytes


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of every sequence: a stream of keys and one of values each, of which the first ``tokens`` count."""

    stored: int
    tokens: int
    keys: Sequence[Any]
    values: Sequence[Any]

    def select(self, rows: Sequence[int]) -> Chunk:
        return replace(self, keys=[self.keys[row] for row in rows], values=[self.values[row] for row in rows])


class OldTokens:
    """Chunks of one layer, oldest first."""

    def __init__(self, coding: Coding, shop: Workshop) -> None:
        self.coding, self.shop = coding, shop
        self.chunks: list[Chunk] = []
        self.tokens = 0
        self.number = next(_numbers)
        self.version = 0

    def append(self, keys: Any, values: Any) -> None:
        """Encode tokens [sequences, heads, tokens, head_dim] behind the others. Raises NonFiniteInput (of a GPU's tensors)."""
        tokens = int(keys.shape[-2])
        streams = [self._encode(role, x) for role, x in (("keys", keys), ("values", values))]
        self._now([*self.chunks, Chunk(tokens, tokens, *streams)])

    def select(self, rows: Sequence[int]) -> None:
        """The sequences of the batch from now on, by their places in it until now."""
        self._now([chunk.select(rows) for chunk in self.chunks])

    def cut(self, tokens: int) -> None:
        """Keep the first so many tokens; a stream that is cut stays whole, and is read in part."""
        kept, left = [], tokens
        for chunk in self.chunks:
            if left > 0:
                kept.append(replace(chunk, tokens=min(chunk.tokens, left)))
            left -= chunk.tokens
        self._now(kept)

    def _now(self, chunks: list[Chunk]) -> None:
        self.chunks, self.tokens = chunks, sum(chunk.tokens for chunk in chunks)
        self.version += 1

    @property
    def nbytes(self) -> int:
        """Bytes of all streams, those that sequences share counted once."""
        streams = {id(s): len(s) for chunk in self.chunks for s in (*chunk.keys, *chunk.values)}
        return sum(streams.values())

    def decode(self, keys: Any, values: Any) -> None:
        """Fill [sequences, heads, tokens, head_dim] of any strides whose last dimension is contiguous."""
        raise NotImplementedError

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        """A stream for each sequence."""
        raise NotImplementedError

    def _targets(self, keys: Any, values: Any) -> list[tuple[Any, Any, tuple[int, int] | None]]:
        """Each stream, where it is decoded to, and which of its tokens are wanted (None: all)."""
        found, at = [], 0
        for chunk in self.chunks:
            part = None if chunk.tokens == chunk.stored else (0, chunk.tokens)
            for streams, out in ((chunk.keys, keys), (chunk.values, values)):
                found += [(stream, out[row, :, at : at + chunk.tokens], part) for row, stream in enumerate(streams)]
            at += chunk.tokens
        return found


class OnCPU(OldTokens):
    """Of tensors of the CPU, in its memory."""

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        return [codec.encode(one, nonfinite="exact", **self.coding.options(role)) for one in x]

    def decode(self, keys: Any, values: Any) -> None:
        for stream, out, part in self._targets(keys, values):
            codec.decode(stream, out=out, tokens=part, backend=self.coding.backend)


class OnDevice(OldTokens):
    """Of a GPU's tensors, on that GPU."""

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        batch = EncodeBatch([*x], **self.coding.options(role))
        streams = batch.run()
        batch.check()
        return [self._kept(header, stream) for header, stream in zip(batch.headers, streams, strict=True)]

    def _kept(self, header: Header, stream: Any) -> Stream:
        return Stream(header, Home(stream, stream.numel()), 0)

    def decode(self, keys: Any, values: Any) -> None:
        self._run(keys, values, self.number, self.version, lambda stream: stream.data)

    def _run(self, keys: Any, values: Any, name: Any, version: Any, lying: Callable[[Stream], Any]) -> None:
        """Launch what was prepared for a name, or prepare it: ``lying`` tells where on the device a stream is."""
        signature = (version, *((x.data_ptr(), x.shape, x.stride()) for x in (keys, values)))
        self.shop.prepared(name, signature, lambda: self._batches(keys, values, lying)).run()

    def _batches(self, keys: Any, values: Any, lying: Callable[[Stream], Any]) -> list[DecodeBatch]:
        """One for all streams that are wanted whole, and one for each length to which others are cut."""
        parts: dict[Any, list[tuple[Any, Any]]] = {}
        for stream, out, part in self._targets(keys, values):
            parts.setdefault(part, []).append((lying(stream), out))
        return [
            DecodeBatch([s for s, _ in pairs], outs=[o for _, o in pairs], tokens=part, backend=self.coding.backend)
            for part, pairs in parts.items()
        ]


class OnHost(OnDevice):
    """Of a GPU's tensors, in pinned memory of the host."""

    def __init__(self, coding: Coding, shop: Workshop) -> None:
        super().__init__(coding, shop)
        self.homes: list[Home] = []
        self.stored = shop.staging.event()  # behind the last copy to the host
        self._layout: tuple[int, int] = (-1, 0)  # version, number
        shop.staging.layers.append(self)

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        streams = super()._encode(role, x)
        self.stored.record()
        return streams

    def _kept(self, header: Header, stream: Any) -> Stream:
        start = self.homes[-1].take(header.stream_bytes) if self.homes else None
        if start is None:
            taken = sum(home.used for home in self.homes)
            self.homes.append(Home(self.shop.pinned(max(2 * aligned(header.stream_bytes), taken, _HOME_BYTES))))
            start = self.homes[-1].take(header.stream_bytes)
        assert start is not None
        kept = Stream(header, self.homes[-1], start)
        kept.data.copy_(stream, non_blocking=True)
        return kept

    def _now(self, chunks: list[Chunk]) -> None:
        super()._now(chunks)
        used = {id(s.home) for chunk in chunks for s in (*chunk.keys, *chunk.values)}
        self.homes = [home for home in self.homes if id(home) in used]

    def places(self) -> tuple[dict[int, int], int]:
        """Where each home begins in a slot, by its identity, and the bytes of all."""
        starts, at = {}, 0
        for home in self.homes:
            starts[id(home)] = at
            at = aligned(at + home.used)
        return starts, at

    def layout(self) -> int:
        """A number that layers share whose streams are of the same kinds and lie at the same places of a slot."""
        if self._layout[0] != self.version:
            starts, _ = self.places()
            told = tuple(
                (s.header, starts[id(s.home)] + s.start, chunk.tokens)
                for chunk in self.chunks
                for s in (*chunk.keys, *chunk.values)
            )
            self._layout = self.version, self.shop.number_of(told)
        return self._layout[1]

    def decode(self, keys: Any, values: Any) -> None:
        staging = self.shop.staging
        slot = staging.load(self)
        staging.prefetch_behind(self)
        starts, _ = self.places()
        slot.ready.wait()
        self._run(
            keys,
            values,
            (slot.number, self.layout()),
            slot.buffer.data_ptr(),
            lambda s: slot.buffer[starts[id(s.home)] + s.start :][: len(s)],
        )
        slot.free.record()


class NoEvent:
    """What a CPU needs in the place of a CUDA event."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...


@dataclass
class Slot:
    """Memory on the device that one layer's streams are copied to."""

    number: int
    ready: Any  # the event behind the copy
    free: Any  # ... and the one behind the last decoding from here
    buffer: Any = None
    holds: tuple[int, int] = (-1, -1)  # number and version of the layer's OldTokens


class Staging:
    """Two slots, which the layers' streams are copied to by turns, on a stream of their own."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self.layers: list[OnHost] = []
        self._side = _side_stream(shop.device)
        self._slots = [Slot(number, self.event(), self.event()) for number in range(2)]
        self._last = self._slots[1]  # that was decoded from

    def event(self) -> Any:
        import torch

        return torch.cuda.Event() if self._shop.device.type == "cuda" else NoEvent()

    @property
    def nbytes(self) -> int:
        return sum(0 if slot.buffer is None else slot.buffer.numel() for slot in self._slots)

    def load(self, layer: OnHost) -> Slot:
        """The slot that a layer's streams are in, or are being copied to from now on: behind ``ready``."""
        self._last = self._slot(layer)
        return self._last

    def prefetch_behind(self, layer: OnHost) -> None:
        """Begin to copy what the layer behind this one has; behind the last comes the first."""
        at = self.layers.index(layer)
        following = next((other for other in (*self.layers[at + 1 :], *self.layers[:at]) if other.chunks), None)
        if following is not None:
            self._slot(following)

    def _slot(self, layer: OnHost) -> Slot:
        """The slot that holds a layer's streams; if none does, they are copied to the one that was not used last."""
        holds = (layer.number, layer.version)
        slot = next((slot for slot in self._slots if slot.holds == holds), None)
        if slot is None:
            slot = self._slots[1 - self._last.number]
            self._copy(layer, slot)
        return slot

    def _copy(self, layer: OnHost, slot: Slot) -> None:
        starts, size = layer.places()
        if slot.buffer is None or slot.buffer.numel() < size:
            slot.ready.wait()
            slot.buffer = None
            self._shop.forget(slot.number)
            slot.buffer = self._shop.empty(size + int(size * _SPARE) + _HOME_BYTES // 4)
            slot.free.record()
        slot.holds = (layer.number, layer.version)
        with self._side():
            slot.free.wait()
            layer.stored.wait()
            for home in layer.homes:
                at = starts[id(home)]
                slot.buffer[at : at + home.used].copy_(home.tensor[: home.used], non_blocking=True)
            slot.ready.record()


def _side_stream(device: Any) -> Callable[[], Any]:
    """Makes a context in which copies are issued beside the current stream."""
    import contextlib

    import torch

    if device.type != "cuda":
        return contextlib.nullcontext
    stream = torch.cuda.Stream(device)
    return lambda: torch.cuda.stream(stream)


class Launches:
    """Batches that are run again and again."""

    def __init__(self, signature: Any, batches: list[DecodeBatch], device: Any) -> None:
        self.signature, self._batches = signature, batches
        self.run = Replayed(self._launch, device, _PLAIN_RUNS)

    def _launch(self) -> None:
        for batch in self._batches:
            batch.run()


@dataclass
class Workshop:
    """What the layers of one device share: scratch, slots, and launches that are prepared."""

    device: Any
    staging: Staging = field(init=False)
    _launches: dict[Any, Launches] = field(default_factory=dict)
    _layouts: dict[Any, int] = field(default_factory=dict)
    _rooms: dict[Any, int] = field(default_factory=dict)
    _scratch: Any = None

    def __post_init__(self) -> None:
        self.staging = Staging(self)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, of scratch and slots."""
        return self.staging.nbytes + (0 if self._scratch is None else self._scratch.numel())

    def empty(self, size: int) -> Any:
        import torch

        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Any:
        import torch

        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def old_tokens(self, place: str, coding: Coding) -> OldTokens:
        """Nothing yet, of tensors of this device."""
        if self.device.type == "cpu" and coding.backend not in ON_DEVICE:
            return OnCPU(coding, self)
        kinds: dict[str, type[OldTokens]] = {"host": OnHost, "device": OnDevice}
        return kinds[place](coding, self)

    def scratch(self, keys: Any, values: Any, tokens: int) -> tuple[Any, Any]:
        """Room for all tokens of a layer whose new ones are [sequences, heads, n, head_dim]; until the next layer takes it."""
        shapes = [(x.shape[0], x.shape[1], x.shape[3]) for x in (keys, values)]
        kind = (keys.dtype, *shapes)
        if tokens > self._rooms.get(kind, 0):
            self._rooms[kind] = tokens + max(int(tokens * _SPARE), _SPARE_TOKENS)
        room = self._rooms[kind]
        sizes = [aligned(b * h * room * d * keys.element_size()) for b, h, d in shapes]
        if self._scratch is None or self._scratch.numel() < sum(sizes):
            self._launches.clear()  # they hold on to the old one
            self._scratch = None
            self._scratch = self.empty(sum(sizes))
        parts = self._scratch[: sum(sizes)].split(sizes)
        both = (
            part.view(keys.dtype)[: b * h * room * d].view(b, h, room, d)[:, :, :tokens]
            for part, (b, h, d) in zip(parts, shapes, strict=True)
        )
        found_keys, found_values = both
        return found_keys, found_values

    def prepared(self, name: Any, signature: Any, make: Callable[[], list[DecodeBatch]]) -> Launches:
        """The launches of a name, made anew when its signature has changed."""
        found = self._launches.get(name)
        if found is None or found.signature != signature:
            if len(self._launches) >= _MOST_BATCHES:
                self._launches.clear()
            self._launches[name] = found = Launches(signature, make(), self.device)
        return found

    def forget(self, slot: int) -> None:
        """Let go of what was prepared for a slot whose memory goes."""
        gone = [name for name in self._launches if isinstance(name, tuple) and name[0] == slot]
        for name in gone:
            del self._launches[name]

    def number_of(self, layout: Any) -> int:
        if len(self._layouts) >= _MOST_BATCHES:
            self._layouts.clear()
        return self._layouts.setdefault(layout, next(_numbers))


def checked_place(place: str) -> str:
    if place not in PLACES:
        raise InvalidArgument(f"place {place!r} is unknown; choose from {', '.join(PLACES)}")
    return place
