"""SPEC 3.3: the order in which a decoder checks a header, and the error that each check makes."""

from __future__ import annotations

import struct
from functools import cache
from itertools import product

import numpy as np
import pytest
import second_decoder
from conftest import BACKENDS

import pqcodec
from pqcodec import CorruptStream, Rope, TruncatedStream, UnsupportedStream
from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED, Affine, Sketch
from pqcodec.errors import PQError
from pqcodec.stream.checksum import checksum

REFERENCE = {"backend": "reference"}
BOOKS = pqcodec.VectorTable(np.zeros((2, 16, 8)), np.arange(64))
DIRECTIONS, LEVEL_TABLE = pqcodec.BasisTable(np.eye(128)[:5]), pqcodec.LevelTable((-1, -0.25, 0.25, 1))
ROPE = 48 + 3 * 8  # where its part of the header begins
RANGES = pqcodec.RangeTable(np.ones((1, 2, 64)), 64, 1)
Edits = list[tuple[int, str, int]]  # (byte, type, value)


@cache
def stream(kind: str) -> bytes:
    """A small stream [2, 3, 64] of a preset, or of pq3 with RoPE or kept tokens."""
    turned = {"center": "rope", "rope": Rope()}
    before = {"center": "mean", "rope": Rope(), "before_rope": True}
    options = {
        "rvq2": {"preset": "rvq2", "codebooks": BOOKS},
        "rope": turned,
        "before rope": before,
        "joined": {"join_heads": True},
        "channels": {"channels": [1, 2, 60]},
        "blocks": {"block_basis": True},
        "basis": {"basis": 3, "preset": "int4", **before},
        "ranges": {"preset": "nuq2-key", "levels": LEVEL_TABLE, "ranges": RANGES},
        "shared basis": {"basis": DIRECTIONS, "preset": "nuq2", "levels": LEVEL_TABLE, "join_heads": True},
        "keep": {"keep": [0, 2]},
        "keep each": {"keep": [[0, 2], [1, 2]], "preset": "int4", **turned},
    }
    return pqcodec.encode(
        np.ones((2, 3, 64), np.float32), **{"preset": "pq3", **options.get(kind, {"preset": kind})}, **REFERENCE
    )


def forged(kind: str, edits: Edits, *, sealed: bool = True) -> bytes:
    """The stream with some fields of its header changed; ``sealed``: under a checksum that holds, where header_bytes was."""
    data = stream(kind)
    size = struct.unpack_from("<I", data, 8)[0]
    head = bytearray(data[: size - 4])
    for at, form, value in edits:
        struct.pack_into("<" + form, head, at, value)
    return bytes(head) + (struct.pack("<I", checksum(head)) if sealed else data[size - 4 : size]) + data[size:]


