"""Law: a whole KV cache <-> one .pqkv file: keys are centred, values are not, the first tokens of both are exact, and the
preset's bits are shared between keys, values and layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pqcodec.centre import Rope
from pqcodec.errors import InvalidArgument
from pqcodec.formats import rates
from pqcodec.formats.appender import PQKVAppender
from pqcodec.formats.pqkv import PathOrFile, PQKVFile, PQKVWriter

EXACT_TOKENS = 4  # attention sinks: the first tokens' keys are far from all others


def key_center(rope: Rope | None) -> str:
    """What keys are centred with by default."""
    return "mean" if rope is None else "rope"


def check_centring(rope: Rope | None, center_keys: bool) -> None:
    """Raises InvalidArgument where a rope is given and nothing is centred with it."""
    if rope is not None and not center_keys:
        raise InvalidArgument("rope is used to centre keys: leave it out, or pass center_keys=True")


def presets_of(
    layers: Sequence[tuple[Any, Any]], preset: str, rope: Rope | None, exact_tokens: int, shared: bool
) -> tuple[list[str], list[str]]:
    """Presets of each layer's keys and values; ``shared``: bits go to the keys of high energy (``formats.rates``)."""
    if not shared:
        return [preset] * len(layers), [preset] * len(layers)
    return rates.share(preset, [rates.centred_energy(key, rope=rope, exact_tokens=exact_tokens) for key, _ in layers])


def save_cache(
    path: PathOrFile,
    layers: Sequence[tuple[Any, Any]],
    *,
    preset: str = "pq3",
    rope: Rope | None = None,
    exact_tokens: int = EXACT_TOKENS,
    seed: int = 0,
    center_keys: bool = True,
    share_bits: bool = True,
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    progress: Any = None,
) -> None:
    """Write (key, value) tensors [..., tokens, head_dim] of each layer as layers.{i}.key and layers.{i}.value.

    ``rope``: the keys' position embedding, where they are cached after it (as transformers does); without it, the plain
    mean is subtracted. ``share_bits``: give keys of high energy more bits than values, the preset being the mean
    (``formats.rates``). ``progress`` is told (tensors done, tensors in all). Raises as ``pqcodec.encode`` does.

    >>> import io, numpy as np
    >>> cache = [(np.ones((1, 2, 8, 64), np.float16), np.ones((1, 2, 8, 64), np.float16))]
    >>> file = io.BytesIO()
    >>> save_cache(file, cache, backend="reference")
    >>> [key.shape for key, value in load_cache(file, tokens=(2, 6), backend="reference")]
    [(1, 2, 4, 64)]
    """
    check_centring(rope, center_keys)
    total = 2 * len(layers)
    presets = presets_of(layers, preset, rope, exact_tokens, share_bits and center_keys)
    with PQKVWriter(path, metadata) as writer:
        for layer, pair in enumerate(layers):
            for place, (role, tensor) in enumerate(zip(("key", "value"), pair, strict=True)):
                centred = role == "key" and center_keys
                writer.add(
                    f"layers.{layer}.{role}",
                    tensor,
                    layer=layer,
                    role=role,
                    preset=presets[place][layer],
                    seed=seed,
                    center=key_center(rope) if centred else None,
                    rope=rope if centred else None,
                    exact_tokens=exact_tokens,
                    backend=backend,
                )
                if progress:
                    progress(2 * layer + place + 1, total)


def append_cache(
    path: str | os.PathLike[str],
    layers: Sequence[tuple[Any, Any]],
    *,
    rope: Rope | None = None,
    backend: str = "auto",
    progress: Any = None,
) -> None:
    """Add the new tokens of a conversation, (key, value) of each layer, to a file that ``save_cache`` wrote; all or none.

    Each tensor is coded as its first tokens were; ``rope`` is that of the first call. What is there is not read or written
    again. New tokens get means of their own: 64 of them or more at once keep what that costs small. Raises as ``save_cache``
    does.
    """
    with PQKVAppender(path) as writer, PQKVFile(path) as there:
        names = [
            (f"layers.{i}.{role}", x) for i, pair in enumerate(layers) for role, x in zip(("key", "value"), pair, strict=True)
        ]
        if set(there.names) != {name for name, _ in names}:
            raise InvalidArgument(
                f"{os.fspath(path)}: {len(layers)} layers are given, the file holds {', '.join(there.names[:4])} ..."
            )
        for done, (name, tensor) in enumerate(names, 1):
            info = there.inspect(name)
            if info.centered == "rope" and rope is None:
                raise InvalidArgument(f"{os.fspath(path)}: tensor {name!r} is centred under RoPE; pass the rope of save_cache")
            writer.extend(
                name,
                tensor,
                preset=info.preset,
                seed=info.seed,
                center=info.centered,
                rope=rope if info.centered == "rope" else None,
                chunk_tokens=info.chunk_tokens,
                backend=backend,
            )
            if progress:
                progress(done, len(names))


def load_cache(
    path: PathOrFile | bytes, *, tokens: tuple[int, int] | None = None, device: Any = None, backend: str = "auto"
) -> list[tuple[Any, Any]]:
    """The (key, value) tensors of each layer of a file; ``tokens`` = (first, last + 1) reads those only.

    Raises InvalidArgument where a layer has not exactly one key and one value, and as ``pqcodec.decode`` does.
    """
    with PQKVFile(path) as file:
        found: dict[tuple[int, str], list[str]] = {}
        for name in file.names:
            entry = file.entry(name)
            if entry.layer is not None and entry.role != "other":
                found.setdefault((entry.layer, entry.role), []).append(name)
        layers = 1 + max((layer for layer, _ in found), default=-1)
        if len(found) != 2 * layers or any(len(names) > 1 for names in found.values()):
            label = os.fspath(path) if isinstance(path, (str, os.PathLike)) else "the file"
            raise InvalidArgument(f"{label}: one key and one value of each layer from 0 on are expected; open it with PQKVFile")
        load = {"tokens": tokens, "device": device, "backend": backend}
        return [
            (file.decode(found[layer, "key"][0], **load), file.decode(found[layer, "value"][0], **load))  # type: ignore[arg-type]
            for layer in range(layers)
        ]
