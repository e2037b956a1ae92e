"""Law: what the fields of a header may be, and how they go together (SPEC 3.3, step 10)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED, Affine
from pqcodec.codings.vectors import VectorCodebook

if TYPE_CHECKING:
    from pqcodec.stream.header import Header, RopeField

PAIRING_NAMES = {c.ROPE_HALF: "half", c.ROPE_INTERLEAVED: "interleaved"}


def header_problem(h: Header) -> str:
    """What is wrong with a header, or an empty string."""
    if not 1 <= len(h.shape) <= c.MAX_NDIM:
        return f"{len(h.shape)} dimensions; 1 .. {c.MAX_NDIM} are supported"
    if not 1 <= h.shape[-1] <= c.MAX_HEAD_DIM:
        return f"head_dim {h.shape[-1]} is outside 1 .. {c.MAX_HEAD_DIM}; reshape the last dimension"
    if min(h.shape) < 0 or math.prod(max(n, 1) for n in h.shape) > c.MAX_ELEMENTS or h.tokens > c.MAX_TOKENS:
        return f"shape {h.shape} is outside the caps of {c.MAX_ELEMENTS} elements and {c.MAX_TOKENS} tokens"
    coding = DECLARED[h.coding]
    problem = _joined_problem(h) or _keep_problem(h) or coding.problem(h.order, h.row_bits, h.radius_bits)
    problem = problem or _affine_problem(h) or _codebook_problem(h) or _sketch_problem(h)
    if problem:
        return problem
    if h.rounds not in coding.rounds:
        return f"{h.rounds} rounds of rotation: the {coding.name} coding has {' or '.join(map(str, coding.rounds))}"
    if not 1 <= h.chunk_tokens <= c.MAX_CHUNK_TOKENS:
        return f"chunk_tokens {h.chunk_tokens} is outside 1 .. {c.MAX_CHUNK_TOKENS}"
    if not 0 <= h.exact_tokens < 1 << 32:
        return f"exact_tokens {h.exact_tokens} is outside 0 .. 2^32 - 1"
    if not 0 <= h.exact_last <= c.MAX_EXACT_LAST:
        return f"exact_last {h.exact_last} is outside 0 .. {c.MAX_EXACT_LAST}"
    if not 0 <= h.exceptions <= min(h.leading * h.coded_tokens, (1 << 32) - 1):
        return f"{h.exceptions} exact vectors of {h.leading * h.coded_tokens} coded ones"
    if not 0 <= h.seed < 1 << 64:
        return f"seed {h.seed} is outside 0 .. 2^64 - 1"
    for name, value, (low, high) in (
        ("offset", h.offset_exponent, c.OFFSET_EXPONENTS),
        ("radius", h.radius_exponent, c.RADIUS_EXPONENTS),
    ):
        if not low <= value <= high:
            return f"{name} exponent {value} is outside {low} .. {high}"
    if h.header_bytes > c.MAX_HEADER_BYTES:
        return f"a header of {h.header_bytes} bytes: {c.MAX_HEADER_BYTES} are the most; give the tensor fewer dimensions"
    if h.runs and not runs_are_possible(h.coding, h.offsets, h.rope, h.before_rope, h.joined, h.linear, h.keep):
        return "offsets turn run by run, which only those of quads do, that turn with RoPE, of all tokens, each head by itself"
    if h.rope is None:
        return "vectors are coded before RoPE, which is not described" if h.before_rope else ""
    return _rope_problem(h.rope, h)


def _keep_problem(h: Header) -> str:
    if h.keep is None:
        return ""
    if len(h.shape) < 2 or not h.tokens <= h.keep.tokens <= c.MAX_TOKENS:
        return f"a keep list of {h.keep.tokens} tokens does not go with the kept ones, shape {h.shape}"
    if math.prod(max(n, 1) for n in h.whole_shape) > c.MAX_ELEMENTS:
        return f"shape {h.whole_shape} with the tokens that were not kept is beyond the cap of {c.MAX_ELEMENTS} elements"
    return ""


def _joined_problem(h: Header) -> str:
    if h.joined and len(h.shape) < 3:
        return f"shape {h.shape} has no heads to join; [..., heads, tokens, head_dim] is expected"
    numbers, most = h.heads * h.head_dim, c.MAX_JOINED_DIM if h.linear else c.MAX_HEAD_DIM
    if not 1 <= numbers <= most:
        return f"{h.heads} heads of {h.head_dim} numbers are {numbers} together; 1 .. {most} are possible"
    if (h.basis is not None) != (h.linear is not None and h.linear.kind == c.LINEAR_SHARED):
        return f"a linear stage {'without' if h.basis is None else 'with'} the name of a shared basis"
    there = h.linear.problem(numbers) if h.linear else ""
    return there or (h.basis.problem(h.width, numbers) if h.basis else "")


def _codebook_problem(h: Header) -> str:
    coding = DECLARED[h.coding]
    if h.codebook is None:
        return f"{coding.name} without codebooks" if coding.by_vectors else ""
    if isinstance(h.codebook, VectorCodebook):
        there = "" if coding.by_vectors else f"{coding.name} coding with codebooks of vectors"
        return there or h.codebook.problem(h.width, h.row_bits, h.radius_bits)
    return h.codebook.problem(h.row_bits // h.order) if coding.takes_levels else f"{coding.name} coding with levels"


def _sketch_problem(h: Header) -> str:
    coding = DECLARED[h.coding]
    if h.sketch is None or not coding.sketches:
        there = "with" if h.sketch else "without"
        return f"{coding.name} coding {there} a sketch" if coding.sketches != bool(h.sketch) else ""
    if h.joined or h.linear or h.before_rope:
        return "a sign sketch of rows that are not the tensor's vectors"
    if h.row_bits != h.sketch.row_bits(h.order):
        return f"rows of {h.row_bits} bits in a sketch whose norms and signs take {h.sketch.row_bits(h.order)}"
    return h.sketch.problem(h.head_dim, h.chunk_tokens)


def _affine_problem(h: Header) -> str:
    coding = DECLARED[h.coding]
    if bool(h.shared_ranges) != bool(h.affine and h.affine.shared):
        return "affine fields of a shared table without its name, or such a name without them"
    if coding.affine_problem is None or h.affine is None:
        there = "with" if h.affine else "without"
        return f"{coding.name} coding {there} affine fields" if coding.shares_fields != bool(h.affine) else ""
    named = h.shared_ranges.problem(h.leading // h.heads, h.width, h.affine) if h.shared_ranges else ""
    problem = (
        h.affine.problem()
        or named
        or _outlier_problem(h, h.affine)
        or coding.affine_problem(h.order, h.row_bits, h.radius_bits, h.affine)
    )
    if not problem and h.chunk_tokens % h.affine.tokens:
        return f"chunk_tokens {h.chunk_tokens} is no multiple of the {h.affine.tokens} tokens of a group"
    return problem


def _outlier_problem(h: Header, affine: Affine) -> str:
    if 2 * affine.outliers > affine.tokens * min(affine.channels, h.width):
        return f"{affine.outliers} outliers at each end of groups of a row of {h.width} numbers are not possible"
    return ""


def _rope_problem(rope: RopeField, h: Header) -> str:
    if not h.offsets and not h.before_rope:
        return "RoPE is described, but no offsets are stored"
    if rope.pairing not in PAIRING_NAMES:
        return f"RoPE pairing {rope.pairing} is unknown; {PAIRING_NAMES} are known"
    if not 2 <= rope.channels <= h.head_dim:
        return f"RoPE turns {rope.channels} channels of {h.head_dim}"
    if not 0 <= rope.first_position < 1 << 63 or not all(0 <= f < 1 << 32 for f in rope.frequencies):
        return "RoPE: first_position or a frequency is outside its range"
    return ""


def runs_are_possible(coding: int, offsets: bool, rope: object, *stages: object) -> bool:
    """Whether offsets may turn run by run (SPEC 9.5); ``stages``: before_rope, joined, linear, keep, of which none may be."""
    return coding == c.CODING_QUADS and offsets and rope is not None and not any(stages)
