"""Law: a whole KV cache of (key, value) tensors <-> one .pqkv file, which new tokens are added to in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.appender import PQKVAppender
from pqcodec.formats.pqkv import PathOrFile, PQKVFile, write_pieces
from pqcodec.formats.recipe import CHUNK_TOKENS, EXACT_TOKENS, Recipe, layers_by_name
from pqcodec.formats.tensor_file import Progress, TensorFile
from pqcodec.stages.centre import Rope


def recipe_of(rope: Rope | None, center_keys: bool, **options: Any) -> Recipe:
    """The recipe that the options of ``save_cache`` ask for; raises InvalidArgument."""
    if rope is not None and not center_keys:
        raise InvalidArgument("rope is used to centre keys: leave it out, or pass center_keys=True")
    return Recipe(rope=rope, center="auto" if center_keys else None, **options)


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
    chunk_tokens: int = CHUNK_TOKENS,
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write (key, value) tensors [..., tokens, head_dim] of each layer as layers.{i}.key and layers.{i}.value.

    ``rope``: the keys' position embedding, where they are cached after it (as transformers does); without it, the plain
    mean is subtracted. ``share_bits``: give keys of high energy more bits than values, the preset being the mean
    (``formats.rates``). ``chunk_tokens``: tokens under one checksum, the least that is read. ``progress`` is told (tensors
    done, tensors in all). Raises as ``pqcodec.encode`` does.

    >>> import io, numpy as np
    >>> cache = [(np.ones((1, 2, 8, 64), np.float16), np.ones((1, 2, 8, 64), np.float16))]
    >>> file = io.BytesIO()
    >>> save_cache(file, cache, backend="reference")
    >>> [key.shape for key, value in load_cache(file, tokens=(2, 6), backend="reference")]
    [(1, 2, 4, 64)]
    """
    recipe = recipe_of(
        rope,
        center_keys,
        preset=preset,
        exact_tokens=exact_tokens,
        seed=seed,
        share_bits=share_bits,
        chunk_tokens=chunk_tokens,
        backend=backend,
    )
    write_pieces(path, recipe.pieces(*layers_by_name(layers)), metadata, progress)


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
        return layers_of(file, tokens=tokens, device=device, backend=backend)


def layers_of(
    file: TensorFile, *, tokens: tuple[int, int] | None = None, device: Any = None, backend: str = "auto"
) -> list[tuple[Any, Any]]:
    """The (key, value) tensors of each layer of an open file of any container; arguments and errors of ``load_cache``."""
    if tokens is None:
        file.read_ahead()
    found: dict[tuple[int, str], list[str]] = {}
    for name in file.names:
        entry = file.entry(name)
        if entry.layer is not None and entry.role != "other":
            found.setdefault((entry.layer, entry.role), []).append(name)
    layers = 1 + max((layer for layer, _ in found), default=-1)
    if len(found) != 2 * layers or any(len(names) > 1 for names in found.values()):
        raise InvalidArgument(f"{file.label}: one key and one value of each layer from 0 on are expected; open it by itself")
    load = {"tokens": tokens, "device": device, "backend": backend}

    def tensor(layer: int, role: str) -> Any:
        return file.decode(found[layer, role][0], **load)

    return [(tensor(layer, "key"), tensor(layer, "value")) for layer in range(layers)]
