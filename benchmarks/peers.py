"""Law: what other codecs do to a KV cache, from their papers' words: quantised and back, with the bits that would be stored.

A quantiser takes a tensor [Hkv, T, D] and a seed; it returns what decodes from it, float32 [Hkv, T, D], and the bits stored
for it in all: scales, norms, zero points, means and tokens kept in 16 bits count, headers and checksums are nobody's (the
paper's preset alone is a real stream, whose bytes count). Nothing here is fast, or writes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
import torch

import pqcodec
from benchmarks.rate_distortion import lloyd_max
from pqcodec import Rope
from pqcodec.stages import centre

Quantiser = Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]

GROUP = 32  # numbers under one scale, of KIVI and of ggml
SCALE_BITS = 16  # of a scale, a zero point, a norm, a coordinate of a mean or of an exact token
EXACT_TOKENS = 4  # of the cured: as many as pqcodec keeps


@dataclass(frozen=True)
class Peer:
    """A codec of caches; ``seeded``: it draws a rotation, so that its error is one of many."""

    name: str
    key: Quantiser
    value: Quantiser
    seeded: bool = False

    def apply(self, key: torch.Tensor, value: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Decoded key and value of a layer [Hkv, T, D], and the mean bits a coordinate.

        >>> x = torch.ones(2, 64, 64)
        >>> [peer.apply(x, x)[2] for name, peer in peers(Rope()).items() if name.startswith("kivi")]
        [3.0, 5.0]
        """
        (keys, key_bits), (values, value_bits) = self.key(key.float(), seed), self.value(value.float(), seed)
        return keys, values, (key_bits + value_bits) / (key.numel() + value.numel())


