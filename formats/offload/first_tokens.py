"""Law: the first tokens behind padding, of each sequence that is padded at its left: exact, and put over what was decoded.

The streams of all sequences share one number of exact first tokens, and of a padded sequence those are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.policy.recipe import behind_padding


class FirstTokens:
    """Of one layer; ``padding``: tokens before each sequence, or before each prompt where several sequences have one."""

    def __init__(self, padding: Sequence[int], tokens: int, sequences: int) -> None:
        times, rest = divmod(sequences, len(padding))
        if rest or not times:
            raise InvalidArgument(f"padding is told of {len(padding)} sequences, and {sequences} are given to the cache")
        self._padding = [before for before in padding for _ in range(times)]
        self._tokens = tokens
        self._places: list[tuple[int, int]] = []  # (sequence, token) that are kept
        self._kept: tuple[Any, Any] | None = None  # their keys and values [places, heads, head_dim]
        self._index: Any = None  # the places, on the device

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._kept or ())

    def keep(self, keys: Any, values: Any, first: int) -> None:
        """Those among tokens [sequences, heads, tokens, head_dim], of which the first has the number ``first``."""
        found = behind_padding(self._padding, self._tokens, first, first + int(keys.shape[2]))
        if not found:
            return
        rows, tokens = _index(found, keys.device)
        with torch.inference_mode(False), torch.no_grad():
            new = [x[rows, :, tokens - first] for x in (keys, values)]
            old = self._kept or [x[:0] for x in new]
            self._now(self._places + found, *(torch.cat(pair) for pair in zip(old, new, strict=True)))

    def put(self, whole: Sequence[Any]) -> None:
        """Where they belong in keys and values [sequences, heads, tokens, head_dim]."""
        if self._places and self._kept is not None:
            if self._index is None:
                self._index = _index(self._places, whole[0].device)
            rows, tokens = self._index
            for all_tokens, kept in zip(whole, self._kept, strict=True):
                all_tokens[rows, :, tokens] = kept

    def cut(self, tokens: int) -> None:
        """Only the first so many tokens of each sequence are there from now on."""
        kept = [i for i, (_, token) in enumerate(self._places) if token < tokens]
        self._take(kept, [self._places[i] for i in kept])

    def select(self, rows: Sequence[int]) -> None:
        """The sequences of the batch from now on, by their places in it until now."""
        self._padding = [self._padding[row] for row in rows]
        taken = [(i, new) for new, row in enumerate(rows) for i, (old, _) in enumerate(self._places) if old == row]
        self._take([i for i, _ in taken], [(new, self._places[i][1]) for i, new in taken])

    def _take(self, order: list[int], places: list[tuple[int, int]]) -> None:
        if self._kept is not None:
            with torch.inference_mode(False), torch.no_grad():
                taken = torch.tensor(order, dtype=torch.long, device=self._kept[0].device)
                keys, values = (x[taken] for x in self._kept)
            self._now(places, keys, values)

    def _now(self, places: list[tuple[int, int]], keys: Any, values: Any) -> None:
        self._places, self._kept, self._index = places, (keys, values), None


def _index(places: Sequence[tuple[int, int]], device: Any) -> tuple[Any, Any]:
    rows, tokens = torch.tensor(places, dtype=torch.long).T.to(device)
    return rows, tokens
