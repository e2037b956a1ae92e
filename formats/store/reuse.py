"""Law: whether the cache of a prefix can be gone on from: by the model that is to do it, and by what it was begun with."""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats import transformers_cache as tc
from pqcodec.formats.model_identity import Identity, unwrapped
from pqcodec.formats.store import contents

_BEGUN_BY = "pqcodec_begun_by"  # attribute of a cache from a store: the digest of the model's identity then


def takes_several(model: Any, ids: np.ndarray, extra: str) -> bool:
    """Whether a model takes several tokens on top of a cache; nothing is known, and so believed, of an Identity.

    Tried once, on the first of the ids [n]. Raises InvalidArgument for a model whose prefixes cannot be used again, and for
    tokens that stand for images, video or sound of which ``extra`` tells nothing.
    """
    if isinstance(model, Identity) or not len(ids):
        return True
    import torch

    model = unwrapped(model)
    text = contents.text_of(ids.tolist(), model.config)
    if len(text) < len(ids) and tc.keeps_module_state(model):
        raise InvalidArgument(
            f"{type(model).__name__} keeps the positions of what it is shown in its modules, beside the cache; "
            "save such caches with transformers_cache.save"
        )
    if len(text) < len(ids) and not extra:
        raise InvalidArgument(
            "some tokens stand for something shown: pass a digest of it as extra, or call PrefixStore.generate"
        )
    behaviour = tc.behaviour(model, torch.tensor([text or [0]]))
    if not behaviour.reusable:
        raise InvalidArgument(
            f"{type(model).__name__} does not compute the same from a kept prefix ({behaviour}), so none can be used again"
        )
    return behaviour.runs


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


def begin(cache: Any, identity: Identity) -> None:
    """Note on a cache by which model, and how run, it was begun."""
    setattr(cache, _BEGUN_BY, identity.digest())


def check_begun(cache: Any, identity: Identity) -> None:
    """Raises InvalidArgument for a cache that was begun by another model, or one that has changed meanwhile."""
    if getattr(cache, _BEGUN_BY, identity.digest()) != identity.digest():
        raise InvalidArgument("the model, or how it is run, has changed since this cache was begun; compute it anew")
