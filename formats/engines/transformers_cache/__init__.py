"""The caches of transformers (5.24): their state, files, RoPE and state in modules, and how a model uses a kept one."""

from pqcodec.formats.engines.transformers_cache.begun import begin, check_begun
from pqcodec.formats.engines.transformers_cache.devices import layer_devices, placed
from pqcodec.formats.engines.transformers_cache.fed import check_fed
from pqcodec.formats.engines.transformers_cache.files import KEY, load, save, tensors_of
from pqcodec.formats.engines.transformers_cache.held import keeps_module_state, module_state, restore_module_state
from pqcodec.formats.engines.transformers_cache.probe import Behaviour, begin_text, behaviour, goes_on, layers_of
from pqcodec.formats.engines.transformers_cache.rope import frequencies, longest_prefix, pairings, rope_of, ropes
from pqcodec.formats.engines.transformers_cache.state import (
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
    padding_of,
    state_of,
    tell_tokens,
    tokens_along,
)

__all__ = [
    "KEY",
    "ROLES",
    "Behaviour",
    "CacheState",
    "LayerState",
    "along",
    "argument_of",
    "begin",
    "begin_text",
    "behaviour",
    "cache_of",
    "check_begun",
    "check_fed",
    "check_layers",
    "continues",
    "empty_cache",
    "frequencies",
    "frozen",
    "goes_on",
    "joined",
    "keeps_module_state",
    "layer_devices",
    "layers_of",
    "load",
    "longest_prefix",
    "module_state",
    "padding_of",
    "pairings",
    "placed",
    "restore_module_state",
    "rope_of",
    "ropes",
    "save",
    "state_of",
    "tell_tokens",
    "tensors_of",
    "tokens_along",
]
