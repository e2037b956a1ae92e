"""Law: the PRNG of the format (SPEC 4.1): signs, permutations and checksum keys come from it alone."""

from __future__ import annotations

import numpy as np

from pqcodec.constants import SPLITMIX_GAMMA, SPLITMIX_MUL_1, SPLITMIX_MUL_2


def splitmix64(seed: int, start: int, count: int) -> np.ndarray:
    """Outputs ``start .. start+count-1`` of SplitMix64 from ``seed``, as uint64 [count]."""
    z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    z *= np.uint64(SPLITMIX_GAMMA)
    z += np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    z ^= z >> np.uint64(30)
    z *= np.uint64(SPLITMIX_MUL_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(SPLITMIX_MUL_2)
    z ^= z >> np.uint64(31)
    return z
