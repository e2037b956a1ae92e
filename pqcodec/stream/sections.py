"""Law: the side sections of a stream (SPEC 3.2), between its header and its payload: one table, one way to write and read.

A side section is entries of one size, each followed by its checksum. What an entry means is its stage's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.stream.checksum import checksum, checksums
from pqcodec.stream.report import Damage
from pqcodec.stream.source import Source

if TYPE_CHECKING:
    from pqcodec.stream.header import Header

_AT_ONCE = 1 << 20  # bytes of entries


@dataclass(frozen=True, eq=False)
class SideSection:
    """A side section as a header asks for it. ``name`` is that of a ``Damage``."""

    name: str
    there: Callable[[Header], Any]  # whether a stream has it
    leads: Callable[[Header], int | None]  # leading indices that have an entry each, of rows too; None: there is one in all
    body_bytes: Callable[[Header], int]  # of an entry, without its checksum
    tokens: Callable[[Header], tuple[int, int] | None] = lambda h: None  # that a damaged entry concerns; None: all


def _each(h: Header) -> int:
    return h.leading


KEEP = SideSection(
    "keep list",
    lambda h: h.keep and h.tokens,
    lambda h: h.leading if h.keep is not None and h.keep.each else None,
    lambda h: -(-h.whole_shape[-2] // 8) if h.keep_bitmap else 4 * h.tokens,
)
LINEAR = SideSection(
    "linear stage",
    lambda h: h.linear and not h.basis,
    lambda h: h.leading // h.heads if h.linear is not None and h.linear.kind == c.LINEAR_CHANNELS else None,
    lambda h: h.linear.body_bytes(h.heads * h.head_dim) if h.linear is not None else 0,
)
OFFSETS = SideSection("offset", lambda h: h.offsets, _each, lambda h: 2 * h.head_dim)
EXACT_TOKENS = SideSection(
    "exact tokens",
    lambda h: h.first_tokens,
    _each,
    lambda h: h.first_tokens * h.vector_bytes,
    lambda h: (0, h.first_tokens),
)
EXACT_LAST = SideSection(
    "exact last tokens",
    lambda h: h.last_tokens,
    _each,
    lambda h: h.last_tokens * h.vector_bytes,
    lambda h: (h.last_start, h.tokens),
)
EXACT_VECTORS = SideSection(
    "exact vectors", lambda h: h.exceptions, lambda h: None, lambda h: h.exceptions * (8 + h.vector_bytes)
)
SIDE_SECTIONS = (KEEP, LINEAR, OFFSETS, EXACT_TOKENS, EXACT_LAST, EXACT_VECTORS)  # in the order in which they stand


class Place(NamedTuple):
    """Where a section is in a stream, bytes; ``entry_bytes`` with the checksum, 0 where the stream has no such section."""

    start: int
    entries: int
    entry_bytes: int

    @property
    def end(self) -> int:
        """One behind the last byte."""
        return self.start + self.entries * self.entry_bytes


def places(h: Header) -> dict[SideSection, Place]:
    """The place of every section of a stream, absent ones too."""
    found, start = {}, h.header_bytes
    for section in SIDE_SECTIONS:
        if section.there(h):
            leads = section.leads(h)
            found[section] = Place(start, 1 if leads is None else leads, section.body_bytes(h) + c.CHECKSUM_BYTES)
        else:
            found[section] = Place(start, 0, 0)
        start = found[section].end
    return found


def write_entries(stream: BinaryIO, bodies: Iterable[bytes]) -> None:
    """Entries of one size, each with its checksum."""
    left = iter(bodies)
    for first in left:
        some = [first, *islice(left, _AT_ONCE // len(first))]
        rows = np.frombuffer(b"".join(some), np.uint8).reshape(len(some), -1)
        sums = checksums(rows).astype("<u4").view(np.uint8).reshape(len(some), -1)
        stream.write(np.concatenate([rows, sums], 1).tobytes())


def with_checksum(body: bytes) -> bytes:
    """An entry: its body and the checksum of that."""
    return body + checksum(body).to_bytes(c.CHECKSUM_BYTES, "little")


def read_entries(
    source: Source, h: Header, section: SideSection, entries: tuple[int, int], damage: list[Damage]
) -> tuple[np.ndarray, np.ndarray]:
    """The sound ones of some entries: their numbers intp [n], and their bodies uint8 [n, bytes]; ``damage`` gets the others."""
    place = h.places[section]
    if not place.entry_bytes or entries[0] == entries[1]:
        return np.zeros(0, np.intp), np.zeros((0, max(place.entry_bytes - c.CHECKSUM_BYTES, 0)), np.uint8)
    first, count = entries[0], entries[1] - entries[0]
    data = source.read(place.start + first * place.entry_bytes, count * place.entry_bytes).reshape(count, -1)
    bodies, sound = without_checksums(data)
    if sound.all():
        return np.arange(*entries), bodies
    of_leads = section.leads(h)
    for entry in (int(first + n) for n in np.flatnonzero(~sound)):
        together = h.leading // of_leads if of_leads else 1  # leading indices of the tensor that an entry is of
        leads = range(entry * together, (entry + 1) * together) if of_leads else [None]
        damage += [Damage(section.name, lead, section.tokens(h)) for lead in leads]
    return first + np.flatnonzero(sound), bodies[sound]


def read_together(
    sources: Sequence[Source], headers: Sequence[Header], section: SideSection
) -> Iterator[tuple[list[int], np.ndarray | None]]:
    """The numbers of the streams whose entries of a section have one size, and the bodies of all these: uint8 [n, bytes].

    None instead of bodies of which one is damaged; ``read_entries`` tells which.
    """
    alike: dict[int, list[int]] = {}
    for number, h in enumerate(headers):
        if h.places[section].entries:
            alike.setdefault(h.places[section].entry_bytes, []).append(number)
    for size, numbers in alike.items():
        places = [headers[number].places[section] for number in numbers]
        read = [sources[n].read(place.start, place.end - place.start) for n, place in zip(numbers, places, strict=True)]
        bodies, sound = without_checksums(np.concatenate(read).reshape(-1, size))
        yield numbers, bodies if sound.all() else None


def without_checksums(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint8 [n, bytes] without the checksums at their ends, and whether these hold: bool [n]."""
    bodies = np.ascontiguousarray(rows[:, : -c.CHECKSUM_BYTES])
    stored = np.ascontiguousarray(rows[:, -c.CHECKSUM_BYTES :]).view("<u4")[:, 0]
    return bodies, checksums(bodies) == stored
