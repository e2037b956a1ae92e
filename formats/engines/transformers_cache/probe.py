"""Law: how a model goes on from a kept cache, as it shows on a few tokens, so that no family has to be known beforehand.

Keys and values of a prefix can be used again where they do not depend on what follows (a bidirectional prefix's do), where the
model takes up what a cache holds (some take a recurrent state only up when one token is fed), and where ``generate`` feeds a
model what its ``forward`` is fed. Each of these is tried once for a model, on tokens that are all different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pqcodec.formats.engines.model_identity import Identity
from pqcodec.formats.engines.transformers_cache.held import module_state, restore_module_state
from pqcodec.formats.engines.transformers_cache.state import (
    CacheState,
    argument_of,
    cache_of,
    empty_cache,
    frozen,
    state_of,
    token_dimension,
)
from pqcodec.formats.places.locks import ForkLock

TOKENS, PREFIX, STEPS = 20, 12, 4  # fed at once; of them before the cut; and behind it one by one
WIDEST = 1024  # tokens of a sliding window up to which the cut lies behind one
TOLERANCE = 1e-3  # of the median token's relative error in float32
COARSE_TOLERANCE = 0.05  # in 16 bits, where the order of sums alone makes errors of 0.01
STEPS_ONLY = {"bamba", "falcon_mamba", "jamba", "mamba"}  # model types whose error could be too small to be seen in 16 bits
WRONG = {"moshi"}  # model types that lose their way beyond a window that is too wide to be tried


@dataclass(frozen=True)
class Behaviour:
    """What a model's cache can be used for."""

    prefixes: bool  # keys and values do not depend on the tokens behind them
    steps: bool  # one token fed on top of a cache is computed as in one go
    runs: bool  # and so are several
    generates: bool  # the first logits of ``generate`` are those of ``forward``
    layers: tuple[Any, ...] = ()  # of the model's own cache, as ``layers_of`` tells them
    error: str = ""  # where the model could not be run

    @property
    def reusable(self) -> bool:
        """Whether the cache of a prefix can be gone on from at all."""
        return self.prefixes and self.steps

    @property
    def told(self) -> str:
        """What stands against it."""
        if self.error:
            return self.error
        against = [
            "keys and values depend on the tokens behind them" * (not self.prefixes),
            "a token on top of a cache is computed otherwise than in one go" * (not self.steps),
            "generate feeds the model something else than forward is fed" * (not self.generates),
        ]
        return ", ".join(each for each in against if each)


_known: WeakKeyDictionary[Any, dict[Any, Behaviour]] = WeakKeyDictionary()  # by model, and by what it is and how it is run
_goes_on: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()  # and by what is shown
_text_states: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # what a text leaves in a model's modules
_lock = ForkLock()


def behaviour(model: Any, identity: Identity) -> Behaviour:
    """How a model behaves on some tokens; a few short forward passes, the first time it is asked of a model in this state.

    ``identity``: the model's, as it is now. A model that cannot be run on them is trusted with nothing. The random numbers of
    torch stay as they are.
    """
    if model.config.get_text_config(decoder=True).model_type in WRONG:
        return Behaviour(False, False, False, False, error="its decoder goes wrong beyond its window")
    key = _state_in(identity)
    with _lock.held():
        known = _known.setdefault(model, {})
        found = known.get(key)
        if found is None:
            found = _tried(model)
            if "OutOfMemory" not in found.error:
                known[key] = found
        return found


def _state_in(identity: Identity) -> tuple[Any, ...]:
    """All that a behaviour depends on: the identity but for weights."""
    return tuple(sorted((name, value) for name, value in identity.as_dict().items() if name != "weights"))


def layers_of(state: CacheState) -> tuple[Any, ...]:
    """Class, and name, shape (but for sequences and tokens) and dtype of the tensors, of each layer."""
    found = []
    for layer in state.parts[""]:
        tensors = sorted(
            (path, tuple(n for at, n in enumerate(x.shape) if at and at - x.ndim != token_dimension(path)), str(x.dtype))
            for path, x in layer.tensors.items()
        )
        found.append((layer.kind, tuple(tensors)))
    return tuple(found)


def begin_text(model: Any) -> None:
    """Put what a text leaves in a model's modules (M-RoPE's deltas) in the place of what an image left.

    So keys behind a kept prefix of text get the positions that they have behind it; ``behaviour`` has to have been asked.
    """
    if model in _text_states:
        restore_module_state(model, _text_states[model])


