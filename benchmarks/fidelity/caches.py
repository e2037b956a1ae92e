"""Law: the ways to keep a cache that are compared: every peer, and every preset of the split coding; whole, or one role alone.

A preset goes through a .pqkv file in memory, all of whose bytes count. Peers get pqcodec's cures (RoPE-aware mean, exact first
tokens) where their name says so, each tensor as its own layer needs them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pqcodec
from benchmarks import model as lm
from benchmarks.fidelity.reading import Prefix, Tensors
from benchmarks.peers import Peer, peers
from pqcodec import Rope
from pqcodec import constants as c
from pqcodec.formats.containers.pqkv.file import PQKVFile, write_pieces
from pqcodec.formats.plain.in_memory import InMemory
from pqcodec.formats.policy.recipe import Recipe

NO_ROPE = Rope(frequencies=(0.0,))  # turns nothing, so that the mean under it is the plain one


@dataclass(frozen=True)
class Kept:
    """What came of a cache: decoded tensors float32, the bits stored for each, and those of all, a file's frame included."""

    tensors: Tensors
    bits: Mapping[str, int]
    all_bits: int

    @property
    def bits_per_coordinate(self) -> float:
        return self.all_bits / sum(x.numel() for x in self.tensors.values())


@dataclass(frozen=True)
class Cache:
    """A way to keep a cache; ``seeded``: it draws a rotation, so that its error is one of many."""

    name: str
    seeded: bool
    code: Callable[[Prefix, int], Kept]


def all_caches() -> dict[str, Cache]:
    """Every cache by its name; ``pq3:key`` codes the keys as pq3 does and leaves the values, ``pq3:value`` the reverse.

    ``quad3+best`` is quad3 with the best effort.
    """
    presets = [name for name, preset in pqcodec.PRESETS.items() if preset.own]
    searched = [name for name, preset in pqcodec.PRESETS.items() if preset.coding == c.CODING_QUADS]
    whole = [*map(_of_peer, peers(NO_ROPE).values()), *map(_of_preset, presets)]
    whole += [_of_preset(name, "best") for name in searched]
    return {cache.name: cache for one in whole for cache in (one, *(_only(one, role) for role in lm.ROLES))}


def _of_peer(peer: Peer) -> Cache:
    def code(prefix: Prefix, seed: int) -> Kept:
        tensors, bits = {}, {}
        for name, x in prefix.stored().items():
            part = prefix.roles[name]
            cures = Recipe().options(part)
            found = peers(part.rope or NO_ROPE, cures["exact_tokens"])[peer.name]
            decoded, bits[name] = getattr(found, part.role)(x.flatten(0, -3).float(), seed)
            tensors[name] = decoded.reshape(x.shape)
        return Kept(tensors, bits, sum(bits.values()))

    return Cache(peer.name, peer.seeded, code)


def _of_preset(preset: str, effort: str = "fast") -> Cache:
    def code(prefix: Prefix, seed: int) -> Kept:
        file = io.BytesIO()
        write_pieces(file, Recipe(preset=preset, seed=seed, effort=effort).pieces(InMemory(prefix.stored()), prefix.roles))
        with PQKVFile(file.getvalue()) as coded:
            tensors = {name: coded.decode(name).float() for name in coded.names}
            bits = {name: 8 * coded.stream(name).size for name in coded.names}
        return Kept(tensors, bits, 8 * len(file.getvalue()))

    return Cache(preset + "+best" * (effort == "best"), True, code)


def _only(cache: Cache, role: str) -> Cache:
    """The same, the tensors of the other role as the model made them; the bits are those of the coded."""

    def code(prefix: Prefix, seed: int) -> Kept:
        kept = cache.code(prefix, seed)
        names = [name for name in kept.tensors if prefix.roles[name].role == role]
        bits = {name: kept.bits[name] for name in names}
        return Kept({name: kept.tensors[name] for name in names}, bits, sum(bits.values()))

    return Cache(f"{cache.name}:{role}", cache.seeded, code)