@dataclass(frozen=True)
class Cast:
    """Stored as another floating dtype with scale 1, beyond its largest number clamped, as engines' fp8 caches are."""

    dtype: torch.dtype

    def __call__(self, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        largest = torch.finfo(self.dtype).max
        return x.clamp(-largest, largest).to(self.dtype).float(), 8 * self.dtype.itemsize * x.numel()


@dataclass(frozen=True)
class Affine:
    """KIVI's cells (arXiv 2402.02750): ``bits`` bits between the least and the greatest of 32 numbers, each with 16-bit scale
    and zero point.

    ``dim``: -1 groups channels of a token (values), -2 tokens of a channel (keys). What is left behind the last whole group
    stays in 16 bits. KIVI's window of the 128 newest tokens in 16 bits is left out: of a prefix of 1,024 tokens it would cost
    1.4 bits a coordinate more at 4 bits and 1.6 at 2, and make the newest tokens exact.
    """

    bits: int
    dim: int

    def __call__(self, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        rest = x.shape[self.dim] % GROUP
        whole, tail = x.split([x.shape[self.dim] - rest, rest], self.dim)
        groups = whole.unflatten(self.dim, (-1, GROUP))
        low, high = (edge.half().float() for edge in torch.aminmax(groups, dim=self.dim, keepdim=True))
        scale = ((high - low) / (2**self.bits - 1)).half().float().clamp(min=2.0**-24)
        cells = ((groups - low) / scale).round().clamp(0, 2**self.bits - 1)
        decoded = (cells * scale + low).flatten(self.dim - 1, self.dim)
        stored = self.bits * whole.numel() + 2 * SCALE_BITS * scale.numel() + 16 * tail.numel()
        return torch.cat([decoded, tail.half().float()], self.dim), stored


def q4_0(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
    """ggml's Q4_0: 32 channels of a token under a 16-bit scale, which is the number of largest size, with its sign, over -8."""
    groups = x.unflatten(-1, (-1, GROUP))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    cells = (groups / torch.where(scale == 0, 1, scale) + 8.5).floor().clamp(0, 15)
    return ((cells - 8) * scale.half().float()).flatten(-2), 4 * x.numel() + SCALE_BITS * scale.numel()


@lru_cache(maxsize=16)
def random_rotation(head_dim: int, seed: int) -> torch.Tensor:
    """A rotation float32 [head_dim, head_dim], uniform among all: Q of a Gaussian matrix, the signs of R's diagonal undone."""
    gaussian = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


@dataclass(frozen=True)
class TurboQuant:
    """TurboQuant's MSE variant (arXiv 2504.19874): 16-bit norm, random rotation, Lloyd-Max cells of a normal coordinate."""

    bits: int

    def __call__(self, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        head_dim = x.shape[-1]
        rotation = random_rotation(head_dim, seed)
        edges, centroids, _ = lloyd_max(2**self.bits)
        norm = x.norm(dim=-1, keepdim=True)
        rotated = x / norm.clamp(min=1e-30) @ rotation.T * sqrt(head_dim)
        cells = torch.bucketize(rotated, torch.from_numpy(edges[1:-1]).float())
        decoded = torch.from_numpy(centroids).float()[cells] / sqrt(head_dim) @ rotation * norm.half().float()
        return decoded, self.bits * x.numel() + SCALE_BITS * norm.numel()


@dataclass(frozen=True)
class Cured:
    """Another quantiser behind pqcodec's two cures: the first tokens stay in 16 bits, and with a ``rope`` the rest loses its
    RoPE-aware mean, a 16-bit vector a head.
    """

    quantiser: Quantiser
    rope: Rope | None = None
    exact_tokens: int = EXACT_TOKENS

    def __call__(self, x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        first, rest = x.split([self.exact_tokens, x.shape[-2] - self.exact_tokens], -2)
        offsets = torch.zeros(()) if self.rope is None else rope_mean(rest, self.rope, self.exact_tokens)
        decoded, stored = self.quantiser(rest - offsets, seed)
        stored += 16 * first.numel() + (0 if self.rope is None else SCALE_BITS * x.shape[0] * x.shape[-1])
        return torch.cat([first.half().float(), decoded + offsets], -2), stored


def rope_mean(x: torch.Tensor, rope: Rope, first_token: int) -> torch.Tensor:
    """The mean over tokens before RoPE, 16 bits, as it stands at each token of x [Hkv, T, D]: float32 [Hkv, T, D]."""
    field = rope.field(x.shape[-1])
    cos, sin = centre.phases(field, first_token, x.shape[-2])
    means = [centre.turn_back(head, cos, sin, field).mean(0).astype(np.float16).astype(np.float32) for head in x.numpy()]
    return torch.from_numpy(np.stack([centre.turn(mean, cos, sin, field) for mean in means]))


def paper(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
    """PolarQuant as its paper has it (arXiv 2502.02617): no mean taken away, no exact tokens; bits of pqcodec's stream."""
    stream = pqcodec.encode(x.half().contiguous(), preset="paper", seed=seed)
    return pqcodec.decode(stream).float(), 8 * len(stream)


def peers(rope: Rope, exact_tokens: int = EXACT_TOKENS) -> dict[str, Peer]:
    """Every peer by its name; ``rope`` of the keys and ``exact_tokens`` are for the cured."""

    def cured(bits: int, rope: Rope | None = None) -> Cured:
        return Cured(TurboQuant(bits), rope, exact_tokens)

    turboquants = [
        peer
        for bits in (3, 4)
        for peer in (
            Peer(f"turboquant{bits}", TurboQuant(bits), TurboQuant(bits), seeded=True),
            Peer(f"turboquant{bits}+cures", cured(bits, rope), cured(bits), seeded=True),
        )
    ]
    found = (
        Peer("fp16", Cast(torch.float16), Cast(torch.float16)),
        Peer("fp8", Cast(torch.float8_e4m3fn), Cast(torch.float8_e4m3fn)),
        Peer("paper", paper, paper, seeded=True),
        *turboquants,
        *(Peer(f"kivi{bits}", Affine(bits, -2), Affine(bits, -1)) for bits in (2, 4)),
        Peer("q4_0", q4_0, q4_0),
    )
    return {peer.name: peer for peer in found}
