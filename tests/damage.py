"""What holds of every stream: no part of it is a stream, and no flipped bit passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pqcodec.errors import CorruptStream, PQError, TruncatedStream
from pqcodec.stream.header import Header

Decode = Callable[[bytes], Any]


def every_proper_prefix_is_truncated(stream: bytes, decode: Decode) -> None:
    for size in range(len(stream)):
        with pytest.raises(TruncatedStream):
            decode(stream[:size])


def every_flipped_bit_is_found(stream: bytes, decode: Decode) -> None:
    """By an error of any kind in the header, and behind it as damage."""
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PQError) as caught:
            decode(bytes(damaged))
        if bit >= 8 * Header.from_bytes(stream).header_bytes:
            assert caught.type is CorruptStream
