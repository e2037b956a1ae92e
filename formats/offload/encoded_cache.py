"""Law: a cache of transformers whose old tokens are encoded: what a layer's ``update`` keeps, encodes and gives to attention.

A layer is its first tokens and its last ones, both exact, and the tokens between as streams (``old_tokens``). A step decodes
these into a scratch that all layers of a device share and puts the exact ones beside them, so what ``update`` returns holds
until the next layer's: the cache is for inference. Layers that are bounded (sliding windows), that hold a recurrence, or whose
keys other layers read are transformers' own, and exact. Works with transformers 5.20 to 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils

from pqcodec.codings.presets import preset as preset_of
from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.offload.first_tokens import FirstTokens
from pqcodec.formats.offload.old_tokens import OldTokens, checked_place, old_tokens_in
from pqcodec.formats.offload.workspace import PairKind, Workspace
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.policy.recipe import EXACT_TOKENS, why_exact
from pqcodec.options import EncodeOptions
from pqcodec.placed import current
from pqcodec.stages.centre import Rope

WINDOW = 128  # last tokens that are exact, at least
CHUNK = 512  # tokens that are encoded at once while a text grows
_FIRST_ROOM = 64  # tokens
_ROLES = ("keys", "values")
_OWN_CACHES = {"minimax": "MiniMaxCache"}  # of model types that take no other class
_TWO_CACHES = "EncoderDecoderCache(EncodedCache(model), DynamicCache())"


@dataclass(frozen=True)
class Options:
    """Of an ``EncodedCache``; raises InvalidArgument."""

    presets: tuple[str, str] = ("pq3", "pq3")
    place: str = "host"
    window: int = WINDOW
    chunk: int = CHUNK
    exact_tokens: int = EXACT_TOKENS
    seed: int = 0
    backend: str = "auto"
    padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checked_place(self.place)
        for preset in self.presets:
            preset_of(preset)
        for name, least in (("window", 1), ("chunk", 1), ("exact_tokens", 0)):
            if getattr(self, name) < least:
                raise InvalidArgument(f"{name} {getattr(self, name)}: at least {least} is expected")

    @property
    def room(self) -> int:
        """Exact last tokens of which some are encoded."""
        return self.window + self.chunk


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache: streams, exact tokens, and what all layers share on the devices."""

    encoded: int
    exact: int
    scratch: int


class EncodedCache(cache_utils.DynamicCache):
    """A cache for ``model.generate(..., past_key_values=cache)`` (``cache=`` in newer versions) of a model, or by its config.

    ``place``: where encoded tokens lie, "host" (pinned memory; the next layer's are fetched while a layer computes) or
    "device". ``preset``: one for all, or one of keys and one of values. The last ``window`` tokens and the first
    ``exact_tokens`` are exact; a text grows by ``window`` to ``window + chunk`` exact tokens before some are encoded, a long
    prompt is encoded at once. ``padding``: of sequences that are padded at their left, how many tokens of each are padding,
    or the attention mask [sequences, tokens]: the first ``exact_tokens`` behind it are exact, too; without it they are coded.
    On a GPU, keys or values that hold NaN or Inf raise NonFiniteInput when they are encoded.

    The cache is of one text and of the model as it is meanwhile: nothing looks whether that changes (a PrefixStore does). It
    can be copied and pickled. Raises InvalidArgument for models that take no such cache, and ``generate`` does where the
    cache holds all tokens of the prompt.
    """

    def __init__(
        self,
        model: Any,
        *,
        preset: str | Sequence[str] = "pq3",
        place: str = "host",
        window: int = WINDOW,
        chunk: int = CHUNK,
        exact_tokens: int = EXACT_TOKENS,
        seed: int = 0,
        backend: str = "auto",
        padding: Any = None,
    ) -> None:
        presets = (preset, preset) if isinstance(preset, str) else tuple(preset)
        if len(presets) != 2:
            raise InvalidArgument(f"{len(presets)} presets are given; give one for all, or one of keys and one of values")
        self.options = Options(
            (presets[0], presets[1]), place, window, chunk, exact_tokens, seed, backend, tc.padding_of(padding)
        )
        config = getattr(model, "config", model)
        _check_model(config.get_text_config(decoder=True))
        super().__init__(config=config)
        self._workspaces: dict[Any, Workspace] = {}
        self._of_decoder, self._last = bool(getattr(config, "is_encoder_decoder", False)), -1
        if self._of_decoder and len(self.layers) < 2:
            raise InvalidArgument("an encoder-decoder of one layer has no EncodedCache; take a DynamicCache")
        lenders = _lenders(config.get_text_config(decoder=True))
        self.layers = [
            EncodedLayer(self.options, config, index, self._workspaces)
            if type(layer) is cache_utils.DynamicLayer and index not in lenders
            else layer
            for index, layer in enumerate(self.layers)
        ]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if layer_idx >= len(self.layers):
            raise InvalidArgument(
                f"a model of {layer_idx + 1} layers or more is given an EncodedCache of {len(self.layers)}: make one of it"
            )
        if self._of_decoder and layer_idx == self._last:  # its cross-attention writes here, too, as if there were more tokens
            self._last = -1
            raise InvalidArgument(f"an encoder-decoder takes {_TWO_CACHES}, not an EncodedCache alone")
        self._last = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = int(super().get_seq_length(layer_idx))
        return length if torch.compiler.is_compiling() else tc.check_fed(length)

    @property
    def is_compileable(self) -> bool:
        """What transformers compiles of its own accord has caches of a fixed size."""
        return False

    @property
    def encoded_layers(self) -> list[EncodedLayer]:
        return [layer for layer in self.layers if isinstance(layer, EncodedLayer)]

    @property
    def memory(self) -> Memory:
        layers = self.encoded_layers
        exact_bytes = sum(layer.exact_bytes for layer in layers)
        others = (layer for layer in self.layers if not isinstance(layer, EncodedLayer))
        exact_bytes += sum(x.nbytes for layer in others for x in vars(layer).values() if isinstance(x, torch.Tensor))
        encoded = sum(layer.encoded_bytes for layer in layers)
        return Memory(encoded, exact_bytes, sum(space.nbytes for space in self._workspaces.values()))


