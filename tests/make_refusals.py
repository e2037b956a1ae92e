"""Refusals are born here: ``python tests/make_refusals.py`` writes formats/refusals.txt, of what a reader must say.

A line is a name (the place in SPEC.md, the number of the check, what is wrong), the error or ``sound``, and the bytes in hex:
of a stream where the name begins with 3.3, else of a .pqkv file. Lines that are there stay; a new case gets a new name.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import spec_vectors
import torch
from test_pqkv import ITEM, assemble, frame, sealed

import pqcodec
from pqcodec.formats import PQKVWriter
from pqcodec.stream.checksum import checksum

REFUSALS = Path(__file__).parents[1] / "formats" / "refusals.txt"
REFERENCE = {"backend": "reference"}
CORRUPT, TRUNCATED, UNSUPPORTED, SOUND = "corrupt", "truncated", "unsupported", "sound"
Case = tuple[str, str, bytes]


def cases() -> Iterator[Case]:
    yield from of_streams()
    yield from of_runs()
    yield from of_shared_fields()
    yield from of_sketches()
    yield from of_no_leading_index()
    yield from of_opening()
    yield from of_frames()
    yield from of_tensors()
    yield from of_walks()
    yield from sound_files()


# -- 3.3: streams ------------------------------------------------------------------------------------------------
PLAIN = pqcodec.encode(
    np.array([[1, -2, 3, -4]], np.float16), preset="pq2", seed=0, **REFERENCE
)  # [1, 4]: header to 68, one block
PAPER = pqcodec.encode(np.ones((1, 16), np.float16), preset="paper", seed=0, **REFERENCE)
QUADS = pqcodec.encode(np.ones((1, 12), np.float16), preset="quad2", seed=0, **REFERENCE)
ROPE = spec_vectors.rope_stream()  # of 9.4: header to 92, offsets to 104, one exact vector to 124, one block
NOTHING = pqcodec.encode(np.ones((0, 4), np.float16), preset="pq2", center="mean", seed=0, **REFERENCE)
FEW = pqcodec.encode(np.ones((2, 99, 4), np.float16), preset="pq2", keep=[[0, 98], [1, 2]], seed=0, **REFERENCE)
MANY = pqcodec.encode(np.ones((9, 4), np.float16), preset="pq2", keep=[0, 8], seed=0, **REFERENCE)
OF_KEEP = 64  # where its part of MANY's header begins: to 84, a list to 90
EXACT = pqcodec.encode(np.ones((2, 4), np.float16), preset="pq2", exact_tokens=1, seed=0, **REFERENCE)
LAST = pqcodec.encode(np.ones((2, 4), np.float16), preset="pq2", exact_last=1, seed=0, **REFERENCE)
TWO = pqcodec.encode(np.full((2, 4), np.nan, np.float16), preset="pq2", nonfinite="exact", seed=0, **REFERENCE)
LEVELS = spec_vectors.level_stream()  # of 16.4
OUTLIERS = spec_vectors.level_stream("kvquant2")
SKETCH = spec_vectors.sketch_stream()  # of 21.6
KEYS = spec_vectors.affine_stream("qjl")
PAIRS, SCALAR = spec_vectors.affine_stream("wu44"), spec_vectors.affine_stream("int4")
OF_CODING, BEHIND_CODING = 64, 80  # where what 13.1 and 21.1 tell begins in these, and ends
OF_LEVELS = 80  # where its levels begin
BASIS = spec_vectors.linear_stream()
OF_LINEAR, AT_LINEAR = 88, 100  # where its part of the header, and its section, begin
CHANNELS = pqcodec.encode(np.ones((1, 4), np.float16), preset="pq2", channels=[1, 3], seed=0, **REFERENCE)
AT_CHANNELS = 76
JOINED = spec_vectors.joined_stream()
BEFORE = spec_vectors.before_rope_stream()
RESIDUAL = spec_vectors.residual_stream()  # of 20.4
OF_ROPE = 64  # where its part of ROPE's header begins
ONE_DIMENSION = sealed(struct.pack("<7sBI", PLAIN[:7], 1, 76) + struct.pack("<H", 76) + PLAIN[14:48] + MANY[56:80]) + PLAIN[68:]


def forged(data: bytes, *edits: tuple[int, str, int]) -> bytes:
    """A stream with fields (byte, type, value) of its header changed, under a checksum that holds."""
    size = struct.unpack_from("<I", data, 8)[0]
    head = bytearray(data[: size - 4])
    for at, form, value in edits:
        struct.pack_into("<" + form, head, at, value)
    return sealed(bytes(head)) + data[size:]


def other(data: bytes, at: int, new: bytes, block: slice | None = None) -> bytes:
    """Bytes with others at a place; ``block``: that ends in a checksum, which holds again."""
    changed = bytearray(data)
    changed[at : at + len(new)] = new
    if block:
        changed[block] = sealed(bytes(changed[block][:-4]))
    return bytes(changed)


def with_part(data: bytes, at: int, part: bytes, *edits: tuple[int, str, int]) -> bytes:
    """A stream with more bytes in its header, and fields of it changed."""
    size = struct.unpack_from("<I", data, 8)[0]
    head = data[:8] + struct.pack("<I", size + len(part)) + data[12:at] + part + data[at : size - 4]
    return forged(sealed(head) + data[size:], *edits)


def of_streams() -> Iterator[Case]:
    wider = sealed(struct.pack("<8sI", PLAIN[:8], 72) + PLAIN[12:64] + bytes(4)) + PLAIN[68:]
    for name, error, data in [
        ("1-magic", CORRUPT, b"\x89PQF" + PLAIN[4:]),
        ("1-two-bytes", CORRUPT, b"\x89R"),
        ("2-47-bytes", TRUNCATED, PLAIN[:47]),
        ("3-version", UNSUPPORTED, other(PLAIN, 4, b"\2")),
        ("4-header_bytes-59", CORRUPT, forged(PLAIN, (8, "I", 59))),
        ("4-header_bytes-2181", CORRUPT, forged(PLAIN, (8, "I", 2181))),
        ("5-cut-header", TRUNCATED, PLAIN[:67]),
        ("6-checksum", CORRUPT, other(PLAIN, 32, b"\1")),
        ("7-coding", UNSUPPORTED, forged(PLAIN, (5, "B", 4))),
        ("7-dtype", UNSUPPORTED, forged(PLAIN, (6, "B", 4))),
        ("7-flag", UNSUPPORTED, forged(PLAIN, (12, "H", 28))),
        ("7-linear", UNSUPPORTED, forged(PLAIN, (15, "B", 255))),
        ("7-codebook", UNSUPPORTED, forged(PLAIN, (44, "B", 1))),
        ("7-states", UNSUPPORTED, forged(PLAIN, (45, "B", 1))),
        ("8-shape", CORRUPT, forged(PLAIN, (7, "B", 4))),
        ("8-rope", CORRUPT, forged(PLAIN, (12, "H", 15))),
        ("8-keep", CORRUPT, forged(PLAIN, (12, "H", 76))),
        ("9-reserved", UNSUPPORTED, forged(ROPE, (OF_ROPE + 15, "B", 1))),
        ("9-keep-lists", UNSUPPORTED, forged(MANY, (OF_KEEP + 8, "B", 3))),
        ("9-keep-reserved", UNSUPPORTED, forged(MANY, (OF_KEEP + 15, "B", 1))),
        ("9-frequencies", CORRUPT, forged(ROPE, (OF_ROPE + 8, "H", 6))),
        ("9-sketch-matrix", UNSUPPORTED, forged(SKETCH, (64, "B", 3))),
        ("9-sketch-reserved", UNSUPPORTED, forged(SKETCH, (67, "B", 1))),
        ("10-ndim-0", CORRUPT, forged(PLAIN, (7, "B", 0))),
        ("10-head_dim-0", CORRUPT, forged(PLAIN, (56, "Q", 0))),
        ("10-head_dim-1025", CORRUPT, forged(PLAIN, (56, "Q", 1025))),
        ("10-tokens", CORRUPT, forged(PLAIN, (48, "Q", (1 << 32) + 1))),
        ("10-numbers", CORRUPT, forged(NOTHING, (48, "Q", 1 << 47))),
        ("10-sketch-blocks-0", CORRUPT, forged(SKETCH, (65, "B", 0), (66, "B", 4))),
        ("10-sketch-row_bits", CORRUPT, forged(SKETCH, (16, "I", 112))),
        ("10-sketch-channels-7", CORRUPT, forged(SKETCH, (68, "H", 7))),
        ("10-sketch-of-two-rounds", CORRUPT, forged(SKETCH, (12, "H", 12))),
        ("10-radius_bits-split", CORRUPT, forged(PLAIN, (14, "B", 10))),
        ("10-radius_bits-paper", CORRUPT, forged(PAPER, (14, "B", 15))),
        ("10-radius_bits-quads", CORRUPT, forged(QUADS, (14, "B", 9))),
        ("10-row_bits-split-15", CORRUPT, forged(PLAIN, (16, "I", 15))),
        ("10-row_bits-split-124", CORRUPT, forged(PLAIN, (16, "I", 124))),
        ("10-row_bits-paper", CORRUPT, forged(PAPER, (16, "I", 63))),
        ("10-row_bits-quads-3-bits", CORRUPT, forged(QUADS, (16, "I", 36))),
        ("10-row_bits-quads-11-bits", CORRUPT, forged(QUADS, (16, "I", 68))),
        ("10-row_bits-quads-uneven", CORRUPT, forged(QUADS, (16, "I", 41))),
        ("10-kept-of-fewer", CORRUPT, forged(MANY, (OF_KEEP, "Q", 1))),
        ("10-kept-of-too-many", CORRUPT, forged(MANY, (OF_KEEP, "Q", (1 << 32) + 1))),
        ("10-kept-of-too-many-numbers", CORRUPT, forged(FEW, (48, "Q", 1 << 20), (OF_KEEP + 8, "Q", 1 << 32))),
        ("10-keep-of-one-dimension", CORRUPT, ONE_DIMENSION),
        ("10-chunk_tokens-0", CORRUPT, forged(PLAIN, (20, "I", 0))),
        ("10-chunk_tokens-4097", CORRUPT, forged(PLAIN, (20, "I", 4097))),
        ("10-exceptions", CORRUPT, forged(PLAIN, (28, "I", 2))),
        ("10-offset_exponent", CORRUPT, forged(PLAIN, (40, "h", 112))),
        ("10-radius_exponent", CORRUPT, forged(PLAIN, (42, "h", -126))),
        ("10-rope-without-offsets", CORRUPT, forged(ROPE, (12, "H", 14))),
        ("10-first_position", CORRUPT, forged(ROPE, (OF_ROPE, "Q", 1 << 63))),
        ("10-channels-0", CORRUPT, forged(ROPE, (OF_ROPE + 8, "H", 0))),
        ("10-channels-beyond-head_dim", CORRUPT, forged(ROPE, (56, "Q", 3))),
        ("10-pairing", CORRUPT, forged(ROPE, (OF_ROPE + 10, "B", 3))),
        ("10-paper-of-two-rounds", CORRUPT, forged(PAPER, (12, "H", 12))),
        ("10-quads-of-one-round", CORRUPT, forged(QUADS, (12, "H", 4))),
        ("11-header_bytes", CORRUPT, wider),
        ("11-channels-fewer", CORRUPT, forged(ROPE, (OF_ROPE + 8, "H", 2))),
        ("11-channels-odd", CORRUPT, forged(ROPE, (OF_ROPE + 8, "H", 3))),
        ("12-cut", TRUNCATED, PLAIN[:-1]),
        ("12-longer", CORRUPT, PLAIN + b"\0"),
        ("12-beyond-all-memory", TRUNCATED, forged(PLAIN, (48, "Q", 1 << 32))),
        ("13-checksum-of-offsets", CORRUPT, other(ROPE, 92, b"\0")),
        ("13-checksum-of-offsets-alone", CORRUPT, other(NOTHING, 68, b"\1")),
        ("13-checksum-of-exact-tokens", CORRUPT, other(EXACT, 68, b"\1")),
        ("13-checksum-of-exact-last-tokens", CORRUPT, other(LAST, 68, b"\1")),
        ("13-checksum-of-exact-vectors", CORRUPT, other(ROPE, 112, b"\1")),
        ("13-checksum-of-a-block", CORRUPT, other(PLAIN, 68, b"\0")),
        ("13-checksum-of-keep-list", CORRUPT, other(MANY, 84, b"\3")),
        ("13-keep-list-of-more", CORRUPT, other(MANY, 84, b"\3\1", slice(84, 90))),
        ("13-keep-list-beyond", CORRUPT, other(MANY, 84, b"\1\2", slice(84, 90))),
        ("13-keep-list-twice", CORRUPT, other(FEW, 92, bytes(8), slice(92, 104))),
        ("13-keep-list-descends", CORRUPT, other(FEW, 92, b"\5\0\0\0\4", slice(92, 104))),
        ("13-keep-list-of-numbers-beyond", CORRUPT, other(FEW, 96, b"\x63", slice(92, 104))),
        ("13-offset-infinite", CORRUPT, other(ROPE, 92, b"\0\x7c", slice(92, 104))),
        ("13-row-beyond", CORRUPT, other(ROPE, 104, b"\3", slice(104, 124))),
        ("13-row-twice", CORRUPT, other(TWO, 84, b"\0", slice(68, 104))),
        ("13-rows-descend", CORRUPT, other(other(TWO, 68, b"\1"), 84, b"\0", slice(68, 104))),
    ]:
        yield f"3.3-{name}", error, data
    for name, error, data in [
        ("7-codebook-3", UNSUPPORTED, forged(LEVELS, (44, "B", 3))),
        ("7-codebook-of-even-levels", UNSUPPORTED, forged(QUADS, (44, "B", 1))),
        ("10-levels-descend", CORRUPT, forged(LEVELS, (OF_LEVELS, "H", 0x4000))),
        ("10-level-infinite", CORRUPT, forged(LEVELS, (OF_LEVELS + 6, "H", 0x7C00))),
        ("11-name-of-8-bytes", CORRUPT, forged(LEVELS, (44, "B", 2))),
        ("11-levels-unsaid", CORRUPT, forged(LEVELS, (44, "B", 0))),
    ]:
        yield f"3.3-{name}", error, data
    for name, error, data in [
        ("8-before-rope", CORRUPT, forged(PLAIN, (12, "H", 268))),
        ("9-before-rope-reserved", UNSUPPORTED, forged(BEFORE, (OF_ROPE + 15, "B", 1))),
        ("10-before-and-after-rope", CORRUPT, forged(BEFORE, (12, "H", 271))),
        ("10-before-rope-channels", CORRUPT, forged(BEFORE, (OF_ROPE + 8, "H", 0))),
        ("12-before-rope-less-offsets", CORRUPT, forged(BEFORE, (12, "H", 268))),
    ]:
        yield f"3.3-{name}", error, data
    yield "3.3-0-before-rope", SOUND, BEFORE
    for name, error, data in [
        ("10-joined-of-two-dimensions", CORRUPT, forged(PLAIN, (12, "H", 140))),
        ("10-joined-of-no-heads", CORRUPT, forged(JOINED, (48, "Q", 0))),
        ("10-joined-of-wide-rows", CORRUPT, forged(JOINED, (48, "Q", 257))),
        ("12-joined-of-more-exact-tokens", TRUNCATED, forged(JOINED, (24, "I", 1), (64, "Q", 8))),
    ]:
        yield f"3.3-{name}", error, data
    yield "3.3-0-joined", SOUND, JOINED
    for name, error, data in [
        ("7-linear-5", UNSUPPORTED, forged(PLAIN, (15, "B", 5))),
        ("8-linear", CORRUPT, forged(PLAIN, (15, "B", 1))),
        ("9-linear-reserved", UNSUPPORTED, forged(BASIS, (OF_LINEAR + 7, "B", 1))),
        ("10-width-0", CORRUPT, forged(BASIS, (OF_LINEAR, "H", 0))),
        ("10-width-beyond", CORRUPT, forged(BASIS, (OF_LINEAR, "H", 5))),
        ("10-blocks-of-4", CORRUPT, forged(BASIS, (15, "B", 2))),
        ("11-linear-of-no-name", CORRUPT, forged(BASIS, (15, "B", 4))),
        ("11-linear-unsaid", CORRUPT, forged(BASIS, (15, "B", 0))),
        ("12-wider-rows", TRUNCATED, forged(BASIS, (OF_LINEAR, "H", 4))),
        ("13-checksum-of-linear-stage", CORRUPT, other(BASIS, AT_LINEAR, b"\1")),
        ("13-matrix-infinite", CORRUPT, other(BASIS, AT_LINEAR, b"\0\x7c", slice(AT_LINEAR, AT_LINEAR + 20))),
        ("13-channel-beyond", CORRUPT, other(CHANNELS, AT_CHANNELS + 2, b"\4", slice(AT_CHANNELS, AT_CHANNELS + 8))),
        ("13-channel-twice", CORRUPT, other(CHANNELS, AT_CHANNELS + 2, b"\1", slice(AT_CHANNELS, AT_CHANNELS + 8))),
    ]:
        yield f"3.3-{name}", error, data
    for name, data in (("basis", BASIS), ("channels", CHANNELS)):
        yield f"3.3-0-{name}", SOUND, data
    for name, error, data in [
        ("7-outliers-of-quads", UNSUPPORTED, forged(QUADS, (12, "H", 44))),
        ("9-outliers-unsaid", UNSUPPORTED, forged(OUTLIERS, (12, "H", 20))),
        ("10-outliers-none", CORRUPT, forged(OUTLIERS, (76, "H", 0))),
        ("10-outliers-too-many", CORRUPT, forged(OUTLIERS, (76, "H", 4))),
        ("12-outliers-more", TRUNCATED, forged(OUTLIERS, (76, "H", 2))),
    ]:
        yield f"3.3-{name}", error, data
    for name, error, data in [
        ("7-codebooks-none", UNSUPPORTED, forged(RESIDUAL, (44, "B", 0), (16, "I", 1))),
        ("7-codebooks-carried", UNSUPPORTED, forged(RESIDUAL, (44, "B", 1), (16, "I", 1))),
        ("7-affine-fields-of-residual", UNSUPPORTED, forged(RESIDUAL, (12, "H", 20), (16, "I", 1))),
        ("10-stages-0", CORRUPT, forged(RESIDUAL, (14, "B", 0))),
        ("10-stages-9", CORRUPT, forged(RESIDUAL, (14, "B", 9), (16, "I", 16 + 9 * 8))),
        ("10-row_bits-residual-of-3-bits", CORRUPT, forged(RESIDUAL, (16, "I", 16 + 2 * 3))),
        ("10-row_bits-residual-of-13-bits", CORRUPT, forged(RESIDUAL, (16, "I", 16 + 2 * 26))),
        ("10-row_bits-residual-uneven", CORRUPT, forged(RESIDUAL, (16, "I", 33))),
        ("10-residual-head_dim-20", CORRUPT, forged(RESIDUAL, (56, "Q", 20))),
        ("10-residual-of-two-rounds", CORRUPT, forged(RESIDUAL, (12, "H", 12))),
        ("11-name-cut", CORRUPT, sealed(struct.pack("<8sI", RESIDUAL[:8], 99) + RESIDUAL[12:95]) + RESIDUAL[100:]),
        ("12-residual-cut", TRUNCATED, RESIDUAL[:-1]),
    ]:
        yield f"3.3-{name}", error, data
    yield "3.3-0-levels", SOUND, LEVELS
    yield "3.3-0-outliers", SOUND, OUTLIERS
    for name, data in (("split", PLAIN), ("paper", PAPER), ("quads", QUADS), ("rope", ROPE), ("no-tokens", NOTHING)):
        yield f"3.3-0-{name}", SOUND, data
    for name, data in (("keep-few", FEW), ("keep-many", MANY)):
        yield f"3.3-0-{name}", SOUND, data
    yield "3.3-0-exact-last-beyond", SOUND, forged(LAST, (46, "H", 65535), (48, "Q", 1))[:-8]
    yield "3.3-0-passed-over", SOUND, forged(PLAIN, (6, "B", 2), (40, "h", -112), (42, "h", 117))


def of_runs() -> Iterator[Case]:
    runs = spec_vectors.run_stream()
    options = {"preset": "quad2", "center": "rope", "rope": pqcodec.Rope(theta=100.0), "seed": 0, **REFERENCE}
    kept = pqcodec.encode(np.ones((9, 4), np.float16), keep=[0, 8], **options)
    joined = pqcodec.encode(np.ones((2, 1, 4), np.float16), join_heads=True, **options)
    chosen = pqcodec.encode(np.ones((1, 4), np.float16), channels=[1, 3], **options)
    for name, error, data in [
        ("10-runs-of-split", CORRUPT, forged(ROPE, (12, "H", 527))),
        ("10-runs-without-offsets", CORRUPT, forged(QUADS, (12, "H", 524))),
        ("10-runs-without-rope", CORRUPT, forged(runs, (12, "H", 525))),
        ("10-runs-before-rope", CORRUPT, forged(runs, (12, "H", 781))),
        ("10-runs-of-kept-tokens", CORRUPT, forged(kept, (12, "H", 591))),
        ("10-runs-of-joined-heads", CORRUPT, forged(joined, (12, "H", 655))),
        ("10-runs-of-channels", CORRUPT, forged(chosen, (12, "H", 527))),
        ("7-flag-1024", UNSUPPORTED, forged(runs, (12, "H", 1551))),
    ]:
        yield f"3.3-{name}", error, data
    yield "3.3-0-runs", SOUND, runs


def of_shared_fields() -> Iterator[Case]:
    """Step 9 and 10 of what 13.1 tells: most of these would have the same size if they were sound."""
    tokens, channels, fields, place, pairing, angle_bits, reserved = (OF_CODING + n for n in (0, 4, 8, 9, 10, 11, 14))
    for name, error, data in [
        ("9-group_tokens-0", UNSUPPORTED, forged(SCALAR, (tokens, "I", 0))),
        ("9-group_channels-0", UNSUPPORTED, forged(SCALAR, (channels, "I", 0))),
        ("9-fields-4", UNSUPPORTED, forged(SCALAR, (fields, "B", 4))),
        ("9-place-of-fields", UNSUPPORTED, forged(SCALAR, (place, "B", 1))),
        ("9-fields-of-pairs-in-a-table", UNSUPPORTED, forged(PAIRS, (place, "B", 2))),
        ("10-fields-of-pairs-in-a-table-of-scalars", CORRUPT, forged(SCALAR, (fields, "B", 3), (place, "B", 2))),
        ("11-fields-of-a-table-of-no-name", CORRUPT, forged(SCALAR, (place, "B", 2))),
        ("9-pairing-3", UNSUPPORTED, forged(PAIRS, (pairing, "B", 3))),
        ("9-fields-reserved", UNSUPPORTED, forged(SCALAR, (reserved, "H", 1))),
        ("10-group_tokens-4097", CORRUPT, forged(PAIRS, (tokens, "I", 4097), (20, "I", 4096))),
        ("10-group_tokens-3-of-128", CORRUPT, forged(PAIRS, (tokens, "I", 3))),
        ("10-group_channels-1025", CORRUPT, forged(SCALAR, (channels, "I", 1025))),
        ("10-fields-3-of-scalar", CORRUPT, forged(SCALAR, (fields, "B", 3))),
        ("10-pairing-1-of-scalar", CORRUPT, forged(SCALAR, (pairing, "B", 1))),
        ("10-angle_bits-4-of-scalar", CORRUPT, forged(SCALAR, (angle_bits, "B", 4))),
        ("10-radius_bits-scalar", CORRUPT, forged(SCALAR, (14, "B", 1))),
        ("10-row_bits-scalar-uneven", CORRUPT, forged(SCALAR, (16, "I", 63))),
        ("10-row_bits-scalar-9-bits", CORRUPT, forged(SCALAR, (16, "I", 144))),
        ("10-scalar-of-two-rounds", CORRUPT, forged(SCALAR, (12, "H", 28))),
        ("10-fields-2-of-pairs", CORRUPT, forged(PAIRS, (fields, "B", 2))),
        ("10-group_channels-4-of-pairs", CORRUPT, forged(PAIRS, (channels, "I", 4))),
        ("10-pairing-0-of-pairs", CORRUPT, forged(PAIRS, (pairing, "B", 0))),
        ("10-angle_bits-0-of-pairs", CORRUPT, forged(PAIRS, (angle_bits, "B", 0), (14, "B", 8))),
        ("10-angle_bits-9-of-pairs", CORRUPT, forged(PAIRS, (angle_bits, "B", 9), (16, "I", 104))),
        ("10-radius_bits-0-of-pairs", CORRUPT, forged(PAIRS, (angle_bits, "B", 8), (14, "B", 0))),
        ("10-row_bits-pairs", CORRUPT, forged(PAIRS, (16, "I", 63))),
    ]:
        yield f"3.3-{name}", error, data


def of_sketches() -> Iterator[Case]:
    """The same of what 21.1 tells, and the stages that a sketch has not."""
    blocks, outlier_blocks, channels, group_tokens = (OF_CODING + n for n in (1, 2, 4, 8))
    heads = pqcodec.encode(np.ones((1, 1, 4), np.float32), preset="qjl", seed=0, **REFERENCE)
    rope = struct.pack("<QHB5s2I", 7, 4, 1, bytes(5), 1 << 31, 1 << 30)
    chosen = with_part(KEYS, BEHIND_CODING, struct.pack("<H6s", 6, bytes(6)), (15, "B", 1))
    lists = sealed(struct.pack("<6H", *range(6)))
    for name, error, data in [
        ("9-sketch-reserved-6", UNSUPPORTED, forged(SKETCH, (channels + 2, "H", 1))),
        ("9-sketch-reserved-12", UNSUPPORTED, forged(SKETCH, (group_tokens + 4, "I", 1))),
        ("10-sketch-blocks-9", CORRUPT, forged(KEYS, (blocks, "B", 9), (16, "I", 16 + 9 * 16))),
        ("10-sketch-outlier_blocks-0", CORRUPT, forged(SKETCH, (blocks, "B", 4), (outlier_blocks, "B", 0))),
        ("10-sketch-outlier_blocks-9", CORRUPT, forged(SKETCH, (outlier_blocks, "B", 9), (16, "I", 32 + 11 * 16))),
        ("10-sketch-outlier_blocks-of-no-channels", CORRUPT, forged(KEYS, (outlier_blocks, "B", 1))),
        ("10-sketch-group_tokens-0", CORRUPT, forged(SKETCH, (group_tokens, "I", 0))),
        ("10-sketch-group_tokens-4097", CORRUPT, forged(SKETCH, (group_tokens, "I", 4097), (20, "I", 4096))),
        ("10-sketch-group_tokens-5-of-64", CORRUPT, forged(SKETCH, (group_tokens, "I", 5))),
        ("10-sketch-group_tokens-of-no-channels", CORRUPT, forged(KEYS, (group_tokens, "I", 4))),
        ("10-sketch-radius_bits", CORRUPT, forged(SKETCH, (14, "B", 0))),
        ("10-sketch-joined", CORRUPT, forged(heads, (12, "H", 132))),
        ("10-sketch-before-rope", CORRUPT, with_part(KEYS, BEHIND_CODING, rope, (12, "H", 260))),
        ("10-sketch-of-chosen-channels", CORRUPT, chosen[:92] + lists + chosen[92:]),
    ]:
        yield f"3.3-{name}", error, data


def of_no_leading_index() -> Iterator[Case]:
    """Sections of one block are there where L = 0, those of a block for each leading index are not."""

    def empty(**options: Any) -> bytes:
        return pqcodec.encode(np.ones((0, 3, 4), np.float16), preset="pq2", seed=0, **options, **REFERENCE)

    one, each = empty(keep=[0, 2]), empty(keep=np.zeros((0, 2), int))
    basis, channels = empty(basis=np.full((2, 4), 0.5)), empty(channels=[1, 3])
    for name, error, data in [
        ("0-one-list-of-no-leading-index", SOUND, one),
        ("0-lists-of-no-leading-index", SOUND, each),
        ("0-basis-of-no-leading-index", SOUND, basis),
        ("0-channels-of-no-leading-index", SOUND, channels),
        ("12-no-leading-index-no-list", TRUNCATED, one[:92]),
        ("12-no-leading-index-no-basis", TRUNCATED, basis[:84]),
        ("13-list-of-no-leading-index", CORRUPT, other(one, 92, b"\7", slice(92, 97))),
    ]:
        yield f"3.3-{name}", error, data


# -- II.5: files -------------------------------------------------------------------------------------------------
TENSOR = {"name": "x", "layer": None, "role": "other", "shape": [2], "dtype": "int8", "layout": "..."}
CODED = {"name": "x", "layer": None, "role": "other", "shape": [1, 4], "dtype": "float16", "layout": "..."}
KIND_3 = frame(3, b'{"m":1}')


def exact(body: bytes = sealed(b"\1\xff"), without: str = "", **changes: Any) -> bytes:
    """A frame of the exact tensor ``x``."""
    return frame(2, json.dumps({key: value for key, value in (TENSOR | changes).items() if key != without}).encode(), body)


def coded(stream: bytes = PLAIN, **changes: Any) -> bytes:
    """A frame of the coded tensor ``x``."""
    return frame(1, json.dumps(CODED | changes).encode(), stream)


def listed(of: bytes, **changes: Any) -> dict[str, Any]:
    """The object of an index of a file's first frame."""
    meta, body = struct.unpack_from("<IQ", of, 8)
    return ITEM | {"meta_bytes": meta, "body_bytes": body} | changes


