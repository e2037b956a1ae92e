"""Law: the caches of transformers, whole; this folder is the only place that knows transformers."""

from pqcodec.formats.transformers_cache.files import KEY, load, save, tensors_of
from pqcodec.formats.transformers_cache.rope import frequencies, longest_prefix, pairings, rope_of, ropes
from pqcodec.formats.transformers_cache.state import (
    ROLES,
    CacheState,
    LayerState,
    along,
    argument_of,
    cache_of,
    check_layers,
    continues,
    empty_cache,
    frozen,
    joined,
    state_of,
    tokens_along,
)

__all__ = [
    "KEY",
    "ROLES",
    "CacheState",
    "LayerState",
    "along",
    "argument_of",
    "cache_of",
    "check_layers",
    "continues",
    "empty_cache",
    "frequencies",
    "frozen",
    "joined",
    "load",
    "longest_prefix",
    "pairings",
    "rope_of",
    "ropes",
    "save",
    "state_of",
    "tensors_of",
    "tokens_along",
]
