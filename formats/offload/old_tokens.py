"""Law: the older tokens of one attention layer, kept as streams and decoded again at each step; a class for each place.

Tokens come in chunks. Of a chunk, each sequence's keys are one stream [heads, tokens, head_dim] and its values another. So a
batch is reordered by exchanging references to streams, and sequences with the same beginning share the streams of it.
``OnDevice`` keeps streams on the GPU, ``OnHost`` in pinned memory, and ``OnCPU`` is for tensors of the CPU. Nothing here waits
for the device, except the encoder's check for NaN and Inf.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pqcodec import codec
from pqcodec.backends import ON_DEVICE
from pqcodec.batch import DecodeBatch, EncodeBatch
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats.offload.graphs import Launch, Pair, Parts, PreparedLaunches
from pqcodec.formats.offload.pinned import GrowingArena, Region
from pqcodec.formats.offload.staging import Slot
from pqcodec.formats.offload.workspace import Workspace
from pqcodec.options import EncodeOptions
from pqcodec.stream.header import Header

PLACES = ("host", "device")
_ADVICE = "mend what the model computes; on a GPU only a DynamicCache keeps such vectors"
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream of a GPU's tensor: its bytes begin at byte ``start`` of a region, on the GPU or in pinned memory."""

    header: Header
    region: Region
    start: int

    @property
    def stop(self) -> int:
        """The byte of the region behind the stream."""
        return self.start + self.header.stream_bytes

    @property
    def slot_offset(self) -> int:
        """The byte of a slot's buffer where the stream begins, once its layer has been copied there."""
        return self.region.offset + self.start

    @property
    def data(self) -> Any:
        """The stream's bytes where they are kept: uint8 [stream_bytes], a view."""
        return self.region.tensor[self.start : self.stop]

    def __len__(self) -> int:
        return self.header.stream_bytes


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of every sequence: one stream of keys and one of values for each sequence.

    ``stored``: tokens in each stream. ``tokens``: how many of these, from the first on, the layer still has.
    """

    stored: int
    tokens: int
    keys: Sequence[Any]
    values: Sequence[Any]

    def select(self, rows: Sequence[int]) -> Chunk:
        """The chunk of a batch that consists of sequences ``rows`` of this one; streams are shared, not copied."""
        return replace(self, keys=[self.keys[row] for row in rows], values=[self.values[row] for row in rows])


class OldTokens:
    """The encoded chunks of one layer, oldest first.

    ``options``: how "keys" and "values" are encoded. ``tokens``: in all chunks, of each sequence. ``number``: of this object,
    which no other has.
    """

    def __init__(self, options: Mapping[str, EncodeOptions], backend: str, workspace: Workspace) -> None:
        self.options, self.backend, self.workspace = options, backend, workspace
        self.chunks: list[Chunk] = []
        self.tokens = 0
        self.number = next(_numbers)

    def append(self, keys: Any, values: Any) -> None:
        """Encode tokens [sequences, heads, tokens, head_dim] as a chunk behind the others.

        On a GPU this waits for the encoder, and raises NonFiniteInput if a number is NaN or Inf.
        """
        tokens = int(keys.shape[-2])
        streams = [self._encode(role, x) for role, x in (("keys", keys), ("values", values))]
        self._set([*self.chunks, Chunk(tokens, tokens, *streams)])

    def select(self, rows: Sequence[int]) -> None:
        """Make the batch one of sequences ``rows`` of it; the same one may be taken several times."""
        self._set([chunk.select(rows) for chunk in self.chunks])

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens`` of each sequence; a stream that is cut stays whole in memory, and is decoded in part."""
        kept, left = [], tokens
        for chunk in self.chunks:
            if left > 0:
                kept.append(replace(chunk, tokens=min(chunk.tokens, left)))
            left -= chunk.tokens
        self._set(kept)

    def _set(self, chunks: list[Chunk]) -> None:
        self.chunks, self.tokens = chunks, sum(chunk.tokens for chunk in chunks)
        self.workspace.forget(self.number)

    @property
    def nbytes(self) -> int:
        """Bytes of all streams; a stream that sequences share counts once."""
        streams = {id(s): len(s) for chunk in self.chunks for s in (*chunk.keys, *chunk.values)}
        return sum(streams.values())

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        """Fill ``whole`` [sequences, heads, room, head_dim] from its first token on: ``before``, the old tokens, ``behind``.

        On a GPU this is one launch, as long as the old tokens stay the same and the three pairs are the same objects.
        """
        raise NotImplementedError

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        """Encode the "keys" or the "values" of all sequences, into one stream each."""
        raise NotImplementedError

    def _arguments(self, role: str) -> dict[str, Any]:
        """The arguments that ``encode`` and ``EncodeBatch`` share."""
        how = self.options[role]
        return {"preset": how.preset, "center": how.center, "rope": how.rope, "seed": how.seed, "backend": self.backend}

    def _targets(
        self, whole: Pair, begin: int, chunks: Sequence[Chunk] | None = None
    ) -> list[tuple[Any, Any, tuple[int, int] | None]]:
        """(stream, the view that it is decoded into, its tokens that are wanted or None for all) of each stream.

        The first old token goes to token ``begin`` of ``whole``. ``chunks``: others than those that are kept now.
        """
        found, at = [], begin
        for chunk in self.chunks if chunks is None else chunks:
            part = None if chunk.tokens == chunk.stored else (0, chunk.tokens)
            for streams, out in zip((chunk.keys, chunk.values), whole, strict=True):
                found += [(stream, out[row, :, at : at + chunk.tokens], part) for row, stream in enumerate(streams)]
            at += chunk.tokens
        return found

    def _copies(self, whole: Pair, before: Pair, behind: Pair) -> list[tuple[Any, Any]]:
        """(target, source) of the exact tokens, which are copied to both sides of the old ones."""
        found, at = [], 0
        for part, behind_it in ((before, self.tokens), (behind, 0)):
            tokens = int(part[0].shape[-2])
            found += [(out[:, :, at : at + tokens], x) for out, x in zip(whole, part, strict=True)]
            at += tokens + behind_it
        return found


