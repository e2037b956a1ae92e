"""Law: the order seal (SPEC 4.3): one number that says that a stream's blocks are those that were written, in that order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pqcodec import constants as c
from pqcodec.stream.checksum import checksum, checksums
from pqcodec.stream.header import read_header
from pqcodec.stream.source import Source, fetched


def order_seal(source: Source) -> int:
    """The order seal of a stream (SPEC 4.3): the checksum of all its checksums, in the order in which they stand in it."""
    return checksum(_sealed(source))


def order_seals(sources: Sequence[Source]) -> list[int]:
    """``order_seal`` of many streams, at once."""
    sealed = [_sealed(source) for source in sources]
    sizes = np.array([len(each) for each in sealed], np.int64)
    rows = np.zeros((len(sealed), sizes.max(initial=0)), np.uint8)
    for row, each in zip(rows, sealed, strict=True):
        row[: len(each)] = each
    return [int(total) for total in checksums(rows, sizes)]


def _sealed(source: Source) -> np.ndarray:
    """A stream's checksums one behind the other: uint8 [bytes]."""
    h = read_header(source)
    data = source.read(0, h.stream_bytes)
    size = c.CHECKSUM_BYTES
    words = [np.ndarray((n, size), np.uint8, data, last - size, (each, 1)) for last, n, each in h.checksum_runs]
    return np.concatenate(words).ravel()


def with_seal(source: Source) -> tuple[Source, int]:
    """A stream and its order seal: that which its container told, or else that of its bytes, which are read for it."""
    told = getattr(source, "seal", None)
    if told is not None:
        return source, told
    held = fetched(source)
    return held, order_seal(held)


def order_problem(source: Source) -> str:
    """What is wrong with the order of a stream whose container tells its seal, or an empty string."""
    told = getattr(source, "seal", None)
    if told is None or order_seal(source) == told:
        return ""
    return "is not the stream that was written here, or its blocks are in another order (the order seal does not hold)"
