"""Law: what a preset's name means: bits per coordinate of a coded vector, radius included but in those of quads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED
from pqcodec.errors import InvalidArgument


@dataclass(frozen=True)
class Preset:
    """``quarter_bits``: four times the bits per coordinate of the rotation's order (an order is a multiple of 16)."""

    name: str
    coding: int
    quarter_bits: int
    radius_bits: int

    @property
    def rounds(self) -> int:
        """Rounds of the rotation in new streams: the paper's preset keeps the paper's one."""
        return DECLARED[self.coding].rounds[-1]

    @property
    def rate(self) -> float:
        """Bits per coordinate that the name tells."""
        return self.quarter_bits / 4

    def row_bits(self, order: int) -> int:
        """Bits of one coded vector of ``order`` coordinates.

        >>> PRESETS["pq3"].row_bits(128), PRESETS["quad3"].row_bits(128), PRESETS["paper"].row_bits(128)
        (384, 392, 496)
        """
        return DECLARED[self.coding].row_bits(order, self.quarter_bits)


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
    )
}


def preset(name: str) -> Preset:
    """The preset of that name; raises InvalidArgument."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InvalidArgument(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


@lru_cache(maxsize=256)
def preset_name(coding: int, row_bits: int, radius_bits: int, order: int) -> str | None:
    """The preset that writes such rows, or None."""
    rows = (coding, row_bits, radius_bits)
    return next((p.name for p in PRESETS.values() if (p.coding, p.row_bits(order), p.radius_bits) == rows), None)
