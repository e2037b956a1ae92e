"""Law: the paged caches of serving engines: which slot of which block of the engine holds each token of a sequence.

A layout is named by its dimensions, never guessed from a shape: with 2 blocks or 2 heads several would fit. ``2`` is the
dimension of keys and values; without it they are two tensors. Token t of a sequence is in block ``table[t // block]``, at slot
t % block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.backends import on_device
from pqcodec.batch import EncodeBatch
from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats.policy.recipe import preset_pair
from pqcodec.options import EncodeOptions
from pqcodec.placed import DeviceSource
from pqcodec.stages.centre import Halves, Rope
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import is_torch

LAYOUTS = (
    "2,blocks,block,heads,dim",
    "2,blocks,heads,block,dim",
    "blocks,2,block,heads,dim",
    "blocks,2,heads,block,dim",
    "blocks,block,heads,dim",
    "blocks,heads,block,dim",
)
_ADVICE = "mend the cache, or pass what gather_blocks returns to encode() with nonfinite='exact'"
_ORDER = ("blocks", "block", "heads", "dim")


def encode_blocks(
    kv_cache: Any,
    layout: str,
    block_table: Any,
    tokens: int,
    *,
    first_token: int = 0,
    preset: str | tuple[str, str] = DEFAULT_PRESET,
    center: str | None = None,
    rope: Rope | None = None,
    exact_tokens: int = 0,
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
    means: Halves | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """Streams of keys and of values [heads, tokens, dim] of a sequence's tokens from ``first_token`` on.

    ``kv_cache``: one tensor, or a pair of keys and values, of a ``layout`` in LAYOUTS. ``center``: of the keys. ``rope``, which
    implies center="rope": its first position is that of the sequence's token 0. ``means``: what is subtracted from the keys
    instead of their own mean (``centre.stored_means``). ``preset``: one for both, or (keys, values).
    Streams are bytes for a cache on the CPU, uint8 tensors on the GPU for one there. Raises InvalidArgument and
    NonFiniteInput.

    >>> import torch
    >>> cache = torch.zeros(2, 10, 16, 4, 64, dtype=torch.float16)
    >>> keys, values = encode_blocks(cache, "2,blocks,block,heads,dim", [7, 3], 20, backend="reference")
    >>> decode_blocks((keys, values), cache, "2,blocks,block,heads,dim", [1, 0], backend="reference")
    20
    """
    pair = gather_blocks(kv_cache, layout, block_table, tokens, first_token=first_token)
    if rope is not None:
        rope = replace(rope, first_position=rope.first_position + first_token)
    centers = (center or ("rope" if rope is not None else None), None)
    presets = preset_pair(preset)
    for name in presets:
        check_restores(name, "decode_blocks")
    same: dict[str, Any] = {"exact_tokens": exact_tokens, "chunk_tokens": chunk_tokens}
    options = [
        EncodeOptions(name, center=one, rope=rope if one == "rope" else None, **same)
        for name, one in zip(presets, centers, strict=True)
    ]
    wanted = list(zip(pair, options, (means, None), strict=True))
    try:
        if not on_device(backend, pair[0].device.type):
            keys, values = (codec.encode_by(each, x, backend, means=taken)[1] for x, each, taken in wanted)
            return keys, values
        rows = [arrays.device_rows(x) for x in pair]
        headers = [each.header(r.shape, r.dtype) for each, r in zip(options, rows, strict=True)]
        batches = [
            EncodeBatch.of_rows([r], [h], backend, means=taken)
            for r, h, taken in zip(rows, headers, (means, None), strict=True)
        ]
        streams = [batch.run()[0] for batch in batches]
        for batch in batches:
            batch.check()
    except NonFiniteInput as error:
        raise NonFiniteInput(error.found, _ADVICE) from None
    return streams[0], streams[1]


def decode_blocks(
    streams: Sequence[Any],
    kv_cache: Any,
    layout: str,
    block_table: Any,
    *,
    first_token: int = 0,
    backend: str = "auto",
) -> int:
    """Decode streams of keys and values into the blocks of a sequence, from ``first_token`` on; returns the number of tokens.

    Raises before anything is written: InvalidArgument where heads, dim or dtype of the streams are not the cache's, or the
    table names a block twice; for damaged streams as ``decode`` does.

    >>> import torch
    >>> layout, cache = "2,blocks,block,heads,dim", torch.ones(2, 10, 16, 4, 64, dtype=torch.float16)
    >>> streams = encode_blocks(cache, layout, [7, 3], 20, backend="reference")
    >>> empty = torch.zeros_like(cache)
    >>> decode_blocks(streams, empty, layout, [1, 0], backend="reference"), empty[0, :, :, 0, 0].count_nonzero(-1).tolist()
    (20, [4, 16, 0, 0, 0, 0, 0, 0, 0, 0])
    """
    caches = views_of(kv_cache, layout)
    if len(streams) != len(caches):
        raise InvalidArgument(f"{len(streams)} streams are given; two are expected, of keys and of values")
    found = [codec.inspect(DeviceSource(stream) if is_torch(stream) else stream) for stream in streams]
    for name, info, cache in zip(("keys", "values"), found, caches, strict=True):
        heads, dim, dtype = cache.shape[2], cache.shape[3], str(cache.dtype).removeprefix("torch.")
        if len(info.shape) != 3 or (info.shape[0], info.shape[2], info.dtype) != (heads, dim, dtype):
            raise InvalidArgument(
                f"the stream of {name} holds {info.dtype} {info.shape}, the cache wants {dtype} ({heads}, tokens, {dim})"
            )
    tokens = found[0].shape[1]
    if found[1].shape[1] != tokens:
        raise InvalidArgument(
            f"the keys' stream holds {tokens} tokens, the values' {found[1].shape[1]}; pass two that belong together"
        )
    slots = slots_of(caches[0], block_table, tokens, first_token, once=True)
    device = caches[0].device
    pair = [codec.decode(stream, device=device, backend=backend) for stream in streams]
    _scatter(caches, slots, pair)
    return tokens


def gather_blocks(kv_cache: Any, layout: str, block_table: Any, tokens: int, *, first_token: int = 0) -> tuple[Any, Any]:
    """Keys and values [heads, tokens, dim] of a sequence, copied out of its blocks; raises InvalidArgument.

    >>> import torch
    >>> cache = torch.arange(10.0)[None, :, None, None, None].expand(2, 10, 16, 4, 64)
    >>> keys, values = gather_blocks(cache, "2,blocks,block,heads,dim", [7, 3], 20)
    >>> keys.shape, keys[0, 14:18, 0].tolist()
    (torch.Size([4, 20, 64]), [7.0, 7.0, 3.0, 3.0])
    """
    caches = views_of(kv_cache, layout)
    blocks, rows = slots_of(caches[0], block_table, tokens, first_token, once=False)
    begins = np.flatnonzero((rows == 0) | (np.arange(tokens) == 0))  # the first token in each block
    keys, values = (_gather(cache, blocks[begins], first_token % cache.shape[1], tokens) for cache in caches)
    return keys, values


def scatter_blocks(pair: Sequence[Any], kv_cache: Any, layout: str, block_table: Any, *, first_token: int = 0) -> None:
    """Copy keys and values [heads, tokens, dim] into the blocks of a sequence; raises InvalidArgument before it writes.

    >>> import torch
    >>> cache, x = torch.zeros(2, 10, 16, 4, 64), torch.ones(4, 20, 64)
    >>> scatter_blocks((x, x), cache, "2,blocks,block,heads,dim", [7, 3])
    >>> cache[0, :, :, 0, 0].count_nonzero(-1).tolist()
    [0, 0, 0, 4, 0, 0, 0, 16, 0, 0]
    """
    caches = views_of(kv_cache, layout)
    if len(pair) != len(caches):
        raise InvalidArgument(f"{len(pair)} tensors are given; two are expected, keys and values")
    for name, x, cache in zip(("keys", "values"), pair, caches, strict=True):
        if x.ndim != 3 or (x.shape[0], x.shape[2]) != (cache.shape[2], cache.shape[3]) or x.dtype != cache.dtype:
            raise InvalidArgument(
                f"{name} are {x.dtype} {tuple(x.shape)}, "
                f"the cache wants {cache.dtype} ({cache.shape[2]}, tokens, {cache.shape[3]})"
            )
    if pair[0].shape[1] != pair[1].shape[1]:
        raise InvalidArgument(f"keys hold {pair[0].shape[1]} tokens, values {pair[1].shape[1]}; pass two that belong together")
    _scatter(caches, slots_of(caches[0], block_table, pair[0].shape[1], first_token, once=True), pair)


# -- layouts -------------------------------------------------------------------------------------------------------
def views_of(kv_cache: Any, layout: str) -> list[Any]:
    """Keys and values of an engine's cache as views [blocks, block, heads, dim]; raises InvalidArgument."""
    if layout not in LAYOUTS:
        raise InvalidArgument(f"layout {layout!r} is unknown; choose from {', '.join(map(repr, LAYOUTS))}")
    names = layout.split(",")
    joined = "2" in names
    tensors = [kv_cache] if joined else list(kv_cache) if isinstance(kv_cache, (list, tuple)) else [kv_cache]
    if not joined and len(tensors) != 2:
        raise InvalidArgument(f"layout {layout!r} is that of two tensors, keys and values; pass both as a pair")
    for x in tensors:
        if not is_torch(x):
            raise InvalidArgument(f"the cache is a {type(x).__name__}; layout {layout!r} is that of torch tensors")
        if x.ndim != len(names) or (joined and x.shape[names.index("2")] != 2):
            raise InvalidArgument(f"the cache has shape {tuple(x.shape)}, which is not {layout!r}")
    if joined:
        tensors = list(kv_cache.unbind(names.index("2")))
        names.remove("2")
    caches = [x.permute([names.index(name) for name in _ORDER]) for x in tensors]
    if caches[0].shape[:2] != caches[1].shape[:2] or caches[0].device != caches[1].device:
        raise InvalidArgument(
            f"keys {tuple(tensors[0].shape)} on {tensors[0].device} and values {tuple(tensors[1].shape)} on "
            f"{tensors[1].device} have not the same blocks"
        )
    return caches


