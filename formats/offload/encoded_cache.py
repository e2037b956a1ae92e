"""Law: a cache of transformers whose older tokens are encoded: what each layer keeps exact, encodes, and gives to attention.

A layer keeps its first and its last tokens exact, and the tokens between as streams (``old_tokens``). At each step it decodes
the streams into a scratch that all layers of a device share, and copies the exact tokens to both sides of them. So what
``update`` returns is valid until the next layer's ``update``, and the cache is for inference only. Layers with a sliding
window or a recurrence, and layers whose keys other layers read, stay transformers' own and exact. Works with transformers 5.24.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch

from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.transformers_cache import library
from pqcodec.formats.offload import code_attention
from pqcodec.formats.offload.encodable import check_encodable, lending_layers
from pqcodec.formats.offload.first_tokens import FirstTokens
from pqcodec.formats.offload.old_tokens import OldTokens, checked_place, old_tokens_in
from pqcodec.formats.offload.tail import ROLES, Tail, room_for, selected
from pqcodec.formats.offload.workspace import Workspace
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.policy.recipe import EXACT_TOKENS, preset_pair, why_exact
from pqcodec.options import EncodeOptions, check_numbers
from pqcodec.placed import current
from pqcodec.stages.centre import Rope

library.check()
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils, masking_utils  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

AttentionInterface.register(code_attention.NAME, partial(code_attention.attend_to_layer, sdpa_attention_forward))
AttentionMaskInterface.register(code_attention.NAME, masking_utils.sdpa_mask)

WINDOW = 128  # last tokens that are exact, at least
CHUNK = 512  # tokens that are encoded at once while a text grows
_TWO_CACHES = "EncoderDecoderCache(EncodedCache(model), DynamicCache())"


@dataclass(frozen=True)
class Options:
    """The options of an ``EncodedCache``, checked when they are made; raises InvalidArgument."""

    presets: tuple[str, str] = (DEFAULT_PRESET, DEFAULT_PRESET)
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
            check_restores(preset, "an EncodedCache")
        check_numbers(seed=self.seed, exact_tokens=self.exact_tokens)
        for name, value in (("window", self.window), ("chunk", self.chunk)):
            if not isinstance(value, Integral) or value < 1:
                raise InvalidArgument(f"{name} {value!r}: a whole number of at least 1 is expected")

    @property
    def room(self) -> int:
        """Tokens in a tail that is full: all but ``window`` of them are encoded then."""
        return self.window + self.chunk


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache.

    ``encoded``: streams. ``exact``: exact tokens, with the room for more. ``scratch``: what the layers of a device share there.
    """

    encoded: int
    exact: int
    scratch: int


