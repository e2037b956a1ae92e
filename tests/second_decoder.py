"""A second decoder of streams, written from formats/SPEC.md Part I and from nothing else of this project.

It shares no code with pqcodec, favours the specification's own words over speed, and so tells whether they suffice.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

F = np.float32
ORDERS = (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576, 640, 768, 896, 1024)
PRIME = 2**32 - 5
SPECIFICATION = Path(__file__).parent.parent / "formats" / "SPEC.md"


# -- 4: PRNG and checksum ------------------------------------------------------------------------------------------
def splitmix64(seed: int, i: int) -> int:
    mask = 2**64 - 1
    z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


@cache
def key(i: int) -> int:
    return 1 + splitmix64(0x5051636865636B31, i) % (PRIME - 1)


def checksum(data: bytes) -> int:
    padded = data + bytes(-len(data) % 4)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    return (len(data) * key(0) + sum(w * key(i) for i, w in enumerate(words, 1))) % PRIME


def holds(data: bytes) -> bool:
    """Whether the last four bytes are the checksum of those before them."""
    return checksum(data[:-4]) == struct.unpack("<I", data[-4:])[0]


# -- 5: rotation ---------------------------------------------------------------------------------------------------
def legendre(a: int, q: int) -> int:
    a %= q
    return 0 if a == 0 else 1 if pow(a, (q - 1) // 2, q) == 1 else -1


@cache
def hadamard(order: int) -> np.ndarray:
    odd = order // (order & -order)
    if odd == 1:
        h = np.array([[1]])
    else:
        base = 4 * odd
        q = {12: 11, 20: 19, 28: 13, 36: 17}[base]
        s = np.array([[0] + [1] * q] + [[1 if q % 4 == 1 else -1] + [legendre(i - j, q) for j in range(q)] for i in range(q)])
        eye = np.eye(q + 1, dtype=int)
        h = eye + s if q % 4 == 3 else np.kron(s, [[1, 1], [1, -1]]) + np.kron(eye, [[1, -1], [-1, -1]])
    while len(h) < order:
        h = np.kron(h, [[1, 1], [1, -1]])
    return h


@cache
def permutation(n: int) -> list[int]:
    p = list(range(n))
    for i in range(n - 1, 0, -1):
        j = (splitmix64(3, i) >> 32) * (i + 1) >> 32
        p[i], p[j] = p[j], p[i]
    return p


def signs(seed: int, first: int, n: int) -> np.ndarray:
    """Signs from output ``first`` of the seed on."""
    return np.array([1 - 2 * (splitmix64(seed, first + i // 64) >> i % 64 & 1) for i in range(n)])


def turned_back(v: list[int], seed: int, two_rounds: bool) -> np.ndarray:
    """Step 3 of 6.5."""
    n = len(v)
    s = signs(seed, 0, n) * (hadamard(n).T @ np.array(v))
    if not two_rounds:
        return s
    t = np.zeros_like(s)
    for k, p in enumerate(permutation(n)):
        t[p] = s[k]
    return signs(seed, -(-n // 64), n) * (hadamard(n).T @ t)


# -- 6: tables -----------------------------------------------------------------------------------------------------
def trunc16(x: float) -> F:
    """The f16 number nearest to x towards zero."""
    if abs(x) < 1e-12:  # an exact zero
        return F(0)
    step = 2.0 ** max(math.frexp(x)[1] - 11, -24)
    return F(math.trunc(x / step) * step)


@cache
def means(m_a: int, m_b: int, n: int) -> tuple[list[float], list[float], list[int]]:
    """c_k, s_k and e_j of section 6.2, by Gauss-Legendre on eight panels a cell."""
    grid = 2**10 if m_a + m_b <= 16 else 2**14
    h = 2 * m_a * m_b / (m_a + m_b) + 2
    s = 1.03 / math.sqrt(h) * (1 + 0.75 / h)
    e = [0]
    for j in range(1, n):
        t = (m_b / m_a) * (j / (n - j)) ** (2 * s)
        e.append(math.floor(grid * t / (1 + t) + 0.5))
    e.append(grid)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    top = math.atan(math.sqrt((m_b - 1) / (m_a - 1)))
    cosines, sines = [], []
    for low, high in itertools.pairwise(e):
        cuts = np.linspace(math.asin(math.sqrt(low / grid)), math.asin(math.sqrt(high / grid)), 9)
        psi = np.concatenate([(a + b) / 2 + (b - a) / 2 * nodes for a, b in itertools.pairwise(cuts)])
        f = (np.sin(psi) / math.sin(top)) ** (m_b - 1) * (np.cos(psi) / math.cos(top)) ** (m_a - 1) * np.tile(weights, 8)
        cosines.append(float((f * np.cos(psi)).sum() / f.sum()))
        sines.append(float((f * np.sin(psi)).sum() / f.sum()))
    return cosines, sines, e


@cache
def node(m_a: int, m_b: int, w: int) -> tuple[list[F], list[F], list[int]]:
    """C_k, S_k and d_k of section 6.3."""
    cosines, sines, _ = means(m_a, m_b, 2**w)
    ratio = [m_a * m_b / (m_a + m_b) * math.log2(c / s * math.sqrt(m_b / m_a)) for c, s in zip(cosines, sines, strict=True)]
    return [trunc16(c) for c in cosines], [trunc16(s) for s in sines], [math.floor(r + 0.5) if w else 0 for r in ratio]


def z(n: int) -> float:
    return 0.0 if n == 1 else math.sin(math.pi / n) / (math.pi / n)


@cache
def quad(budget: int) -> tuple[int, list[tuple[int, int, F, F]]]:
    """T, and (n_a, n_b, C, S) of each cell, of section 6.4."""
    q = min(128, max(1, math.floor(2 ** (budget / 3 - 1) + 0.5)))
    codes = 2**budget // q
    cosines, sines, _ = means(2, 2, q)
    cells = []
    for k, (c, s) in enumerate(zip(cosines, sines, strict=True)):
        u = 1.0 if 2 * k == q - 1 else c / s if 2 * k < q - 1 else s / c
        wide = min(max(math.floor(math.sqrt(codes * u)), 1), codes)
        narrow = codes // wide
        wide, narrow = min(512, codes // narrow), min(512, narrow)
        n_a, n_b = (wide, narrow) if 2 * k <= q - 1 else (narrow, wide)
        cells.append((n_a, n_b, trunc16(c * z(n_a)), trunc16(s * z(n_b))))
    return codes, cells


def direction(g: int) -> tuple[F, F]:
    return trunc16(math.cos(2 * math.pi * g / 2048)), trunc16(math.sin(2 * math.pi * g / 2048))


def sector_direction(i: int, n: int) -> tuple[F, F]:
    k = (2**26 + n // 2) // n
    return direction(((2 * i + 1) * k + 2**15) // 2**16 % 2048)


# -- 6 and 7: rows -------------------------------------------------------------------------------------------------
def field(row: int, place: int, width: int) -> int:
    return row >> place & (1 << width) - 1


def children(n: int) -> tuple[int, int]:
    left = 16 * -(-n // 32) if n > 16 else n // 2
    return left, n - left


def walk(row: int, place: int, budget: int, n: int, r: F) -> list[int]:
    """The n integers under a node that owns ``budget`` bits from ``place`` on."""
    if n == 4:
        codes, cells = quad(budget)
        x = field(row, place, budget)
        k = min(x // codes, len(cells) - 1)
        n_a, n_b, c, s = cells[k]
        i_a, i_b = divmod(x - k * codes, n_b)
        (x_a, y_a), (x_b, y_b) = sector_direction(i_a, n_a), sector_direction(i_b, n_b)
        return [int(np.rint(r * point)) for point in (c * x_a, c * y_a, s * x_b, s * y_b)]
    m_a, m_b = children(n)
    w = min(budget, max(1, min(7, 16 * budget // (15 * n))))
    cos, sin, shift = node(m_a, m_b, w)
    k = field(row, place, w)
    rest = budget - w
    left = min(max(rest * m_a // (m_a + m_b) + shift[k], max(0, rest - 7 * m_b)), min(7 * m_a, rest))
    return walk(row, place + w, left, m_a, r * cos[k]) + walk(row, place + w + left, rest - left, m_b, r * sin[k])


def factors(m: float, e: int) -> tuple[F, F]:
    return (F(math.ldexp(m, e)), F(1)) if e >= -100 else (F(math.ldexp(m, e + 64)), F(2.0**-64))


def split_row(row: int, order: int, row_bits: int, radius_bits: int, two_rounds: bool) -> tuple[list[int], F, F]:
    code, steps = field(row, 0, radius_bits), 7 * 2 ** (radius_bits - 11)
    a, b = F(0), F(1)
    if code:
        e, j = divmod(code - 1, steps)
        a, b = factors(float(F(2 ** (j / steps) / (2048 * (order if two_rounds else math.sqrt(order))))), e - 155)
    return walk(row, radius_bits, row_bits - radius_bits, order, F(2048)), a, b


def paper_row(row: int, order: int, exponent: int) -> tuple[list[int], F, F]:
    blocks = order // 16
    halves = np.array([field(row, 62 * i, 16) & 0x7FFF for i in range(blocks)], np.uint16).view(np.float16)
    radii = [0.0 if np.isnan(h) else min(float(h), 65504.0) for h in halves]
    power = math.frexp(max(radii))[1]
    integers: list[int] = []
    for block, radius in enumerate(radii):
        place, values = 62 * block + 16, [F(math.ldexp(radius, 11 - power))]
        for a, b in ((0.52420, 0.70590), (0.42624, 0.67438), (0.30974, 0.63397)):
            angles = (a, b, math.pi / 2 - b, math.pi / 2 - a)
            split = []
            for r in values:
                k = field(row, place, 2)
                place += 2
                split += [r * trunc16(math.cos(angles[k])), r * trunc16(math.sin(angles[k]))]
            values = split
        for r in values:
            x, y = direction(64 * (2 * field(row, place, 4) + 1))
            place += 4
            integers += [int(np.rint(r * x)), int(np.rint(r * y))]
    return integers, *factors(float(F(1 / (2048 * math.sqrt(order)))), power + exponent)


# -- 8: quads ------------------------------------------------------------------------------------------------------
@cache
def points(bits: int) -> tuple[float, list[tuple[int, ...]]]:
    """G and the points of a table, from the specification's own text."""
    row = re.search(rf"^\| {bits} \| ([\d.]+) \| ([\d ,]+) \|$", SPECIFICATION.read_text(), re.MULTILINE)
    assert row, "A.1 lists the table"
    representatives = [tuple(map(int, each.split())) for each in row[2].split(",")]
    return float(row[1]), [p for each in representatives for p in sorted(set(itertools.permutations(each)))]


