"""Law: the options of encoding, in one object that is valid once it exists, and the header that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from numbers import Integral, Number
from typing import Any

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED, Codebook, half_bits
from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.codings.presets import preset as preset_of
from pqcodec.codings.vectors import VectorCodebook
from pqcodec.errors import InvalidArgument
from pqcodec.stages.centre import PAIRINGS, Rope, check_rope
from pqcodec.stages.keep import header_of
from pqcodec.stages.linear import LinearOptions
from pqcodec.stream.header import Header
from pqcodec.stream.header_ranges import runs_are_possible
from pqcodec.stream.linear import LinearField
from pqcodec.stream.tables import LevelTable, RangeTable, VectorTable

Progress = Callable[[int, int], None]  # blocks done, blocks in all

CENTERS = (None, "mean", "rope")
NONFINITE = ("error", "exact")
EFFORTS = tuple(c.QUADS_EFFORTS)
_RANGES = {  # of whole numbers: least, most, and both in words
    "seed": (0, (1 << 64) - 1, "0 .. 2^64 - 1"),
    "exact_tokens": (0, (1 << 32) - 1, "0 .. 2^32 - 1"),
    "exact_vectors": (0, (1 << 32) - 1, "0 .. 2^32 - 1, or pairs of leading index and token,"),
    "exact_last": (0, c.MAX_EXACT_LAST, f"0 .. {c.MAX_EXACT_LAST}"),
    "chunk_tokens": (1, c.MAX_CHUNK_TOKENS, f"1 .. {c.MAX_CHUNK_TOKENS}"),
}


@dataclass(frozen=True)
class EncodeOptions:
    """How a tensor is encoded; the fields are the options of ``pqcodec.encode``. Raises InvalidArgument when it is made.

    Options are hashable: frequencies of ``rope`` that are given as a list or an array are kept as a tuple.
    """

    preset: str = DEFAULT_PRESET
    seed: int = 0
    center: str | None = None
    rope: Rope | None = None
    exact_tokens: int = 0
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS
    exact_vectors: Any = field(default=(), compare=False)  # pairs (leading index, token), or how many of each leading index
    nonfinite: str = "error"
    effort: str = "fast"
    pairing: str | None = None  # of channels, for presets of pair polar; None: ``rope``'s, or "half"
    exact_last: int = 0
    keep: Any = field(default=None, compare=False)  # positions [n] or [..., n] of the tokens that are kept; None: all
    levels: Any = None  # of codes, for presets that bring them: numbers or a LevelTable; None: the preset's, or fitted
    codebooks: Any = None  # for presets of residual VQ, which need it: a VectorTable
    before_rope: bool = False  # whether vectors are coded as they were before ``rope`` turned them
    join_heads: bool = False  # whether vectors of all heads, of the dimension before tokens, are coded as one
    channels: Any = field(default=None, compare=False)  # that are coded: positions [n] or [..., n]; None: all
    block_basis: Any = field(default=None, compare=False)  # True, or a matrix [16, 16]; None: no blocks
    basis: Any = field(default=None, compare=False)  # a matrix [n, numbers of a row's vectors], a BasisTable, or n; None: none

    ranges: Any = None  # scales and zeros of a preset of scalar coding: a RangeTable; None: those of the tensor's own groups

    def __post_init__(self) -> None:
        preset_of(self.preset)
        if self.center not in CENTERS:
            raise InvalidArgument(f"center {self.center!r} is unknown; choose None, 'mean' or 'rope'")
        self._check_turning()
        LinearOptions(self.channels, self.block_basis, self.basis)
        check_numbers(seed=self.seed, chunk_tokens=self.chunk_tokens)
        check_numbers(exact_tokens=self.exact_tokens, exact_last=self.exact_last)
        counted = isinstance(self.exact_vectors, Number)
        if counted:
            check_numbers(exact_vectors=self.exact_vectors)
        checked_nonfinite(self.nonfinite)
        checked_effort(self.effort)
        checked_pairing(self.pairing)
        given = preset_of(self.preset).levels or None if self.levels is None else self.levels
        if given is not None:
            object.__setattr__(self, "levels", checked_levels(given, self.preset))
        if self.codebooks is not None or preset_of(self.preset).by_vectors:
            object.__setattr__(self, "codebooks", checked_codebooks(self.codebooks, self.preset))
        if self.ranges is not None:
            checked_ranges(self.ranges, self.preset)
        if self.rope is not None:
            check_rope(self.rope)
            if not isinstance(self.rope.frequencies, (tuple, type(None))):
                object.__setattr__(self, "rope", replace(self.rope, frequencies=tuple(self.rope.frequencies)))

    def _check_turning(self) -> None:
        for name in ("before_rope", "join_heads"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} {getattr(self, name)!r}: True or False is expected")
        if self.before_rope and self.center == "rope":
            raise InvalidArgument("center='rope' is of vectors after RoPE; with before_rope=True choose center='mean', or None")
        if self.before_rope and self.rope is None:
            raise InvalidArgument("before_rope=True needs the RoPE that vectors are turned back from: give rope=Rope(...)")
        if not self.before_rope and (self.center == "rope") != (self.rope is not None):
            raise InvalidArgument(
                "center='rope' and rope=Rope(...) go together; give both, neither, or rope=Rope(...) and before_rope=True"
            )

    @property
    def exact_pairs(self) -> Any:
        """Vectors that are named to be kept exact, as pairs (leading index, token)."""
        return () if isinstance(self.exact_vectors, Integral) else self.exact_vectors

    @property
    def farthest(self) -> int:
        """How many vectors of each leading index are kept exact because they lie farthest from its mean."""
        return int(self.exact_vectors) if isinstance(self.exact_vectors, Integral) else 0

    @property
    def linear(self) -> LinearOptions:
        """What is asked of the linear stage."""
        return LinearOptions(self.channels, self.block_basis, self.basis)

    def _row(self, shape: tuple[int, ...]) -> tuple[int, LinearField | None]:
        """Numbers of the vectors of a row of a tensor of that shape, and the linear stage; raises InvalidArgument."""
        if self.join_heads and len(shape) < 3:
            raise InvalidArgument(f"join_heads: shape {tuple(shape)}; [..., heads, tokens, head_dim] is expected")
        numbers = shape[-3] * shape[-1] if self.join_heads else shape[-1]
        linear = self.linear.field(numbers)
        most = c.MAX_JOINED_DIM if linear else c.MAX_HEAD_DIM
        if self.join_heads and not 1 <= numbers <= most:
            raise InvalidArgument(
                f"join_heads: {shape[-3]} heads of {shape[-1]} numbers are rows of {numbers}; 1 .. {most} are possible"
            )
        return numbers, linear

    def header(self, shape: tuple[int, ...], dtype: int, numpy: bool = False) -> Header:
        """The header of a tensor of that shape and stored dtype, without what depends on its numbers.

        Where tokens share fields, a chunk is as many whole groups as hold ``chunk_tokens``. Raises InvalidArgument.
        """
        preset, (width, linear) = preset_of(self.preset), self._row(shape)
        width = linear.width if linear else width
        affine, chunk_tokens = preset.affine, self.chunk_tokens
        if affine:
            affine = replace(affine, shared=self.ranges is not None)
            chunk_tokens = -(-chunk_tokens // affine.tokens) * affine.tokens
            if affine.fields == c.AFFINE_POLAR:
                style = self.pairing or (self.rope.style if self.rope else "half")
                affine = replace(affine, pairing=PAIRINGS[style])
        if affine and preset.sparse:
            numbers = affine.tokens * min(affine.channels, width)
            affine = replace(affine, outliers=max(round(preset.sparse / 2 * numbers), min(numbers // 2, 1)))
        sketch = preset.sketched(shape[-1])
        if sketch and sketch.channels:
            chunk_tokens = -(-chunk_tokens // sketch.tokens) * sketch.tokens
        codebook, row_bits = None, preset.row_bits(preset.order(width))
        if preset.by_vectors:
            codebook, row_bits = self.codebooks, self.codebooks.vectors.row_bits(preset.radius_bits)
        elif preset.by_levels:
            codebook = self.levels or unfitted(1 << preset.quarter_bits // 4)
        stages = self.before_rope, self.join_heads, linear, self.keep is not None
        header = Header(
            coding=preset.coding,
            dtype=dtype,
            shape=shape,
            row_bits=row_bits,
            radius_bits=preset.radius_bits,
            seed=self.seed,
            chunk_tokens=chunk_tokens,
            exact_tokens=self.exact_tokens,
            offsets=self.center is not None,
            rope=self.rope.field(shape[-1]) if self.rope else None,
            numpy=numpy,
            rounds=preset.rounds,
            affine=affine,
            exact_last=self.exact_last,
            codebook=codebook,
            before_rope=self.before_rope,
            runs=runs_are_possible(preset.coding, self.center is not None, self.rope, *stages),
            joined=self.join_heads,
            linear=linear,
            sketch=sketch,
            basis=self.linear.shared,
            shared_ranges=self.ranges.part if self.ranges else None,
        )
        header = header if self.keep is None else header_of(header, self.keep)
        if self.farthest:
            header = replace(header, exceptions=header.leading * min(self.farthest, header.coded_tokens))
        return header


def check_numbers(**values: int) -> None:
    """Raises InvalidArgument for a seed, a number of exact tokens or chunk_tokens that is no whole number in its range."""
    for name, value in values.items():
        least, most, words = _RANGES[name]
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise InvalidArgument(f"{name} {value!r} is no whole number; {words} are possible")
        if not least <= value <= most:
            raise InvalidArgument(f"{name} {value} is outside {words}")


def checked_nonfinite(nonfinite: str) -> None:
    """Raises InvalidArgument where there is no such way with NaN and Inf."""
    if nonfinite not in NONFINITE:
        raise InvalidArgument(f"nonfinite {nonfinite!r} is unknown; choose {' or '.join(map(repr, NONFINITE))}")


def checked_effort(effort: str) -> None:
    """Raises InvalidArgument where there is no such effort."""
    if effort not in EFFORTS:
        raise InvalidArgument(f"effort {effort!r} is unknown; choose {' or '.join(map(repr, EFFORTS))}")


def checked_pairing(pairing: str | None) -> None:
    """Raises InvalidArgument where channels are not paired so."""
    if pairing is not None and pairing not in PAIRINGS:
        raise InvalidArgument(f"pairing {pairing!r} is unknown; choose {' or '.join(map(repr, PAIRINGS))}")


def checked_levels(levels: Any, preset: str) -> Codebook:
    """The codebook of given levels, or of a LevelTable; raises InvalidArgument for what are none of the preset's codes."""
    if not preset_of(preset).by_levels:
        raise InvalidArgument(f"levels are given, but preset {preset!r} takes none; choose one of nuq, or leave them out")
    if isinstance(levels, Codebook):
        found = levels
    elif isinstance(levels, LevelTable):
        found = levels.part
    else:
        try:
            found = Codebook(half_bits([float(level) for level in levels]))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(f"levels {levels!r:.60}: numbers within float16 are expected ({error})") from None
    if problem := found.problem(preset_of(preset).quarter_bits // 4):
        raise InvalidArgument(f"levels: {problem}")
    return found


def checked_codebooks(codebooks: Any, preset: str) -> VectorCodebook:
    """The codebook of a VectorTable; raises InvalidArgument where the preset takes none, or needs one or more stages."""
    stages = preset_of(preset).radius_bits
    if not preset_of(preset).by_vectors:
        raise InvalidArgument(f"codebooks are given, but preset {preset!r} takes none; choose one of rvq, or leave them out")
    found = codebooks.part if isinstance(codebooks, VectorTable) else codebooks
    if not isinstance(found, VectorCodebook) or found.vectors is None:
        told = "none are given" if codebooks is None else f"a {type(codebooks).__name__} is given"
        raise InvalidArgument(f"preset {preset!r} needs codebooks=VectorTable(...), as train_vq makes one; {told}")
    if found.vectors.stages < stages:
        raise InvalidArgument(
            f"preset {preset!r}: the codebooks have {found.vectors.stages} stages; choose fewer, or train more"
        )
    return found


def checked_ranges(ranges: Any, preset: str) -> None:
    """Raises InvalidArgument for what is no RangeTable, or where the preset takes none."""
    if not isinstance(ranges, RangeTable):
        raise InvalidArgument(
            f"ranges is a {type(ranges).__name__}; a RangeTable is expected, as calibrate.shared_ranges makes"
        )
    if not DECLARED[preset_of(preset).coding].takes_levels:
        raise InvalidArgument(
            f"ranges are given, but preset {preset!r} takes none; choose one of nuq or int, or leave them out"
        )


def unfitted(count: int) -> Codebook:
    """What stands for ``count`` levels that will be fitted to a tensor: no codes choose among levels that are all alike."""
    return Codebook((0,) * count)


def each(name: str, value: Any, count: int, one: type | tuple[type, ...]) -> list[Any]:
    """``value`` for each of ``count`` tensors: the same for all, or one each; raises InvalidArgument."""
    if isinstance(value, one):
        return [value] * count
    if not isinstance(value, Iterable):
        raise InvalidArgument(f"{name} is a {type(value).__name__}; one for all tensors is expected, or a list of one each")
    values = list(value)
    if len(values) != count:
        raise InvalidArgument(f"{name}: {len(values)} are given for {count} tensors; give one for all, or one each")
    return values
