"""Law: the classes of caches that are made here: they know what transformers' own do not, and are these in all else."""

from __future__ import annotations

import torch
from transformers import cache_utils

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.transformers_cache.fed import check_fed


class KeptCache(cache_utils.DynamicCache):  # type: ignore[misc]
    """A cache of a text that was kept: ``generate`` is not let feed it that text again."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = int(super().get_seq_length(layer_idx))
        return length if torch.compiler.is_compiling() else check_fed(length)


class RecurrentCache(cache_utils.DynamicCache):  # type: ignore[misc]
    """A cache that holds recurrent states alone.

    ``generate`` asks every other cache how many tokens it has seen, and feeds the rest; on top of a DynamicCache of such states
    it feeds the whole prompt again. This one answers as long as it knows, and otherwise says what to do.
    """

    tokens: int | None = None  # that its states have seen, while they are these
    states: list[float] | None = None
    is_compileable = False  # or a mask of attention would be made for it

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.layers)

    def tell(self, tokens: int) -> None:
        self.tokens, self.states = tokens, self.sums()

    def sums(self) -> list[float]:
        held = [value for layer in self.layers for value in vars(layer).values()]
        members = [x for value in held for x in (value.values() if isinstance(value, dict) else (value,))]
        return [float(x.double().sum()) for x in members if isinstance(x, torch.Tensor)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.tokens is None or self.sums() != self.states:
            raise InvalidArgument(
                "a purely recurrent model's states do not tell how many tokens they have seen, and generate would feed the "
                "prompt again on top of them: feed what follows to the model yourself, or generate without a cache"
            )
        return check_fed(self.tokens)