class EncodedCache(cache_utils.DynamicCache):
    """A cache for ``model.generate(..., past_key_values=cache)`` (``cache=`` in newer versions) from a model or its config.

    ``place``: where encoded tokens are kept, "host" (pinned memory; the next layer's are copied while a layer computes) or
    "device". ``preset``: one for all, or a pair, for keys and for values. The first ``exact_tokens`` and the last ``window``
    tokens are exact. The exact last tokens grow to ``window + chunk`` before all but ``window`` of them are encoded; a long
    prompt is encoded at once. ``padding``: for sequences that are padded at their left, the tokens of padding of each, or the
    attention mask [sequences, tokens]; the first ``exact_tokens`` behind the padding are exact then, and encoded without it.
    On a GPU, keys or values with NaN or Inf raise NonFiniteInput when they are encoded.

    A model of ``attn_implementation="pqcodec"`` does not decode on the CPU, nor on a GPU with ``place="device"`` and a preset
    of quads: it attends straight from codes (``pqcodec.attention``), but where a mask or an option of the model needs tensors,
    and but for padded sequences. Importing this class makes that name known to transformers, which refuses it before. On a GPU
    ``CapturedSteps`` makes its steps CUDA graphs.

    The cache belongs to one text and to the model as it is while it reads that text; it does not notice a change of the model
    (a PrefixStore does). It can be copied and pickled. Raises InvalidArgument for models that cannot use such a cache, and
    ``generate`` raises it if the cache holds all tokens of the prompt already.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.arange(300)[None] % 99
    >>> cache = EncodedCache(model, place="device", window=16, chunk=64)
    >>> with torch.inference_mode():
    ...     out = model(ids, past_key_values=cache)
    >>> cache.get_seq_length(), cache.memory.encoded > 0
    (300, True)
    """

    def __init__(
        self,
        model: Any,
        *,
        preset: str | Sequence[str] = DEFAULT_PRESET,
        place: str = "host",
        window: int = WINDOW,
        chunk: int = CHUNK,
        exact_tokens: int = EXACT_TOKENS,
        seed: int = 0,
        backend: str = "auto",
        padding: Any = None,
    ) -> None:
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise InvalidArgument(f"a transformers model or its config is expected, not {type(model).__name__}")
        self.options = Options(preset_pair(preset), place, window, chunk, exact_tokens, seed, backend, tc.padding_of(padding))
        check_encodable(config.get_text_config(decoder=True))
        if _reads_codes(config) and not getattr(model, "_supports_sdpa", True):
            raise InvalidArgument(
                f"a {type(model).__name__} does not know 'sdpa', which 'pqcodec' falls back to: it takes 'eager'"
            )
        super().__init__(config=config)
        self._workspaces: dict[Any, Workspace] = {}
        self._of_decoder, self._last = bool(getattr(config, "is_encoder_decoder", False)), -1
        if self._of_decoder and len(self.layers) < 2:
            raise InvalidArgument("an encoder-decoder of one layer has no EncodedCache; take a DynamicCache")
        lenders = lending_layers(config.get_text_config(decoder=True))
        self.layers = [
            EncodedLayer(self.options, config, index, self._workspaces)
            if type(layer) is cache_utils.DynamicLayer and index not in lenders
            else layer
            for index, layer in enumerate(self.layers)
        ]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keep a layer's new tokens [sequences, heads, n, head_dim]; return all its keys and values (see ``EncodedLayer``).

        Raises InvalidArgument for another model's layers, and for an encoder-decoder's cross-attention.
        """
        if layer_idx >= len(self.layers):
            raise InvalidArgument(
                f"a model of {layer_idx + 1} layers or more is given an EncodedCache of {len(self.layers)}: make one of it"
            )
        if self._of_decoder and layer_idx == self._last:  # cross-attention writes here, too, as if tokens had come
            self._last = -1
            raise InvalidArgument(f"an encoder-decoder takes {_TWO_CACHES}, not an EncodedCache alone")
        self._last = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in a layer; raises InvalidArgument in ``generate`` if these are all tokens of the prompt."""
        length = int(super().get_seq_length(layer_idx))
        return length if torch.compiler.is_compiling() else tc.check_fed(length)

    @property
    def is_compileable(self) -> bool:
        """False: transformers compiles a model by itself only for caches of a fixed size."""
        return False

    @property
    def encoded_layers(self) -> list[EncodedLayer]:
        """The layers of full attention, whose older tokens are encoded; all others are transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, EncodedLayer)]

    @property
    def memory(self) -> Memory:
        """The bytes that the cache takes now."""
        layers = self.encoded_layers
        exact_bytes = sum(layer.exact_bytes for layer in layers)
        others = (layer for layer in self.layers if not isinstance(layer, EncodedLayer))
        exact_bytes += sum(x.nbytes for layer in others for x in vars(layer).values() if isinstance(x, torch.Tensor))
        encoded = sum(layer.encoded_bytes for layer in layers)
        return Memory(encoded, exact_bytes, sum(space.nbytes for space in self._workspaces.values()))


class EncodedLayer(cache_utils.CacheLayerMixin):  # type: ignore[misc]
    """A layer of full attention: exact first tokens (``_sinks``), encoded ones (``_old``), and exact last ones (``_tail``).

    Until something is encoded, the tail holds all tokens.
    """

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

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedLayer:
        """A copy for the same model, whose config says whether attention reads codes, also once that changes."""
        new = type(self).__new__(type(self))
        memo |= {id(self): new, id(self._config): self._config}
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    @property
    def keys(self) -> Any:
        """Raises InvalidArgument: a model that reads keys here, and not from ``update``, would miss the encoded ones."""
        raise InvalidArgument(f"an EncodedCache gives keys to attention alone; cross-attention takes {_TWO_CACHES}")

    @keys.setter
    def keys(self, value: Any) -> None:
        """Do nothing: the base class sets None here."""

    values = keys

    # -- what transformers calls -----------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Take over device, dtype and shapes of the first tokens; ``update`` calls this."""
        self.device, self.dtype = key_states.device, key_states.dtype
        self._tail = Tail(key_states, value_states)
        if self._options.padding:
            self._padded = FirstTokens(self._options.padding, self._options.exact_tokens, int(key_states.shape[0]))
        self._encodes = all(why_exact(tuple(x.shape), exact.dtype_name(x)) is None for x in (key_states, value_states))
        self.is_initialized = True

    @torch.compiler.disable  # kernels are launched by address, on memory that is kept: a compiled model breaks its graph here
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keep new tokens [sequences, heads, n, head_dim]; return all keys and values of the layer.

        These are valid until the next layer's update. Raises InvalidArgument for tensors that need gradients, or of another
        shape or dtype than the cache's, and NonFiniteInput (see ``EncodedCache``).
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise InvalidArgument("an EncodedCache is for inference: call the model under torch.no_grad() or inference_mode()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._tail is not None
        self._tail.check(key_states, value_states)
        with current(key_states.device):
            if not self._has_old:
                return self._begun(key_states, value_states)
            return self._kept_coded(key_states, value_states) or self._grown(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens in the layer, encoded ones and exact ones."""
        return self._kept_first + self._encoded + (self._tail.tokens if self._tail else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask for ``query_length`` new tokens covers, and the first of them (0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: the layer has no bound."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self._sinks = self._tail = self._padded = None
        if self._old is not None:
            self._old.cut(0)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Make the batch one of sequences ``beam_idx`` (int64 tensor) of it."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, so that ``repeats`` equal ones follow one another."""
        self._select(torch.arange(self._sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences ``indices``, numbers or a mask."""
        if self._tail is not None:
            self._select(torch.arange(self._sequences)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; raises ValueError for a positive number."""
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
        """Bytes of the streams."""
        return self._old.nbytes if self._old else 0

    @property
    def exact_bytes(self) -> int:
        """Bytes of the exact tokens, with the tail's room for more."""
        padded = self._padded.nbytes if self._padded else 0
        return (self._tail.nbytes if self._tail else 0) + padded + sum(x.nbytes for x in self._sinks or ())

    @property
    def reads_codes(self) -> bool:
        """Whether attention reads codes: the layer gives it no tensors, but what stands for them."""
        return _reads_codes(self._config) and code_attention.has_codes(self._old) and self._padded is None

    # -- what a captured step needs (``captured_steps``) ------------------------------------------------------------
    @property
    def workspace(self) -> Workspace:
        """The workspace of the layer's device."""
        assert self._tail is not None
        return self._workspace(self._tail.memory[0])

    @property
    def memory_of_steps(self) -> list[Any]:
        """Objects that stay the same as long as a step reads and writes the same memory, but for one more token each time."""
        assert self._tail is not None
        return [self._old and self._old.chunks, self._sinks, self._tail.memory]

    @property
    def tokens_in_tail(self) -> int:
        """Exact last tokens."""
        return self._tail.tokens if self._tail else 0

    @property
    def room_in_tail(self) -> bool:
        """Whether one more token makes no others be encoded."""
        return self.tokens_in_tail + 1 < self._options.room

    def advance(self) -> None:
        """Count a token that a captured step has put behind the others."""
        assert self._tail is not None
        self._tail.tokens += 1

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
        """``update`` while nothing is encoded: append to the tail, or encode if it holds enough tokens for that now."""
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
        """``update`` once tokens are encoded: decode them between the exact ones; if the tail is full, encode its older tokens.

        The tail's whole room is copied, also where it holds nothing yet, so that the same launch serves every step.
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
        tail.settle()
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

    def _kept_coded(self, keys: Any, values: Any) -> tuple[Any, Any] | None:
        """``update`` once tokens are encoded, for attention that reads codes; None where it has to read tensors."""
        tail, old, sinks = self._tail, self._old, self._sinks
        assert tail is not None
        assert old is not None
        assert sinks is not None
        if not self.reads_codes:
            return None
        tail.append_later(keys, values, counted=old.workspace.step is None)
        parts = code_attention.coded_parts(old, sinks, tail)  # as it is before more is encoded
        if tail.tokens >= self._options.room:
            kept, last = tail.read(), tail.tokens - self._options.window
            self._encode(kept[0][:, :, :last], kept[1][:, :, :last], self._kept_first + old.tokens)
            self._tail = Tail(keys, values)
            self._tail.replace(kept[0][:, :, last:], kept[1][:, :, last:], room=self._options.room)
        return parts

    def _encode(self, keys: Any, values: Any, first: int) -> None:
        """Encode tokens [sequences, heads, n, head_dim], of which the first is token ``first``, behind those encoded before."""
        if self._old is None:
            presets = dict(zip(ROLES, self._options.presets, strict=True))
            ropes = _ropes(self._config, self._index, keys, values)
            options = {role: self._encoding(presets[role], role, ropes.get(role)) for role in ROLES}
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
            keys, values = (selected(x, rows) for x in self._sinks)
            self._sinks = keys, values
            self._old.select(rows.tolist())


def _reads_codes(config: Any) -> bool:
    """Whether a model's attention reads codes: ``attn_implementation="pqcodec"``."""
    return bool(config.get_text_config(decoder=True)._attn_implementation == code_attention.NAME)


def _kept(x: Any, tokens: int) -> Any:
    """A copy of the first tokens."""
    room = room_for(x, tokens)
    room.copy_(x[:, :, :tokens])
    return room


def _ropes(config: Any, index: int, keys: Any, values: Any) -> dict[str, Rope]:
    """The RoPE of a layer's keys (or values, in a latent cache) by role, found in two heads of the first sequence."""
    nothing = tc.LayerState("DummyLayer", {}, {})
    layer = tc.LayerState("DynamicLayer", {"keys": keys[:1, :2], "values": values[:1, :2]}, {})
    state = tc.CacheState("DynamicCache", {"": [*[nothing] * index, layer]})
    turned = tc.ropes(config, state, tc.pairings(config, state))
    return {name.rpartition(".")[2]: rope for name, rope in turned.items()}
