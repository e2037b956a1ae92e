"""Law: levels that many streams share, fitted beforehand to tensors of their kind, as KVQuant calibrates them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec.codings import levels
from pqcodec.codings.declared import half_numbers
from pqcodec.errors import InvalidArgument
from pqcodec.options import EncodeOptions
from pqcodec.stream.tables import LevelTable
from pqcodec.tensors import arrays


def shared_levels(x: Any, preset: str, *, gradients: Any = None, q_norm: bool = False, seed: int = 0) -> LevelTable:
    """The levels of a preset, such as nuq3-key, for tensors like ``x``: one [..., tokens, head_dim], or a list of them.

    Fitted to an even selection of their groups, which depends on ``seed``. ``gradients``: of a loss with respect to each of the
    tensors, of the same shapes: a number then weighs as much as the square of its own, the diagonal of the Fisher information,
    times the square of its group's range (arXiv 2401.18079, equation 7; the authors' calibrator leaves out the range).
    ``q_norm``: scale and shift the levels so that numbers keep their mean and deviation. Encoders take the nearest of the new
    levels, so streams err less than the paper's table, which decodes codes of the former levels, and get back only part of the
    deviation: of Gaussian numbers at 2 bits .963, and .940 without. Raises InvalidArgument.

    >>> x = np.random.default_rng(0).standard_normal((2, 256, 64)).astype(np.float32)
    >>> [round(level, 1) for level in shared_levels(x, "nuq2").levels]
    [-0.7, -0.2, 0.2, 0.7]
    """
    given, slopes = (each if isinstance(each, list | tuple) else [each] for each in (x, gradients))
    slopes = slopes if gradients is not None else []
    if not given or (gradients is not None and len(slopes) != len(given)):
        raise InvalidArgument(
            f"{len(given)} tensors and {len(slopes)} of gradients: a tensor or more, and as many, are expected"
        )
    found = []
    for number, tensor in enumerate(given):
        view = arrays.view(tensor)
        header = EncodeOptions(preset=preset, seed=seed).header(view.shape, view.dtype, view.numpy)
        if header.codebook is None:
            raise InvalidArgument(f"preset {preset!r} has no levels; choose one of nuq or kvquant")
        slope = arrays.view(slopes[number]) if slopes else None
        if slope and (slope.shape, slope.dtype) != (view.shape, view.dtype):
            raise InvalidArgument(f"gradients {slope.shape} are not of the shape and dtype of their tensor {view.shape}")
        found.append(levels.sample(view.values(), header, None, slope.values() if slope else None))
    numbers, weights = (np.concatenate(each) for each in zip(*found, strict=True))
    if not np.isfinite(weights).all():
        raise InvalidArgument("gradients hold NaN or Inf: numbers have no weights")
    fitted = levels.fitted_levels(numbers, weights, 1 << header.row_bits // header.order)
    return LevelTable(half_numbers(levels.q_norm(fitted, numbers, weights) if q_norm else fitted))
