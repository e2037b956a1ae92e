"""Law: a KV cache as (key, value) tensors of each layer <-> one file or store of any container; a .pqkv file grows in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.containers import kinds, safetensors
from pqcodec.formats.containers.pqkv.appender import PQKVAppender
from pqcodec.formats.containers.pqkv.file import PathOrFile, PQKVFile, write_pieces
from pqcodec.formats.containers.reader import LAYOUT, Progress, TensorFile
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.files import holds_streams, open_tensors
from pqcodec.formats.plain.in_memory import InMemory
from pqcodec.formats.policy.names import role_of
from pqcodec.formats.policy.recipe import CHUNK_TOKENS, EXACT_TOKENS, Recipe, layers_by_name, why_exact
from pqcodec.stages.centre import Rope
from pqcodec.tensors import arrays


def recipe_of(preset: str | Sequence[str], rope: Rope | None, center_keys: bool, **options: Any) -> Recipe:
    """The recipe for the options of ``save_cache``; raises InvalidArgument."""
    if rope is not None and not center_keys:
        raise InvalidArgument("rope is used to centre keys: leave it out, or pass center_keys=True")
    return Recipe.of(preset, rope=rope, center="auto" if center_keys else None, **options)


def save_cache(
    path: PathOrFile,
    layers: Sequence[tuple[Any, Any]],
    *,
    preset: str | Sequence[str] = DEFAULT_PRESET,
    rope: Rope | None = None,
    exact_tokens: int = EXACT_TOKENS,
    seed: int = 0,
    center_keys: bool = True,
    share_bits: bool = True,
    effort: str = "fast",
    chunk_tokens: int = CHUNK_TOKENS,
    nonfinite: str = "error",
    keep: Sequence[Any] | None = None,
    codebooks: Any = None,
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write (key, value) tensors [..., tokens, head_dim] of each layer as layers.{i}.key and layers.{i}.value.

    ``preset``: one for both, or a pair, for keys and for values, whose bits are then not shared. ``rope``: the keys' position
    embedding, where they are cached after it (as transformers does); without it, the plain mean is subtracted. ``share_bits``:
    give keys of high energy more bits than values, the preset being the mean (``policy.rates``).
    ``effort``, ``nonfinite``: as in ``pqcodec.encode``. ``chunk_tokens``: tokens under one checksum, the least that is read.
    ``keep``: of each layer the positions of the tokens that are kept, as in ``pqcodec.encode``. ``load_cache`` then refuses the
    file, since a model counts a cache's tokens to know where it stands; ``PQKVFile.decode_kept`` reads it.
    ``codebooks``: for presets of residual VQ a VectorTable, or a mapping of (role, layer) to one each; the file carries them.
    ``progress`` is called with (tensors done, tensors in all). Raises as ``pqcodec.encode`` does.

    >>> import io, numpy as np
    >>> cache = [(np.ones((1, 2, 8, 64), np.float16), np.ones((1, 2, 8, 64), np.float16))]
    >>> file = io.BytesIO()
    >>> save_cache(file, cache, backend="reference")
    >>> [key.shape for key, value in load_cache(file, tokens=(2, 6), backend="reference")]
    [(1, 2, 4, 64)]
    """
    recipe = recipe_of(
        preset,
        rope,
        center_keys,
        exact_tokens=exact_tokens,
        seed=seed,
        share_bits=share_bits,
        effort=effort,
        chunk_tokens=chunk_tokens,
        nonfinite=nonfinite,
        backend=backend,
        codebooks=codebooks,
    )
    _refuse_other_kinds(path)
    if keep is not None:
        if len(keep) != len(layers):
            raise InvalidArgument(f"keep: positions of {len(keep)} layers are given for {len(layers)}; one each is expected")
        names = ((f"layers.{layer}.{role}", one) for layer, one in enumerate(keep) for role in c.ROLES[:2])
        recipe = replace(recipe, keep=dict(names))
    write_pieces(path, recipe.pieces(*layers_by_name(layers)), metadata, progress)


def _refuse_other_kinds(path: PathOrFile) -> None:
    """Raises InvalidArgument for the name of a container that is not a .pqkv file."""
    for ending in (".safetensors", ".zarr"):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(ending):
            raise InvalidArgument(f"{path}: save_cache writes a .pqkv file; call save_{ending[1:]} for a {ending}")