def told(of: bytes, **changes: Any) -> bytes:
    """A file of one frame, of which the index tells something else."""
    return assemble(of, listed=[listed(of, **changes)])


def without(key: str) -> bytes:
    item = listed(X)
    del item[key]
    return assemble(X, listed=[item])


def head(version: int = 1, reserved: int = 0) -> bytes:
    return sealed(b"\x89PQF" + bytes([version, reserved]) + bytes(6))


def footer(index: int, size: int) -> bytes:
    return sealed(b"PQFE" + struct.pack("<QQ", index, size))


def edited(of: bytes, at: int, value: bytes) -> bytes:
    """A frame with other bytes in its header, under a checksum that holds."""
    meta = struct.unpack_from("<I", of, 8)[0]
    new = bytearray(other(of, at, value))
    new[20:24] = struct.pack("<I", checksum(bytes(new[:20] + new[24 : 24 + meta])))
    return bytes(new)


X, BARE = exact(), assemble()
INDEX = BARE[16:-24]  # its frame


def of_opening() -> Iterator[Case]:
    whole = 40 + len(INDEX)
    for name, error, data in [
        ("1-magic", CORRUPT, b"\x89PQG" + BARE[4:]),
        ("2-15-bytes", TRUNCATED, BARE[:15]),
        ("3-version", UNSUPPORTED, head(3) + BARE[16:]),
        ("4-checksum", CORRUPT, other(BARE, 12, bytes(4))),
        ("4-reserved", UNSUPPORTED, head(reserved=1) + BARE[16:]),
        ("5-no-footer", TRUNCATED, BARE[:-24]),
        ("6-index-in-the-head", CORRUPT, head() + INDEX + footer(15, whole)),
        ("6-index-behind-the-footer", CORRUPT, head() + INDEX + footer(1 << 62, whole)),
        ("6-kind", CORRUPT, head() + X + footer(16, 40 + len(X))),
        ("6-frame", UNSUPPORTED, head() + edited(INDEX, 4, b"\x09") + footer(16, whole)),
        ("6-gap", CORRUPT, head() + INDEX + b"\0" + footer(16, 1 + whole)),
        ("7-checksum", CORRUPT, head() + other(INDEX, len(INDEX) - 1, b"\1") + footer(16, whole)),
        ("7-json", CORRUPT, assemble(index=b"[")),
        ("7-nan", CORRUPT, assemble(index=b"[NaN]")),
        ("7-key-twice", CORRUPT, assemble(index=b'[{"offset":16,"offset":16}]')),
        ("7-object-in-version-1", CORRUPT, assemble(index=b'{"previous":17,"frames":[]}')),
        ("7-no-list-in-version-2", CORRUPT, assemble(X, index=b'{"previous":17}', version=2)),
        ("7-previous-16", CORRUPT, assemble(index=b'{"previous":16,"frames":[]}', version=2)),
        ("7-previous-behind", CORRUPT, assemble(index=b'{"previous":17,"frames":[]}', version=2)),
        ("8-key", CORRUPT, without("layer")),
        ("8-kind", UNSUPPORTED, told(X, kind=5)),
        ("8-kind-true", UNSUPPORTED, told(X, kind=True)),
        ("8-kind-index", CORRUPT, told(X, kind=4)),
        ("8-offset", CORRUPT, told(X, offset=16.0)),
        ("8-size", CORRUPT, told(X, body_bytes=-6)),
        ("8-name-empty", CORRUPT, told(X, name="")),
        ("8-name-half-a-pair", CORRUPT, told(X, name="\ud800")),
        ("8-layer", CORRUPT, told(X, layer=True)),
        ("8-role", CORRUPT, told(X, role="query")),
        ("8-metadata-with-a-name", CORRUPT, assemble(KIND_3, listed=[listed(KIND_3, kind=3)])),
        ("9-gap", CORRUPT, assemble(X, listed=[])),
        ("9-beyond", CORRUPT, told(X, body_bytes=7)),
        ("10-no-footer", CORRUPT, assemble(X, index=b'{"previous":%d,"frames":[]}' % (16 + len(X)), version=2)),
        ("11-name-twice", CORRUPT, assemble(X, X, version=2)),
        ("11-coded-in-version-1", CORRUPT, assemble(coded(), coded(first_token=1))),
        ("11-another-layer", CORRUPT, assemble(coded(), coded(first_token=1, layer=0), version=2)),
        ("11-metadata-twice", CORRUPT, assemble(KIND_3, KIND_3)),
    ]:
        yield f"II.5-open-{name}", error, data


