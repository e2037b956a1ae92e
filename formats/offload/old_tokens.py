"""Law: old tokens of one attention layer, kept as streams and decoded in place; where the streams lie is a class each.

Tokens come in chunks. A sequence's keys and its values of a chunk are one stream each [heads, tokens, head_dim], so a batch
is reordered by exchanging references, and sequences that share a beginning share its streams. ``OnDevice`` keeps streams on
the GPU; ``OnHost`` in pinned memory (``staging``); ``OnCPU`` is for tensors of the CPU. Layers know of their ``Workshop``, and
it not of them, so that the memory of a cache goes with it. Nothing here waits for the device but the encoder's check for NaN
and Inf.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pqcodec import codec
from pqcodec.backends import ON_DEVICE
from pqcodec.batch import DecodeBatch, EncodeBatch
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.launches import Launch, Pair, Prepared
from pqcodec.formats.offload.staging import SPARE, Home, Homes, Slot, Staging, memory
from pqcodec.placed import aligned
from pqcodec.stages.centre import Rope
from pqcodec.stream.header import Header

PLACES = ("host", "device")
_SPARE_TOKENS = 256  # of the scratch, at least
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
    def place(self) -> int:
        """Where it begins in a slot."""
        return self.home.place + self.start

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
        self.shop.forget(self.number)

    @property
    def nbytes(self) -> int:
        """Bytes of all streams, those that sequences share counted once."""
        streams = {id(s): len(s) for chunk in self.chunks for s in (*chunk.keys, *chunk.values)}
        return sum(streams.values())

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        """Fill ``whole`` [sequences, heads, room, head_dim] from its first token on: ``before``, the old tokens, ``behind``.

        On a GPU this is one launch, as long as the old tokens stay the same and these very tensors are given; a pair is told by
        its identity.
        """
        raise NotImplementedError

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        """A stream for each sequence."""
        raise NotImplementedError

    def _targets(self, whole: Pair, begin: int) -> list[tuple[Any, Any, tuple[int, int] | None]]:
        """Each stream, where it is decoded to behind ``begin`` tokens, and which of its tokens are wanted (None: all)."""
        found, at = [], begin
        for chunk in self.chunks:
            part = None if chunk.tokens == chunk.stored else (0, chunk.tokens)
            for streams, out in zip((chunk.keys, chunk.values), whole, strict=True):
                found += [(stream, out[row, :, at : at + chunk.tokens], part) for row, stream in enumerate(streams)]
            at += chunk.tokens
        return found

    def _copies(self, whole: Pair, before: Pair, behind: Pair) -> list[tuple[Any, Any]]:
        """What is copied beside the old tokens: (target, source)."""
        found, at = [], 0
        for part, behind_it in ((before, self.tokens), (behind, 0)):
            tokens = int(part[0].shape[-2])
            found += [(out[:, :, at : at + tokens], x) for out, x in zip(whole, part, strict=True)]
            at += tokens + behind_it
        return found


class OnCPU(OldTokens):
    """Of tensors of the CPU, in its memory."""

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        return [codec.encode(one, nonfinite="exact", **self.coding.options(role)) for one in x]

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        for stream, out, part in self._targets(whole, int(before[0].shape[-2])):
            codec.decode(stream, out=out, tokens=part, backend=self.coding.backend)
        for target, source in self._copies(whole, before, behind):
            target.copy_(source)


class OnDevice(OldTokens):
    """Of a GPU's tensors, on that GPU."""

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        batch = EncodeBatch([*x], **self.coding.options(role))
        streams = batch.run()
        batch.check()
        return [self._kept(header, stream) for header, stream in zip(batch.headers, streams, strict=True)]

    def _kept(self, header: Header, stream: Any) -> Stream:
        return Stream(header, Home(stream, stream.numel()), 0)

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        prepared = self.shop.resident
        launch = prepared.launches.get(self.number)
        if launch is None or not launch.fills(whole, before, behind):
            lying = {stream: stream.data for stream in self._streams()}
            launch = self._launch(prepared, whole, before, behind, self._batches(whole, before, lying))
        launch.run()

    def _streams(self) -> list[Stream]:
        return [stream for chunk in self.chunks for stream in (*chunk.keys, *chunk.values)]

    def _launch(self, prepared: Prepared, whole: Pair, before: Pair, behind: Pair, batches: Sequence[DecodeBatch]) -> Launch:
        launch = Launch((whole, before, behind), batches, self._copies(whole, before, behind), self.shop.device)
        prepared.launches[self.number] = launch
        return launch

    def _batches(self, whole: Pair, before: Pair, lying: Mapping[Stream, Any]) -> list[DecodeBatch]:
        """One for all streams that are wanted whole, and one for each length to which others are cut.

        ``lying``: the bytes of each stream on the device.
        """
        parts: dict[Any, list[tuple[Any, Any]]] = {}
        for stream, out, part in self._targets(whole, int(before[0].shape[-2])):
            parts.setdefault(part, []).append((lying[stream], out))
        return [
            DecodeBatch([s for s, _ in pairs], outs=[o for _, o in pairs], tokens=part, backend=self.coding.backend)
            for part, pairs in parts.items()
        ]


