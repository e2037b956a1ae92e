"""What holds of every stream: no part of it is a stream, and no flipped bit passes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import second_decoder

from pqcodec.errors import CorruptStream, PQError, TruncatedStream, UnsupportedStream
from pqcodec.stream.header import Header
from pqcodec.stream.tables import SharedTable

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


def no_shared_table(raw: bytes, error: type[PQError]) -> None:
    """Assert that bytes are refused as a shared table with that error, and so by the decoder written from the specification."""
    with pytest.raises(error) as caught:
        SharedTable.from_bytes(raw)
    assert caught.type is error
    kinds = {CorruptStream: "corrupt", UnsupportedStream: "unsupported"}
    assert second_decoder.table_refusal(hashlib.sha256(raw).hexdigest(), raw) == kinds[error]
