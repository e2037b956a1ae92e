"""Law: what a header says of the linear stage (SPEC 18.2)."""

from __future__ import annotations

from dataclasses import dataclass

from pqcodec import constants as c
from pqcodec.errors import UnsupportedStream

LINEAR_NAMES = {c.LINEAR_CHANNELS: "channels", c.LINEAR_BLOCKS: "blocks", c.LINEAR_BASIS: "basis"}


@dataclass(frozen=True)
class LinearField:
    """The linear stage of a stream; its lists of channels, or its matrix, are a side section."""

    kind: int
    width: int  # numbers of a row

    def to_bytes(self) -> bytes:
        """What stands in the header."""
        return c.LINEAR_STRUCT.pack(self.width, bytes(6))

    @classmethod
    def from_bytes(cls, kind: int, body: bytes, at: int) -> LinearField:
        """The stage from its bytes in a header; raises UnsupportedStream and struct.error."""
        width, reserved = c.LINEAR_STRUCT.unpack_from(body, at)
        if any(reserved):
            raise UnsupportedStream("header: the linear stage is such as this release does not know: install a newer pqcodec")
        return cls(kind, width)

    def body_bytes(self, numbers: int) -> int:
        """Bytes of a list of channels, or of the matrix, where the vectors of a row have so many numbers."""
        return {
            c.LINEAR_CHANNELS: 2 * self.width,
            c.LINEAR_BLOCKS: 2 * c.LINEAR_BLOCK**2,
            c.LINEAR_BASIS: 2 * self.width * numbers,
        }[self.kind]

    def problem(self, numbers: int) -> str:
        """What is wrong where the vectors of a row have so many numbers, or an empty string."""
        if not 1 <= self.width <= min(numbers, c.MAX_HEAD_DIM):
            return f"rows of {self.width} numbers of vectors of {numbers}; 1 .. {min(numbers, c.MAX_HEAD_DIM)} are possible"
        if self.kind == c.LINEAR_BLOCKS and (numbers % c.LINEAR_BLOCK or self.width != numbers):
            return f"blocks of {c.LINEAR_BLOCK} channels do not make rows of {self.width} numbers of vectors of {numbers}"
        return ""
