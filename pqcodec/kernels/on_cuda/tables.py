"""Law: the tables of a kind of stream as kernels read them: one blob, which a kernel copies into shared memory.

A kernel finds each array at the byte that the macro NAME_AT says.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings import look_ups as t
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.kernels.on_cuda.factors import DOWN_SHIFT, factor_tables, in_factors
from pqcodec.kernels.on_cuda.quads_encoder import COPY_MACROS, ONE_COPY, Copies, encoder_tables
from pqcodec.stages import centre
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header, RopeField

ORDERS = (64, 128, 256)
ROWS = 8  # of a tile, which one warp codes together
MOST_KEYS = 4096  # checksum keys that are kept in shared memory; blocks of more words read them from the device's memory
LOOK_UP_BYTES = t.STEPS + 4  # of a row of 1,024 places, with one place more
BOUNDS_ROW = t.BOUNDS + 1  # entries of a width's row of bounds, the last of which is never reached
# (bits a coordinate up to which it holds, bits of the largest quads that are looked up whole): nearly every quad is.
TABLE_BITS = ((2.2, 11), (2.7, 13), (3.2, 14))


def tables_for(
    verb: str,
    h: Header,
    bits: int,
    keys: bool,
    phases: int,
    copies: Copies = ONE_COPY,
    effort: str = "fast",
    tile_turns: int = 0,
    products: bool = False,
) -> tuple[np.ndarray, dict[str, int]]:
    """The blob, uint8 [bytes], and the macros that say where each array begins, and how many copies there are of RoPE's turns
    (``phases``) and of an encoder's tables of quads (``copies``).

    ``bits``: the largest quads that a decoder looks up whole. ``keys``: with the checksum's keys, unless they are many;
    without, the kernel reads them from the device's memory. ``effort``: of an encoder's search. ``tile_turns``: rows of a
    tile, if an encoder turns means from its first row to the others. ``products``: with the turns of a run's rows, and
    without RoPE's phases.
    """
    plan = plan_for(h)
    own = _decoder_tables(h, plan, bits) if verb == "decode" else _encoder_tables(h, plan, copies, effort)
    turns = turns_of_tile(h.rope, tile_turns, in_factors(verb, h)) if tile_turns and h.rope else {}
    pieces = {"TURNED_PIECES": len(turns["ROW_TURNS"])} if turns else {}
    turns |= run_tables(h) if products else {}
    halves = in_halves(verb, h, products)
    blob, places = blob_of({**own, **turns, **_shared(verb, h, plan, keys, 0 if products else phases, halves)})
    return blob, {**places, **pieces, "PHASE_COPIES": phases, **dict(zip(COPY_MACROS, copies, strict=True))}


def table_bits(h: Header) -> int:
    """Bits of the largest quads that the decoder looks up whole; 0 where it looks up none."""
    return next((bits for most, bits in TABLE_BITS if h.coding == c.CODING_SPLIT and h.row_bits <= most * h.order), 0)


# -- of both directions -------------------------------------------------------------------------------------------------
def blob_of(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Arrays one after the other, each at a multiple of 16 bytes, and the byte at which each begins."""
    parts, places, at = [], {}, 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        places[f"{name}_AT"] = at
        parts.append(np.pad(raw, (0, -raw.size % 16)))
        at += parts[-1].size
    return np.concatenate(parts), places


