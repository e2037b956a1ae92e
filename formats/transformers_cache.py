"""Law: the caches of transformers (5.20 to 5.24): what a layer holds, whole, and the RoPE that its keys went through.

This is the only file that knows transformers. A layer's state is whatever attributes it has: keys and values are encoded, all
other tensors (conv and recurrent state, indexer keys ...) are kept exactly, and numbers such as a sliding window's
``cumulative_length`` go into the file's metadata. A layer class that is not in ``LAYERS`` and an attribute that is none of
these are refused by name.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqcodec.centre import Rope
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats import containers, exact, rates
from pqcodec.formats.model_identity import Identity
from pqcodec.formats.names import Part
from pqcodec.formats.pieces import Piece
from pqcodec.formats.recipe import EXACT_TOKENS, InMemory, Recipe, why_exact
from pqcodec.formats.tensor_file import Progress, TensorFile

FORMAT = 1
KEY = "transformers.cache"  # of the file's metadata
MODEL = "transformers.model"

LAYERS: dict[str, tuple[str, ...]] = {  # layer classes, and the attributes that their constructors want
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window",),
    "DynamicIndexedLayer": (),
    "LinearAttentionLayer": ("number_of_states",),
    "LinearAttentionAndFullAttentionLayer": ("number_of_states",),
    "LinearAttentionAndSlidingWindowAttentionLayer": ("sliding_window", "number_of_states"),
    "DummyLayer": (),
}
_ROLES = {"keys": "key", "values": "value"}
_MADE_AGAIN = {"device", "indexer_device", "_sliding_window_tensor"}  # follow from the rest
_SET_LATER = {"device", "dtype", "indexer_device", "indexer_dtype"}  # attributes that a new layer may lack
_DTYPE = "torch.dtype"
_TOKENS = {"keys": -2, "values": -2, "indexer_keys": -2, "indexer_position_ids": -1}  # the dimension that tokens are along
Field = bool | int | float | str | dict[str, str] | None


def _cache_utils() -> Any:
    try:
        from transformers import cache_utils
    except ImportError as error:
        raise InvalidArgument(
            "caches of transformers need a package that is missing: pip install 'pqcodec[transformers]'"
        ) from error
    return cache_utils


# -- a cache's state ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LayerState:
    """All that a layer of a cache holds, by the path of its attribute: ``keys``, ``conv_states.0``, ``cumulative_length``."""

    kind: str  # its class
    tensors: Mapping[str, Any]
    fields: Mapping[str, Field]

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that the layer has seen, of which a sliding window keeps the last; 0 where it counts none."""
        seen = self.fields.get("cumulative_length")
        return seen if isinstance(seen, int) else self.kept

    @property
    def kept(self) -> int:
        """Tokens that keys and values are there of."""
        keys = self.tensors.get("keys")
        return 0 if keys is None or keys.ndim < 2 else int(keys.shape[-2])

    @property
    def cuttable(self) -> bool:
        """Whether the state after fewer tokens is a part of this one: of full attention, not of a window or a recurrence."""
        return self.kind in ("DynamicLayer", "DynamicIndexedLayer", "DummyLayer")

    def batches(self) -> set[int]:
        """How many sequences its tensors are of."""
        return {int(x.shape[path == "indexer_position_ids"]) for path, x in self.tensors.items() if x.ndim > 1}

    def cut(self, first: int, last: int) -> LayerState:
        """The state of some tokens alone; only of a layer that is ``cuttable``."""
        return LayerState(self.kind, {path: along(path, x, first, last) for path, x in self.tensors.items()}, self.fields)

    def without_tensors(self) -> LayerState:
        return LayerState(self.kind, {}, self.fields)


def along(path: str, x: Any, first: int, last: int) -> Any:
    """Some tokens of a tensor of a layer that is ``cuttable``."""
    return x.narrow(_TOKENS[path], first, last - first)