def of_frames() -> Iterator[Case]:
    longer = struct.pack("<Q", struct.unpack_from("<Q", X, 12)[0] + 1)
    for name, error, data in [
        ("1-header", CORRUPT, head() + footer(16, 40)),
        ("1-magic", CORRUPT, assemble(edited(X, 3, b"S"))),
        ("1-meta_bytes", CORRUPT, told(X).replace(X[:12], X[:8] + struct.pack("<I", (1 << 24) + 1))),
        ("1-meta", CORRUPT, told(X).replace(X[:12], X[:8] + struct.pack("<I", 1 << 23))),
        ("2-checksum", CORRUPT, assemble(other(X, 20, bytes(4)))),
        ("2-body", CORRUPT, told(X).replace(X[:24], edited(X, 12, longer)[:24])),
        ("3-kind", UNSUPPORTED, told(X).replace(X[:24], edited(X, 4, b"\5")[:24])),
        ("3-reserved", UNSUPPORTED, assemble(edited(X, 7, b"\1"))),
        ("4-metadata-no-object", CORRUPT, in_index(3, frame(3, b"[]"))),
        ("4-metadata-json", CORRUPT, in_index(3, frame(3, b"{"))),
        ("4-metadata-key-twice", CORRUPT, in_index(3, frame(3, b'{"a":1,"a":1}'))),
        ("4-metadata-body", CORRUPT, assemble(frame(3, b"{}", b"a"))),
        ("4-meta-no-utf-8", CORRUPT, in_index(2, frame(2, b'{"\xff":1}', sealed(b"")))),
        ("5-kind", CORRUPT, told(X, kind=1)),
        ("5-name", CORRUPT, told(X, name="y")),
        ("5-role", CORRUPT, told(X, role="key")),
        ("5-layer-true", CORRUPT, told(exact(layer=True), layer=1)),
        ("5-sizes", CORRUPT, told(X, meta_bytes=listed(X)["meta_bytes"] + 1, body_bytes=listed(X)["body_bytes"] - 1)),
    ]:
        yield f"II.5-frame-{name}", error, data
    for name, error, data in [
        ("frame-6-checksum", CORRUPT, tabled(TABLE + bytes(4))),
        ("frame-6-another-name", CORRUPT, tabled(sealed(TABLE), table="00")),
        ("frame-6-too-large", CORRUPT, tabled(sealed(TABLE + bytes(600)))),
        ("tensor-3-table-missing", UNSUPPORTED, tabled(sealed(b"\x89PQT\1\1\0\0\2\0\0\0\0\0\0\x3c"))),
        ("sound-table", SOUND, tabled(sealed(TABLE))),
        ("frame-6-kind", UNSUPPORTED, tabled(sealed(TABLE[:5] + b"\xff" + TABLE[6:]))),
        ("frame-6-levels-too-large", CORRUPT, tabled(sealed(struct.pack("<6sHI", TABLE[:6], 0, 512) + bytes(1024)))),
        ("frame-6-vectors-cut", CORRUPT, tabled(sealed(BOOKS[:-2]))),
        ("frame-6-vectors-reserved", UNSUPPORTED, tabled(sealed(BOOKS[:18] + b"\1" + BOOKS[19:]))),
        ("frame-6-vectors-channel-twice", CORRUPT, tabled(sealed(BOOKS[:20] + b"\1" + BOOKS[21:]))),
        ("frame-6-vectors-infinite", CORRUPT, tabled(sealed(BOOKS[:-2] + b"\0\x7c"))),
        ("frame-6-version", UNSUPPORTED, tabled(sealed(NEWER))),
        ("frame-6-version-of-another-name", CORRUPT, tabled(sealed(NEWER), table="0" * 64)),
        ("frame-6-version-of-another-magic", CORRUPT, tabled(sealed(b"\x89PQS" + NEWER[4:]))),
        ("frame-6-version-of-11-bytes", CORRUPT, tabled(sealed(NEWER[:11]))),
        ("frame-6-vectors-of-19-bytes", CORRUPT, tabled(sealed(BOOKS[:18] + b"\1"))),
        ("frame-6-vectors-reserved-and-no-stages", UNSUPPORTED, tabled(sealed(BOOKS[:12] + b"\0" + BOOKS[13:18] + b"\1\0"))),
        ("tensor-3-table-of-codebooks", CORRUPT, tabled(sealed(BOOKS), naming(LEVELLED, BOOKS))),
        ("tensor-3-table-of-levels", CORRUPT, tabled(sealed(TABLE), naming(RESIDUAL, TABLE))),
        ("tensor-3-table-of-other-indices", CORRUPT, tabled(sealed(BOOKS), forged(RESIDUAL, (14, "B", 1), (16, "I", 26)))),
        ("tensor-3-table-of-fewer-stages", CORRUPT, tabled(sealed(BOOKS), forged(RESIDUAL, (14, "B", 4)))),
        ("sound-table-of-codebooks", SOUND, tabled(sealed(BOOKS), RESIDUAL)),
    ]:
        yield f"II.5-{name}", error, data