def slots_of(cache: Any, block_table: Any, tokens: int, first_token: int, once: bool) -> tuple[np.ndarray, np.ndarray]:
    """Block and slot of each token, int64 [tokens] each; ``once``: refuse a table that names a block twice.

    Raises InvalidArgument.
    """
    blocks, size = cache.shape[:2]
    table = np.asarray(block_table.cpu() if is_torch(block_table) else block_table)
    if table.ndim != 1 or (table.size and table.dtype.kind not in "iu"):
        raise InvalidArgument(f"block_table is {table.dtype} {table.shape}; a list of block numbers [n] is expected")
    if tokens < 0 or first_token < 0:
        raise InvalidArgument(f"{tokens} tokens from {first_token} on; neither may be negative")
    needed = -(-(first_token + tokens) // size)
    if needed > table.size:
        raise InvalidArgument(
            f"tokens {first_token} .. {first_token + tokens - 1} take {needed} blocks of {size}, block_table names {table.size}"
        )
    used = table[first_token // size : needed].astype(np.int64)
    outside = used[(used < 0) | (used >= blocks)]
    if outside.size:
        raise InvalidArgument(f"block_table names block {outside[0]}, the cache has blocks 0 .. {blocks - 1}")
    if once and np.unique(used).size < used.size:
        names, counts = np.unique(used, return_counts=True)
        raise InvalidArgument(f"block_table names block {names[counts > 1][0]} twice; tokens would overwrite each other")
    numbers, rows = np.divmod(first_token + np.arange(tokens), size)
    return used[numbers - first_token // size], rows


def _gather(cache: Any, blocks: np.ndarray, skipped: int, tokens: int) -> Any:
    """``tokens`` tokens of some blocks after the first ``skipped``: [heads, tokens, dim]."""
    import torch

    index = torch.from_numpy(np.ascontiguousarray(blocks)).to(cache.device)
    rows = cache.index_select(0, index).flatten(0, 1)[skipped : skipped + tokens]
    return rows.transpose(0, 1).contiguous()


def _scatter(caches: Sequence[Any], slots: tuple[np.ndarray, np.ndarray], pair: Sequence[Any]) -> None:
    import torch

    device = caches[0].device
    blocks, rows = (torch.from_numpy(np.ascontiguousarray(index)).to(device) for index in slots)
    for cache, x in zip(caches, pair, strict=True):
        cache[blocks, rows] = x.transpose(0, 1)
