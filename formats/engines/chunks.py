"""Law: a chunk of a serving engine's cache (what all layers keep of some tokens, one tensor) as bytes of a fixed size.

How a chunk lies is said, or follows from its shape together with the size and number of its KV heads; what fits no layout is
refused. Its bytes (SPEC IV.6) are a head and streams, of keys and then of values [layers, heads, tokens, head_dim], each of
one or several layers: they do not depend on the layout, and their number depends on shape, dtype and options only. So layers
share a preset's bits (``policy.rates``), as a sample of the chunk's own tokens tells; what they leave is filled with zeros. The
head names the object whose they are, and seals the streams: nothing of another chunk stands among them. A chunk of latent
attention holds a latent and a rotary key of each token, which take the places of values and keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.codings.presets import PRESETS, check_restores
from pqcodec.errors import CorruptStream, InvalidArgument, TruncatedStream, UnsupportedStream
from pqcodec.formats.engines.model_config import config_rope, heads_of, latent_of, read_config
from pqcodec.formats.plain import numbers
from pqcodec.formats.plain.documents import natural
from pqcodec.formats.policy import rates
from pqcodec.options import EncodeOptions, check_numbers
from pqcodec.placed import aligned
from pqcodec.stages.centre import Rope
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import DTYPE_CODES, DTYPE_NAMES, Header
from pqcodec.stream.seal import order_seal, order_seals
from pqcodec.stream.source import MemorySource

# The dimensions behind "tokens" are one. LMCache has the first where it copies from the engine, the second where that sends.
CHUNK_LAYOUTS = ("1,layers,tokens,heads,2,dim", "layers,tokens,heads,2,dim", "2,layers,tokens,heads,dim")
LATENT_LAYOUTS = ("1,layers,tokens,dim", "layers,tokens,dim")  # of latent attention
_ORDER = ("2", "layers", "heads", "tokens", "dim")
_OPTIONS = ("preset", "model", "head_dim", "kv_heads", "latent_dim", "rope", "layout", "exact_tokens", "exact_vectors")
_ROPE = ("theta", "dim", "style", "frequencies")
_WARM_TOKENS = 80
_EXACT_TOKENS = 3  # of few chunks the first tokens are sinks; with three, one of 256 tokens has a fifth of its bytes at pq3
_SAMPLE = 16  # tokens that tell how the layers of a chunk share its bits
Run = tuple[slice, str]  # layers that follow each other, and the preset of their stream


@dataclass(frozen=True)
class ChunkCodec:
    """How chunks of one engine and model are encoded. Raises InvalidArgument when it is made.

    ``kv_heads``: of one rank. ``layout``: one of CHUNK_LAYOUTS (None: the one that a chunk's shape fits). ``rope``: of the
    keys, which are centred under it as if the chunk began at position 0 (another position only turns the mean); None: they
    are centred plainly. ``exact_tokens``: first tokens of each chunk that stay exact; ``exact_vectors``: how many
    others of each head do, those farthest from its mean (chunks in a GPU's memory are refused then).

    ``latent_dim``: numbers of a token's latent (kv_lora_rank) in a model of latent attention, 0 for others. Then each token has
    the latent, which is centred, and behind it one rotary key of ``head_dim`` numbers; ``kv_heads`` is 1, and the layout one of
    LATENT_LAYOUTS.

    >>> import torch
    >>> chunks = ChunkCodec(head_dim=64, kv_heads=2, rope=Rope(), backend="reference")
    >>> x = torch.randn(1, 3, 16, 2 * 2 * 64).half()
    >>> data, y = chunks.encode(x, b"its name"), torch.empty_like(x)
    >>> chunks.decode(data, y, b"its name")
    >>> data.nbytes == chunks.size(x.shape, x.dtype), bool((x - y).norm() < 0.2 * x.norm())
    (True, True)
    """

    head_dim: int
    kv_heads: int
    preset: str = "quad3"
    rope: Rope | None = None
    layout: str | None = None
    exact_tokens: int = _EXACT_TOKENS
    backend: str = "auto"
    latent_dim: int = 0
    exact_vectors: int = 0
    _known: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("head_dim", "kv_heads"):
            if not natural(getattr(self, name)) or not getattr(self, name):
                raise InvalidArgument(f"{name} is {getattr(self, name)!r}; a whole number from 1 on is expected")
        if not natural(self.latent_dim):
            raise InvalidArgument(f"latent_dim is {self.latent_dim!r}; a whole number is expected, 0 without latent attention")
        if self.latent_dim and self.kv_heads != 1:
            raise InvalidArgument(f"kv_heads is {self.kv_heads}; latent attention has one rotary key of a token: 1 is expected")
        check_restores(self.preset, "a serving engine")
        check_numbers(exact_vectors=self.exact_vectors)
        layouts = LATENT_LAYOUTS if self.latent_dim else CHUNK_LAYOUTS
        if self.layout is not None and self.layout not in layouts:
            raise InvalidArgument(f"layout {self.layout!r} is unknown; choose from {', '.join(map(repr, layouts))}")
        for options, dim in zip(self._options(self.preset), self._dims, strict=True):
            options.header((1, self.kv_heads, 1, dim), c.DTYPE_FLOAT16)

    @property
    def _dims(self) -> tuple[int, int]:
        """Numbers of a row of keys and of values, or of a rotary key and of a latent."""
        return self.head_dim, self.latent_dim or self.head_dim

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> ChunkCodec:
        """A codec of the options of a configuration in JSON; raises InvalidArgument for what is missing, unknown or ambiguous.

        ``model``: the path of its config.json, or of the folder of it, which says head_dim, kv_heads, latent_dim and rope where
        these are not there. ``rope``: "none", or an object of theta, dim, style and frequencies as those of ``pqcodec.Rope``;
        one that contradicts the model's config.json is refused.

        >>> chunks = ChunkCodec.from_json({"preset": "pq3", "head_dim": 128, "kv_heads": 8, "rope": {"theta": 500000}})
        >>> chunks.rope.theta, chunks.size((1, 32, 256, 8 * 2 * 128), "bfloat16")
        (500000, 6702640)
        """
        refuse_unknown("option", options, _OPTIONS)
        known = dict(options)
        rope = given_rope(known.pop("rope")) if "rope" in known else None
        if "model" in known:
            config = read_config(known.pop("model"))
            latent = latent_of(config)
            if latent is not None:
                known = dict(zip(("head_dim", "kv_heads", "latent_dim"), latent, strict=True)) | known
            elif not {"head_dim", "kv_heads"} <= known.keys():
                known = dict(zip(("head_dim", "kv_heads"), heads_of(config), strict=True)) | known
            if "rope" not in options:
                rope = config_rope(config, known["head_dim"])
            elif rope is not None:
                _check_rope_of_model(rope, config, known["head_dim"])
        missing = " and ".join(name for name in ("head_dim", "kv_heads") if name not in known)
        if missing:
            raise InvalidArgument(
                f"{missing}: not given, and keys and values are not told apart by guessing; give what is missing, or 'model', "
                "the path of the model's config.json"
            )
        return cls(**known, rope=rope)

    # -- sizes -----------------------------------------------------------------------------------------------------
    def size(self, shape: Sequence[int], dtype: Any) -> int:
        """Bytes of every chunk of a shape and a dtype (torch's, or its name); raises InvalidArgument for what is no chunk."""
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPE_NAMES.values():
            raise InvalidArgument(f"a chunk holds {name}; only {', '.join(DTYPE_NAMES.values())} can be encoded")
        asked = tuple(map(int, shape)), name
        if asked not in self._known:
            sizes = self._sizes(shape)
            layers, tokens = sizes["layers"], sizes["tokens"]
            single = self._shares(layers)
            runs = [(slice(0, 1), self.preset)] * layers if single else [(slice(0, layers), self.preset)]
            self._known[asked] = self._bytes([runs] * 2, tokens, name)
        return self._known[asked]

    def _shares(self, layers: int) -> bool:
        """Whether layers share the preset's bits: there is no rule for those of latents."""
        return not self.latent_dim and rates.shares(self.preset, layers)

    def _bytes(self, runs: Sequence[Sequence[Run]], tokens: int, dtype: str) -> int:
        """Bytes of a head and of streams of runs of keys and of values."""
        code = DTYPE_CODES[dtype]

        @lru_cache
        def stream(role: int, layers: int, preset: str) -> int:
            shape = (layers, self.kv_heads, tokens, self._dims[role])
            return aligned(self._options(preset)[role].header(shape, code).stream_bytes)

        return c.CHUNK_STRUCT.size + sum(
            stream(role, layers.stop - layers.start, preset) for role, each in enumerate(runs) for layers, preset in each
        )

    def _options(self, preset: str) -> tuple[EncodeOptions, EncodeOptions]:
        center = "rope" if self.rope else "mean"
        kept: dict[str, Any] = {"exact_tokens": self.exact_tokens, "exact_vectors": self.exact_vectors}
        keys = EncodeOptions(preset, center=center, rope=self.rope, **kept)
        return keys, EncodeOptions(preset, center="mean" if self.latent_dim else None, **kept)

    def _runs(self, pair: Sequence[Any], size: int, dtype: str) -> list[list[Run]]:
        """The runs of keys and of values: layers share the bits of the preset where their streams do not become more bytes."""
        layers, _, tokens, _ = pair[0].shape
        whole = [[(slice(0, layers), self.preset)]] * 2
        if not self._shares(layers):
            return whole
        first = min(self.exact_tokens, max(tokens - 1, 0))
        step = max((tokens - first) // _SAMPLE, 1)
        keys, values = (numbers.on_cpu(x[:, :, first::step]) for x in pair)
        energies = {
            layer: (
                rates.energy_of(keys[layer], first, step, rope=self.rope),
                rates.energy_of(values[layer], first, step, centred=False),
            )
            for layer in range(layers)
        }

        def runs_of(shared: rates.Shared) -> list[list[Run]]:
            return [_runs_of([presets[role] for presets in shared.values()]) for role in range(2)]

        def bytes_of(shared: rates.Shared) -> int:
            alone = all(pair == (self.preset, self.preset) for pair in shared.values())
            return size if alone else self._bytes(runs_of(shared), tokens, dtype)

        return runs_of(rates.share_within(self.preset, energies, bytes_of))

    # -- layouts ---------------------------------------------------------------------------------------------------
    def _sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """The size of each dimension of a chunk by its name, in the order in which they lie."""
        found = tuple(map(int, shape))
        known = {"1": 1, "2": 2, "heads": self.kv_heads, "dim": self.latent_dim + self.head_dim}
        layouts = (self.layout,) if self.layout else LATENT_LAYOUTS if self.latent_dim else CHUNK_LAYOUTS
        for layout in layouts:
            names = layout.split(",")
            behind = names[names.index("tokens") + 1 :]
            lying = names[: -len(behind)]
            sizes = dict(zip(lying, found, strict=False)) | {name: known[name] for name in behind}
            if found == (*(known.get(name, sizes.get(name)) for name in lying), math.prod(sizes[name] for name in behind)):
                return sizes
        if self.latent_dim:
            raise InvalidArgument(
                f"a chunk has shape {found}, which is not {' or '.join(map(repr, layouts))} with a latent of {self.latent_dim} "
                f"numbers and a rotary key of {self.head_dim}; give the model's latent_dim and head_dim"
            )
        raise InvalidArgument(
            f"a chunk has shape {found}, which is not {' or '.join(map(repr, layouts))} with {self.kv_heads} heads of "
            f"{self.head_dim}; give the model's head_dim, and as kv_heads those of one rank (its number over the ranks)"
        )

    def _pair(self, x: Any) -> tuple[Any, Any]:
        """The keys and the values of a chunk, or its rotary keys and latents, as views [layers, heads, tokens, numbers]."""
        sizes = self._sizes(x.shape)
        sizes.pop("1", None)
        if self.latent_dim:
            rows = x.view(tuple(sizes.values()))[:, None]
            return rows[..., self.latent_dim :], rows[..., : self.latent_dim]
        keys, values = x.view(tuple(sizes.values())).permute([list(sizes).index(name) for name in _ORDER])
        return keys, values

    # -- bytes -----------------------------------------------------------------------------------------------------
    def encode(self, x: Any, name: bytes) -> np.ndarray:
        """A chunk as bytes, uint8 [size], for the object that ``name`` names. Raises InvalidArgument and NonFiniteInput."""
        size, pair = self.size(x.shape, x.dtype), self._pair(x)
        data, at = np.zeros(size, np.uint8), c.CHUNK_STRUCT.size
        seals = []
        for role, runs in enumerate(self._runs(pair, size, str(x.dtype).removeprefix("torch."))):
            for layers, preset in runs:
                header, stream = codec.encode_by(self._options(preset)[role], pair[role][layers], self.backend)
                data[at : at + len(stream)] = np.frombuffer(stream, np.uint8)
                seals.append(order_seal(MemorySource(stream, header)))
                at = aligned(at + len(stream))
        data[: c.CHUNK_STRUCT.size] = np.frombuffer(_head(size, seals, name), np.uint8)
        return data

    def decode(self, data: np.ndarray, out: Any, name: bytes) -> None:
        """Decode bytes into a chunk; after an error its content is undefined.

        Raises CorruptStream for bytes that are damaged, foreign or of another object, UnsupportedStream for a version that this
        release does not know, and InvalidArgument for those of another shape or dtype than ``out``'s, or of other options.
        """
        size = self.size(out.shape, out.dtype)
        count, seal = _checked_head(data, size, name)
        streams, outs, firsts, at, filled = [], [], [], c.CHUNK_STRUCT.size, False
        for x in self._pair(out):
            layer, (layers, *rest) = 0, x.shape
            while layer < layers:
                h = Header.from_bytes(data.data[at:])
                if at + h.stream_bytes > size:
                    raise CorruptStream(f"a chunk's stream at byte {at} has {h.stream_bytes} bytes, which go beyond its {size}")
                if len(h.shape) != 1 + len(rest) or not 0 < h.shape[0] <= layers - layer:
                    wanted = (layers - layer, *rest)
                    raise InvalidArgument(f"a chunk's stream at byte {at} has shape {h.shape}; at most {wanted} is expected")
                streams.append(MemorySource(data[at : at + h.stream_bytes], h))
                outs.append(x)
                firsts.append(layer)
                layer += h.shape[0]
                end, at = at + h.stream_bytes, aligned(at + h.stream_bytes)
                filled |= bool(data[end:at].any())
        if filled or data[at:].any():
            raise CorruptStream("between or behind a chunk's streams are bytes that are not 0")
        if len(streams) != count or _seal(order_seals(streams)) != seal:
            raise CorruptStream("a chunk's streams are not those that were written together (its seal does not hold)")
        codec.decode_together(streams, outs, [0] * count, self.backend, firsts)

    def warm(self) -> None:
        """Compile the kernels that chunks take, so that the first one does not wait: up to a minute where none are on disk."""
        import torch

        tokens = self.exact_tokens + _WARM_TOKENS
        for preset in {PRESETS[name].coding: name for name in (*self._shared_presets(), self.preset)}.values():
            chunks = replace(self, layout=None, preset=preset)
            for dtype in DTYPE_NAMES.values():
                numbers_of_token = self.kv_heads * (self.head_dim + self._dims[1])
                x = torch.ones(1, 1, tokens, numbers_of_token, dtype=getattr(torch, dtype))
                chunks.decode(chunks.encode(x, b""), x, b"")

    def _shared_presets(self) -> Sequence[str]:
        """The presets that layers may get where they share this one's bits."""
        return rates.presets_beside(self.preset) if self.preset in rates.SHARED else ()


# -- the head ------------------------------------------------------------------------------------------------------
def _head(size: int, seals: Sequence[int], name: bytes) -> bytes:
    digest = hashlib.sha256(name).digest()[: c.CHUNK_NAME_BYTES]
    fields = (c.CHUNK_MAGIC, c.CHUNK_VERSION, size, len(seals), digest, _seal(seals))
    return c.CHUNK_STRUCT.pack(*fields, checksum(c.CHUNK_STRUCT.pack(*fields, 0)[: -c.CHECKSUM_BYTES]))


def _seal(seals: Sequence[int]) -> int:
    """The checksum of the streams' order seals."""
    return checksum(np.array(seals, "<u4").view(np.uint8))


def _checked_head(data: np.ndarray, size: int, name: bytes) -> tuple[int, int]:
    """The number of streams, and their seal; raises CorruptStream, UnsupportedStream or InvalidArgument for another head."""
    found = data[: c.CHUNK_STRUCT.size].tobytes()
    if len(found) < c.CHUNK_STRUCT.size:
        raise TruncatedStream(f"a chunk of {data.nbytes} bytes has no room for its head of {c.CHUNK_STRUCT.size}")
    magic, version, end, count, named, seal, own = c.CHUNK_STRUCT.unpack(found)
    if magic != c.CHUNK_MAGIC:
        raise CorruptStream(f"a chunk begins with {magic!r}, not {c.CHUNK_MAGIC!r}: pqcodec did not write it")
    if own != checksum(found[: -c.CHECKSUM_BYTES]):
        raise CorruptStream("the checksum of a chunk's head does not hold")
    if version != c.CHUNK_VERSION:
        raise UnsupportedStream(f"a chunk has version {version}, this release reads {c.CHUNK_VERSION}")
    if end != size:
        raise InvalidArgument(f"a chunk has {end} bytes, not {size}: it was encoded by other options")
    if named != hashlib.sha256(name).digest()[: c.CHUNK_NAME_BYTES]:
        raise CorruptStream(f"a chunk is of another object, whose name's digest is {named.hex()}")
    if data.nbytes != size:
        raise (TruncatedStream if data.nbytes < size else CorruptStream)(f"a chunk of {size} bytes has {data.nbytes}")
    return count, seal


def _runs_of(presets: Sequence[str]) -> list[Run]:
    """Neighbouring layers of one preset, together.

    >>> _runs_of(["pq3", "pq3", "pq4"])
    [(slice(0, 2, None), 'pq3'), (slice(2, 3, None), 'pq4')]
    """
    runs, first = [], 0
    for preset, layers in groupby(presets):
        last = first + len(list(layers))
        runs.append((slice(first, last), preset))
        first = last
    return runs


# -- options -------------------------------------------------------------------------------------------------------
def refuse_unknown(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises InvalidArgument for a name that is not known."""
    for name in given:
        if name not in known:
            raise InvalidArgument(f"{what} {name!r} is unknown; choose from {', '.join(known)}")


def _check_rope_of_model(rope: Rope, config: Mapping[str, Any], head_dim: int) -> None:
    """Raises InvalidArgument where the model's config tells of another RoPE; one that tells of none contradicts nothing."""
    try:
        own = config_rope(config, head_dim)
    except InvalidArgument:
        return
    if rope.field(head_dim) != own.field(head_dim):
        raise InvalidArgument(
            "'rope' is not that of the model's config.json, under which its keys have several times less error; leave 'rope' "
            "out, or 'model' if the config is another model's"
        )


def given_rope(given: Any) -> Rope | None:
    """The RoPE that a configuration in JSON gives: "none", or an object of theta, dim, style, frequencies.

    Raises InvalidArgument.
    """
    if given == "none":
        return None
    if not isinstance(given, Mapping):
        raise InvalidArgument(f'rope is {given!r}; "none" or an object of {", ".join(_ROPE)} is expected')
    refuse_unknown("rope's member", given, _ROPE)
    if not {"theta", "frequencies"} & given.keys():
        raise InvalidArgument('rope says neither theta nor frequencies; give one of them, or "none"')
    rope = Rope(**given)
    try:
        rope.check()
    except TypeError as error:
        raise InvalidArgument(f"rope {dict(given)}: {error}") from None
    return rope
