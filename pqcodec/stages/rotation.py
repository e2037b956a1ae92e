"""Law: the preconditioner (SPEC 5): seed -> signs, head_dim -> order, order -> a +-1 Hadamard matrix and a permutation.

A vector x [head_dim] is padded with zeros to the order N, multiplied by the signs D and by H / sqrt(N), with
H = H_base (x) H_(N/base). With two rounds it is multiplied by other signs E and by H before, and permuted between: one round
sends few strong channels to few values, and no seed helps. Source: arXiv 2502.02617 section 3.1 (preconditioning); Paley
(1933) for the bases.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pqcodec.constants import PALEY_PRIME, PERMUTATION_SEED
from pqcodec.stream.orders import base_of
from pqcodec.stream.prng import splitmix64


def signs(seed: int, order: int, first_round: bool = False) -> np.ndarray:
    """D, or E of the first of two rounds: int8 [order] of +-1 (SPEC 5.1, 5.3).

    Coordinate i is negative where bit i mod 64 of SplitMix64's output i div 64 is set; E takes the outputs behind those of D.
    """
    count = -(-order // 64)
    words = splitmix64(seed, count if first_round else 0, count)
    index = np.arange(order)
    bit = (words[index // 64] >> (index % 64).astype(np.uint64)) & np.uint64(1)
    return (1 - 2 * bit.astype(np.int8)).astype(np.int8)


@lru_cache(maxsize=32)
def permutation(order: int) -> np.ndarray:
    """p: int32 [order], read-only; coordinate k of the second round is coordinate p_k of the first (SPEC 5.3).

    >>> permutation(16).tolist()
    [5, 2, 9, 15, 1, 3, 0, 14, 13, 11, 7, 8, 6, 4, 10, 12]
    """
    found = np.arange(order, dtype=np.int32)
    drawn = splitmix64(PERMUTATION_SEED, 0, order) >> np.uint64(32)
    for i in range(order - 1, 0, -1):
        j = int(drawn[i]) * (i + 1) >> 32
        found[i], found[j] = found[j], found[i]
    found.setflags(write=False)
    return found


def _residues(q: int) -> np.ndarray:
    """chi [q]: the Legendre symbol modulo the prime q (0, 1 or -1)."""
    chi = -np.ones(q, np.int8)
    chi[[(i * i) % q for i in range(q)]] = 1
    chi[0] = 0
    return chi


@lru_cache(maxsize=8)
def base_matrix(base: int) -> np.ndarray:
    """H_base: int8 [base, base] of +-1 with H H^T = base I; Paley I for 12 and 20, Paley II for 28 and 36."""
    if base == 1:
        return np.ones((1, 1), np.int8)
    q = PALEY_PRIME[base]
    index = np.arange(q)
    conference = np.zeros((q + 1, q + 1), np.int8)
    conference[1:, 1:] = _residues(q)[(index[:, None] - index[None, :]) % q]
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if q % 4 == 1 else -1
    eye = np.eye(q + 1, dtype=np.int8)
    if q % 4 == 3:
        return eye + conference
    return np.kron(conference, [[1, 1], [1, -1]]).astype(np.int8) + np.kron(eye, [[1, -1], [-1, -1]]).astype(np.int8)


def hadamard(order: int) -> np.ndarray:
    """H: int8 [order, order] of +-1, H H^T = order I; rows and columns are indexed base-major (SPEC 5.2)."""
    matrix = base_matrix(base_of(order))
    while matrix.shape[0] < order:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.int8))
    return matrix
