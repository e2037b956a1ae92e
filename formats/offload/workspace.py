"""Law: the memory and the prepared launches on one device that all layers of an EncodedCache share.

Layers know their workspace, and it does not know them, so that a cache that is dropped frees its memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pqcodec.formats.offload.graphs import Pair, PreparedLaunches
from pqcodec.formats.offload.pinned import GrowingArena
from pqcodec.formats.offload.staging import SPARE, Staging, device_bytes
from pqcodec.placed import aligned

_SPARE_TOKENS = 256  # that the scratch has room for beyond what is needed, at least


class PairKind(NamedTuple):
    """What a layer's keys and values have in common at each step: all but the number of their tokens."""

    dtypes: tuple[Any, Any]  # of keys and of values: they differ under autocast
    keys: tuple[int, int, int]  # sequences, heads, head_dim
    values: tuple[int, int, int]

    @classmethod
    def of(cls, keys: Any, values: Any) -> PairKind:
        """The kind of tensors [sequences, heads, tokens, head_dim]."""
        return cls((keys.dtype, values.dtype), *((x.shape[0], x.shape[1], x.shape[3]) for x in (keys, values)))


@dataclass(frozen=True)
class Step:
    """A step of one token that is captured in a CUDA graph: where it finds what changes from replay to replay.

    ``tokens``: int32 [1], of every layer's tail, the step's own included. ``place``: int64 [1], of the step's own in the tail.
    """

    tokens: Any
    place: Any


class Workspace:
    """Scratch for one decoded layer, slots for encoded ones (``staging``), and launches that read streams kept on the device.

    A copy or a pickle has none of these yet, because what is prepared holds addresses of the original's memory.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.staging = Staging(device)
        self.resident = PreparedLaunches()
        self.step: Step | None = None  # the step that is captured now
        self._attentions: dict[int, dict[Any, tuple[Any, Any]]] = {}  # of layers, by their number
        self._scratch: Any = None  # uint8 [bytes]
        self._pairs: dict[PairKind, Pair] = {}  # views of the scratch

    def __getstate__(self) -> tuple[Any, list[GrowingArena]]:
        return self.device, self.staging.layers

    def __setstate__(self, state: tuple[Any, list[GrowingArena]]) -> None:
        new = Workspace(state[0])
        new.staging.layers = state[1]
        vars(self).update(vars(new))

    @property
    def nbytes(self) -> int:
        """Bytes on the device: scratch and slots."""
        return self.staging.nbytes + (0 if self._scratch is None else self._scratch.numel())

    def scratch(self, kind: PairKind, tokens: int) -> Pair:
        """Keys and values [sequences, heads, at least ``tokens``, head_dim], which hold a layer until the next one takes them.

        The same pair of tensors is returned for a kind until it becomes too short, or another kind needs more memory.
        """
        if kind not in self._pairs or self._pairs[kind][0].shape[2] < tokens:
            self._lay_out(kind, tokens + max(int(tokens * SPARE), _SPARE_TOKENS))
        return self._pairs[kind]

    def _lay_out(self, kind: PairKind, tokens: int) -> None:
        """No one may hold the old scratch by now: there is no room for both."""
        import torch

        shapes = [(b, h, tokens, d) for b, h, d in (kind.keys, kind.values)]
        sizes = [aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in zip(shapes, kind.dtypes, strict=True)]
        for prepared in self._prepared():
            prepared.clear()
        if self._scratch is None or self._scratch.numel() < sum(sizes):
            self._pairs.clear()
            self._scratch = None
            self._scratch = device_bytes(sum(sizes), self.device)
        with torch.inference_mode(False):
            parts = self._scratch[: sum(sizes)].split(sizes)
            keys, values = (
                part.view(dtype)[: math.prod(shape)].view(shape)
                for part, dtype, shape in zip(parts, kind.dtypes, shapes, strict=True)
            )
        self._pairs[kind] = keys, values

    def attention(self, layer: int, key: Any, kept: tuple[Any, ...], prepare: Callable[[], Any]) -> Any:
        """What ``prepare`` made for attention to a layer; made anew for other ``kept`` objects, compared by identity.

        ``layer``: the number of its OldTokens.
        """
        found = self._attentions.setdefault(layer, {}).get(key)
        if found is None or any(one is not other for one, other in zip(found[0], kept, strict=True)):
            found = self._attentions[layer][key] = kept, prepare()
        return found[1]

    def recent(self, tokens: int) -> Any:
        """How many tokens of a tail count: ``tokens``, or what a step's memory says, where one is captured, at its replay."""
        return tokens if self.step is None else self.step.tokens

    def forget(self, layer: int) -> None:
        """Let go of the launches of a layer whose streams have changed; ``layer``: the number of its OldTokens."""
        self._attentions.pop(layer, None)
        for prepared in self._prepared():
            prepared.forget(layer)

    def _prepared(self) -> list[PreparedLaunches]:
        return [self.resident, *(slot.decodings for slot in self.staging.slots)]
