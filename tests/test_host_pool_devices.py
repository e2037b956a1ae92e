"""A pool of several devices: pieces never mix them, each is coded where it lies, and all of them are waited for.

Here are no two GPUs: tensors say that they lie on "meta:0" or "meta:1", while their numbers are in the CPU's memory. A pipeline
in the place of a GPU's refuses tensors of any other; tests/test_two_gpus.py has the real ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats.offload import HostPool, lanes
from pqcodec.formats.offload.pieces import BlockLayout, kinds_of, layout_of
from pqcodec.formats.offload.pipeline import Arrival, HostPipeline, Transfer
from pqcodec.options import EncodeOptions
from pqcodec.stream.header import DTYPE_NAMES
from tests.conftest import bits, gaussian
from tests.test_host_pool import coded, same

SHAPE = (2, 20, 64)


class On0(torch.Tensor):
    device = torch.device("meta", 0)


class On1(torch.Tensor):
    device = torch.device("meta", 1)


class On2(torch.Tensor):
    device = torch.device("meta", 2)


KINDS = {kind.device: kind for kind in (On0, On1, On2)}


def on(place: int, x: torch.Tensor) -> torch.Tensor:
    """The same memory, said to lie elsewhere."""
    return x.as_subclass(KINDS[torch.device("meta", place)])


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(torch.Tensor)


class FakeEvent:
    """Happens when a test says so."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True


class FakePipeline(HostPipeline):
    """Of one device's tensors; counts what it does, and leaves an event behind each piece."""

    events = False

    def __init__(self, device: Any, backend: str) -> None:
        super().__init__("cpu")
        self.device, self.did = device, []

    def _own(self, xs: Sequence[Any]) -> None:
        assert {x.device for x in xs} == {self.device}

    def begin(self, tensors: Sequence[Any], filled: bool) -> None:
        self._own(tensors)
        self.did.append(("begin", len(tensors)))

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        self._own(tensors)
        self.did.append(("end", len(tensors)))

    def encode(self, piece: Any, tensors: Sequence[Any], host: Any, transfer: Transfer) -> None:
        self._own([tensors[stream.tensor] for stream in piece.streams])
        super().encode(piece, [plain(x) for x in tensors], host, transfer)
        self._note("encode", transfer)

    def decode(self, piece: Any, host: Any, outs: Sequence[Any], transfer: Transfer) -> None:
        self._own([outs[stream.tensor] for stream in piece.streams])
        assert host.numel() == piece.nbytes
        staged = isinstance(host, tuple(KINDS.values()))
        assert not staged or host.device == self.device
        super().decode(piece, plain(host), [plain(x) for x in outs], transfer)
        self._note("decode staged" if staged else "decode", transfer)

    def moved(self, host: Any) -> Any:
        self.did.append("moved")
        return plain(host).clone().as_subclass(KINDS[self.device])

    def drain(self) -> None:
        self.did.append("drain")

    def count(self, what: str) -> int:
        return self.did.count(what)

    def _note(self, what: str, transfer: Transfer) -> None:
        self.did.append(what)
        if self.events:
            transfer.arrivals.append(Arrival(FakeEvent()))
            transfer.coded[self.device] = transfer.arrivals[-1].event


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_tensors(layout: BlockLayout, devices: Sequence[Any]) -> list[torch.Tensor]:
        told = zip(layout.shapes, layout.dtypes, devices, strict=True)
        return [torch.empty(n, dtype=getattr(torch, DTYPE_NAMES[d])).as_subclass(KINDS[where]) for n, d, where in told]

    class Kernel:
        name = "triton"

        def check_device(self, device: Any) -> None: ...

    monkeypatch.setattr(BlockLayout, "new_tensors", new_tensors)
    monkeypatch.setattr(lanes, "DevicePipeline", FakePipeline)
    monkeypatch.setattr(lanes, "backend_of", lambda name, kind: Kernel())
    monkeypatch.setattr(lanes, "device_named", torch.device)


def pool_of(*places: int, capacity: int = 1 << 20, **options: Any) -> HostPool:
    return HostPool(capacity, device=[f"meta:{place}" for place in places or (0, 1)], **options)


def tensors(*places: int, seed: int = 0) -> list[torch.Tensor]:
    return [on(place, gaussian(*SHAPE, seed=seed + i, dtype=torch.float16)) for i, place in enumerate(places)]


def check(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor]) -> None:
    """That is what the codec makes of xs."""
    assert all(same(plain(y), coded(plain(x))) for x, y in zip(xs, ys, strict=True))


def did(pool: HostPool, what: str) -> list[int]:
    """How often each device did something."""
    return [lane.count(what) for lane in pool._lanes._made.values()]


