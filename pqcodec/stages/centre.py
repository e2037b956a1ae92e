"""Law: offsets of centred tensors (SPEC 9): how a mean is stored, and how it turns with the position under RoPE.

A key's bias is constant before RoPE; after it, the pair of channels (p, q) of frequency f turns by 2 pi f t at position
t. The mean is taken of the pairs turned back, and turned forward again where it is subtracted or added. Both directions
use the same arithmetic, so what the encoder subtracts is what the decoder adds, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.stages.circle import full_circle
from pqcodec.stream import sections
from pqcodec.stream.header import Header, RopeField
from pqcodec.stream.report import Damage, damage_error
from pqcodec.stream.source import Source

Halves = tuple[np.ndarray, int]  # offsets as streams store them: float16 [leading, head_dim], and their exponent
HALVES = np.finfo(np.float16)
PAIRINGS = {"half": c.ROPE_HALF, "interleaved": c.ROPE_INTERLEAVED}


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a tensor of keys.

    ``theta``: base of the frequencies theta^(-2i/dim), i = 0 .. dim/2-1, in radians a token; ``dim``: channels that
    turn (None: all of head_dim); ``style``: "half" pairs channels i and i + dim/2 (Llama, Qwen as in transformers),
    "interleaved" pairs 2i and 2i+1; ``first_position``: position of token 0; ``frequencies``: radians a token for each
    pair, where they are scaled (YaRN, Llama 3, linear ...), instead of theta.

    A wrong rope is no error, since no numbers tell the right one: streams decode, and keys err about as much as with the plain
    mean, many times as much as under their own rope. Take it from the model's config.

    >>> Rope(theta=10000.0).field(64).channels
    64
    """

    theta: float = 10000.0
    dim: int | None = None
    style: str = "half"
    first_position: int = 0
    frequencies: Sequence[float] | None = None

    def check(self) -> None:
        """Raises InvalidArgument for what no tensor can have, whatever its head_dim."""
        pairs = None if self.frequencies is None else len(self.frequencies)
        if self.style not in PAIRINGS:
            raise InvalidArgument(f"rope.style {self.style!r} is unknown; choose from {sorted(PAIRINGS)}")
        if self.dim is not None and (not isinstance(self.dim, Integral) or self.dim % 2 or self.dim < 2):
            raise InvalidArgument(f"rope.dim {self.dim!r}: an even number from 2 on is expected")
        if not isinstance(self.first_position, Integral) or not 0 <= self.first_position < 1 << 62:
            raise InvalidArgument(f"rope.first_position {self.first_position!r} is outside 0 .. 2^62 - 1")
        if self.dim is not None and pairs is not None and self.dim != 2 * pairs:
            raise InvalidArgument(f"rope.dim {self.dim} does not go with {pairs} frequencies")
        if self.frequencies is None and not (isinstance(self.theta, Real) and math.isfinite(self.theta) and self.theta > 0):
            raise InvalidArgument(f"rope.theta {self.theta!r} is not a positive number")
        if self.frequencies is not None and not all(math.isfinite(f) for f in self.frequencies):
            raise InvalidArgument("rope.frequencies holds NaN or Inf")

    def field(self, head_dim: int) -> RopeField:
        """The stream's description for tensors of ``head_dim``; raises InvalidArgument."""
        self.check()
        dim = 2 * len(self.frequencies) if self.frequencies is not None else (self.dim or head_dim)
        if dim % 2 or not 2 <= dim <= head_dim:
            raise InvalidArgument(f"rope turns {dim} channels; an even number from 2 to head_dim {head_dim} is expected")
        radians = self.frequencies if self.frequencies is not None else _frequencies(self.theta, dim)
        turns = tuple(round(f / (2 * math.pi) * (1 << c.PHASE_BITS)) % (1 << c.PHASE_BITS) for f in radians)
        return RopeField(self.first_position, PAIRINGS[self.style], turns)


def rope_from_field(field: RopeField) -> Rope:
    """The ``Rope`` whose field is this one, by its frequencies.

    >>> field = Rope(theta=500000.0, style="interleaved", first_position=7).field(64)
    >>> rope_from_field(field).field(64) == field
    True
    """
    style = next(style for style, pairing in PAIRINGS.items() if pairing == field.pairing)
    radians = tuple(2 * math.pi * turns / (1 << c.PHASE_BITS) for turns in field.frequencies)
    return Rope(style=style, first_position=field.first_position, frequencies=radians)


def check_rope(rope: object) -> None:
    """Raises InvalidArgument for an argument ``rope`` that is no ``Rope``, or one that no tensor can have."""
    if not isinstance(rope, Rope):
        raise InvalidArgument(f"rope is a {type(rope).__name__}; a pqcodec.Rope is expected, such as Rope(theta=500000.0)")
    rope.check()


def _frequencies(theta: float, dim: int) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


