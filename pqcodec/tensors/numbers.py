"""Law: stored numbers <-> float32, and what kind of tensor holds them; torch is not imported for it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from pqcodec import constants as c


def is_torch(x: Any) -> bool:
    """Whether x is a torch tensor, such as a stream that lies on a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def device_of(x: Any) -> str:
    """The device of a tensor by its name; "cpu" of what is none of torch's."""
    return str(x.device) if is_torch(x) else "cpu"


def device_type(device: Any) -> str:
    """ "cuda" of "cuda:1" or of a torch.device."""
    return str(device).split(":")[0] if not isinstance(device, int) else "cuda"


def widen(raw: np.ndarray, dtype: int) -> np.ndarray:
    """Stored numbers (uint16 or float32, any shape) -> float32, exact."""
    if dtype == c.DTYPE_FLOAT32:
        return raw.astype(np.float32)
    if dtype == c.DTYPE_FLOAT16:
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray, dtype: int) -> np.ndarray:
    """float32 -> stored numbers; beyond the largest finite value: that value; ties to even (SPEC 6.5)."""
    limit = np.float32(c.LARGEST_FINITE[dtype])
    x = np.clip(x, -limit, limit)
    if dtype == c.DTYPE_FLOAT32:
        return x
    if dtype == c.DTYPE_FLOAT16:
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
