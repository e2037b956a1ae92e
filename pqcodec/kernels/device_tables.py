"""Law: the tables of a plan in a GPU's memory, laid out as the Triton kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles, pairs, quads
from pqcodec.codings import look_ups as t
from pqcodec.codings.declared import Affine
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.stages import centre
from pqcodec.stream.header import Header, RopeField


# -- rows: where each number stands in a row of a table --------------------------------------------------------------
class QuadRow(NamedTuple):
    """A budget of ``quad_ints``: int32."""

    codes: int  # in each cell
    first_record: int
    last_cell: int


class RecordRow(NamedTuple):
    """A cell of a quad's budget in ``records``: int32."""

    n_a: int  # sectors of the first pair's circle
    n_b: int
    step_a: int  # half a sector's width, as ``angles.circle_step`` gives it
    step_b: int


class RecordFloatRow(NamedTuple):
    """The same cell in ``record_floats``: float32."""

    cos: int
    sin: int
    one_n_b: int  # 1 / n_b


class PaperRow(NamedTuple):
    """Beginnings of the parts of ``paper``, each of levels 2, 3 and 4."""

    cos: int  # four centroids a level
    sin: int
    bounds: int  # three bounds a level in tan psi, squared


NODE = t.PathNode(*range(len(t.PathNode._fields)))
QUAD_ROW = QuadRow(*range(3))
RECORD = RecordRow(*range(4))
RECORD_FLOAT = RecordFloatRow(*range(3))
PAPER = PaperRow(0, 12, 24)


# -- tables ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tables:
    """A plan's tables as torch tensors on a device."""

    order: int
    columns: int  # the order, rounded up to a power of two
    row_bytes: int
    root_budget: int
    radius_bits: int
    radius_steps: int
    energy_scale: float  # energy that the encoder's product with R gives a vector over the square of its radius
    levels: int  # nodes above a group, at the most
    kind_16: int  # number of the kind of nodes of 16 coordinates; that of 8 is the next
    fixes: int  # bounds that may lie inside one step of ``look_up``, at the most
    path: Any  # int32 [groups, levels, NODE]
    node_cos: Any  # float32 [kinds + 1, 256]: of ``look_ups.NodeArrays``; the last kind leaves budgets and radii unchanged
    node_sin: Any
    node_shift: Any  # int32
    look_up: Any  # uint8 [kinds + 1, widths, 1024]
    bounds: Any  # int32 [kinds + 1, widths, 129]
    grid_shift: Any  # int32 [kinds + 1]
    quad_ints: Any  # int32 [29 budgets, QUAD_ROW]
    quad_floats: Any  # float32 [29]: 1 / codes in a cell
    quad_look_up: Any  # uint8 [29, 1024]: the cell of each place on the sin^2 grid
    records: Any  # int32 [records, RECORD]
    record_floats: Any  # float32 [records, RECORD_FLOAT]
    circle: Any  # float32 [2, 2048]: cos and sin of the directions
    mantissas: Any  # float32 [radius steps]
    paper: Any  # float32 [33]: cos [3, 4], sin [3, 4], squared bounds [3, 3]; PAPER
    quad_bits: int  # of the quads coding's index; 0 in other codings
    aim: float  # its units in a radius, for encoders
    points: Any  # float16 [points, 4]
    representatives: Any  # float32 [r, 5]: each with minus half its squared norm
    numbers: Any  # int32 [r, 256]: of the points, by representative and places
    rotation: Any  # float16 [order, columns]: R, or without a rotation where channels stand
    partner: Any  # int32 [columns]: the other channel of a RoPE pair
    pair: Any  # int32 [columns]: number of the pair; -1 where a channel does not turn
    sign: Any  # float32 [columns]: -1 for the pair's first channel
    frequencies: Any  # int64 [pairs]
    ones: Any  # int32 [columns / 2]: every column once, those that turn together as ones and twos at one place
    twos: Any
    in_halves: bool  # whether these are the first half of all columns and the second
    pair_frequencies: Any  # int32 [columns / 2]: bits of uint32; 0 where columns do not turn
    phases: Any  # float32 [4, 256]: cos and sin of coarse turns, then of fine ones