def append_cache(
    path: str | os.PathLike[str],
    layers: Sequence[tuple[Any, Any]],
    *,
    rope: Rope | None = None,
    effort: str = "fast",
    nonfinite: str = "error",
    backend: str = "auto",
    progress: Any = None,
) -> None:
    """Append new tokens of a conversation, (key, value) of each layer, to a file that ``save_cache`` wrote; all or none.

    Each tensor is coded as its first tokens were, keys under the RoPE that the file holds; ``rope`` may name it again, and
    another one is refused. ``effort``, which files do not tell, and ``nonfinite``: as in ``save_cache``. Older tokens are
    neither read nor rewritten. New tokens get a mean of their own: append 64 or more at once to keep its cost small. Raises as
    ``save_cache`` does.

    >>> import tempfile, numpy as np
    >>> layers = [(np.ones((1, 2, 80, 64), np.float16), np.ones((1, 2, 80, 64), np.float16))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_cache(folder + "/chat.pqkv", layers, backend="reference")
    ...     append_cache(folder + "/chat.pqkv", layers, backend="reference")
    ...     [key.shape for key, value in load_cache(folder + "/chat.pqkv", backend="reference")]
    [(1, 2, 160, 64)]
    """
    tensors, _ = layers_by_name(layers)
    names = [(name, tensors.read(name)) for name in tensors.names]
    with PQKVAppender(path) as writer, PQKVFile(path) as there:
        if set(there.names) != {name for name, _ in names}:
            raise InvalidArgument(
                f"{os.fspath(path)}: {len(layers)} layers are given, the file holds {', '.join(there.names[:4])} ..."
            )
        found = {name: codec.inspect(there.stream(name)) for name, _ in names}
        turned = {name for name, info in found.items() if info.centered == "rope" or info.before_rope}
        if rope is not None and not turned:
            raise InvalidArgument(f"{os.fspath(path)}: holds no keys that are coded under RoPE; leave rope out")
        for done, (name, tensor) in enumerate(names, 1):
            info = found[name]
            if info.kept_of is not None:
                raise InvalidArgument(f"{os.fspath(path)}: tensor {name!r} holds only some of its tokens, and does not grow")
            same: dict[str, Any] = {"effort": effort, "nonfinite": nonfinite, "backend": backend}
            writer.extend(name, tensor, rope=rope if name in turned else None, **same)
            if progress:
                progress(done, len(names))


def load_cache(
    path: PathOrFile | bytes, *, tokens: tuple[int, int] | None = None, device: Any = None, backend: str = "auto"
) -> list[tuple[Any, Any]]:
    """The (key, value) tensors of each layer of a file; ``tokens`` = (first, last + 1) reads only these tokens.

    Raises InvalidArgument where a layer has not exactly one key and one value, or no tensor is of a layer, and as
    ``pqcodec.decode`` does.

    >>> import io, numpy as np
    >>> file = io.BytesIO()
    >>> save_cache(file, 2 * [(np.ones((1, 2, 40, 64), np.float16), np.zeros((1, 2, 40, 64), np.float16))], backend="reference")
    >>> [(key.shape, float(value.max())) for key, value in load_cache(file, tokens=(30, 40), backend="reference")]
    [((1, 2, 10, 64), 0.0), ((1, 2, 10, 64), 0.0)]
    """
    with PQKVFile(path) as file:
        return layer_pairs(file, tokens=tokens, device=device, backend=backend)


def layer_pairs(
    file: TensorFile, *, tokens: tuple[int, int] | None = None, device: Any = None, backend: str = "auto"
) -> list[tuple[Any, Any]]:
    """The (key, value) tensors of each layer of an open file of any container; arguments and errors as of ``load_cache``."""
    if tokens is None:
        file.read_ahead()
    found: dict[tuple[int, str], list[str]] = {}
    for name in file.names:
        entry = file.entry(name)
        if entry.layer is not None and entry.role != "other":
            found.setdefault((entry.layer, entry.role), []).append(name)
    layers = 1 + max((layer for layer, _ in found), default=-1)
    if len(found) != 2 * layers or any(len(names) > 1 for names in found.values()) or (file.names and not found):
        some = ", ".join(map(repr, file.names[:4])) + (" ..." if len(file.names) > 4 else "")
        raise InvalidArgument(
            f"{file.label}: one key and one value of each layer from 0 on are expected, it holds {some}; "
            "pqcodec.formats.containers.open_encoded(path) decodes any tensor by its name"
        )
    load = {"tokens": tokens, "device": device, "backend": backend}

    def tensor(layer: int, role: str) -> Any:
        return file.decode(found[layer, role][0], **load)

    return [(tensor(layer, "key"), tensor(layer, "value")) for layer in range(layers)]


