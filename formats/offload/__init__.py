"""Law: KV caches are kept encoded outside the tensors that attention reads, and decoded when attention needs them again.

``HostPool`` keeps blocks of tensors in host memory. ``encode_blocks`` and ``decode_blocks`` read and write the block tables of
serving engines, and ``CodedPages`` attends to encoded ones where they lie. ``EncodedCache`` is a cache for transformers, and
``CapturedSteps`` makes its steps CUDA graphs; transformers is imported only when one of these names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pqcodec.formats.engines.block_tables import LAYOUTS, decode_blocks, encode_blocks, gather_blocks, scatter_blocks
from pqcodec.formats.engines.coded_pages import CodedPages, PreparedPages
from pqcodec.formats.engines.page_segments import RawTokens, Segment
from pqcodec.formats.offload.host_pool import Counters, Get, HostPool, Put, Usage
from pqcodec.formats.offload.pinned import ArenaFull, PinnedArena, PinnedSlice

if TYPE_CHECKING:
    from pqcodec.formats.offload.captured_steps import CapturedSteps
    from pqcodec.formats.offload.encoded_cache import EncodedCache

__all__ = [
    "LAYOUTS",
    "ArenaFull",
    "CapturedSteps",
    "CodedPages",
    "Counters",
    "EncodedCache",
    "Get",
    "HostPool",
    "PinnedArena",
    "PinnedSlice",
    "PreparedPages",
    "Put",
    "RawTokens",
    "Segment",
    "Usage",
    "decode_blocks",
    "encode_blocks",
    "gather_blocks",
    "scatter_blocks",
]

_OF_TRANSFORMERS = {"CapturedSteps": "captured_steps", "EncodedCache": "encoded_cache"}  # modules that import it


def __getattr__(name: str) -> Any:
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pqcodec.formats.offload.{_OF_TRANSFORMERS[name]}"), name)
