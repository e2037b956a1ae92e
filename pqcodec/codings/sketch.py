"""Law: the sign sketch (SPEC 21) in numpy: of a key k its norm and the signs of S k, which estimate inner products.

Source: QJL, arXiv 2406.03482. With S of m rows sqrt(pi/2)/m |k| <S q, sign(S k)> is an estimate of <q, k> without bias; q is
not coded. It is the inner product of q with sqrt(pi/2)/m |k| S^T sign(S k), which is what ``decode`` gives, and which is far
from k. Outlier channels are sketched apart: they are zeros to the one sketch, and all others to the other.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.affine import block_exponent, halves_of
from pqcodec.codings.declared import Sketch
from pqcodec.codings.plan import Plan
from pqcodec.stages import rotation
from pqcodec.stream.prng import splitmix64

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # that are set in a byte


# -- the matrix ----------------------------------------------------------------------------------------------------
def block_seed(seed: int, order: int, block: int) -> int:
    """The seed whose rotation of two rounds is a block of S: that which makes its signs follow those of the block before."""
    words = -(-order // 64)  # of the signs of a round
    return (seed + 2 * block * words * c.SPLITMIX_GAMMA) % (1 << 64)


@lru_cache(maxsize=32)
def projections(kind: int, seed: int, order: int, block: int) -> np.ndarray:
    """A block of T, sqrt(N) S of rotations or 4 S of independent numbers, whole: int16 [order, order], read-only."""
    if kind == c.SKETCH_ORTHOGONAL:
        found = _rotation(block_seed(seed, order, block), order)
    else:
        words = splitmix64(seed, block * order * order, order * order).view(np.uint8)
        ones = _BITS[words].reshape(order, order, -1).sum(2, dtype=np.int16)
        found = ones - np.int16(c.SKETCH_WORD_BITS // 2)
    found.setflags(write=False)
    return found


def _rotation(seed: int, order: int) -> np.ndarray:
    """R of SPEC 5.3: int16 [order, order]."""
    h = rotation.hadamard(order).astype(np.float32)
    first = (h * rotation.signs(seed, order, first_round=True))[rotation.permutation(order)]
    return ((h * rotation.signs(seed, order)) @ first).astype(np.int16)


def scales(sketch: Sketch, head_dim: int, order: int, shrunk: bool) -> np.ndarray:
    """M and h of both parts, without and with outlier channels (SPEC 21.3): float32 [2, 2]."""
    found = np.ones((2, 2), np.float32)
    slope, start = c.SKETCH_ERRORS[sketch.matrix]
    parts = ((sketch.blocks, head_dim - sketch.channels), (sketch.outlier_blocks, sketch.channels))
    for part, (blocks, channels) in enumerate(parts):
        signs = blocks * order
        if not signs:
            continue
        if sketch.matrix == c.SKETCH_ORTHOGONAL:
            found[part, 0] = math.pi / (2 * signs) * (math.comb(order, order // 2) / (1 << order))
        else:
            found[part, 0] = math.sqrt(math.pi / 2) / (math.sqrt(c.SKETCH_WORD_BITS / 4) * signs)
        if shrunk:
            whole = signs << c.SKETCH_ERROR_BITS
            steps = (whole << c.SKETCH_SHRINK_BITS) // (whole + max(slope * channels + start, 0))
            found[part, 1] = steps / (1 << c.SKETCH_SHRINK_BITS)
    return found


# -- encoding ------------------------------------------------------------------------------------------------------
def encode(v: np.ndarray, plan: Plan, exponent: int, effort: str) -> np.ndarray:
    """Vectors [n, order] of one block -> its bytes without the checksum; ``exponent`` and ``effort`` are not used."""
    sketch = plan.sketch
    assert sketch is not None
    lists = [_largest_channels(v[first : first + sketch.tokens], plan) for first in _groups(len(v), sketch)]
    apart = _apart(lists, (0, len(v)), plan)
    parts = [np.where(apart, 0, v), np.where(apart, v, 0)] if sketch.channels else [v]
    norms = [np.sqrt((part**2).sum(1)) for part in parts]
    power = block_exponent(max(float(norm.max(initial=0)) for norm in norms))
    halves = np.stack([np.ldexp(norm, -power).astype(np.float32).astype("<f2") for norm in norms], 1)
    columns = [halves.view(np.uint8).reshape(len(v), -1)]
    for part, blocks in zip(parts, (sketch.blocks, sketch.outlier_blocks), strict=False):
        for block in range(blocks):
            products = part @ projections(sketch.matrix, plan.seed, plan.order, block).T.astype(np.float64)
            columns.append(np.packbits(products > 0, axis=1, bitorder="little"))
    rows = np.concatenate(columns, 1).ravel()
    numbers = [np.array(listed, _list_dtype(plan)).view(np.uint8) for listed in lists]
    return np.concatenate([rows, *numbers, np.array([power], "<i2").view(np.uint8)])


def _groups(tokens: int, sketch: Sketch) -> range:
    """The first rows of the groups of a block of ``tokens`` rows; none where there are no outlier channels."""
    return range(0, tokens if sketch.channels else 0, max(sketch.tokens, 1))


def _largest_channels(v: np.ndarray, plan: Plan) -> np.ndarray:
    """The outlier channels of a group of vectors [n, order]: those of the largest norms, ascending."""
    assert plan.sketch is not None
    energy = (v[:, : plan.head_dim] ** 2).sum(0)
    return np.sort(np.argsort(-energy, kind="stable")[: plan.sketch.channels])


def _list_dtype(plan: Plan) -> str:
    return "u1" if plan.head_dim <= c.SKETCH_NARROW else "<u2"


def _apart(lists: list[np.ndarray], rows: tuple[int, int], plan: Plan) -> np.ndarray:
    """Which numbers of some rows of a block are of outlier channels, bool [n, order]; ``lists``: the channels of each group."""
    assert plan.sketch is not None
    found = np.zeros((len(lists) + 1, plan.order), np.bool_)
    for group, listed in enumerate(lists):
        found[group, listed[listed < plan.order]] = True
    return found[np.arange(*rows) // plan.sketch.tokens if lists else np.zeros(rows[1] - rows[0], np.intp)]


# -- decoding ------------------------------------------------------------------------------------------------------
def decode(
    body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, exponent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a block of ``tokens`` rows -> numbers of the wanted rows float32 [n, order], and factors A and B [n]."""
    sketch = plan.sketch
    assert sketch is not None
    wanted = body[: tokens * plan.row_bytes].reshape(tokens, plan.row_bytes)[slice(*rows)]
    norms, power = _norms(body, wanted, sketch)
    factors, found, at = scales(sketch, plan.head_dim, plan.order, plan.shrunk), [], sketch.norm_bits // 8
    for part, blocks in enumerate((sketch.blocks, sketch.outlier_blocks)[: norms.shape[1]]):
        sums = np.zeros((len(wanted), plan.order), np.float32)
        for block in range(blocks):
            bits = np.unpackbits(wanted[:, at : at + plan.order // 8], axis=1, bitorder="little")
            signs = bits.astype(np.float32) * 2 - 1
            sums += signs @ projections(sketch.matrix, plan.seed, plan.order, block).astype(np.float32)  # whole numbers: exact
            at += plan.order // 8
        found.append(sums * (norms[:, part] * factors[part, 0] * factors[part, 1])[:, None])
    numbers = found[0]
    if sketch.channels:
        numbers = np.where(_listed(body, tokens, rows, plan), found[1], found[0])
    return numbers, np.full(len(wanted), 2.0**power, np.float32), np.ones(len(wanted), np.float32)


def _norms(body: np.ndarray, wanted: np.ndarray, sketch: Sketch) -> tuple[np.ndarray, int]:
    """Norms of some rows of a block, float32 [n, 1 or 2], and the power of two that they are to be multiplied by."""
    size = sketch.norm_bits // 8
    power = int(body[-c.SKETCH_EXPONENT_BYTES :].view("<i2")[0])
    norms = halves_of(np.ascontiguousarray(wanted[:, :size])).reshape(len(wanted), size // 2)
    return norms, min(max(power, c.SKETCH_EXPONENTS[0]), c.SKETCH_EXPONENTS[1])


def _listed(body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan) -> np.ndarray:
    """Which numbers of some rows of a block are of outlier channels, bool [n, order]."""
    assert plan.sketch is not None
    lists = body[tokens * plan.row_bytes : -c.SKETCH_EXPONENT_BYTES].view(_list_dtype(plan))
    return _apart(list(lists.reshape(-1, max(plan.sketch.channels, 1))), rows, plan)


# -- estimates, and how far they are off ---------------------------------------------------------------------------
def estimates(body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, queries: np.ndarray) -> np.ndarray:
    """Inner products of queries [q, head_dim] with the wanted rows, without bias, straight from signs: float64 [q, n]."""
    sketch = plan.sketch
    assert sketch is not None
    wanted = body[: tokens * plan.row_bytes].reshape(tokens, plan.row_bytes)[slice(*rows)]
    norms, power = _norms(body, wanted, sketch)
    factors, apart = scales(sketch, plan.head_dim, plan.order, False)[:, 0], _listed(body, tokens, rows, plan)
    bits = np.unpackbits(wanted[:, sketch.norm_bits // 8 :], axis=1, bitorder="little")
    signs, found = bits * 2.0 - 1, np.zeros((len(queries), len(wanted)))
    padded, group, at = np.zeros((len(queries), plan.order)), np.arange(*rows) // (sketch.tokens or tokens), 0
    padded[:, : plan.head_dim] = queries
    for part, blocks in enumerate((sketch.blocks, sketch.outlier_blocks)[: norms.shape[1]]):
        for block in range(blocks):
            matrix = projections(sketch.matrix, plan.seed, plan.order, block).T.astype(np.float64)
            for own in np.unique(group):
                its = group == own
                products = padded * (apart[its][0] == part) @ matrix  # of the channels of this part
                found[:, its] += products @ signs[its, at : at + plan.order].T * (norms[its, part] * factors[part])
            at += plan.order
    return found * 2.0**power


def variances(body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, queries: np.ndarray) -> np.ndarray:
    """Of the inner products of queries [q, head_dim] with the wanted rows, at most: float64 [q, n].

    Over matrices S that of a part is at most unit / m |q|^2 |k|^2, met where q and k are at right angles: unit is pi/2 - 1 for
    orthogonal blocks, and pi/2 for independent numbers. The parts are independent of each other.
    """
    sketch = plan.sketch
    assert sketch is not None
    wanted = body[: tokens * plan.row_bytes].reshape(tokens, plan.row_bytes)[slice(*rows)]
    halves, power = _norms(body, wanted, sketch)
    squares = (halves.astype(np.float64) * 2.0**power) ** 2
    outer = (queries**2) @ _listed(body, tokens, rows, plan)[:, : plan.head_dim].T
    unit = math.pi / 2 - (1 if sketch.matrix == c.SKETCH_ORTHOGONAL else 0)
    found = ((queries**2).sum(1)[:, None] - outer) * squares[:, 0] / (sketch.blocks * plan.order)
    if sketch.channels:
        found += outer * squares[:, 1] / (sketch.outlier_blocks * plan.order)
    return unit * found
