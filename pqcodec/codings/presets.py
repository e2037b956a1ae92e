"""Law: what a preset's name means: bits per coordinate of a coded vector, radius included but in those of quads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED, Affine, Sketch
from pqcodec.errors import InvalidArgument

_USUAL_BITS, _USUAL_GROUP = 11, 32  # of an index and channels of a group, in the paper's codebooks


@dataclass(frozen=True)
class Preset:
    """``quarter_bits``: four times the bits per coordinate of a row's order (a multiple of 16), affine fields left out."""

    name: str
    coding: int
    quarter_bits: int
    radius_bits: int  # of residual VQ its stages
    affine: Affine | None = None  # what groups share; of pair polar its pairing is the caller's
    by_levels: bool = False  # whether streams bring the levels of their codes
    sparse: float = 0  # share of a group's numbers that is kept apart
    sketch: Sketch | None = None  # of as many outlier channels as ``sketched`` says
    levels: tuple[float, ...] = ()  # those that are not fitted to the tensor, because the system has no others

    @property
    def by_vectors(self) -> bool:
        """Whether its rows are those that given codebooks make: of 2,048 entries of 32 channels where ``rate`` is asked."""
        return DECLARED[self.coding].by_vectors

    @property
    def rounds(self) -> int:
        """Rounds of the rotation in new streams: the paper's preset keeps the paper's one."""
        return DECLARED[self.coding].rounds[-1]

    @property
    def rate(self) -> float:
        """Bits per coordinate of rows, and of the affine fields of whole groups; of others' rows what the name tells.

        Scales of residual VQ are left out.
        """
        if self.by_vectors:
            return _USUAL_BITS * self.radius_bits / _USUAL_GROUP
        return self.quarter_bits / 4 + (self.affine.rate if self.affine else 0)

    @property
    def estimates(self) -> bool:
        """Whether streams tell inner products of their vectors alone, and these but with an error that is not theirs."""
        return self.sketch is not None

    def sketched(self, head_dim: int) -> Sketch | None:
        """The sketch of vectors of ``head_dim`` numbers: a channel of 16 is an outlier, 8 of the 128 of arXiv 2406.03482."""
        if self.sketch is None or not self.sketch.channels:
            return self.sketch
        return replace(self.sketch, channels=max(head_dim // c.GROUP, 1))

    @property
    def own(self) -> bool:
        """Whether the coding is this project's; the others are published systems, there to be compared with."""
        return self.coding in (c.CODING_SPLIT, c.CODING_QUADS)

    def order(self, head_dim: int) -> int:
        """Coordinates of a row of a vector of ``head_dim`` numbers."""
        return DECLARED[self.coding].order(head_dim)

    def row_bits(self, order: int) -> int:
        """Bits of one coded vector of ``order`` coordinates; 0 where given codebooks tell it.

        >>> PRESETS["pq3"].row_bits(128), PRESETS["quad3"].row_bits(128), PRESETS["paper"].row_bits(128)
        (384, 392, 496)
        """
        norms = self.sketch.norm_bits if self.sketch else 0
        return norms + DECLARED[self.coding].row_bits(order, self.quarter_bits)


def _pairs(name: str, radius_bits: int, angle_bits: int, tokens: int = 128) -> Preset:
    """Pair polar: so many bits of a radius and of an angle, and the range of both in groups of ``tokens``."""
    affine = Affine(tokens, c.PAIR_CHANNELS, c.AFFINE_POLAR, angle_bits=angle_bits)
    return Preset(name, c.CODING_PAIRS, 2 * (radius_bits + angle_bits), radius_bits, affine)


def _scalar(name: str, bits: int, tokens: int, channels: int, fields: int = c.AFFINE_SCALE_ZERO) -> Preset:
    """Numbers of so many bits, with a scale, or a scale and a zero, for every group of ``tokens`` times ``channels``."""
    return Preset(name, c.CODING_SCALAR, 4 * bits, 0, Affine(tokens, channels, fields))


def _residual(stages: int) -> Preset:
    """Residual VQ by the first stages of given codebooks."""
    return Preset(f"rvq{stages}", c.CODING_RESIDUAL, 0, stages)


def _levels(name: str, bits: int, tokens: int, channels: int, sparse: float = 0) -> Preset:
    """The same by the 2^bits levels that a stream brings."""
    return Preset(name, c.CODING_SCALAR, 4 * bits, 0, Affine(tokens, channels, c.AFFINE_SCALE_ZERO), True, sparse)


def _symmetric(name: str, bits: int) -> Preset:
    """The same by 2^bits - 1 even levels around 0 and a scale a token, as DecoQuant rounds (arXiv 2405.12591); -1 is twice."""
    most = (1 << bits - 1) - 1
    grid = (-1.0, *(level / most for level in range(-most, most + 1)))
    return Preset(name, c.CODING_SCALAR, 4 * bits, 0, Affine(1, c.MAX_HEAD_DIM, c.AFFINE_SCALE), True, levels=grid)


def _sketch(name: str, blocks: int, outlier_blocks: int = 0, matrix: int = c.SKETCH_ORTHOGONAL) -> Preset:
    """Signs of so many projections a coordinate, and of as many a coordinate of outlier channels in groups of 32 tokens."""
    apart = {"tokens": c.QJL_TOKENS, "channels": 1, "outlier_blocks": outlier_blocks} if outlier_blocks else {}
    sketch = Sketch(blocks, matrix, **apart)
    return Preset(name, c.CODING_SKETCH, 4 * (blocks + outlier_blocks), c.SKETCH_NORM_BITS, sketch=sketch)


DEFAULT_PRESET = "quad3"  # of encode, the stores and the pools

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("pq2", c.CODING_SPLIT, 8, 11),
        Preset("pq2.5", c.CODING_SPLIT, 10, 11),
        Preset("pq3", c.CODING_SPLIT, 12, 12),
        Preset("pq3.5", c.CODING_SPLIT, 14, 12),
        Preset("pq4", c.CODING_SPLIT, 16, 13),
        Preset("pq5", c.CODING_SPLIT, 20, 14),
        Preset("pq6", c.CODING_SPLIT, 24, 15),
        Preset("quad2", c.CODING_QUADS, 8, c.QUADS_RADIUS_BITS),
        Preset("quad2.25", c.CODING_QUADS, 9, c.QUADS_RADIUS_BITS),
        Preset("quad2.5", c.CODING_QUADS, 10, c.QUADS_RADIUS_BITS),
        Preset("quad2.75", c.CODING_QUADS, 11, c.QUADS_RADIUS_BITS),
        Preset("quad3", c.CODING_QUADS, 12, c.QUADS_RADIUS_BITS),
        Preset("quad3.25", c.CODING_QUADS, 13, c.QUADS_RADIUS_BITS),
        Preset("quad3.5", c.CODING_QUADS, 14, c.QUADS_RADIUS_BITS),
        Preset("paper", c.CODING_PAPER, 0, c.PAPER_RADIUS_BITS),
        _pairs("wu44", 4, 4),
        _pairs("wu33", 3, 3),
        _pairs("wu35", 3, 5),
        _pairs("wu24", 2, 4),
        _scalar("kivi2-key", 2, 32, 1),
        _scalar("kivi4-key", 4, 32, 1),
        _scalar("int2", 2, 1, 32),
        _scalar("int4", 4, 1, 32),
        _scalar("q4_0", 4, 1, 32, c.AFFINE_SCALE),
        _scalar("q8_0", 8, 1, 32, c.AFFINE_SCALE),
        _levels("nuq4-key", 4, c.NUQ_TOKENS, 1),
        _levels("nuq3-key", 3, c.NUQ_TOKENS, 1),
        _levels("nuq2-key", 2, c.NUQ_TOKENS, 1),
        _levels("nuq4", 4, 1, c.MAX_HEAD_DIM),
        _levels("nuq3", 3, 1, c.MAX_HEAD_DIM),
        _levels("nuq2", 2, 1, c.MAX_HEAD_DIM),
        _levels("kvquant4-key", 4, c.NUQ_TOKENS, 1, c.KVQUANT_SPARSE),
        _levels("kvquant3-key", 3, c.NUQ_TOKENS, 1, c.KVQUANT_SPARSE),
        _levels("kvquant2-key", 2, c.NUQ_TOKENS, 1, c.KVQUANT_SPARSE),
        _levels("kvquant4", 4, 1, c.MAX_HEAD_DIM, c.KVQUANT_SPARSE),
        _levels("kvquant3", 3, 1, c.MAX_HEAD_DIM, c.KVQUANT_SPARSE),
        _levels("kvquant2", 2, 1, c.MAX_HEAD_DIM, c.KVQUANT_SPARSE),
        _symmetric("decoquant8", 8),
        _symmetric("decoquant4", 4),
        _symmetric("decoquant2", 2),
        *map(_residual, c.RESIDUAL_STAGES),
        _sketch("qjl", 2),
        _sketch("qjl4", 4),
        _sketch("qjl-outliers", 2, 2),
        _sketch("qjl4-outliers", 4, 1),
        _sketch("qjl-iid", 2, matrix=c.SKETCH_INDEPENDENT),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name; raises InvalidArgument."""
    if isinstance(name, (tuple, list)):
        raise InvalidArgument(
            f"preset {name!r}: one is expected here; save_cache and EncodedCache take a pair, for keys and for values"
        )
    if not isinstance(name, str) or name not in PRESETS:
        own = [each for each in PRESETS if each.startswith(("pq", "quad"))]
        others = ", ".join(each for each in PRESETS if each not in own)
        raise InvalidArgument(
            f"preset {name!r} is unknown; choose from {', '.join(own)} ({DEFAULT_PRESET} is the default), "
            f"or of other systems from {others}"
        )
    return PRESETS[name]


def check_restores(name: str, who: str) -> None:
    """Raises InvalidArgument for a preset that only estimates inner products, where ``who`` needs the vectors themselves.

    >>> check_restores("quad3", "a prefix store")
    """
    if preset(name).estimates:
        raise InvalidArgument(
            f"preset {name!r} keeps inner products of keys, not keys, and {who} needs these: choose pq, quad or another preset"
        )


@lru_cache(maxsize=256)
def preset_name(
    coding: int,
    row_bits: int,
    radius_bits: int,
    order: int,
    affine: Affine | None = None,
    by_levels: bool = False,
    sketch: Sketch | None = None,
) -> str | None:
    """The preset that writes such rows, or None; how many outliers they have does not count, but whether they do."""
    alone = replace(affine, pairing=0, outliers=0, shared=False) if affine else None
    row_bits = 0 if DECLARED[coding].by_vectors else row_bits
    drawn = replace(sketch, channels=min(sketch.channels, 1)) if sketch else None
    wanted = (coding, row_bits, radius_bits, alone, by_levels, bool(affine and affine.outliers), drawn)
    for p in PRESETS.values():
        if (p.coding, p.row_bits(order), p.radius_bits, p.affine, p.by_levels, p.sparse > 0, p.sketch) == wanted:
            return p.name
    return None
