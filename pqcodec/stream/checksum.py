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
_KEPT_PIECES = 512  # whose keys stay in memory once they are made: those of the first 32 MiB of a body, as many bytes
_GAP = np.uint64((1 << 32) - CHECKSUM_PRIME)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def _keys(start: int, count: int) -> np.ndarray:
    keys = np.uint64(1) + splitmix64(CHECKSUM_SEED, start, count) % np.uint64(CHECKSUM_PRIME - 1)
    keys.setflags(write=False)
    return keys


@lru_cache(maxsize=16)
def checksum_keys(words: int) -> np.ndarray:
    """Keys for a block of up to ``words`` 32-bit words: uint64 [words + 1], each in 1 .. p-1; key 0 takes the length."""
    return _keys(0, words + 1)


def _piece_keys(piece: int) -> np.ndarray:
    """Keys of the words of one pass: uint32 [_PIECE_WORDS]. To make them takes several times as long as to use them."""
    return _kept_keys(piece) if piece < _KEPT_PIECES else _keys(piece * _PIECE_WORDS + 1, _PIECE_WORDS)


@lru_cache(maxsize=_KEPT_PIECES)
def _kept_keys(piece: int) -> np.ndarray:
    return _keys(piece * _PIECE_WORDS + 1, _PIECE_WORDS).astype(np.uint32)


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
    return int(checksums(np.frombuffer(data, np.uint8)[None])[0])


def _of_few(data: bytes) -> int:
    """The same by Python's integers: of records and headers, of which a file of small tensors has hundreds."""
    keys, words = _few_keys(), -(-len(data) // 4)
    pairs = map(mul, struct.unpack(f"<{words}I", data.ljust(4 * words, b"\0")), keys[1:])
    return (len(data) * keys[0] + sum(pairs)) % CHECKSUM_PRIME


@lru_cache(maxsize=1)
def _few_keys() -> list[int]:
    return [int(key) for key in checksum_keys(_FEW_BYTES // 4)]


def checksums(rows: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """Checksum of each row of uint8 [n, bytes]: uint64 [n]. ``sizes``: bytes of each row, where zeros follow them.

    >>> int(checksums(np.frombuffer(b"polar", np.uint8)[None])[0]) == checksum(b"polar")
    True
    """
    prime, size = np.uint64(CHECKSUM_PRIME), rows.shape[1]
    lengths = np.full(len(rows), size) if sizes is None else sizes
    total = lengths.astype(np.uint64) % prime * np.uint64(_few_keys()[0]) % prime
    for piece, first in enumerate(range(0, size, 4 * _PIECE_WORDS)):
        raw = rows[:, first : first + 4 * _PIECE_WORDS]
        if raw.shape[1] % 4:
            raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
        words = np.ascontiguousarray(raw).view("<u4")
        products = np.multiply(words, _piece_keys(piece)[: words.shape[1]], dtype=np.uint64)
        total = (total + (products & _LOW).sum(1) + _GAP * (products >> _HALF).sum(1)) % prime  # modulo p, 2^32 is _GAP
    return total
