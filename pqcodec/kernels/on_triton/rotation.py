"""Law: the rotation (SPEC 5) as matrix products with the matrix of integers R, a group of 16 coordinates at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.numbers import GROUP


@triton.jit
def three_parts(x, TERMS: tl.constexpr):
    """float32 -> the bfloat16 numbers whose sum it is: three, of float16 two; of bfloat16 it is one, which TERMS = 1 says."""
    coarse = x.to(tl.bfloat16)
    fine = coarse
    finest = coarse
    if TERMS > 1:
        left = x - coarse.to(tl.float32)
        fine = left.to(tl.bfloat16)
        finest = (left - fine.to(tl.float32)).to(tl.bfloat16)
    return coarse, fine, finest


@triton.jit
def rotated(coarse, fine, finest, rotation, group, columns, TERMS: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr):
    """A group's rotated coordinates, float32 [R, 16], sqrt(ENERGY_SCALE) times too long; ``three_parts`` gives the operands.

    Products are exact in bfloat16: R's entries are 1 and -1, and after two rounds even numbers, of which bfloat16 holds those
    up to 512, which is 16 standard deviations at order 1,024.
    """
    at = (group * GROUP.value + tl.arange(0, GROUP))[None, :] * COLUMNS + columns[:, None]
    signs = tl.load(rotation + at).to(OPERAND)
    v = tl.dot(coarse.to(OPERAND), signs)
    if TERMS > 1:
        v = tl.dot(fine.to(OPERAND), signs, v)
        v = tl.dot(finest.to(OPERAND), signs, v)
    return v


@triton.jit
def rotated_back(v, rotation, group, columns, acc, COLUMNS: tl.constexpr):
    """Add a group's coordinates, whole numbers float32 [R, 16], to acc [R, COLUMNS]: exact, for sums stay below 2^24."""
    at = (group * GROUP.value + tl.arange(0, GROUP))[:, None] * COLUMNS + columns[None, :]
    return tl.dot(v.to(tl.float16), tl.load(rotation + at), acc)
