"""Block tables of engines: every layout against a plain loop over tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pqcodec
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.offload import LAYOUTS, decode_blocks, encode_blocks, gather_blocks, scatter_blocks
from tests.conftest import DEVICE, GPU, bits, gaussian

BLOCKS, SIZE, HEADS, DIM = 7, 4, 2, 64
SIZES = {"2": 2, "blocks": BLOCKS, "block": SIZE, "heads": HEADS, "dim": DIM}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not GPU, reason="no GPU here"))]
FUSED = LAYOUTS[0]


def cache_of(layout: str, device: str = "cpu", seed: int = 0) -> Any:
    shape = [SIZES[name] for name in layout.split(",")]
    made = [gaussian(*shape, seed=seed + i, dtype=torch.float16).to(device) for i in range(2)]
    return made[0] if "2" in layout.split(",") else tuple(made)


def token(cache: Any, layout: str, side: int, block: int, row: int) -> torch.Tensor:
    """One token's [heads, dim] by its definition."""
    names = layout.split(",")
    if "2" not in names:
        cache = cache[side]
    at = {"2": side, "blocks": block, "block": row}
    return cache[tuple(at.get(name, slice(None)) for name in names)]


def plain(cache: Any, layout: str, table: list[int], first: int, tokens: int) -> list[torch.Tensor]:
    places = [(table[t // SIZE], t % SIZE) for t in range(first, first + tokens)]
    return [torch.stack([token(cache, layout, side, *place) for place in places], 1) for side in (0, 1)]


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((bits(x) == bits(y)).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("first", "tokens"), [(0, 12), (0, 9), (3, 6), (5, 2), (4, 8), (0, 1)])
def test_tokens_are_gathered_and_scattered_as_a_loop_does(layout: str, first: int, tokens: int, device: str) -> None:
    table = [5, 0, 3]
    cache = cache_of(layout, device)
    pair = gather_blocks(cache, layout, table, tokens, first_token=first)
    assert all(same(x, y) for x, y in zip(pair, plain(cache, layout, table, first, tokens), strict=True))
    other = cache_of(layout, device, seed=9)
    kept = cache_of(layout, device, seed=9)
    scatter_blocks(pair, other, layout, [1, 6, 2], first_token=first)
    written = {([1, 6, 2][t // SIZE], t % SIZE): t - first for t in range(first, first + tokens)}
    for side in (0, 1):
        for block in range(BLOCKS):
            for row in range(SIZE):
                t = written.get((block, row))
                expected = token(kept, layout, side, block, row) if t is None else pair[side][:, t]
                assert same(token(other, layout, side, block, row), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams_of_blocks_are_those_of_the_tokens(layout: str, device: str) -> None:
    """Keys are centred at the positions that the tokens have in the sequence."""
    cache, table = cache_of(layout, device), torch.tensor([5, 0, 3], dtype=torch.int32, device=device)
    rope = pqcodec.Rope(theta=100.0, first_position=1000)
    streams = encode_blocks(cache, layout, table, 7, first_token=5, preset=("pq4", "pq3"), rope=rope)
    keys, values = plain(cache, layout, [5, 0, 3], 5, 7)
    there = pqcodec.Rope(theta=100.0, first_position=1005)
    expected = [
        pqcodec.decode(pqcodec.encode(keys.cpu(), preset="pq4", center="rope", rope=there)),
        pqcodec.decode(pqcodec.encode(values.cpu(), preset="pq3")),
    ]
    empty = cache_of(layout, device, seed=5)
    assert decode_blocks(streams, empty, layout, [2, 1, 4], first_token=5) == 7
    assert all(same(x, y) for x, y in zip(plain(empty, layout, [2, 1, 4], 5, 7), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "NHD"}, "choose from"),
        ({"layout": "blocks,block,heads,dim"}, "pass both as a pair"),
        ({"layout": "blocks,2,block,heads,dim"}, "which is not"),
        ({"block_table": [5, 0, 7]}, "block 7, the cache has blocks 0 .. 6"),
        ({"block_table": [5, -1, 3]}, "block -1"),
        ({"block_table": [5, 0]}, "take 3 blocks of 4, block_table names 2"),
        ({"block_table": [0.5, 1.0, 2.0]}, "a list of block numbers"),
        ({"block_table": [[0, 1, 2]]}, "a list of block numbers"),
        ({"first_token": -1}, "neither may be negative"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    cache = cache_of(FUSED)
    streams = encode_blocks(cache, FUSED, [5, 0, 3], 9)
    wanted = {"layout": FUSED, "block_table": [5, 0, 3], "first_token": 0, **change}
    with pytest.raises(InvalidArgument, match=words):
        gather_blocks(cache, tokens=9, **wanted)
    before = cache.clone()
    with pytest.raises(InvalidArgument, match=words):
        decode_blocks(streams, cache, **wanted)
    assert same(cache, before)


def test_a_block_named_twice_is_read_but_not_written() -> None:
    """Sequences share blocks to read; two tokens in one place would overwrite each other."""
    cache = cache_of(FUSED)
    streams = encode_blocks(cache, FUSED, [5, 5, 3], 9)
    with pytest.raises(InvalidArgument, match="names block 5 twice"):
        decode_blocks(streams, cache, FUSED, [5, 5, 3])
    assert decode_blocks(streams, cache, FUSED, [5, 4, 3, 3, 3]) == 9  # what is behind the tokens does not count


def test_streams_of_another_cache_are_refused_and_damage_writes_nothing() -> None:
    cache = cache_of(FUSED)
    before = cache.clone()
    keys, values = encode_blocks(cache, FUSED, [5, 0, 3], 9)
    for streams, words in (
        ((keys,), "1 streams are given"),
        ((keys, encode_blocks(cache, FUSED, [5], 4)[1]), "the values' 4"),
        ((keys, pqcodec.encode(gaussian(HEADS, 9, DIM))), "the stream of values holds float32"),
        ((pqcodec.encode(gaussian(3, 9, DIM, dtype=torch.float16)), values), "the stream of keys holds"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            decode_blocks(streams, cache, FUSED, [5, 0, 3])
    damaged = bytearray(values)
    damaged[-9] ^= 1
    with pytest.raises(CorruptStream):
        decode_blocks((keys, bytes(damaged)), cache, FUSED, [5, 0, 3])
    assert same(cache, before)


@pytest.mark.parametrize("pair", [(torch.zeros(HEADS, 3, DIM),) * 2, (torch.zeros(3, HEADS, DIM).half(),) * 2])
def test_tensors_of_another_kind_are_not_scattered(pair: Any) -> None:
    with pytest.raises(InvalidArgument, match="the cache wants"):
        scatter_blocks(pair, cache_of(FUSED, DEVICE), FUSED, [0])
