"""Law: a prefix's cache, taken apart and put together again by ``transformers_cache``, and what a model reads on from it.

Every model whose cache ``transformers_cache`` takes can be read: its tensors have that package's names (``layers.3.key``), a
sliding window holds the last tokens alone, and what is neither key nor value stays as the model made it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import model as lm
from pqcodec.formats.engines import transformers_cache as kept
from pqcodec.formats.engines.transformers_cache import CacheState, LayerState
from pqcodec.formats.policy.names import TensorRole

Tensors = Mapping[str, torch.Tensor]  # keys and values by their names, [1, Hkv, tokens, head_dim]

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the needles, as shares of the prefix
UNASKED = -1  # in place of a token that nobody is to foretell


@dataclass(frozen=True)
class Prefix:
    """The cache of a prefix; ``roles`` tells of each coded tensor its role, its layer, its RoPE and its first token."""

    state: CacheState
    roles: Mapping[str, TensorRole]
    exact: Tensors  # float32, as the model made them

    @classmethod
    def of(cls, model: Any, ids: torch.Tensor) -> Prefix:
        """Run the model over ids [T]; raises InvalidArgument for a cache that pqcodec cannot save."""
        cache = kept.empty_cache(model.config)
        with torch.inference_mode():
            model(input_ids=ids[None], logits_to_keep=1, **{kept.argument_of(model): cache})
        state = kept.state_of(cache, model.config)
        tensors, roles, coded = kept.tensors_of(model.config, state, kept.pairings(model.config, state))
        return cls(state, {name: roles[name] for name in coded}, {name: tensors.read(name) for name in coded})

    def stored(self) -> Tensors:
        """The tensors in float16, which is what every codec is given."""
        return {name: x.half() for name, x in self.exact.items()}

    def cache(self, tensors: Tensors | None = None) -> Any:
        """A new cache for the model, some of its tensors replaced."""

        def replaced(prefix: str, layer: LayerState) -> LayerState:
            names = {path: f"{prefix}.{kept.ROLES.get(path, path)}" for path in layer.tensors}
            found = {path: (tensors or {}).get(names[path], x) for path, x in layer.tensors.items()}
            return LayerState(layer.kind, found, layer.fields)

        layers = [replaced(prefix, layer) for prefix, _, layer in self.state.layers()]
        return kept.cache_of(kept.frozen(CacheState(self.state.kind, {"": layers})))

    def layer(self, index: int) -> LayerState:
        return self.state.parts[""][index]

    def layers(self) -> list[int]:
        """Layers that have a key and a value."""
        return sorted({tensor.layer for tensor in self.roles.values() if tensor.layer is not None})


@dataclass(frozen=True)
class Window:
    """Token ids of a piece of text: the prefix that is cached, what is fed after it, and what follows each token fed."""

    prefix: torch.Tensor
    fed: torch.Tensor
    following: torch.Tensor


def windows_of(ids: torch.Tensor, opening: torch.Tensor, count: int, prefix: int, scored: int) -> list[Window]:
    """So many windows, evenly spaced over a text's ids [n], which do not overlap; each prefix begins with the ``opening``.

    >>> [window.prefix.tolist() for window in windows_of(torch.arange(20), torch.tensor([99]), 2, 4, 3)]
    [[99, 0, 1, 2], [99, 13, 14, 15]]
    """
    length = prefix - len(opening) + scored + 1
    room = len(ids) - length
    if len(ids) < count * length or prefix <= len(opening):
        raise SystemExit(f"the text has {len(ids)} tokens; {count} windows of {length} do not fit: take fewer or shorter ones")
    found = []
    for number in range(count):
        first = number * room // (count - 1) if count > 1 else 0
        read = torch.cat([opening, ids[first : first + length]])
        found.append(Window(read[:prefix], read[prefix:-1], read[prefix + 1 :]))
    return found


@dataclass(frozen=True)
class Reading:
    """A prefix's cache and what the model says from it when it is fed the window's ids: logits float32 [n, vocabulary]."""

    prefix: Prefix
    fed: torch.Tensor
    following: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, model: Any, window: Window) -> Reading:
        prefix = Prefix.of(model, window.prefix)
        return cls(prefix, window.fed, window.following, lm.continuation_logits(model, prefix.cache(), window.fed))


def needle_windows(tokenizer: Any, ids: torch.Tensor, opening: torch.Tensor, prefix: int) -> list[Window]:
    """A window for each depth: a pass key hidden in the text's first tokens, asked for behind them."""
    windows = []
    for number, depth in enumerate(DEPTHS):
        key = str(random.Random(number).randrange(10_000, 100_000))
        needle = lm.token_ids(tokenizer, f"\n\nThe secret pass key is {key}. Remember it. {key} is the secret pass key.\n\n")
        question = lm.token_ids(tokenizer, "\n\nThe secret pass key is")
        answer = lm.token_ids(tokenizer, f" {key}")
        around = prefix - len(opening) - len(needle)
        place = int(depth * around)
        hay = torch.cat([opening, ids[:place], needle, ids[place:around]])
        following = torch.cat([torch.full((len(question) - 1,), UNASKED), answer])
        windows.append(Window(hay, torch.cat([question, answer[:-1]]), following))
    return windows
