"""Law: ``encode --keep``: which tokens of keys and values are encoded: first and last ones, or positions out of a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pqcodec.errors import InvalidArgument

_FIRST_AND_LAST = re.compile(r"(\d{1,9})\+(\d{1,9})", re.ASCII)


def lists_in(option: str, path: str, held: str) -> dict[str, Any]:
    """Numbers in the file of an option, by the names of tensors; "" is of all of them where there is one alone.

    ``held``: what they are, positions or channels, for the message. Raises InvalidArgument, CorruptStream or OSError.
    """
    from pqcodec.formats.plain.files import open_tensors

    with open_tensors(path) as reader:
        given = {name: reader.read(name) for name in reader.names}
    if not given:
        raise InvalidArgument(f"{option} {path}: the file holds no tensor of {held}")
    return given if len(given) > 1 else {"": next(iter(given.values())), **given}


@dataclass(frozen=True)
class KeepRule:
    """The first ``first`` and the last ``last`` tokens, or positions by the names of tensors; "" is of all of them."""

    first: int = 0
    last: int = 0
    positions: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> KeepRule:
        """The rule of ``--keep FIRST+LAST`` or ``--keep FILE``; raises InvalidArgument, CorruptStream or OSError.

        >>> KeepRule.of("4+508").of_tensor("k", 2000)[[0, 3, 4, -1]].tolist()
        [0, 3, 1492, 1999]
        """
        if found := _FIRST_AND_LAST.fullmatch(text):
            first, last = (int(number) for number in found.groups())
            if not first + last:
                raise InvalidArgument(f"--keep {text} keeps nothing; --drop leaves a tensor out")
            return cls(first, last)
        positions = lists_in("--keep", text, "positions")
        if empty := [name for name, given in positions.items() if not math.prod(given.shape)]:
            of = f" of {empty[-1]!r}" if empty[-1] else ""
            raise InvalidArgument(f"--keep {text} keeps nothing{of}; --drop leaves a tensor out")
        return cls(positions=positions)

    def of_tensor(self, name: str, tokens: int) -> Any:
        """The positions for a key or value of so many tokens, None for all; raises InvalidArgument where the file has none."""
        from pqcodec.select import streaming_llm

        if not self.positions:
            n = self.first + self.last
            return streaming_llm(tokens, n, first=self.first) if n < tokens else None
        if name not in self.positions and "" not in self.positions:
            raise InvalidArgument("--keep: the file has no positions for this tensor, and more than one tensor")
        return self.positions.get(name, self.positions.get(""))

    def check(self, path: str, names: Sequence[str]) -> None:
        """Raises InvalidArgument for positions of a tensor that is not encoded as a key or value."""
        unused = [name for name in self.positions if name not in names] if "" not in self.positions else []
        if unused:
            raise InvalidArgument(f"{path}: --keep has positions of {unused[0]!r}, which is no key or value that is encoded")
