"""Law: what a preset's name means: bits per coordinate of a coded vector, radius included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED
from pqcodec.errors import InvalidArgument


@dataclass(frozen=True)
class Preset:
    """``half_bits``: twice the bits per coordinate of the rotation's order (an order is a multiple of 16)."""

    name: str
    coding: int
    half_bits: int
    radius_bits: int

    @property
    def rounds(self) -> int:
        """Rounds of the rotation in new streams: the paper's preset keeps the paper's one."""
        return DECLARED[self.coding].rounds[-1]

    def row_bits(self, order: int) -> int:
        """Bits of one coded vector of ``order`` coordinates.

        >>> PRESETS["pq3"].row_bits(128), PRESETS["paper"].row_bits(128)
        (384, 496)
        """
        return DECLARED[self.coding].row_bits(order, self.half_bits)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("pq2", c.CODING_SPLIT, 4, 11),
        Preset("pq2.5", c.CODING_SPLIT, 5, 11),
        Preset("pq3", c.CODING_SPLIT, 6, 12),
        Preset("pq3.5", c.CODING_SPLIT, 7, 12),
        Preset("pq4", c.CODING_SPLIT, 8, 13),
        Preset("pq5", c.CODING_SPLIT, 10, 14),
        Preset("pq6", c.CODING_SPLIT, 12, 15),
        Preset("paper", c.CODING_PAPER, 0, c.PAPER_RADIUS_BITS),
    )
}


def preset(name: str) -> Preset:
    """The preset of that name; raises InvalidArgument."""
    if name not in PRESETS:
        raise InvalidArgument(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


@lru_cache(maxsize=256)
def preset_name(coding: int, row_bits: int, radius_bits: int, order: int) -> str | None:
    """The preset that writes such rows, or None."""
    rows = (coding, row_bits, radius_bits)
    return next((p.name for p in PRESETS.values() if (p.coding, p.row_bits(order), p.radius_bits) == rows), None)
