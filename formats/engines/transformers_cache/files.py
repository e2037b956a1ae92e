"""Law: a cache of transformers <-> a file of any container (SPEC IV.1): keys and values are coded, all other state is exact."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import BackendUnavailable, CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats import containers
from pqcodec.formats.containers.reader import Progress, TensorFile
from pqcodec.formats.containers.writer import Piece
from pqcodec.formats.engines.model_identity import Identity
from pqcodec.formats.engines.transformers_cache.begun import EXACT, UNKNOWN, begin, check_model, presets_of
from pqcodec.formats.engines.transformers_cache.devices import layer_devices, placed
from pqcodec.formats.engines.transformers_cache.held import (
    check_rows,
    keeps_module_state,
    module_state,
    restore_module_state,
)
from pqcodec.formats.engines.transformers_cache.rope import pairings, ropes
from pqcodec.formats.engines.transformers_cache.state import (
    ENCODER_DECODER,
    ROLES,
    CacheState,
    LayerState,
    cache_of,
    padding_of,
    state_of,
)
from pqcodec.formats.plain.documents import is_format
from pqcodec.formats.plain.in_memory import InMemory
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.recipe import Recipe, preset_pair, why_exact

FORMATS = (1, 2)
WITH_MODULE_STATE = 2  # the format of a cache with ``module_state``
KEY = "transformers.cache"  # of the file's metadata
MODEL = "transformers.model"
PRESETS = "transformers.presets"  # whose errors the numbers have
MODULE_STATE, TENSOR = "module_state", "tensor"


def tensors_of(
    config: Any, state: CacheState, paired: Mapping[str, str], padding: tuple[int, ...] = ()
) -> tuple[InMemory, dict[str, TensorRole], list[str]]:
    """A cache's tensors by their names in a file, the role of each, and the names of those that can be coded.

    ``paired``: the result of ``pairings``, or {} without RoPE; ``padding``: the result of ``padding_of``.
    """
    turned = ropes(config, state, paired)
    named: dict[str, Any] = {}
    roles: dict[str, TensorRole] = {}
    for prefix, index, layer in state.layers():
        for path, tensor in layer.tensors.items():
            name = f"{prefix}.{ROLES.get(path, path)}"
            named[name], roles[name] = tensor, TensorRole("other", index)
            if path in ROLES:
                padded = () if prefix.startswith("cross_attention_cache") else padding
                roles[name] = TensorRole(ROLES[path], index, turned.get(f"{prefix}.{path}"), layer.tokens - layer.kept, padded)
    tensors = InMemory(named)
    coded = [name for name in named if roles[name].role != "other" and why_exact(*tensors.describe(name)) is None]
    return tensors, roles, coded


def save(
    cache: Any,
    path: str | os.PathLike[str],
    model: Any,
    *,
    preset: str | Sequence[str] = DEFAULT_PRESET,
    seed: int = 0,
    nonfinite: str = "error",
    backend: str = "auto",
    to: str | None = None,
    padding: Any = None,
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a cache of transformers into a .pqkv (.safetensors, .zarr) file and return its size in bytes.

    ``model``: the model of the cache, whose identity the file records, or its config. Keys are centred under the model's RoPE;
    the first tokens, and all state that is neither key nor value, are exact; with ``preset="exact"`` everything is.
    ``preset``: one for both, or a pair, for keys and for values. ``nonfinite``: as in ``pqcodec.encode``. ``padding``: the
    tokens of left padding of each sequence, or the attention mask [sequences, tokens]; the first tokens are then counted after
    it. ``progress`` is called with (tensors done, tensors in all).
    State in the model's modules (``module_state``: M-RoPE's ``rope_deltas``) is saved too: save a cache before the model reads
    another text. A cache that came from a store or a file keeps a record of the presets whose errors it has. Raises
    InvalidArgument for a cache that cannot be represented, or one of a store or a file whose model has changed since, and as
    ``save_cache`` does.

    >>> import tempfile, torch
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.arange(300)[None] % 99
    >>> with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    ...     cache = DynamicCache(config=model.config)
    ...     out = model(ids, past_key_values=cache)
    ...     size = save(cache, folder + "/cache.pqkv", model, preset="pq4")
    ...     load(folder + "/cache.pqkv", model).get_seq_length(), size < 2 * 2 * 300 * 32 * 4
    (300, True)
    """
    identity = Identity.of(model)
    check_model(cache, identity)
    state = state_of(cache, identity.config)
    held = _held_by(model, identity.config, state)
    padded = padding_of(padding, batches=state.batches())
    for name in preset_pair(preset) if preset != EXACT else ():
        check_restores(name, "a model")
    recipe = None if preset == EXACT else Recipe.of(preset, seed=seed, nonfinite=nonfinite, backend=backend)
    all_metadata = {**(metadata or {}), KEY: cache_metadata(state, held), MODEL: identity.as_dict()}
    if lost := presets_of(cache, *preset_pair(preset)):
        all_metadata[PRESETS] = lost
    pieces = cache_pieces(state, identity.config, recipe, padded) + _exact_pieces(held)
    return containers.write(path, pieces, all_metadata, to=containers.container_of(path, to), progress=progress)