def goes_on(model: Any, identity: Identity, ids: Any, cache: Any, shown: Mapping[str, Any]) -> bool:
    """Whether a model says the same of a prompt from a kept prefix as from all of it and what it is shown.

    Tried once for a model and the names of what it is shown: the prompt is computed in full. The cache stays as it is.
    """
    import torch

    key = (_state_in(identity), frozenset(shown))
    with _lock.held():
        known = _goes_on.setdefault(model, {})
        if key not in known:
            kept = cache_of(frozen(state_of(cache, model.config)))
            with torch.no_grad(), _same_random_numbers(model.device):
                here = _first_logits(model, ids, **{argument_of(model): kept})
                known[key] = _like(here, _first_logits(model, ids, **shown), _tolerance(model))
        return known[key]


def _tried(model: Any) -> Behaviour:
    import torch

    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or 0
    tokens = TOKENS + (int(window) if window <= WIDEST else 0)
    tokens = min(tokens, int(getattr(config, "max_position_embeddings", None) or tokens + 1) - 1)
    some = _distinct(model.config, tokens).to(model.device)
    before = module_state(model)
    if before:  # of another text, which forward would go on from
        restore_module_state(model, dict.fromkeys(before))
    try:
        with torch.no_grad(), _same_random_numbers(model.device):
            found = _on(model, some, max(tokens - TOKENS + PREFIX, 1))
            if before:
                _text_states[model] = module_state(model)
            return found
    except Exception as error:  # of any kind: it is the model's code that runs
        return Behaviour(False, False, False, False, error=f"it could not be run on {tokens} tokens ({error!r:.200})")
    finally:
        if before:
            restore_module_state(model, before)


def _distinct(config: Any, tokens: int) -> Any:
    """Token ids [1, n], as different as the vocabulary allows, for alike ones have alike values; none that is special."""
    import torch

    text = config.get_text_config(decoder=True)
    special: set[int] = set()
    for part in (config, text):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= set(value if isinstance(value, (list, tuple)) else [value])
    plain = [token for token in range(int(text.vocab_size)) if token not in special] or [0]
    order = np.random.default_rng(0).permutation(len(plain))
    return torch.tensor([[plain[order[at % len(order)]] for at in range(tokens)]])


def _on(model: Any, ids: Any, cut: int) -> Behaviour:
    import torch

    argument, tolerance = argument_of(model), _tolerance(model)

    def fed(cache: Any, first: int, last: int) -> Any:
        return model(input_ids=ids[:, first:last], use_cache=True, **{argument: cache}).logits

    def like(x: Any, y: Any) -> bool:
        return _like(x, y, tolerance)

    whole, part = empty_cache(model.config), empty_cache(model.config)
    logits = fed(whole, 0, ids.shape[1])
    fed(part, 0, cut)
    filled, before = state_of(whole, model.config), frozen(state_of(part, model.config))
    prefixes = True
    for long, short in zip(filled.parts[""], before.parts[""], strict=True):
        for path in ("keys", "values") if long.cuttable and short.kept else ():
            prefixes &= like(long.tensors[path][..., :cut, :], short.tensors[path])
    going_on = cache_of(frozen(before))
    stepwise = torch.cat([fed(going_on, at, at + 1) for at in range(cut, min(cut + STEPS, ids.shape[1]))], dim=1)
    steps = like(stepwise, logits[:, cut : cut + STEPS])
    runs = like(fed(cache_of(frozen(before)), cut, ids.shape[1]), logits[:, cut:])
    return Behaviour(
        prefixes,
        steps,
        runs and model.config.get_text_config(decoder=True).model_type not in STEPS_ONLY,
        like(_first_logits(model, ids), logits[:, -1]),
        layers_of(filled),
    )


def _tolerance(model: Any) -> float:
    import torch

    coarse = model.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(model.device.type)
    return COARSE_TOLERANCE if coarse else TOLERANCE


def _like(x: Any, y: Any, tolerance: float) -> bool:
    """Whether most tokens' numbers [..., tokens, numbers] are the same, but for rounding."""
    if x.shape != y.shape:
        return False
    x, y = x.float(), y.float()
    errors = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-30)
    return bool(errors.median() <= tolerance)


def _first_logits(model: Any, ids: Any, **inputs: Any) -> Any:
    """What ``generate`` computes behind a prompt: [1, vocabulary]."""
    from transformers import GenerationConfig

    asked = GenerationConfig(
        do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    generate: Callable[..., Any] = model.generate
    return generate(ids, generation_config=asked, **inputs).logits[0]


@contextmanager
def _same_random_numbers(device: Any) -> Iterator[None]:
    """Put torch's random numbers back where they were."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        yield