def quad_rows(block: bytes, rows: int, order: int, row_bits: int) -> list[tuple[list[int], F, F]]:
    """The integers, A and B of each row of a block without its checksum."""
    bits = 4 * (row_bits - 8 - order) // order
    grid, table = points(bits)
    sign_bytes, index_bytes, quads = order // 8, -(-bits * order // 32), order // 4
    radii = rows * (sign_bytes + index_bytes)
    base = int.from_bytes(block[radii + rows : radii + rows + 2], "little", signed=True)
    if len(block) % 16 != 12 or not len(block) - 16 < radii + rows + 2 <= len(block):
        raise ValueError("a block of another size")
    found = []
    for row in range(rows):
        signs = int.from_bytes(block[row * sign_bytes :][:sign_bytes], "little")
        indices = int.from_bytes(block[rows * sign_bytes + row * index_bytes :][:index_bytes], "little")
        integers = []
        for quad in range(quads):
            group, k = divmod(quad, 8)
            size = min(8, quads - 8 * group)
            for coordinate, magnitude in enumerate(table[field(indices, bits * quad, bits)]):
                place = 32 * group + k + size * (0, 2, 1, 3)[coordinate]
                integers.append(-magnitude if signs >> place & 1 else magnitude)
        code = block[radii + row]
        a, b = F(0), F(1)
        if code:
            e, j = divmod(min(max(base + code - 1, -1240), 1063), 8)
            fraction, exponent = math.frexp(2 ** (j / 8) / (grid * order))
            a, b = factors(math.ldexp(round(fraction * 2**22), exponent - 22), e)
        found.append((integers, a, b))
    return found


# -- 13 to 16 and 20: affine fields, pair polar, scalar, levels, residual VQ ----------------------------------------
def half(bits: int) -> F:
    """An f16 field."""
    value = float(np.array([bits], "<u2").view("<f2")[0])
    return F(0) if math.isnan(value) else F(min(max(value, -65504.0), 65504.0))


def phase_cosines(p: int) -> tuple[F, F]:
    """cos_t and sin_t of the phase p of 9.2."""
    h, l = divmod(p, 256)
    a, b, c, d = map(F, (exact_cos(h / 256), exact_cos(h / 256 - 0.25), exact_cos(l / 65536), exact_cos(l / 65536 - 0.25)))
    return a * c - b * d, b * c + a * d


