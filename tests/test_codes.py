"""SPEC 3.3: every code means something. Streams that no encoder writes, as the specification's decoder and ours read them."""

from __future__ import annotations

import math
import struct
from itertools import product

import numpy as np
import pytest
import second_decoder
from conftest import BACKENDS, bits
from fuzz.shapes import seal_stream

import pqcodec
from pqcodec import constants as c
from pqcodec.codings import angles, quads
from pqcodec.codings.declared import DECLARED, Affine, Codebook, Sketch
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header, RopeField
from pqcodec.stream.orders import order_for, whole_groups
from pqcodec.stream.sections import EXACT_VECTORS, OFFSETS

HEAD_DIMS = (1, 2, 15, 16, 36, 48, 80, 100, 112, 144)


def any_header(coding: int, rng: np.random.Generator) -> Header:
    """A header of any fields, for a few vectors."""
    dim = int(rng.choice(HEAD_DIMS))
    order, affine = order_for(dim), any_affine(coding, dim, rng)
    sketch = any_sketch(dim, rng) if coding == c.CODING_SKETCH else None
    tokens = affine.tokens if affine else max(sketch.tokens, 1) if sketch else 1
    whole, bits = whole_groups(dim), int(rng.integers(1, 9))
    radius = {c.CODING_SPLIT: int(rng.integers(11, 16)), c.CODING_PAPER: c.PAPER_RADIUS_BITS, c.CODING_QUADS: 8}.get(coding, 0)
    radius = c.SKETCH_NORM_BITS if sketch else radius
    if affine and coding == c.CODING_PAIRS:
        radius = bits
    row_bits = {
        c.CODING_PAIRS: (bits + affine.angle_bits) * whole // 2 if affine else 0,
        c.CODING_SCALAR: bits * whole,
        c.CODING_SPLIT: int(rng.choice([order, radius + 7 * order, rng.integers(order, radius + 7 * order + 1)])),
        c.CODING_PAPER: 62 * order // 16,
        c.CODING_QUADS: 8 + order + int(rng.integers(4, 11)) * order // 4,
        c.CODING_SKETCH: sketch.row_bits(order) if sketch else 0,
    }[coding]
    rope = None
    if dim > 1 and rng.random() < 0.5:
        frequencies = tuple(int(f) for f in rng.integers(0, 1 << 32, rng.integers(1, dim // 2 + 1)))
        rope = RopeField(
            int(rng.choice([0, 70000, rng.integers(0, 1 << 63), (1 << 63) - 1])), int(rng.integers(1, 3)), frequencies
        )
    exact = int(rng.choice([0, 0, 2, 9]))
    return Header(
        coding,
        int(rng.integers(1, 4)),
        (2, 4, dim),
        row_bits,
        radius,
        seed=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
        chunk_tokens=int(rng.choice([1, 2, 4096 if tokens == 1 else 64])) * tokens,
        exact_tokens=exact,
        exceptions=int(rng.integers(0, 3)) if exact < 5 else 0,
        offsets=rope is not None or bool(rng.random() < 0.5),
        offset_exponent=int(rng.choice([0, -20, -112, 111])),
        radius_exponent=int(rng.choice([0, -125, 117])) if coding == c.CODING_PAPER else 0,
        rope=rope,
        numpy=True,
        rounds={c.CODING_SPLIT: int(rng.integers(1, 3)), c.CODING_PAPER: 1, c.CODING_QUADS: 2}.get(coding, 0),
        affine=affine,
        codebook=any_levels(bits, rng) if coding == c.CODING_SCALAR and rng.random() < 0.5 else None,
        sketch=sketch,
    )


def any_sketch(dim: int, rng: np.random.Generator) -> Sketch:
    """A sketch by either matrix, with outlier channels or without."""
    blocks, outlier_blocks, tokens, matrix = (int(n) for n in rng.integers(1, (9, 9, 5, 3)))
    if rng.random() < 0.3:
        return Sketch(blocks, matrix)
    return Sketch(blocks, matrix, tokens, int(rng.integers(1, dim + 1)), outlier_blocks)


def any_levels(bits: int, rng: np.random.Generator) -> Codebook:
    """Levels of any finite float16, ascending."""
    halves = np.sort(np.ldexp(rng.uniform(-1, 1, 1 << bits), rng.integers(-24, 16, 1 << bits)).astype("<f2"))
    return Codebook(tuple(halves.view("<u2").tolist()))


def any_affine(coding: int, dim: int, rng: np.random.Generator) -> Affine | None:
    """Affine fields of any granularity, where the coding has them."""
    tokens = 1 if rng.random() < 0.5 else int(rng.integers(1, 5))
    if coding == c.CODING_PAIRS:
        return Affine(tokens, 2, c.AFFINE_POLAR, int(rng.integers(1, 3)), int(rng.integers(1, 9)))
    if coding == c.CODING_SCALAR:
        channels = int(rng.choice([1, 3, 8, 32, 1024]))
        outliers = int(rng.integers(0, tokens * min(channels, dim) // 2 + 1)) if rng.random() < 0.5 else 0
        return Affine(tokens, channels, int(rng.integers(1, 3)), outliers=outliers)
    return None


def any_stream(coding: int, rng: np.random.Generator) -> bytes:
    """A stream of random bits under such a header, with checksums that hold."""
    h = any_header(coding, rng)
    data = bytearray(h.to_bytes() + rng.bytes(h.stream_bytes - h.header_bytes))
    if h.offsets:
        halves = (rng.standard_normal((h.leading, h.head_dim)) * 10.0 ** rng.integers(-7, 4)).astype("<f2")
        for lead, row in enumerate(halves):
            start = h.places[OFFSETS].start + lead * h.places[OFFSETS].entry_bytes
            data[start : start + row.nbytes] = row.tobytes()
    for i, row in enumerate(sorted(rng.choice(h.leading * h.coded_tokens or 1, h.exceptions, replace=False))):
        struct.pack_into("<Q", data, h.places[EXACT_VECTORS].start + i * (8 + h.vector_bytes), row)
    for chunk, lead in product(range(h.chunks), range(h.leading)):
        if coding == c.CODING_QUADS and rng.random() < 0.7:  # any other base is beyond the radii that there are
            base = h.blocks.place(chunk, lead) + h.blocks.tokens(chunk) * h.row_bytes
            struct.pack_into("<h", data, base, rng.integers(-300, 100))
        if (h.affine or h.sketch) and rng.random() < 0.7:  # any other exponent is beyond those that there are
            end = h.blocks.place(chunk, lead) + h.blocks.size(chunk) - c.CHECKSUM_BYTES
            struct.pack_into("<h", data, end - c.AFFINE_EXPONENT_BYTES, rng.integers(-150, 150))
    return seal_stream(bytes(data))


@pytest.mark.parametrize("coding", [code for code, one in DECLARED.items() if not one.by_vectors])  # those: test_residual
def test_streams_that_no_encoder_writes_decode_as_the_specification_says(coding: int) -> None:
    rng = np.random.default_rng(coding)
    for number in range(60):
        data = any_stream(coding, rng)
        told = second_decoder.decode(data)
        for backend in BACKENDS:
            found = bits(pqcodec.decode(data, backend=backend, estimate="unbiased"))
            np.testing.assert_array_equal(found, told, err_msg=f"{backend}, stream {number}: {data.hex()}")


@pytest.mark.parametrize("head_dim", [16, 36, 80])
def test_what_a_decoder_of_quads_passes_over_is_zero_and_means_nothing(head_dim: int) -> None:
    """Bits behind the last index of a row, and the bytes that make a block's size a multiple of 16."""
    x = np.random.default_rng(0).standard_normal((1, 3, head_dim)).astype(np.float32)
    data = bytearray(pqcodec.encode(x, preset="quad2.25", backend="reference"))
    h = Header.from_bytes(bytes(data))
    start, size, index_bytes = h.blocks.place(0, 0), h.blocks.size(0), math.ceil(5 * h.order / 32)
    spare = 8 * index_bytes - 5 * h.order // 4
    assert spare
    for row in range(3):
        last = start + 3 * h.order // 8 + (row + 1) * index_bytes - 1
        assert data[last] >> 8 - spare == 0
        data[last] |= 256 - (1 << 8 - spare)
    zeros = slice(start + 3 * h.row_bytes + 2, start + size - 4)
    assert not any(data[zeros])
    data[zeros] = b"\xff" * (zeros.stop - zeros.start)
    data[start + size - 4 : start + size] = struct.pack("<I", checksum(bytes(data[start : start + size - 4])))
    usual = pqcodec.encode(x, preset="quad2.25", backend="reference")
    for backend in BACKENDS:
        np.testing.assert_array_equal(pqcodec.decode(bytes(data), backend=backend), pqcodec.decode(usual, backend=backend))


def test_no_sum_of_a_decoder_reaches_2_to_the_22() -> None:
    """As 6.5 says: N integers of norm r add up to r sqrt(N) at most, which turning makes of r, too."""
    for order in c.ROTATION_ORDERS:
        longest = max(int((quads.points_of(b).points.astype(int) ** 2).sum(1).max()) for b in c.QUADS_INDEX_BITS)
        assert math.sqrt(longest * order / 4) * order < 1 << 22
        for table in angles.tree(order).tables:
            assert (table.cos.astype(float) ** 2 + table.sin.astype(float) ** 2 <= 1).all()
        assert (2048 + math.sqrt(order) / 2) * order < 1 << 22  # of split coding; rounding adds up to half to each integer
        blocks = order // 16  # of the paper's coding, each as long as the longest
        assert math.sqrt(blocks) * (2048 + 2) * math.sqrt(order) < 1 << 22
    leaves = angles.quad_table()
    assert (leaves.cos.astype(float) ** 2 + leaves.sin.astype(float) ** 2 <= 1).all()
