"""Law: which models, and which of their layers, can have an EncodedCache, from the model's config."""

from __future__ import annotations

from typing import Any

from pqcodec.errors import InvalidArgument

_OWN_CACHES = {"minimax": "MiniMaxCache"}  # model types that take one class of cache only


def check_encodable(config: Any) -> None:
    """Raise InvalidArgument for a model that reads keys past ``update``, or that takes only a class of cache of its own."""
    kind = str(getattr(config, "model_type", type(config).__name__))
    if kind in _OWN_CACHES:
        raise InvalidArgument(f"a {kind} takes a {_OWN_CACHES[kind]} alone, not an EncodedCache: call generate without a cache")
    if getattr(config, "cross_attention_layers", None):
        raise InvalidArgument(
            f"a {kind} looks for its images' keys in the cache itself, where an EncodedCache has none: take a DynamicCache"
        )


def lending_layers(config: Any) -> set[int]:
    """Layers whose keys and values later layers read again, when the scratch holds others already."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return {index for index, mode in enumerate(modes) if mode == "store"}
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    return set({kind: index for index, kind in enumerate(kinds[: len(kinds) - shared])}.values()) if shared else set()
