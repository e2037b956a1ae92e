"""Law: bit fields of rows, for the codings as the specification tells them: least significant bit first."""

from __future__ import annotations

import numpy as np


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
