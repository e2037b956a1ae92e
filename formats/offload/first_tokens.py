"""Law: where sequences are padded at their left, the first tokens behind the padding are kept exact, beside the streams.

The exact first tokens of a stream have the same number for all sequences, and in a padded sequence they are padding. So these
tokens are kept here, and written over what the streams decode to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.policy.recipe import behind_padding


class FirstTokens:
    """The exact tokens behind padding, of one layer: the first ``tokens`` of each sequence.

    ``padding``: tokens of padding before each of ``sequences``, or before each prompt if several sequences continue one. Raises
    InvalidArgument where the sequences are no multiple of the prompts.
    """

    def __init__(self, padding: Sequence[int], tokens: int, sequences: int) -> None:
        times, rest = divmod(sequences, len(padding))
        if rest or not times:
            raise InvalidArgument(f"padding is told of {len(padding)} sequences, and {sequences} are given to the cache")
        self._padding = [before for before in padding for _ in range(times)]
        self._tokens = tokens
        self._places: list[tuple[int, int]] = []  # (sequence, token) of each that is kept
        self._kept: tuple[Any, Any] | None = None  # their keys and values [places, heads, head_dim]
        self._index: Any = None  # the places, on the device

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values."""
        return sum(x.nbytes for x in self._kept or ())

    def keep(self, keys: Any, values: Any, first: int) -> None:
        """Keep those that are among tokens [sequences, heads, tokens, head_dim], of which the first is token ``first``."""
        found = behind_padding(self._padding, self._tokens, first, first + int(keys.shape[2]))
        if not found:
            return
        rows, tokens = _index(found, keys.device)
        with torch.inference_mode(False), torch.no_grad():
            new = [x[rows, :, tokens - first] for x in (keys, values)]
            old = self._kept or [x[:0] for x in new]
            self._set(self._places + found, *(torch.cat(pair) for pair in zip(old, new, strict=True)))

    def put(self, whole: Sequence[Any]) -> None:
        """Write the kept tokens where they belong in keys and values, ``whole`` [sequences, heads, tokens, head_dim]."""
        if self._places and self._kept is not None:
            if self._index is None:
                self._index = _index(self._places, whole[0].device)
            rows, tokens = self._index
            for all_tokens, kept in zip(whole, self._kept, strict=True):
                all_tokens[rows, :, tokens] = kept

    def cut(self, tokens: int) -> None:
        """Let go of all but the first ``tokens`` of each sequence, counted with its padding."""
        kept = [i for i, (_, token) in enumerate(self._places) if token < tokens]
        self._take(kept, [self._places[i] for i in kept])

    def select(self, rows: Sequence[int]) -> None:
        """Make the batch one of sequences ``rows`` of it; the same one may be taken several times."""
        self._padding = [self._padding[row] for row in rows]
        taken = [(i, new) for new, row in enumerate(rows) for i, (old, _) in enumerate(self._places) if old == row]
        self._take([i for i, _ in taken], [(new, self._places[i][1]) for i, new in taken])

    def _take(self, order: list[int], places: list[tuple[int, int]]) -> None:
        if self._kept is not None:
            with torch.inference_mode(False), torch.no_grad():
                taken = torch.tensor(order, dtype=torch.long, device=self._kept[0].device)
                keys, values = (x[taken] for x in self._kept)
            self._set(places, keys, values)

    def _set(self, places: list[tuple[int, int]], keys: Any, values: Any) -> None:
        self._places, self._kept, self._index = places, (keys, values), None


def _index(places: Sequence[tuple[int, int]], device: Any) -> tuple[Any, Any]:
    rows, tokens = torch.tensor(places, dtype=torch.long).T.to(device)
    return rows, tokens