def joined(path: str, parts: Sequence[Any]) -> Any:
    """Tensors of such a layer, one behind the other along the tokens."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts), _TOKENS[path])


@dataclass(frozen=True)
class CacheState:
    """All layers of a cache; ``parts`` has one name, or two where it is an encoder's and a decoder's."""

    kind: str  # "DynamicCache" or "EncoderDecoderCache"
    parts: Mapping[str, Sequence[LayerState]]

    def layers(self) -> Iterator[tuple[str, int, LayerState]]:
        """(prefix of its names, index, state) of each layer."""
        for part, layers in self.parts.items():
            for index, layer in enumerate(layers):
                yield f"{part}.layers.{index}" if part else f"layers.{index}", index, layer


_ENCODER_DECODER = ("self_attention_cache", "cross_attention_cache")


def state_of(cache: Any) -> CacheState:
    """What a cache of transformers holds; the tensors are the cache's own.

    Raises InvalidArgument for what cannot be represented.
    """
    utils = _cache_utils()
    if isinstance(cache, utils.EncoderDecoderCache):
        return CacheState("EncoderDecoderCache", {name: _layers_of(getattr(cache, name), name) for name in _ENCODER_DECODER})
    if not isinstance(cache, utils.Cache):
        raise InvalidArgument(f"a Cache of transformers is expected, not {type(cache).__name__}")
    return CacheState("DynamicCache", {"": _layers_of(cache, "cache")})


def _layers_of(cache: Any, place: str) -> list[LayerState]:
    return [_layer_state(layer, f"{place}, layer {index}") for index, layer in enumerate(cache.layers)]


def _layer_state(layer: Any, place: str) -> LayerState:
    kind = type(layer).__name__
    if kind not in LAYERS or type(layer) is not getattr(_cache_utils(), kind, None):
        raise InvalidArgument(
            f"{place} is a {kind}, which pqcodec cannot save; it can save {', '.join(LAYERS)}. "
            "Is another cache possible, such as DynamicCache(config=model.config)?"
        )
    tensors: dict[str, Any] = {}
    fields: dict[str, Field] = {}
    for name, value in vars(layer).items():
        if name in _MADE_AGAIN:
            continue
        members = {f"{name}.{key}": member for key, member in value.items()} if isinstance(value, dict) else {name: value}
        for path, member in members.items():
            _sort(path, member, tensors, fields, f"{place} ({kind})")
    return LayerState(kind, tensors, fields)


def _sort(path: str, value: Any, tensors: dict[str, Any], fields: dict[str, Field], place: str) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value
    elif isinstance(value, torch.dtype):
        fields[path] = {_DTYPE: str(value).removeprefix("torch.")}
    elif value is None or isinstance(value, (bool, int, float, str)):
        fields[path] = value
    else:
        raise InvalidArgument(f"{place} holds {path} = {type(value).__name__}, which pqcodec cannot save; it would be lost")


def frozen(state: CacheState) -> CacheState:
    """The state as it is now: tensors that a model changes in place are copied, keys and values are replaced by others."""

    def copied(layer: LayerState) -> LayerState:
        tensors = {path: x if path in _TOKENS else x.clone() for path, x in layer.tensors.items()}
        return LayerState(layer.kind, tensors, layer.fields)

    return CacheState(state.kind, {name: [copied(layer) for layer in layers] for name, layers in state.parts.items()})


def empty_cache(config: Any) -> Any:
    """A cache for a model that has seen nothing."""
    return _cache_utils().DynamicCache(config=config)


def argument_of(model: Any) -> str:
    """The name by which a model's ``forward`` and ``generate`` take a cache: it depends on the version, and on the model."""
    names = inspect.signature(model.forward).parameters
    found = next((name for name in ("cache", "past_key_values", "cache_params") if name in names), None)
    if found is None:
        raise InvalidArgument(f"{type(model).__name__}.forward takes no cache")
    return found


def cache_of(state: CacheState) -> Any:
    """A new cache that holds a state's tensors; raises UnsupportedStream where this transformers has no such layers."""
    utils = _cache_utils()
    caches = []
    for part in state.parts.values():
        cache = utils.DynamicCache()
        cache.layers = [_layer_from(layer, index) for index, layer in enumerate(part)]
        caches.append(cache)
    return utils.EncoderDecoderCache(*caches) if state.kind == "EncoderDecoderCache" else caches[0]


