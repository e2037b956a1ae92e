"""Law: the tables of a plan as numpy arrays, in records as the CPU's kernels take them: plain tuples."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles, levels, look_ups, quads, sketch
from pqcodec.codings.declared import Sketch, quads_index_bits
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.kernels.cpu import records as r
from pqcodec.kernels.cpu.lanes import LANES
from pqcodec.stages import centre, rotation
from pqcodec.stream.header import Header
from pqcodec.stream.orders import base_of, order_for


@lru_cache(maxsize=64)
def of_plan(
    verb: str, coding: int, head_dim: int, row_bits: int, radius_bits: int, seed: int, rounds: int
) -> tuple[tuple, tuple]:
    """Rotation and SplitEncoder or SplitDecoder of a ``verb``, "encode" or "decode", as plain tuples."""
    plan = plan_for(Header(coding, c.DTYPE_FLOAT32, (1, head_dim), row_bits, radius_bits, seed, rounds=rounds))
    split = _split_encoder(plan) if verb == "encode" else _split_decoder(plan)
    return r.plain(_rotation(plan, verb)), r.plain(split)


def paper_encoder(h: Header) -> tuple:
    """A PaperEncoder."""
    return r.plain(r.PaperEncoder(h.radius_exponent, _paper_arrays()[0]))


def paper_decoder(h: Header, mantissa: np.float32) -> tuple:
    """A PaperDecoder; ``mantissa``: the plan's."""
    _, cos, sin = _paper_arrays()
    return r.plain(r.PaperDecoder(h.radius_exponent, mantissa, cos, sin, _circle()))


def rope(h: Header, positions: np.ndarray | None = None) -> tuple:
    """A RopeTable; without RoPE it has no pairs. ``positions``: as in a ``DecodeJob``."""
    if h.rope is None:
        return _no_rope()
    pairs = len(h.rope.frequencies)
    half = h.rope.pairing == c.ROPE_HALF
    frequencies, first = np.array(h.rope.frequencies, np.uint32), h.rope.first_position % (1 << c.PHASE_BITS)
    listed, list_tokens = np.zeros(0, np.uint32), 0
    if positions is not None:
        listed, list_tokens = (positions.ravel() + np.uint32(first)), positions.shape[1] if len(positions) > 1 else 0
        first = 0
    pair = (1, pairs) if half else (2, 1)
    to_halves = np.float32(2.0**-h.offset_exponent if h.runs else 0)
    return r.plain(r.RopeTable(frequencies, *pair, first, centre.phase_pairs(), listed, list_tokens, to_halves))


@lru_cache(maxsize=1)
def _no_rope() -> tuple:
    none = np.zeros(0, np.uint32)
    return r.plain(r.RopeTable(none, 1, 1, 0, centre.phase_pairs(), none, 0, np.float32(0)))


