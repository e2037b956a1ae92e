"""Law: what a frame of a .pqkv file is (SPEC Part II): its record, its checksum, its JSON, and what the index says of it."""

from __future__ import annotations

from dataclasses import dataclass

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.plain.documents import checksum_bytes, natural, tensor_problem

KINDS = (c.FRAME_CODED, c.FRAME_EXACT, c.FRAME_METADATA, c.FRAME_INDEX)


@dataclass(frozen=True)
class Frame:
    """A frame as the index lists it."""

    offset: int
    kind: int
    name: str | None
    layer: int | None
    role: str | None
    meta_bytes: int
    body_bytes: int

    @property
    def body_start(self) -> int:
        return self.offset + c.FRAME_STRUCT.size + self.meta_bytes

    @property
    def end(self) -> int:
        return self.body_start + self.body_bytes


_FIELDS = Frame.__dataclass_fields__  # in the order of the constructor


# -- writing -----------------------------------------------------------------------------------------------------
def head(version: int = c.FILE_VERSION) -> bytes:
    return sealed(c.FILE_HEAD_STRUCT.pack(c.FILE_MAGIC, version, bytes(7), 0))


def frame_header(kind: int, meta: bytes, body_bytes: int) -> bytes:
    fields = c.FRAME_STRUCT.pack(c.FRAME_MAGIC, kind, bytes(3), len(meta), body_bytes, 0)[: c.FRAME_CHECKED]
    return fields + checksum_bytes(fields + meta)


def sealed(record: bytes) -> bytes:
    """A record whose last four bytes become the checksum of those before them."""
    return record[: -c.CHECKSUM_BYTES] + checksum_bytes(record[: -c.CHECKSUM_BYTES])


# -- reading -----------------------------------------------------------------------------------------------------
def frame_of(place: int, fields: object) -> Frame:
    """A frame of the index, checked; keys that this release does not know are passed over."""
    if not isinstance(fields, dict) or not fields.keys() >= _FIELDS.keys():
        raise CorruptStream(f"index: frame {place} is not an object of {', '.join(_FIELDS)}")
    item = Frame(*map(fields.__getitem__, _FIELDS))
    if item.kind not in KINDS:
        raise UnsupportedStream(f"index: frame {place} is of kind {item.kind!r:.50}: install a newer pqcodec")
    if not natural(item.offset) or not natural(item.meta_bytes) or not natural(item.body_bytes):
        raise CorruptStream(f"index: frame {place}: offset and sizes are not numbers from 0")
    if item.kind == c.FRAME_METADATA:
        told = (item.name, item.layer, item.role) != (None, None, None)
        problem = "file metadata have no name, layer or role" if told else ""
    elif item.kind == c.FRAME_INDEX:
        problem = "an index lists no index"
    else:
        problem = tensor_problem(item.name, item.layer, item.role)
    if problem:
        raise CorruptStream(f"index: frame {place}: {problem}")
    return item