def affine_groups(data: bytes) -> tuple[int, int, int]:
    """Tokens of a group, bytes of the fields that a block has of all groups of the same tokens, and N."""
    tokens, channels, fields, place = struct.unpack_from("<IIBB", data, 48 + 8 * data[7])
    order = -(-width(data) // 16) * 16
    return tokens, 0 if place else -(-order // channels) * {1: 2, 2: 4, 3: 8}[fields], order


def block_bytes(data: bytes, rows: int) -> int:
    """Bytes of a block of so many rows, its checksum included (3.2, 8.1, 13.2)."""
    size = rows * -(-struct.unpack_from("<I", data, 16)[0] // 8)
    if data[5] == 3:
        return -(-(size + 6) // 16) * 16
    if data[5] == 7:
        tokens, lists, _ = sketch_groups(data)
        return size + -(-rows // tokens) * lists + 6
    if data[5] < 4 or data[5] == 6:
        return size + 4
    tokens, fields, _ = affine_groups(data)
    segments, room = outlier_room(data, rows)
    return size + -(-rows // tokens) * fields + 4 * segments + 4 * room + 6


def outlier_room(data: bytes, rows: int) -> tuple[int, int]:
    """Q and M of 16.4; 0 without flag 32."""
    if not data[12] & 32:
        return 0, 0
    head_dim = width(data)
    tokens, channels, _, place, _, _, outliers = struct.unpack_from("<IIBBBBH", data, 48 + 8 * data[7])
    groups = -(-(-(-head_dim // 16) * 16) // channels)
    room = 2 * groups * rows * outliers // tokens if place else 2 * groups * (rows * outliers // tokens)
    return -(-rows * head_dim // 65536), room


def place_outliers(data: bytes, block: bytes, rows: int, found: list[list[F]]) -> None:
    """Put what a block without its checksum keeps apart into the numbers s of its rows."""
    head_dim = width(data)
    segments, room = outlier_room(data, rows)
    at = len(block) - 2 - 4 * room
    places, values = struct.unpack_from(f"<{room}H", block, at), struct.unpack_from(f"<{room}H", block, at + 2 * room)
    record = 0
    for segment, count in enumerate(struct.unpack_from(f"<{segments}I", block, at - 4 * segments)):
        last = -1
        for i in range(record, min(record + count, room)):
            row, channel = divmod(65536 * segment + places[i], head_dim)
            if places[i] > last and row < rows:
                found[row][channel] = half(values[i])
            last = max(last, places[i])
        record += count


def affine_rows(
    data: bytes, block: bytes, rows: int, tables: Sequence[bytes] = (), lead: int = 0
) -> list[tuple[list[F], F, F]]:
    """The numbers s, A and B of each row of a block without its checksum; ``data``: the stream, of which the header is read.

    ``lead``: the block's leading index of rows.
    """
    at = 48 + 8 * data[7]
    head_dim, (row_bits,) = width(data), struct.unpack_from("<I", data, 16)
    _, channels, kind, _, pairing, angle_bits = struct.unpack_from("<IIBBBB", data, at)
    tokens, size, order = affine_groups(data)
    exponent = min(max(int.from_bytes(block[-2:], "little", signed=True), -126), 127)
    found = []
    for i in range(rows):
        row = int.from_bytes(block[i * row_bits // 8 : (i + 1) * row_bits // 8], "little")
        start = rows * row_bits // 8 + i // tokens * size
        fields = struct.unpack_from(f"<{size // 2}H", block, start)
        groups = -(-order // channels)
        if data[at + 9]:
            table = table_of(data, "ranges", tables)
            assert table
            head = lead % struct.unpack_from("<H", table, 12)[0]
            fields = struct.unpack_from(f"<{kind * groups}H", table, 20 + 2 * kind * groups * head)
        if data[5] == 4:
            numbers = pair_row(row, fields, groups, head_dim, order, data[14], angle_bits, pairing)
        else:
            b = row_bits // order
            numbers, levels = [], levels_of(data, b, tables)
            for k in range(order):
                d, code = half(fields[k // channels]), field(row, b * k, b)
                level = levels[code] if levels else F(code if kind == 2 else code - 2 ** (b - 1))
                numbers.append(level * d + half(fields[groups + k // channels]) if kind == 2 else level * d)
        found.append((numbers, F(2.0**exponent), F(1)))
    if data[12] & 32:
        place_outliers(data, block, rows, [numbers for numbers, _, _ in found])
    return found


def levels_of(data: bytes, b: int, tables: Sequence[bytes]) -> list[F]:
    """The levels that a header brings or names (16.1), or none."""
    size = struct.unpack_from("<I", data, 8)[0]
    if data[44] == 2:
        table = table_of(data, "codebook", tables)
        assert table
        return [half(bits) for bits in struct.unpack_from(f"<{2**b}H", table, 12)]
    return [half(bits) for bits in struct.unpack_from(f"<{2**b}H", data, size - 4 - 2 ** (b + 1))] if data[44] == 1 else []


def names(data: bytes) -> dict[str, bytes]:
    """The names of the shared tables that a header has (3.1), by what they are for."""
    at = behind_shape(data)[1]
    if struct.unpack_from("<H", data, 12)[0] & 258:
        at += 16 + 2 * struct.unpack_from("<H", data, at + 8)[0]
    ranges = data[5] == 5 and data[48 + 8 * data[7] + 9] == 2
    there = [what for what, named in (("basis", data[15] == 4), ("ranges", ranges), ("codebook", data[44] == 2)) if named]
    return {what: data[at + 32 * i : at + 32 * i + 32] for i, what in enumerate(there)}


def table_of(data: bytes, what: str, tables: Sequence[bytes]) -> bytes | None:
    """A shared table that a stream names, where it is there."""
    return next((table for table in tables if hashlib.sha256(table).digest() == names(data)[what]), None)


def missing(data: bytes, tables: Sequence[bytes]) -> str:
    """The error of a stream that names shared tables, where these are there (16.1, 16.3, 18.3, 20.1); "" for none."""
    found = {what: table_of(data, what, tables) for what in names(data)}
    there = {what: table for what, table in found.items() if table is not None}
    if any(misfits(data, what, table) for what, table in there.items()):
        return "corrupt"
    return "unsupported" if len(there) < len(found) else ""


def misfits(data: bytes, what: str, table: bytes) -> str:
    """ "corrupt" where a shared table is none for the rows of a stream; "" for none."""
    head_dim, (row_bits,) = width(data), struct.unpack_from("<I", data, 16)
    if what == "basis":
        numbers = heads(data) * struct.unpack_from("<Q", data, 40 + 8 * data[7])[0]
        return "" if table[5] == 3 and struct.unpack_from("<HH", table, 12) == (head_dim, numbers) else "corrupt"
    if what == "ranges":
        channels, fields = struct.unpack_from("<IB", data, 52 + 8 * data[7])
        told = (table[5], *struct.unpack_from("<HHHB", table, 12)) if len(table) > 19 else ()
        leading = math.prod(struct.unpack_from(f"<{data[7]}Q", data, 48)[:-2]) // heads(data)
        return "" if told[:1] == (4,) and told[2:] == (head_dim, channels, fields) and leading % told[1] == 0 else "corrupt"
    if data[5] == 5:
        return "" if table[5] == 1 and len(table) == 12 + 2 ** (row_bits // (-(-head_dim // 16) * 16) + 1) else "corrupt"
    if table[5] != 2:
        return "corrupt"
    stages, b, w, dims = struct.unpack_from("<BBHH", table, 12)
    fits = dims == head_dim and stages >= data[14] and row_bits == 16 + data[14] * (head_dim // w) * b
    return "" if fits else "corrupt"


def table_refusal(name: str, table: bytes) -> str:
    """The error of a shared table that is held under a name (16.3); "" for none."""
    if hashlib.sha256(table).hexdigest() != name or table[:4] != b"\x89PQT" or not 12 <= len(table) <= 4196372:
        return "corrupt"
    version, kind, reserved, count = struct.unpack_from("<BBHI", table, 4)
    if version != 1 or kind not in (1, 2, 3, 4) or reserved:
        return "unsupported"
    if kind == 2:
        return vectors_refusal(table, count)
    if kind == 3:
        return basis_refusal(table, count)
    if kind == 4:
        return ranges_refusal(table, count)
    return "" if len(table) == 12 + 2 * count and count in [2**b for b in range(1, 9)] and ascending(table[12:]) else "corrupt"


def vectors_refusal(table: bytes, count: int) -> str:
    """The error of a table of kind 2 (20.2); "" for none."""
    if len(table) < 20:
        return "corrupt"
    stages, b, w, head_dim, reserved = struct.unpack_from("<BBHHH", table, 12)
    if reserved:
        return "unsupported"
    sizes = 1 <= stages <= 8 and 4 <= b <= 12 and w in (8, 16, 32, 64) and 1 <= head_dim <= 1024 and head_dim % w == 0
    if not sizes or count != stages * 2**b * w or len(table) != 20 + 2 * head_dim + 2 * count:
        return "corrupt"
    channels = struct.unpack_from(f"<{head_dim}H", table, 20)
    finite = np.isfinite(np.frombuffer(table, "<f2", count, 20 + 2 * head_dim)).all()
    return "" if finite and sorted(channels) == list(range(head_dim)) else "corrupt"


def basis_refusal(table: bytes, count: int) -> str:
    """The error of a table of kind 3 (18.3); "" for none."""
    if len(table) < 20:
        return "corrupt"
    rows, numbers, reserved = struct.unpack_from("<HHI", table, 12)
    if reserved:
        return "unsupported"
    fits = 1 <= rows <= min(numbers, 1024) and numbers <= 4096 and count == rows * numbers <= 2**21
    if not fits or len(table) != 20 + 2 * count:
        return "corrupt"
    return "" if np.isfinite(np.frombuffer(table, "<f2", count, 20)).all() else "corrupt"


def ranges_refusal(table: bytes, count: int) -> str:
    """The error of a table of kind 4 (13.4); "" for none."""
    if len(table) < 20:
        return "corrupt"
    head_count, numbers, channels, fields, reserved = struct.unpack_from("<HHHBB", table, 12)
    if fields not in (1, 2) or reserved:
        return "unsupported"
    if not all(1 <= n <= 1024 for n in (head_count, numbers, channels)):
        return "corrupt"
    if count != head_count * fields * -(-(-(-numbers // 16) * 16) // channels) or len(table) != 20 + 2 * count:
        return "corrupt"
    return "" if np.isfinite(np.frombuffer(table, "<f2", count, 20)).all() else "corrupt"


def residual_rows(data: bytes, block: bytes, rows: int, table: bytes) -> list[tuple[list[F], F, F]]:
    """The numbers s, A and B of each row of a block of residual VQ without its checksum (20)."""
    _, b, w, head_dim = struct.unpack_from("<BBHH", table, 12)
    (row_bits,), (exponent,), stages = struct.unpack_from("<I", data, 16), struct.unpack_from("<h", data, 42), data[14]
    channels = struct.unpack_from(f"<{head_dim}H", table, 20)
    entries = np.frombuffer(table, "<f2", offset=20 + 2 * head_dim).astype(F).reshape(-1, 2**b, w)
    found, size = [], -(-row_bits // 8)
    for i in range(rows):
        row = int.from_bytes(block[i * size : (i + 1) * size], "little")
        numbers = [F(0)] * head_dim
        for g in range(head_dim // w):
            chosen = [entries[k, field(row, 16 + b * (stages * g + k), b)] for k in range(stages)]
            for j in range(w):
                t = chosen[0][j]
                for entry in chosen[1:]:
                    t = t + entry[j]
                numbers[channels[w * g + j]] = t
        found.append((numbers, half(field(row, 0, 16)), F(2.0**exponent)))
    return found


def pair_row(
    row: int, fields: tuple[int, ...], groups: int, head_dim: int, order: int, r: int, t: int, pairing: int
) -> list[F]:
    """The numbers s of a row of pair polar coding."""
    numbers, pairs = [F(0)] * (order + 1), -(-head_dim // 2)
    for i in range(pairs):
        k, code = field(row, (r + t) * i, t), field(row, (r + t) * i + t, r)
        a, b = half(fields[i]), half(fields[groups + i])
        rho = F(code + 0.5) * b + a
        cos, sin = phase_cosines((fields[2 * groups + i] + (2 * k + 1) * fields[3 * groups + i] // 2) % 2**16)
        p, q = (i, i + pairs) if pairing == 1 else (2 * i, 2 * i + 1)
        numbers[p], numbers[q] = rho * cos, rho * sin
    return numbers[:order]


# -- 21: sign sketch -----------------------------------------------------------------------------------------------
def sketch_groups(data: bytes) -> tuple[int, int, int]:
    """Tokens of a group (4096 where there are no outlier channels), bytes of its list, and those of a channel (21.2)."""
    at = 48 + 8 * data[7]
    channels, _, tokens = struct.unpack_from("<HHI", data, at + 4)
    width = 1 if struct.unpack_from("<Q", data, at - 8)[0] <= 256 else 2
    return (tokens, channels * width, width) if channels else (4096, 0, width)


@cache
def projections(matrix: int, seed: int, order: int, rows: int) -> np.ndarray:
    """T of 21.3."""
    if matrix == 2:
        return np.array([[splitmix64(seed, i * order + j).bit_count() - 32 for j in range(order)] for i in range(rows)])
    h, found, words = hadamard(order), [], -(-order // 64)
    for j in range(rows // order):
        own = (seed + 2 * j * words * 0x9E3779B97F4A7C15) % 2**64
        first = (h * signs(own, words, order))[permutation(order)]
        found.append((h * signs(own, 0, order)) @ first)
    return np.concatenate(found)


def sketch_rows(data: bytes, block: bytes, rows: int, shrunk: bool = False) -> list[tuple[list[F], F, F]]:
    """The numbers s, A and B of each row of a block without its checksum; ``data``: the stream, of which the header is read."""
    at = 48 + 8 * data[7]
    (head_dim,), (seed,) = struct.unpack_from("<Q", data, at - 8), struct.unpack_from("<Q", data, 32)
    matrix, blocks, outlier_blocks, _, channels = struct.unpack_from("<BBBBH", data, at)
    row_bytes, order = struct.unpack_from("<I", data, 16)[0] // 8, next(n for n in ORDERS if n >= head_dim)
    tokens, list_bytes, width = sketch_groups(data)
    exponent = min(max(int.from_bytes(block[-2:], "little", signed=True), -126), 127)
    parts = [(blocks, head_dim - channels), (outlier_blocks, channels)][: 2 if channels else 1]
    found = []
    for i in range(rows):
        row = int.from_bytes(block[i * row_bytes : (i + 1) * row_bytes], "little")
        listed = block[rows * row_bytes + i // tokens * list_bytes :][:list_bytes]
        outliers = {int.from_bytes(listed[k : k + width], "little") for k in range(0, list_bytes, width)}
        place, numbers = 16 * len(parts), []
        for part, (b, d) in enumerate(parts):
            m = b * order
            x = np.array([1 if row >> place + k & 1 else -1 for k in range(m)])
            t = projections(matrix, seed, order, m).T @ x
            mean = math.comb(order, order // 2) / 2**order * math.pi / 2 if matrix == 1 else math.sqrt(math.pi / 2) / 4
            a = 37408 * d if matrix == 1 else max(102944 * d - 65536, 0)
            h = F(2**31 * m // (2**16 * m + a) / 2**15) if shrunk else F(1)
            factor = half(field(row, 16 * part, 16)) * F(mean / m) * h
            numbers.append([F(int(each)) * factor for each in t])
            place += m
        found.append(([numbers[1 if k in outliers else 0][k] for k in range(order)], F(2.0**exponent), F(1)))
    return found


# -- 9: offsets ----------------------------------------------------------------------------------------------------
def turned(offset: np.ndarray, position: int, pairing: int, frequencies: tuple[int, ...]) -> np.ndarray:
    out = offset.copy()
    for i, frequency in enumerate(frequencies):
        p, q = (i, i + len(frequencies)) if pairing == 1 else (2 * i, 2 * i + 1)
        h, l = divmod(position * frequency // 2**16 % 2**16, 256)
        tables = [exact_cos(h / 256), exact_cos(h / 256 - 0.25), exact_cos(l / 65536), exact_cos(l / 65536 - 0.25)]
        a, b, c, d = map(F, tables)
        cos, sin = a * c - b * d, b * c + a * d
        out[p], out[q] = offset[p] * cos - offset[q] * sin, offset[p] * sin + offset[q] * cos
    return out


def rope_turned(data: bytes, x: np.ndarray, token: int) -> np.ndarray:
    """A vector turned by the angles of a token of the tensor, as the header describes RoPE."""
    at = behind_shape(data)[1]
    first_position, channels, pairing = struct.unpack_from("<QHB", data, at)
    return turned(x, first_position + token, pairing, struct.unpack_from(f"<{channels // 2}I", data, at + 16))


def begun_run(data: bytes, stored: np.ndarray, token: int) -> np.ndarray:
    """(X, Y) of 9.5 in the places of their pairs, of stored numbers as f16 has them; ``token``: the first one of the run."""
    at = behind_shape(data)[1]
    _, channels, pairing = struct.unpack_from("<QHB", data, at)
    found = rope_turned(data, stored, token)
    for pair in pairs_of(channels, pairing):
        both = [min(max(float(found[k]), -65504.0), 65504.0) for k in pair]
        m = max(abs(both[0]), abs(both[1]), 2.0**-14)
        unit = 2.0 ** (math.frexp(m)[1] - 11)
        for k, value in zip(pair, both, strict=True):
            found[k] = round(value / unit) * unit
    return found


def turns_of_run(frequency: int, j: int) -> tuple[int, int]:
    """2048 C and 2048 S of 9.5 of a pair in row j of a run."""
    cos, sin = phase_cosines(j * frequency // 2**16 % 2**16)
    return round(float(cos) * 2048), round(float(sin) * 2048)


def run_turned(data: bytes, stored: np.ndarray, first: int, row: int) -> np.ndarray:
    """The offset of a block's row, whose first one is the tensor's token ``first``, by 9.5; ``stored`` as f16 has it."""
    at = behind_shape(data)[1]
    _, channels, pairing = struct.unpack_from("<QHB", data, at)
    (exponent,) = struct.unpack_from("<h", data, 40)
    begun = begun_run(data, stored, first + row // 64 * 64)
    found = begun.astype(np.float64)
    for (p, q), frequency in zip(
        pairs_of(channels, pairing), struct.unpack_from(f"<{channels // 2}I", data, at + 16), strict=True
    ):
        cos, sin = turns_of_run(frequency, row % 64)
        x, y = float(begun[p]), float(begun[q])
        found[p], found[q] = (x * cos - y * sin) / 2048, (x * sin + y * cos) / 2048
    return np.ldexp(found, exponent).astype(np.float32)


def pairs_of(channels: int, pairing: int) -> list[tuple[int, int]]:
    """The channels of each pair (9.3)."""
    half = channels // 2
    return [(i, i + half) if pairing == 1 else (2 * i, 2 * i + 1) for i in range(half)]


def saturated(x: np.ndarray) -> np.ndarray:
    """sat of 19.1."""
    most = F((2 - 2.0**-23) * 2.0**127)
    return np.clip(x, -most, most)


def exact_cos(turns: float) -> float:
    """cos of a multiple of 2^-16 turn, with its exact values exact."""
    value = math.cos(2 * math.pi * turns)
    return 0.0 if abs(value) < 1e-12 else value


# -- 3: the stream -------------------------------------------------------------------------------------------------
def narrow(y: np.ndarray, dtype: int) -> np.ndarray:
    """Step 6 of 6.5, as unsigned integers."""
    most = F({1: 65504.0, 2: (2 - 2.0**-7) * 2.0**127, 3: (2 - 2.0**-23) * 2.0**127}[dtype])
    y = np.clip(y, -most, most)
    if dtype == 1:
        return y.astype(np.float16).view(np.uint16)
    bits = y.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16) if dtype == 2 else bits


def heads(data: bytes) -> int:
    """H of 18.1; 1 where heads are not joined."""
    return int(struct.unpack_from("<Q", data, 48 + 8 * data[7] - 24)[0]) if data[12] & 128 else 1


def width(data: bytes) -> int:
    """Numbers of a row, which sections 5 to 8 and 13 to 16 call head_dim (18)."""
    numbers = heads(data) * int(struct.unpack_from("<Q", data, 40 + 8 * data[7])[0])
    return int(struct.unpack_from("<H", data, behind_shape(data)[1] - 8)[0]) if data[15] else numbers


def linear_bytes(data: bytes) -> tuple[int, int]:
    """Blocks of a linear stage, 0 without one, and the bytes of each without its checksum (18.2)."""
    shape = struct.unpack_from(f"<{data[7]}Q", data, 48)
    each = {1: 2 * width(data), 2: 512, 3: 2 * width(data) * heads(data) * shape[-1]}.get(data[15], 0)
    return 0 if data[15] in (0, 4) else math.prod(shape[:-2]) // heads(data) if data[15] == 1 else 1, each


def linear_stage(data: bytes, tables: Sequence[bytes] = ()) -> list[np.ndarray]:
    """The lists of a linear stage, or its matrix; none that a shared table has, unless it is there."""
    if data[15] == 4:
        table = table_of(data, "basis", tables)
        return [np.frombuffer(table, "<f2", offset=20).reshape(width(data), -1)] if table else []
    count, size = linear_bytes(data)
    _, _, lists, list_bytes = keep_lists(data)
    at = struct.unpack_from("<I", data, 8)[0] + lists * (list_bytes + 4)
    kind, rows = ("<u2", 1) if data[15] == 1 else ("<f2", 16 if data[15] == 2 else width(data))
    return [np.frombuffer(data, kind, size // 2, at + i * (size + 4)).reshape(rows, -1) for i in range(count)]


def behind_shape(data: bytes) -> tuple[int, int]:
    """Where the header has the 16 bytes of 17.1, and those of RoPE."""
    at = 48 + 8 * data[7] + (16 if data[12] & 16 or data[5] == 7 else 0)
    return at, at + (16 if data[12] & 64 else 0) + (8 if data[15] else 0)


def keep_lists(data: bytes) -> tuple[int, int, int, int]:
    """n, T, the number of lists of kept tokens, 0 if there are none, and the bytes of each without its checksum (17)."""
    ndim, at = data[7], behind_shape(data)[0]
    if not data[12] & 64:
        return 0, 0, 0, 0
    shape, (tokens, each) = struct.unpack_from(f"<{ndim}Q", data, 48), struct.unpack_from("<QB", data, at)
    size = min(4 * shape[-2], -(-tokens // 8))
    return shape[-2], tokens, (math.prod(shape[:-2]) if each == 2 else 1) if shape[-2] else 0, size


def positions(data: bytes) -> list[list[int]]:
    """The positions of the kept tokens, of each list; some of a list that is none."""
    n, _, lists, size = keep_lists(data)
    (at,) = struct.unpack_from("<I", data, 8)
    found = []
    for i in range(lists):
        body = data[at + i * (size + 4) : at + i * (size + 4) + size]
        bits = int.from_bytes(body, "little")
        found.append([t for t in range(8 * size) if bits >> t & 1] if size < 4 * n else list(struct.unpack(f"<{n}I", body)))
    return found


def ends(data: bytes) -> tuple[int, int]:
    """E and X of 3.1: exact tokens at both ends."""
    (exact,), (last,) = struct.unpack_from("<I", data, 24), struct.unpack_from("<H", data, 46)
    tokens = struct.unpack_from("<Q", data, 48 + 8 * data[7] - 16)[0] if data[7] > 1 else 1
    first = min(exact, tokens)
    return first, min(last, tokens - first)


def sections(data: bytes) -> Iterator[tuple[int, int]]:
    """The header and the blocks of a stream in their order (3.2): how many of a size, and their bytes with checksums."""
    dtype, ndim, size, flags = struct.unpack_from("<BBIH", data, 6)
    (exceptions,) = struct.unpack_from("<I", data, 28)
    shape = struct.unpack_from(f"<{ndim}Q", data, 48)
    head_dim, leading = shape[-1], math.prod(shape[:-2])
    vector = head_dim * (4 if dtype == 3 else 2)
    kept, last = ends(data)
    yield 1, size
    _, _, lists, list_bytes = keep_lists(data)
    if lists:
        yield lists, list_bytes + 4
    if data[15] in (1, 2, 3):
        yield linear_bytes(data)[0], linear_bytes(data)[1] + 4
    if flags & 1:
        yield leading, 2 * head_dim + 4
    if kept:
        yield leading, kept * vector + 4
    if last:
        yield leading, last * vector + 4
    if exceptions:
        yield 1, exceptions * (8 + vector) + 4
    yield from payload(data)


def payload(data: bytes) -> Iterator[tuple[int, int]]:
    """The same of the payload alone."""
    ndim, (chunk,) = data[7], struct.unpack_from("<I", data, 20)
    shape = struct.unpack_from(f"<{ndim}Q", data, 48)
    whole, rest = divmod((shape[-2] if ndim > 1 else 1) - sum(ends(data)), chunk)
    for chunks, count in ((whole, chunk), (1, rest)):
        if count:
            yield chunks * (math.prod(shape[:-2]) // heads(data)), block_bytes(data, count)


def blocks(data: bytes) -> list[int]:
    """Bytes of the header and of each block of a stream, checksums included, in their order."""
    return [size for count, size in sections(data) for _ in range(count)]


def refusal(data: bytes) -> str:
    """The error that a stream's header makes (3.3, steps 1 to 12): "truncated", "corrupt", "unsupported", or "" for none."""
    if not b"\x89PQS".startswith(data[:4]):
        return "corrupt"
    if len(data) < 48:
        return "truncated"
    version, coding, dtype, ndim, size, flags, radius_bits, linear = struct.unpack_from("<BBBBIHBB", data, 4)
    row_bits, chunk, _, exceptions, _, *exponents = struct.unpack_from("<IIIIQhh", data, 16)
    if version != 1:
        return "unsupported"
    if not 60 <= size <= 2180:
        return "corrupt"
    if len(data) < size:
        return "truncated"
    if checksum(data[: size - 4]) != struct.unpack_from("<I", data, size - 4)[0]:
        return "corrupt"
    if coding not in (1, 2, 3, 4, 5, 6, 7) or dtype not in (1, 2, 3) or flags & ~1023 or linear > 4 or data[44] > 2 or data[45]:
        return "unsupported"
    if (coding in (4, 5)) != bool(flags & 16) or (flags & 32 and coding != 5):
        return "unsupported"
    if data[44] not in {5: (0, 1, 2), 6: (2,)}.get(coding, (0,)):
        return "unsupported"
    end, rope, body = 48 + 8 * ndim, flags & 258, data[: size - 4]
    affine = end if coding in (4, 5) else 0
    sketch = end if coding == 7 else 0
    end += 16 if affine or sketch else 0
    keep = end if flags & 64 else 0
    end += 16 if keep else 0
    stage = end if linear else 0
    end += 8 if linear else 0
    if len(body) < end + (16 if rope else 0):
        return "corrupt"
    group, channels_of, kind, place, pairs, angle_bits = (
        struct.unpack_from("<IIBBBB", body, affine) if affine else (1, 1, 1, 0, 0, 0)
    )
    spare = body[affine + 14 : affine + 16] if flags & 32 else body[affine + 12 : affine + 16]
    if not group or not channels_of or kind not in (1, 2, 3) or pairs > 2 or (affine and any(spare)):
        return "unsupported"
    if place and (place, coding) != (2, 5):
        return "unsupported"
    matrix, blocks, outlier_blocks, *drawn = (
        struct.unpack_from("<BBBBHHII", body, sketch) if sketch else (1, 1, 0, 0, 0, 0, 0, 0)
    )
    if matrix not in (1, 2) or drawn[0] or drawn[2] or drawn[4]:
        return "unsupported"
    whole, lists = struct.unpack_from("<QB", body, keep) if keep else (0, 1)
    if lists not in (1, 2) or (keep and any(body[keep + 9 : keep + 16])):
        return "unsupported"
    if linear and any(body[stage + 2 : stage + 8]):
        return "unsupported"
    shape = struct.unpack_from(f"<{ndim}Q", body, 48)
    position, channels, pairing = struct.unpack_from("<QHB", body, end) if rope else (0, 2, 1)
    if rope and any(body[end + 11 : end + 16]):
        return "unsupported"
    if not 1 <= ndim <= 8 or not 1 <= shape[-1] <= 1024 or math.prod(max(n, 1) for n in shape) > 2**48:
        return "corrupt"
    if flags & 128 and ndim < 3:
        return "corrupt"
    numbers = shape[-1] * (shape[-3] if flags & 128 else 1)
    if not 1 <= numbers <= (4096 if linear else 1024) or not 1 <= width(data) <= min(numbers, 1024):
        return "corrupt"
    if linear == 2 and (numbers % 16 or width(data) != numbers):
        return "corrupt"
    tokens, order = shape[-2] if ndim > 1 else 1, next(n for n in ORDERS if n >= width(data))
    wide = -(-width(data) // 16) * 16
    bits = min(row_bits // wide, 8)
    of_pairs = kind == 3 and channels_of == 2 and pairs in (1, 2) and 1 <= angle_bits <= 8 and 1 <= radius_bits <= 8
    rows = {
        1: radius_bits in range(11, 16) and order <= row_bits <= radius_bits + 7 * order,
        2: radius_bits == 16 and row_bits == 62 * (order // 16),
        3: radius_bits == 8 and row_bits in [8 + order + b * (order // 4) for b in range(4, 11)],
        4: of_pairs and row_bits == (radius_bits + angle_bits) * wide // 2,
        5: kind < 3 and not pairs and not angle_bits and not radius_bits and row_bits in [b * wide for b in range(1, 9)],
        6: 1 <= radius_bits <= 8
        and row_bits
        in [16 + radius_bits * (width(data) // w) * b for w in (8, 16, 32, 64) if width(data) % w == 0 for b in range(4, 13)],
        7: radius_bits == 16 and row_bits == (32 if drawn[1] else 16) + (blocks + outlier_blocks) * order,
    }
    apart = [1 <= drawn[1] <= shape[-1], 1 <= outlier_blocks <= 8, 1 <= drawn[3] <= 4096 and chunk % drawn[3] == 0]
    ranges = [
        tokens <= 2**32,
        rows[coding],
        1 <= chunk <= 4096 and group <= 4096 and 1 <= channels_of <= 1024 and chunk % group == 0,
        exceptions <= math.prod(shape[:-2]) * (tokens - sum(ends(data))),
        -112 <= exponents[0] <= 111,
        -125 <= exponents[1] <= 117,
        not flags & 2 or flags & 257 == 1,
        not flags & 512 or (coding == 3 and flags & 3 == 3 and not flags & 192 and not linear),
        not keep or ndim > 1,
        not keep or (tokens <= whole <= 2**32 and math.prod(max(n, 1) for n in (*shape[:-2], whole, shape[-1])) <= 2**48),
        position < 2**63 and channels % 2 == 0 and 2 <= channels <= shape[-1] and pairing in (1, 2) if rope else True,
        coding != 7 or not (flags & 384 or linear),
        1 <= blocks <= 8 and (all(apart) if drawn[1] or outlier_blocks or drawn[3] else True),
        not flags & 8 if coding in (2, 4, 5, 6, 7) else flags & 8 or coding == 1,
        size
        == 52
        + 8 * ndim
        + (16 if affine or sketch else 0)
        + (16 if keep else 0)
        + (8 if linear else 0)
        + (32 if linear == 4 else 0)
        + (32 if place else 0)
        + (16 + 2 * channels if rope else 0)
        + (0, 2 ** (bits + 1), 32)[data[44]],
        not flags & 32
        or 1 <= int.from_bytes(body[affine + 12 : affine + 14], "little") <= group * min(channels_of, width(data)) / 2,
        data[44] != 1 or ascending(data[size - 4 - 2 ** (bits + 1) : size - 4]),
    ]
    if not all(ranges):
        return "corrupt"
    there = sum(count * size for count, size in sections(data))
    return "truncated" if len(data) < there else "corrupt" if len(data) > there else ""


def ascending(levels: bytes) -> bool:
    """Whether levels are finite, and none is below the one before it."""
    found = [float(x) for x in np.frombuffer(levels[: len(levels) // 2 * 2], "<f2")]
    return all(map(math.isfinite, found)) and found == sorted(found)


def damage(data: bytes) -> str:
    """What is wrong in the sections of a stream whose header holds (3.3, step 13), or nothing."""
    dtype, ndim, size, flags = struct.unpack_from("<BBIH", data, 6)
    (exceptions,) = struct.unpack_from("<I", data, 28)
    shape = struct.unpack_from(f"<{ndim}Q", data, 48)
    tokens, leading, vector = shape[-2] if ndim > 1 else 1, math.prod(shape[:-2]), shape[-1] * (4 if dtype == 3 else 2)
    cuts = [0, *itertools.accumulate(blocks(data))]
    if not all(holds(data[start:end]) for start, end in itertools.pairwise(cuts)):
        return "a checksum does not hold"
    n, whole, lists, list_bytes = keep_lists(data)
    for kept in positions(data):
        if len(kept) != n or kept != sorted(set(kept)) or not all(t < whole for t in kept):
            return "a keep list is none"
    numbers = heads(data) * shape[-1]
    for block in linear_stage(data):
        found = block.ravel().tolist()
        if found != sorted(set(found)) or max(found) >= numbers if data[15] == 1 else not np.isfinite(block).all():
            return "a list or matrix of the linear stage is none"
    count, stage_bytes = linear_bytes(data)
    at = size + lists * (list_bytes + 4) + count * (stage_bytes + 4)
    for _ in range(leading if flags & 1 else 0):
        if not np.isfinite(np.frombuffer(data, "<f2", shape[-1], at)).all():
            return "an offset is not finite"
        at += 2 * shape[-1] + 4
    kept, last = ends(data)
    for count in (kept, last):
        at += leading * (count * vector + 4) if count else 0
    rows = [struct.unpack_from("<Q", data, at + i * (8 + vector))[0] for i in range(exceptions)]
    if rows != sorted(set(rows)) or any(row >= leading * (tokens - kept - last) for row in rows):
        return "rows of exact vectors do not ascend, or are not there"
    return ""


def order_seal(data: bytes) -> int:
    """The order seal of a stream (4.3); what lies between its checksums is not looked at."""
    return checksum(b"".join(data[end - 4 : end] for end in itertools.accumulate(blocks(data))))


def decode(data: bytes, tables: Sequence[bytes] = (), shrunk: bool = False) -> np.ndarray:
    """The tensor of a stream, of its kept tokens, as unsigned integers: uint16 for f16 and bf16, uint32 for f32.

    Of a sign sketch the unbiased numbers, or the shrunk ones.
    """
    if error := refusal(data):
        raise ValueError(f"the stream is {error}")
    if error := missing(data, tables):
        raise ValueError(f"its shared table is {error}")
    if error := damage(data):
        raise ValueError(error)
    dtype, ndim, size, flags = struct.unpack_from("<BBIH", data, 6)
    (exceptions,), (offset_exponent,) = struct.unpack_from("<I", data, 28), struct.unpack_from("<h", data, 40)
    (chunk,) = struct.unpack_from("<I", data, 20)
    shape = struct.unpack_from(f"<{ndim}Q", data, 48)
    head_dim, tokens = shape[-1], shape[-2] if ndim > 1 else 1
    leading = math.prod(shape[:-2])
    kind = np.dtype("<u4" if dtype == 3 else "<u2")
    kept, last = ends(data)
    coded = tokens - kept - last
    out = np.zeros((leading, tokens, head_dim), kind)
    kept_at = positions(data)
    before = bool(kept_at) + (data[15] in (1, 2, 3))  # sections
    at = size + sum(count * each for count, each in list(sections(data))[1 : 1 + before])

    def take(count: int) -> bytes:
        nonlocal at
        at += count + 4
        return data[at - count - 4 : at - 4]

    stored = np.zeros((leading if flags & 1 else 0, head_dim), np.float32)
    for lead in range(len(stored)):
        stored[lead] = np.frombuffer(take(2 * head_dim), "<f2")
    offsets = np.ldexp(stored.astype(np.float64), offset_exponent).astype(np.float32)
    for first, count in ((0, kept), (tokens - last, last)):
        for lead in range(leading if count else 0):
            exactly = np.frombuffer(take(count * head_dim * kind.itemsize), kind)
            out[lead, first : first + count] = exactly.reshape(count, head_dim)
    records = take(exceptions * (8 + head_dim * kind.itemsize)) if exceptions else b""
    rows = vectors_of(data, coded_rows(data, tables, shrunk), tables)
    for lead, i in itertools.product(range(leading), range(coded if leading else 0)):
        token = kept_at[lead % len(kept_at)][kept + i] if kept_at else kept + i
        y = rows[lead, i]
        with np.errstate(over="ignore"):
            if flags & 512:
                y = y + run_turned(data, stored[lead], token - i % chunk, i % chunk)
            elif flags & 1:
                y = y + (rope_turned(data, offsets[lead], token) if flags & 2 else offsets[lead])
            if flags & 256:
                y = rope_turned(data, saturated(y), token)
        out[lead, kept + i] = narrow(y, dtype)
    for place in range(0, len(records), 8 + head_dim * kind.itemsize):
        lead, token = divmod(struct.unpack_from("<Q", records, place)[0], coded)
        out[lead, kept + token] = np.frombuffer(records, kind, head_dim, place + 8)
    return out.reshape(shape)


def vectors_of(data: bytes, rows: np.ndarray, tables: Sequence[bytes] = ()) -> np.ndarray:
    """The vectors that rows are, or that 18 and 19.1 make of them before offsets: float32 [leading, coded tokens, head_dim]."""
    flags = struct.unpack_from("<H", data, 12)[0]
    if flags & 384 or data[15]:
        rows = saturated(rows)
    head_dim = int(struct.unpack_from("<Q", data, 40 + 8 * data[7])[0])
    if data[15]:
        stage, numbers = linear_stage(data, tables), heads(data) * head_dim
        of_rows = (
            [[combined(row, stage[0]) for row in block] for block in rows]
            if data[15] > 1
            else [spread(block, channels[0], numbers) for block, channels in zip(rows, stage, strict=True)]
        )
        rows = np.array(of_rows, np.float32).reshape(*rows.shape[:2], numbers)
    vectors = [rows[lead, :, j * head_dim : (j + 1) * head_dim] for lead in range(len(rows)) for j in range(heads(data))]
    return np.array(vectors).reshape(len(vectors), rows.shape[1], head_dim)


def spread(block: np.ndarray, channels: np.ndarray, numbers: int) -> np.ndarray:
    """Rows [n, width] of chosen channels, with zeros in the places of others."""
    found = np.zeros((len(block), numbers), np.float32)
    found[:, channels] = block
    return found


def combined(row: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A row times the matrix, or each 16 numbers of it: Python's floats are binary64."""
    matrix, most, found = matrix.astype(np.float64), (2 - 2.0**-23) * 2.0**127, []
    for part in row.reshape(-1, len(matrix)):
        sums = [0.0] * matrix.shape[1]
        for z, factors in zip(part.tolist(), matrix.tolist(), strict=True):
            sums = [s + z * factor for s, factor in zip(sums, factors, strict=True)]
        found += [min(max(s, -most), most) for s in sums]
    return np.array(found).astype(np.float32)


def coded_rows(data: bytes, tables: Sequence[bytes] = (), shrunk: bool = False) -> np.ndarray:
    """y of step 4 of 6.5 of every coded row: float32 [leading of rows, coded tokens, numbers of a row]."""
    coding, _, ndim, _, flags, radius_bits = struct.unpack_from("<BBBIHB", data, 5)
    row_bits, chunk, _, _, seed, _, radius_exponent = struct.unpack_from("<IIIIQhh", data, 16)
    shape, row_bytes = struct.unpack_from(f"<{ndim}Q", data, 48), -(-row_bits // 8)
    coded = (shape[-2] if ndim > 1 else 1) - sum(ends(data))
    order = next(n for n in ORDERS if n >= width(data))
    leading = math.prod(shape[:-2]) // heads(data)
    found = np.zeros((leading, coded if leading else 0, width(data)), np.float32)
    at = len(data) - sum(count * size for count, size in payload(data))
    for first in range(0, found.shape[1], chunk):
        for lead in range(len(found)):
            count = min(chunk, coded - first)
            rows = data[at : at + block_bytes(data, count) - 4]
            at += len(rows) + 4
            of_quads = quad_rows(rows, count, order, row_bits) if coding == 3 else []
            of_groups = affine_rows(data, rows, count, tables, lead) if coding in (4, 5) else []
            if coding == 6:
                table = table_of(data, "codebook", tables)
                assert table
                of_groups = residual_rows(data, rows, count, table)
            if coding == 7:
                of_groups = sketch_rows(data, rows, count, shrunk)
            for i in range(count):
                row = int.from_bytes(rows[i * row_bytes : (i + 1) * row_bytes], "little")
                if of_groups:
                    numbers, a, b = of_groups[i]
                elif of_quads:
                    integers, a, b = of_quads[i]
                elif coding == 1:
                    integers, a, b = split_row(row, order, row_bits, radius_bits, bool(flags & 8))
                else:
                    integers, a, b = paper_row(row, order, radius_exponent)
                with np.errstate(over="ignore"):
                    s = np.array(numbers) if of_groups else turned_back(integers, seed, bool(flags & 8)).astype(np.float32)
                    found[lead, first + i] = s[: found.shape[2]] * a * b + F(0)
    return found
