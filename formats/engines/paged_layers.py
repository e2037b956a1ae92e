"""Law: keys and values in an engine's paged cache, found where the engine's own writer puts them.

Engines arrange the numbers of a block in ways that no shape tells, and that differ between kernels. So numbers that say which
they are go through the writer once, at start, and are looked up in the cache: where they are is the layout. A writer that does
not copy each number to one place of the token's block, in all heads and layers alike, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pqcodec.errors import InvalidArgument

Write = Callable[[Any, Any, Any, Any], None]  # (keys [tokens, heads, dim], values, cache, slots [tokens] int64)
_BASE = 64  # digits of a number's index, each with one added: exact in every dtype
_DIGITS = 4
_ADVICE = "this engine, or its attention backend, cannot be served by this version"


@dataclass(frozen=True)
class CacheShape:
    """What an engine's cache holds of each token: in each layer keys and values [kv_heads, head_dim] of a dtype."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str


class PagedLayers:
    """The layers of an engine's cache, each a tensor [blocks, heads, block, 2 * dim] whose last two dimensions may be packed.

    ``caches``: in the order of the layers, before anything is in them: block 0 of each is written and restored. ``writers``:
    the engine's own for each layer. ``blocks``, ``block``: number, and tokens, of the blocks of block tables; in the caches
    each may be several that follow each other. Raises InvalidArgument.

    >>> import torch
    >>> def write(keys, values, cache, slots):
    ...     cache[slots // 4, :, slots % 4, :2], cache[slots // 4, :, slots % 4, 2:] = keys, values
    >>> cache = torch.zeros(3, 1, 4, 4)
    >>> layers = PagedLayers([cache], [write], CacheShape(1, 1, 2, "float32"), blocks=3, block=4)
    >>> layers.write(0, [2, 1], 3, torch.ones(1, 2, 2), torch.full((1, 2, 2), 5.0))
    >>> keys, values = layers.read(0, [2, 1], 0, 8)
    >>> keys[0, :, 0].tolist(), values[0, :, 0].tolist(), cache[0].any().item()
    ([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0, 5.0, 0.0, 0.0, 0.0], False)
    """

    def __init__(self, caches: Sequence[Any], writers: Sequence[Write], shape: CacheShape, *, blocks: int, block: int) -> None:
        self._caches, self._writers, self._shape, self._block = list(caches), list(writers), shape, block
        if not len(self._caches) == len(self._writers) == shape.layers:
            raise InvalidArgument(f"{len(self._caches)} caches and {len(self._writers)} writers; {shape.layers} are expected")
        for cache in self._caches:
            found = tuple(cache.shape), str(cache.dtype).removeprefix("torch."), cache.device
            ratio = cache.shape[0] // blocks if cache.ndim == 4 else 0
            wanted = (blocks * ratio, shape.kv_heads, block // max(ratio, 1), 2 * shape.head_dim)
            if not ratio or block % ratio or found != (wanted, shape.dtype, self._caches[0].device):
                raise InvalidArgument(
                    f"a layer's cache is {found[1]} {found[0]}; {shape.dtype} [{blocks}, {shape.kv_heads}, {block}, "
                    f"{2 * shape.head_dim}] is expected, all on one device: {_ADVICE}"
                )
        self._part = int(self._caches[0].shape[2])  # tokens of a block as the caches count
        places = [self._places(cache, write) for cache, write in zip(self._caches, self._writers, strict=True)]
        if any(not (one == places[0]).all() for one in places):
            raise InvalidArgument(f"layers' caches are arranged differently: {_ADVICE}")
        self._at = places[0]  # [2, block * dim]: place of each key and value in a head of a block

    def _places(self, cache: Any, write: Write) -> Any:
        """Where in a head of a block, int64 [2, block * dim], a writer puts keys and values; raises InvalidArgument."""
        import torch

        heads, size, dim = self._shape.kv_heads, self._part, self._shape.head_dim
        numbers = torch.arange(2 * heads * size * dim, device=cache.device).view(2, heads, size, dim)
        found = torch.zeros(heads, 2 * size * dim, dtype=torch.int64, device=cache.device)
        slots = torch.arange(size, device=cache.device)
        before = cache[0].clone()
        sound = True
        for digit in range(_DIGITS):
            told = (numbers // _BASE**digit % _BASE + 1).to(cache.dtype).transpose(1, 2).contiguous()
            cache[0] = 0
            write(told[0], told[1], cache, slots)
            seen = cache[0].to(torch.float64).reshape(heads, -1)
            sound &= bool(((seen >= 1) & (seen <= _BASE) & (seen == seen.floor())).all())
            found += (seen.to(torch.int64) - 1) * _BASE**digit
        cache[0] = before
        at = torch.argsort(found.flatten())  # the place of each number
        sound &= numbers.numel() <= _BASE**_DIGITS and bool((found.flatten()[at] == numbers.flatten()).all())
        at = at.view(2, heads, size * dim) - torch.arange(heads, device=cache.device)[:, None] * 2 * size * dim
        if not sound or not bool((at == at[:, :1]).all()):
            raise InvalidArgument(f"the engine does not keep each number of its keys and values in one place: {_ADVICE}")
        return at[:, 0]

    @property
    def device(self) -> Any:
        """The caches' device."""
        return self._caches[0].device

    def read(self, layer: int, table: Sequence[int], first: int, tokens: int) -> tuple[Any, Any]:
        """Keys and values [heads, tokens, dim], copies, of a sequence with a block table, from token ``first`` on.

        ``first`` and ``tokens`` are multiples of the block.
        """
        import torch

        cache, shape = self._caches[layer], self._shape
        ratio = self._block // self._part
        used = [part for one in table[first // self._block : (first + tokens) // self._block] for part in _parts(one, ratio)]
        picked = cache[torch.tensor(used, device=cache.device)].reshape(len(used), shape.kv_heads, -1)
        keys, values = (
            picked.index_select(2, at)
            .view(len(used), shape.kv_heads, self._part, shape.head_dim)
            .transpose(0, 1)
            .reshape(shape.kv_heads, tokens, shape.head_dim)
            for at in self._at
        )
        return keys, values

    def write(self, layer: int, table: Sequence[int], first: int, keys: Any, values: Any) -> None:
        """Put keys and values [heads, tokens, dim] at the tokens from ``first`` on of a sequence with a block table."""
        import torch

        tokens = torch.arange(first, first + keys.shape[1])
        blocks = torch.tensor(table)[tokens // self._block]
        slots = (blocks * self._block + tokens % self._block).to(self.device)
        keys, values = (x.transpose(0, 1).contiguous() for x in (keys, values))
        self._writers[layer](keys, values, self._caches[layer], slots)


def _parts(block: int, ratio: int) -> range:
    return range(block * ratio, (block + 1) * ratio)


def layers_in_order(names: Iterable[str], layers: int) -> list[str]:
    """The names of a model's layers by the numbers in them, which must be those from 0 to ``layers`` - 1.

    Raises InvalidArgument.

    >>> layers_in_order(["model.layers.1.self_attn.attn", "model.layers.0.self_attn.attn"], 2)
    ['model.layers.0.self_attn.attn', 'model.layers.1.self_attn.attn']
    """
    numbered: dict[int, str] = {}
    for name in names:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if len(numbers) != 1 or numbers[0] in numbered:
            raise InvalidArgument(f"a layer is called {name!r}; one number in each name, no two alike, is expected: {_ADVICE}")
        numbered[numbers[0]] = name
    if sorted(numbered) != list(range(layers)):
        raise InvalidArgument(
            f"the engine has caches of the layers {sorted(numbered)}, the model {layers} layers: some share a cache, are no "
            f"attention or are a draft model's: {_ADVICE}"
        )
    return [numbered[number] for number in range(layers)]
