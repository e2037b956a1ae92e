"""Law: whether the cache of a prefix can be gone on from: by the model that is to do it, and by what it was begun with."""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats import transformers_cache as tc
from pqcodec.formats.model_identity import Identity, unwrapped
from pqcodec.formats.store import contents

_BEGUN_BY = "pqcodec_begun_by"  # attribute of a cache from a store: the digest of the model's identity then, and the preset


def behaviour_of(model: Any, identity: Identity, ids: np.ndarray, extra: str) -> tc.Behaviour | None:
    """How a model goes on from a cache of ids [n]; None where nothing is known, and so all believed: of an Identity alone.

    Raises InvalidArgument for a model whose prefixes cannot be used again, and for tokens that stand for images, video or
    sound of which ``extra`` tells nothing.
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
        raise InvalidArgument(f"no prefix of {type(model).__name__} can be used again: {behaviour.told}")
    return behaviour


def check_layers(behaviour: tc.Behaviour, state: tc.CacheState) -> None:
    """Raises InvalidArgument for a cache whose layers are not those of the model's own."""
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


def begin_text(model: Any) -> None:
    """Put back what an image left in a model's modules."""
    if not isinstance(model, Identity):
        tc.begin_text(unwrapped(model))


def beside(cache: Any, model: Any) -> Any:
    """A cache whose layers lie where the model's do, for a model on several devices."""
    devices = tc.layer_devices(unwrapped(model))
    moved = tc.cache_of(tc.placed(tc.state_of(cache), devices))
    vars(moved).update({name: value for name, value in vars(cache).items() if name != "layers"})
    return moved


def begin(cache: Any, identity: Identity, preset: str) -> None:
    """Note on a cache by which model, and how run, it was begun, and of which preset its numbers are ("": nothing was kept)."""
    setattr(cache, _BEGUN_BY, (identity.digest(), preset))


def check_begun(cache: Any, identity: Identity, preset: str) -> None:
    """Raises InvalidArgument for a cache that was begun by another model, or one that has changed, or with another preset."""
    digest, before = getattr(cache, _BEGUN_BY, (identity.digest(), preset))
    if digest != identity.digest():
        raise InvalidArgument("the model, or how it is run, has changed since this cache was begun; compute it anew")
    if before not in ("", preset):
        raise InvalidArgument(
            f"this cache goes on from blocks of preset {before}, whose errors a store of preset {preset} would keep as its; "
            "compute it anew"
        )
