"""Law: the tokens that queries on a device attend to: streams one behind another, exact ones before, behind and within them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pqcodec.backends import installed
from pqcodec.batch import DecodeBatch
from pqcodec.placed import Placed
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.stream.index import Bounds, checked_range, stream_parts

if TYPE_CHECKING:
    from pqcodec.kernels.on_triton.attending import CodedSegment, ExactSegment

STEP = 4096  # tokens that are decoded at once
Pair = tuple[Any, Any]  # keys and values
Streams = tuple[Placed, ...]  # keys, and values where they are asked for, of the same tokens


class WantedTokens(NamedTuple):
    """Some tokens of streams of a sequence."""

    streams: Streams
    tokens: Bounds  # of the streams
    position: int  # of the streams' first token in the sequence; below 0 where tokens before are not asked for

    def within(self, tokens: Bounds) -> WantedTokens:
        """Those of its tokens that are among others of the streams."""
        low = max(self.tokens[0], tokens[0])
        return self._replace(tokens=(low, max(low, min(self.tokens[1], tokens[1]))))


@dataclass(frozen=True)
class AttendedTokens:
    """The tokens of some sequences: ``first``, those of their streams, ``recent``.

    ``first``, ``recent``: keys and values [sequences, kv_heads, n, head_dim], or keys alone where only scores are asked for.
    """

    parts: Sequence[Sequence[WantedTokens]]  # of each sequence
    first: Sequence[Any]
    recent: Sequence[Any]

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[Streams]], wanted: Bounds | None, first: Sequence[Any], recent: Sequence[Any]
    ) -> AttendedTokens:
        """Of each sequence the ``wanted`` tokens of its streams, or all; raises InvalidArgument."""
        at = first[0].shape[2] if first else 0
        return cls([list(_parts(streams, wanted, at)) for streams in sequences], first, recent)

    @property
    def headers(self) -> list[Header]:
        """Of all streams of which tokens are wanted."""
        return [placed.header for parts in self.parts for part in parts for placed in part.streams]

    @property
    def before(self) -> int:
        """Tokens before those of the streams."""
        return self.first[0].shape[2] if self.first else 0

    @property
    def behind(self) -> int:
        """Tokens behind those of the streams."""
        return self.recent[0].shape[2] if self.recent else 0

    @property
    def streamed(self) -> list[int]:
        """Tokens of each sequence's streams that are wanted."""
        return [sum(part.tokens[1] - part.tokens[0] for part in parts) for parts in self.parts]

    @property
    def totals(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.before + count + self.behind for count in self.streamed]


def _parts(streams: Sequence[Streams], wanted: Bounds | None, at: int) -> Iterator[WantedTokens]:
    """The streams that hold some of the wanted tokens, the first of which stands at position ``at``."""
    counts = [each[0].header.tokens for each in streams]
    first, last = checked_range("tokens", wanted, sum(counts))
    for number, tokens, before in stream_parts(counts, (first, last)):
        yield WantedTokens(streams[number], tokens, at + before - first)


# -- as Triton's kernels take them -------------------------------------------------------------------------------------
def why_not_triton(headers: Sequence[Header], backend: str) -> str | None:
    """Why Triton's kernels do not read the codes of streams of such headers; None where they do."""
    if backend != "triton":
        return f"backend {backend!r} is asked for, not 'triton'"
    if not installed("triton"):
        return "triton is not installed"
    from pqcodec.kernels.on_triton.attending import why_not

    return why_not(headers)


def coded_and_exact(tokens: AttendedTokens, backend: str) -> tuple[list[CodedSegment], list[ExactSegment]]:
    """The parts of all sequences that are coded, and those that are exact in keys or values.

    What is coded only in the other of these is decoded here, once.
    """
    from pqcodec.kernels.on_triton.attending import CodedSegment, ExactSegment

    coded, exact = [], []
    for number, parts in enumerate(tokens.parts):
        if tokens.first:
            exact.append(ExactSegment(number, *_pair([x[number] for x in tokens.first])))
        for part in parts:
            begin = max(placed.header.first_tokens for placed in part.streams)
            before, behind = part.within((0, begin)), part.within((begin, part.tokens[1]))
            if before.tokens[0] < before.tokens[1]:
                exact.append(ExactSegment(number, *_pair(_decoded(before, backend)), part.position + before.tokens[0]))
            skipped = None
            if behind.tokens[0] < behind.tokens[1] and any(placed.exceptions for placed in part.streams):
                skipped, vectors = _exact_vectors(behind, number, backend)
                exact += vectors
            if behind.tokens[0] < behind.tokens[1]:
                coded.append(CodedSegment(number, *_pair(part.streams), behind.tokens, part.position, skipped))
        if tokens.recent:
            exact.append(
                ExactSegment(number, *_pair([x[number] for x in tokens.recent]), tokens.totals[number] - tokens.behind)
            )
    return coded, exact


def _pair(many: Sequence[Any]) -> tuple[Any, Any]:
    """Keys and values, None where there are only keys."""
    return many[0], many[1] if len(many) > 1 else None


def _decoded(part: WantedTokens, backend: str) -> list[Any]:
    """The part's tokens as tensors [leading, n, head_dim] of the streams' dtypes."""
    batch = DecodeBatch([placed.keeps for placed in part.streams], tokens=part.tokens, backend=backend)
    outs = zip(batch.run(), part.streams, strict=True)
    return [out.reshape(placed.header.leading, -1, placed.header.head_dim) for out, placed in outs]


def _exact_vectors(part: WantedTokens, sequence: int, backend: str) -> tuple[Any, list[ExactSegment]]:
    """Where in the part keys or values are exact vectors, uint8 [leading, tokens of the streams], and what stands there."""
    import torch

    from pqcodec.kernels.on_triton.attending import ExactSegment

    h, device = part.streams[0].header, part.streams[0].keeps.device
    found = np.zeros((h.leading, h.tokens), np.bool_)
    for placed in part.streams:
        if placed.exceptions:
            lead, token = np.divmod(placed.exceptions[0], placed.header.coded_tokens)
            found[lead, token + placed.header.first_tokens] = True
    found[:, : part.tokens[0]] = found[:, part.tokens[1] :] = False
    if not found.any():
        return None, []
    leads, tokens = np.nonzero(found)
    counts = found.sum(1)
    slots = np.arange(len(leads)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full((h.leading, counts.max()), -1, np.int64)
    places[leads, slots] = part.position + tokens
    kept = [
        torch.zeros(
            (*places.shape, placed.header.head_dim), dtype=getattr(torch, DTYPE_NAMES[placed.header.dtype]), device=device
        )
        for placed in part.streams
    ]
    for low in range(*part.tokens, STEP):
        chosen = (tokens >= low) & (tokens < low + STEP)
        if chosen.any():
            vectors = _decoded(part.within((low, low + STEP)), backend)
            at = [torch.from_numpy(x[chosen]).to(device) for x in (leads, slots, tokens - low)]
            for out, decoded in zip(kept, vectors, strict=True):
                out[at[0], at[1]] = decoded[at[0], at[2]]
    own = ExactSegment(sequence, *_pair(kept), places=torch.from_numpy(places).to(device))
    return torch.from_numpy(found.astype(np.uint8)).to(device), [own]
