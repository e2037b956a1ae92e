"""Law: the records of a .pqkv file (SPEC II.1 to II.3): head, frame header, and a frame's object in an index."""

from __future__ import annotations

from dataclasses import dataclass

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.plain.documents import checksum_bytes, natural, tensor_problem

KINDS = (c.FRAME_CODED, c.FRAME_EXACT, c.FRAME_METADATA, c.FRAME_INDEX, c.FRAME_TABLE)
NAMELESS = {c.FRAME_METADATA: "file metadata", c.FRAME_TABLE: "shared tables"}


@dataclass(frozen=True)
class Frame:
    """A frame as the index lists it; sizes in bytes."""

    offset: int  # of its header in the file
    kind: int
    name: str | None
    layer: int | None
    role: str | None
    meta_bytes: int
    body_bytes: int

    @property
    def body_start(self) -> int:
        """The offset of the body in the file."""
        return self.offset + c.FRAME_STRUCT.size + self.meta_bytes

    @property
    def end(self) -> int:
        """The offset of the first byte after the frame."""
        return self.body_start + self.body_bytes


_FIELDS = Frame.__dataclass_fields__  # in the order of the constructor


# -- writing -----------------------------------------------------------------------------------------------------
def head(version: int = c.FILE_VERSION) -> bytes:
    """The 16 bytes at the beginning of a file (SPEC II.1)."""
    return sealed(c.FILE_HEAD_STRUCT.pack(c.FILE_MAGIC, version, bytes(7), 0))


def frame_header(kind: int, meta: bytes, body_bytes: int) -> bytes:
    """The 24 bytes before a frame's meta (SPEC II.2); their checksum covers the meta too."""
    fields = c.FRAME_STRUCT.pack(c.FRAME_MAGIC, kind, bytes(3), len(meta), body_bytes, 0)[: c.FRAME_CHECKED]
    return fields + checksum_bytes(fields + meta)


def sealed(record: bytes) -> bytes:
    """A record with its last four bytes replaced by the checksum of those before them."""
    return record[: -c.CHECKSUM_BYTES] + checksum_bytes(record[: -c.CHECKSUM_BYTES])


# -- reading -----------------------------------------------------------------------------------------------------
def frame_of(number: int, fields: object) -> Frame:
    """Frame ``number`` of an index, from its JSON object; unknown keys are ignored.

    Raises CorruptStream, or UnsupportedStream for an unknown kind.
    """
    if not isinstance(fields, dict) or not fields.keys() >= _FIELDS.keys():
        raise CorruptStream(f"index: frame {number} is not an object of {', '.join(_FIELDS)}")
    item = Frame(*map(fields.__getitem__, _FIELDS))
    if type(item.kind) is not int or item.kind not in KINDS:  # true and 1.0 are 1 to Python
        raise UnsupportedStream(f"index: frame {number} is of kind {item.kind!r:.50}: install a newer pqcodec")
    if not natural(item.offset) or not natural(item.meta_bytes) or not natural(item.body_bytes):
        raise CorruptStream(f"index: frame {number}: offset and sizes are not numbers from 0")
    if item.kind in NAMELESS:
        described = (item.name, item.layer, item.role) != (None, None, None)
        problem = f"{NAMELESS[item.kind]} have no name, layer or role" if described else ""
    elif item.kind == c.FRAME_INDEX:
        problem = "an index lists no index"
    else:
        problem = tensor_problem(item.name, item.layer, item.role)
    if problem:
        raise CorruptStream(f"index: frame {number}: {problem}")
    return item