TABLE, BOOKS = spec_vectors.TABLE.to_bytes(), spec_vectors.BOOKS.to_bytes()
NEWER = TABLE[:4] + b"\2" + TABLE[5:]  # of a version that nobody knows
LEVELLED = pqcodec.encode(np.ones((1, 4), np.float16), preset="nuq2", levels=spec_vectors.TABLE, seed=0, **REFERENCE)


def naming(stream: bytes, table: bytes) -> bytes:
    """A stream whose header names another shared table."""
    size = struct.unpack_from("<I", stream, 8)[0]
    return sealed(stream[: size - 36] + hashlib.sha256(table).digest()) + stream[size:]


def tabled(body: bytes, stream: bytes = LEVELLED, **changes: Any) -> bytes:
    """A file of the frame of a shared table, and of a tensor that names one."""
    meta = {"table": hashlib.sha256(body[:-4]).hexdigest()} | changes
    of_stream = {} if stream[6] == 1 else {"shape": [2, 16], "dtype": "float32"}
    return assemble(frame(6, json.dumps(meta).encode(), body), coded(stream, **of_stream))


def in_index(kind: int, of: bytes) -> bytes:
    """A file of one frame, whose meta need not be JSON."""
    name, role = (None, None) if kind == 3 else ("x", "other")
    item = listed(of, kind=kind, name=name, role=role)
    tail = assemble(listed=[item])[16:-24]
    return head() + of + tail + footer(16 + len(of), 40 + len(of) + len(tail))