def _check_model(config: Any) -> None:
    """Raises InvalidArgument, by name, for a model whose code reads keys past ``update``, or takes caches of its own alone."""
    kind = str(getattr(config, "model_type", type(config).__name__))
    if kind in _OWN_CACHES:
        raise InvalidArgument(f"a {kind} takes a {_OWN_CACHES[kind]} alone, not an EncodedCache: call generate without a cache")
    if getattr(config, "cross_attention_layers", None):
        raise InvalidArgument(
            f"a {kind} looks for its images' keys in the cache itself, where an EncodedCache has none: take a DynamicCache"
        )


def _lenders(config: Any) -> set[int]:
    """Layers whose keys and values later layers read again: those must outlast the scratch."""
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return {index for index, mode in enumerate(modes) if mode == "store"}
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    return set({kind: index for index, kind in enumerate(kinds[: len(kinds) - shared])}.values()) if shared else set()


class Tail:
    """The exact last tokens of a layer: the first ``tokens`` of ``memory``, which has room for more."""

    def __init__(self, keys: Any, values: Any) -> None:
        self.tokens = 0
        self._lie_in(_room_of(keys, 0), _room_of(values, 0))

    def _lie_in(self, keys: Any, values: Any) -> None:
        self.memory = keys, values
        self.room = int(keys.shape[-2])
        self.kind = PairKind.of(keys, values)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.memory)

    def read(self) -> tuple[Any, Any]:
        keys, values = (x[:, :, : self.tokens] for x in self.memory)
        return keys, values

    def check(self, keys: Any, values: Any) -> None:
        """Raises InvalidArgument where tokens are of another batch, of other heads, or of a dtype that would be rounded."""
        told = PairKind.of(keys, values)
        if told.keys[0] != self.kind.keys[0]:
            raise InvalidArgument(f"{told.keys[0]} sequences are given to a cache of {self.kind.keys[0]}")
        if (told.keys, told.values) != (self.kind.keys, self.kind.values):
            raise InvalidArgument(
                f"heads and head_dim {told.keys[1:]} (keys) and {told.values[1:]} (values) are given to a cache of "
                f"{self.kind.keys[1:]} and {self.kind.values[1:]}: it is another model's"
            )
        for role, new, kept in zip(_ROLES, told.dtypes, self.kind.dtypes, strict=True):
            if new != kept and torch.promote_types(new, kept) != kept:
                raise InvalidArgument(
                    f"{role} of {new} are given to a cache that holds them as {kept}: "
                    "read a whole text under one autocast, or begin anew with reset()"
                )

    def fits(self, keys: Any) -> bool:
        """Whether there is room for more tokens."""
        return self.tokens + int(keys.shape[-2]) <= self.room

    def append(self, keys: Any, values: Any) -> None:
        """Behind the others; the memory stays where it is while there is room."""
        more = int(keys.shape[-2])
        if not self.fits(keys):
            self._move(max(_FIRST_ROOM, (self.tokens + more) * 3 // 2))
        for room, x in zip(self.memory, (keys, values), strict=True):
            room.narrow(2, self.tokens, more).copy_(x)
        self.tokens += more

    def _move(self, room: int) -> None:
        old = self.read()
        self._lie_in(*(_room_of(x, room) for x in old))
        for new, x in zip(self.memory, old, strict=True):
            new[:, :, : self.tokens] = x

    def replace(self, keys: Any, values: Any, *, room: int) -> None:
        """Other tokens, of which none is in the tail's own memory, with room for so many."""
        self.tokens = 0
        if self.kind != PairKind.of(keys, values) or self.room != room:
            self._lie_in(_room_of(keys, room), _room_of(values, room))
        self.append(keys, values)

    def cut(self, tokens: int) -> None:
        self.tokens = min(self.tokens, tokens)

    def select(self, rows: Any) -> None:
        self._lie_in(*(_selected(x, rows) for x in self.memory))


def _room_of(x: Any, tokens: int) -> Any:
    """Memory for so many tokens like those of x [sequences, heads, n, head_dim]."""
    with torch.inference_mode(False):
        return torch.empty((*x.shape[:2], tokens, x.shape[-1]), dtype=x.dtype, device=x.device)


def _selected(x: Any, rows: Any) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return x.index_select(0, rows.to(x.device))


class EncodedLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """A layer of full attention."""

    is_sliding = False
    is_croppable = True

    def __init__(self, options: Options, config: Any, index: int, workspaces: dict[Any, Workspace]) -> None:
        super().__init__()
        self._options, self._config, self._index, self._workspaces = options, config, index, workspaces
        self._sinks: tuple[Any, Any] | None = None  # the exact first tokens, once others are encoded
        self._old: OldTokens | None = None
        self._tail: Tail | None = None
        self._padded: FirstTokens | None = None
        self._encodes = True

    # What other layers keep here is encoded: a model that would read it past ``update`` is told so.
    @property
    def keys(self) -> Any:
        raise InvalidArgument(f"an EncodedCache gives keys to attention alone; cross-attention takes {_TWO_CACHES}")

    @keys.setter
    def keys(self, value: Any) -> None: ...

    values = keys

    # -- what transformers calls -----------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        self._tail = Tail(key_states, value_states)
        if self._options.padding:
            self._padded = FirstTokens(self._options.padding, self._options.exact_tokens, int(key_states.shape[0]))
        self._encodes = all(why_exact(tuple(x.shape), exact.dtype_name(x)) is None for x in (key_states, value_states))
        self.is_initialized = True

    @torch.compiler.disable  # a compiled model breaks its graph here: kernels are launched by address, and memory is kept
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keep new tokens [sequences, heads, n, head_dim]; all keys and values, until the next layer's update."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise InvalidArgument("an EncodedCache is for inference: call the model under torch.no_grad() or inference_mode()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._tail is not None
        self._tail.check(key_states, value_states)
        with current(key_states.device):
            return self._grown(key_states, value_states) if self._has_old else self._begun(key_states, value_states)

    def get_seq_length(self) -> int:
        return self._kept_first + self._encoded + (self._tail.tokens if self._tail else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._sinks = self._tail = self._padded = None
        if self._old is not None:
            self._old.cut(0)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Any) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self._sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        self._select(torch.arange(self._sequences)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): the tokens to remove are a negative number here, as in DynamicCache")
        left = max(self.get_seq_length() + tokens_to_remove, 0)
        if self._tail is None or not tokens_to_remove:
            return
        behind = left - self._kept_first - self._encoded
        self._tail.cut(max(behind, 0))
        if self._padded is not None:
            self._padded.cut(left)
        if behind < 0 and self._old is not None and self._sinks is not None:
            self._old.cut(max(left - self._kept_first, 0))
            if left <= self._kept_first:
                self._tail.replace(*(x[:, :, :left] for x in self._sinks), room=max(left, self._options.room))
                self._sinks = None

    # -- what it does ----------------------------------------------------------------------------------------------
    @property
    def encoded_bytes(self) -> int:
        return self._old.nbytes if self._old else 0

    @property
    def exact_bytes(self) -> int:
        padded = self._padded.nbytes if self._padded else 0
        return (self._tail.nbytes if self._tail else 0) + padded + sum(x.nbytes for x in self._sinks or ())

    @property
    def _has_old(self) -> bool:
        return self._encoded > 0

    @property
    def _encoded(self) -> int:
        return self._old.tokens if self._old else 0

    @property
    def _kept_first(self) -> int:
        return 0 if self._sinks is None else int(self._sinks[0].shape[-2])

    @property
    def _sequences(self) -> int:
        return self._tail.read()[0].shape[0] if self._tail else 0

    def _begun(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """While nothing is encoded, the tail holds all tokens."""
        tail, options = self._tail, self._options
        assert tail is not None
        tokens = tail.tokens + int(keys.shape[-2])
        if not self._encodes or tokens < options.exact_tokens + options.window + options.chunk:
            tail.append(keys, values)
            return tail.read()
        if tail.tokens:
            keys, values = (torch.cat(pair, -2) for pair in zip(tail.read(), (keys, values), strict=True))
        first, last = options.exact_tokens, tokens - options.window
        self._encode(keys[:, :, first:last], values[:, :, first:last], first)
        self._sinks = _kept(keys, first), _kept(values, first)
        tail.replace(keys[:, :, last:], values[:, :, last:], room=options.room)
        return keys, values

    def _grown(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Decode, put the exact tokens beside, and encode what the tail has too many of for the next time.

        Beside the old tokens comes the tail's whole room, whatever is in it: its place does not change at each step then.
        """
        tail, old, sinks = self._tail, self._old, self._sinks
        assert tail is not None
        assert old is not None
        assert sinks is not None
        more, room, fits = int(keys.shape[-2]), self._options.room, tail.fits(keys)
        end = self._kept_first + old.tokens
        tokens = end + tail.tokens + more
        if fits:
            tail.append(keys, values)
        whole = old.workspace.scratch(tail.kind, max(tokens, end + tail.room))
        old.decode(whole, sinks, tail.memory)
        if self._padded is not None:
            self._padded.put(whole)
        if not fits:
            for all_tokens, x in zip(whole, (keys, values), strict=True):
                all_tokens[:, :, tokens - more : tokens] = x
        if tokens - end >= room:
            last = tokens - self._options.window
            self._encode(whole[0][:, :, end:last], whole[1][:, :, end:last], end)
            tail.replace(*(x[:, :, last:tokens] for x in whole), room=room)
        return whole[0].narrow(2, 0, tokens), whole[1].narrow(2, 0, tokens)

    def _encode(self, keys: Any, values: Any, first: int) -> None:
        """Tokens from the one with the number ``first`` on."""
        if self._old is None:
            presets = dict(zip(_ROLES, self._options.presets, strict=True))
            ropes = _ropes(self._config, self._index, keys, values)
            options = {role: self._encoding(presets[role], role, ropes.get(role)) for role in _ROLES}
            self._old = old_tokens_in(self._options.place, options, self._options.backend, self._workspace(keys))
        self._old.append(keys, values)
        if self._padded is not None:
            self._padded.keep(keys, values, first)

    def _encoding(self, preset: str, role: str, rope: Rope | None) -> EncodeOptions:
        """How a layer's "keys" or "values" are encoded: keys are centred, values are not, as in a file."""
        center = "rope" if rope else "mean" if role == "keys" else None
        return EncodeOptions(preset, self._options.seed, center, rope)

    def _workspace(self, keys: Any) -> Workspace:
        """The workspace of the device that tensors are on, which all layers there share."""
        if keys.device not in self._workspaces:
            self._workspaces[keys.device] = Workspace(keys.device)
        return self._workspaces[keys.device]

    def _select(self, rows: Any) -> None:
        if self._tail is None:
            return
        self._tail.select(rows)
        if self._padded is not None:
            self._padded.select(rows.tolist())
        if self._has_old and self._old is not None and self._sinks is not None:
            keys, values = (_selected(x, rows) for x in self._sinks)
            self._sinks = keys, values
            self._old.select(rows.tolist())


def _kept(x: Any, tokens: int) -> Any:
    """A copy of the first tokens."""
    room = _room_of(x, tokens)
    room.copy_(x[:, :, :tokens])
    return room


def _ropes(config: Any, index: int, keys: Any, values: Any) -> dict[str, Rope]:
    """The RoPE that a layer's keys (values, of a latent cache) went through, as the first sequence's two first heads tell."""
    nothing = tc.LayerState("DummyLayer", {}, {})
    layer = tc.LayerState("DynamicLayer", {"keys": keys[:1, :2], "values": values[:1, :2]}, {})
    state = tc.CacheState("DynamicCache", {"": [*[nothing] * index, layer]})
    turned = tc.ropes(config, state, tc.pairings(config, state))
    return {name.rpartition(".")[2]: rope for name, rope in turned.items()}