def _layer_from(state: LayerState, index: int) -> Any:
    import torch

    place = f"layer {index} ({state.kind})"
    kind = getattr(_cache_utils(), state.kind, None) if state.kind in LAYERS else None
    wanted = {name: state.fields.get(name) for name in LAYERS.get(state.kind, ())}
    if kind is None or not all(isinstance(value, int) for value in wanted.values()):
        raise UnsupportedStream(f"{place}: this transformers has no such layer; install the one that the file was written with")
    layer = kind(**wanted)
    for path, value in [*state.fields.items(), *state.tensors.items()]:
        if isinstance(value, dict):
            value = getattr(torch, value.get(_DTYPE, ""), None)
        name, _, key = path.partition(".")
        if not hasattr(layer, name) and name not in _SET_LATER:
            raise UnsupportedStream(
                f"{place}: this transformers' layer has no {name!r}; install the version that the file was written with"
            )
        if key:
            getattr(layer, name)[int(key)] = value
        else:
            setattr(layer, name, value)
    devices = {name: tensor.device for name, tensor in state.tensors.items()}
    if devices:
        layer.device = devices.get("keys", next(iter(devices.values())))
    if "indexer_keys" in devices:
        layer.indexer_device = devices["indexer_keys"]
    if isinstance(getattr(layer, "_sliding_window_tensor", None), torch.Tensor) and devices:
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(layer.device)
    return layer


# -- RoPE --------------------------------------------------------------------------------------------------------
def pairings(config: Any, state: CacheState) -> dict[str, str]:
    """How the channels of each tensor that went through RoPE are paired, by the tensor's name (``layers.0.keys``).

    A config tells the frequencies (theta, scaling, partial RoPE), but not how a model's code pairs the channels, and some
    layers have no RoPE at all. So the pairing that leaves least energy around the means of all layers is taken, and none
    where the plain mean leaves less.
    """
    plain: dict[str, float] = {}
    turned: dict[str, dict[str, float]] = {}  # energies by pairing
    for prefix, index, layer in state.layers():
        if prefix.startswith("cross_attention_cache") or layer.kept < 2:
            continue
        rotary = "values" if _is_latent(config, index, layer) else "keys"  # a latent cache holds the rotary key as the value
        tensor = layer.tensors[rotary]
        if why_exact(tuple(tensor.shape), exact.dtype_name(tensor)):
            continue
        name, exact_tokens = f"{prefix}.{rotary}", max(EXACT_TOKENS - (layer.tokens - layer.kept), 0)
        plain[name] = rates.energy(tensor, exact_tokens=exact_tokens)
        for pairing, rope in _candidates(config, index, int(tensor.shape[-1])).items():
            turned.setdefault(pairing, {})[name] = rates.energy(tensor, rope=rope, exact_tokens=exact_tokens)

    def left(pairing: str) -> float:
        return sum(min(energy / max(plain[name], 1e-30), 1.0) - 1 for name, energy in turned[pairing].items())

    best = min(turned, key=left, default="")
    return {name: best for name, energy in turned.get(best, {}).items() if energy < plain[name]}


def rope_of(config: Any, index: int, head_dim: int, pairing: str | None) -> Rope | None:
    """The RoPE of a layer's tensor, from its pairing; its first position is 0, since an offset only turns the mean."""
    return None if pairing is None else _candidates(config, index, head_dim).get(pairing)


def ropes(config: Any, state: CacheState) -> dict[str, Rope]:
    """The RoPE of each tensor that went through one, by the tensor's name (``layers.0.keys``)."""
    found = pairings(config, state)
    turned: dict[str, Rope] = {}
    for prefix, index, layer in state.layers():
        for path, tensor in layer.tensors.items():
            name = f"{prefix}.{path}"
            if name in found and (rope := rope_of(config, index, int(tensor.shape[-1]), found[name])):
                turned[name] = rope
    return turned


