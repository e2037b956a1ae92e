"""Law: whether a model can continue from the cache of a prefix, and whether a cache may be stored as one."""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.model_identity import Identity, unwrapped
from pqcodec.formats.store import contents


def behaviour_of(model: Any, identity: Identity, ids: np.ndarray, extra: str) -> tc.Behaviour | None:
    """How a model continues from a cache of ids [n]; None, for no restrictions, if only an Identity or no token is given.

    Raises InvalidArgument for a model whose prefixes cannot be reused, and for placeholders of images, video or sound
    without an ``extra``.
    """
    if isinstance(model, Identity) or not len(ids):
        return None
    model = unwrapped(model)
    if not contents.is_text(ids.tolist(), model.config):
        if tc.keeps_module_state(model):
            raise InvalidArgument(
                f"{type(model).__name__} keeps the positions of what it is shown in its modules, beside the cache; "
                "save such caches with transformers_cache.save"
            )
        if not extra:
            raise InvalidArgument(
                "some tokens stand for something shown: pass a digest of it as extra, or call PrefixStore.generate"
            )
    behaviour = tc.behaviour(model, identity)
    if not behaviour.reusable:
        raise InvalidArgument(f"no prefix of {type(model).__name__} can be used again: {behaviour.objections}")
    return behaviour


def check_same_layers(behaviour: tc.Behaviour, state: tc.CacheState) -> None:
    """Raises InvalidArgument for a cache whose layers differ from those of the model's own cache."""
    own, found = behaviour.layers, tc.layers_of(state)
    if len(found) != len(own):
        raise InvalidArgument(f"a cache of {len(found)} layers; the model's own has {len(own)}")
    for number, (mine, its) in enumerate(zip(own, found, strict=True)):
        if mine != its:
            raise InvalidArgument(
                f"layer {number} of the cache is {_shown(its)}; the model's own is {_shown(mine)}: pass the cache that the "
                "model filled, such as DynamicCache(config=model.config)"
            )


def _shown(layer: Any) -> str:
    kind, tensors = layer
    return f"a {kind} of {', '.join(f'{path} {shape} {dtype}' for path, shape, dtype in tensors) or 'nothing'}"


def restore_text_state(model: Any) -> None:
    """Reset the state that an image left in a model's modules to that after text."""
    if not isinstance(model, Identity):
        tc.begin_text(unwrapped(model))


def beside(cache: Any, model: Any) -> Any:
    """The cache with its layers moved to the devices of the model's layers."""
    devices = tc.layer_devices(unwrapped(model))
    moved = tc.cache_of(tc.placed(tc.state_of(cache), devices))
    vars(moved).update({name: value for name, value in vars(cache).items() if name != "layers"})
    return moved


def kept_state(
    cache: Any, identity: Identity, preset: str, behaviour: tc.Behaviour | None, tokens: int
) -> tuple[tc.CacheState, int]:
    """A cache's state, and how many of ``tokens`` it has seen; raises InvalidArgument if it cannot be put."""
    tc.check_begun(cache, identity, preset)
    state = tc.state_of(cache, identity.config)
    if state.kind != "DynamicCache":
        raise InvalidArgument(f"a {state.kind} depends on more than its tokens; save it with transformers_cache.save")
    if behaviour is not None:
        check_same_layers(behaviour, state)
    layers = state.parts[""]
    batches = {size for layer in layers for size in layer.batches()}
    if batches - {1}:
        raise InvalidArgument(f"a cache of {max(batches)} sequences; put each one by itself (batch 1)")
    lengths = {layer.tokens for layer in layers if layer.tokens}
    if len(lengths) > 1:
        raise InvalidArgument(f"layers that have seen {sorted(lengths)} tokens; one number is expected")
    cached = lengths.pop() if lengths else tokens
    if tokens < cached:
        raise InvalidArgument(
            f"{tokens} tokens, but the cache holds {cached} positions: of other tokens, or of a prompt that was learned; "
            "pass all tokens that the model was fed"
        )
    longest = tc.longest_prefix(identity.config)
    if longest is not None and cached > longest:
        raise InvalidArgument(
            f"{cached} tokens: this model's RoPE scaling changes all keys of sequences beyond {longest} tokens, "
            "so that a longer prefix cannot be used again"
        )
    return state, cached