@lru_cache(maxsize=64)
def tables_on(
    device: str,
    coding: int,
    head_dim: int,
    row_bits: int,
    radius_bits: int,
    seed: int,
    rounds: int,
    affine: Affine | None,
    rope: RopeField | None,
) -> Tables:
    """The tables of a kind of streams, on a device."""
    import torch

    def put(array: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    shape = (1, head_dim)
    chunk_tokens = affine.tokens if affine else c.DEFAULT_CHUNK_TOKENS
    h = Header(coding, c.DTYPE_FLOAT32, shape, row_bits, radius_bits, seed, chunk_tokens, rounds=rounds, affine=affine)
    plan = plan_for(h)
    order, columns = plan.order, 1 << (plan.order - 1).bit_length()
    treed = order if rounds else c.GROUP  # without a rotation there is no tree
    nodes, leaves, path = t.node_arrays(treed), plan.quads, t.paths(treed)
    kinds = [(table.m_a, table.m_b) for table in plan.tree.tables]
    rotation = np.zeros((order, columns), np.float16)
    rotation[:, :order] = t.rotation_matrix(order, seed, rounds) if rounds else _places(plan)
    circle_steps = [angles.circle_step(n) for n in (leaves.n_a, leaves.n_b)]
    paper = t.paper_levels()
    mixed = {**_quads(plan), **_rope_columns(rope, columns)}  # arrays and plain values

    def extended(array: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([array, np.full_like(array[:1], value)])

    return Tables(
        order=order,
        columns=columns,
        row_bytes=plan.row_bytes,
        root_budget=plan.root_budget if coding == c.CODING_SPLIT else 0,
        radius_bits=radius_bits,
        radius_steps=plan.radius_steps if coding == c.CODING_SPLIT else 1,
        energy_scale=plan.radius_scale,
        levels=path.shape[1],
        kind_16=kinds.index((8, 8)),
        fixes=int(nodes.fixes.max()),
        path=put(path if path.size else np.zeros((1, 1, len(NODE)), np.int32)),
        node_cos=put(extended(nodes.cos, 1)),
        node_sin=put(extended(nodes.sin, 1)),
        node_shift=put(extended(nodes.shift, 0)),
        look_up=put(extended(nodes.look_up, 0)),
        bounds=put(extended(nodes.bounds, 1 << 30)),
        grid_shift=put(extended(nodes.grid_shift, 0)),
        quad_ints=put(np.stack([leaves.per_cell, leaves.first, leaves.cells - 1], 1).astype(np.int32)),
        quad_floats=put((1 / leaves.per_cell).astype(np.float32)),
        quad_look_up=put(t.quad_look_up()),
        records=put(np.stack([leaves.n_a, leaves.n_b, *circle_steps], 1).astype(np.int32)),
        record_floats=put(np.stack([leaves.cos, leaves.sin, (1 / leaves.n_b).astype(np.float32)], 1)),
        circle=put(np.stack([plan.circle_cos, plan.circle_sin])),
        mantissas=put(plan.mantissas),
        paper=put(np.concatenate([paper[1].ravel(), paper[2].ravel(), (paper[0] ** 2).ravel()]).astype(np.float32)),
        **{name: put(part) if isinstance(part, np.ndarray) else part for name, part in mixed.items()},
        rotation=put(rotation),
        phases=put(centre.phase_tables().copy()),
    )


def _places(plan: Plan) -> np.ndarray:
    """What stands for a rotation where there is none: the two channels of a pair side by side, float16 [order, order]."""
    if plan.coding != c.CODING_PAIRS:
        return np.eye(plan.order, dtype=np.float16)
    return np.eye(plan.order, dtype=np.float16)[np.stack(pairs.channels(plan), 1).ravel()]


def _quads(plan: Plan) -> dict[str, Any]:
    """What the quads coding adds; of another coding one entry each that nothing reads."""
    if plan.coding != c.CODING_QUADS:
        nothing = np.zeros((1, 5), np.float32)
        return {
            "quad_bits": 0,
            "aim": 1.0,
            "points": nothing.astype(np.float16),
            "representatives": nothing,
            "numbers": nothing.view(np.int32),
        }
    table = quads.table_of(plan)
    halves = -(table.representatives**2).sum(1, keepdims=True) / 2
    return {
        "quad_bits": table.bits,
        "aim": table.aim,
        "points": table.points.astype(np.float16),
        "representatives": np.concatenate([table.representatives, halves], 1).astype(np.float32),
        "numbers": table.numbers.astype(np.int32),
    }


def _rope_columns(rope: RopeField | None, columns: int) -> dict[str, Any]:
    partner, pair = np.arange(columns, dtype=np.int32), np.full(columns, -1, np.int32)
    sign, frequencies = np.zeros(columns, np.float32), np.zeros(1, np.int64)
    pair_frequencies = np.zeros(columns // 2, np.uint32)
    if rope:
        p, q = centre.pairs(rope)
        partner[p], partner[q] = q, p
        pair[p] = pair[q] = np.arange(len(p))
        sign[p], sign[q] = -1, 1
        frequencies = np.array(rope.frequencies, np.int64)
        pair_frequencies[: len(p)] = frequencies
    together = _together(rope, columns)
    return {
        "partner": partner,
        "pair": pair,
        "sign": sign,
        "frequencies": frequencies,
        "ones": together[0],
        "twos": together[1],
        "in_halves": bool((together.ravel() == np.arange(columns)).all()),
        "pair_frequencies": pair_frequencies.view(np.int32),
    }


def _together(rope: RopeField | None, columns: int) -> np.ndarray:
    """Every column once, int32 [2, columns / 2]: RoPE's pairs, and behind them what does not turn."""
    turning = np.stack(centre.pairs(rope)) if rope else np.zeros((2, 0), np.int32)
    others = np.setdiff1d(np.arange(columns), turning).reshape(2, -1)
    return np.concatenate([turning, others], 1).astype(np.int32)
