"""Law: blocks whose rows share affine fields (SPEC 13) in numpy: rows, then the fields of each group of tokens, an exponent.

What fields there are is their coding's own module's business. Encoders and decoders of all families do the same float32
operations in the same order here, so that they write the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import outliers
from pqcodec.codings.plan import Plan


# -- blocks --------------------------------------------------------------------------------------------------------
def groups_of(tokens: int, plan: Plan) -> Iterator[slice]:
    """The rows of each group of a block of ``tokens`` rows; all of them where a shared table has their fields."""
    assert plan.affine is not None
    step = max(tokens, 1) if plan.affine.shared else plan.affine.tokens
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def encode_groups(
    v: np.ndarray,
    plan: Plan,
    encode_group: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Vectors [n, order] of one block, NaN where they are not finite -> its bytes without the checksum.

    ``encode_group``: vectors float32 of one group over 2^exponent, and which are finite -> their codes [n, k], of equal widths,
    the bytes of their fields, and which of their numbers are kept apart, bool [n, order].
    """
    finite = np.isfinite(v).all(1)
    exponent = 0 if plan.ranges else block_exponent(float(np.abs(v[finite]).max(initial=0)))
    x = np.ldexp(np.where(finite[:, None], v, 0).astype(np.float32), -exponent)
    found = [encode_group(x[rows], finite[rows]) for rows in groups_of(len(v), plan)]
    codes = np.concatenate([codes for codes, *_ in found])
    width = 8 * plan.row_bytes // codes.shape[1]
    bits = (codes[..., None] >> np.arange(width) & 1).astype(np.uint8).reshape(len(v), -1)
    parts = [np.packbits(bits, axis=1, bitorder="little").ravel(), *(fields for _, fields, _ in found)]
    if plan.affine is not None and plan.affine.outliers:
        parts.append(outliers.packed(x, np.concatenate([apart for *_, apart in found]), plan))
    return np.concatenate([*parts, np.array([exponent], "<i2").view(np.uint8)])


def block_exponent(largest: float) -> int:
    """The power of two that vectors are divided by, so that float16 holds their fields; 0 where it does already."""
    least, most = c.AFFINE_USUAL
    if largest == 0 or least <= largest < most:
        return 0
    return max(math.frexp(largest)[1] - c.AFFINE_USUAL_BITS, c.AFFINE_EXPONENTS[0])


def decode_groups(
    body: np.ndarray,
    tokens: int,
    rows: tuple[int, int],
    plan: Plan,
    decode_group: Callable[[np.ndarray, np.ndarray], np.ndarray],
    codes_a_row: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a block of ``tokens`` rows -> coordinates of the wanted rows float32 [n, order], and factors A and B [n].

    ``decode_group``: codes int64 [n, k] of rows of one group, and the bytes of its fields -> coordinates [n, order].
    """
    assert plan.affine is not None
    low, high = rows
    size, at = plan.affine.bytes_of(plan.order), tokens * plan.row_bytes
    bits = np.unpackbits(body[:at].reshape(tokens, plan.row_bytes), axis=1, bitorder="little")
    codes = (bits.reshape(tokens, codes_a_row, -1).astype(np.int64) << np.arange(bits.shape[1] // codes_a_row)).sum(2)
    found = [np.zeros((0, plan.order), np.float32)]
    for number, group in enumerate(groups_of(tokens, plan)):
        wanted = codes[max(group.start, low) : min(group.stop, high)]
        if len(wanted):
            fields = body[at + number * size :][:size] if plan.shared_fields is None else plan.shared_fields
            found.append(decode_group(wanted, fields))
    numbers = np.concatenate(found)
    if plan.affine.outliers:
        kept = body[at + -(-tokens // plan.affine.tokens) * size : -c.AFFINE_EXPONENT_BYTES]
        places, bits = outliers.unpacked(kept, tokens, plan)
        inside = (places >= low * plan.head_dim) & (places < high * plan.head_dim)
        row, channel = np.divmod(places[inside] - low * plan.head_dim, plan.head_dim)
        numbers[row, channel] = halves_of(bits[inside].view(np.uint8))
    exponent = int(body[-c.AFFINE_EXPONENT_BYTES :].view("<i2")[0])
    exponent = min(max(exponent, c.AFFINE_EXPONENTS[0]), c.AFFINE_EXPONENTS[1])
    factor = np.full(high - low, 2.0**exponent, np.float32)
    return numbers, factor, np.ones(high - low, np.float32)


# -- fields --------------------------------------------------------------------------------------------------------
def halves_of(raw: np.ndarray) -> np.ndarray:
    """Bytes of float16 fields -> float32: NaN counts as 0, an infinity as the largest finite number of its sign."""
    halves = raw.view("<f2").astype(np.float32)
    most = np.float32(c.LARGEST_FINITE[c.DTYPE_FLOAT16])
    return np.clip(np.where(np.isnan(halves), np.float32(0), halves), -most, most)


def half_fields(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 numbers rounded to float16: their bytes, and what these stand for, float32."""
    halves = x.astype("<f2")
    return halves.view(np.uint8), halves.astype(np.float32)


def cells(ahead: np.ndarray, step: np.ndarray, count: int) -> np.ndarray:
    """The cells of numbers [n, k] so far behind the first of ``count`` cells of width step [k]: int64; 0 where step is 0."""
    at = ahead / np.where(step > 0, step, np.float32(1))
    return np.where(step > 0, np.clip(np.trunc(at), 0, count - 1), 0).astype(np.int64)
