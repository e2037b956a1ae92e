"""The promise: every golden stream decodes to its numbers, on every backend. The streams are born by make_golden.py."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import second_decoder
from conftest import BACKENDS, bits
from forged_streams import streams
from make_golden import FOLDER, cases, decoded

import pqcodec
from pqcodec.stream.seal import order_seal
from pqcodec.stream.source import MemorySource

SPEC = Path(__file__).parents[1] / "formats" / "SPEC.md"
STREAMS = sorted(FOLDER.glob("*.pqs"))
TABLES = [path.read_bytes() for path in sorted(FOLDER.glob("*.pqt"))]  # shared ones, which streams may name


def test_no_golden_stream_is_missing() -> None:
    assert {name for name, *_ in (*cases(), *streams())} <= {path.stem for path in STREAMS}


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_streams_decode_to_their_numbers(path: Path, backend: str) -> None:
    tables = [pqcodec.SharedTable.from_bytes(raw) for raw in TABLES]
    found = decoded(path.read_bytes(), backend, tables)
    np.testing.assert_array_equal(bits(found), np.load(path.with_suffix(".npy"), allow_pickle=False))


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_golden_streams_are_sound(path: Path) -> None:
    assert pqcodec.verify(path.read_bytes()) == []


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_a_decoder_written_from_the_specification_agrees(path: Path) -> None:
    np.testing.assert_array_equal(
        second_decoder.decode(path.read_bytes(), TABLES), np.load(path.with_suffix(".npy"), allow_pickle=False)
    )


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_a_reader_written_from_the_specification_finds_the_order_seal(path: Path) -> None:
    assert order_seal(MemorySource(path.read_bytes())) == second_decoder.order_seal(path.read_bytes())


def test_order_seals_that_the_specification_names() -> None:
    told = re.findall(r"`(v1-[\w.-]+)` `([0-9a-f]{8})`", SPEC.read_text())
    assert len(told) == 2
    for name, seal in told:
        assert order_seal(MemorySource((FOLDER / f"{name}.pqs").read_bytes())).to_bytes(4, "little").hex() == seal


def test_the_second_decoder_notices_damage() -> None:
    data = bytearray(STREAMS[-1].read_bytes())
    data[-1] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        second_decoder.decode(bytes(data))