@lru_cache(maxsize=1)
def phase_tables() -> np.ndarray:
    """float32 [4, 256]: cos and sin of h/256 turn, cos and sin of l/65536 turn (SPEC 9.2)."""
    size = 1 << c.PHASE_TABLE_BITS
    coarse = full_circle(size)
    fine = full_circle(size * size)
    table = np.stack([*coarse, fine[0][:size], fine[1][:size]]).astype(np.float32)
    table.setflags(write=False)
    return table


@lru_cache(maxsize=1)
def phase_pairs() -> np.ndarray:
    """The same, cos and sin side by side, the coarse turns before the fine ones: float32 [1024]."""
    pairs = phase_tables().reshape(2, 2, -1).swapaxes(1, 2).ravel()
    pairs.setflags(write=False)
    return pairs


def phases(rope: RopeField, first_token: int, tokens: int, step: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of every ``step``-th token and each channel pair: float32 [tokens, channels / 2] each (SPEC 9.2)."""
    return phases_at(rope, np.uint64(first_token) + np.arange(tokens, dtype=np.uint64) * np.uint64(step))


def phases_at(rope: RopeField, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of any tokens, whole numbers [tokens]."""
    position = np.uint64(rope.first_position % (1 << c.PHASE_BITS)) + tokens.astype(np.uint64)
    turns = position[:, None] * np.array(rope.frequencies, np.uint64)[None, :]
    phase = (turns >> np.uint64(c.PHASE_BITS - 2 * c.PHASE_TABLE_BITS)) & np.uint64(0xFFFF)
    return phase_cosines(phase.astype(np.intp))


def phase_cosines(phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of phases in turns / 2^16, whole numbers: float32 of the same shape (SPEC 9.2)."""
    coarse, fine = phase >> c.PHASE_TABLE_BITS, phase & (1 << c.PHASE_TABLE_BITS) - 1
    cos_h, sin_h, cos_l, sin_l = phase_tables()
    cos = cos_h[coarse] * cos_l[fine] - sin_h[coarse] * sin_l[fine]
    sin = sin_h[coarse] * cos_l[fine] + cos_h[coarse] * sin_l[fine]
    return cos, sin


def pairs(rope: RopeField) -> tuple[np.ndarray, np.ndarray]:
    """Channels p and q of each pair: intp [channels / 2] each."""
    i = np.arange(rope.channels // 2)
    return (i, i + rope.channels // 2) if rope.pairing == c.ROPE_HALF else (2 * i, 2 * i + 1)


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rope: RopeField) -> np.ndarray:
    """An offset [head_dim] at each token, or vectors [tokens, head_dim] turned: float32 [tokens, head_dim].

    Every operation rounds. With the sines' negatives they are turned back.
    """
    p, q = pairs(rope)
    turned = np.array(np.broadcast_to(x, (len(cos), x.shape[-1])))
    turned[:, p] = x[..., p] * cos - x[..., q] * sin
    turned[:, q] = x[..., p] * sin + x[..., q] * cos
    return turned


def offset_at(rope: RopeField | None, offset: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """An offset [head_dim] at some tokens, whole numbers [n]: float32 [n, head_dim]."""
    if rope is None:
        return np.repeat(offset[None], len(tokens), 0)
    return turn(offset, *phases_at(rope, tokens), rope)


def turns_of_run(rope: RopeField) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin by which a run's rows turn on from its first one: float32 [c.RUN_ROWS, channels / 2] each (SPEC 9.5, step 3)."""
    cos, sin = phases(replace(rope, first_position=0), 0, c.RUN_ROWS)
    steps = np.float32(1 << c.RUN_TURN_BITS)
    return np.rint(cos * steps) / steps, np.rint(sin * steps) / steps


def offset_of_run(rope: RopeField, offset: np.ndarray, exponent: int, token: int) -> np.ndarray:
    """An offset float32 [head_dim], stored with an exponent, at a run's first token: float32 [head_dim] (SPEC 9.5, step 2)."""
    p, q = pairs(rope)
    halves = np.ldexp(offset, -exponent)
    turned = turn(halves, *phases_at(rope, np.array([token])), rope)[0]
    both = np.stack([turned[p], turned[q]]).clip(-HALVES.max, HALVES.max)
    largest = np.maximum(np.abs(both).max(0), HALVES.smallest_normal)
    units = np.ldexp(np.float32(1), np.frexp(largest)[1] - 1 - HALVES.nmant)
    turned[p], turned[q] = np.rint(both / units) * units
    return np.ldexp(turned, exponent)


def offset_in_runs(h: Header, offset: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """An offset [head_dim] at some coded tokens, where it turns run by run: float32 [n, head_dim] (SPEC 9.5)."""
    assert h.rope is not None
    rows = (tokens - h.first_tokens) % h.chunk_tokens % c.RUN_ROWS
    begins, which = np.unique(tokens - rows, return_inverse=True)
    turned = np.stack([offset_of_run(h.rope, offset, h.offset_exponent, int(begin)) for begin in begins])
    cos, sin = turns_of_run(h.rope)
    return turn(turned[which], cos[rows], sin[rows], h.rope)


def offset_of_coded(h: Header, offset: np.ndarray, places: np.ndarray) -> np.ndarray:
    """An offset [head_dim] at coded tokens that stand at some places, as the header says: float32 [n, head_dim] (SPEC 9)."""
    return offset_in_runs(h, offset, places) if h.runs else offset_at(h.rope, offset, places)


def turn_back(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rope: RopeField) -> np.ndarray:
    """x [..., tokens, head_dim] with each pair turned back by its token's angle, float64."""
    p, q = pairs(rope)
    back, cos, sin = x.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64)
    first, second = x[..., p], x[..., q]
    back[..., p] = first * cos + second * sin
    back[..., q] = second * cos - first * sin
    return back


def to_halves(means: np.ndarray) -> Halves:
    """Means float64 [leading, head_dim] -> (float16 [leading, head_dim], exponent): offset = half * 2^exponent."""
    largest = float(np.abs(means).max(initial=0.0))
    if largest == 0 or 2.0**-4 <= largest < 2.0**15:
        exponent = 0
    else:
        exponent = min(max(math.frexp(largest)[1] - 15, c.OFFSET_EXPONENTS[0]), c.OFFSET_EXPONENTS[1])
    largest_half = c.LARGEST_FINITE[c.DTYPE_FLOAT16]  # beyond 2^127 the exponent's cap leaves more than a half holds
    return np.ldexp(means, -exponent).clip(-largest_half, largest_half).astype(np.float16), exponent


def from_halves(halves: np.ndarray, exponent: int | np.ndarray) -> np.ndarray:
    """Stored offsets -> float32 [leading, head_dim], exact; ``exponent``: one, or one a row [leading, 1]."""
    return np.ldexp(halves.astype(np.float64), exponent).astype(np.float32)


# -- in streams --------------------------------------------------------------------------------------------------
def stored_means(source: Source, h: Header) -> Halves | None:
    """The offsets of a stream as they are stored; None where it has none. Raises CorruptStream where one is damaged."""
    if not h.offsets:
        return None
    damage: list[Damage] = []
    raw = sections.read_entries(source, h, sections.OFFSETS, (0, h.leading), damage)[1]
    if damage:
        raise damage_error(damage)
    return raw.view("<f2").reshape(h.leading, h.head_dim), h.offset_exponent


def check_means(means: Halves, h: Header) -> None:
    """Raises InvalidArgument for offsets, as they are stored, that a stream of such a header cannot have."""
    halves, exponent = means
    least, most = c.OFFSET_EXPONENTS
    if not h.offsets:
        raise InvalidArgument("means are given for a tensor that is not centred; choose center='mean' or 'rope'")
    if halves.shape != (h.leading, h.head_dim) or halves.dtype != np.float16 or not least <= exponent <= most:
        raise InvalidArgument(
            f"means are {halves.dtype} {halves.shape} times 2^{exponent}; float16 {(h.leading, h.head_dim)} and an exponent of "
            f"{least} .. {most} are expected"
        )


def offset_entries(halves: np.ndarray) -> bytes:
    """The section of offsets, float16 [leading, head_dim], as a stream has it."""
    return b"".join(sections.with_checksum(half.astype("<f2").tobytes()) for half in halves)


def read_means(source: Source, h: Header, leads: tuple[int, int], damage: list[Damage]) -> np.ndarray | None:
    """The offsets of some leading indices: float32 [leading, head_dim], zeros for all others and for damaged ones.

    None where the stream has none; ``damage`` gets what is damaged. Raises CorruptStream.
    """
    if not h.offsets:
        return None
    offsets = np.zeros((h.leading, h.head_dim), np.float32)
    sound, raw = sections.read_entries(source, h, sections.OFFSETS, leads, damage)
    halves = raw.view("<f2").reshape(-1, h.head_dim)
    if not np.isfinite(halves).all():
        lead = sound[int(np.argmin(np.isfinite(halves).all(1)))]
        raise CorruptStream(f"offset of leading index {lead} is not finite")
    offsets[sound] = from_halves(halves, h.offset_exponent)
    return offsets


def read_means_together(sources: Sequence[Source], headers: Sequence[Header], damage: list[Damage]) -> list[np.ndarray | None]:
    """``read_means`` of whole streams, those of one head_dim at once."""
    found: list[np.ndarray | None] = [None] * len(headers)
    for numbers, bodies in sections.read_together(sources, headers, sections.OFFSETS):
        leads = [headers[number].leading for number in numbers]
        if bodies is not None and np.isfinite(bodies.view("<f2")).all():
            exponents = np.repeat([headers[number].offset_exponent for number in numbers], leads)[:, None]
            loaded = from_halves(bodies.view("<f2"), exponents)
            for number, offsets in zip(numbers, np.split(loaded, np.cumsum(leads)[:-1]), strict=True):
                found[number] = offsets
        else:  # one by one, to tell which
            for number, leading in zip(numbers, leads, strict=True):
                found[number] = read_means(sources[number], headers[number], (0, leading), damage)
    return found