VERSION, CODING, NDIM, SIZE, FLAGS, ROW_BITS = (4, "B", 9), (5, "B", 9), (7, "B", 0), 8, 12, (16, "I", 1)
RESERVED, PAIRING = (ROPE + 11, "B", 1), (ROPE + 10, "B", 3)
AFFINE = 48 + 3 * 8  # where their part of the header begins
KEEP = 48 + 3 * 8  # likewise, of pq3
LEVELS = AFFINE + 16
RESERVED_FIELDS = ((0, "I", 0), (4, "I", 0), (8, "B", 0), (8, "B", 4), (9, "B", 1), (10, "B", 3), (12, "I", 1), (15, "B", 1))
OTHER_FIELDS = ((0, "I", 4097), (0, "I", 100), (4, "I", 1), (4, "I", 64), (8, "B", 1), (8, "B", 2), (10, "B", 0), (11, "B", 0))
RESERVED_OF_SKETCHES = ((0, "B", 0), (0, "B", 3), (3, "B", 1), (6, "H", 1), (12, "I", 1))
FIRST_WRONG = [  # by step: what is wrong there, and after it
    (1, forged("pq3", [(0, "B", 0), VERSION])[:20], CorruptStream),
    (1, b"\x89P?", CorruptStream),
    (2, forged("pq3", [VERSION])[:47], TruncatedStream),
    (2, b"", TruncatedStream),
    (3, forged("pq3", [VERSION, (SIZE, "I", 0)], sealed=False)[:48], UnsupportedStream),
    (4, forged("pq3", [(SIZE, "I", 59)])[:48], CorruptStream),
    (4, forged("pq3", [(SIZE, "I", 2181)])[:48], CorruptStream),
    (5, forged("pq3", [(SIZE, "I", 60)])[:59], TruncatedStream),
    (5, forged("pq3", [(SIZE, "I", 2180), CODING]), TruncatedStream),
    (6, forged("pq3", [CODING], sealed=False), CorruptStream),
    (7, forged("pq3", [CODING, NDIM]), UnsupportedStream),
    (7, forged("pq3", [(6, "B", 0), ROW_BITS]), UnsupportedStream),
    (7, forged("pq3", [(FLAGS, "H", 24), ROW_BITS]), UnsupportedStream),
    *[(7, forged("pq3", [(at, "B", n), ROW_BITS]), UnsupportedStream) for at, n in ((15, 5), (44, 1), (45, 1))],
    (7, forged("pq3", [(FLAGS, "H", 32), ROW_BITS]), UnsupportedStream),
    (7, forged("pq3", [CODING, (FLAGS, "H", 44)]), UnsupportedStream),
    *[(7, forged(kind, [(FLAGS, "H", 4)]), UnsupportedStream) for kind in ("wu44", "int4")],
    *[(7, forged(kind, [CODING]), UnsupportedStream) for kind in ("wu44", "int4")],
    *[(7, forged(kind, [(44, "B", n), ROW_BITS]), UnsupportedStream) for kind in ("wu44", "nuq2") for n in (3, 255)],
    (7, forged("wu44", [(44, "B", 1)]), UnsupportedStream),
    *[(7, forged(kind, [(FLAGS, "H", 52), ROW_BITS]), UnsupportedStream) for kind in ("wu44", "pq3")],
    (8, forged("pq3", [(7, "B", 9)]), CorruptStream),
    (8, forged("wu44", [(7, "B", 5)]), CorruptStream),
    (8, forged("pq3", [(FLAGS, "H", 11)]), CorruptStream),
    (8, forged("pq3", [(FLAGS, "H", 76)]), CorruptStream),
    *[(9, forged("keep", [(KEEP + at, "B", n), ROW_BITS]), UnsupportedStream) for at, n in ((8, 0), (8, 3), (9, 1), (15, 1))],
    *[(10, forged("keep", [(KEEP, "Q", n)]), CorruptStream) for n in (1, (1 << 32) + 1, 1 << 63)],
    (10, forged("keep", [(48, "Q", 1 << 11), (KEEP, "Q", 1 << 32)]), CorruptStream),
    (12, forged("keep", [(KEEP, "Q", 33)]), TruncatedStream),
    (12, forged("keep", [(KEEP + 8, "B", 2)]), TruncatedStream),
    (9, forged("rope", [RESERVED, PAIRING, ROW_BITS, (ROPE + 8, "H", 66)]), UnsupportedStream),
    (9, forged("rope", [(ROPE + 8, "H", 66)]), CorruptStream),
    *[(9, forged("wu44", [(AFFINE + at, form, n), ROW_BITS]), UnsupportedStream) for at, form, n in RESERVED_FIELDS],
    *[(10, forged("wu44", [(AFFINE + at, form, n)]), CorruptStream) for at, form, n in OTHER_FIELDS],
    *[(10, forged("int4", [(AFFINE + at, "B", n)]), CorruptStream) for at, n in ((8, 3), (10, 1), (11, 4))],
    *[(10, forged("int4", [(AFFINE + at, "I", n)]), CorruptStream) for at, n in ((0, 4097), (4, 1025))],
    *[(10, forged("wu44", [(14, "B", n)]), CorruptStream) for n in (0, 3, 9)],
    *[(10, forged("int4", [(16, "I", n)]), CorruptStream) for n in (0, 64 * 9, 100)],
    (10, forged("wu44", [(20, "I", 192)]), CorruptStream),
    *[(9, forged(kind, [(AFFINE + at, "B", 1)]), UnsupportedStream) for kind, at in (("int4", 12), ("kvquant2", 14))],
    (9, forged("kvquant2", [(FLAGS, "H", 20)]), UnsupportedStream),
    *[(10, forged("kvquant2", [(AFFINE + 12, "H", n)]), CorruptStream) for n in (0, 33, 65535)],
    (12, forged("kvquant2", [(AFFINE + 12, "H", 2)]), TruncatedStream),
    *[(10, forged("nuq2", [(LEVELS + 2 * at, "H", n)]), CorruptStream) for at, n in ((0, 0x7C00), (3, 0x7E00), (3, 0xFC00))],
    *[(10, forged("nuq2", [(LEVELS + 2 * at, "H", n)]), CorruptStream) for at, n in ((0, 0x4000), (2, 0xC400))],
    *[(10, forged("nuq2", [(16, "I", n)]), CorruptStream) for n in (64, 192, 512)],
    *[(11, forged(kind, [(44, "B", n)]), CorruptStream) for kind, n in (("nuq2", 0), ("nuq2", 2), ("int4", 1), ("int4", 2))],
    *[(10, forged(kind, [(FLAGS, "H", 28)]), CorruptStream) for kind in ("wu44", "int4")],
    (7, forged("qjl", [(FLAGS, "H", 20), ROW_BITS]), UnsupportedStream),
    (8, forged("qjl", [(7, "B", 5)]), CorruptStream),
    *[(9, forged("qjl", [(AFFINE + at, form, n), ROW_BITS]), UnsupportedStream) for at, form, n in RESERVED_OF_SKETCHES],
    *[(10, forged("qjl", [(AFFINE + at, form, n)]), CorruptStream) for at, form, n in ((1, "B", 0), (1, "B", 9), (2, "B", 1))],
    *[(10, forged("qjl", [(AFFINE + at, form, n)]), CorruptStream) for at, form, n in ((4, "H", 1), (8, "I", 32))],
    *[(10, forged("qjl-outliers", [(AFFINE + 4, "H", n)]), CorruptStream) for n in (0, 65)],
    *[(10, forged("qjl-outliers", [(AFFINE + 8, "I", n)]), CorruptStream) for n in (0, 4097, 63)],
    *[(10, forged("qjl-outliers", [(AFFINE + at, "B", 4), (AFFINE + 3 - at, "B", 0)]), CorruptStream) for at in (1, 2)],
    *[(10, forged("qjl", [(16, "I", n)]), CorruptStream) for n in (16 + 64, 32 + 128, 16 + 192)],
    *[(10, forged("qjl", [(at, form, n)]), CorruptStream) for at, form, n in ((14, "B", 0), (FLAGS, "H", 12))],
    (12, forged("qjl-outliers", [(AFFINE + 4, "H", 5)]), TruncatedStream),
    (10, forged("pq3", [NDIM]), CorruptStream),
    (10, forged("pq3", [(64, "Q", 0)]), CorruptStream),
    (10, forged("pq3", [(64, "Q", 1025)]), CorruptStream),
    (10, forged("pq3", [(48, "Q", 0), (56, "Q", (1 << 32) + 1)]), CorruptStream),
    (10, forged("pq3", [(48, "Q", 1 << 48)]), CorruptStream),
    (10, forged("pq3", [(28, "I", 7)]), CorruptStream),
    *[(10, forged(kind, [(40, "h", n)]), CorruptStream) for kind in ("pq3", "rope") for n in (-113, 112)],
    *[(10, forged(kind, [(42, "h", n)]), CorruptStream) for kind in ("pq3", "paper", "quad2") for n in (-126, 118)],
    (10, forged("rope", [(FLAGS, "H", 14)]), CorruptStream),
    (10, forged("before rope", [(FLAGS, "H", 271)]), CorruptStream),
    (10, forged("keep", [(FLAGS, "H", 204), (48, "Q", 17)]), CorruptStream),
    (8, forged("pq3", [(FLAGS, "H", 268)]), CorruptStream),
    (9, forged("before rope", [RESERVED, PAIRING, ROW_BITS]), UnsupportedStream),
    *[(10, forged("before rope", [(ROPE + 10, "B", pairing)]), CorruptStream) for pairing in (0, 3)],
    (12, forged("before rope", [(FLAGS, "H", 268)]), CorruptStream),
    *[(10, forged("rope", [(ROPE + 10, "B", pairing)]), CorruptStream) for pairing in (0, 3)],
    (10, forged("rope", [(ROPE + 8, "H", 0)]), CorruptStream),
    (10, forged("rope", [(ROPE, "Q", 1 << 63)]), CorruptStream),
    (10, forged("paper", [(FLAGS, "H", 12)]), CorruptStream),
    (10, forged("quad2", [(FLAGS, "H", 4)]), CorruptStream),
    *[(10, forged("pq3", [(16, "I", n)]), CorruptStream) for n in (63, 12 + 7 * 64 + 1)],
    (10, forged("paper", [(16, "I", 249)]), CorruptStream),
    *[(10, forged("quad2", [(16, "I", 8 + 64 + 16 * b)]), CorruptStream) for b in (3, 11)],
    *[(10, forged(kind, [(14, "B", n)]), CorruptStream) for kind, n in (("pq3", 10), ("pq3", 16), ("paper", 15), ("quad2", 9))],
    *[(10, forged("pq3", [(20, "I", n)]), CorruptStream) for n in (0, 4097)],
    (11, forged("rope", [(ROPE + 8, "H", 62)]), CorruptStream),
    (11, forged("rope", [(ROPE + 8, "H", 63)]), CorruptStream),
    (12, forged("pq3", [(24, "I", (1 << 32) - 1)]), TruncatedStream),
    (12, stream("pq3")[:-1], TruncatedStream),
    (12, stream("pq3") + b"\0", CorruptStream),
    (12, forged("pq3", [(56, "Q", 2)]), CorruptStream),
]


