"""Law: how the tensors of a cache are encoded, in every container: keys are centred, values are not, the first tokens of both
are exact, and the preset's bits are shared between keys, values and layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.codings.presets import preset as preset_of
from pqcodec.errors import InvalidArgument
from pqcodec.formats.containers.reader import LAYOUT, NO_LAYOUT, named
from pqcodec.formats.containers.writer import Coded, Piece, tables_in_options
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.in_memory import CuttableTensors, InMemory
from pqcodec.formats.policy import rates
from pqcodec.formats.policy.measure import SAMPLES, Error, error_of, error_of_kept, held_tokens
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.stages import Stages, given_for
from pqcodec.options import EncodeOptions, check_numbers, checked_effort, checked_levels, checked_nonfinite, checked_pairing
from pqcodec.stages.centre import Rope, check_rope
from pqcodec.stages.keep import positions_of
from pqcodec.stream.header import DTYPE_NAMES
from pqcodec.stream.source import MemorySource

EXACT_TOKENS = 4  # attention sinks: the first tokens' keys are far from all others
CHUNK_TOKENS = 24  # under one checksum: of what a read of any 256 tokens fetches, nine tenths are wanted
AUTO = "auto"
_STAGES = ("before_rope", "join_heads", "channels", "block_basis", "basis", "ranges")
_SIZED = ("center", "rope", "exact_tokens", "chunk_tokens", *_STAGES)  # options that every stream's size depends on
_HIGHEST = "pq6"  # the largest preset that a tensor may get where bits are shared


def layers_by_name(layers: Sequence[tuple[Any, Any]]) -> tuple[InMemory, dict[str, TensorRole]]:
    """The (key, value) pairs of the layers as tensors called layers.{i}.key and layers.{i}.value, and their roles.

    >>> import numpy as np
    >>> tensors, roles = layers_by_name([(np.ones((2, 8, 64)), np.ones((2, 8, 64)))])
    >>> tensors.names, roles["layers.0.value"]
    (('layers.0.key', 'layers.0.value'), TensorRole(role='value', layer=0))
    """
    try:
        given = [(key, value) for key, value in layers]
        if slices := [layer for layer, pair in enumerate(layers) if not isinstance(pair, (tuple, list))]:
            raise TypeError(f"layer {slices[0]} is a {type(layers[slices[0]]).__name__}")
    except (TypeError, ValueError) as error:
        words = "a list of (key, value) of each layer is expected; transformers_cache.save takes a Cache"
        raise InvalidArgument(f"layers is a {type(layers).__name__}: {words} ({error})") from None
    pairs = [(layer, role, x) for layer, pair in enumerate(given) for role, x in zip(c.ROLES[:2], pair, strict=True)]
    tensors = InMemory({f"layers.{layer}.{role}": x for layer, role, x in pairs})
    for layer, pair in enumerate(given):
        _check_layer(layer, *(tuple(x.shape) for x in pair))
    return tensors, {f"layers.{layer}.{role}": TensorRole(role, layer) for layer, role, _ in pairs}


def _check_layer(layer: int, key: tuple[int, ...], value: tuple[int, ...]) -> None:
    """Raises InvalidArgument where keys and values of these shapes are not of the same sequences, heads and tokens."""
    if min(len(key), len(value)) < 2:
        raise InvalidArgument(f"layer {layer}: keys {key} and values {value}; [..., tokens, head_dim] is expected of both")
    if key[:-1] != value[:-1]:
        raise InvalidArgument(
            f"layer {layer}: keys {key} and values {value} are not of the same heads and tokens; only head_dim may differ"
        )


def preset_pair(preset: str | Sequence[str]) -> tuple[str, str]:
    """The presets of keys and of values, given one for both or a pair; raises InvalidArgument for what is neither.

    >>> preset_pair("pq3"), preset_pair(("pq4", "pq3"))
    (('pq3', 'pq3'), ('pq4', 'pq3'))
    """
    presets = tuple(preset) if isinstance(preset, (list, tuple)) else (preset, preset)
    if len(presets) != 2:
        raise InvalidArgument(f"{len(presets)} presets are given; give one for all, or one of keys and one of values")
    for each in presets:
        if not isinstance(each, str):  # names are checked by who takes them: some take "exact"
            preset_of(each)
    return presets[0], presets[1]


@dataclass(frozen=True)
class Encoded:
    """The outcome of encoding one tensor; sizes in bytes."""

    name: str
    tensor: TensorRole
    coordinates: int
    tensor_bytes: int
    stream_bytes: int
    seconds: float  # inside the encoder
    error: Error

    @property
    def weight(self) -> float:
        """Sampling weight: coordinates of the tensor per measured coordinate."""
        return self.coordinates / max(self.error.coordinates, 1)


def _ignore(*_: Any) -> None:
    """The default callback: does nothing."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that ``Recipe.pieces`` calls while tensors are encoded."""

    advance: Callable[[str, int, int], None] = _ignore  # a tensor's progress: name, done, total
    encoded: Callable[[Encoded], None] = _ignore  # once per tensor, when it is encoded


