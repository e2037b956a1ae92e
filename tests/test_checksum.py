"""The checksum of the format: its numbers are those of the specification, however many bytes it is given at once."""

from __future__ import annotations

import numpy as np
import pytest
import second_decoder

from pqcodec.stream import checksum as module
from pqcodec.stream.checksum import checksum, checksums

PIECE = 4 * module._PIECE_WORDS  # bytes of one numpy pass


def some_bytes(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, 191, 192, 193, 1024, 1027, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 2])
def test_it_is_the_specifications_for_every_size(size: int) -> None:
    data = some_bytes(size)
    assert checksum(data) == second_decoder.checksum(data)
    assert checksum(b"\xff" * size) == second_decoder.checksum(b"\xff" * size)


def test_its_numbers_are_those_that_were_written() -> None:
    """Computed before keys were kept in memory."""
    assert checksum(some_bytes(70_001)) == 4267724922
    assert checksum(bytes(40 << 20)) == 2054280825


def test_keys_that_are_not_kept_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(3 * PIECE + 5)
    kept = checksum(data)
    monkeypatch.setattr(module, "_KEPT_PIECES", 1)
    assert checksum(data) == kept


def test_rows_have_the_checksums_of_their_bytes() -> None:
    rows = np.frombuffer(some_bytes(3 * (PIECE + 9)), np.uint8).reshape(3, -1)
    assert checksums(rows).tolist() == [checksum(row.tobytes()) for row in rows]
    assert checksums(rows[:0]).tolist() == []
