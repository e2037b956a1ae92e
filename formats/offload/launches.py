"""Law: launches that fill a layer's scratch: prepared once, launched at every step until what they read or write moves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pqcodec.batch import DecodeBatch
from pqcodec.formats.offload.graphs import Replayed

Pair = tuple[Any, Any]  # a layer's keys and values, tensors [sequences, heads, tokens, head_dim]
PLAIN_RUNS = 2  # of launches, before they are captured in a CUDA graph
_MOST_BATCHES = 64  # that are kept of a slot: after each chunk, and in each order of beams, layers are of another layout


class Launch:
    """What fills ``whole``: batches, which decode, and copies (target, source) of what comes before and behind."""

    def __init__(
        self, parts: tuple[Pair, Pair, Pair], batches: Sequence[DecodeBatch], copies: Sequence[tuple[Any, Any]], device: Any
    ) -> None:
        self._whole, self._before, self._behind = parts
        self.run = Replayed(partial(_run, batches, copies), device, PLAIN_RUNS)

    def fills(self, whole: Pair, before: Pair, behind: Pair) -> bool:
        """Whether it is of these very tensors."""
        return self._whole is whole and self._before is before and self._behind is behind


def _run(batches: Sequence[DecodeBatch], copies: Sequence[tuple[Any, Any]]) -> None:
    for batch in batches:
        batch.run()
    for target, source in copies:
        target.copy_(source)


class Prepared:
    """Launches that read streams from the same memory: the last of each layer, and batches, which layers may share."""

    def __init__(self) -> None:
        self.launches: dict[int, Launch] = {}  # by the number of a layer's OldTokens
        self._batches: dict[Any, Sequence[DecodeBatch]] = {}  # by the layout of the streams

    def batches(self, layout: Any) -> Sequence[DecodeBatch] | None:
        return self._batches.get(layout)

    def share(self, layout: Any, batches: Sequence[DecodeBatch]) -> None:
        """Keep batches for the other layers of a layout."""
        if len(self._batches) >= _MOST_BATCHES:
            self._batches.clear()
        self._batches[layout] = batches

    def clear(self) -> None:
        """Let go of all, because memory goes that is read or written."""
        self.launches.clear()
        self._batches.clear()
