"""Law: the subclasses of DynamicCache that pqcodec makes; they differ from it only in ``get_seq_length``."""

from __future__ import annotations

import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.transformers_cache import library
from pqcodec.formats.engines.transformers_cache.fed import check_fed

library.check()
from transformers import cache_utils  # noqa: E402


class KeptCache(cache_utils.DynamicCache):  # type: ignore[misc]
    """A cache that came from a file or a store: ``generate`` cannot feed it its own text again (``fed``)."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache; raises InvalidArgument as ``check_fed`` does."""
        length = int(super().get_seq_length(layer_idx))
        return length if torch.compiler.is_compiling() else check_fed(length)


class RecurrentCache(cache_utils.DynamicCache):  # type: ignore[misc]
    """A cache of recurrent states only, which do not show how many tokens they have seen.

    ``generate`` needs that number to feed only the rest of a prompt; for a DynamicCache of such states it gets 0 and feeds the
    whole prompt again. This class remembers the number for as long as the states stay the same.
    """

    tokens: int | None = None  # seen by the states that ``states`` sums up
    states: list[float] | None = None  # the sums when ``tell`` was called
    is_compileable = False  # otherwise generate would make an attention mask for it

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer, so that generate asks ``get_seq_length``."""
        return [False] * len(self.layers)

    def tell(self, tokens: int) -> None:
        """Set the number of tokens that the states have seen."""
        self.tokens, self.states = tokens, self.sums()

    def sums(self) -> list[float]:
        """The sum of each state tensor, which changes when a token is fed."""
        held = [value for layer in self.layers for value in vars(layer).values()]
        members = [x for value in held for x in (value.values() if isinstance(value, dict) else (value,))]
        return [float(x.double().sum()) for x in members if isinstance(x, torch.Tensor)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the states have seen; raises InvalidArgument where that is not known, and as ``check_fed`` does."""
        if self.tokens is None or self.sums() != self.states:
            raise InvalidArgument(
                "a purely recurrent model's states do not tell how many tokens they have seen, and generate would feed the "
                "prompt again on top of them: feed what follows to the model yourself, or generate without a cache"
            )
        return check_fed(self.tokens)