def of_tensors() -> Iterator[Case]:
    two = {"first_token": 1}
    for name, error, data in [
        ("1-shape", CORRUPT, assemble(exact(shape=[2.0]))),
        ("1-shape-of-33", CORRUPT, assemble(exact(shape=[1] * 32 + [2]))),
        ("1-shape-too-large", CORRUPT, assemble(exact(shape=[1 << 48, 2]))),
        ("1-shape-absent", CORRUPT, assemble(exact(without="shape"))),
        ("1-layout", CORRUPT, assemble(exact(layout=None))),
        ("1-dtype", UNSUPPORTED, assemble(exact(dtype="int4"))),
        ("1-dtype-absent", UNSUPPORTED, assemble(exact(without="dtype"))),
        ("1-dtype-no-string", UNSUPPORTED, assemble(exact(dtype=1))),
        ("1-numpy", CORRUPT, assemble(exact(numpy=1))),
        ("1-numpy-null", CORRUPT, assemble(exact(numpy=None))),
        ("1-numpy-of-a-coded-tensor", CORRUPT, assemble(coded(numpy=1))),
        ("1-numpy-of-bfloat16", CORRUPT, assemble(exact(shape=[1], dtype="bfloat16", numpy=True))),
        ("1-numpy-of-float8", CORRUPT, assemble(exact(dtype="float8_e5m2", numpy=True))),
        ("1-rel_mse", CORRUPT, assemble(coded(rel_mse=-1))),
        ("1-rel_mse-infinite", CORRUPT, in_index(1, frame(1, json.dumps(CODED)[:-1].encode() + b',"rel_mse":1e999}', PLAIN))),
        ("1-rel_mse-of-an-exact-tensor", CORRUPT, assemble(exact(rel_mse=None))),
        ("1-seal", CORRUPT, assemble(exact(seal="0000000A"))),
        ("1-first_token", CORRUPT, assemble(coded(first_token=None))),
        ("1-body", CORRUPT, assemble(exact(shape=[3]))),
        ("1-part-of-another-shape", CORRUPT, assemble(coded(), coded(shape=[1, 5], **two), version=2)),
        ("1-part-of-another-dtype", CORRUPT, assemble(coded(), coded(dtype="float32", **two), version=2)),
        ("1-parts-of-one-dimension", CORRUPT, assemble(coded(shape=[4]), coded(shape=[4], **two), version=2)),
        ("1-part-without-first_token", CORRUPT, assemble(coded(), coded(), version=2)),
        ("1-part-of-another-place", CORRUPT, assemble(coded(), coded(first_token=2), version=2)),
        ("2-more-numbers-than-bits", CORRUPT, assemble(coded(shape=[1 << 20, 4]))),
        ("3-checksum", CORRUPT, assemble(exact(b"\1\xff" + bytes(4)))),
        ("3-stream-corrupt", CORRUPT, assemble(coded(other(PLAIN, 68, b"\0")))),
        ("3-stream-truncated", TRUNCATED, assemble(coded(PLAIN[:-1]))),
        ("3-stream-unsupported", UNSUPPORTED, assemble(coded(other(PLAIN, 4, b"\2")))),
        ("3-another-shape", CORRUPT, assemble(coded(shape=[4, 1]))),
        ("3-another-dtype", CORRUPT, assemble(coded(dtype="bfloat16"))),
        ("3-part-without-tokens", TRUNCATED, assemble(coded(), coded(NOTHING[:-1], shape=[0, 4], **two), version=2)),
        ("4-seal", CORRUPT, assemble(exact(seal="00000000"))),
        ("4-order-seal", CORRUPT, assemble(coded(seal="00000000"))),
        ("4-before-the-next-part", CORRUPT, assemble(coded(seal="00000000"), coded(PLAIN[:-1], **two), version=2)),
    ]:
        yield f"II.5-tensor-{name}", error, data


