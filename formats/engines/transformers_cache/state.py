"""Law: the state of a cache of transformers (5.24), layer by layer, and a new cache made from it.

A layer's state is all its attributes: tensors, and plain values such as a sliding window's ``cumulative_length``. Layer classes
that are not in ``LAYERS``, and attributes of other types, are refused by name, so that nothing is lost silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.engines.transformers_cache.held import unwrapped
from pqcodec.formats.engines.transformers_cache.library import cache_utils

LAYERS: dict[str, tuple[str, ...]] = {  # layer classes, and the parameters of their constructors
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window",),
    "DynamicIndexedLayer": (),
    "LinearAttentionLayer": ("number_of_states",),
    "LinearAttentionAndFullAttentionLayer": ("number_of_states",),
    "LinearAttentionAndSlidingWindowAttentionLayer": ("sliding_window", "number_of_states"),
    "DummyLayer": (),
}
RECURRENT = "LinearAttentionLayer"  # the class of layers that hold only a recurrent state
ROLES = {"keys": "key", "values": "value"}  # of a layer's tensors that are encoded
STATE_ELSEWHERE = {"recurrent_gemma"}  # model types that keep recurrent state outside the cache
_OF_NO_ACCOUNT = {
    "only_non_sliding",
    "prefetch_stream",
    "_is_user_defined",
}  # attributes of a cache without effect on its state
_COUNTS_OTHERWISE = {"MtpCache"}  # cache classes with other positions
_MADE_AGAIN = {"device", "indexer_device", "_sliding_window_tensor"}  # attributes that follow from the others
_SET_LATER = {"device", "dtype", "indexer_device", "indexer_dtype"}  # attributes that a new layer may lack
_DTYPE = "torch.dtype"
_MOST = {"sliding_window": (1 << 63) - 1, "number_of_states": 1 << 10}  # caps: a new layer allocates its states
_TOKENS = {"keys": -2, "values": -2, "indexer_keys": -2, "indexer_position_ids": -1}  # the dimension of the tokens
Field = bool | int | float | str | dict[str, str] | None


def _kept() -> Any:
    """The module ``kept``, which needs transformers; raises InvalidArgument without it, or with one too old."""
    cache_utils()
    from pqcodec.formats.engines.transformers_cache import kept

    return kept


@dataclass(frozen=True)
class LayerState:
    """All state of a layer of a cache, by the path of its attribute: ``keys``, ``conv_states.0``, ``cumulative_length``."""

    kind: str  # the name of the layer's class
    tensors: Mapping[str, Any]
    fields: Mapping[str, Field]  # attributes that are no tensors

    @property
    def tokens(self) -> int:
        """Tokens that the layer has seen, of which a sliding window keeps the last; 0 for a layer that does not count them."""
        seen = self.fields.get("cumulative_length")
        return seen if isinstance(seen, int) else self.kept

    @property
    def kept(self) -> int:
        """Tokens whose keys and values the layer holds."""
        keys = self.tensors.get("keys")
        return 0 if keys is None or keys.ndim < 2 else int(keys.shape[-2])

    @property
    def cuttable(self) -> bool:
        """Whether the state after fewer tokens is a slice of this one: in full attention, but not in a window or recurrence."""
        return self.kind in ("DynamicLayer", "DynamicIndexedLayer", "DummyLayer")

    def batches(self) -> set[int]:
        """The numbers of sequences of its tensors; one, unless the layer is inconsistent."""
        return {int(x.shape[path == "indexer_position_ids"]) for path, x in self.tensors.items() if x.ndim > 1}

    def cut(self, first: int, last: int) -> LayerState:
        """The state of tokens ``first`` to ``last`` - 1 of a ``cuttable`` layer."""
        return LayerState(self.kind, {path: along(path, x, first, last) for path, x in self.tensors.items()}, self.fields)

    def without_tensors(self) -> LayerState:
        """The class and fields alone."""
        return LayerState(self.kind, {}, self.fields)


def along(path: str, x: Any, first: int, last: int) -> Any:
    """Tokens ``first`` to ``last`` - 1 of a tensor of a ``cuttable`` layer, as a view; raises KeyError for another path.

    >>> import torch
    >>> along("keys", torch.ones(1, 2, 40, 16), 8, 12).shape
    torch.Size([1, 2, 4, 16])
    """
    return x.narrow(_TOKENS[path], first, last - first)


def tokens_along(path: str, x: Any) -> int:
    """Tokens of a tensor of a ``cuttable`` layer; raises KeyError for another path, IndexError for too few dimensions.

    >>> import torch
    >>> tokens_along("values", torch.ones(1, 2, 40, 16))
    40
    """
    return int(x.shape[_TOKENS[path]])


def token_dimension(path: str) -> int | None:
    """The dimension of the tokens in the tensor at ``path``, negative; None for a tensor without one."""
    return _TOKENS.get(path)


def continues(path: str, x: Any, before: Any) -> bool:
    """Whether a tensor of a ``cuttable`` layer can follow ``before`` along the tokens."""

    def rest(y: Any) -> tuple[Any, ...]:
        shape = list(y.shape)
        del shape[_TOKENS[path]]
        return y.dtype, shape

    return rest(x) == rest(before)


def joined(path: str, parts: Sequence[Any]) -> Any:
    """Tensors of a ``cuttable`` layer concatenated along the tokens.

    >>> import torch
    >>> joined("keys", [torch.ones(1, 2, 40, 16), torch.ones(1, 2, 8, 16)]).shape
    torch.Size([1, 2, 48, 16])
    """
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts), _TOKENS[path])


@dataclass(frozen=True)
class CacheState:
    """All layers of a cache."""

    kind: str  # "DynamicCache" or "EncoderDecoderCache"
    parts: Mapping[str, Sequence[LayerState]]  # one part called "", or the two of ENCODER_DECODER

    def batches(self) -> set[int]:
        """The numbers of sequences of all tensors."""
        return {batch for _, _, layer in self.layers() for batch in layer.batches()}

    def layers(self) -> Iterator[tuple[str, int, LayerState]]:
        """(prefix of its tensors' names, index, state) of each layer."""
        for part, layers in self.parts.items():
            for index, layer in enumerate(layers):
                yield f"{part}.layers.{index}" if part else f"layers.{index}", index, layer


ENCODER_DECODER = ("self_attention_cache", "cross_attention_cache")


def state_of(cache: Any, config: Any = None) -> CacheState:
    """The state of a cache of transformers; the tensors are the cache's own, not copies.

    Raises InvalidArgument for state that cannot be represented, and for a model, by its ``config``, with state elsewhere.

    >>> import torch
    >>> from transformers import DynamicCache, LlamaConfig
    >>> config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    >>> cache = DynamicCache(config=config)
    >>> out = cache.update(torch.ones(1, 2, 40, 16), torch.zeros(1, 2, 40, 16), 0)
    >>> [(name, index, layer.kind, list(layer.tensors)) for name, index, layer in state_of(cache, config).layers()]
    [('layers.0', 0, 'DynamicLayer', ['keys', 'values'])]
    """
    utils = cache_utils()
    if getattr(config, "model_type", None) in STATE_ELSEWHERE:
        raise InvalidArgument(
            f"a {config.model_type} keeps recurrent state in its modules, outside the cache: it would be lost"
        )
    if isinstance(cache, utils.EncoderDecoderCache):
        return CacheState("EncoderDecoderCache", {name: _layers_of(getattr(cache, name), name) for name in ENCODER_DECODER})
    if not isinstance(cache, utils.Cache):
        raise InvalidArgument(f"a Cache of transformers is expected, not {type(cache).__name__}")
    return CacheState("DynamicCache", {"": _layers_of(cache, "cache")})


def padding_of(padding: Any, batches: set[int] | None = None) -> tuple[int, ...]:
    """The tokens of left padding of each sequence, from such a list or an attention mask [sequences, tokens]; () for None.

    Raises InvalidArgument for anything else, and for another number of sequences than in ``batches``.

    >>> padding_of([[0, 0, 1, 1], [1, 1, 1, 1]]), padding_of([2, 0]), padding_of(None)
    ((2, 0), (2, 0), ())
    """
    import torch

    if padding is None:
        return ()
    x = torch.as_tensor(padding)
    if x.ndim == 2:
        x = (x == 0).long().cumprod(-1).sum(-1)
    if x.ndim != 1 or x.is_floating_point() or bool((x < 0).any()):
        raise InvalidArgument(
            "padding: a number of tokens for each sequence is expected, or an attention mask of two dimensions"
        )
    if batches and batches != {len(x)}:
        raise InvalidArgument(f"padding of {len(x)} sequences is told of a cache of {max(batches)}")
    return tuple(int(tokens) for tokens in x)


def _layers_of(cache: Any, where: str) -> list[LayerState]:
    found = _states_of(cache, where)
    kind, plain = type(cache), cache_utils().DynamicCache
    own = (plain, _kept().KeptCache, _kept().RecurrentCache)
    extra = set() if kind in own else set(vars(cache)) - set(vars(plain())) - _OF_NO_ACCOUNT
    if extra or kind.__name__ in _COUNTS_OTHERWISE:
        raise InvalidArgument(f"{where} is a {kind.__name__}, which holds more than its layers ({', '.join(sorted(extra))})")
    return found


def _states_of(cache: Any, where: str) -> list[LayerState]:
    return [_layer_state(layer, f"{where}, layer {index}") for index, layer in enumerate(cache.layers)]


def _layer_state(layer: Any, where: str) -> LayerState:
    kind = type(layer).__name__
    if kind not in LAYERS or type(layer) is not getattr(cache_utils(), kind, None):
        raise InvalidArgument(
            f"{where} is a {kind}, which pqcodec cannot save; it can save {', '.join(LAYERS)}. "
            "Is another cache possible, such as DynamicCache(config=model.config)?"
        )
    tensors: dict[str, Any] = {}
    fields: dict[str, Field] = {}
    for name, value in vars(layer).items():
        if name in _MADE_AGAIN:
            continue
        members = {f"{name}.{key}": member for key, member in value.items()} if isinstance(value, dict) else {name: value}
        for path, member in members.items():
            _sort(path, member, tensors, fields, f"{where} ({kind})")
    return LayerState(kind, tensors, fields)


def _sort(path: str, value: Any, tensors: dict[str, Any], fields: dict[str, Field], where: str) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value
    elif isinstance(value, torch.dtype):
        fields[path] = {_DTYPE: str(value).removeprefix("torch.")}
    elif value is None or isinstance(value, (bool, int, float, str)):
        fields[path] = value
    else:
        raise InvalidArgument(f"{where} holds {path} = {type(value).__name__}, which pqcodec cannot save; it would be lost")


def frozen(state: CacheState) -> CacheState:
    """The state as it is now: copies of tensors that a model changes in where; keys and values, which it replaces, are kept."""

    def copied(layer: LayerState) -> LayerState:
        tensors = {path: x if path in _TOKENS else x.clone() for path, x in layer.tensors.items()}
        return LayerState(layer.kind, tensors, layer.fields)

    return CacheState(state.kind, {name: [copied(layer) for layer in layers] for name, layers in state.parts.items()})


def empty_cache(config: Any) -> Any:
    """A new cache without tokens for the model of a config."""
    cache = cache_utils().DynamicCache(config=config)
    if cache.layers and all(type(layer).__name__ == RECURRENT for layer in cache.layers):
        cache = _kept().RecurrentCache(config=config)
        cache.tell(0)
    return cache


def tell_tokens(cache: Any, tokens: int) -> None:
    """Set the number of tokens that a ``RecurrentCache`` has seen; other caches count them themselves."""
    if isinstance(cache, _kept().RecurrentCache):
        cache.tell(tokens)


def argument_of(model: Any) -> str:
    """The name of the parameter by which a model's ``forward`` and ``generate`` take a cache, which depends on the version.

    Looks through wrappers with generic parameters (torch.compile, PeftModel, a replaced ``forward``). Raises InvalidArgument.
    """
    inner = unwrapped(model)
    for forward in (getattr(model, "forward", None), getattr(inner, "forward", None), getattr(type(inner), "forward", None)):
        names = inspect.signature(forward).parameters if callable(forward) else {}
        for name in ("cache", "past_key_values", "cache_params"):
            if name in names:
                return name
    raise InvalidArgument(f"{type(inner).__name__}.forward takes no cache")


def cache_of(state: CacheState) -> Any:
    """A new cache that holds a state's tensors; raises UnsupportedStream for layers that this transformers lacks.

    Raises CorruptStream for a state that no cache has.
    """
    utils = cache_utils()
    caches = []
    for part in state.parts.values():
        recurrent = bool(part) and all(layer.kind == RECURRENT for layer in part)
        cache = (_kept().RecurrentCache if recurrent else _kept().KeptCache)()
        cache.layers = [_layer_from(layer, index) for index, layer in enumerate(part)]
        caches.append(cache)
    return utils.EncoderDecoderCache(*caches) if state.kind == "EncoderDecoderCache" else caches[0]


def _layer_from(state: LayerState, index: int) -> Any:
    import torch

    where = f"layer {index} ({state.kind})"
    if not isinstance(state.kind, str) or not isinstance(state.fields, dict):
        raise CorruptStream(f"{where}: its class is no name, or its fields are no object")
    kind = getattr(cache_utils(), state.kind, None) if state.kind in LAYERS else None
    wanted = {name: state.fields.get(name) for name in LAYERS.get(state.kind, ())}
    if kind is None or not all(type(value) is int and 0 <= value <= _MOST[name] for name, value in wanted.items()):
        raise UnsupportedStream(f"{where}: this transformers has no such layer; install the one that the file was written with")
    layer = kind(**wanted)
    for path, value in [*state.fields.items(), *state.tensors.items()]:
        if isinstance(value, dict):
            value = _dtype(value, where)
        name, _, key = path.partition(".")
        own = not name.startswith("__") and hasattr(layer, name) and not callable(getattr(layer, name))
        if not own and name not in _SET_LATER:
            raise UnsupportedStream(
                f"{where}: this transformers' layer has no {name!r}; install the version that the file was written with"
            )
        try:
            if key:
                getattr(layer, name)[int(key)] = value
            else:
                setattr(layer, name, value)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise CorruptStream(f"{where}: {path!r:.60} is nothing that such a layer holds ({error})") from error
    devices = {name: tensor.device for name, tensor in state.tensors.items()}
    if devices:
        layer.device = devices.get("keys", next(iter(devices.values())))
    if "indexer_keys" in devices:
        layer.indexer_device = devices["indexer_keys"]
    if isinstance(getattr(layer, "_sliding_window_tensor", None), torch.Tensor) and devices:
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(layer.device)
    return layer


def _dtype(value: Mapping[str, Any], where: str) -> Any:
    """The torch dtype that a field names; raises UnsupportedStream."""
    import torch

    name = value.get(_DTYPE)
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise UnsupportedStream(f"{where}: {name!r:.60} is no dtype of this torch; install a newer one")
    return found


def check_layers(layers: Sequence[LayerState], paths: Sequence[Sequence[str]]) -> None:
    """Check that layers with tensors at ``paths`` can be made, before the tensors are decoded.

    Raises CorruptStream, UnsupportedStream or TypeError.
    """
    import torch

    some = torch.empty(0)
    for index, (layer, tensor_paths) in enumerate(zip(layers, paths, strict=True)):
        _layer_from(LayerState(layer.kind, dict.fromkeys(tensor_paths, some), layer.fields), index)