def longest_prefix(config: Any) -> int | None:
    """Tokens up to which a prefix's keys do not depend on what follows; None: any number.

    Under "dynamic" and "longrope" scaling all frequencies change once a sequence is longer than the original context.
    """
    config = _text(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    if not any(str(one.get("rope_type")) in ("dynamic", "longrope") for one in each):
        return None
    original = next(
        (one["original_max_position_embeddings"] for one in each if one.get("original_max_position_embeddings")), None
    )
    return int(original or config.max_position_embeddings)


def _is_latent(config: Any, index: int, layer: LayerState) -> bool:
    """Whether a layer keeps the latent of multi-head latent attention and beside it one rotary key for all heads."""
    one = _of_layer(_text(config), index)
    rank, rotary = (getattr(one, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    dims = tuple(int(layer.tensors[name].shape[-1]) for name in ("keys", "values"))
    return rank is not None and dims == (rank, rotary)


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _of_layer(config: Any, index: int) -> Any:
    """The config of one layer, where they differ."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _candidates(config: Any, index: int, head_dim: int) -> dict[str, Rope]:
    """The ways in which a layer's channels may turn."""
    radians = frequencies(config, index)
    if not radians or 2 * len(radians) > head_dim:
        return {}
    found = {style: Rope(frequencies=radians, style=style) for style in ("half", "interleaved")}
    still = (0.0,) * (head_dim // 2 - len(radians))
    return found | ({"last, interleaved": Rope(frequencies=(*still, *radians), style="interleaved")} if still else {})


def frequencies(config: Any, index: int) -> tuple[float, ...] | None:
    """Radians a token of each channel pair in a layer, from a model's config; None where it tells of no RoPE.

    Scaled frequencies (linear, YaRN, Llama 3, LongRoPE ...) are those of transformers' own functions.
    """
    config = _text(config)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return None
    layer_type = None
    if "rope_type" not in parameters and "rope_theta" not in parameters:  # one of each type of layer
        types = getattr(config, "layer_types", None)
        layer_type = types[index] if types else None
        parameters = parameters.get(layer_type)
        if not parameters:
            return None
    kind = parameters.get("rope_type", "default")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind == "default" or kind not in ROPE_INIT_FUNCTIONS:
        one = _of_layer(config, index)
        head_dim = getattr(one, "qk_rope_head_dim", None) or getattr(one, "head_dim", None)
        head_dim = head_dim or one.hidden_size // one.num_attention_heads
        dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        theta = parameters.get("rope_theta")
        return None if theta is None else tuple(float(theta) ** (-2 * i / dim) for i in range(dim // 2))
    function: Callable[..., Any] = ROPE_INIT_FUNCTIONS[kind]
    radians, _ = function(config, "cpu", **({} if layer_type is None else {"layer_type": layer_type}))
    return tuple(float(f) for f in radians)


# -- files -------------------------------------------------------------------------------------------------------
def parts_of(config: Any, state: CacheState) -> dict[str, tuple[Any, Part]]:
    """Every tensor of a cache by its name in a file, with what it is."""
    turned = ropes(config, state)
    named: dict[str, tuple[Any, Part]] = {}
    for prefix, index, layer in state.layers():
        for path, tensor in layer.tensors.items():
            if path in _ROLES:
                part = Part(_ROLES[path], index, turned.get(f"{prefix}.{path}"), layer.tokens - layer.kept)
            else:
                part = Part("other", index)
            named[f"{prefix}.{_ROLES.get(path, path)}"] = (tensor, part)
    return named


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
    state = state_of(cache)
    recipe = Recipe(preset=preset, seed=seed, backend=backend)
    told = {**(metadata or {}), KEY: described(state), MODEL: identity.as_dict()}
    return containers.write(
        path, pieces_of(state, identity.config, recipe), told, to=containers.container_of(path, to), progress=progress
    )


def pieces_of(state: CacheState, config: Any, recipe: Recipe) -> list[Piece]:
    """What a container writes of a cache: keys and values are coded, all else is exact."""
    named = parts_of(config, state)
    tensors = InMemory({name: tensor for name, (tensor, _) in named.items()})
    coded = [name for name, (_, part) in named.items() if part.role != "other" and why_exact(*tensors.describe(name)) is None]
    return recipe.pieces(tensors, {name: part for name, (_, part) in named.items()}, coded)


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
            device = identity.device if device is None else device
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
                path: file.decode(f"{prefix}.{_ROLES.get(path, path)}", device=device, backend=backend)
                for path in layer["tensors"]
            }
            parts[name].append(LayerState(layer["class"], tensors, layer["fields"]))
    kinds = {"DynamicCache": ("",), "EncoderDecoderCache": _ENCODER_DECODER}
    return CacheState(told["class"], {name: parts[name] for name in kinds[told["class"]]})