class OnHost(OnDevice):
    """Of a GPU's tensors, in pinned memory of the host."""

    def __init__(self, coding: Coding, shop: Workshop) -> None:
        super().__init__(coding, shop)
        self.homes = Homes(shop.device)
        shop.staging.layers.append(self.homes)

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        streams = super()._encode(role, x)
        self.homes.stored.record()
        return streams

    def _kept(self, header: Header, stream: Any) -> Stream:
        kept = Stream(header, *self.homes.take(header.stream_bytes))
        kept.data.copy_(stream, non_blocking=True)
        return kept

    def _now(self, chunks: list[Chunk]) -> None:
        super()._now(chunks)
        if self.homes.settle(stream.home for stream in self._streams()):
            self.shop.staging.forget(self.homes)

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        staging = self.shop.staging
        current = staging.current()
        slot = staging.load(self.homes, current)
        staging.prefetch_behind(self.homes, current)
        launch = slot.prepared.launches.get(self.number)
        slot.ready.wait(current)
        if launch is None or not launch.fills(whole, before, behind):
            launch = self._launch(slot.prepared, whole, before, behind, self._shared(slot, whole, before))
        launch.run(current)
        slot.free.record(current)

    def _shared(self, slot: Slot, whole: Pair, before: Pair) -> Sequence[DecodeBatch]:
        """Batches for all layers whose streams are of the same kinds and lie at the same places of a slot.

        Made behind ``ready``: they read the headers.
        """
        layout = (
            int(before[0].shape[-2]),
            *((chunk.tokens, *((s.header, s.place) for s in (*chunk.keys, *chunk.values))) for chunk in self.chunks),
        )
        batches = slot.prepared.batches(layout)
        if batches is None:
            lying = {s: slot.buffer[s.place : s.place + len(s)] for s in self._streams()}
            batches = self._batches(whole, before, lying)
            slot.prepared.share(layout, batches)
        return batches


class Kind(NamedTuple):
    """Of a layer's tensors, whatever their tokens; shapes: (sequences, heads, head_dim)."""

    dtypes: tuple[Any, Any]  # of keys and of values: they differ under autocast
    keys: tuple[int, int, int]
    values: tuple[int, int, int]

    @classmethod
    def of(cls, keys: Any, values: Any) -> Kind:
        return cls((keys.dtype, values.dtype), *((x.shape[0], x.shape[1], x.shape[3]) for x in (keys, values)))


@dataclass
class Workshop:
    """What the layers of one device share: scratch, slots, and launches that are prepared."""

    device: Any
    staging: Staging = field(init=False)
    resident: Prepared = field(default_factory=Prepared)  # for streams that lie on the device
    _scratch: Any = None
    _rooms: dict[Kind, Pair] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.staging = Staging(self.device)

    def __getstate__(self) -> tuple[Any, list[Homes]]:
        """A copy begins with nothing prepared: what is prepared knows the addresses of memory that is not the copy's."""
        return self.device, self.staging.layers

    def __setstate__(self, state: tuple[Any, list[Homes]]) -> None:
        new = Workshop(state[0])
        new.staging.layers = state[1]
        vars(self).update(vars(new))

    @property
    def nbytes(self) -> int:
        """Bytes on the device, of scratch and slots."""
        return self.staging.nbytes + (0 if self._scratch is None else self._scratch.numel())

    def old_tokens(self, place: str, coding: Coding) -> OldTokens:
        """Nothing yet, of tensors of this device."""
        if self.device.type == "cpu" and coding.backend not in ON_DEVICE:
            return OnCPU(coding, self)
        kinds: dict[str, type[OldTokens]] = {"host": OnHost, "device": OnDevice}
        return kinds[place](coding, self)

    def scratch(self, kind: Kind, tokens: int) -> Pair:
        """Room for at least so many tokens of a layer, until the next one takes it; the same pair as long as it is enough."""
        if kind not in self._rooms or self._rooms[kind][0].shape[2] < tokens:
            self._lay_out(kind, tokens + max(int(tokens * SPARE), _SPARE_TOKENS))
        return self._rooms[kind]

    def _lay_out(self, kind: Kind, tokens: int) -> None:
        """Nobody may hold on to the old scratch here: there is no room for both."""
        import torch

        shapes = [(b, h, tokens, d) for b, h, d in (kind.keys, kind.values)]
        sizes = [aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in zip(shapes, kind.dtypes, strict=True)]
        for prepared in self._prepared():
            prepared.clear()
        if self._scratch is None or self._scratch.numel() < sum(sizes):
            self._rooms.clear()
            self._scratch = None
            self._scratch = memory(sum(sizes), self.device)
        with torch.inference_mode(False):
            parts = self._scratch[: sum(sizes)].split(sizes)
            keys, values = (
                part.view(dtype)[: math.prod(shape)].view(shape)
                for part, dtype, shape in zip(parts, kind.dtypes, shapes, strict=True)
            )
        self._rooms[kind] = keys, values

    def forget(self, layer: int) -> None:
        """Let go of what was prepared for a layer's old tokens, which are others now."""
        for prepared in self._prepared():
            prepared.launches.pop(layer, None)

    def _prepared(self) -> list[Prepared]:
        return [self.resident, *(slot.prepared for slot in self.staging.slots)]


def checked_place(place: str) -> str:
    if place not in PLACES:
        raise InvalidArgument(f"place {place!r} is unknown; choose from {', '.join(PLACES)}")
    return place