# -- .safetensors ------------------------------------------------------------------------------------------------
def save_safetensors(
    path: str | os.PathLike[str],
    cache: Sequence[tuple[Any, Any]] | Mapping[str, Any],
    *,
    preset: str | Sequence[str] = DEFAULT_PRESET,
    rope: Rope | None = None,
    exact_tokens: int = EXACT_TOKENS,
    seed: int = 0,
    center_keys: bool = True,
    share_bits: bool = True,
    effort: str = "fast",
    chunk_tokens: int = CHUNK_TOKENS,
    nonfinite: str = "error",
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a cache as ``save_cache`` does, into a .safetensors file.

    ``cache``: (key, value) tensors of each layer, which become layers.{i}.key and layers.{i}.value; or a mapping of names to
    tensors, of which keys and values by name (``policy.names``) are coded if their dtype allows it, and others kept exactly.
    Other options as in ``save_cache``. Raises as ``pqcodec.encode`` does.

    >>> import tempfile, numpy as np
    >>> path = tempfile.mkdtemp() + "/cache.safetensors"
    >>> cache = [(np.ones((1, 2, 8, 64), np.float16), np.ones((1, 2, 8, 64), np.float16))]
    >>> save_safetensors(path, cache, backend="reference", metadata={"model": "tiny"})
    >>> from pqcodec.formats.containers.safetensors import SafetensorsCache
    >>> with SafetensorsCache(path) as file:
    ...     file.names, file.metadata, file.decode("layers.0.key", tokens=(2, 6), backend="reference").shape
    (('layers.0.key', 'layers.0.value'), {'model': 'tiny'}, (1, 2, 4, 64))
    """
    recipe = recipe_of(
        preset,
        rope,
        center_keys,
        exact_tokens=exact_tokens,
        seed=seed,
        share_bits=share_bits,
        effort=effort,
        chunk_tokens=chunk_tokens,
        nonfinite=nonfinite,
        backend=backend,
    )
    if isinstance(cache, Mapping):
        tensors, roles = InMemory(cache), {name: role_of(name) for name in cache}
        coded = [name for name in cache if roles[name].role != "other" and not why_exact(*tensors.describe(name))]
    else:
        tensors, roles = layers_by_name(cache)
        coded = list(tensors.names)
    safetensors.write_pieces(path, recipe.pieces(tensors, roles, coded), metadata, progress)


def load_safetensors(
    path: str | os.PathLike[str],
    tokens: tuple[int, int] | None = None,
    *,
    device: Any = None,
    backend: str = "auto",
    foreign: bool = False,
) -> dict[str, Any]:
    """All tensors of a file by name, decoded; ``tokens`` = (first, last + 1) cuts those that have tokens.

    A file without a listing (SPEC III.1) is refused, for a damaged listing looks the same; ``foreign=True`` loads its tensors
    as they are. Raises as ``SafetensorsCache`` and ``pqcodec.decode`` do.

    >>> import tempfile, numpy as np
    >>> tensors = {"layers.0.key": np.ones((2, 40, 64), np.float16), "positions": np.arange(40)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors(folder + "/cache.safetensors", tensors, backend="reference")
    ...     found = load_safetensors(folder + "/cache.safetensors", backend="reference")
    >>> found["layers.0.key"].shape, bool((found["positions"] == np.arange(40)).all())
    ((2, 40, 64), True)
    """
    if foreign and not holds_streams(path):
        return _load_foreign(path, tokens, device)
    with safetensors.SafetensorsCache(path) as file:
        if tokens is None:
            file.read_ahead()
        cut = {name: tokens if file.entry(name).layout == LAYOUT else None for name in file.names}
        return {name: file.decode(name, tokens=cut[name], device=device, backend=backend) for name in file.names}


def _load_foreign(path: str | os.PathLike[str], tokens: tuple[int, int] | None, device: Any) -> dict[str, Any]:
    if tokens is not None:
        raise InvalidArgument(f"{path}: says nothing of tokens, it is no file of pqcodec; load it whole and cut it")
    found = {}
    with open_tensors(path) as reader:
        for name in reader.names:
            found[name] = x = reader.read(name)
            if exact.dtype_name(x) == "uint8" and x.ndim == 1 and bytes(x[: len(c.STREAM_MAGIC)].tolist()) == c.STREAM_MAGIC:
                raise CorruptStream(f"{path}: tensor {name!r} is a stream of pqcodec, the file's metadata are lost; decode it")
    return found if device is None else {name: arrays.to_device(x, device) for name, x in found.items()}


# -- zarr --------------------------------------------------------------------------------------------------------
def save_zarr(
    store: Any,
    layers: Sequence[tuple[Any, Any]],
    *,
    preset: str | Sequence[str] = DEFAULT_PRESET,
    rope: Rope | None = None,
    exact_tokens: int = EXACT_TOKENS,
    seed: int = 0,
    center_keys: bool = True,
    share_bits: bool = True,
    effort: str = "fast",
    chunk_tokens: int = CHUNK_TOKENS,
    tokens_per_chunk: int | None = c.ZARR_TOKENS_PER_CHUNK,
    chunks_per_shard: int | None = None,
    nonfinite: str = "error",
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write (key, value) tensors [..., tokens, head_dim] of each layer as zarr arrays layers/{i}/key and layers/{i}/value.

    ``store``: a path or URL, or a store of zarr. ``tokens_per_chunk``: tokens of a chunk of zarr, which holds all leading
    indices (None: all tokens). Small chunks gain little, for a slice reads only the bytes that hold it: each chunk takes a
    millisecond more, and each chunk of a key has a mean of its own (2 % of 256 tokens). ``chunks_per_shard``: chunks in one
    object of the store. ``overwrite``: replace an existing cache. Other options as in ``save_cache``. bfloat16, which zarr
    lacks, is float32 to zarr and bfloat16 to ``load_zarr``. Raises InvalidArgument, or as ``pqcodec.encode`` does.

    >>> import numpy as np, zarr
    >>> from zarr.storage import MemoryStore
    >>> store = MemoryStore()
    >>> save_zarr(store, [(np.ones((2, 300, 64), np.float16), np.ones((2, 300, 64), np.float16))])
    >>> zarr.open(store)["layers/0/key"][1, 250:260].shape, load_zarr(store, tokens=(0, 4))[0][0].shape
    ((10, 64), (2, 4, 64))
    """
    reader, writer = kinds.container_module("zarr.reader"), kinds.container_module("zarr.writer")
    if tokens_per_chunk is not None and tokens_per_chunk < 1:
        raise InvalidArgument(f"tokens_per_chunk {tokens_per_chunk}: at least 1 is expected, or None for one chunk a tensor")
    recipe = recipe_of(
        preset,
        rope,
        center_keys,
        exact_tokens=exact_tokens,
        seed=seed,
        share_bits=share_bits,
        effort=effort,
        chunk_tokens=chunk_tokens,
        stream_tokens=tokens_per_chunk,
        nonfinite=nonfinite,
        backend=backend,
    )
    if chunks_per_shard is not None and (not 1 <= chunks_per_shard <= reader.MOST_IN_SHARD or tokens_per_chunk is None):
        wanted = f"a number from 1 to {reader.MOST_IN_SHARD}, and tokens_per_chunk, are expected"
        raise InvalidArgument(f"chunks_per_shard {chunks_per_shard}: {wanted}")
    pieces = recipe.pieces(*layers_by_name(layers))
    writer.write_pieces(store, pieces, metadata, progress, overwrite=overwrite, chunks_per_shard=chunks_per_shard)


def load_zarr(
    store: Any, *, tokens: tuple[int, int] | None = None, device: Any = None, backend: str = "auto"
) -> list[tuple[Any, Any]]:
    """The (key, value) tensors of each layer of a store; ``tokens`` = (first, last + 1) reads only these tokens.

    Raises InvalidArgument where the store holds no complete cache, and as ``pqcodec.decode`` does.

    >>> import numpy as np
    >>> from zarr.storage import MemoryStore
    >>> store = MemoryStore()
    >>> save_zarr(store, [(np.ones((2, 300, 64), np.float16), np.zeros((2, 300, 64), np.float16))])
    >>> [(key.shape, float(value.max())) for key, value in load_zarr(store, tokens=(200, 264))]
    [((2, 64, 64), 0.0)]
    """
    with kinds.container_module("zarr.reader").ZarrCache(store) as file:
        return layer_pairs(file, tokens=tokens, device=device, backend=backend)
