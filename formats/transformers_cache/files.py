"""Law: one cache of transformers <-> one file of any container (SPEC IV.1): keys and values are encoded, all else is exact."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats import containers
from pqcodec.formats.model_identity import Identity
from pqcodec.formats.names import Part
from pqcodec.formats.pieces import Piece
from pqcodec.formats.recipe import InMemory, Recipe, why_exact
from pqcodec.formats.tensor_file import Progress, TensorFile
from pqcodec.formats.transformers_cache.rope import pairings, ropes
from pqcodec.formats.transformers_cache.state import ENCODER_DECODER, ROLES, CacheState, LayerState, cache_of, state_of

FORMAT = 1
KEY = "transformers.cache"  # of the file's metadata
MODEL = "transformers.model"


def tensors_of(config: Any, state: CacheState, paired: Mapping[str, str]) -> tuple[InMemory, dict[str, Part], list[str]]:
    """Every tensor of a cache by its name in a file, what each is, and which are coded; ``paired`` is that of ``pairings``."""
    turned = ropes(config, state, paired)
    named: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    for prefix, index, layer in state.layers():
        for path, tensor in layer.tensors.items():
            name = f"{prefix}.{ROLES.get(path, path)}"
            named[name], parts[name] = tensor, Part("other", index)
            if path in ROLES:
                parts[name] = Part(ROLES[path], index, turned.get(f"{prefix}.{path}"), layer.tokens - layer.kept)
    tensors = InMemory(named)
    coded = [name for name, part in parts.items() if part.role != "other" and why_exact(*tensors.describe(name)) is None]
    return tensors, parts, coded


def save(
    cache: Any,
    path: str | os.PathLike[str],
    model: Any,
    *,
    preset: str = "pq3",
    seed: int = 0,
    backend: str = "auto",
    to: str | None = None,
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a cache of transformers into a .pqkv (.safetensors, .zarr) file and return its bytes.

    ``model``: the model whose cache it is, which the file then belongs to, or its config. Keys are centred under the model's
    RoPE; first tokens, and all that is neither key nor value, are exact. ``progress`` is told (tensors done, tensors in all).
    Raises InvalidArgument for a cache that cannot be represented, and as ``save_cache`` does.
    """
    identity = Identity.of(model)
    state = state_of(cache, identity.config)
    recipe = Recipe(preset=preset, seed=seed, backend=backend)
    told = {**(metadata or {}), KEY: described(state), MODEL: identity.as_dict()}
    return containers.write(
        path, pieces_of(state, identity.config, recipe), told, to=containers.container_of(path, to), progress=progress
    )


def pieces_of(state: CacheState, config: Any, recipe: Recipe) -> list[Piece]:
    """What a container writes of a cache: keys and values are coded, all else is exact."""
    return recipe.pieces(*tensors_of(config, state, pairings(config, state)))


def described(state: CacheState) -> dict[str, Any]:
    """What the metadata tells of a cache: classes and fields of its layers, and which tensors they hold."""

    def layer(one: LayerState) -> dict[str, Any]:
        return {"class": one.kind, "fields": dict(one.fields), "tensors": list(one.tensors)}

    return {
        "format": FORMAT,
        "class": state.kind,
        "parts": {name: [*map(layer, layers)] for name, layers in state.parts.items()},
    }


def load(
    path: str | os.PathLike[str],
    model: Any = None,
    *,
    device: Any = None,
    backend: str = "auto",
) -> Any:
    """The cache that ``save`` wrote: a new DynamicCache (or EncoderDecoderCache) to go on from.

    ``model``: the model (or its config) that is to read on; InvalidArgument is raised where it is not the one whose cache this
    is. ``device``: where the tensors go (None: the model's device, or the CPU). Raises as ``pqcodec.decode`` does.
    """
    with containers.open_encoded(path) as file:
        if model is not None:
            identity = Identity.of(model)
            identity.check(file.metadata.get(MODEL), file.label)
            device = identity.target(device)
        told = file.metadata.get(KEY)
        if not isinstance(told, dict):
            raise InvalidArgument(f"{file.label}: holds no cache of transformers; use load_cache for plain keys and values")
        if told.get("format") != FORMAT:
            raise UnsupportedStream(f"{file.label}: format {told.get('format')!r} of {KEY}; install a newer pqcodec")
        file.read_ahead()
        try:
            return cache_of(_state_in(file, told, device, backend))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CorruptStream(f"{file.label}: its metadata, {KEY!r}, does not describe a cache ({error!r})") from error


def _state_in(file: TensorFile, told: dict[str, Any], device: Any, backend: str) -> CacheState:
    parts: dict[str, list[LayerState]] = {}
    for name, layers in told["parts"].items():
        parts[name] = []
        for index, layer in enumerate(layers):
            prefix = f"{name}.layers.{index}" if name else f"layers.{index}"
            tensors = {
                path: file.decode(f"{prefix}.{ROLES.get(path, path)}", device=device, backend=backend)
                for path in layer["tensors"]
            }
            parts[name].append(LayerState(layer["class"], tensors, layer["fields"]))
    kinds = {"DynamicCache": ("",), "EncoderDecoderCache": ENCODER_DECODER}
    return CacheState(told["class"], {name: parts[name] for name in kinds[told["class"]]})