@pytest.mark.parametrize(
    ("data", "error"), [case[1:] for case in FIRST_WRONG], ids=[f"{n}, step {case[0]}" for n, case in enumerate(FIRST_WRONG)]
)
def test_the_first_thing_that_is_wrong_makes_the_error(data: bytes, error: type[PQError]) -> None:
    for read in (pqcodec.decode, pqcodec.decode_kept, pqcodec.verify):
        with pytest.raises(PQError) as caught:
            read(data, **REFERENCE)
        assert caught.type is error, caught.value
    kinds = {CorruptStream: "corrupt", TruncatedStream: "truncated", UnsupportedStream: "unsupported"}
    assert second_decoder.refusal(data) == kinds[error]


@pytest.mark.parametrize(
    ("kind", "edits"),
    [
        ("pq3", [(40, "h", 111)]),  # offset_exponent without offsets
        ("pq3", [(42, "h", 5)]),  # radius_exponent without paper coding
        ("quad2", [(42, "h", -125)]),
        ("pq3", [(6, "B", 2)]),  # bfloat16, which numpy lacks
        ("pq3", [(FLAGS, "H", 8)]),  # for torch
        ("rope", [(ROPE + 16, "I", (1 << 32) - 1)]),  # any frequency
    ],
)
def test_what_is_not_checked(kind: str, edits: Edits) -> None:
    data = forged(kind, edits)
    assert (pqcodec.verify(data, **REFERENCE), second_decoder.refusal(data)) == ([], "")
    found, usual = (np.asarray(pqcodec.decode(x, **REFERENCE).tolist()) for x in (data, stream(kind)))
    assert kind == "rope" or np.allclose(found, usual, rtol=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_leading_indices_there_is_no_block(backend: str) -> None:
    """However many chunks the tokens would make."""
    data = forged("pq3", [(48, "Q", 0), (56, "Q", 1 << 32), (20, "I", 1)])[:76]
    assert tuple(pqcodec.decode(data, backend=backend).shape) == second_decoder.decode(data).shape == (0, 1 << 32, 64)
    assert pqcodec.verify(data, backend=backend) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_behind_a_row_are_passed_over(backend: str) -> None:
    data = bytearray(pqcodec.encode(np.ones((1, 16), np.float32), preset="paper", **REFERENCE))
    assert struct.unpack_from("<I", data, 16) == (62,)
    usual = pqcodec.decode(bytes(data), backend=backend).tolist()
    data[-5] |= 0xC0  # bits 62 and 63 of the row
    data[-4:] = struct.pack("<I", checksum(bytes(data[-12:-4])))
    assert pqcodec.decode(bytes(data), backend=backend).tolist() == usual


@pytest.mark.parametrize(
    "kind",
    [
        "pq3",
        "paper",
        "quad2",
        "rope",
        "wu44",
        "int4",
        "nuq2",
        "kvquant2",
        "rvq2",
        "qjl-outliers",
        "keep",
        "keep each",
        "before rope",
        "joined",
        "channels",
        "blocks",
        "basis",
        "shared basis",
        "ranges",
    ],
)
def test_a_reader_written_from_the_specification_agrees_of_every_changed_byte(kind: str) -> None:
    kinds = {CorruptStream: "corrupt", TruncatedStream: "truncated", UnsupportedStream: "unsupported"}
    size = struct.unpack_from("<I", stream(kind), 8)[0]
    for at, value in product(range(size - 4), (0, 1, 2, 3, 7, 8, 15, 16, 60, 64, 127, 128, 255)):
        data = forged(kind, [(at, "B", value)])
        try:
            pqcodec.inspect(data)
            error = ""
        except PQError as caught:
            error = kinds[type(caught)]
        assert second_decoder.refusal(data) == error, (at, value)


@pytest.mark.parametrize("code", DECLARED)
def test_rows_have_16_bits_at_least_so_that_a_byte_stands_for_2048_numbers_at_most(code: int) -> None:
    coding, least = DECLARED[code], 16
    affine = Affine(1, 2, c.AFFINE_POLAR, c.ROPE_HALF, 1) if code == c.CODING_PAIRS else Affine(1, 1, c.AFFINE_SCALE)
    for width, row_bits, radius_bits in product((1, 8, 16, 64), range(33), range(17)):
        rows = (coding.order(width), row_bits, radius_bits)
        wrong = coding.problem(*rows) or (coding.affine_problem and coding.affine_problem(*rows, affine))
        if not wrong and not coding.sketches:
            assert row_bits >= least
    assert not coding.sketches or Sketch(1).row_bits(coding.order(1)) >= least
    assert 8 * c.MAX_JOINED_DIM // least == c.MAX_NUMBERS_PER_BYTE
