"""Law: a trial of how a model continues from a kept cache, on a few tokens, instead of a list of model families.

The cache of a prefix can be reused if its keys and values do not depend on later tokens (in a bidirectional prefix they do), if
the model reads on from the cache (some do so from a recurrent state only when a single token is fed), and if ``generate`` feeds
the model what ``forward`` is fed. Each is tried once for a model, on tokens that are all different.
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

TOKENS, PREFIX, STEPS = 20, 12, 4  # tokens fed at once; those before the cut; those after it that are fed one by one
WIDEST = 1024  # tokens of the largest sliding window for which the cut is placed after a whole window
TOLERANCE = 1e-3  # the largest relative error of the median token, in float32
COARSE_TOLERANCE = 0.05  # in 16 bits, where the order of summation alone causes errors of 0.01
STEPS_ONLY = {"bamba", "falcon_mamba", "jamba", "mamba"}  # model types whose error may be below COARSE_TOLERANCE
WRONG = {"moshi"}  # model types that err beyond a sliding window that is too wide for a trial


@dataclass(frozen=True)
class Behaviour:
    """What a model's cache can be used for."""

    prefixes: bool  # keys and values do not depend on later tokens
    steps: bool  # a token fed on top of a cache gives the logits of one pass over all tokens
    runs: bool  # several tokens fed at once do so too
    generates: bool  # the first logits of ``generate`` are those of ``forward``
    layers: tuple[Any, ...] = ()  # ``layers_of`` the model's own cache
    error: str = ""  # why the model could not be tried

    @property
    def reusable(self) -> bool:
        """Whether the model can continue from the cache of a prefix at all."""
        return self.prefixes and self.steps

    @property
    def objections(self) -> str:
        """The reasons against reusing a prefix, in words; "" without any."""
        if self.error:
            return self.error
        against = [
            "keys and values depend on the tokens behind them" * (not self.prefixes),
            "a token on top of a cache is computed otherwise than in one go" * (not self.steps),
            "generate feeds the model something else than forward is fed" * (not self.generates),
        ]
        return ", ".join(each for each in against if each)


_known: WeakKeyDictionary[Any, dict[Any, Behaviour]] = WeakKeyDictionary()  # by model, then by its identity without weights
_goes_on: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()  # by model, then by identity and inputs
_text_states: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # by model: its module state after a text
_lock = ForkLock()


def behaviour(model: Any, identity: Identity) -> Behaviour:
    """How a model behaves in the trial: a few short forward passes, once for a model in this state.

    ``identity``: the model's current one. For a model that cannot be run every answer is False. torch's random state is kept.
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
    """What a behaviour depends on: the identity without the weights."""
    return tuple(sorted((name, value) for name, value in identity.as_dict().items() if name != "weights"))


def layers_of(state: CacheState) -> tuple[Any, ...]:
    """For each layer its class, and (path, shape without sequences and tokens, dtype) of each tensor; comparable."""
    found = []
    for layer in state.parts[""]:
        tensors = sorted(
            (path, tuple(n for at, n in enumerate(x.shape) if at and at - x.ndim != token_dimension(path)), str(x.dtype))
            for path, x in layer.tensors.items()
        )
        found.append((layer.kind, tuple(tensors)))
    return tuple(found)


def begin_text(model: Any) -> None:
    """Set a model's module state (M-RoPE's deltas), which an image may have changed, to that after a text.

    Keys after a kept prefix of text then get the right positions. Does nothing before ``behaviour`` was called for the model.
    """
    if model in _text_states:
        restore_module_state(model, _text_states[model])


def goes_on(model: Any, identity: Identity, ids: Any, cache: Any, shown: Mapping[str, Any]) -> bool:
    """Whether a model gives the same first logits for a prompt from a kept prefix as from the whole prompt with its inputs.

    ``shown``: the inputs (images ...) by name. Tried once for a model and these names, by computing the prompt in full. The
    cache is not changed.
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
    if before:  # state of another text, from which forward would continue
        restore_module_state(model, dict.fromkeys(before))
    try:
        with torch.no_grad(), _same_random_numbers(model.device):
            found = _on(model, some, max(tokens - TOKENS + PREFIX, 1))
            if before:
                _text_states[model] = module_state(model)
            return found
    except Exception as error:  # any error: this runs the model's own code
        return Behaviour(False, False, False, False, error=f"it could not be run on {tokens} tokens ({error!r:.200})")
    finally:
        if before:
            restore_module_state(model, before)


def _distinct(config: Any, tokens: int) -> Any:
    """Token ids [1, tokens], all different if the vocabulary allows it (equal tokens have equal values), none special."""
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
    """Whether the vectors [..., tokens, n] of most tokens are equal, except for rounding."""
    if x.shape != y.shape:
        return False
    x, y = x.float(), y.float()
    errors = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-30)
    return bool(errors.median() <= tolerance)


def _first_logits(model: Any, ids: Any, **inputs: Any) -> Any:
    """The logits that ``generate`` computes for the token after a prompt: [1, vocabulary]."""
    from transformers import GenerationConfig

    asked = GenerationConfig(
        do_sample=False, num_beams=1, num_return_sequences=1, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    generate: Callable[..., Any] = model.generate
    return generate(ids, generation_config=asked, **inputs).logits[0]


@contextmanager
def _same_random_numbers(device: Any) -> Iterator[None]:
    """A context that restores torch's random state."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        yield