@dataclass(frozen=True)
class Recipe:
    """Options of encoding a cache; the defaults are those of ``save_cache``. Raises InvalidArgument.

    ``value_preset``: of values, where it is not that of keys; bits are then not shared. ``center``: what is subtracted from
    keys, "auto" ("rope" if a ``rope`` is given, else "mean"), None, "mean" or "rope".
    ``exact_tokens``: None is 4 for keys and values, 0 for others. ``share_bits``: give keys of high energy more bits than
    values, the preset being the mean (``policy.rates``). ``stream_tokens``: tokens per stream (None: one stream a tensor).
    ``effort``: of the encoder's search. ``pairing``, ``levels``: as in ``pqcodec.encode``. ``codebooks``: for presets of
    residual VQ a VectorTable, or a mapping of (role, layer) to one each, (role, None) for all other layers; "auto" then centres
    nothing, as codebooks learn means; ``levels`` likewise. ``stages``: what is done before; "auto" then subtracts means of keys
    before RoPE, and nothing where ranges were calibrated, and a linear stage shares no bits. ``measured``: the error is
    measured on a "sample", on "all" numbers, or "none"; of kept tokens on all. ``keep``: by the names of tensors, positions as
    in ``pqcodec.encode``; of tensors that it does not name all tokens are encoded.

    >>> import numpy as np
    >>> recipe = Recipe("pq4", measured="all", backend="reference")
    >>> key, value = np.ones((2, 40, 64), np.float16), np.zeros((2, 40, 64), np.float16)
    >>> pieces = recipe.pieces(*layers_by_name([(key, value)]))
    >>> [piece.name for piece in pieces], pieces[0].body().streams[0].header.first_tokens
    (['layers.0.key', 'layers.0.value'], 4)
    """

    preset: str = DEFAULT_PRESET
    rope: Rope | None = None
    center: str | None = AUTO
    exact_tokens: int | None = None
    seed: int = 0
    share_bits: bool = True
    nonfinite: str = "error"
    effort: str = "fast"
    chunk_tokens: int = CHUNK_TOKENS
    stream_tokens: int | None = None
    measured: str = "sample"
    backend: str = "auto"
    pairing: str | None = None
    value_preset: str | None = None
    levels: Any = None
    codebooks: Any = None
    keep: Mapping[str, Any] = field(default_factory=dict, compare=False)
    stages: Stages = field(default_factory=Stages)

    def __post_init__(self) -> None:
        preset_of(self.preset)
        if self.value_preset is not None:
            preset_of(self.value_preset)
            object.__setattr__(self, "share_bits", False)
        if self.levels is not None and not isinstance(self.levels, Mapping):
            checked_levels(self.levels, self.preset)
        by_vectors = any(preset_of(preset).by_vectors for preset in (self.preset, self.value_preset or self.preset))
        if by_vectors and self.codebooks is None:
            raise InvalidArgument("presets of residual VQ need codebooks=, as train_vq and `pqcodec train-vq` make them")
        if self.stages.linear:
            object.__setattr__(self, "share_bits", False)
        if self.center == AUTO and (by_vectors or self.stages.ranges is not None):
            object.__setattr__(self, "center", None)
        checked_effort(self.effort)
        checked_nonfinite(self.nonfinite)
        checked_pairing(self.pairing)
        check_numbers(seed=self.seed, chunk_tokens=self.chunk_tokens)
        if self.exact_tokens is not None:
            check_numbers(exact_tokens=self.exact_tokens)
        if self.rope is not None:
            check_rope(self.rope)
        if self.center == AUTO:
            object.__setattr__(self, "center", "mean" if self.rope is None or self.stages.before_rope else "rope")
        if self.center not in (None, "mean", "rope"):
            raise InvalidArgument(f"center {self.center!r} is unknown; choose 'auto', None, 'mean' or 'rope'")
        if self.stages.before_rope and (self.center == "rope" or self.rope is None):
            raise InvalidArgument("keys before RoPE need a rope, and are centred by their mean, or not at all")
        if not self.stages.before_rope and (self.center == "rope") != (self.rope is not None):
            raise InvalidArgument("centring keys under RoPE and a rope go together; give both or neither")
        if self.measured not in ("sample", "all", "none"):
            raise InvalidArgument(f"measured {self.measured!r} is unknown; choose 'sample', 'all' or 'none'")
        if self.stream_tokens is not None and self.stream_tokens < 1:
            raise InvalidArgument(f"{self.stream_tokens} tokens of a stream; at least 1 is expected")
        if self.keep and self.stream_tokens is not None:
            raise InvalidArgument("keep and stream_tokens: a stream of kept tokens holds all of them; give one or the other")

    @classmethod
    def of(cls, preset: str | Sequence[str], **options: Any) -> Recipe:
        """The recipe of one preset for keys and values, or of a pair of them; ``options``: the other fields."""
        keys, values = preset_pair(preset)
        return cls(keys, **options, value_preset=None if isinstance(preset, str) else values)

    # -- options of one tensor -----------------------------------------------------------------------------------
    def options(self, tensor: TensorRole, first_token: int = 0, name: str | None = None) -> dict[str, Any]:
        """Options of ``pqcodec.encode``, all but the preset, for the stream that begins at ``first_token`` of a tensor.

        ``name``: of the tensor, by which some of the stages are chosen.
        """
        first_token += tensor.first_token
        before = self.stages.before_rope
        rope = tensor.rope or (self.rope if tensor.role == "key" and (self.center == "rope" or before) else None)
        options: dict[str, Any] = {"exact_tokens": max(self._exact_tokens(tensor) - first_token, 0)}
        options |= self.stages.options(tensor, name)
        if rope and (self.center or before):
            rope = replace(rope, first_position=rope.first_position + first_token)
            options |= {"rope": rope, "before_rope": True} if before else {"rope": rope, "center": "rope"}
            options |= {"center": "mean"} if before and self.center else {}
        elif tensor.role == "key" and self.center:
            options |= {"center": "mean"}
        if self.pairing:
            options |= {"pairing": self.pairing}
        if (levels := given_for(self.levels, tensor)) is not None:
            options |= {"levels": levels}
        if preset_of(self._preset_of(tensor)).by_vectors:
            options |= {"codebooks": self._codebooks_of(tensor)}
        return options | {key: getattr(self, key) for key in ("seed", "nonfinite", "effort", "chunk_tokens", "backend")}

    def _codebooks_of(self, tensor: TensorRole) -> Any:
        """The VectorTable of a tensor; raises InvalidArgument where there is none."""
        found = given_for(self.codebooks, tensor)
        if found is None:
            raise InvalidArgument(
                f"there are no codebooks for {tensor.role} {tensor.layer}; train them, or leave the tensor out"
            )
        return found

    def exact_vectors(self, tensor: TensorRole, shape: tuple[int, ...], first_token: int = 0) -> np.ndarray:
        """int64 [n, 2]: (leading index, token) of first tokens after padding; ``shape``: [sequences, ..., tokens, head_dim]."""
        tokens, heads, first = shape[-2], math.prod(shape[1:-2]), first_token + tensor.first_token
        places = behind_padding(tensor.padding, self._exact_tokens(tensor), first, first + tokens)
        found = [(row * heads + head, token - first) for row, token in places for head in range(heads)]
        return np.array(found, np.int64).reshape(-1, 2)

    def held_bytes(self, tensor: TensorRole, shape: tuple[int, ...], dtype: str, kept: int | None = None) -> int:
        """The most bytes that encoding a tensor takes beside the tensor: its stream, and what encoding and measuring need.

        ``kept``: how many tokens are, None for all. Vectors that ``nonfinite="exact"`` keeps are not counted. Raises
        InvalidArgument for a tensor that cannot be encoded.
        """
        centred = tensor.role == "key" and self.center is not None
        stream = self.most_stream_bytes(tensor, shape, dtype)
        leading, tokens = math.prod(shape[:-2]), shape[-2] if len(shape) > 1 else 1
        row = shape[-1] * c.EXACT_ITEM_BYTES[dtype]
        measured = 2 * row * (min(tokens, held_tokens(self.measured != "all")) if kept is None else 2 * kept)
        places = 16 + tokens  # start of each leading index, and a flag per vector that is not finite
        stages = self.stages if tensor.role != "other" else Stages()
        if stages.linear or stages.join_heads or stages.before_rope:
            places += 3 * 4 * tokens * shape[-1]  # rows are float32, and made in two steps
        return stream + leading * (measured + places + (24 * shape[-1] if centred else 0))

    def stream_bytes(
        self,
        tensor: TensorRole,
        shape: tuple[int, ...],
        dtype: str,
        preset: str | None = None,
        keep: Any = None,
        name: str | None = None,
    ) -> int:
        """Bytes of a finite tensor's stream at a preset (None: the recipe's own), of the positions ``keep`` alone if given.

        ``name``: as in ``options``. Raises as ``held_bytes`` does.
        """
        preset = preset or self._preset_of(tensor)
        chosen = preset_of(preset)
        sized = (*_SIZED, *(["levels"] if chosen.by_levels else []), *(["codebooks"] if chosen.by_vectors else []))
        options = {key: value for key, value in self.options(tensor, name=name).items() if key in sized}
        return codec.encoded_size(shape, dtype, preset=preset, keep=keep, **options)

    def _preset_of(self, tensor: TensorRole) -> str:
        """The preset of a tensor where no bits are shared; raises InvalidArgument for values whose vectors it does not keep."""
        if tensor.role != "value":
            return self.preset
        if preset_of(own := self.value_preset or self.preset).estimates:
            raise InvalidArgument(
                f"preset {own!r} keeps inner products of keys, and values are added up: give another for values, such as int2"
            )
        return own

    def most_stream_bytes(self, tensor: TensorRole, shape: tuple[int, ...], dtype: str) -> int:
        """``stream_bytes`` at the largest preset that the tensor may get."""
        own = self._preset_of(tensor)
        presets = {own, _HIGHEST if self.share_bits else own}
        return max(self.stream_bytes(tensor, shape, dtype, preset) for preset in presets)

    def _exact_tokens(self, tensor: TensorRole) -> int:
        if self.exact_tokens is None:
            return 0 if tensor.role == "other" else EXACT_TOKENS
        return self.exact_tokens

    def presets(
        self,
        tensors: CuttableTensors,
        roles: Mapping[str, TensorRole],
        coded: Sequence[str],
        described: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    ) -> dict[str, str]:
        """The preset of each coded tensor by name; layers with one key and one value of the same shape share their bits.

        Of a tensor that shares bits, a sample of tokens is read (``rates.token_sample``); of others, nothing. ``described``:
        shape and dtype of each tensor, if the caller has them.
        """
        flat = {name: self._preset_of(roles[name]) for name in coded}
        if not self.share_bits or self.center is None:
            return flat
        found: dict[tuple[int, str], list[str]] = {}
        for name in coded:
            layer, role = roles[name].layer, roles[name].role
            if layer is not None and role != "other":
                found.setdefault((layer, role), []).append(name)
        kinds = {name: described[name] if described else tensors.describe(name) for names in found.values() for name in names}
        shapes = {name: shape for name, (shape, _) in kinds.items()}
        pairs: dict[int, tuple[str, str]] = {}
        for layer in sorted({layer for layer, _ in found}):
            keys, values = (found.get((layer, role), []) for role in c.ROLES[:2])
            if len(keys) == len(values) == 1 and shapes[keys[0]] == shapes[values[0]]:
                pairs[layer] = (keys[0], values[0])
        if not rates.shares(self.preset, len(pairs)):
            return flat

        def energy(name: str, *, centred: bool) -> float:
            return self._energy(tensors, name, roles[name], shapes[name], centred)

        energies = {layer: (energy(key, centred=True), energy(value, centred=False)) for layer, (key, value) in pairs.items()}

        @lru_cache
        def stream(shape: tuple[int, ...], dtype: str, role: str, preset: str) -> int:
            return self.stream_bytes(TensorRole(role), shape, dtype, preset)

        def bytes_of(shared: rates.Shared) -> int:
            each = [(name, preset) for layer in shared for name, preset in zip(pairs[layer], shared[layer], strict=True)]
            return sum(stream(*kinds[name], roles[name].role, preset) for name, preset in each)

        sizes = {layer: math.prod(shapes[key]) for layer, (key, _) in pairs.items()}
        shared = rates.share_within(self.preset, energies, bytes_of, sizes)
        return flat | {name: preset for layer in shared for name, preset in zip(pairs[layer], shared[layer], strict=True)}

    def _energy(self, tensors: CuttableTensors, name: str, tensor: TensorRole, shape: tuple[int, ...], centred: bool) -> float:
        """The energy of a tensor that ``rates.share`` takes: of a key ``centred``, of a value not.

        Exact tokens after padding, which cost no bits, count as its last token.
        """
        options = self.options(tensor)
        first, step = rates.token_sample(shape[-2], options["exact_tokens"])
        sample = tensors.read_tokens(name, first, step)
        places = self.exact_vectors(tensor, shape)
        places = places[(places[:, 1] >= first) & ((places[:, 1] - first) % step == 0)]
        if len(places):
            last = tensors.read_tokens(name, shape[-2] - 1).reshape(-1, shape[-1])
            flat = (sample.clone() if hasattr(sample, "clone") else sample.copy()).reshape(-1, *sample.shape[-2:])
            flat[places[:, 0], (places[:, 1] - first) // step] = last[places[:, 0]]
            sample = flat.reshape(sample.shape)
        return rates.energy_of(sample, first, step, rope=options.get("rope"), centred=centred)

    def pieces(
        self,
        tensors: CuttableTensors,
        roles: Mapping[str, TensorRole],
        coded: Sequence[str] | None = None,
        callbacks: Callbacks | None = None,
    ) -> list[Piece]:
        """The pieces for a container to write: ``coded`` tensors (None: all) as streams, the others exactly.

        Encoding happens when a piece's ``body`` is called, which raises as ``pqcodec.encode`` does. A body reads its tensor
        whole, once, and measures the error while it has it. Where layers share bits, a sample of each key and value is read
        before, here, and is all that is copied out of memory or a mapped file (the system fetches whole pages, and may fetch
        more, ahead). A compressed .npz file cannot be cut: its keys and values are unpacked twice.
        """
        coded = tensors.names if coded is None else coded
        described = {name: tensors.describe(name) for name in tensors.names}
        presets = self.presets(tensors, roles, coded, described)
        return [
            self._piece(tensors, name, described[name], roles[name], presets.get(name), callbacks or Callbacks())
            for name in described
        ]

    def _piece(
        self,
        tensors: CuttableTensors,
        name: str,
        described: tuple[tuple[int, ...], str],
        tensor: TensorRole,
        preset: str | None,
        callbacks: Callbacks,
    ) -> Piece:
        shape, dtype = described
        if preset is None:
            layout = LAYOUT if tensor.role != "other" and len(shape) > 1 else NO_LAYOUT
            return Piece(name, False, tensor.layer, tensor.role, shape, dtype, layout, lambda: tensors.read(name))
        keep = self.keep.get(name)
        if keep is not None:
            with named(f"tensor {name!r}"):
                shape = (*shape[:-2], positions_of(keep, shape).shape[1], shape[-1])
        tokens = shape[-2] if len(shape) > 1 else 1
        step = tokens if self.stream_tokens is None else self.stream_tokens
        starts = range(0, max(tokens, 1), max(step, 1)) if len(shape) > 1 else range(1)

        def body() -> Coded:
            x = tensors.read(name)
            if keep is None:
                return self._encoded(x, name, tensor, preset, starts, callbacks)
            return self._encoded_kept(x, name, tensor, preset, keep, callbacks)

        tables = tables_in_options(self.options(tensor, name=name))
        return Piece(name, True, tensor.layer, tensor.role, shape, dtype, LAYOUT, body, len(starts), tables)

    def _encoded(self, x: Any, name: str, tensor: TensorRole, preset: str, starts: range, callbacks: Callbacks) -> Coded:
        streams, error, seconds = [], Error(), 0.0
        sampled = range(0, len(starts) if self.measured == "sample" else 0, max(len(starts) // SAMPLES, 1))
        for number, first in enumerate(starts):

            def advance(done: int, total: int, number: int = number) -> None:
                callbacks.advance(name, number * total + done, len(starts) * total)

            cut = x if len(starts) == 1 else x[..., first : first + starts.step, :]
            start = time.perf_counter()
            with named(f"tensor {name!r}"):
                options = self.options(tensor, first, name) | {
                    "exact_vectors": self.exact_vectors(tensor, tuple(cut.shape), first)
                }
                backend = options.pop("backend")
                header, data = codec.encode_by(EncodeOptions(preset, **options), cut, backend, advance)
            seconds += time.perf_counter() - start
            stream = MemorySource(data, header)
            if x.ndim > 1 and (self.measured == "all" or number in sampled):
                error += error_of(cut, stream, backend=self.backend, sample=self.measured == "sample")
            streams.append(stream)
        size = exact.nbytes(x)
        callbacks.encoded(Encoded(name, tensor, size // x.dtype.itemsize, size, sum(s.size for s in streams), seconds, error))
        return Coded(streams, error.rel_mse)

    def _encoded_kept(self, x: Any, name: str, tensor: TensorRole, preset: str, keep: Any, callbacks: Callbacks) -> Coded:
        start = time.perf_counter()
        with named(f"tensor {name!r}"):
            options = self.options(tensor, name=name)
            options |= {"exact_vectors": self.exact_vectors(tensor, tuple(x.shape)), "keep": keep}
            backend = options.pop("backend")
            header, data = codec.encode_by(EncodeOptions(preset, **options), x, backend, partial(callbacks.advance, name))
        seconds, stream = time.perf_counter() - start, MemorySource(data, header)
        error = Error() if self.measured == "none" else error_of_kept(x, stream, backend=self.backend)
        callbacks.encoded(Encoded(name, tensor, math.prod(header.shape), exact.nbytes(x), len(data), seconds, error))
        return Coded([stream], error.rel_mse)


def behind_padding(padding: Sequence[int], count: int, first: int, last: int) -> list[tuple[int, int]]:
    """(sequence, token) of the ``count`` tokens after the padding of each padded sequence, if within ``first`` .. ``last`` - 1.

    >>> behind_padding((0, 3), 2, 0, 10), behind_padding((0, 3), 2, 4, 10)
    ([(1, 3), (1, 4)], [(1, 4)])
    """
    return [
        (row, token)
        for row, before in enumerate(padding)
        for token in range(max(before, first), min(before + count, last) if before else 0)
    ]


def why_exact(shape: tuple[int, ...], dtype: str) -> str | None:
    """Why a tensor of this shape and dtype cannot be encoded, in words; None where it can.

    >>> why_exact((2, 8, 64), "float16"), why_exact((2, 8, 64), "int64"), why_exact((8,), "float16")
    (None, 'dtype int64', '1 dimensions, 2 to 8 can be encoded')
    """
    if dtype not in DTYPE_NAMES.values():
        return f"dtype {dtype}"
    if not 2 <= len(shape) <= c.MAX_NDIM:
        return f"{len(shape)} dimensions, 2 to {c.MAX_NDIM} can be encoded"
    if not 1 <= shape[-1] <= c.MAX_HEAD_DIM:
        return f"head_dim outside 1 to {c.MAX_HEAD_DIM}"
    return None