def of_walks() -> Iterator[Case]:
    grown = grown_file()
    for name, error, data in [
        ("0-frame-corrupt", CORRUPT, head() + other(X, 24, b"[") + X),
        ("0-frame-unsupported", UNSUPPORTED, head() + edited(X, 4, b"\5") + X),
        ("1-something-else", CORRUPT, BARE[:-24] + b"PQFX"),
        ("1-zeros", CORRUPT, BARE[:-24] + bytes(8)),
        ("2-cut-in-a-frame", TRUNCATED, BARE[:-30]),
        ("2-cut-in-the-footer", TRUNCATED, BARE[:-1]),
        ("2-cut-behind-the-head", TRUNCATED, head(2)),
        ("3-version-1", CORRUPT, BARE + b"P"),
        ("3-something-else", CORRUPT, grown + b"Q"),
        ("3-a-footer-behind", CORRUPT, other(grown, 379 + 8, b"\xff\xff\xff") + b"P"),
        ("3-cut-in-an-appended-frame", SOUND, grown[:600]),
        ("3-cut-in-an-appended-footer", SOUND, grown[:-1]),
        ("3-cut-before-there-was-a-footer", TRUNCATED, grown[:378]),
    ]:
        yield f"II.5-walk-{name}", error, data


def grown_file() -> bytes:
    """The file of II.7: its first commit ends at byte 379."""
    with TemporaryDirectory() as folder:
        return spec_vectors.grown_file(Path(folder))


