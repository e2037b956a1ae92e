"""Law: how ``quads.cu`` and ``quads_teams.cu`` are compiled for a kind of stream: tables in shared memory, threads, macros."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import look_ups as t
from pqcodec.codings import quads
from pqcodec.codings.declared import quads_index_bits
from pqcodec.codings.plan import plan_for
from pqcodec.kernels.on_cuda.compiled import (
    AHEAD,
    UPCOMING_BYTES,
    Layout,
    common_definitions,
    phase_copies,
    quickest,
    run_bytes,
    warp_memory,
)
from pqcodec.kernels.on_cuda.tables import blob_of, channel_order, in_bricks, in_pieces, run_pieces, run_tables, shared_tables
from pqcodec.stream.header import Header

BEST_ORDERS = (32, 64, 96, 128, 160, 192, 224, 256)  # that are encoded with every effort
ENCODED_ORDERS = (*BEST_ORDERS, 320, 384, 448, 512, 576)  # with effort "fast"
DECODED_ORDERS = (*ENCODED_ORDERS, 288)
LARGE_ORDERS = tuple(order for order in DECODED_ORDERS if order > max(BEST_ORDERS))
WIDE_ORDER = 64  # of which a warp decodes 32 rows at a time, unless they turn; else 16
COPIES = (32, 16, 8, 4, 2, 1)  # of a point in the table: with 16 of eight bytes no lanes meet in a bank; 32 spare instructions
NEGATIVES_BITS = 8  # up to which a point's negative stands beside it, for teams; of more bits there are more copies instead
FEW_COPIES = (2, 1)  # for few blocks: what is copied into shared memory first takes longer than what it then saves
THREADS = {32: 768, 64: 512, 96: 640, 128: 640, 160: 512, 192: 512, 224: 512, 256: 512}
ROPE_THREADS = {32: 512, 64: 512, 96: 512, 128: 512, 160: 384, 192: 384, 224: 384, 256: 384}
LARGE_THREADS, TOGETHER_THREADS = 256, 384  # of the orders beyond; where four warps multiply together, and nothing turns
MOST_BULK = 256  # bytes of a row that leaves shared memory by the bulk copy engine; turned keys need the room for their tables
FEW_THREADS = 512  # at the most, of few blocks
MOST_PARTS = 4  # of a matrix that is divided among thread blocks
# quads_teams.cu: teams of a thread block, and the least copies of a point. With fewer its look-ups take longer than memory.
TEAMS = {96: (5, 8), 128: (5, 8), 160: (4, 16), 192: (4, 16), **dict.fromkeys(LARGE_ORDERS, (3, 8))}
TURNED_TEAMS = {64: (4, 8), 96: (4, 8), 128: (4, 8)}  # the same of keys that turn run by run
TEAM, STEP = 128, 64  # threads, and rows that a team takes at a time
CLAIMED = 16  # rounds of blocks of all teams, from which on the last half of them are claimed; where thread blocks share none
LEAST_USED = 0.75  # of the rows that a team takes in all steps of a block
SLOTS, LARGE_SLOTS, TURNED_SLOTS = (4, 3), (1,), (3,)  # of a team, the most that fit: for words of this step and later ones
# Warps behind the teams: the courier; beside it those that leave their registers, or that turn means.
COURIERS, LARGE_COURIERS, TURNED_COURIERS = 1, 4, 3
REGISTERS, COURIER_REGISTERS = 1 << 16, 32  # of a multiprocessor; of a thread that leaves the others
JOINT = (3, 2, 1)  # pieces of large orders that one product makes
SLACK = 16  # bytes beside words, which are copied from multiples of as many on
LINE = 128  # bytes of a line of shared memory


def index_bytes(h: Header) -> int:
    """Bytes of a row's indices."""
    return quads.plane_bytes(h.order, quads_index_bits(h.order, h.row_bits))[1]


def quads_layout(h: Header, few: bool, major: int, limit: int) -> Layout | None:
    """The first layout that fits into ``limit`` bytes of shared memory, from the quickest on; None where none does.

    ``few``: there are few blocks, so that large tables do not pay. ``major``: of the compute capability.
    """
    teams = _teams_layout(h, limit) if major == 9 and not few else None
    if teams is not None:
        return teams
    wide = h.order == WIDE_ORDER and not (h.rope or few)
    together = major == 9 and not (few or wide)
    large = TOGETHER_THREADS if together and not h.rope else LARGE_THREADS
    threads = (ROPE_THREADS if h.rope else THREADS).get(h.order, large)
    threads = min(threads, FEW_THREADS) if few else threads
    rows = 32 if wide else 16
    bulk = together and not h.rope and h.vector_bytes <= MOST_BULK
    base_at = 2 * _stage_bytes(h, rows)  # behind both stages
    ahead = 1 if few else AHEAD
    all_copies, matrix = FEW_COPIES if few else COPIES, _matrix(h)
    rows_bytes, turned = rows * h.vector_bytes * bulk, _turns_in_quads(h, few)

    def fitting(parts: int, keys: bool, way: tuple[int, bool], copies: int) -> Layout | None:
        phases, products = way
        if products and parts > 1:
            return None  # a thread block may have one of two pieces that turn together; the turns of all pieces leave no room
        memory = warp_memory("decode", h, base_at + 16, rows_bytes, ahead, products=products)
        memory |= {"BASE_AT": base_at, "ROWS": rows, "AHEAD": ahead}
        blob, places = _tables(h, matrix, keys, copies, phases, parts, products=products)
        shared = places["MATRIX_AT"] + (blob.size - places["MATRIX_AT"]) // parts
        size = shared + threads // 32 * memory["WARP_BYTES"]
        if size <= limit:
            return Layout(threads, 0, bulk, together, blob, places | memory | {"BLOB_BYTES": shared}, size, parts)
        return None

    return quickest(h, fitting, product(range(1, MOST_PARTS + 1), (True, False)), turned, all_copies)