def _held_by(model: Any, config: Any, state: CacheState) -> dict[str, Any]:
    """The state in the model's modules; raises InvalidArgument where it is not of this cache, or only a config is given."""
    if not hasattr(model, "modules") and keeps_module_state(config):
        raise InvalidArgument(
            f"a {config.model_type} keeps state of its cache in its modules (rope_deltas): pass the model, not its config"
        )
    held = module_state(model)
    check_rows(held, state.batches())
    return held


def _exact_pieces(held: Mapping[str, Any]) -> list[Piece]:
    tensors = InMemory({f"{MODULE_STATE}.{path}": x for path, x in held.items() if _is_tensor(x)})
    return Recipe().pieces(tensors, dict.fromkeys(tensors.names, TensorRole("other")), [])  # none is coded


def _is_tensor(x: Any) -> bool:
    return x is not None and not isinstance(x, int)


def cache_pieces(state: CacheState, config: Any, recipe: Recipe | None, padding: tuple[int, ...] = ()) -> list[Piece]:
    """A cache's pieces for a container: keys and values coded by ``recipe`` (None: exactly), all other tensors exactly."""
    if recipe is None:
        tensors, roles, _ = tensors_of(config, state, {})
        return Recipe().pieces(tensors, roles, [])
    return recipe.pieces(*tensors_of(config, state, pairings(config, state), padding))


