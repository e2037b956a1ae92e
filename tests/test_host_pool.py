"""The pool of encoded blocks in host memory: its allocator, who makes room for whom, and that failures lose nothing."""

from __future__ import annotations

import copy
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput
from pqcodec.formats.offload import ArenaFull, HostPool, PinnedArena
from pqcodec.formats.offload.pipeline import _Starts
from tests.conftest import DEVICE, GPU, HAS_TRITON, bits, gaussian

WAYS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(
        ("cpu", "triton"),
        id="interpreter",
        marks=pytest.mark.skipif(GPU or not HAS_TRITON, reason="the interpreter needs triton, and no GPU"),
    ),
    pytest.param((DEVICE, "auto"), id="gpu", marks=pytest.mark.skipif(not GPU, reason="no GPU here")),
]
SHAPE = (2, 20, 64)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    device, backend = request.param
    return {"device": device, "backend": backend}


def tensors(way: dict[str, Any], count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    return [gaussian(*SHAPE, seed=seed + i, dtype=torch.float16).to(way["device"]) for i in range(count)]


def coded(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """What a tensor is after encode where it lies, whose encoder a pool takes, and decode on the CPU."""
    return pqcodec.decode(pqcodec.encode(x, **options))


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((bits(x) == bits(y)).all())


def block_bytes(way: dict[str, Any], count: int = 2) -> int:
    with HostPool(1 << 20, **way) as pool:
        pool.put(0, tensors(way, count), wait=True)
        return pool.usage().used_bytes


def only_lane(pool: HostPool) -> Any:
    """The pipeline of a pool's only device."""
    (lane,) = pool._lanes._made.values()
    return lane


def test_a_pool_is_not_copied() -> None:
    with HostPool(1 << 16, device="cpu") as pool:
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a HostPool is not copied or pickled"):
                way(pool)


# -- the allocator -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_the_arena_does_what_a_plain_model_of_it_does(seed: int) -> None:
    """Slices never overlap, keep their bytes, and all memory joins again; the model is a list of cells of 256 bytes."""
    rng = random.Random(seed)
    cells = 64
    arena = PinnedArena(256 * cells, pinned=False)
    owner: list[int | None] = [None] * cells
    held: dict[int, Any] = {}
    for step in range(400):
        if held and rng.random() < 0.45:
            name = rng.choice(list(held))
            part = held.pop(name)
            assert (part.tensor == name % 251).all()
            part.free()
            part.free()
            owner = [None if cell == name else cell for cell in owner]
        else:
            nbytes = rng.choice([0, 1, 255, 256, 257, rng.randrange(1, 256 * 12)])
            wanted = max(-(-nbytes // 256), 1)
            runs = "".join("." if cell is None else "x" for cell in owner).split("x")
            if all(len(run) < wanted for run in runs):
                with pytest.raises(ArenaFull, match=f"{nbytes} bytes are asked for"):
                    arena.allocate(nbytes)
                continue
            part = arena.allocate(nbytes)
            first = part.offset // 256
            assert part.offset % 256 == 0
            assert part.tensor.numel() == nbytes
            assert owner[first : first + wanted] == [None] * wanted
            owner[first : first + wanted] = [step] * wanted
            part.tensor.fill_(step % 251)
            held[step] = part
        assert arena.free_bytes == 256 * owner.count(None)
        assert arena.largest_free == 256 * max(map(len, "".join("." if c is None else "x" for c in owner).split("x")))
    for part in held.values():
        part.free()
    assert arena.largest_free == arena.capacity_bytes


def test_an_arena_refuses_what_makes_no_sense() -> None:
    with pytest.raises(InvalidArgument, match="at least 256"):
        PinnedArena(0)
    with pytest.raises(InvalidArgument, match="-1 bytes"):
        PinnedArena(1024, pinned=False).allocate(-1)


# -- in and out ----------------------------------------------------------------------------------------------------
def test_a_block_comes_back_as_the_codec_leaves_it(way: dict[str, Any]) -> None:
    rope = pqcodec.Rope(theta=100.0, first_position=7, frequencies=[0.5, 0.25])
    with HostPool(1 << 20, **way) as pool:
        for seed in range(3):  # the second time what is prepared is used again, for tensors that lie elsewhere
            xs = tensors(way, 2, seed)
            pool.put("a", xs, center=["rope", None], rope=[rope, None], preset=["pq4", "pq3"], exact_tokens=2)
            keys, values = pool.get("a")
            assert same(keys, coded(xs[0], preset="pq4", center="rope", rope=rope, exact_tokens=2))
            assert same(values, coded(xs[1], preset="pq3", exact_tokens=2))
        one = gaussian(3, 5, 64).to(way["device"])
        pool.put("one", one)
        assert same(pool.get("one"), coded(one))
        assert pool.get("none") is None
        assert (pool.counters.puts, pool.counters.hits, pool.counters.misses) == (4, 4, 1)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_frequencies_may_come_in_any_sequence(kind: Any) -> None:
    rope = pqcodec.Rope(frequencies=kind([0.5, 0.25]))
    x = gaussian(*SHAPE, dtype=torch.float16)
    with HostPool(1 << 20, device="cpu", backend="reference") as pool:
        for key in "ab":
            pool.put(key, [x, x], center="rope", rope=rope)
            assert same(pool.get(key)[1], coded(x, center="rope", rope=rope, backend="reference"))


def test_large_tensors_travel_in_pieces_into_outs_of_any_strides(way: dict[str, Any]) -> None:
    x = gaussian(5, 20, 64, dtype=torch.bfloat16).to(way["device"])
    cache = torch.full((20, 5, 64), float("nan"), dtype=torch.bfloat16, device=way["device"])
    with HostPool(1 << 20, piece_bytes=2 * 20 * 64 * 2, **way) as pool:
        pool.put("a", x)
        assert pool.prefetch("a")
        assert not pool.prefetch("b")
        found = pool.fetch("a", out=cache.transpose(0, 1))
        assert found is not None
        assert same(found.wait(), coded(x))
        assert same(cache.transpose(0, 1), pool.get("a"))


def test_halves_at_the_ends_of_blocks_share_one_buffer_and_whole_pieces_two() -> None:
    if not HAS_TRITON:
        pytest.skip("the pipeline of a GPU needs triton here")
    way = {"device": DEVICE, "backend": "auto" if GPU else "triton"}
    x = gaussian(1, 4, 64, dtype=torch.float16).to(DEVICE)
    with HostPool(1 << 20, piece_bytes=2 * x.nbytes, **way) as pool:
        for _ in range(2):
            pool.put("a", [x] * 6)
            assert all(same(y, coded(x)) for y in pool.get("a"))
        for prepared in (only_lane(pool)._encoders, only_lane(pool)._decoders):
            assert sorted((batches[0].memory.numel(), len(batches)) for batches in prepared._kinds.values()) == [
                (pool._blocks["a"].layout.sizes[0], 1),
                (pool._blocks["a"].layout.sizes[1], 2),
            ]
        assert [len(piece.streams) for piece in pool._blocks["a"].layout.pieces] == [1, 2, 2, 1]


@pytest.mark.parametrize("leads", [1, 3, 200])
def test_addresses_are_the_same_whoever_adds_them(leads: int) -> None:
    """Python adds few, numpy many."""
    group = SimpleNamespace(starts=torch.zeros(2 * leads + 1, dtype=torch.int64))
    parts = [np.arange(leads) * 64, np.array([0]), np.arange(leads) * 128 + 8]
    starts = _Starts(group, [1, 0, 3], parts)
    addresses = [5 << 40, 1 << 33, -1, 7 << 41]
    for shift in range(2):
        starts.set([address + shift for address in addresses], None)
        expected = [part + addresses[number] + shift for number, part in zip([1, 0, 3], parts, strict=True)]
        assert group.starts.tolist() == np.concatenate(expected).tolist()


def test_a_pieces_event_and_flags_are_used_again_when_they_were_looked_at(way: dict[str, Any]) -> None:
    if way["device"] == way["backend"] == "cpu":
        pytest.skip("tensors of the CPU are encoded before put returns")
    with HostPool(1 << 20, **way) as pool:
        bad = tensors(way)
        bad[0][0, 0, 0] = float("nan")
        first, second = pool.put("a", bad), pool.put("b", tensors(way))
        assert first._transfer.arrivals[0].flags is not second._transfer.arrivals[0].flags
        second.wait()
        third = pool.put("c", tensors(way))
        assert third._transfer.arrivals[0].flags is second._transfer.arrivals[0].flags
        third.wait()
        second.wait()
        with pytest.raises(NonFiniteInput):
            first.wait()


def test_wrong_arguments_are_told_apart(way: dict[str, Any]) -> None:
    xs = tensors(way)
    with HostPool(8192, **way) as pool:
        pool.put("a", xs[0][:, :4], wait=True)
        for call, words in (
            (lambda: pool.put("b", [gaussian(64, 64, 64)] * 9), "the pool has 8192 in all"),
            (lambda: pool.put("b", xs, preset=["pq3"]), "1 are given for 2"),
            (lambda: pool.put("b", xs, preset="paper"), "looks at the numbers"),
            (lambda: pool.put("b", xs, preset="nuq4"), "looks at the numbers"),
            (lambda: pool.put("b", [None]), "tensor 0 is a NoneType"),
            (lambda: pool.get("a", out=xs[0]), "the result is"),
            (lambda: HostPool(1 << 20, piece_bytes=0), "piece_bytes 0"),
        ):
            if way["device"] != "cpu" and "in all" in words:
                continue
            with pytest.raises(InvalidArgument, match=words):
                call()
        assert pool.get("a") is not None
    with pytest.raises(InvalidArgument, match="closed"):
        pool.put("a", xs)


# -- room ----------------------------------------------------------------------------------------------------------
def test_the_block_used_longest_ago_is_evicted(way: dict[str, Any]) -> None:
    told: list[Any] = []
    with HostPool(3 * block_bytes(way), on_displaced=lambda *what: told.append(what), **way) as pool:
        for key in "abc":
            pool.put(key, tensors(way), wait=True)
        pool.get("a")
        put = pool.put("d", tensors(way), wait=True)
        assert put.displaced == told == [("b", "evicted")]
        assert ["b" in pool, "a" in pool, "c" in pool, "d" in pool] == [False, True, True, True]
        assert pool.counters.evicted == 1
        assert pool.drop("a")
        assert not pool.drop("a")
        assert pool.put("e", tensors(way), wait=True).displaced == []
        assert len(pool) == 3


def test_a_full_pool_spills_to_files_that_are_read_again(way: dict[str, Any], tmp_path: Path) -> None:
    xs = {key: tensors(way, 2, seed) for seed, key in enumerate("abcd")}
    with HostPool(2 * block_bytes(way), spill=tmp_path / "spill", **way) as pool:
        for key, pair in xs.items():
            pool.put(key, pair)
        assert pool.usage().blocks_on_disk == 2
        assert pool.counters.spilled == 2
        for _ in range(2):
            for key, pair in xs.items():
                found = pool.get(key)
                assert all(same(y, coded(x)) for x, y in zip(pair, found, strict=True))
        assert pool.counters.reloaded >= 4
        assert pool.counters.evicted == 0
        files = list((tmp_path / "spill").glob("*.pqkv"))
        assert len(files) == 4
        pool.drop("a")
        assert len(list((tmp_path / "spill").glob("*.pqkv"))) == 3
    assert not list((tmp_path / "spill").iterdir())


# -- failures ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_put_that_fails_half_way_leaves_what_was_there(
    way: dict[str, Any], fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tensors(way, 2, 0), tensors(way, 2, 5)
    with HostPool(1 << 20, piece_bytes=first[0].nbytes, **way) as pool:
        pool.put("a", first, wait=True)
        used = pool.usage().used_bytes
        lane = only_lane(pool)
        encode, calls = lane.encode, iter(range(9))

        def failing(*arguments: Any) -> None:
            if next(calls) == fails_at:
                raise OSError("the copy failed")
            encode(*arguments)

        monkeypatch.setattr(lane, "encode", failing)
        with pytest.raises(OSError, match="the copy failed"):
            pool.put("a", second)
        monkeypatch.setattr(lane, "encode", encode)
        assert pool.usage().used_bytes == used
        assert pool.counters.failed == 1
        assert all(same(y, coded(x)) for x, y in zip(first, pool.get("a"), strict=True))


def test_a_get_that_fails_leaves_the_block(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    xs = tensors(way)
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", xs)

        def failing(*_: Any) -> None:
            raise OSError("the copy failed")

        with monkeypatch.context() as patch:
            patch.setattr(only_lane(pool), "decode", failing)
            with pytest.raises(OSError, match="the copy failed"):
                pool.get("a")
        assert all(same(y, coded(x)) for x, y in zip(xs, pool.get("a"), strict=True))


def test_a_spill_that_fails_leaves_the_block_and_the_room(
    way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError("no space left")

    xs = tensors(way)
    with HostPool(block_bytes(way), spill=tmp_path, **way) as pool:
        pool.put("a", xs, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr("pqcodec.formats.offload.block.Block.write", failing)
            with pytest.raises(OSError, match="no space left"):
                pool.put("b", xs)
        assert "b" not in pool
        assert all(same(y, coded(x)) for x, y in zip(xs, pool.get("a"), strict=True))
        pool.put("b", xs)
        assert pool.get("a") is not None


def test_numbers_that_are_not_finite_do_not_replace_a_block(way: dict[str, Any]) -> None:
    xs = tensors(way)
    bad = xs[0].clone()
    bad[1, 3, 5] = float("inf")
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", xs[0], wait=True)
        used = pool.usage().used_bytes
        with pytest.raises(NonFiniteInput):
            pool.put("a", bad, wait=True)
        assert same(pool.get("a"), coded(xs[0]))
        assert pool.usage().used_bytes == used


def test_host_memory_that_is_overwritten_is_told(way: dict[str, Any]) -> None:
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", tensors(way), wait=True)
        pool._blocks["a"].hosts[0][-40] ^= 1
        with pytest.raises(CorruptStream):
            pool.get("a")
        assert pool.counters.failed == 1


# -- threads -------------------------------------------------------------------------------------------------------
def test_threads_that_want_the_same_block_from_disk_share_its_memory(tmp_path: Path) -> None:
    """In a pool with room for one, the second does not wait for memory that only it keeps from being given back."""
    way = {"device": DEVICE, "backend": "auto"}
    xs = tensors(way)
    with HostPool(block_bytes(way), spill=tmp_path, **way) as pool, ThreadPoolExecutor(3) as threads:
        pool.put("a", xs, wait=True)
        pool.put("b", xs, wait=True)
        held = pool._use("b")
        assert held is not None
        waiting = [threads.submit(pool.get, "a") for _ in range(3)]
        while pool._blocks["a"].users < 3:
            time.sleep(0.01)
        time.sleep(0.1)  # until all of them ask for room
        pool._used(held)
        try:
            for found in waiting:
                assert all(same(y, coded(x)) for x, y in zip(xs, found.result(timeout=20), strict=True))
        finally:
            pool._arena = PinnedArena(1 << 20, pinned=DEVICE != "cpu")  # lets go who waits still, if the test fails


@pytest.mark.parametrize("spill", [False, True])
def test_threads_put_get_and_drop_at_once(spill: bool, tmp_path: Path) -> None:
    """What a key gives is always a whole block that was put under it."""
    way = {"device": DEVICE, "backend": "auto"}
    keys, workers, steps = 6, 4, 60
    blocks = {(key, turn): tensors(way, 1, 10 * key + turn)[0] for key in range(keys) for turn in range(2)}
    expected = {place: coded(x) for place, x in blocks.items()}
    room = 3 * block_bytes(way, 1)

    def work(pool: HostPool, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(steps):
            key, dice = rng.randrange(keys), rng.random()
            if dice < 0.4:
                pool.put(key, blocks[key, rng.randrange(2)], wait=rng.random() < 0.5)
            elif dice < 0.8:
                found = pool.get(key)
                assert found is None or any(same(found, expected[key, turn]) for turn in range(2))
            elif dice < 0.9:
                pool.prefetch(key)
            else:
                pool.drop(key)

    with HostPool(room, spill=tmp_path if spill else None, **way) as pool, ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(work, pool, seed) for seed in range(workers)]:
            done.result(timeout=120)
        for key in range(keys):
            pool.drop(key)
        assert pool.usage().used_bytes == 0
        assert pool.usage().blocks == 0
    assert not list(tmp_path.iterdir())
