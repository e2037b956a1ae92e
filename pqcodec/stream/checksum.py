"""Law: the PRNG and the checksum of the format (SPEC 4).

The checksum is a dot product modulo a prime: sum(w_i * k_i) mod (2^32 - 5) over 32-bit words w_i, with keys k_i from
the PRNG. Any change inside one aligned word that the modulus can see (so every flipped bit, every changed byte) changes
it, other damage escapes with probability 2^-32, and it can be computed in parallel, in the kernel that makes the bytes.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from operator import mul

import numpy as np

from pqcodec.constants import CHECKSUM_PRIME, CHECKSUM_SEED
from pqcodec.stream.prng import splitmix64

_FEW_BYTES = 192
_PIECE_WORDS = 1 << 14  # bounds the memory of one numpy pass


@lru_cache(maxsize=16)
def _keys(start: int, count: int) -> np.ndarray:
    keys = np.uint64(1) + splitmix64(CHECKSUM_SEED, start, count) % np.uint64(CHECKSUM_PRIME - 1)
    keys.setflags(write=False)
    return keys


def checksum_keys(words: int) -> np.ndarray:
    """Keys for a block of up to ``words`` 32-bit words: uint64 [words + 1], each in 1 .. p-1; key 0 takes the length."""
    return _keys(0, words + 1)


def checksum(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """Checksum of a byte string, a 32-bit number.

    >>> checksum(b"")
    0
    >>> checksum(b"polar") != checksum(b"polas")
    True
    """
    size = len(data) if isinstance(data, (bytes, bytearray)) else data.nbytes
    if size <= _FEW_BYTES:
        return _of_few(bytes(data))
    raw = np.frombuffer(data, np.uint8)
    prime = np.uint64(CHECKSUM_PRIME)
    total = (raw.size % CHECKSUM_PRIME) * int(checksum_keys(0)[0])
    for first in range(0, raw.size, 4 * _PIECE_WORDS):
        piece = raw[first : first + 4 * _PIECE_WORDS]
        if piece.size % 4:
            piece = np.concatenate([piece, np.zeros(-piece.size % 4, np.uint8)])
        words = piece.view("<u4").astype(np.uint64)
        start = first // 4 + 1
        keys = _keys(start, _PIECE_WORDS)[: words.size] if start > 1 or words.size > 256 else _keys(1, 256)[: words.size]
        total += int((words * keys % prime).sum())
    return total % CHECKSUM_PRIME


def _of_few(data: bytes) -> int:
    """The same by Python's integers: of records and headers, of which a file of small tensors has hundreds."""
    keys, words = _few_keys(), -(-len(data) // 4)
    pairs = map(mul, struct.unpack(f"<{words}I", data.ljust(4 * words, b"\0")), keys[1:])
    return (len(data) * keys[0] + sum(pairs)) % CHECKSUM_PRIME


@lru_cache(maxsize=1)
def _few_keys() -> list[int]:
    return [int(key) for key in checksum_keys(_FEW_BYTES // 4)]


def checksums(rows: np.ndarray) -> np.ndarray:
    """Checksum of each row of uint8 [n, bytes]: uint64 [n].

    >>> int(checksums(np.frombuffer(b"polar", np.uint8)[None])[0]) == checksum(b"polar")
    True
    """
    prime, size = np.uint64(CHECKSUM_PRIME), rows.shape[1]
    total = np.full(len(rows), size % CHECKSUM_PRIME * int(checksum_keys(0)[0]) % CHECKSUM_PRIME, np.uint64)
    for first in range(0, size, 4 * _PIECE_WORDS):
        piece = rows[:, first : first + 4 * _PIECE_WORDS]
        if piece.shape[1] % 4:
            piece = np.pad(piece, ((0, 0), (0, -piece.shape[1] % 4)))
        words = np.ascontiguousarray(piece).view("<u4").astype(np.uint64)
        total += (words * _keys(first // 4 + 1, words.shape[1]) % prime).sum(1)
    return total % prime