def cache_metadata(state: CacheState, held: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata under ``KEY`` (SPEC IV.1): class, fields and tensors of each layer, and the state in modules."""

    def layer(one: LayerState) -> dict[str, Any]:
        return {"class": one.kind, "fields": dict(one.fields), "tensors": list(one.tensors)}

    metadata = {
        "format": 1,
        "class": state.kind,
        "parts": {name: [*map(layer, layers)] for name, layers in state.parts.items()},
    }
    if held:
        members = {path: TENSOR if _is_tensor(value) else value for path, value in held.items()}
        metadata |= {"format": WITH_MODULE_STATE, MODULE_STATE: members}
    return metadata


def load(
    path: str | os.PathLike[str],
    model: Any = None,
    *,
    device: Any = None,
    backend: str = "auto",
) -> Any:
    """The cache that ``save`` wrote, as a new DynamicCache (or EncoderDecoderCache) for the model to continue from.

    ``model``: the model (or its config) that is to continue; raises InvalidArgument if the cache is another model's. A cache
    of a model that keeps state in its modules (M-RoPE's ``rope_deltas``) needs the model itself: the state is put back into
    it, so load such a cache right before it is used. ``device``: of the tensors (None: the devices of the model's layers, or
    the CPU). Raises as ``pqcodec.decode`` does.

    ``generate`` needs more tokens than the cache's. A store takes the cache under the preset that the file was written with,
    or under any if all numbers are exact. Mamba, FalconMamba, Jamba and Bamba continue correctly from a kept state only if
    tokens are fed one at a time: they read several at once as if nothing came before.

    >>> import tempfile, torch
    >>> from transformers import DynamicCache, LlamaConfig
    >>> config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    >>> cache = DynamicCache(config=config)
    >>> out = cache.update(torch.ones(1, 2, 40, 16), torch.zeros(1, 2, 40, 16), 0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save(cache, folder + "/cache.pqkv", config, backend="reference")
    ...     load(folder + "/cache.pqkv", config, backend="reference").layers[0].keys.shape
    torch.Size([1, 2, 40, 16])
    """
    import torch

    identity: Identity | None = None
    devices: list[Any] | None = None  # of a model's layers, where they are on several
    with containers.open_encoded(path) as file, torch.inference_mode(False):  # layers change some tensors in place, in any mode
        if model is not None:
            identity = Identity.of(model)
            identity.check(file.metadata.get(MODEL), file.label)
            devices = layer_devices(model) if identity.spread and device is None else None
            device = identity.target(device)
        metadata = file.metadata.get(KEY)
        if not isinstance(metadata, dict):
            readers = "load_cache, load_safetensors or load_zarr"
            raise InvalidArgument(f"{file.label}: holds no cache of transformers; use {readers} for plain keys and values")
        if not is_format(metadata.get("format"), *FORMATS):
            raise UnsupportedStream(f"{file.label}: format {metadata.get('format')!r} of {KEY}; install a newer pqcodec")
        _check_held(metadata, model, file.label)
        file.read_ahead()
        try:
            state = _state_in(file, metadata, device, backend)
            cache = cache_of(placed(state, devices) if devices else state)
            held = _held_in(file, metadata, device, backend)
        except BackendUnavailable:
            raise  # the caller's device or backend, not the file
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CorruptStream(f"{file.label}: its metadata, {KEY!r}, does not describe a cache ({error!r})") from error
        begin(cache, identity, _presets_in(file))
    if metadata["format"] == WITH_MODULE_STATE:
        restore_module_state(model, held)
    return cache


def _presets_in(file: TensorFile) -> str:
    """The presets whose errors a file's numbers have; "" where all tensors are exact."""
    coded = any(file.entry(name).coded for name in file.names)
    return str(file.metadata.get(PRESETS, UNKNOWN if coded else ""))


def _check_held(metadata: Mapping[str, Any], model: Any, label: str) -> None:
    """Raises InvalidArgument where the file or the caller lacks the state in modules that the cache depends on."""
    if metadata["format"] == WITH_MODULE_STATE and not hasattr(model, "modules"):
        raise InvalidArgument(
            f"{label}: its model keeps state of the cache in its modules (rope_deltas), which has to be put back: "
            "load(path, model) with the model itself"
        )
    if metadata["format"] != WITH_MODULE_STATE and model is not None and keeps_module_state(model):
        raise InvalidArgument(
            f"{label}: was written by an older pqcodec without what the model keeps in its modules (rope_deltas), so that its "
            "positions would be wrong behind an image: compute the cache anew, and save it again"
        )


def _held_in(file: TensorFile, metadata: Mapping[str, Any], device: Any, backend: str) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for path, value in (metadata[MODULE_STATE] if metadata["format"] == WITH_MODULE_STATE else {}).items():
        if value is not None and value != TENSOR and type(value) is not int:
            raise ValueError(f"{MODULE_STATE}: {path!r:.60} is {value!r:.60}")
        held[path] = file.decode(f"{MODULE_STATE}.{path}", device=device, backend=backend) if value == TENSOR else value
    return held


def _state_in(file: TensorFile, metadata: dict[str, Any], device: Any, backend: str) -> CacheState:
    parts: dict[str, list[LayerState]] = {}
    for name, layers in metadata["parts"].items():
        parts[name] = []
        for index, layer in enumerate(layers):
            prefix = f"{name}.layers.{index}" if name else f"layers.{index}"
            tensors = {
                path: file.decode(f"{prefix}.{ROLES.get(path, path)}", device=device, backend=backend)
                for path in layer["tensors"]
            }
            parts[name].append(LayerState(layer["class"], tensors, layer["fields"]))
    kinds = {"DynamicCache": ("",), "EncoderDecoderCache": ENCODER_DECODER}
    return CacheState(metadata["class"], {name: parts[name] for name in kinds[metadata["class"]]})
