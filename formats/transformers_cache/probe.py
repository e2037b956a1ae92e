"""Law: how a model goes on from a kept cache, as it shows on a few tokens, so that no family has to be known beforehand.

Keys and values of a prefix can be used again where they do not depend on what follows (a bidirectional prefix's do), where the
model takes up what a cache holds (some take a recurrent state only up when one token is fed), and where ``generate`` feeds a
model what its ``forward`` is fed. Each of these is tried once for a model object, on some tokens of a prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from pqcodec.formats.transformers_cache.held import module_state, restore_module_state
from pqcodec.formats.transformers_cache.state import argument_of, cache_of, empty_cache, frozen, state_of

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

    @property
    def reusable(self) -> bool:
        """Whether the cache of a prefix can be gone on from at all."""
        return self.prefixes and self.steps


NONE = Behaviour(False, False, False, False)

_known: WeakKeyDictionary[Any, dict[Any, Behaviour]] = WeakKeyDictionary()  # by model, and by how it is run
_goes_on: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()  # by model, and by what is shown
_text_states: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # what a text leaves in a model's modules
_lock = threading.Lock()


def behaviour(model: Any, ids: Any) -> Behaviour:
    """How a model behaves on the first of the ids [1, n]; a few short forward passes, the first time it is asked.

    A model that cannot be run on them is trusted with nothing. The random numbers of torch stay as they are.
    """
    import torch

    if model.config.get_text_config(decoder=True).model_type in WRONG:
        return NONE
    cast = torch.get_autocast_dtype(model.device.type) if torch.is_autocast_enabled(model.device.type) else None
    run = (model.training, getattr(model.config, "_attn_implementation", None), cast)
    with _lock:
        known = _known.setdefault(model, {})
        if run not in known:
            known[run] = _tried(model, ids)
        return known[run]


def begin_text(model: Any) -> None:
    """Put what a text leaves in a model's modules (M-RoPE's deltas) in the place of what an image left.

    So keys behind a kept prefix of text get the positions that they have behind it; ``behaviour`` has to have been asked.
    """
    if model in _text_states:
        restore_module_state(model, _text_states[model])


def goes_on(model: Any, ids: Any, cache: Any, shown: Mapping[str, Any]) -> bool:
    """Whether a model says the same of a prompt from a kept prefix as from all of it and what it is shown.

    Tried once for a model and the names of what it is shown: the prompt is computed in full. The cache stays as it is.
    """
    import torch

    names = frozenset(shown)
    with _lock:
        known = _goes_on.setdefault(model, {})
        if names not in known:
            kept = cache_of(frozen(state_of(cache, model.config)))
            with torch.no_grad(), _same_random_numbers(model.device):
                here = _first_logits(model, ids, **{argument_of(model): kept})
                known[names] = _like(here, _first_logits(model, ids, **shown), _tolerance(model))
        return known[names]


def _tried(model: Any, ids: Any) -> Behaviour:
    import torch

    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) or 0
    tokens = TOKENS + (int(window) if window <= WIDEST else 0)
    tokens = min(tokens, int(getattr(config, "max_position_embeddings", None) or tokens + 1) - 1)
    some = ids.to(model.device).repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    before = module_state(model)
    if before:  # of another text, which forward would go on from
        restore_module_state(model, dict.fromkeys(before))
    try:
        with torch.no_grad(), _same_random_numbers(model.device):
            found = _on(model, some, max(tokens - TOKENS + PREFIX, 1))
            if before:
                _text_states[model] = module_state(model)
            return found
    except Exception:  # of any kind: it is the model's code that runs
        return NONE
    finally:
        if before:
            restore_module_state(model, before)


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
    before = frozen(state_of(part, model.config))
    prefixes = True
    for long, short in zip(state_of(whole, model.config).parts[""], before.parts[""], strict=True):
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
