"""The table of targets: how each is read, edited and sealed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pqcodec.errors import PQError

from .base import MAX_BYTES, Read, as_specified
from .codings import is_of
from .mutations import scramble
from .shapes import (
    seal_pqkv,
    seal_safetensors,
    seal_store,
    seal_stream,
    shape_plain,
    shape_pqkv,
    shape_safetensors,
    shape_store,
    shape_stream,
)
from .targets import (
    _open_pqkv,
    _open_safetensors,
    _open_store,
    cache_reader,
    header,
    of_a_file,
    of_a_header,
    plain,
    stream,
    zarr_chunk,
)


@dataclass(frozen=True)
class Target:
    read: Read
    shape: Callable[[bytes, random.Random, bytes], bytes]  # an edit that knows the format
    seal: Callable[[bytes], bytes]  # makes checksums hold
    allowed: tuple[type[BaseException], ...] = (PQError,)


TARGETS = {
    "header": Target(as_specified(header, of_a_header), shape_stream, seal_stream),
    "stream": Target(stream, shape_stream, seal_stream),
    "pqkv": Target(as_specified(cache_reader(_open_pqkv), of_a_file), shape_pqkv, seal_pqkv),
    "safetensors": Target(cache_reader(_open_safetensors), shape_safetensors, seal_safetensors),
    "plain": Target(plain, shape_plain, lambda data: data, (PQError, OSError)),
    "zarr": Target(zarr_chunk, shape_stream, seal_stream),
    "zarr-cache": Target(cache_reader(_open_store, beyond=True), shape_store, seal_store),
}


DRAWS = 20  # until an input is of the coding that is asked for


def mutated(name: str, data: bytes, rng: random.Random, other: bytes, coding: str | None = None) -> bytes:
    """An input made of another one, sealed again more often than not; as a rule of that coding."""
    for _ in range(DRAWS):
        new = _mutated(TARGETS[name], data, rng, other)
        if is_of(coding, new):
            break
    return new


def _mutated(target: Target, data: bytes, rng: random.Random, other: bytes) -> bytes:
    kind = rng.randrange(6)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = scramble(data, rng, other) if kind < 3 else target.shape(data, rng, other)
    if kind == 5:
        data = scramble(data, rng, other)
    data = data[: 2 * MAX_BYTES]
    return (target.seal(data) if kind not in (0, 1) else data)[:MAX_BYTES]