# -- pieces --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("places", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
def test_pieces_hold_every_tensor_once_and_of_one_device(places: tuple[int, ...], pieces: int) -> None:
    xs = tensors(*places)
    layout = layout_of(kinds_of(xs), [EncodeOptions()] * len(xs), pieces * xs[0].nbytes)
    assert sorted(stream.tensor for piece in layout.pieces for stream in piece.streams) == [0, 1, 2, 3]
    for piece in layout.pieces:
        assert len({places[stream.tensor] for stream in piece.streams}) == 1
    for place in set(places):
        counts = [len(piece.streams) for piece in layout.pieces if places[piece.streams[0].tensor] == place]
        assert max(counts) <= pieces
        assert max(counts[0], counts[-1]) <= max(pieces // 2, 1)  # the ends are halves


@pytest.mark.parametrize("count", range(1, 40))
def test_a_block_begins_and_ends_with_half_a_piece_and_has_whole_ones_between(count: int) -> None:
    xs = [torch.empty(2, 4, 64, dtype=torch.float16)] * count
    for most in (1, 2, 4, 8):
        *first, last = [len(piece.streams) for piece in layout_of(kinds_of(xs), [EncodeOptions()], most * xs[0].nbytes).pieces]
        half = max(most // 2, 1)
        assert sum(first) + last == count
        assert first[:1] in ([], [half])
        assert last <= half
        assert all(size == most for size in first[1:-1])  # the rest is in the one before the last
        assert all(half <= size <= most for size in first[1:])


def test_a_part_of_a_piece_lies_where_it_did() -> None:
    """``split`` moves places by where the part begins, and takes all that lies between."""
    xs = tensors(0, 0, 0, 0, 0)
    (piece,) = layout_of(kinds_of(xs), [EncodeOptions()] * 5, 1 << 20).pieces
    for places in itertools.product("ab", repeat=5):
        found = piece.split(places)
        assert {place for place, _, _ in found} == set(places)
        assert len(found) > 1 or found[0][1] is piece
        parts = {stream.tensor: (place, stream.offset + start) for place, own, start in found for stream in own.streams}
        assert parts == {stream.tensor: (places[stream.tensor], stream.offset) for stream in piece.streams}
        for _, own, start in found:
            assert start % 16 == 0
            assert start + own.nbytes <= piece.nbytes
            assert own.streams[-1].offset + own.streams[-1].header.stream_bytes <= own.nbytes


# -- in and out ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("places", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("pieces", [1, 2, 9])
def test_a_block_comes_back_to_the_devices_that_it_came_from(places: tuple[int, ...], pieces: int) -> None:
    xs = tensors(*places)
    with pool_of(piece_bytes=pieces * xs[0].nbytes) as pool:
        pool.put("a", xs, wait=True)
        for _ in range(2):
            found = pool.get("a")
            assert [x.device for x in found] == [x.device for x in xs]
            check(xs, found)
            assert pool.prefetch("a")
        assert set(pool._lanes._made) == {x.device for x in xs}
        one = tensors(1)[0]
        pool.put("one", one)
        assert pool.get("one").device == one.device


@pytest.mark.parametrize("outs", list(itertools.product((0, 1), repeat=4)))
@pytest.mark.parametrize("prefetched", [False, True])
def test_outs_may_lie_on_any_device(outs: tuple[int, ...], prefetched: bool) -> None:
    """Also those of one piece on several; what was staged is read on its own device alone."""
    xs = tensors(0, 0, 0, 1)
    with pool_of() as pool:
        pool.put("a", xs)
        if prefetched:
            assert pool.prefetch("a")
            assert pool.prefetch("a")  # is there already
            assert did(pool, "moved") == [1, 1]
        given = [on(place, torch.full(SHAPE, float("nan"), dtype=torch.float16)) for place in outs]
        found = pool.get("a", out=given)
        assert all(x is y for x, y in zip(found, given, strict=True))
        check(xs, found)
        if prefetched:
            assert did(pool, "decode staged") == [int(0 in outs[:3]), int(outs[3] == 1)]
            check(xs, pool.get("a"))
            assert sum(did(pool, "decode staged")) <= 2  # the copies were used up


def test_blocks_are_spilled_and_read_again(tmp_path: Path) -> None:
    blocks = {key: tensors(0, 1, seed=seed) for seed, key in enumerate("abcd")}
    with pool_of() as pool:
        pool.put("a", blocks["a"], wait=True)
        room = 2 * pool.usage().used_bytes
    with pool_of(capacity=room, spill=tmp_path) as pool:
        for key, xs in blocks.items():
            pool.put(key, xs)
        for key, xs in 2 * [*blocks.items()]:
            assert key != "b" or pool.prefetch(key)
            outs = [on(place, torch.empty(SHAPE, dtype=torch.float16)) for place in (1, 0)]
            check(xs, pool.get(key, out=outs if key in "ab" else None))
        assert pool.counters.spilled >= 2
        assert pool.counters.reloaded >= 4
    assert not list(tmp_path.iterdir())


# -- what is refused -----------------------------------------------------------------------------------------------
def test_tensors_of_other_devices_are_refused() -> None:
    with pool_of() as pool:
        xs = tensors(0, 2)
        with pytest.raises(InvalidArgument, match="tensor 1 lies on meta:2, this pool's are on meta:0, meta:1; move it there"):
            pool.put("a", xs)
        pool.put("a", tensors(0, 1))
        with pytest.raises(InvalidArgument, match="tensor 1 lies on meta:2"):
            pool.get("a", out=xs)
        with pytest.raises(InvalidArgument, match="tensor 0 lies on cpu"):
            pool.put("b", gaussian(*SHAPE))
        assert len(pool) == 1


def test_which_devices_a_pool_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool_of(1, 0, 1) as pool:
        assert pool.devices == (torch.device("meta:1"), torch.device("meta:0"))
        assert pool.device == torch.device("meta:1")
        assert not pool._lanes._made  # until a tensor comes
    for wrong, words in ((["cpu", "meta:0"], "cpu, meta:0 are of several kinds.*a pool for each"), ([], "an empty list")):
        with pytest.raises(InvalidArgument, match=f"device: {words}"):
            HostPool(1 << 20, device=wrong)
    assert lanes.devices_of("meta:1") == (torch.device("meta:1"),)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lanes.devices_of(None) == (torch.device("cpu"),)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(lanes, "device_named", lambda device: torch.device("cuda", 1))  # the current one
    assert lanes.devices_of(None) == tuple(torch.device("cuda", n) for n in (1, 0, 2))


def test_every_named_device_is_looked_at_first_and_of_none_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    monkeypatch.setattr(lanes, "_kernel", lambda backend, device: looked.append(device))
    monkeypatch.setattr(lanes, "devices_of", lambda device: (torch.device("meta:1"), torch.device("meta:0")))
    lanes.Lanes(["meta:1", "meta:0"], "auto")
    lanes.Lanes(None, "auto")
    assert [device.index for device in looked] == [1, 0, 1]


# -- who waits for whom --------------------------------------------------------------------------------------------
def test_all_devices_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self) -> None:
            self.waits: list[Any] = []

        def wait_event(self, event: Any) -> None:
            self.waits.append(event)

    xs, stream = tensors(0, 0, 1), Stream()
    with pool_of(piece_bytes=xs[0].nbytes) as pool:
        monkeypatch.setattr(FakePipeline, "events", True)
        put = pool.put("a", xs)
        events = [arrival.event for arrival in put._transfer.arrivals]
        assert len(events) == 3
        put.read(stream)
        assert stream.waits == [events[1], events[2]]  # the last of each device
        events[0].happened = events[1].happened = True
        assert not put.done()
        events[2].happened = True
        assert put.done()
        found = pool.fetch("a")
        assert found is not None
        reads = [arrival.event for arrival in found._transfer.arrivals]
        reads[0].happened = reads[1].happened = True  # of the first device
        assert not found.done()
        pool.drop("a")
        assert pool.usage().used_bytes > 0  # the second device may still be reading
        check(xs, found.wait())
        assert pool.usage().used_bytes == 0
        begun = [[what for what in lane.did if what[0] in ("begin", "end")] for lane in pool._lanes._made.values()]
        assert begun == [[("begin", 2), ("end", 2)] * 2, [("begin", 1), ("end", 1)] * 2]


def test_a_put_that_fails_on_the_second_device_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tensors(0, 1), tensors(0, 1, seed=5)
    with pool_of() as pool:
        pool.put("a", first, wait=True)
        used = pool.usage().used_bytes

        def failing(*_: Any) -> None:
            raise OSError("the copy failed")

        with monkeypatch.context() as patch:
            patch.setattr(pool._lanes._made[On1.device], "encode", failing)
            with pytest.raises(OSError, match="the copy failed"):
                pool.put("a", second)
        assert did(pool, "drain") == [1, 1]  # the first device was at it already
        assert pool.usage().used_bytes == used
        check(first, pool.get("a"))
        bad = [x.clone() for x in second]
        plain(bad[1])[0, 3, 5] = float("nan")
        with pytest.raises(NonFiniteInput):
            pool.put("a", bad, wait=True)
        check(first, pool.get("a"))


def test_threads_put_and_get_on_both_devices(tmp_path: Path) -> None:
    places = [(0, 1), (1, 0), (0, 0), (1, 1)]
    blocks = {(key, turn): tensors(*places[key], seed=10 * key + turn) for key in range(4) for turn in range(2)}
    expected = {at: [bits(coded(plain(x))) for x in xs] for at, xs in blocks.items()}

    def work(pool: HostPool, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            key, dice = rng.randrange(4), rng.random()
            if dice < 0.4:
                pool.put(key, blocks[key, rng.randrange(2)], wait=rng.random() < 0.5)
            elif dice < 0.8:
                places = [rng.randrange(2) for _ in range(2)]
                outs = [on(place, torch.empty(SHAPE, dtype=torch.float16)) for place in places]
                found = pool.get(key, out=outs if rng.random() < 0.5 else None)
                told = [[bits(plain(x)) for x in found]] * 2 if found is not None else []
                assert not told or any(
                    all((x == y).all() for x, y in zip(told[turn], expected[key, turn], strict=True)) for turn in range(2)
                )
            else:
                pool.prefetch(key)

    with pool_of() as pool:
        pool.put(0, blocks[0, 0], wait=True)
        room = 2 * pool.usage().used_bytes
    with pool_of(capacity=room, spill=tmp_path) as pool, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, pool, seed) for seed in range(4)]:
            done.result(timeout=120)
