"""Law: mlx-lm's prompt caches, which are safetensors files: which of their tensors are keys and values.

``save_prompt_cache`` writes layer i's state as tensors "i.0", "i.1" ... and the class of each layer's cache into the metadata.
Of the classes here the first two tensors are keys and values [batch, heads, tokens, head_dim].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CLASSES = frozenset({"KVCache", "RotatingKVCache", "ConcatenateKVCache", "ChunkedKVCache", "BatchKVCache"})
_CLASS_OF_LAYER = re.compile(r"[12]\.([0-9]{1,6})")  # 1.3 of newer files, 2.3 of older ones


def regexes_of(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """Regexes of keys' and of values' names in a file with this ``__metadata__``; None where it is no prompt cache.

    >>> regexes_of({"0.model": "tiny", "1.0": "KVCache", "1.1": "ArraysCache", "1.2": "RotatingKVCache"})
    ('^(?P<layer>0|2)[.]0$', '^(?P<layer>0|2)[.]1$')
    """
    found = (_CLASS_OF_LAYER.fullmatch(key) for key, value in metadata.items() if value in CLASSES)
    layers = "|".join(sorted({match[1] for match in found if match}, key=int))
    return (rf"^(?P<layer>{layers})[.]0$", rf"^(?P<layer>{layers})[.]1$") if layers else None
