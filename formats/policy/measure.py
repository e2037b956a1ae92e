"""Law: the error of a stream against its tensor: squared error and squared norm, of a sample of the tokens or of all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec.formats.plain import numbers as exact
from pqcodec.stream.source import Source
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import device_of, device_type, is_torch, widen

SAMPLES, SAMPLE_TOKENS = 4, 64  # runs of tokens in a sample, and the tokens of each
_AT_ONCE = 4096  # tokens that are decoded at once
_WIDE = 1 << 20  # coordinates that are widened to float64 at once
_DIGITS = 4  # rounded so that the order of summation, which differs between machines, cannot show


@dataclass(frozen=True)
class Error:
    """Sums over finite coordinates; errors of several tensors add up.

    >>> (Error(1.0, 100.0, 64) + Error(2.0, 200.0, 64)).rel_mse
    0.01
    """

    squares: float = 0.0  # squared differences
    norm: float = 0.0  # squared numbers of the tensor
    coordinates: int = 0

    def __add__(self, other: Error) -> Error:
        return Error(self.squares + other.squares, self.norm + other.norm, self.coordinates + other.coordinates)

    @property
    def rel_mse(self) -> float | None:
        """||x - y||^2 / ||x||^2, to four digits; None where the norm is 0."""
        return float(f"{self.squares / self.norm:.{_DIGITS}g}") if self.norm else None


def error_of(x: Any, stream: Source, *, backend: str = "auto", sample: bool = True) -> Error:
    """The error of a stream against its tensor [..., tokens, head_dim]: of all tokens, or of a ``sample`` of at most 256.

    Of a sketch it is that of its estimate without bias.
    Raises as ``pqcodec.decode`` does.

    >>> import numpy as np
    >>> from pqcodec.stream.source import MemorySource
    >>> x = np.random.default_rng(0).standard_normal((2, 100, 64)).astype(np.float32)
    >>> error = error_of(x, MemorySource(codec.encode(x, preset="pq4", backend="reference")), backend="reference")
    >>> error.coordinates, bool(0.005 < error.rel_mse < 0.015)
    (12800, True)
    """
    tokens = x.shape[-2]
    if sample and tokens > SAMPLES * SAMPLE_TOKENS:
        starts = np.linspace(0, tokens - SAMPLE_TOKENS, SAMPLES + 1).astype(int)[1:]  # not 0: first tokens are exact
        runs = [(int(start), int(start) + SAMPLE_TOKENS) for start in starts]
    else:
        runs = [(start, min(start + _AT_ONCE, tokens)) for start in range(0, tokens, _AT_ONCE)]
    device = x.device if device_type(device_of(x)) != "cpu" else None
    found = Error()
    for low, high in runs:
        y = codec.decode(stream, tokens=(low, high), backend=backend, device=device, estimate="unbiased")
        found += _error(x[..., low:high, :], y)
    return found


def error_of_kept(x: Any, stream: Source, *, backend: str = "auto") -> Error:
    """The error of a stream of some tokens against these tokens of its tensor [..., tokens, head_dim], on a CPU.

    Raises as ``pqcodec.decode_kept`` does.
    """
    rows, positions = codec.decode_kept(stream, backend=backend)
    if positions.ndim == 1:
        return _error(x[..., positions, :], rows)
    take = x.take_along_dim if is_torch(x) else partial(np.take_along_axis, x)
    return _error(take(positions[..., None], -2), rows)


def held_tokens(sample: bool) -> int:
    """The most tokens whose original and decoded numbers ``error_of`` holds in memory."""
    return SAMPLES * SAMPLE_TOKENS if sample else _AT_ONCE


def _error(x: Any, y: Any) -> Error:
    found = Error()
    for a, b in zip(_numbers(x), _numbers(y), strict=True):
        finite = np.isfinite(a)
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        squares, norm = ((part**2).sum() for part in (a - b, a))
        found += Error(float(squares), float(norm), int(finite.sum()))
    return found


def _numbers(x: Any) -> Iterator[np.ndarray]:
    """A tensor's numbers as float64, ``_WIDE`` at a time."""
    seen = arrays.view(exact.on_cpu(x))
    flat = seen.stored.reshape(-1)
    for start in range(0, flat.size, _WIDE):
        yield widen(flat[start : start + _WIDE], seen.dtype).astype(np.float64)
