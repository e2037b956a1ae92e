"""Law: levels and ranges that many streams share, found beforehand in tensors of their kind, as KVQuant calibrates them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import levels, scalar
from pqcodec.codings.declared import half_numbers
from pqcodec.codings.plan import plan_for
from pqcodec.errors import InvalidArgument
from pqcodec.options import EncodeOptions
from pqcodec.stages import centre
from pqcodec.stages.centre import Rope
from pqcodec.stream.tables import LevelTable, RangeTable
from pqcodec.tensors import arrays


def rows_to_code(x: Any, *, rope: Rope | None = None, join_heads: bool = False) -> np.ndarray:
    """What a stream codes of a tensor [..., tokens, head_dim], float32: what bases, levels and ranges are found in.

    ``rope``: of keys that are coded as they were before it. ``join_heads``: [..., heads, tokens, head_dim] as [..., 1, tokens,
    heads * head_dim]. Raises InvalidArgument.

    >>> rows_to_code(np.ones((2, 4, 5, 16), np.float16), rope=Rope(), join_heads=True).shape
    (2, 1, 5, 64)
    """
    numbers = arrays.numbers_of(x)
    if numbers.ndim < (3 if join_heads else 2):
        raise InvalidArgument(f"x {numbers.shape}: [..., {'heads, ' * join_heads}tokens, head_dim] is expected")
    if rope is not None:
        field = rope.field(numbers.shape[-1])
        numbers = centre.turn_back(numbers, *centre.phases(field, 0, numbers.shape[-2]), field).astype(np.float32)
    if join_heads:
        heads, tokens, head_dim = numbers.shape[-3:]
        numbers = numbers.swapaxes(-3, -2).reshape(*numbers.shape[:-3], 1, tokens, heads * head_dim)
    return numbers


def shared_ranges(x: Any, preset: str) -> RangeTable:
    """The scales and zeros of a preset, such as nuq3-key, for rows like ``x``: one [..., heads, tokens, head_dim], or a list.

    Of each head, or of all rows [tokens, head_dim], and each group of channels the range of all numbers; of presets that keep
    outliers (kvquant3-key) without as large a share at either end, which in streams are kept apart as far as there is room, and
    else become the nearest level. ``rows_to_code`` makes rows of keys that are coded before RoPE, and of joined heads. Leave
    out the first tokens of a text, which streams keep exactly. Raises InvalidArgument.

    >>> x = np.random.default_rng(0).standard_normal((2, 256, 64)).astype(np.float32)
    >>> shared_ranges(x, "nuq3-key").content
    'ranges of 2 heads, rows of 64 numbers, groups of 1 channels'
    """
    given = x if isinstance(x, list | tuple) else [x]
    rows = [arrays.numbers_of(tensor) for tensor in given]
    shapes = {(one.shape[-3] if one.ndim > 2 else 1, *one.shape[-1:]) for one in rows}
    if len(shapes) != 1 or any(one.ndim < 2 or not one.size for one in rows):
        raise InvalidArgument(
            f"x {[one.shape for one in rows]!r:.60}: rows [..., heads, tokens, head_dim], alike but for tokens, are expected"
        )
    ((heads, width),) = shapes
    header = EncodeOptions(preset).header((1, width), c.DTYPE_FLOAT32)
    if header.affine is None or header.coding != c.CODING_SCALAR:
        raise InvalidArgument(f"preset {preset!r} has no scales; choose one of nuq, kvquant, kivi, int or q4_0")
    plan, fields = plan_for(header), []
    for head in range(heads):
        own = np.concatenate([one.reshape(-1, heads, *one.shape[-2:])[:, head].reshape(-1, width) for one in rows])
        if not np.isfinite(own).all():
            raise InvalidArgument("x holds NaN or Inf: it has no ranges")
        with np.errstate(over="ignore"):
            found = scalar.fields_of(*scalar.ranges_of(own, len(own), plan), plan)
        fields.append(found.view("<f2").reshape(header.affine.fields, -1))
    return RangeTable(np.array(fields), width, header.affine.channels)


def shared_levels(
    x: Any, preset: str, *, gradients: Any = None, q_norm: bool = False, seed: int = 0, ranges: RangeTable | None = None
) -> LevelTable:
    """The levels of a preset, such as nuq3-key, for tensors like ``x``: one [..., tokens, head_dim], or a list of them.

    Fitted to an even selection of their groups, which depends on ``seed``. ``gradients``: of a loss with respect to each of the
    tensors, of the same shapes: a number then weighs as much as the square of its own, the diagonal of the Fisher information,
    times the square of its group's range (arXiv 2401.18079, equation 7; the authors' calibrator leaves out the range).
    ``q_norm``: scale and shift the levels so that numbers keep their mean and deviation. Encoders take the nearest of the new
    levels, so streams err less than the paper's table, which decodes codes of the former levels, and get back only part of the
    deviation: of Gaussian numbers at 2 bits .963, and .940 without. ``ranges``: those of the streams, where a table has them.
    Raises InvalidArgument.

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
        header = EncodeOptions(preset=preset, seed=seed, ranges=ranges).header(view.shape, view.dtype, view.numpy)
        if header.codebook is None:
            raise InvalidArgument(f"preset {preset!r} has no levels; choose one of nuq or kvquant")
        slope = arrays.view(slopes[number]) if slopes else None
        if slope and (slope.shape, slope.dtype) != (view.shape, view.dtype):
            raise InvalidArgument(f"gradients {slope.shape} are not of the shape and dtype of their tensor {view.shape}")
        found.append(levels.sample(view.values(), header, None, slope.values() if slope else None))
    numbers, weights = (np.concatenate(each) for each in zip(*found, strict=True))
    if not np.isfinite(weights).all():
        raise InvalidArgument("gradients hold NaN or Inf: numbers have no weights")
    if not weights.any():
        raise InvalidArgument("no number differs from others of its group, or gradients are 0: there are no levels to find")
    fitted = levels.fitted_levels(numbers, weights, 1 << header.row_bits // header.order)
    return LevelTable(half_numbers(levels.q_norm(fitted, numbers, weights) if q_norm else fitted))