def sound_files() -> Iterator[Case]:
    """What no example of the specification shows."""
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])

    def written(metadata: Any = None, **tensors: torch.Tensor) -> bytes:
        file = io.BytesIO()
        with PQKVWriter(file, metadata) as writer:
            for name, tensor in tensors.items():
                if name == "coded":
                    writer.add(name, tensor, layer=0, role="value", preset="quad2", seed=0, **REFERENCE)
                else:
                    writer.add_exact(name, tensor)
        return file.getvalue()

    yield "II.5-sound-bare", SOUND, written()
    yield "II.5-sound-metadata", SOUND, written({"m": [1, None, {"\u00e9": 0.5}]})
    yield "II.5-sound-bfloat16", SOUND, written(coded=x.bfloat16(), exact=x.bfloat16())
    yield "II.5-sound-float8", SOUND, written(exact=x.to(torch.float8_e5m2))
    yield "II.5-sound-bool", SOUND, assemble(exact(sealed(b"\0\7"), dtype="bool", numpy=True))
    yield "II.5-sound-no-dimensions", SOUND, written(exact=torch.tensor(1.5))
    yield "II.5-sound-part-without-tokens", SOUND, assemble(coded(), coded(NOTHING, shape=[0, 4], first_token=1), version=2)
    yield (
        "II.5-sound-minus-0",
        SOUND,
        in_index(2, frame(2, json.dumps(TENSOR)[:-1].encode() + b',"rel_mse":-0}', sealed(b"\1\xff"))),
    )

    yield "II.5-sound-more-numbers-than-bits", SOUND, assemble(coded(least_rows(), shape=[4, 200, 1024]))


def least_rows() -> bytes:
    """200 rows of 16 bits, each of which stands for 4,096 numbers, of which one is coded."""
    options = {"preset": "pq2", "join_heads": True, "channels": [5], "chunk_tokens": 4096, "seed": 0}
    data = pqcodec.encode(np.ones((4, 200, 1024), np.float16), **options, **REFERENCE)
    rows = np.frombuffer(data[-804:-4], "<u2")[::2]  # of 32 bits
    return forged(data[:-804], (16, "I", 16)) + sealed(rows.tobytes())


def lines() -> list[str]:
    return REFUSALS.read_text().splitlines() if REFUSALS.exists() else []


def main() -> None:
    there = lines()
    names = {line.split()[0] for line in there}
    new = [f"{name} {error} {data.hex()}" for name, error, data in cases() if name not in names]
    REFUSALS.write_text("".join(f"{line}\n" for line in there + new))
    print(f"{len(new)} new lines")


if __name__ == "__main__":
    main()
