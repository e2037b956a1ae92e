"""Law: the codec as SPEC.md and arXiv 2502.02617 tell it, in numpy; slow, and right by reading.

Vectors are rows. The encoder works in float64, the decoder in float32 and integers exactly as SPEC 6.5 prescribes.
Read ``encode_rows`` and ``decode_rows``; the class at the foot walks them over a stream's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.kernels.job import DecodeJob, EncodeJob, Values, nobody, sampled
from pqcodec.stages import centre, rotation
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header


# -- numbers -----------------------------------------------------------------------------------------------------
def widen(raw: np.ndarray, dtype: int) -> np.ndarray:
    """Stored numbers (uint16 or float32, any shape) -> float32, exact."""
    if dtype == c.DTYPE_FLOAT32:
        return raw.astype(np.float32)
    if dtype == c.DTYPE_FLOAT16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray, dtype: int) -> np.ndarray:
    """float32 -> stored numbers; beyond the largest finite value: that value; ties to even (SPEC 6.5)."""
    limit = np.float32(c.LARGEST_FINITE[dtype])
    x = np.clip(x, -limit, limit)
    if dtype == c.DTYPE_FLOAT32:
        return x
    if dtype == c.DTYPE_FLOAT16:
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


# -- bit fields --------------------------------------------------------------------------------------------------
def write_field(bits: np.ndarray, place: np.ndarray, width: np.ndarray, value: np.ndarray) -> None:
    """Set ``width`` bits of each row of bits [n, row_bits] from ``place`` on, least significant first."""
    for j in range(int(width.max(initial=0))):
        rows = np.nonzero(width > j)[0]
        bits[rows, place[rows] + j] = (value[rows] >> j) & 1


def read_field(bits: np.ndarray, place: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The field of each row, int64 [n]."""
    value = np.zeros(len(bits), np.int64)
    for j in range(int(width.max(initial=0))):
        rows = np.nonzero(width > j)[0]
        value[rows] |= bits[rows, place[rows] + j].astype(np.int64) << j
    return value


# -- split coding (SPEC 6) ---------------------------------------------------------------------------------------
def radius_code(norm: np.ndarray, plan: Plan) -> np.ndarray:
    """Norm float64 [n] -> code int64 [n]; 0 is the zero vector (SPEC 6.1)."""
    log2 = np.log2(np.where(norm > 0, norm, 1.0))
    code = 1 + np.floor(plan.radius_steps * (log2 + c.RADIUS_BIAS) + 0.5)
    return np.where(norm > 0, np.clip(code, 1, (1 << plan.radius_bits) - 1), 0).astype(np.int64)


