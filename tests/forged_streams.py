"""Streams that no encoder writes: random bits under checksums that hold, with radii, bases and exponents at their ends.

Every code means something (SPEC 3.3), so these must decode for ever, too. They reach what an encoder's streams do not: radii
brought into their range, cells behind the last one, budgets at their bounds, numbers beyond the dtype's.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from fuzz.shapes import seal_stream
from spec_vectors import BOOKS

import pqcodec
from pqcodec import constants as c
from pqcodec.codings.declared import Affine, Codebook, Sketch, half_bits, half_numbers
from pqcodec.codings.vectors import VectorCodebook
from pqcodec.stream.header import Header, RopeField
from pqcodec.stream.header_fields import KeepField
from pqcodec.stream.linear import LinearField
from pqcodec.stream.orders import order_for
from pqcodec.stream.sections import EXACT_VECTORS, KEEP, LINEAR, OFFSETS

LEAST = pqcodec.RangeTable([[[2.0**-24, -65504, 65504, 0]], [[-1, 1, 0.5, 3]]], width=20, channels=8)
F16, BF16, F32 = c.DTYPE_FLOAT16, c.DTYPE_BFLOAT16, c.DTYPE_FLOAT32
# Binary16: infinity, 1 and a subnormal number, with either sign; NaN, the largest, the smallest.
PAPER_RADII = (0x7C00, 0xBC00, 0x0001, 0xFE01, 0x7BFF, 0x8003, 0xFC00, 0x3C00)
BASES = (-32768, 32767, -1240, 1063, 0, 900, -1100, 120)  # of quads, in steps; the range of r is -1240 .. 1063
EXPONENTS = (0, -32768, 32767, -126, 127, -20, 100, 3)  # of affine fields; their range is -126 .. 127
OCTAVES = (16, -20, 127, 0, -140, 128)  # ends of f16, f32 and bf16


def streams() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each."""
    yield "v1-any-split-16-fp16", of_split(F16, (16, 16), 16, 11, rounds=1)  # a bit a coordinate
    yield "v1-any-split-64-fp32", of_split(F32, (24, 64), 64, 15)
    yield "v1-any-split-48-bf16", of_split(BF16, (2, 3, 3, 48), 14 + 7 * 48, 14, chunk_tokens=2)  # 7 bits a coordinate
    yield "v1-any-split-100-fp32", of_split(F32, (7, 100), 289, 12, offsets=True, offset_exponent=111)
    rope = RopeField((1 << 63) - 1, c.ROPE_HALF, tuple(k * 0x9E3779B9 % 2**32 for k in range(10)))
    yield "v1-any-split-20-fp16", of_split(F16, (20,), 100, 13, offsets=True, offset_exponent=-9, rope=rope)
    rope = RopeField(1 << 40, c.ROPE_INTERLEAVED, tuple(k * 0x7F4A7C15 % 2**32 for k in range(80)))
    sides: dict[str, Any] = {"exact_tokens": 1, "exceptions": 2, "offsets": True, "rope": rope}
    basis: dict[str, Any] = {"linear": LinearField(c.LINEAR_BASIS, 20), "joined": True, "offsets": True, "offset_exponent": 111}
    yield "v1-any-basis-9-fp32", of_affine(F32, (2, 3, 4, 9), 3 * 32, 0, Affine(1, 32, c.AFFINE_SCALE), chunk_tokens=2, **basis)
    joined = Affine(2, 5, c.AFFINE_SCALE_ZERO, outliers=1)
    yield "v1-any-joined-7-bf16", of_affine(BF16, (2, 5, 3, 7), 3 * 48, 0, joined, chunk_tokens=2, joined=True, exceptions=2)
    before: dict[str, Any] = {"rope": rope, "before_rope": True, "offsets": True, "offset_exponent": 111}
    yield "v1-any-before-rope-160-fp32", of_quads(F32, (2, 5, 160), 4, chunk_tokens=2, **before)
    yield "v1-any-split-160-bf16", of_split(BF16, (2, 4, 160), 15 + 4 * 160, 15, rounds=1, offset_exponent=-112, **sides)
    yield "v1-any-split-576-fp32", of_split(F32, (3, 576), 2001, 11, seed=2**64 - 1)
    yield "v1-any-split-1024-fp16", of_split(F16, (2, 1024), 1025, 15)
    yield "v1-any-paper-16-fp16", of_paper(F16, (9, 16), radius_exponent=0)
    yield "v1-any-paper-100-fp32", of_paper(F32, (2, 3, 100), radius_exponent=117, offsets=True, offset_exponent=100)
    yield "v1-any-paper-192-bf16", of_paper(BF16, (3, 192), radius_exponent=111)
    yield "v1-any-paper-64-fp32", of_paper(F32, (3, 64), radius_exponent=-125)
    yield "v1-any-quads-16-bf16", of_quads(BF16, (2, 6, 16), 4, chunk_tokens=2)
    yield "v1-any-quads-36-fp16", of_quads(F16, (1, 1, 8, 36), 7, chunk_tokens=1, offsets=True, offset_exponent=-3)
    yield "v1-any-quads-112-fp32", of_quads(F32, (8, 112), 8, chunk_tokens=1)
    yield "v1-any-quads-320-fp32", of_quads(F32, (2, 2, 320), 5, exact_tokens=1, exceptions=1, chunk_tokens=3)
    yield "v1-any-quads-1024-fp32", smallest_quads()
    runs: dict[str, Any] = {"offsets": True, "runs": True, "chunk_tokens": 70}  # a run of 64 rows, and the rest of a block
    rope = RopeField((1 << 63) - 1, c.ROPE_HALF, tuple(k * 0x9E3779B9 % 2**32 for k in range(10)))
    yield "v1-any-quads-36-runs-fp16", of_quads(F16, (2, 75, 36), 5, offset_exponent=-3, rope=rope, exact_tokens=2, **runs)
    rope = RopeField(1 << 40, c.ROPE_INTERLEAVED, tuple(k * 0x7F4A7C15 % 2**32 for k in range(8)))
    yield "v1-any-quads-16-runs-fp32", of_quads(F32, (3, 140, 16), 4, offset_exponent=111, rope=rope, **runs)
    rope = RopeField(0, c.ROPE_HALF, (0, 1, 1 << 14, 1 << 30, 3 << 30, (1 << 32) - 1))
    yield "v1-any-quads-12-runs-fp32", of_quads(F32, (4, 66, 12), 10, offset_exponent=-112, rope=rope, **runs)
    polar = {"channels": c.PAIR_CHANNELS, "fields": c.AFFINE_POLAR}
    pairs = Affine(3, **polar, pairing=c.ROPE_HALF, angle_bits=4)
    yield "v1-any-pairs-20-fp16", of_affine(F16, (3, 7, 20), 32 * 8 // 2, 4, pairs, chunk_tokens=6)
    pairs = Affine(1, **polar, pairing=c.ROPE_INTERLEAVED, angle_bits=8)
    yield "v1-any-pairs-35-fp32", of_affine(F32, (2, 6, 35), 48 * 16 // 2, 8, pairs, chunk_tokens=2)
    pairs = Affine(4096, **polar, pairing=c.ROPE_HALF, angle_bits=1)
    yield "v1-any-pairs-15-bf16", of_affine(BF16, (4, 3, 15), 16, 1, pairs, chunk_tokens=4096, exact_tokens=1, exceptions=1)
    yield "v1-any-scalar-100-fp32", of_affine(F32, (4, 5, 100), 8 * 112, 0, Affine(1, 32, c.AFFINE_SCALE), chunk_tokens=2)
    numbers = Affine(2, 1, c.AFFINE_SCALE_ZERO)
    yield "v1-any-scalar-16-fp16", of_affine(F16, (4, 5, 16), 16, 0, numbers, offsets=True, offset_exponent=-3, chunk_tokens=4)
    yield "v1-any-scalar-48-bf16", of_affine(BF16, (4, 5, 48), 3 * 48, 0, Affine(5, 1024, c.AFFINE_SCALE_ZERO), chunk_tokens=10)
    ends: dict[str, Any] = {"exact_tokens": 1, "exact_last": 2, "exceptions": 1, "chunk_tokens": 2}
    yield "v1-any-split-36-exact-last", of_split(BF16, (2, 6, 36), 36 * 2, 11, **ends)
    rope = RopeField((1 << 63) - 1, c.ROPE_HALF, tuple(k * 0x9E3779B9 % 2**32 for k in range(8)))
    kept: dict[str, Any] = {"keep": KeepField(2**32, True), "exact_tokens": 1, "exceptions": 1, "chunk_tokens": 2}
    yield "v1-any-split-16-keep", of_split(F32, (2, 6, 16), 48, 12, offsets=True, rope=rope, **kept)
    numbers, eight = Affine(2, 3, c.AFFINE_SCALE_ZERO), half_bits([(i - 100) * 2.0 ** (i % 9 - 4) for i in range(256)])
    levels = Codebook(tuple(sorted(eight, key=lambda bits: half_numbers((bits,)))))
    yield "v1-any-levels-35-fp32", of_affine(F32, (2, 5, 35), 8 * 48, 0, numbers, codebook=levels, chunk_tokens=4)
    levels = Codebook((0xFBFF, 0x8000, 0, 0x0001))  # -65504, -0, 0, 2^-24
    options = {"codebook": levels, "offsets": True, "offset_exponent": -3, "chunk_tokens": 3}
    yield "v1-any-levels-20-fp16", of_affine(F16, (3, 4, 20), 2 * 32, 0, Affine(1, 1024, c.AFFINE_SCALE), **options)
    one = Codebook((0xC000, 0x3C00))
    yield (
        "v1-any-levels-16-bf16",
        of_affine(BF16, (4, 6, 16), 16, 0, Affine(3, 1, c.AFFINE_SCALE_ZERO), codebook=one, chunk_tokens=3),
    )
    apart = Affine(2, 4, c.AFFINE_SCALE_ZERO, outliers=3)
    yield "v1-any-outliers-20-fp16", of_affine(F16, (3, 7, 20), 3 * 32, 0, apart, chunk_tokens=4)
    apart = Affine(1, 1024, c.AFFINE_SCALE_ZERO, outliers=8)
    yield "v1-any-outliers-16-bf16", of_affine(BF16, (2, 9, 16), 16, 0, apart, codebook=one, chunk_tokens=5, exact_tokens=1)
    fields, named = Affine(2, 8, c.AFFINE_SCALE, outliers=1, shared=True), {"shared_ranges": LEAST.part, "chunk_tokens": 4}
    yield "v1-any-ranges-20-fp32", of_affine(F32, (2, 2, 7, 20), 3 * 32, 0, fields, **named)
    yield "v1-any-residual-16-fp32", of_residual(F32, (2, 7, 16), 2, radius_exponent=117, chunk_tokens=3)
    yield "v1-any-residual-16-bf16", of_residual(BF16, (3, 5, 16), 1, radius_exponent=-125, exact_tokens=1, exceptions=1)
    rope = RopeField(2**32 - 3, c.ROPE_INTERLEAVED, tuple(k * 0x9E3779B9 % 2**32 for k in range(1, 4)))
    before = {"joined": True, "rope": rope, "before_rope": True, "keep": KeepField(2**32, True), "exact_last": 1}
    yield "v1-any-residual-8-before-rope", of_residual(BF16, (2, 2, 6, 8), 2, radius_exponent=117, chunk_tokens=3, **before)
    yield "v1-any-basis-4-minus-0", minus_zeros()
    pairs = Affine(2, **polar, pairing=c.ROPE_HALF, angle_bits=3)
    yield "v1-any-joined-pairs-5-fp32", of_affine(F32, (3, 3, 5), 16 * 6 // 2, 3, pairs, chunk_tokens=2, joined=True)
    apart = Sketch(1, c.SKETCH_ORTHOGONAL, 2, 3, 3)
    yield "v1-any-sketch-20-bf16", of_sketch(BF16, (2, 5, 20), apart, chunk_tokens=4, exact_tokens=1, exceptions=1)
    yield "v1-any-sketch-260-fp32", of_sketch(F32, (4, 260), replace(apart, channels=40), chunk_tokens=2, seed=2**64 - 5)
    few = Sketch(8, c.SKETCH_INDEPENDENT)
    yield "v1-any-sketch-16-fp16", of_sketch(F16, (9, 4, 16), few, chunk_tokens=1, offsets=True, offset_exponent=-3)
    yield "v1-any-exact-throughout", of_split(F16, (2, 3, 16), 48, 12, exact_tokens=2**32 - 1, offsets=True)
    yield "v1-any-no-leading-index", of_split(F32, (0, 2**32, 64), 192, 12, chunk_tokens=1, offsets=True)


def of_split(dtype: int, shape: tuple[int, ...], row_bits: int, radius_bits: int, rounds: int = 2, **fields: Any) -> bytes:
    """Rows with the least and the largest radii, and some near the ends of dtypes.

    Bits are random, in every other row with long runs of ones: the last codes of a quad are behind its last cell (SPEC 6.4).
    """
    steps = c.RADIUS_STEPS_PER_OCTAVE[radius_bits]
    near = (1 + steps * (c.RADIUS_BIAS + octave) + octave % steps for octave in OCTAVES)
    codes = cycle((*near, (1 << radius_bits) - 1, 0, 1))
    ones = cycle((0, sum(0xFFFFF << place for place in range(radius_bits, row_bits, 32)) & (1 << row_bits) - 1))
    header = Header(c.CODING_SPLIT, dtype, shape, row_bits, radius_bits, rounds=rounds, **fields)

    def edited(row: int) -> int:
        return (row | next(ones)) >> radius_bits << radius_bits | next(codes)

    return forged(header, lambda block, rows: of_rows(header, block, edited))


def of_paper(dtype: int, shape: tuple[int, ...], **fields: Any) -> bytes:
    """Every third vector has random radii; the others have odd ones."""
    order, radii, turn = order_for(shape[-1]), cycle(PAPER_RADII), cycle((True, True, False))
    header = Header(c.CODING_PAPER, dtype, shape, c.PAPER_BLOCK_BITS * order // c.PAPER_BLOCK, c.PAPER_RADIUS_BITS, **fields)

    def edited(row: int) -> int:
        if next(turn):
            for place in range(0, header.row_bits, c.PAPER_BLOCK_BITS):
                row = row & ~(0xFFFF << place) | next(radii) << place
        return row

    return forged(header, lambda block, rows: of_rows(header, block, edited))


def of_quads(dtype: int, shape: tuple[int, ...], bits: int, **fields: Any) -> bytes:
    """Blocks of random bits, each with another base, and in each the least and the largest radius, and the zero vector."""
    order, bases, codes = order_for(shape[-1]), cycle(BASES), cycle((255, 1, 128, 0))
    row_bits = c.QUADS_RADIUS_BITS + order + bits * order // 4
    header = Header(c.CODING_QUADS, dtype, shape, row_bits, c.QUADS_RADIUS_BITS, rounds=2, **fields)

    def edited(block: bytearray, rows: int) -> None:
        at = rows * (order // 8 + -(-bits * order // 32))
        block[at : at + rows] = bytes(next(codes) for _ in range(rows))
        struct.pack_into("<h", block, at + rows, next(bases))

    return forged(header, edited)


def of_affine(dtype: int, shape: tuple[int, ...], row_bits: int, radius_bits: int, affine: Affine, **fields: Any) -> bytes:
    """Blocks of random codes and fields, some of which are no numbers, each with another exponent."""
    coding = c.CODING_PAIRS if affine.fields == c.AFFINE_POLAR else c.CODING_SCALAR
    header, exponents = Header(coding, dtype, shape, row_bits, radius_bits, rounds=0, affine=affine, **fields), cycle(EXPONENTS)
    halves = cycle((0x7C00, 0x3C00, 0xFC00, 0xFE01, 0xBC00, 0x0001, 0x7BFF))

    random_places = iter(range(1 << 30))

    def edited(block: bytearray, rows: int) -> None:
        for at in range(rows * header.row_bytes, len(block) - 2, 10):  # every fifth field
            struct.pack_into("<H", block, at, next(halves))
        if affine.outliers:
            with_outliers(header, block, rows, next(random_places))
        struct.pack_into("<h", block, len(block) - 2, next(exponents))

    return forged(header, edited)


def of_residual(dtype: int, shape: tuple[int, ...], stages: int, **fields: Any) -> bytes:
    """Rows of random indices; most of the scales are at an end of float16, or are no number."""
    row_bits, codebook = BOOKS.vectors.row_bits(stages), VectorCodebook(BOOKS.digest)
    header, scales = (
        Header(c.CODING_RESIDUAL, dtype, shape, row_bits, stages, rounds=0, codebook=codebook, **fields),
        cycle(PAPER_RADII),
    )
    return forged(header, lambda block, rows: of_rows(header, block, lambda row: row >> 16 << 16 | next(scales)))


def of_sketch(dtype: int, shape: tuple[int, ...], sketch: Sketch, **fields: Any) -> bytes:
    """Blocks of random signs and lists, of norms some of which are no numbers, each with another exponent."""
    row_bits = sketch.row_bits(order_for(shape[-1]))
    header = Header(c.CODING_SKETCH, dtype, shape, row_bits, c.SKETCH_NORM_BITS, rounds=0, sketch=sketch, **fields)
    norms, exponents = cycle(PAPER_RADII), cycle(EXPONENTS)

    def edited(block: bytearray, rows: int) -> None:
        for at in range(0, rows * header.row_bytes, header.row_bytes):
            struct.pack_into("<H", block, at, next(norms))
        struct.pack_into("<h", block, len(block) - 2, next(exponents))

    return forged(header, edited)


def with_outliers(header: Header, block: bytearray, rows: int, number: int) -> None:
    """Give a block counts that end within its room, or not, and places of which most ascend."""
    assert header.affine
    rng = random.Random(number)
    ends, each = header.affine.room(header.order)
    room = ends * (rows * each // header.affine.tokens)
    segments = -(-rows * header.width // c.OUTLIER_SEGMENT)
    at = len(block) - 2 - 4 * room - 4 * segments
    for segment in range(segments):
        count = room // segments if number % 3 else rng.choice((0, room, (1 << 32) - 1))
        struct.pack_into("<I", block, at + 4 * segment, count)
        here = min(rows * header.width - segment * c.OUTLIER_SEGMENT, c.OUTLIER_SEGMENT)
        first = segment * (room // segments)
        places = sorted(rng.randrange(here) for _ in range(room // segments))
        for i, place in enumerate(places):
            told = place if rng.random() < 0.9 else rng.randrange(1 << 16)
            struct.pack_into("<H", block, at + 4 * segments + 2 * (first + i), told)


def smallest_quads() -> bytes:
    """A vector of the least radius whose signs and points make one large number of it: the only one that does not become 0."""
    x = torch.zeros(1, c.MAX_HEAD_DIM)
    x[0, 700] = 1
    data = bytearray(pqcodec.encode(x, preset="quad3.5", seed=0, backend="reference"))
    header = Header.from_bytes(bytes(data))
    signs, indices = header.order // 8, 10 * header.order // 32
    at = header.payload_start + signs
    data[at : at + indices] = bytes([255]) * indices
    struct.pack_into("<Bh", data, at + indices, 1, -32768)
    return seal_stream(bytes(data))


def minus_zeros() -> bytes:
    """Rows times a matrix, both of the least numbers: signs alone are left, to which -0 and other offsets are added."""
    affine, linear = Affine(1, c.MAX_HEAD_DIM, c.AFFINE_SCALE), LinearField(c.LINEAR_BASIS, 2)
    sides: dict[str, Any] = {"offsets": True, "offset_exponent": -112, "chunk_tokens": 1}
    header = Header(c.CODING_SCALAR, F32, (2, 3, 4), 8 * 16, 0, rounds=0, affine=affine, linear=linear, **sides)
    data = bytearray(forged(header, lambda block, rows: struct.pack_into("<Hh", block, len(block) - 4, 1, -126)))
    struct.pack_into("<8H", data, header.places[LINEAR].start, *[0x0001] * 8)
    struct.pack_into("<4H", data, header.places[OFFSETS].start, *[0x8000] * 4)  # -0, of the first leading index
    return seal_stream(bytes(data))


def of_rows(header: Header, block: bytearray, edited: Any) -> None:
    """Every row of a block, edited as a number."""
    for at in range(0, len(block), header.row_bytes):
        row = int.from_bytes(block[at : at + header.row_bytes], "little")
        block[at : at + header.row_bytes] = edited(row).to_bytes(header.row_bytes, "little")


def forged(header: Header, edited: Any) -> bytes:
    """A stream of random bits under checksums; ``edited(block, rows)`` changes a block of payload in place."""
    rng = random.Random(repr(header))
    data = bytearray(header.to_bytes())
    data += rng.randbytes(header.stream_bytes - len(data))
    place = header.places[OFFSETS]
    for entry in range(place.entries):
        at = place.start + entry * place.entry_bytes
        offsets = np.frombuffer(data, "<u2", header.head_dim, at)
        offsets &= np.where(offsets & 0x7C00 == 0x7C00, 0xBFFF, 0xFFFF).astype(np.uint16)  # finite
    place = header.places[LINEAR]
    if place.entries:
        numbers = np.frombuffer(data, "<u2", (place.entry_bytes - c.CHECKSUM_BYTES) // 2, place.start)
        numbers &= np.where(numbers & 0x7C00 == 0x7C00, 0xBFFF, 0xFFFF).astype(np.uint16)  # finite
    place = header.places[KEEP]
    for entry in range(place.entries):  # positions with two zeros between them, and the last one of the tensor
        least = [3 * i + entry for i in range(header.tokens - 1)]
        struct.pack_into(f"<{header.tokens}I", data, place.start + entry * place.entry_bytes, *least, header.keep.tokens - 1)
    last = header.leading * header.coded_tokens
    for i, row in enumerate(sorted(rng.sample(range(last), header.exceptions)) if header.exceptions else ()):
        struct.pack_into("<Q", data, header.places[EXACT_VECTORS].start + i * (8 + header.vector_bytes), row)
    for chunk in range(header.chunks if header.leading else 0):
        rows = min(header.chunk_tokens, header.coded_tokens - chunk * header.chunk_tokens)
        for lead in range(header.blocks.leading):
            at = header.blocks.place(chunk, lead)
            block = data[at : at + header.blocks.size(chunk) - c.CHECKSUM_BYTES]
            edited(block, rows)
            data[at : at + len(block)] = block
    return seal_stream(bytes(data))