def groups(h: Header, effort: str = "fast", look_up: bool = True) -> tuple:
    """A Groups of a stream whose rows share affine fields; ``look_up``: whether numbers are wanted, and not only checksums.

    Raises MissingTable.
    """
    affine = h.affine
    assert affine is not None
    found = np.array(h.levels if look_up else (), np.float32)
    ranges, (ends, outliers) = h.ranges if look_up else None, affine.room(h.order)
    return tuple(
        r.Groups(
            tokens=affine.tokens,
            channels=affine.channels,
            field_bytes=affine.bytes_of(h.order),
            bits=h.radius_bits or h.row_bits // h.order,
            angle_bits=affine.angle_bits,
            half=-(-h.head_dim // c.PAIR_CHANNELS),
            interleaved=affine.pairing == c.ROPE_INTERLEAVED,
            zeros=affine.fields == c.AFFINE_SCALE_ZERO,
            shortest=effort == "best",
            levels=found,
            bounds=_bisection(levels.bounds(found)),
            outliers=outliers,
            ends=ends,
            shared=np.zeros(0, np.uint8) if ranges is None else ranges.bytes.ravel().copy(),
            shared_bytes=affine.groups(h.order) * c.AFFINE_FIELD_BYTES[affine.fields] if affine.shared else 0,
        )
    )


def _bisection(bounds: np.ndarray) -> np.ndarray:
    """2^bits - 1 ascending bounds as a tree: node i of depth d at [2^d + i], an infinity at [0], zeros behind for ``pick``."""
    depths = len(bounds).bit_length()
    nodes = [bounds[(1 << depths - 1 - depth) - 1 :: 1 << depths - depth] for depth in range(depths)]
    return np.concatenate([np.full(1, np.inf, np.float32), *nodes, np.zeros(LANES, np.float32)])


# -- the split coding --------------------------------------------------------------------------------------------------
def _split_encoder(plan: Plan) -> r.SplitEncoder:
    steps = plan.radius_steps if plan.coding == c.CODING_SPLIT else 1
    tree, leaves = _encoder_tree(plan.order), _encoder_quads()
    return r.SplitEncoder(plan.radius_bits, steps, plan.root_budget, plan.radius_scale, tree, leaves)


def _split_decoder(plan: Plan) -> r.SplitDecoder:
    radii = plan.radii if plan.coding == c.CODING_SPLIT else np.zeros((2, 0), np.float32)
    tree, leaves = _decoder_tree(plan.order), _decoder_quads()
    return r.SplitDecoder(plan.radius_bits, plan.root_budget, radii, _circle(), tree, leaves)


@lru_cache(maxsize=32)
def _encoder_tree(order: int) -> r.EncoderTree:
    tree, nodes = angles.tree(order), look_ups.node_arrays(order)
    m_a, m_b = _children(order)
    return r.EncoderTree(
        tree.kind,
        tree.left,
        tree.right,
        m_a,
        m_b,
        _per_bit(order),
        _portions(order).ravel(),
        np.exp2(nodes.grid_shift + c.COARSE_GRID_BITS).astype(np.float32),
        nodes.shift.ravel(),
        nodes.look_up.ravel(),
        nodes.bounds.ravel(),
        nodes.grid_shift,
        nodes.fixes,
    )


@lru_cache(maxsize=32)
def _decoder_tree(order: int) -> r.DecoderTree:
    tree, nodes = angles.tree(order), look_ups.node_arrays(order)
    (m_a, m_b), portions = _children(order), _portions(order)
    kind = np.asarray(tree.kind, np.int64)
    shape = np.where(m_a == c.QUAD, r.OF_QUADS, np.where(m_a == m_b, r.EVEN, r.UNEVEN))
    steps = np.zeros((len(kind), len(r.NODE)), np.int64)
    columns = {
        r.NODE.left: np.multiply(tree.left, LANES),
        r.NODE.right: np.multiply(tree.right, LANES),
        r.NODE.cap_a: c.MAX_BUDGET_PER_COORDINATE * m_a[kind],
        r.NODE.cap_b: c.MAX_BUDGET_PER_COORDINATE * m_b[kind],
        r.NODE.codes: kind * r.CODES,
        r.NODE.shape: shape[kind],
        r.NODE.portions: kind * portions.shape[1],
    }
    for column, numbers in columns.items():
        steps[:, column] = numbers
    table = np.stack([nodes.cos, nodes.sin, nodes.shift.view(np.float32), np.zeros_like(nodes.cos)], 2)
    return r.DecoderTree(steps.ravel(), _per_bit(order)[kind], portions.ravel(), table.ravel().view(np.int32))


def _children(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the left and of the right child of each kind of nodes: int32 [kinds]."""
    tables = angles.tree(order).tables
    return np.array([table.m_a for table in tables], np.int32), np.array([table.m_b for table in tables], np.int32)


def _per_bit(order: int) -> np.ndarray:
    """16 / (15 coordinates) of each kind of nodes: float32 [kinds]."""
    m_a, m_b = _children(order)
    return (16 / (15 * (m_a + m_b))).astype(np.float32)


def _portions(order: int) -> np.ndarray:
    """The left child's portion of each budget: int32 [kinds, budgets]."""
    tables = angles.tree(order).tables
    most = max(len(table.bits) for table in tables)
    return np.stack([np.arange(most) * table.m_a // table.coordinates for table in tables]).astype(np.int32)


@lru_cache(maxsize=1)
def _encoder_quads() -> r.EncoderQuads:
    table = angles.quad_table()
    return r.EncoderQuads(
        np.stack([table.per_cell.astype(np.int32), table.first], 1).ravel(),
        look_ups.quad_look_up().ravel(),
        np.stack([table.n_a, table.n_b], 1).ravel(),
    )


@lru_cache(maxsize=1)
def _decoder_quads() -> r.DecoderQuads:
    table = angles.quad_table()
    codes = table.per_cell.astype(np.int32)
    by_budget = np.stack([codes, table.first, table.cells - 1, (1 / codes).astype(np.float32).view(np.int32)], 1)
    columns = (
        table.cos.view(np.int32),
        table.sin.view(np.int32),
        table.n_b,
        (1 / table.n_b).astype(np.float32).view(np.int32),
        angles.circle_step(table.n_a).astype(np.int32),
        angles.circle_step(table.n_b).astype(np.int32),
    )
    by_record = np.zeros((len(table.n_b), 8), np.int32)
    by_record[:, : len(columns)] = np.stack(columns, 1)
    return r.DecoderQuads(by_budget.ravel(), by_record.ravel(), _codebook(table))


def _codebook(table: angles.QuadTable) -> np.ndarray:
    """Every point of the quads of few bits at radius 1: float32, entry 4 * (2^budget + code); products are exact."""
    points = np.zeros((2 << r.CODEBOOK_BUDGET, 4), np.float32)
    cos, sin = angles.circle_table()
    for budget in range(r.CODEBOOK_BUDGET + 1):
        code = np.arange(1 << budget)
        cell = np.minimum(code // table.per_cell[budget], table.cells[budget] - 1)
        record = table.first[budget] + cell
        sector_a, sector_b = np.divmod(code - cell * table.per_cell[budget], table.n_b[record])
        for column, mean, sector, n in ((0, table.cos, sector_a, table.n_a), (2, table.sin, sector_b, table.n_b)):
            turn = (2 * sector + 1) * angles.circle_step(n[record]) + (1 << (c.PHASE_SHIFT - 1))
            phase = (turn >> c.PHASE_SHIFT) % c.CIRCLE
            points[1 << budget : 2 << budget, column] = mean[record] * cos[phase]
            points[1 << budget : 2 << budget, column + 1] = mean[record] * sin[phase]
    return points.ravel()


# -- the quads coding ----------------------------------------------------------------------------------------------------
@lru_cache(maxsize=64)
def quads_encoder(coding: int, head_dim: int, row_bits: int, effort: str) -> tuple:
    """A QuadsEncoder; of another coding one that nothing uses."""
    choices = np.array(c.QUADS_EFFORTS[effort], np.int32)
    if coding != c.CODING_QUADS:
        none = [np.zeros(0, kind) for kind in (np.float32, np.float32, np.int64, np.int32)]
        return r.plain(r.QuadsEncoder(8, 0, 0, 1, choices, *none))
    order = order_for(head_dim)
    table = quads.points_of(quads_index_bits(order, row_bits))
    inverse = table.aim / order * np.exp2(-np.arange(c.QUADS_RADIUS_STEPS) / c.QUADS_RADIUS_STEPS)
    sizes = table.bits, *quads.plane_bytes(order, table.bits), order**3
    return r.plain(r.QuadsEncoder(*sizes, choices, inverse.astype(np.float32), *_searched(table)))


def _searched(table: quads.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Representatives, runs and numbers of a QuadsEncoder: sorted by which of their coordinates are equal."""
    points = [tuple(map(int, each)) for each in table.representatives]
    ties = [r.QUADS_TIES.index(tuple(len(list(same)) for _, same in groupby(each))) for each in points]
    picked = np.argsort(ties, kind="stable")
    runs = np.searchsorted(np.sort(ties), np.arange(len(r.QUADS_TIES) + 1)).astype(np.int64)
    listed = np.zeros((len(points), c.QUAD + 2), np.float32)
    for i, each in enumerate(picked):
        different = [x for x, _ in groupby(points[each])]
        listed[i, : len(different)] = different
        listed[i, c.QUAD :] = -sum(x * x for x in points[each]) / 2, i
    return listed.ravel(), runs, table.numbers_by_three[picked].astype(np.int32).ravel()


@lru_cache(maxsize=64)
def quads_decoder(coding: int, head_dim: int, row_bits: int, mantissas: bytes) -> tuple:
    """A QuadsDecoder; of another coding one that nothing uses. ``mantissas``: the plan's, as bytes."""
    if coding != c.CODING_QUADS:
        return r.plain(r.QuadsDecoder(8, 0, 0, np.zeros((2, 0), np.float32), np.zeros(0, np.int32)))
    order = order_for(head_dim)
    table = quads.points_of(quads_index_bits(order, row_bits))
    radii = np.stack(quads.factors(np.arange(c.QUADS_RADII[0], c.QUADS_RADII[1] + 1), np.frombuffer(mantissas, np.float32)))
    places = np.argsort(c.QUADS_SIGN_PLACES)  # of each byte the coordinate
    points = (table.points[:, places].astype(np.int32) << (8 * np.arange(c.QUAD, dtype=np.int32))).sum(1, dtype=np.int32)
    return r.plain(r.QuadsDecoder(table.bits, *quads.plane_bytes(order, table.bits), radii, points))


# -- the sign sketch -----------------------------------------------------------------------------------------------------
@lru_cache(maxsize=16)
def sketch_table(verb: str, asked: Sketch, head_dim: int, seed: int, shrunk: bool = False) -> tuple:
    """A SketchTable of a ``verb``, "encode" or "decode"."""
    order, most = order_for(head_dim), max(asked.blocks, asked.outlier_blocks)
    seeds = [sketch.block_seed(seed, order, block) for block in range(most)]
    turned = [Header(c.CODING_SPLIT, c.DTYPE_FLOAT32, (1, order), order, c.RADIUS_BITS[0], own, rounds=2) for own in seeds]
    rotations = [_rotation(plan_for(h), verb) for h in turned]
    independent = most if asked.matrix == c.SKETCH_INDEPENDENT else 0
    dense = [sketch.projections(asked.matrix, seed, order, block).astype(np.int8).ravel() for block in range(independent)]
    signs, between = (np.stack([getattr(each, name) for each in rotations]) for name in ("signs", "between"))
    return tuple(
        r.SketchTable(
            asked.blocks,
            asked.outlier_blocks,
            asked.channels,
            asked.tokens or c.MAX_CHUNK_TOKENS,
            asked.list_bytes(head_dim),
            sketch.scales(asked, head_dim, order, shrunk).ravel(),
            signs,
            between,
            rotations[0].base,
            rotations[0].places,
            np.concatenate([np.zeros(0, np.int8), *dense]),
        )
    )


@lru_cache(maxsize=8)
def sketch_columns(asked: Sketch, head_dim: int, seed: int) -> tuple[np.ndarray, np.float32]:
    """T of SPEC 21.3 over a power of two, column by column: float32 [order, projections of all blocks], flat; and that power.

    No number is above 1, so that products with large queries stay in float32.
    """
    order, blocks = order_for(head_dim), range(max(asked.blocks, asked.outlier_blocks))
    whole = np.concatenate([sketch.projections(asked.matrix, seed, order, block) for block in blocks]).T
    power = 1 << int(np.abs(whole).max()).bit_length()
    return np.ascontiguousarray(whole / power, np.float32).ravel(), np.float32(power)


# -- split and paper ------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _circle() -> np.ndarray:
    """cos and sin of the 2,048 directions, side by side: float32 [4096]."""
    return np.stack(angles.circle_table(), 1).ravel()


@lru_cache(maxsize=1)
def _paper_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared bounds in tan psi [3, 3]; cos and sin [3, 4] of levels 2 to 4."""
    bounds, cos, sin = look_ups.paper_levels()
    return bounds**2, cos, sin


# -- the rotation ------------------------------------------------------------------------------------------------------
_NO_ROUND = np.zeros(0, np.int64), np.zeros(0, np.float32)
_NO_PAIRS = np.zeros(0, np.int64), np.zeros(0, np.int16)
_LARGEST_UNIT = 127  # of a quad's coordinates


def _rotation(plan: Plan, verb: str) -> r.Rotation:
    """The rotation of a ``verb``, "encode" or "decode": the decoder's is the way back."""
    base = _base_places(plan.order, verb == "decode")
    if plan.rounds == 1:
        return r.Rotation(plan.signs, _flips(plan.signs), base, *_NO_ROUND, *_NO_PAIRS)
    order = (plan.permutation if verb == "encode" else np.argsort(plan.permutation)).astype(np.int64)
    signs = plan.signs if verb == "encode" else plan.signs[order]
    pairs = _NO_PAIRS
    if verb == "decode" and len(base) == 0 and plan.order * _LARGEST_UNIT < 1 << 15:
        both = np.stack([signs, np.where(order % 2, -signs, signs)], 1)  # an odd coordinate is the difference of its pair
        pairs = order // 2 * (2 * LANES), np.tile(both.astype(np.int16)[:, None], (1, LANES, 1)).ravel()
    return r.Rotation(plan.first_signs, _flips(plan.first_signs), base, order * LANES, np.repeat(signs, LANES), *pairs)


def _flips(signs: np.ndarray) -> np.ndarray:
    """``Rotation.flips``."""
    return np.repeat(np.where(signs < 0, np.int32(-(1 << 31)), np.int32(0)), LANES)


@lru_cache(maxsize=64)
def _base_places(order: int, transposed: bool) -> np.ndarray:
    """``Rotation.base`` of an order; ``transposed``: of the way back."""
    base = rotation.base_matrix(base_of(order))
    if len(base) == 1:
        return np.zeros((0, 0), np.int64)
    fours = (base.T if transposed else base).reshape(len(base), -1, 4)
    which = (fours[:, :, None] == np.array(r.SUMS)).all(3).argmax(2)
    return (which + np.arange(fours.shape[1]) * len(r.SUMS)) * 2 * LANES
