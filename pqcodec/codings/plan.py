"""Law: Header -> frozen tables for kernels; a kernel looks up, multiplies and adds, and knows no formula.

Every array is read-only and shared by all streams of the same rotation order, seed and coding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings.declared import DECLARED, Affine, Sketch, quads_index_bits
from pqcodec.codings.ranges import Ranges
from pqcodec.codings.vectors import Vectors
from pqcodec.stages import rotation
from pqcodec.stream.header import Header
from pqcodec.stream.orders import base_of


@dataclass(frozen=True)
class Plan:
    """What both directions need to know about one coded vector of ``order`` coordinates."""

    coding: int
    head_dim: int
    order: int
    row_bits: int
    row_bytes: int
    radius_bits: int
    rounds: int  # of the rotation
    signs: np.ndarray  # float32 [order], D, of the only or the last round
    first_signs: np.ndarray  # float32 [order], E, of the first of two rounds; [0] with one round
    permutation: np.ndarray  # int32 [order], between two rounds; [0] with one round
    base: np.ndarray  # int8 [b, b], the Kronecker factor of H that is not a power of two
    tree: angles.Tree
    quads: angles.QuadTable
    circle_cos: np.ndarray  # float32 [2048]
    circle_sin: np.ndarray  # float32 [2048]
    mantissas: np.ndarray  # float32 [steps per octave]: 2^(j/steps) / (grid sqrt(order)^rounds)
    affine: Affine | None = None
    levels: np.ndarray | None = None  # float32 [2^bits of a code], where a codebook brings them
    vectors: Vectors | None = None  # of residual VQ, whose stages are ``radius_bits``
    sketch: Sketch | None = None
    seed: int = 0  # of the matrix of a sketch
    ranges: Ranges | None = None  # affine fields of all tokens, where a shared table has them
    shared_fields: np.ndarray | None = None  # uint8: those of one leading index, see ``for_lead``
    shrunk: bool = False  # whether vectors of a sketch are decoded with less error, and not without bias

    @property
    def energy_scale(self) -> int:
        """Squared norm of a vector behind the rotation's +-1 matrices over that before: the encoder divides by its root."""
        return self.order**self.rounds

    @property
    def stretch(self) -> float:
        """What encoders of the split coding multiply a radius with, so that decoded vectors keep their norm (SPEC 10)."""
        if self.coding != c.CODING_SPLIT:
            return 1.0
        more = c.SPLIT_STRETCH * 4 ** -(self.row_bits / self.order) + c.SPLIT_CUT_OFF
        return 1 + min(more, c.SPLIT_MOST_STRETCH)

    @property
    def radius_scale(self) -> float:
        """Squared norm of a vector behind the rotation's +-1 matrices over that of the radius which is coded for it."""
        return self.energy_scale / self.stretch**2

    @property
    def root_budget(self) -> int:
        """Bits that the tree's root shares out: those of a row without the radius."""
        return self.row_bits - self.radius_bits

    @property
    def radius_steps(self) -> int:
        """Radius codes an octave (SPEC 6.1)."""
        return c.RADIUS_STEPS_PER_OCTAVE[self.radius_bits]

    def for_lead(self, lead: int) -> Plan:
        """The plan of one leading index of rows: where a shared table has affine fields, each head has its own."""
        return self if self.ranges is None else replace(self, shared_fields=self.ranges.bytes[lead % self.ranges.heads])

    @cached_property
    def matrix(self) -> np.ndarray:
        """H D, or H D P H E with two rounds (SPEC 5), or without a rotation 1: whole numbers, float64 [order, order].

        Times a vector it is the rotated vector, sqrt(energy_scale) times as long; its transpose is the way back.
        """
        if not self.rounds:
            return np.eye(self.order)
        h = rotation.hadamard(self.order).astype(np.float64)
        last = h * self.signs
        return last if self.rounds == 1 else last @ (h * self.first_signs)[self.permutation]

    @cached_property
    def radii(self) -> np.ndarray:
        """Factors A and B of every radius code (SPEC 6.1): float32 [2, 2^radius_bits]; code 0 is the zero vector."""
        octave, step = np.divmod(np.maximum(np.arange(1 << self.radius_bits) - 1, 0), self.radius_steps)
        exponent = octave - c.RADIUS_BIAS
        small = exponent < c.RADIUS_SPLIT
        first = np.ldexp(self.mantissas[step].astype(np.float64), exponent + np.where(small, c.RADIUS_SHIFT, 0))
        first[0] = 0
        return np.stack([first, np.where(small, 2.0**-c.RADIUS_SHIFT, 1)]).astype(np.float32)


def plan_for(header: Header) -> Plan:
    """The plan of a stream; cached, since a cache of many layers has few kinds of streams. Raises MissingTable."""
    h = header
    plan = _plan(h.coding, h.head_dim, h.row_bits, h.radius_bits, h.seed, h.rounds, h.affine)
    if h.sketch:
        return replace(plan, sketch=h.sketch, seed=h.seed)
    if not h.named and not h.codebook:
        return plan
    return replace(plan, levels=np.array(h.levels, np.float32) if h.levels else None, vectors=h.vectors, ranges=h.ranges)


@lru_cache(maxsize=64)
def _plan(coding: int, head_dim: int, row_bits: int, radius_bits: int, seed: int, rounds: int, affine: Affine | None) -> Plan:
    order = DECLARED[coding].order(head_dim)
    rotated = order if rounds else c.GROUP  # without a rotation nothing uses its tables
    steps, grid = 1, float(c.GRID)
    if coding == c.CODING_SPLIT:
        steps = c.RADIUS_STEPS_PER_OCTAVE[radius_bits]
    elif coding == c.CODING_QUADS:
        steps, grid = c.QUADS_RADIUS_STEPS, c.QUADS_TABLES[quads_index_bits(order, row_bits)][0]
    mantissas = np.exp2(np.arange(steps) / steps) / (grid * np.sqrt(order**rounds))
    if coding == c.CODING_QUADS:  # few enough bits that three times a factor is a float32, too
        fraction, exponent = np.frexp(mantissas)
        mantissas = np.ldexp(np.rint(np.ldexp(fraction, c.QUADS_FACTOR_BITS)), exponent - c.QUADS_FACTOR_BITS)
    first = slice(None) if rounds == 2 else slice(0)  # what only two rounds have
    cos, sin = angles.circle_table()
    return Plan(
        coding=coding,
        head_dim=head_dim,
        order=order,
        row_bits=row_bits,
        row_bytes=-(-row_bits // 8),
        radius_bits=radius_bits,
        rounds=rounds,
        signs=rotation.signs(seed, order).astype(np.float32),
        first_signs=rotation.signs(seed, order, first_round=True).astype(np.float32)[first],
        permutation=rotation.permutation(rotated)[first],
        base=rotation.base_matrix(base_of(rotated)),
        tree=angles.tree(rotated),
        quads=angles.quad_table(),
        circle_cos=cos,
        circle_sin=sin,
        mantissas=mantissas.astype(np.float32),
        affine=affine,
    )
