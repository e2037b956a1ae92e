"""Blocks of text that formats/SPEC.md holds, computed anew: worked examples from the second decoder, and files in hex."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import second_decoder as second

import pqcodec
from pqcodec import constants as c
from pqcodec.formats import PQKVAppender, PQKVWriter

ALTERNATING = np.array([(-1) ** i * (i + 1) for i in range(12)], np.float32)
REFERENCE = {"backend": "reference"}
FIXED = [(16, "magic .. radius_bits, linear"), (16, "row_bits .. exceptions"), (16, "seed .. exact_last")]
SPLIT_NOTES = [*FIXED, (16, "shape"), (4, "checksum"), (8, "the block")]
ROPE_NOTES = [
    *FIXED,
    (16, "shape"),
    (16, "first_position, channels, pairing, reserved"),
    (12, "frequencies, checksum"),
    (12, "offsets, checksum"),
    (20, "row 1, its vector, checksum"),
    (22, "the block"),
]


# -- bytes as text -----------------------------------------------------------------------------------------------
def hex_lines(data: bytes, notes: Iterable[tuple[int, str]]) -> list[str]:
    """Runs of bytes, each with a note; a run longer than 16 bytes takes several lines, of which the first has the note."""
    lines, at = [], 0
    for size, note in notes:
        run = data[at : at + size]
        at += size
        for first in range(0, size, 16):
            piece = run[first : first + 16].hex(" ")
            lines.append(f"    {piece:<47}   {note}".rstrip() if not first and note else f"    {piece}")
    assert at == len(data)
    return lines


def bytes_of(block: str) -> bytes:
    """The bytes that lines of hex and of JSON are; what follows three spaces is a note."""
    data = b""
    for line in block.splitlines():
        text = line.removeprefix("    ")
        data += text.encode() if text[0] in "{[" else bytes.fromhex(text.split("   ")[0])
    return data


# -- 6.7: a stream of split coding -------------------------------------------------------------------------------
def split_stream() -> bytes:
    """The numbers 1, -2, 3 ... -12 as one token, by pq2."""
    return pqcodec.encode(ALTERNATING[None], preset="pq2", seed=0, **REFERENCE)


def split_trace(data: bytes) -> list[str]:
    """Every node of a stream of one row of order 16, in the order of their bits: what it reads, and what it passes on."""
    row = int.from_bytes(data[-8:-4], "little")
    radius_bits, (row_bits,) = data[14], struct.unpack_from("<I", data, 16)
    nodes, quads = [], []

    def walk(place: int, budget: int, n: int, r: np.float32) -> None:
        if n == 4:
            per_cell, cells = second.quad(budget)
            x = second.field(row, place, budget)
            k = min(x // per_cell, len(cells) - 1)
            n_a, n_b, cos, sin = cells[k]
            i_a, i_b = divmod(x - k * per_cell, n_b)
            v = " ".join(map(str, second.walk(row, place, budget, 4, r)))
            read = f"{place:>5} {budget:>2} {float(r):<18} {x:>3} {len(cells):>2} {per_cell:>2} {k:>2}"
            quads.append(f"    {read} {n_a:>3} {n_b:>3} {i_a:>3} {i_b:>3}  {float(cos):<14} {float(sin):<14} {v}")
            return
        m_a, m_b = second.children(n)
        w = min(budget, max(1, min(7, 16 * budget // (15 * n))))
        cos, sin, shift = second.node(m_a, m_b, w)
        k, rest = second.field(row, place, w), budget - w
        left = min(max(rest * m_a // n + shift[k], max(0, rest - 7 * m_b)), min(7 * m_a, rest))
        read = f"{n:>2} {place:>5} {budget:>2} {float(r):<18} {w} {k:>2}"
        nodes.append(f"    {read}  {float(cos[k]):<14} {float(sin[k]):<14} {rest:>2} {shift[k]:>3} {left:>3} {rest - left:>3}")
        walk(place + w, left, m_a, r * cos[k])
        walk(place + w + left, rest - left, m_b, r * sin[k])

    walk(radius_bits, row_bits - radius_bits, 16, np.float32(2048))
    node_heads = "     n place  B r                  w  k  C_k            S_k             R d_k R_a R_b"
    quad_heads = "    place  B r                    x  q  T  k n_a n_b i_a i_b  C              S              v"
    return [node_heads, *nodes, "", quad_heads, *quads]


# -- 9.4: a stream with offsets under RoPE -----------------------------------------------------------------------
def rope_stream() -> bytes:
    """Three vectors of four float16 numbers, one of which holds an infinity."""
    x = np.array([[3, -1, 2, 0.5], [np.inf, 1, 1, 1], [-2, 2.5, 1, 3]], np.float16)
    rope = pqcodec.Rope(theta=100.0, first_position=70000)
    return pqcodec.encode(x, preset="pq3", center="rope", rope=rope, nonfinite="exact", seed=0, **REFERENCE)


def rope_trace(data: bytes) -> list[str]:
    """Offsets of the coded tokens: the phase of each pair, its cos and sin, and the offsets that are added."""
    first_position, channels, pairing = struct.unpack_from("<QHB", data, 64)
    frequencies = struct.unpack_from(f"<{channels // 2}I", data, 80)
    offset = np.frombuffer(data, "<f2", 4, 92).astype(np.float32)
    lines = ["    token pair     p cos_t               sin_t               offsets"]
    for token in range(3):
        turned = second.turned(offset, first_position + token, pairing, frequencies)
        for i, frequency in enumerate(frequencies):
            phase = (first_position + token) * frequency // 2**16 % 2**16
            unit = np.zeros(4, np.float32)
            unit[i] = 1
            cos, sin = (float(x) for x in second.turned(unit, first_position + token, pairing, frequencies)[[i, i + 2]])
            lines.append(f"    {token:>5} {i:>4} {phase:>5} {cos:<19.9g} {sin:<19.9g} {turned[i]:.9g}, {turned[i + 2]:.9g}")
    return lines


# -- 9.6: a stream whose offsets turn run by run -----------------------------------------------------------------
RUN_NOTES = [
    *FIXED,
    (16, "shape"),
    (16, "first_position, channels, pairing, reserved"),
    (12, "frequencies, checksum"),
    (12, "offsets, checksum"),
    (16, "the block of rows 0 and 1"),
    (16, "the block of row 2"),
]


def run_stream() -> bytes:
    """Three vectors in two blocks, whose rows are a run each."""
    x = np.array([[3, -1, 2, 0.5], [2, 1, 1, 1], [-2, 2.5, 1, 3]], np.float16)
    rope = pqcodec.Rope(theta=100.0, first_position=70000)
    return pqcodec.encode(x, preset="quad2", center="rope", rope=rope, chunk_tokens=2, seed=0, **REFERENCE)


def run_trace(data: bytes) -> list[str]:
    """Where each run begins, and the offsets of its rows."""
    channels, pairing = struct.unpack_from("<HB", data, 72)
    frequencies = struct.unpack_from(f"<{channels // 2}I", data, 80)
    stored = np.frombuffer(data, "<f2", 4, 92).astype(np.float32)
    lines = ["    token pair turned                     unit    X, Y"]
    for token in (0, 2):
        turned, begun = second.rope_turned(data, stored, token), second.begun_run(data, stored, token)
        for i, (p, q) in enumerate(second.pairs_of(channels, pairing)):
            unit = f"2^{int(np.frexp(max(abs(turned[p]), abs(turned[q])))[1]) - 11}"
            told = f"{turned[p]:.9g}, {turned[q]:.9g}"
            lines.append(f"    {token:>5} {i:>4} {told:<26} {unit:<7} {float(begun[p])!r}, {float(begun[q])!r}")
    lines += ["", "    row pair 2048 C 2048 S  offsets"]
    for row in range(3):
        found = second.run_turned(data, stored, row // 2 * 2, row % 2)
        for i, (p, q) in enumerate(second.pairs_of(channels, pairing)):
            cos, sin = second.turns_of_run(frequencies[i], row % 2)
            lines.append(f"    {row:>3} {i:>4} {cos:>6} {sin:>6}  {float(found[p])!r}, {float(found[q])!r}")
    return lines


# -- 21.6: a sketch ----------------------------------------------------------------------------------------------
SKETCH_NOTES = [
    *FIXED,
    (16, "shape"),
    (16, "sketch"),
    (4, "checksum"),
    (12, "rows: norms, signs, signs of the outlier channel"),
    (12, ""),
    (12, ""),
    (7, "list, exponent, checksum"),
]


def sketch_stream() -> bytes:
    """The vectors of 14.1, by qjl-outliers."""
    return pqcodec.encode(AFFINE_NUMBERS, preset="qjl-outliers", seed=0, **REFERENCE)


def sketch_trace(data: bytes) -> list[str]:
    """Of each row the norms and the unbiased numbers, and those of the first one shrunk."""
    words, found = [], second.sketch_rows(data, data[84:-4], 3)
    for numbers, _, _ in found:
        words.append(", ".join(str(x) for x in numbers[:6]))
    shrunk = second.sketch_rows(data, data[84:-4], 3, shrunk=True)[0][0]
    return [*words, ", ".join(str(x) for x in shrunk[:6])]


# -- 17.3: a stream of kept tokens -------------------------------------------------------------------------------
KEEP_NOTES = [
    *FIXED,
    (16, "shape"),
    (16, "tokens, lists, reserved"),
    (16, "first_position, channels, pairing, reserved"),
    (12, "frequencies, checksum"),
    (5, "tokens 0, 3 and 4, checksum"),
    (12, "offsets, checksum"),
    (22, "the block"),
]


def keep_stream() -> bytes:
    """Three of five vectors of four float16 numbers."""
    x = np.array([[3, -1, 2, 0.5], [9, 9, 9, 9], [9, 9, 9, 9], [2.5, 1, 1, 1], [-2, 2.5, 1, 3]], np.float16)
    rope = pqcodec.Rope(theta=100.0, first_position=70000)
    return pqcodec.encode(x, preset="pq3", center="rope", rope=rope, keep=[0, 3, 4], seed=0, **REFERENCE)


def keep_trace(data: bytes) -> list[str]:
    """Of each kept token its position, the phase of each pair, and the offsets that are added."""
    first_position, channels, pairing = struct.unpack_from("<QHB", data, 80)
    frequencies = struct.unpack_from(f"<{channels // 2}I", data, 96)
    offset = np.frombuffer(data, "<f2", 4, 113).astype(np.float32)
    lines = ["    row token position phases       offsets"]
    for row, token in enumerate(second.positions(data)[0]):
        position = first_position + token
        turned = ", ".join(f"{x:.9g}" for x in second.turned(offset, position, pairing, frequencies))
        phases = ", ".join(f"{position * frequency // 2**16 % 2**16:>5}" for frequency in frequencies)
        lines.append(f"    {row:>3} {token:>5} {position:>8} {phases}  {turned}")
    return lines


# -- 18.4: a stream of joined heads -------------------------------------------------------------------------------
JOINED_NOTES = [
    *FIXED,
    (24, "shape"),
    (16, "affine fields"),
    (4, "checksum"),
    (8, "the row"),
    (4, "its scale and zero"),
    (6, "exponent, checksum"),
]


def joined_stream() -> bytes:
    """Vectors of two heads and one token."""
    x = np.array([[[3, -1, 2, 0.5]], [[2.5, 1, 1, 1]]], np.float16)
    return pqcodec.encode(x, preset="int4", join_heads=True, seed=0, **REFERENCE)


LINEAR_NOTES = [
    *FIXED,
    (24, "shape"),
    (16, "affine fields"),
    (8, "width, reserved"),
    (4, "checksum"),
    (20, "the matrix, checksum"),
    *2 * [(8, "a row"), (4, "its scale and zero"), (6, "exponent, checksum")],
]


BASIS = pqcodec.BasisTable([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]])
SHARED_BASIS_NOTES = [*LINEAR_NOTES[:6], (32, "name of the table"), (4, "checksum"), *LINEAR_NOTES[8:]]


def linear_stream(basis: Any = BASIS.basis) -> bytes:
    """The same vectors, each of two numbers in a basis."""
    x = np.array([[[3, -1, 2, 0.5]], [[2.5, 1, 1, 1]]], np.float16)
    return pqcodec.encode(x, preset="int4", basis=basis, seed=0, **REFERENCE)


def linear_trace(data: bytes) -> list[str]:
    """Of each vector its row and its numbers."""
    rows, numbers = second.coded_rows(data)[:, 0], second.decode(data, [BASIS.to_bytes()]).view(np.float16)[:, 0]
    told = [(", ".join(f"{x:.9g}" for x in row), ", ".join(map(str, x))) for row, x in zip(rows, numbers, strict=True)]
    return [f"- Row {row}: the numbers {x}." for row, x in told]


# -- 19.2: a stream of vectors before RoPE -----------------------------------------------------------------------
BEFORE_ROPE_NOTES = [*ROPE_NOTES[:-2], (22, "the block")]


def before_rope_stream() -> bytes:
    """Three vectors of four float16 numbers."""
    x = np.array([[3, -1, 2, 0.5], [2.5, 1, 1, 1], [-2, 2.5, 1, 3]], np.float16)
    rope = pqcodec.Rope(theta=100.0, first_position=70000)
    return pqcodec.encode(x, preset="pq3", center="mean", rope=rope, before_rope=True, seed=0, **REFERENCE)


def before_rope_trace(data: bytes) -> list[str]:
    """Of each token its position, the phase of each pair, the row with the offset, and the numbers."""
    first_position, channels, _ = struct.unpack_from("<QHB", data, 64)
    frequencies = struct.unpack_from(f"<{channels // 2}I", data, 80)
    offset = np.frombuffer(data, "<f2", 4, 92).astype(np.float32)
    lines = ["    token position phases       rows and offsets                                    numbers"]
    rows, numbers = second.coded_rows(data)[0], second.decode(data).view(np.float16)
    for token, (row, found) in enumerate(zip(rows, numbers, strict=True)):
        position = first_position + token
        phases = ", ".join(f"{position * frequency // 2**16 % 2**16:>5}" for frequency in frequencies)
        centred = ", ".join(f"{x:.9g}" for x in row + offset)
        lines.append(f"    {token:>5} {position:>8} {phases}  {centred:<51} {', '.join(str(x) for x in found)}")
    return lines


# -- 14.1, 15.1 and 16.5: streams with affine fields -------------------------------------------------------------------
AFFINE_NUMBERS = np.array([[3, -1, 2, 0.5, -4, 1], [2.5, -1.5, 2, 1, -3, 0], [3.5, -1, 1, 0.75, -4, 2]], np.float32)
AFFINE_NOTES = [*FIXED, (16, "shape"), (16, "affine fields"), (4, "checksum")]
PAIR_NOTES = [
    *AFFINE_NOTES,
    (24, "rows"),
    (16, "starts of radii"),
    (16, "steps of radii"),
    (16, "starts of angles"),
    (16, "steps of angles"),
    (6, "exponent, checksum"),
]
SCALAR_NOTES = [*AFFINE_NOTES, (24, "rows"), (12, "scale and zero of each token"), (6, "exponent, checksum")]


RANGES = pqcodec.RangeTable([[[0.5], [-4.0]]], width=6, channels=32)  # one head, one group of channels
RANGE_NOTES = [*AFFINE_NOTES[:-1], (32, "name of the table"), (4, "checksum"), (24, "rows"), (6, "exponent, checksum")]


def affine_stream(preset: str, **options: Any) -> bytes:
    """Three vectors of six numbers."""
    return pqcodec.encode(AFFINE_NUMBERS, preset=preset, seed=0, **options, **REFERENCE)


LEVELS = (-1.0, -0.25, 0.25, 1.0)
TABLE = pqcodec.LevelTable(LEVELS)
LEVEL_NOTES = [
    *AFFINE_NOTES[:-1],
    (12, "levels, checksum"),
    (12, "rows"),
    (12, "scale and zero of each token"),
    (6, "exponent, checksum"),
]


OUTLIER_NOTES = [
    *LEVEL_NOTES[:-1],
    (4, "counts of outliers"),
    (12, "their places"),
    (12, "their values"),
    LEVEL_NOTES[-1],
]


def level_stream(preset: str = "nuq2") -> bytes:
    """The same vectors, by levels that the stream carries."""
    return pqcodec.encode(AFFINE_NUMBERS, preset=preset, levels=LEVELS, seed=0, **REFERENCE)


def level_trace(data: bytes) -> list[str]:
    """A line a token of such a stream of three: scale and zero, codes, and numbers."""
    lines, numbers = [], second.decode(data).view(np.float32)
    fields = struct.unpack_from("<6H", data, 104)
    for token, row in enumerate(numbers.tolist()):
        scale, zero = map(second.half, fields[2 * token : 2 * token + 2])
        codes = int.from_bytes(data[92 + 4 * token :][:4], "little")
        code = ", ".join(str(second.field(codes, 2 * i, 2)) for i in range(6))
        lines.append(
            f"- Token {token}: scale {scale:.9g}, zero {zero:.9g}, codes {code}: {', '.join(f'{x:.9g}' for x in row)}."
        )
    return lines


def pair_trace(data: bytes) -> list[str]:
    """Codes, radius and phase of every pair of a stream of pair polar coding of three tokens, and its two numbers."""
    block, lines = data[84:-4], ["    token pair  c  k rho              p cos_t              sin_t               numbers"]
    fields = struct.unpack_from("<32H", block, 24)
    for token, (numbers, _, _) in enumerate(second.affine_rows(data, block, 3)):
        row = int.from_bytes(block[8 * token : 8 * token + 8], "little")
        for i in range(3):
            k, code = second.field(row, 8 * i, 4), second.field(row, 8 * i + 4, 4)
            rho = np.float32(code + 0.5) * second.half(fields[8 + i]) + second.half(fields[i])
            p = (fields[16 + i] + (2 * k + 1) * fields[24 + i] // 2) % 2**16
            cos, sin = (float(x) for x in second.phase_cosines(p))
            read = f"{token:>5} {i:>4} {code:>2} {k:>2} {float(rho):<13.9g} {p:>5}"
            lines.append(f"    {read} {cos:<19.9g} {sin:<19.9g} {numbers[i]:.9g}, {numbers[i + 3]:.9g}")
    return lines


# -- 20.4: a stream of residual VQ -----------------------------------------------------------------------------------
_i, _j = np.arange(16)[:, None], np.arange(8)
BOOKS = pqcodec.VectorTable(  # 2 stages of 16 entries, 2 strided groups of 8 channels
    np.stack([((5 * _i + 3 * _j + 7 * k) % 16 - 7.5) / 2 ** (k + 2) for k in range(2)]),
    np.arange(16).reshape(8, 2).T.ravel(),
)
RESIDUAL_NOTES = [*FIXED, (16, "shape"), (32, "name of the table"), (4, "checksum"), (8, "rows"), (4, "checksum of the block")]


def residual_stream() -> bytes:
    """Two vectors of sixteen float32 numbers."""
    x = np.array([[(-1) ** i * (i % 5 + 1) for i in range(16)], [2 - i / 4 for i in range(16)]], np.float32)
    return pqcodec.encode(x, preset="rvq2", codebooks=BOOKS, **REFERENCE)


def residual_trace(data: bytes) -> list[str]:
    """A line a row of such a stream of two: scale, indices, and numbers."""
    lines, numbers = [], second.decode(data, [BOOKS.to_bytes()]).view(np.float32)
    for token, row in enumerate(numbers.tolist()):
        bits = int.from_bytes(data[100 + 4 * token :][:4], "little")
        indices = " and ".join(f"{second.field(bits, 16 + 8 * g, 4)}, {second.field(bits, 20 + 8 * g, 4)}" for g in range(2))
        told = ", ".join(f"{x:.9g}" for x in row)
        lines.append(f"- Row {token}: scale {second.half(bits & 0xFFFF):.9g}, indices {indices}: {told}.")
    return lines


# -- II.7: a file that has grown ---------------------------------------------------------------------------------
def grown_file(folder: Path) -> bytes:
    """A file of one coded tensor of one token, to which a second token and an exact tensor were appended."""
    path, x = folder / "a.pqkv", np.array([[1, -2, 3, -4], [5, 6, 7, 8]], np.float16)
    with PQKVWriter(path) as writer:
        writer.add("k", x[:1], layer=0, role="key", preset="pq2", seed=0, **REFERENCE)
    with PQKVAppender(path) as appender:
        appender.extend("k", x[1:], preset="pq2", seed=0, **REFERENCE)
        appender.add_exact("n", np.array([1, -1], np.int8))
    return path.read_bytes()


def file_lines(data: bytes) -> Iterator[str]:
    """A .pqkv file, record by record: JSON as text, all else in hex."""
    yield from hex_lines(data[:16], [(16, "head, version 2")])
    at = 16
    while at < len(data):
        if data[at : at + 4] == c.FOOTER_MAGIC:
            yield from hex_lines(data[at : at + 24], [(24, f"byte {at}: footer")])
            at += 24
            continue
        _, kind, _, meta, body, _ = c.FRAME_STRUCT.unpack_from(data, at)
        yield from hex_lines(data[at : at + 24], [(24, f"byte {at}: frame of kind {kind}")])
        yield "    " + data[at + 24 : at + 24 + meta].decode()
        at += 24 + meta
        text = body - 4 if kind == c.FRAME_INDEX else 0
        if text:
            yield "    " + data[at : at + text].decode()
        note = {c.FRAME_CODED: "stream", c.FRAME_EXACT: "numbers, checksum", c.FRAME_INDEX: "checksum"}[kind]
        yield from hex_lines(data[at + text : at + body], [(body - text, note)])
        at += body


# -- golden streams ----------------------------------------------------------------------------------------------
def golden_lines(folder: Path) -> Iterator[str]:
    """Of every golden stream its name, its SHA-256, and that of its decoded numbers, row-major and little-endian."""
    for path in sorted(folder.glob("*.pqs")):
        numbers = np.load(path.with_suffix(".npy"), allow_pickle=False)
        said = (numbers.astype(numbers.dtype.newbyteorder("<")).tobytes(), path.read_bytes())
        yield " ".join([path.stem, *(hashlib.sha256(part).hexdigest() for part in reversed(said))])