class OnCPU(OldTokens):
    """Old tokens of tensors of the CPU: streams are bytes in its memory, and vectors with NaN or Inf are kept as they are."""

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        return [codec.encode(one, nonfinite="exact", **self._arguments(role)) for one in x]

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        """Decode stream by stream, then copy the exact tokens; see ``OldTokens.decode``."""
        self.decode_chunks(self.chunks, whole, int(before[0].shape[-2]))
        for target, source in self._copies(whole, before, behind):
            target.copy_(source)

    def decode_chunks(self, chunks: Sequence[Chunk], whole: Pair, begin: int) -> None:
        """Decode some chunks into ``whole``, from token ``begin`` on."""
        for stream, out, part in self._targets(whole, begin, chunks):
            codec.decode(stream, out=out, tokens=part, backend=self.backend)


class OnDevice(OldTokens):
    """Old tokens of a GPU's tensors, whose streams stay on that GPU."""

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        batch = EncodeBatch([*x], **self._arguments(role))
        streams = batch.run()
        try:
            batch.check()
        except NonFiniteInput as error:
            raise NonFiniteInput(f"{role}: {error.found}", _ADVICE) from None
        return [self._kept(header, stream) for header, stream in zip(batch.headers, streams, strict=True)]

    def _kept(self, header: Header, stream: Any) -> Stream:
        return Stream(header, Region(stream, stream.numel()), 0)

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        """Decode from where the streams are kept, in one launch; see ``OldTokens.decode``."""
        prepared = self.workspace.resident
        launch = prepared.launch(self.number, (whole, before, behind))
        if launch is None:
            data = {stream: stream.data for stream in self._streams()}
            launch = self._launch(prepared, (whole, before, behind), self._batches(whole, int(before[0].shape[-2]), data))
        launch()

    def _streams(self) -> list[Stream]:
        return [stream for chunk in self.chunks for stream in (*chunk.keys, *chunk.values)]

    def _launch(self, prepared: PreparedLaunches, parts: Parts, batches: Sequence[DecodeBatch]) -> Launch:
        launch = Launch(partial(_fill, batches, self._copies(*parts)), self.workspace.device)
        prepared.keep_launch(self.number, parts, launch)
        return launch

    def decode_chunks(self, chunks: Sequence[Chunk], whole: Pair, begin: int) -> None:
        """Decode some chunks into ``whole``, from token ``begin`` on; nothing is prepared for another time."""
        data = {stream: stream.data for chunk in chunks for stream in (*chunk.keys, *chunk.values)}
        _fill(self._batches(whole, begin, data, chunks), [])

    def _batches(
        self, whole: Pair, begin: int, data: Mapping[Stream, Any], chunks: Sequence[Chunk] | None = None
    ) -> list[DecodeBatch]:
        """One batch for all streams that are decoded whole, and one for each length to which others are cut.

        ``data``: the bytes of each stream on the device; ``begin``, ``chunks``: as in ``_targets``.
        """
        parts: dict[Any, list[tuple[Any, Any]]] = {}
        for stream, out, part in self._targets(whole, begin, chunks):
            parts.setdefault(part, []).append((data[stream], out))
        return [
            DecodeBatch([s for s, _ in pairs], outs=[o for _, o in pairs], tokens=part, backend=self.backend)
            for part, pairs in parts.items()
        ]


