"""Law: bit fields of rows, for the codings as the specification tells them: least significant bit first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pqcodec.codings.plan import Plan


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


def block_of_rows(encode: Callable[[np.ndarray, Plan, np.ndarray, int], None]) -> Callable[..., np.ndarray]:
    """A block of rows one behind the other, from a function that sets the bits of rows, uint8 [n, row_bits] of 0 and 1."""

    def encode_block(v: np.ndarray, plan: Plan, exponent: int, effort: str) -> np.ndarray:
        bits = np.zeros((len(v), 8 * plan.row_bytes), np.uint8)
        encode(v, plan, bits, exponent)
        return np.packbits(bits, axis=1, bitorder="little").ravel()

    return encode_block


def rows_of_block(decode: Callable[[np.ndarray, Plan, int], Any]) -> Callable[..., Any]:
    """The same way back, from a function that takes the bits of rows."""

    def decode_block(body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, exponent: int) -> Any:
        wanted = body.reshape(tokens, plan.row_bytes)[slice(*rows)]
        return decode(np.unpackbits(wanted, axis=1, bitorder="little"), plan, exponent)

    return decode_block