def _teams_layout(h: Header, limit: int) -> Layout | None:
    """The layout of ``quads_teams.cu``; None where it does not pay, or does not fit."""
    teams, least = (TURNED_TEAMS if h.runs else {} if h.offsets else TEAMS).get(h.order, (0, 0))
    used = h.chunk_tokens / (-(-h.chunk_tokens // STEP) * STEP)
    if not teams or c.ITEM_BYTES[h.dtype] != 2 or used < LEAST_USED:
        return None
    large = h.order in LARGE_ORDERS  # whose matrix may be divided, and leaves no room for decoded rows
    couriers = LARGE_COURIERS if large else TURNED_COURIERS if h.offsets else COURIERS
    threads = teams * TEAM + 32 * couriers
    matrix, pieces, all_parts = _matrix(h), h.order // 32, range(1, MOST_PARTS + 1) if large else (1,)
    all_slots: tuple[int, ...] = LARGE_SLOTS if large else TURNED_SLOTS if h.offsets else SLOTS
    negatives = not large and quads_index_bits(h.order, h.row_bits) <= NEGATIVES_BITS
    if in_pieces(h):
        matrix = matrix.reshape(pieces, -1, *matrix.shape[1:])[_by_turns(h)].reshape(matrix.shape)
    tried = product(all_parts, all_slots, (each for each in COPIES if each >= least))
    for parts, slots, copies in tried:
        if pieces % parts:
            continue
        memory = _team_memory(h, slots, not large)
        blob, places = _tables(h, matrix, True, copies, 1, parts, negatives, h.runs)
        tables = _round(places["MATRIX_AT"] + (blob.size - places["MATRIX_AT"]) // parts, LINE)
        beside = teams * memory["TEAM_BYTES"]
        if tables + beside <= limit:
            places |= memory | {"BLOB_BYTES": tables, "ROWS": 16, "AHEAD": AHEAD, "COURIERS": couriers}
            places |= {"JOINT": _joint(h, pieces // parts, large), "CLAIMED": CLAIMED if parts == 1 else 0}
            if large:
                pool = REGISTERS // threads // 8 * 8 * threads // TEAM  # of one thread of each team, and of the couriers
                places |= {"COURIER_REGISTERS": COURIER_REGISTERS, "NEIGHBOURS": int(index_bytes(h) % 32 == 16)}
                places |= {"TEAM_REGISTERS": (pool - COURIER_REGISTERS) // teams // 8 * 8}
            size = tables + beside
            return Layout(threads, 0, not large, True, blob, places, size, parts, TEAM // 32, couriers)
    return None


def _by_turns(h: Header) -> list[int]:
    """Pieces, those that turn alike side by side."""
    apart = run_pieces(h)
    return [*(i // 2 + i % 2 * apart for i in range(2 * apart)), *range(2 * apart, h.order // 32)]


def _joint(h: Header, pieces: int, large: bool) -> int:
    """How many of so many pieces one product makes."""
    if h.offsets:
        return 2 if in_pieces(h) else 1
    return next(each for each in JOINT if pieces % each == 0 and (large or each < 3))


def _team_memory(h: Header, slots: int, bulk: bool) -> dict[str, int]:
    """Where things lie in the shared memory of a team with so many slots, as macros, in bytes. ``bulk``: decoded rows do, too.

    Each run of words in a slot has room for what is copied before and behind it.
    """
    indices_at = STEP * h.order // 8 + SLACK
    radii_at = indices_at + _round(STEP * index_bytes(h), SLACK) + SLACK
    if h.chunk_tokens <= STEP:  # one run of a whole block; rows behind its end, which nobody wants, are looked up, too
        looked_up = h.chunk_tokens * h.order // 8 + STEP * index_bytes(h) + 2 * 4
        slot = _round(max(h.blocks.chunk_bytes, looked_up), SLACK) + SLACK
    else:
        slot = radii_at + _round(STEP + h.blocks.beside + h.blocks.align, SLACK) + SLACK
    barriers_at = slots * slot
    sent_at = barriers_at + slots * 2 * 8 + 8  # behind a barrier for the tables
    sums_at = sent_at + slots * 8 * h.offsets
    places_at = sums_at + slots * TEAM // 32 * 8
    places = 1 << (slots + AHEAD).bit_length()  # of blocks in slots, of one whose rows are still stored, and of those ahead
    runs_at = _round(places_at + places * UPCOMING_BYTES, SLACK)
    run = run_bytes(h, products=True)
    rows_at = _round(runs_at + (slots + 1) * run, LINE)  # one more is used than there are slots
    return {
        "SLOTS": slots,
        "SLOT_BYTES": slot,
        "INDICES_AT": indices_at,
        "RADII_AT": radii_at,
        "BARRIERS_AT": barriers_at,
        "SUMS_AT": sums_at,
        "PLACES_AT": places_at,
        "PLACES": places,
        "RUNS_AT": runs_at,
        "RUN_BYTES": run,
        "SENT_AT": sent_at,
        "ROWS_AT": rows_at,
        "TEAM_BYTES": _round(rows_at + STEP * h.vector_bytes * bulk, LINE),
    }


def _turns_in_quads(h: Header, few: bool) -> list[tuple[int, bool]]:
    """How many copies of each turn of RoPE are tried, and whether tensor cores turn offsets, from the quickest on."""
    if h.runs and in_pieces(h) and not few:
        return [(1, True), (1, False)]
    return [(1, True)] * (h.runs and not few) + [(phases, False) for phases in phase_copies(h, few)]


def _tables(
    h: Header,
    matrix: np.ndarray,
    keys: bool,
    copies: int,
    phases: int,
    parts: int,
    negatives: bool = True,
    products: bool = False,
) -> tuple[np.ndarray, dict[str, int]]:
    """The blob, uint8 [bytes], and the macros that say where each array begins, and how many copies points and turns have.

    The matrix comes last, in ``parts`` of the same size. ``negatives``: each point's negative stands beside it. ``products``:
    with the turns of a run's rows.
    """
    plan = plan_for(h)
    points = quads.table_of(plan).points[:, list(c.QUADS_SIGN_PLACES)]  # each coordinate's where its sign is
    entries = np.ascontiguousarray(np.concatenate([points, -points], 1) if negatives else points)
    size = entries.shape[1]  # bytes
    own = {"POINTS": np.repeat(entries.view(f"u{size}"), copies, 1), "MANTISSAS": plan.mantissas}
    shared = shared_tables(h, h.blocks.chunk_bytes // 4 if keys else 0, phases)
    if "KEYS" in shared:  # the first word's key, which key 0 stands before, lies at a multiple of 16 bytes
        shared["KEYS"] = np.pad(shared["KEYS"], (3, 0))
    shared |= run_tables(h) if products else {}
    matrix = np.pad(matrix, [(0, -len(matrix) % (4 * parts)), *[(0, 0)] * 3])  # strips: four are a piece
    blob, places = blob_of({**own, **shared, "MATRIX": matrix})
    if "KEYS" in shared:
        places["KEYS_AT"] += 12
    return blob, {**places, "COPIES": copies, "POINT_BYTES": size, "PHASE_COPIES": phases}


def _matrix(h: Header) -> np.ndarray:
    """Half of both rounds' matrix, int8 [order / 8 strips, order / 16 bricks, 8 channels, 16 bytes of inputs], as bytes."""
    place = np.arange(h.order)
    group, quarter, half = place // 32, place % 16 // 4, place // 16 % 2
    rest = h.order // 32 % 4  # groups behind the spans of four; two of them are a span, too
    behind = h.order // 32 - rest
    span = np.where(group < behind, 4, np.where(group < behind + (rest & 2), 2, 1))
    first = np.where(span == 4, group // 4 * 4, np.where(span == 2, behind, group))  # group of the span
    quad = 8 * first + 2 * span * quarter + 2 * (group - first) + half
    coordinates = quad * c.QUAD + np.array(c.QUADS_SIGN_PLACES)[place % 4]
    matrix = t.rotation_matrix(h.order, h.seed, 2)[coordinates][:, channel_order(h.order)]
    return in_bricks((matrix.T / 2).astype(np.int8))


def _stage_bytes(h: Header, rows: int) -> int:
    """Bytes of the signs, indices and radii of so many rows."""
    return _round(rows * h.row_bytes, 16)


def _round(size: int, align: int) -> int:
    return -(-size // align) * align


def quads_definitions(verb: str, h: Header, layout: Layout) -> dict[str, Any]:
    """The macros that both are compiled with."""
    least, most = c.QUADS_RADII
    return {
        **common_definitions(verb, h, layout.threads, layout.blob.size),
        "PARTS": layout.parts,
        "JOINT": 1,
        "NEIGHBOURS": 0,
        "INDEX_BITS": quads.table_of(plan_for(h)).bits,
        "INDEX_BYTES": index_bytes(h),
        "LEAST": f"({least})",
        "MOST": most,
        "RADIUS_STEPS": c.QUADS_RADIUS_STEPS,
        "LOG2_STEPS": c.QUADS_RADIUS_STEPS.bit_length() - 1,
        "LARGEST_SUM": f"{127.0 * h.order**1.5!r}f",
        "BULK": int(layout.whole_rows),
        "OUT_BYTES": h.vector_bytes,
        "BYTES": 1,
        "WARPGROUPS": int(layout.warpgroups),
        **layout.places,
    }