def _fill(batches: Sequence[DecodeBatch], copies: Sequence[tuple[Any, Any]]) -> None:
    for batch in batches:
        batch.run()
    for target, source in copies:
        target.copy_(source)


class OnHost(OnDevice):
    """Old tokens of a GPU's tensors, whose streams are kept in pinned memory and copied to a slot before they are decoded."""

    def __init__(self, options: Mapping[str, EncodeOptions], backend: str, workspace: Workspace) -> None:
        super().__init__(options, backend, workspace)
        self.arena = GrowingArena(workspace.device)
        workspace.staging.layers.append(self.arena)

    def _encode(self, role: str, x: Any) -> Sequence[Any]:
        streams = super()._encode(role, x)
        self.arena.stored.record()
        return streams

    def _kept(self, header: Header, stream: Any) -> Stream:
        kept = Stream(header, *self.arena.take(header.stream_bytes))
        kept.data.copy_(stream, non_blocking=True)
        return kept

    def _set(self, chunks: list[Chunk]) -> None:
        super()._set(chunks)
        if self.arena.keep(stream.region for stream in self._streams()):
            self.workspace.staging.forget(self.arena)

    def decode(self, whole: Pair, before: Pair, behind: Pair) -> None:
        """Decode from a slot, and begin to copy the next layer's streams to the other one; see ``OldTokens.decode``."""
        staging = self.workspace.staging
        current = staging.current()
        slot = staging.load(self.arena, current)
        staging.prefetch_behind(self.arena, current)
        launch = slot.decodings.launch(self.number, (whole, before, behind))
        slot.ready.wait(current)
        if launch is None:
            launch = self._launch(slot.decodings, (whole, before, behind), self._shared(slot, whole, before))
        launch(current)
        slot.free.record(current)

    def _shared(self, slot: Slot, whole: Pair, before: Pair) -> Sequence[DecodeBatch]:
        """Batches for all layers whose streams have the same headers and the same offsets in a slot.

        They are made behind the slot's ``ready``, because making them reads the headers.
        """
        layout = (
            int(before[0].shape[-2]),
            *((chunk.tokens, *((s.header, s.slot_offset) for s in (*chunk.keys, *chunk.values))) for chunk in self.chunks),
        )
        batches = slot.decodings.batches(layout)
        if batches is None:
            data = {s: slot.buffer[s.slot_offset : s.slot_offset + len(s)] for s in self._streams()}
            batches = self._batches(whole, int(before[0].shape[-2]), data)
            slot.decodings.keep_batches(layout, batches)
        return batches


def old_tokens_in(place: str, options: Mapping[str, EncodeOptions], backend: str, workspace: Workspace) -> OldTokens:
    """No tokens yet, of a layer whose tensors are on the workspace's device; the arguments are those of ``OldTokens``.

    ``place``: "host" or "device". Tensors of the CPU have one place only.
    """
    if workspace.device.type == "cpu" and backend not in ON_DEVICE:
        return OnCPU(options, backend, workspace)
    classes: dict[str, type[OldTokens]] = {"host": OnHost, "device": OnDevice}
    return classes[place](options, backend, workspace)


def checked_place(place: str) -> str:
    """``place``; raises InvalidArgument if it is not one of PLACES."""
    if place not in PLACES:
        raise InvalidArgument(f"place {place!r} is unknown; choose from {', '.join(PLACES)}")
    return place