def _cell(bounds: np.ndarray, cells: np.ndarray, grid: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cell of the angle between energies a and b; bounds [n, 129] are each row's, of which ``cells`` + 1 count."""
    share = np.divide(b, a + b, out=np.zeros_like(b), where=a + b > 0)
    place = np.minimum(np.floor(share * grid), grid - 1)
    return ((bounds[:, 1:-1] <= place[:, None]) & (np.arange(1, bounds.shape[1] - 1) < cells[:, None])).sum(1)


def encode_split(v: np.ndarray, plan: Plan, bits: np.ndarray) -> None:
    """Rotated vectors v float64 [n, order] into bits [n, row_bits], down the tree."""
    tree, n = plan.tree, len(v)
    internal = len(tree.kind)
    energy = np.zeros((internal + tree.quads, n))
    energy[internal:] = (v * v).reshape(n, tree.quads, c.QUAD).sum(2).T
    for node in reversed(range(internal)):
        energy[node] = energy[tree.left[node]] + energy[tree.right[node]]
    zeros = np.zeros(n, np.int64)
    write_field(bits, zeros, zeros + plan.radius_bits, radius_code(np.sqrt(energy[0]), plan))
    place, budget = np.zeros((2, internal + tree.quads, n), np.int64)
    place[0], budget[0] = plan.radius_bits, plan.root_budget
    for node in range(internal):
        table, left, right = tree.tables[tree.kind[node]], tree.left[node], tree.right[node]
        width = table.bits[budget[node]].astype(np.int64)
        grid = 1 << angles.grid_bits(table.coordinates)
        code = _cell(table.bounds[width], 1 << width, grid, energy[left], energy[right])
        write_field(bits, place[node], width, code)
        _descend(place, budget, node, left, right, table, width, code)
    for quad in range(tree.quads):
        _encode_quad(v[:, c.QUAD * quad :][:, : c.QUAD], plan, bits, place[internal + quad], budget[internal + quad])


def _descend(
    place: np.ndarray,
    budget: np.ndarray,
    node: int,
    left: int,
    right: int,
    table: angles.NodeTable,
    width: np.ndarray,
    code: np.ndarray,
) -> None:
    """Places and budgets of a node's children; the left child's bits follow the angle, the right child's follow those."""
    rest = budget[node] - width
    budget[left] = angles.split_budget(rest, table.shift[(1 << width) + code], table.m_a, table.m_b)
    budget[right] = rest - budget[left]
    place[left] = place[node] + width
    place[right] = place[left] + budget[left]


def _encode_quad(x: np.ndarray, plan: Plan, bits: np.ndarray, place: np.ndarray, budget: np.ndarray) -> None:
    """Four coordinates x float64 [n, 4] (SPEC 6.4)."""
    table = plan.quads
    energy_a, energy_b = (x[:, :2] ** 2).sum(1), (x[:, 2:] ** 2).sum(1)
    cells = table.cells[budget]
    cell = _cell(table.bounds[budget], cells, 1 << c.COARSE_GRID_BITS, energy_a, energy_b)
    record = table.first[budget] + cell
    n_a, n_b = table.n_a[record], table.n_b[record]
    code = cell * table.per_cell[budget] + _sector(x[:, 0], x[:, 1], n_a) * n_b + _sector(x[:, 2], x[:, 3], n_b)
    write_field(bits, place, budget, code)


def _sector(x: np.ndarray, y: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Which of n equal sectors of the circle (x, y) lies in, int64; sector 0 begins at angle 0."""
    turns = np.arctan2(y, x) / (2 * np.pi)
    return np.minimum(np.floor((turns - np.floor(turns)) * n), n - 1).astype(np.int64)


def decode_split(bits: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits [n, row_bits] -> unit-norm coordinates on the grid, int32 [n, order], and the factors A, B [n]."""
    tree, n = plan.tree, len(bits)
    internal = len(tree.kind)
    zeros = np.zeros(n, np.int64)
    scale = plan.radii[:, read_field(bits, zeros, zeros + plan.radius_bits)]  # A and B (SPEC 6.1)
    place, budget = np.zeros((2, internal + tree.quads, n), np.int64)
    radius = np.zeros((internal + tree.quads, n), np.float32)
    place[0], budget[0], radius[0] = plan.radius_bits, plan.root_budget, c.GRID
    for node in range(internal):
        table, left, right = tree.tables[tree.kind[node]], tree.left[node], tree.right[node]
        width = table.bits[budget[node]].astype(np.int64)
        code = read_field(bits, place[node], width)
        radius[left] = radius[node] * table.cos[(1 << width) + code]
        radius[right] = radius[node] * table.sin[(1 << width) + code]
        _descend(place, budget, node, left, right, table, width, code)
    units = np.zeros((n, plan.order), np.int32)
    for quad in range(tree.quads):
        at = internal + quad
        code = read_field(bits, place[at], budget[at])
        units[:, c.QUAD * quad :][:, : c.QUAD] = _decode_quad(code, budget[at], radius[at], plan)
    return units, *scale


def _decode_quad(code: np.ndarray, budget: np.ndarray, radius: np.ndarray, plan: Plan) -> np.ndarray:
    """Four coordinates on the grid, int32 [n, 4]; every code of ``budget`` bits decodes to something."""
    table = plan.quads
    cell = np.minimum(code // table.per_cell[budget], table.cells[budget] - 1)
    record = table.first[budget] + cell
    n_a, n_b = table.n_a[record].astype(np.int64), table.n_b[record].astype(np.int64)
    sector_a, sector_b = np.divmod(code - cell * table.per_cell[budget], n_b)
    columns = []
    for mean, sector, n in ((table.cos[record], sector_a, n_a), (table.sin[record], sector_b, n_b)):
        phase = (((2 * sector + 1) * angles.circle_step(n) + (1 << (c.PHASE_SHIFT - 1))) >> c.PHASE_SHIFT) % c.CIRCLE
        columns += [mean * plan.circle_cos[phase], mean * plan.circle_sin[phase]]  # exact: 11 bits times 11 bits
    return np.rint(radius[:, None] * np.stack(columns, 1)).astype(np.int32)


# -- paper coding (SPEC 7) ---------------------------------------------------------------------------------------
def encode_paper(v: np.ndarray, plan: Plan, bits: np.ndarray, exponent: int) -> None:
    """Rotated vectors v float64 [n, order] into bits [n, row_bits]: the paper's algorithm 1, block by block."""
    n = len(v)
    for block in range(plan.order // c.PAPER_BLOCK):
        x = v[:, c.PAPER_BLOCK * block :][:, : c.PAPER_BLOCK]
        fields = []
        codes = _sector(x[:, 0::2].ravel(), x[:, 1::2].ravel(), np.array(1 << c.PAPER_LEVEL_BITS[0])).reshape(n, -1)
        fields.append(codes)
        radius = np.hypot(x[:, 0::2], x[:, 1::2])
        for level in (2, 3, 4):
            a, b = radius[:, 0::2], radius[:, 1::2]
            bounds, _, _ = angles.paper_cells(level)
            fields.append((b[..., None] >= bounds * a[..., None]).sum(-1) * (a + b > 0))
            radius = np.hypot(a, b)
        stored = np.minimum(np.ldexp(radius, -exponent), c.LARGEST_FINITE[c.DTYPE_FLOAT16]).astype(np.float16)
        place = np.full(n, c.PAPER_BLOCK_BITS * block, np.int64)
        place = _write_run(bits, place, c.PAPER_RADIUS_BITS, stored.view(np.uint16).astype(np.int64))
        for codes, width in zip(reversed(fields), reversed(c.PAPER_LEVEL_BITS), strict=True):
            place = _write_run(bits, place, width, codes)


def _write_run(bits: np.ndarray, place: np.ndarray, width: int, codes: np.ndarray) -> np.ndarray:
    """Fields of one width, codes [n, k], side by side; returns the place behind them."""
    for column in codes.T:
        write_field(bits, place, np.full(len(bits), width), column)
        place = place + width
    return place


def decode_paper(bits: np.ndarray, plan: Plan, exponent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits [n, row_bits] -> coordinates on the grid of each vector's power of two, int32 [n, order], and factors A, B."""
    n, blocks = len(bits), plan.order // c.PAPER_BLOCK
    place = np.arange(blocks) * c.PAPER_BLOCK_BITS
    stored = np.stack([read_field(bits, np.full(n, p), np.full(n, c.PAPER_RADIUS_BITS)) for p in place], 1)
    radius = (stored & 0x7FFF).astype(np.uint16).view(np.float16).astype(np.float32)
    radius = np.minimum(np.where(np.isnan(radius), np.float32(0), radius), np.float32(c.LARGEST_FINITE[c.DTYPE_FLOAT16]))
    power = np.frexp(radius.max(1))[1]  # every radius is below 2^power
    radius = np.ldexp(radius, (11 - power)[:, None]).astype(np.float32)
    units = np.zeros((n, plan.order), np.int32)
    for block in range(blocks):
        at = int(place[block]) + c.PAPER_RADIUS_BITS
        values = radius[:, block : block + 1]
        for level in (4, 3, 2):
            _, cos, sin = angles.paper_cells(level)
            codes, at = _read_run(bits, at, c.PAPER_LEVEL_BITS[level - 1], values.shape[1])
            values = np.stack([values * cos[codes], values * sin[codes]], 2).reshape(n, -1)
        codes, at = _read_run(bits, at, c.PAPER_LEVEL_BITS[0], values.shape[1])
        phase = (2 * codes + 1) * (c.CIRCLE >> (c.PAPER_LEVEL_BITS[0] + 1))
        values = np.stack([values * plan.circle_cos[phase], values * plan.circle_sin[phase]], 2).reshape(n, -1)
        units[:, c.PAPER_BLOCK * block :][:, : c.PAPER_BLOCK] = np.rint(values).astype(np.int32)
    return units, *_paper_scale(power + exponent, plan)


def _read_run(bits: np.ndarray, place: int, width: int, count: int) -> tuple[np.ndarray, int]:
    full = np.full(len(bits), width)
    columns = [read_field(bits, np.full(len(bits), place + width * i), full) for i in range(count)]
    return np.stack(columns, 1), place + width * count


def _paper_scale(power: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Factors A, B [n] of vectors whose radii lie below 2^power."""
    small = power < c.RADIUS_SPLIT
    first = np.ldexp(plan.mantissas[0], power + np.where(small, c.RADIUS_SHIFT, 0)).astype(np.float32)
    return first, np.where(small, np.float32(2.0**-c.RADIUS_SHIFT), np.float32(1)).astype(np.float32)


# -- rotation (SPEC 5) -------------------------------------------------------------------------------------------
def rotate(x: np.ndarray, plan: Plan) -> np.ndarray:
    """x float64 [n, order] -> H D x, or with two rounds H D P H E x; sqrt(energy_scale) times as long."""
    matrix = rotation.hadamard(plan.order).T.astype(np.float64)
    if plan.rounds == 2:
        x = ((x * plan.first_signs) @ matrix)[:, plan.permutation]
    return (x * plan.signs) @ matrix


def rotate_back(v: np.ndarray, plan: Plan) -> np.ndarray:
    """v int64 [n, order] -> D H^T v, or with two rounds E H^T P^T D H^T v; all integers."""
    matrix = rotation.hadamard(plan.order).astype(np.int64)
    s = v @ matrix * plan.signs.astype(np.int64)
    if plan.rounds == 1:
        return s
    between = np.empty_like(s)
    between[:, plan.permutation] = s
    return between @ matrix * plan.first_signs.astype(np.int64)


# -- rows --------------------------------------------------------------------------------------------------------
def encode_rows(x: np.ndarray, plan: Plan, radius_exponent: int = 0) -> np.ndarray:
    """Centred vectors float32 [n, head_dim] -> coded rows uint8 [n, row_bytes]."""
    padded = np.zeros((len(x), plan.order))
    padded[:, : plan.head_dim] = x
    v = rotate(padded, plan) / np.sqrt(plan.energy_scale)
    bits = np.zeros((len(x), 8 * plan.row_bytes), np.uint8)
    if plan.coding == c.CODING_SPLIT:
        encode_split(v, plan, bits)
    else:
        encode_paper(v, plan, bits, radius_exponent)
    return np.packbits(bits, axis=1, bitorder="little")


def decode_rows(rows: np.ndarray, plan: Plan, radius_exponent: int = 0) -> np.ndarray:
    """Coded rows uint8 [n, row_bytes] -> vectors float32 [n, head_dim], before the offset is added."""
    bits = np.unpackbits(rows, axis=1, bitorder="little")
    if plan.coding == c.CODING_SPLIT:
        units, first, second = decode_split(bits, plan)
    else:
        units, first, second = decode_paper(bits, plan, radius_exponent)
    sums = rotate_back(units.astype(np.int64), plan)
    with np.errstate(over="ignore"):  # beyond float32: infinite here, the largest finite value in ``narrow``
        return sums[:, : plan.head_dim].astype(np.float32) * first[:, None] * second[:, None] + np.float32(0)  # never -0


# -- the backend -------------------------------------------------------------------------------------------------
class Reference:
    """Walks a stream's blocks one after another."""

    name = "reference"

    def means(self, values: Values, header: Header) -> np.ndarray:
        picked, count, step = sampled(values, header)
        turns = centre.phases(header.rope, header.first_tokens, count, step) if header.rope else None
        total = np.zeros((header.leading, header.head_dim))
        for lead in range(header.leading if count else 0):
            x = widen(picked.rows(lead, 0, count), header.dtype)
            x[~np.isfinite(x).all(1)] = 0
            back = centre.turn_back(x, *turns, header.rope) if turns and header.rope else x.astype(np.float64)
            total[lead] = back.sum(0)
        return total / max(count, 1)

    def encode(self, job: EncodeJob) -> None:
        h, plan = job.header, plan_for(job.header)
        for chunk in range(h.chunks):
            first, tokens = h.first_tokens + chunk * h.chunk_tokens, h.block_tokens(chunk)
            for lead in range(h.leading):
                x = widen(job.values.rows(lead, first, tokens), h.dtype)
                finite = np.isfinite(x).all(1)
                job.bad[lead, chunk * h.chunk_tokens :][:tokens] = ~finite
                x[~finite] = 0
                if job.offsets is not None:
                    with np.errstate(over="ignore"):
                        x[finite] -= self._offset(job.offsets[lead], h, first, tokens)[finite]
                    x = np.clip(x, -c.LARGEST_FINITE[c.DTYPE_FLOAT32], c.LARGEST_FINITE[c.DTYPE_FLOAT32])
                rows = encode_rows(x, plan, h.radius_exponent)
                start = h.block_start(chunk, lead) - h.payload_start
                job.payload[start : start + rows.size] = rows.ravel()
                word = np.array([checksum(rows.ravel())], "<u4").view(np.uint8)
                job.payload[start + rows.size : start + rows.size + c.CHECKSUM_BYTES] = word
            job.advance(h.leading)

    def decode(self, jobs: Sequence[DecodeJob], advance: Callable[[int], None] = nobody) -> None:
        for job in jobs:
            self._decode(job, advance)

    def _decode(self, job: DecodeJob, advance: Callable[[int], None]) -> None:
        h, plan = job.header, plan_for(job.header)
        for chunk in range(job.first_chunk, job.last_chunk):
            for lead in range(job.first_lead, job.last_lead):
                block = job.block(chunk, lead)
                body = block[: -c.CHECKSUM_BYTES]
                job.damaged[chunk - job.first_chunk, lead - job.first_lead] = (
                    checksum(body) != block[-c.CHECKSUM_BYTES :].view("<u4")[0]
                )
                if job.out is None:
                    continue
                low, high = job.rows_of(chunk)
                rows = body.reshape(-1, h.row_bytes)[low:high]
                x = decode_rows(rows, plan, h.radius_exponent)
                first = h.first_tokens + chunk * h.chunk_tokens + low
                if job.offsets is not None:
                    with np.errstate(over="ignore"):
                        x = x + self._offset(job.offsets[lead], h, first, high - low)
                job.out.rows(lead - job.first_lead, first - job.first_token, high - low)[:] = narrow(x, h.dtype)
            advance(job.last_lead - job.first_lead)

    @staticmethod
    def _offset(offset: np.ndarray, h: Header, first: int, tokens: int) -> np.ndarray:
        """The offset at tokens first .. first+tokens-1: float32 [tokens or 1, head_dim]."""
        if h.rope is None:
            return np.repeat(offset[None, :], tokens, axis=0)
        return centre.turn(offset, *centre.phases(h.rope, first, tokens), h.rope)
