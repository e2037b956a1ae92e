"""Law: cosines and sines of equal parts of a turn, the same on every machine."""

from __future__ import annotations

import numpy as np


def full_circle(n: int) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of 2 pi i / n for i = 0 .. n-1: float64 [n] each; n is a multiple of 8; 0, 1 and -1 are exact, no 0 is -0."""
    angle = np.arange(n // 8 + 1) * (2 * np.pi / n)
    sin_eighth, cos_eighth = np.sin(angle), np.cos(angle)
    quarter = np.concatenate([sin_eighth, cos_eighth[-2::-1]])  # sin from 0 to pi/2
    half = np.concatenate([quarter, quarter[-2:0:-1]])
    sin = np.concatenate([half, -half]) + 0.0
    return np.roll(sin, -n // 4), sin
