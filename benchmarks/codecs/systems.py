"""Law: the systems that are compared: how each keeps a layer's keys and values, of which tokens, and what belongs to it.

Nothing here is tuned on the texts: a system has its published setting, ours the recipe's (keys centred before RoPE, the first 4
tokens exact) at one preset for all layers. All that a coder stores counts: the bytes of streams, headers and keep lists too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

import pqcodec
from pqcodec import bases, select
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.recipe import Recipe

WINDOW = 32  # last queries of a prefix, by which tokens are chosen


@dataclass(frozen=True)
class Given:
    """A tensor float16 [heads, tokens, head_dim] of a layer, and what a coder may ask beside it.

    ``queries``: the last ones of the prefix, [q_heads, WINDOW, head_dim]. ``kept``: ascending positions int64 [heads, n] of the
    tokens that are to be kept, None for all.
    """

    x: torch.Tensor
    tensor: TensorRole
    queries: torch.Tensor
    seed: int = 0
    kept: torch.Tensor | None = None

    def kept_rows(self) -> torch.Tensor:
        """The rows of the tokens that are to be kept: [heads, n, head_dim]."""
        if self.kept is None:
            return self.x
        return torch.take_along_dim(self.x, self.kept[..., None], -2)


class Coder(Protocol):
    """How keys, or values, are kept."""

    def encode(self, given: Given) -> Any:
        """What is stored of a tensor."""

    def bits(self, stored: Any) -> int:
        """How much that is."""

    def decode(self, stored: Any) -> torch.Tensor:
        """The kept rows [heads, n, head_dim]."""


@dataclass(frozen=True)
class Stream:
    """A stream of a preset (None: kept tokens exactly) with the options of ``pqcodec.encode``.

    ``cured``: keys lose their mean before RoPE, and the first ``exact_tokens`` tokens stay exact, as in a file of ours.
    ``before_rope``: keys are coded as they were before RoPE. ``joined``: a token's heads are one vector, as in systems whose
    scales, or bases, are of all heads. ``dropped``: the share of channels that ThinK drops. ``rank``: that of a basis fitted to
    the tensor, as a share of a vector's numbers. ``blocks``: each 16 channels are combined by a matrix fitted to the tensor.
    ``estimate``: of a sketch.
    """

    preset: str | None
    cured: bool = False
    exact_tokens: int = 0
    exact_last: int = 0
    effort: str = "fast"
    before_rope: bool = False
    joined: bool = False
    dropped: float = 0
    rank: float = 0
    blocks: bool = False
    estimate: str | None = None

    def encode(self, given: Given) -> bytes:
        """The stream."""
        x, kept = given.x, ("exact_tokens", "exact_last", "effort")
        options: dict[str, Any] = {
            "seed": given.seed,
            "join_heads": self.joined,
            **{name: getattr(self, name) for name in kept},
        }
        if self.cured:
            of_recipe = Recipe().options(given.tensor)
            options |= {name: of_recipe[name] for name in ("exact_tokens", "center", "rope") if name in of_recipe}
            options["exact_tokens"] = self.exact_tokens or options["exact_tokens"]
        if self.before_rope and given.tensor.rope:
            options |= {"before_rope": True, "rope": given.tensor.rope}
        if self.dropped:
            options["channels"] = bases.think(given.queries, x, self.dropped)
        if self.rank:
            options["basis"] = int(self.rank * x.shape[-1] * (len(x) if self.joined else 1))
        if self.blocks:
            options["block_basis"] = True
        if given.kept is not None:
            options["keep"] = given.kept
        if self.preset is None:
            options["exact_tokens"] = x.shape[-2]
        else:
            options["preset"] = self.preset
        return pqcodec.encode(x, **options)

    def bits(self, stored: bytes) -> int:
        """All bytes of the stream."""
        return 8 * len(stored)

    def decode(self, stored: bytes) -> torch.Tensor:
        """The rows that the stream holds."""
        rows: torch.Tensor = pqcodec.decode_kept(stored, estimate=self.estimate)[0]
        return rows


@dataclass(frozen=True)
class Cast:
    """Numbers of another dtype, as engines keep an fp8 cache."""

    dtype: torch.dtype

    def encode(self, given: Given) -> torch.Tensor:
        """The numbers; those beyond the largest are clamped."""
        largest = torch.finfo(self.dtype).max
        return given.kept_rows().float().clamp(-largest, largest).to(self.dtype)

    def bits(self, stored: torch.Tensor) -> int:
        """The bits of all numbers."""
        return 8 * stored.nbytes

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """The numbers in float16."""
        return stored.half()


Chooser = Callable[[torch.Tensor, torch.Tensor, int], Any]  # (last queries, keys, n): positions [heads, n]


@dataclass(frozen=True)
class KeepList:
    """Of each head's tokens one of every ``part``, by a rule of ``pqcodec.select``."""

    choose: Chooser
    part: int

    def positions(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """int64 [kv_heads, n], from queries [heads, WINDOW, head_dim] and keys [kv_heads, tokens, head_dim]."""
        found = torch.as_tensor(self.choose(queries.float(), keys.float(), keys.shape[-2] // self.part))
        return found.expand(len(keys), -1)


def _streaming(queries: torch.Tensor, keys: torch.Tensor, n: int) -> Any:
    return select.streaming_llm(keys.shape[-2], n)


@dataclass(frozen=True)
class System:
    """How a cache is kept.

    ``family``: the part of the docs that tells of it; ``keep``: which tokens, None for all; ``theirs``: what its authors (or
    another paper) published of it, on larger models and other tasks.
    """

    name: str
    family: str
    keys: Coder
    values: Coder
    keep: KeepList | None = None
    theirs: str = ""


OURS, COMBINED = "ours", "combined"
WU = {  # keys alone, Llama 3.1 8B; bf16 has 49.26
    "wu44": "4.25 bits, LongBench 49.39",
    "wu35": "4.25 bits, LongBench 49.51",
    "wu33": "3.25 bits, LongBench 49.53",
    "wu24": "3.25 bits, LongBench 49.00",
}
KVQUANT = {  # perplexity of LLaMA 7B on Wikitext-2; fp16 has 5.68
    "nuq2": "2.02 bits, perplexity 7.23",
    "nuq3": "3.02 bits, perplexity 5.87",
    "nuq4": "4.02 bits",
    "kvquant2": "2.35 bits, perplexity 6.01",
    "kvquant3": "3.35 bits, perplexity 5.75",
    "kvquant4": "4.35 bits, perplexity 5.69",
}
MORE_TOKENS = {  # SnapKV of 512 tokens, LongBench; all tokens have 41.9
    None: "512 tokens: LongBench 40.3",
    "int4": "512 tokens: LongBench 39.7",
}


def _ours(preset: str, effort: str = "fast") -> System:
    coder = Stream(preset, cured=True, effort=effort)
    return System(preset + "+best" * (effort == "best"), OURS, coder, coder)


def _both(name: str, family: str, coder: Coder, theirs: str = "") -> System:
    return System(name, family, coder, coder, theirs=theirs)


def _wu(preset: str) -> System:
    """Keys as the paper has them, values of 4 bits a token as in one of its settings."""
    return System(preset, "Wu et al.", Stream(preset), Stream("int4"), theirs=WU[preset])


def _kvquant(name: str) -> System:
    """Keys as they were before RoPE, values of all heads side by side."""
    keys, values = Stream(f"{name}-key", exact_tokens=1, before_rope=True), Stream(name, exact_tokens=1, joined=True)
    return System(name, "KVQuant", keys, values, theirs=KVQUANT[name])


def _kept(rule: str, part: int, preset: str | None) -> System:
    """A preset of ours with its cures, others as they are; only float16 and int4 are pairs that the paper has."""
    cured = preset in pqcodec.PRESETS and pqcodec.PRESETS[preset].own
    coder, choose = Stream(preset, cured=cured), {"snapkv": select.snapkv, "streaming": _streaming}[rule]
    theirs = MORE_TOKENS.get(preset, "") if rule == "snapkv" else ""
    name, family = f"{rule}/{part} x {preset or 'float16'}", COMBINED if cured else "More Tokens"
    return System(name, family, coder, coder, KeepList(choose, part), theirs)


def _think(dropped: float, preset: str) -> System:
    """Keys of fewer channels at a preset of ours, the last queries' own tokens exact; values are not thinned there."""
    keys = Stream(preset, exact_tokens=4, exact_last=WINDOW, dropped=dropped)
    return System(f"ThinK {dropped} x {preset}", "ThinK", keys, Stream(preset, cured=True))


def _lorc(rank: float, preset: str) -> System:
    """Keys before RoPE and values along the principal directions of their own, heads joined; the paper's are the weights'."""
    coder = Stream(preset, exact_tokens=4, before_rope=True, joined=True, rank=rank)
    return System(f"low rank {rank} x {preset}", COMBINED if pqcodec.PRESETS[preset].own else "LoRC", coder, coder)


def _blocks(preset: str) -> System:
    """DecoQuant's factor of each 16 channels, and a scale a token of all heads."""
    coder = Stream(preset, joined=True, blocks=True)
    return System(preset, "DecoQuant", coder, coder)


def _sketch(preset: str, theirs: str = "") -> System:
    """Keys of which estimates without bias are attended to, values of 2 bits, as there."""
    return System(preset, "QJL", Stream(preset, estimate="unbiased"), Stream("int2"), theirs=theirs)


def _centred_pairs(preset: str, values: str) -> System:
    """Pair polar of keys that were centred before RoPE, the range of angles behind the largest gap."""
    return System(
        f"{preset} centred + {values}", COMBINED, Stream(preset, cured=True, effort="best"), Stream(values, cured=True)
    )


def _centred_levels(bits: int) -> System:
    """Levels of KVQuant for keys, quads for values, both with our cures."""
    return System(f"nuq{bits} + quad{bits}", COMBINED, Stream(f"nuq{bits}-key", cured=True), Stream(f"quad{bits}", cured=True))


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        _both("float16", "casts", Cast(torch.float16)),
        _both("fp8", "casts", Cast(torch.float8_e4m3fn)),
        *map(_ours, ("pq2", "pq2.5", "pq3", "pq3.5", "pq4", "quad2", "quad2.5", "quad3", "quad3.5")),
        *map(partial(_ours, effort="best"), ("quad2", "quad3")),
        _both("paper", "the seed paper", Stream("paper"), "3.88 bits"),
        *map(_wu, WU),
        System("kivi2", "KIVI", Stream("kivi2-key"), Stream("int2"), theirs="LongBench 48.68 (Wu et al.; bf16 49.26)"),
        System("kivi4", "KIVI", Stream("kivi4-key"), Stream("int4"), theirs="LongBench 49.36 (Wu et al.; bf16 49.26)"),
        *(_both(name, "llama.cpp", Stream(name)) for name in ("q4_0", "q8_0")),
        *map(_kvquant, KVQUANT),
        *(_kept("snapkv", part, None) for part in (16, 8, 4)),
        *(_kept(rule, part, "int4") for rule in ("snapkv", "streaming") for part in (4, 2)),
        *(_kept("snapkv", part, preset) for part in (4, 2) for preset in ("pq4", "quad3", "quad2.5", "quad2")),
        *(_centred_pairs(*both) for both in (("wu44", "quad3.5"), ("wu35", "quad3"), ("wu33", "quad3"), ("wu24", "quad2.5"))),
        *map(_centred_levels, (2, 3)),
        *(_think(dropped, preset) for dropped in (0.4, 0.5) for preset in ("pq4", "quad3")),
        *(_lorc(rank, preset) for rank in (0.75, 0.5) for preset in ("q8_0", "quad3.5")),
        *map(_blocks, ("decoquant8", "decoquant4", "decoquant2")),
        *map(_sketch, ("qjl", "qjl4", "qjl-outliers")),
    )
}
BASE = "pq3"  # whose speed is 1