def _shared(verb: str, h: Header, plan: Plan, keys: bool, copies: int, halves: bool) -> dict[str, np.ndarray]:
    """Of every coding of ``blocks.cu``: the rotation's matrix (for sums of float16: ``halves``) or signs, and what
    ``shared_tables`` gives.
    """
    matrix = factor_tables(h) if in_factors(verb, h) else {}
    if plan.rounds == 2 and not matrix:
        matrix = {"MATRIX": _halves_matrix(h) if halves else _matrix(verb, h)}
    arrays = {}
    if not matrix:
        signs = np.where(plan.signs < 0, 1 << 31, 0).astype(np.uint32)
        one = (0x3C00 if h.dtype == c.DTYPE_FLOAT16 else 0x3F80) * 0x10001
        arrays = {"SIGNS": (signs[0::2] >> 16 | signs[1::2]) ^ one, "SIGNS_32": signs}
    words = -(-h.chunk_tokens // ROWS) * ROWS * plan.row_bytes // 4
    if h.coding == c.CODING_QUADS:
        words = h.blocks.chunk_bytes // 4
    return {**arrays, **shared_tables(h, words if keys else 0, copies), **matrix}


def shared_tables(h: Header, words: int, copies: int) -> dict[str, np.ndarray]:
    """RoPE's frequencies; its phases in so many copies, if any; and the keys of so many words of a block, unless too many."""
    arrays = {}
    if h.rope:
        arrays["FREQUENCIES"] = np.array(h.rope.frequencies, np.uint32)
        if copies:
            arrays["PHASES"] = np.repeat(centre.phase_pairs().reshape(2, -1, 2).swapaxes(0, 1), copies, 1)
    if 0 < words <= MOST_KEYS:
        arrays["KEYS"] = checksum_keys(words + 1).astype(np.uint32)
    return arrays


def in_pieces(h: Header) -> bool:
    """Whether channels that turn together are whole pieces apart, of 32 channels each."""
    return h.rope is not None and h.rope.pairing == c.ROPE_HALF and len(h.rope.frequencies) % 32 == 0


def run_pieces(h: Header) -> int:
    """Pieces whose turns are kept for products: of those that turn together one, else all, of which some may not turn."""
    return len(h.rope.frequencies) // 32 if in_pieces(h) and h.rope else h.order // 32


def run_tables(h: Header) -> dict[str, np.ndarray]:
    """RUN_TURNS: the turns of a run's rows (SPEC 9.5) as operands of products: float16 [tiles, pieces, 4 strips, 32 lanes, 8].

    Lane 4 g + q has two channels of quarter q: cos of rows g and g + 8 of the tile, then sin.
    """
    assert h.rope
    turns, pairs = np.stack(centre.turns_of_run(h.rope)), len(h.rope.frequencies)  # [2, rows, pairs]
    if not in_pieces(h):
        turning = np.repeat(turns, 2, 2) if h.rope.pairing == c.ROPE_INTERLEAVED else np.tile(turns, 2)
        turns = np.zeros((*turns.shape[:2], h.order), np.float32)
        turns[0], turns[..., : 2 * pairs] = 1, turning
    both = turns.reshape(2, -1, 2, 8, run_pieces(h), 4, 4, 2)  # [2, tiles, rows g and g + 8, g, pieces, quarters, strips, 2]
    return {"RUN_TURNS": both.transpose(1, 4, 6, 3, 5, 0, 2, 7).astype(np.float16)}


def _matrix(verb: str, h: Header) -> np.ndarray:
    """Both rounds' matrix as the kernel multiplies with it: uint8 [order / 8, bricks, 8 columns, 16 bytes of inputs].

    The decoder's columns are channels, the encoder's are coordinates. Entries are R / 2 as int8, or R as 16-bit numbers. Four
    lanes hold a row: each has eight neighbours of every 32 channels, and a quarter of the coordinates.
    """
    matrix = t.rotation_matrix(h.order, h.seed, 2)  # [coordinate, channel]
    place, channels = np.arange(h.order), channel_order(h.order)  # of 16 bytes of inputs a lane has four, of eight columns two
    if verb == "decode":
        coordinates = place % 16 // 4 * (h.order // 4) + place // 16 * 4 + place % 4
        columns = (matrix[coordinates][:, channels].T / 2).astype(np.int8)
    else:
        coordinates = place % 8 // 2 * (h.order // 4) + place // 8 * 2 + place % 2
        columns = matrix[coordinates]
        if in_bytes(verb, h):
            columns = (columns[:, place // 32 * 32 + place % 16 // 4 * 8 + place // 16 % 2 * 4 + place % 4] / 2).astype(np.int8)
        elif in_brains(h):
            even = columns[:, channels].astype(np.float32)
            columns = (even.view(np.uint32) >> 16).astype(np.uint16)  # exact: 256 at the most
        else:
            columns = columns[:, channels]
    return in_bricks(columns)


def _halves_matrix(h: Header) -> np.ndarray:
    """The same for an encoder whose sums are float16, two of a word: R over 2^DOWN_SHIFT.

    Neighbouring columns are the same coordinate of two neighbouring quads, and four strips are these.
    """
    matrix, place = t.rotation_matrix(h.order, h.seed, 2), np.arange(h.order)
    coordinates = place % 8 // 2 * (h.order // 4) + place // 32 * 8 + place % 2 * 4 + place // 8 % 4
    columns = matrix[coordinates][:, channel_order(h.order)] * 2.0 ** -down_shift("encode", h)
    return in_bricks(columns.astype(np.float16))


def channel_order(order: int) -> np.ndarray:
    """The channel of each of the matrix's columns, so that a lane has eight neighbours of every 32: int [order]."""
    place = np.arange(order)
    return place // 32 * 32 + place % 8 // 2 * 8 + place // 8 % 4 * 2 + place % 2


def in_bricks(columns: np.ndarray) -> np.ndarray:
    """Columns [n, inputs] as uint8 [n / 8 strips, bricks, 8 columns, 16 bytes of inputs]."""
    columns = np.ascontiguousarray(columns).view(np.uint8)
    return columns.reshape(len(columns) // 8, 8, -1, 16).swapaxes(1, 2)


def in_bytes(verb: str, h: Header) -> bool:
    """Whether two rounds' matrix is stored as bytes: for decoders, and for encoders of 16-bit numbers at the largest order."""
    plain = h.dtype != c.DTYPE_FLOAT32 and not h.offsets
    return h.rounds == 2 and (verb == "decode" or (h.order == max(ORDERS) and plain))


def in_halves(verb: str, h: Header, products: bool) -> bool:
    """Whether an encoder's rows and sums are float16: where means are turned by ``products``, or it rotates in factors."""
    return verb == "encode" and (products or in_factors(verb, h))


def down_shift(verb: str, h: Header) -> int:
    """Octaves by which sums of float16 are too small, so that they stay finite; in factors, a round's."""
    return DOWN_SHIFT if in_factors(verb, h) else h.order.bit_length() - 4


def in_brains(h: Header) -> bool:
    """Whether the matrix of an encoder that is not ``in_halves`` is of bfloat16, if it is of 16 bits: as its rows are, or for
    quads, as rows are rounded to.
    """
    as_stored = h.dtype != c.DTYPE_FLOAT32 and not h.offsets
    return h.dtype == c.DTYPE_BFLOAT16 if as_stored else h.coding == c.CODING_QUADS


@lru_cache(maxsize=64)
def matrix_fits(order: int, seed: int) -> bool:
    """Whether half of every entry of two rounds' matrix fits a signed byte; no seed is known for which it does not."""
    return bool(np.abs(t.rotation_matrix(order, seed, 2)).max() < 2 * 128)


# -- of decoders ----------------------------------------------------------------------------------------------------------
def _decoder_tables(h: Header, plan: Plan, table_bits: int) -> dict[str, np.ndarray]:
    if h.coding == c.CODING_PAPER:
        _, cos, sin = t.paper_levels()
        directions = (2 * np.arange(16) + 1) * (c.CIRCLE // 32)
        return {
            "ANGLES": np.stack([cos, sin], 2).astype(np.float32),
            "DIRECTIONS": np.stack([plan.circle_cos[directions], plan.circle_sin[directions]], 1),
            "MANTISSAS": plan.mantissas[:1],
        }
    nodes, quads = t.node_arrays(plan.order), plan.quads
    codes, last = quads.per_cell, quads.cells.astype(np.int64) - 1
    shift = np.array([int(n).bit_length() - 1 for n in codes])
    magic = [-(-(1 << (31 + int(s))) // int(n)) for s, n in zip(shift, codes, strict=True)]
    n_b = quads.n_b.astype(np.int64)
    # A circle of one sector has the factor 0: its step may be any. Bits from 27 on do not reach a direction: -n_b lies there.
    step_a, step_b = (np.where(n > 1, angles.circle_step(n), 0).astype(np.int64) for n in (quads.n_a, quads.n_b))
    records = [-(-(1 << 31) // n_b), step_a | (-n_b & 31) << 27, step_b | (-n_b >> 5 & 31) << 27, _halves(quads.cos, quads.sin)]
    arrays = {
        "NODES": np.stack([_halves(nodes.cos, nodes.sin), nodes.shift.view(np.uint32)], 2),
        "CIRCLE": _halves(plan.circle_cos, plan.circle_sin),
        "BUDGETS": np.stack([magic, shift | last << 16, -codes, quads.first], 1).astype(np.uint32),
        "RECORDS": np.stack(records, 1).astype(np.uint32),
        "MANTISSAS": plan.mantissas,
    }
    if table_bits:
        arrays["CODES"], arrays["POINTS"] = _code_table(plan, table_bits)
    return arrays


def _halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Two float32 arrays that float16 holds exactly, packed into one: uint32."""
    first, second = (x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (a, b))
    return first | second << 16


def _code_table(plan: Plan, most: int) -> tuple[np.ndarray, np.ndarray]:
    """For every code, entry 2^budget + code: the bytes at which its two pairs' points stand, 16 bits each; and those points."""
    quads = plan.quads
    records = quads.first[most] + quads.cells[most]
    points, first = [], np.zeros((2, records), np.int64)
    at = 0
    for record in range(records):
        for pair, (n, factor) in enumerate(((quads.n_a, quads.cos), (quads.n_b, quads.sin))):
            sectors = np.arange(n[record], dtype=np.int64)
            step = int(angles.circle_step(n[record]))
            direction = ((2 * sectors + 1) * step + (1 << (c.PHASE_SHIFT - 1)) >> c.PHASE_SHIFT) % c.CIRCLE
            points.append(factor[record] * np.stack([plan.circle_cos[direction], plan.circle_sin[direction]], 1))
            first[pair, record] = at
            at += len(sectors)
    table = np.zeros(2 << most, np.uint32)
    for budget in range(most + 1):
        code = np.arange(1 << budget)
        cell = np.minimum(code // quads.per_cell[budget], quads.cells[budget] - 1)
        record = quads.first[budget] + cell
        a, b = np.divmod(code - cell * quads.per_cell[budget], quads.n_b[record])
        table[1 << budget : 2 << budget] = 8 * (first[0, record] + a) | 8 * (first[1, record] + b) << 16
    found = np.concatenate(points).astype(np.float32)
    assert found.nbytes <= 1 << 16
    return table, found


# -- of encoders ----------------------------------------------------------------------------------------------------------
def _encoder_tables(h: Header, plan: Plan, copies: Copies, effort: str) -> dict[str, np.ndarray]:
    if h.coding == c.CODING_QUADS:
        return encoder_tables(plan, copies, effort)
    if h.coding == c.CODING_PAPER:
        return {}
    nodes, quads, kept = t.node_arrays(plan.order), plan.quads, kept_rows(h)
    rows = np.pad(nodes.bounds, ((0, 0), (0, 0), (0, BOUNDS_ROW - t.BOUNDS)), constant_values=1 << 30)
    bounds = np.minimum(rows, (1 << 16) - 1)
    return {
        "LOOK_UPS": _past_the_end(nodes.look_up)[kept],
        "BOUNDS": bounds.astype(np.uint16)[kept],
        "SHIFTS": nodes.shift.astype(np.int8),
        "CELLS": _past_the_end(t.quad_look_up()),
        "BUDGETS": np.stack([quads.per_cell, quads.first], 1).astype(np.uint32),
        "SECTORS": (quads.n_a | quads.n_b << 16).astype(np.uint32),
        "SHIFTS_16": _past_the_end(_shift_look_up(nodes, plan.order))[kept[-2:]],
    }


def turns_of_tile(rope: RopeField, rows: int, factors: bool = False) -> dict[str, np.ndarray]:
    """Turns by RoPE of a tile of so many rows, as (cos, sin):

    TILE_TURN float32 [pairs, 2]: from its first row to the next tile's;
    ROW_TURNS float32 [pieces, parts, .., 32 lanes, 2 turns, 2]: to its other rows, as lanes.cuh shares rows and pieces. A piece
        whose channels turn as those of another one of the same lane is left out; what does not turn, turns by nothing. Where a
        lane's piece may be the first or the second of pairs, the sines of the second have the other sign.

    ``factors``: whether pieces are those of an encoder that rotates in factors.
    """
    pairs, lane = len(rope.frequencies), np.arange(32)
    interleaved, apart = rope.pairing == c.ROPE_INTERLEAVED, pairs // 32 * (pairs % (64 if factors else 32) == 0)
    every = 2 * -(-2 * pairs // 64) if factors else -(-2 * pairs // 32)  # that have channels which turn
    pieces = apart if apart and not interleaved else every
    piece, quarter = np.arange(pieces)[:, None], lane % 4
    first = piece // 2 * 64 + quarter * 16 + (piece % 2 ^ lane // 4 % 2) * 8 if factors else 32 * piece + 8 * quarter
    pair = first[..., None] // 2 + np.arange(4) if interleaved else first[..., None] + np.arange(8)  # [pieces, lanes, turns]
    turned = pair < pairs * (1 if interleaved else 2)
    second = turned & (pair >= pairs)
    row = np.arange(rows).reshape(-1, 8)[:, lane // 4, None]  # [parts, lanes, 1]
    cos, sin = _turns(np.where(turned, np.array(rope.frequencies)[pair % pairs], 0)[:, None], row)
    turns = np.stack([cos, np.where(second[:, None], -sin, sin)], -1)  # [pieces, parts, lanes, turns, 2]
    return {
        "TILE_TURN": np.stack(_turns(np.array(rope.frequencies), rows), -1),
        "ROW_TURNS": turns.reshape(*turns.shape[:3], -1, 4).swapaxes(2, 3),
    }


def _turns(frequencies: np.ndarray, tokens: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32, of whole frequencies times small numbers of tokens."""
    angle = frequencies * tokens % (1 << c.PHASE_BITS) * (2 * np.pi / (1 << c.PHASE_BITS))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@lru_cache(maxsize=64)
def kept_rows(h: Header) -> np.ndarray:
    """Which rows of the encoder's look-ups a kernel gets: bool [kinds, widths]. Split coding only.

    With one round of rotation all of them; beside the matrix of two rounds there is room only for the widths that the angles of
    a kind can have.
    """
    plan = plan_for(h)
    kept = np.full((len(plan.tree.tables), t.WIDTHS), plan.rounds == 1)
    budgets = {plan.root_budget}
    for kind, table in enumerate(plan.tree.tables):  # these orders halve down to 8: one kind a level
        widths = table.bits[sorted(budgets)]
        kept[kind, widths.min() : widths.max() + 1] = True
        below: set[int] = set()
        for budget in budgets:
            width = int(table.bits[budget])
            shift = table.shift[1 << width : 2 << width].astype(np.int64)
            rest = np.full_like(shift, budget - width)
            left = angles.split_budget(rest, shift, table.m_a, table.m_b)
            below |= {*left.tolist(), *(rest - left).tolist()}
        budgets = below
    return kept


def row_starts(h: Header) -> list[int]:
    """The row at which each kind's width 0 would stand, were it kept: add a width to find the width's row."""
    kept = kept_rows(h)
    return [int(kept[:kind].sum() - kept[kind].argmax()) for kind in range(len(kept))]


def _shift_look_up(nodes: t.NodeArrays, order: int) -> np.ndarray:
    """Shift of the left child's share by place, for nodes of 16 and of 8 coordinates: int8 [2, widths, 1024]."""
    kinds = np.array([order.bit_length() - 5, order.bit_length() - 4])  # these orders halve down to 8: one kind a level
    widths = 1 << np.arange(t.WIDTHS)[None, :, None]
    return nodes.shift[kinds[:, None, None], widths + nodes.look_up[kinds]].astype(np.int8)


def _past_the_end(look_up: np.ndarray) -> np.ndarray:
    """Rows of 1,024 places, their last entry repeated up to LOOK_UP_BYTES: a share of all the energy is place 1,024."""
    return np.pad(look_up, [(0, 0)] * (look_up.ndim - 1) + [(0, LOOK_UP_BYTES - t.STEPS)], mode="edge")
