"""A GPU's pipeline on streams that do one thing at a time, in any order that its events allow: a race would show in the bits.

``Streams`` stands for CUDA: copies and kernels wait in queues, and a random queue goes on whenever the host does something.
Kernels are the CPU's codec, at the addresses that the batch's tables hold at that moment. Freed host memory is overwritten.
"""

from __future__ import annotations

import ctypes
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import RLock, local
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.errors import NonFiniteInput
from pqcodec.formats.offload import HostPool, PinnedArena, lanes, pipeline
from tests.conftest import GPU, HAS_TRITON, bits, gaussian
from tests.test_host_pool import coded, same

pytestmark = pytest.mark.skipif(GPU or not HAS_TRITON, reason="batches of the CPU's tensors need triton, and no GPU")
CPU = torch.device("cpu")
KINDS = [
    [((2, 4, 64), torch.float16)] * 3,
    [((2, 4, 64), torch.float16), ((1, 6, 64), torch.float32)],
    [((1, 4, 64), torch.bfloat16)] * 5,
    [((0, 4, 64), torch.float16), ((3, 3, 64), torch.float16)],
]
OPTIONS: list[dict[str, Any]] = [{}, {"preset": "pq4", "exact_tokens": 1}, {"center": "mean"}]
CODING = ("preset", "center", "rope", "exact_tokens")


# -- a device ------------------------------------------------------------------------------------------------------
class Streams:
    """Queues of work, of which a random one that need not wait goes on; ``faults``: what shall not happen."""

    def __init__(self, seed: int) -> None:
        self.rng, self.lock, self.all, self.faults = random.Random(seed), RLock(), [], []
        self.of_thread = local()
        self.copies_left = -1  # until one fails; negative: none does

    def step(self) -> bool:
        """Do the next thing of a random stream; False if none has any."""
        with self.lock:
            ready = [stream for stream in self.all if stream.work and stream.work[0][0][0]]
            if ready:
                (_, do) = self.rng.choice(ready).work.popleft()
                do()
            return bool(ready)

    def some(self, most: int = 6) -> None:
        for _ in range(self.rng.randrange(most)):
            self.step()

    def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self.step() or happened(), "streams wait for each other"

    def stream(self) -> Stream:
        self.all.append(Stream(self))
        return self.all[-1]

    def current(self, _device: Any = None) -> Stream:
        if not hasattr(self.of_thread, "stream"):
            self.of_thread.stream = self.stream()
        return self.of_thread.stream

    def copy_on(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.nbytes == source.nbytes
        with self.lock:
            self.copies_left -= 1
            if self.copies_left == 0:
                raise OSError("the copy failed")
        addresses, flags = target.dtype == torch.int64, target.dtype == torch.int32
        source = source.clone() if addresses else source.detach()  # CUDA buffers small pageable memory at once
        kept, alive = target.detach(), weakref.ref(target)

        def copy() -> None:
            if flags and alive() is None:
                self.faults.append("flags are freed before they are there")
            kept.copy_(source)

        stream.queue(copy)


class Stream:
    def __init__(self, streams: Streams) -> None:
        self.streams, self.work = streams, deque[tuple[list[bool], Callable[[], Any]]]()

    def queue(self, do: Callable[[], Any], when: list[bool] | None = None) -> None:
        """Do something once ``when`` holds True."""
        with self.streams.lock:
            self.work.append((when or [True], do))

    def record_event(self) -> Event:
        event = Event(self.streams)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def synchronize(self) -> None:
        self.streams.until(lambda: not self.work)


class Event:
    """``_mark``: holds True once the work before the last ``record`` is done."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self._mark = streams, [True]

    def record(self, stream: Stream) -> None:
        self._mark = mark = [False]
        stream.queue(lambda: mark.__setitem__(0, True))

    def wait(self, stream: Stream) -> None:
        stream.queue(lambda: None, self._mark)

    def synchronize(self) -> None:
        mark = self._mark
        self._streams.until(lambda: mark[0])

    def query(self) -> bool:
        self._streams.some(2)
        return self._mark[0]


class QueuedPipeline(pipeline.DevicePipeline):
    """``DevicePipeline`` of a GPU whose memory is the CPU's."""

    streams: Streams

    def __init__(self, device: Any, backend: str) -> None:
        super().__init__(device, backend)
        self._streams = {name: self.streams.stream() for name in self._streams}
        self._device = type("Device", (), {"type": "cuda", "index": 0})()

    def _made(self, kind: Any, backend: str, first: str, runs: str, piece: Any, views: Any) -> Any:
        batch = kind(piece, views, CPU, backend, None)
        places = [(x.dtype, x.stride(-2) * x.itemsize, x.shape) for x in views]
        run = encode if kind is pipeline._Encoder else decode
        batch.code = lambda: self._streams[runs].queue(lambda: run(batch, piece, places))
        return batch

    def moved(self, host: Any) -> Any:
        copy = torch.empty_like(host)
        self._streams["arrive"].queue(lambda: copy.copy_(host))
        return copy


def rows_of(batch: Any, number: int, place: tuple[Any, int, Any]) -> Iterator[np.ndarray]:
    """The rows of each leading index of a tensor, where the batch's tables say that they are."""
    dtype, stride, (*_, tokens, width) = place
    for starts in batch._starts:
        for at in np.flatnonzero(starts._numbers == number):
            memory = (ctypes.c_char * ((tokens - 1) * stride + width * dtype.itemsize)).from_address(
                int(starts._group.starts[at])
            )
            kind = np.dtype(f"i{dtype.itemsize}")
            yield np.ndarray((tokens, width), kind, memory, 0, (stride, dtype.itemsize))


def encode(batch: Any, piece: Any, places: Any) -> None:
    for group in batch.groups:
        group.block_flags.zero_()
    for number, (told, place) in enumerate(zip(piece.streams, places, strict=True)):
        rows = list(rows_of(batch, number, place)) or [np.zeros(place[2], f"i{place[0].itemsize}")]
        x = torch.from_numpy(np.concatenate(rows)).view(place[0]).view(place[2])
        try:
            stream = pqcodec.encode(x, **{name: getattr(told.options, name) for name in CODING})
        except NonFiniteInput:
            batch.groups[0].block_flags.fill_(1)
        else:
            batch.memory[told.offset :][: len(stream)] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def decode(batch: Any, piece: Any, places: Any) -> None:
    for flags in batch.flags():
        flags.zero_()
    for number, (told, place) in enumerate(zip(piece.streams, places, strict=True)):
        try:
            x = pqcodec.decode(batch.memory[told.offset :][: told.header.stream_bytes].numpy().tobytes())
        except ValueError:  # no stream, or a damaged one
            batch.groups[0].block_flags.fill_(1)
            continue
        numbers = bits(x).reshape(-1, *place[2][-2:])
        for lead, rows in enumerate(rows_of(batch, number, place)):
            rows[...] = numbers[lead]


@pytest.fixture
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Streams:
    found = Streams(request.param)
    take_back = PinnedArena._take_back

    def overwritten(arena: PinnedArena, start: int, size: int) -> None:
        arena.tensor[start : start + size] = 0xA5
        take_back(arena, start, size)

    monkeypatch.setattr(QueuedPipeline, "streams", found, raising=False)
    monkeypatch.setattr(lanes, "DevicePipeline", QueuedPipeline)
    monkeypatch.setattr(pipeline, "copy_on", found.copy_on)
    monkeypatch.setattr(pipeline, "event", lambda device: Event(found))
    monkeypatch.setattr(pipeline, "current", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", found.current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: stream.queue(lambda: x))
    monkeypatch.setattr(PinnedArena, "_take_back", overwritten)
    return found


# -- a caller ------------------------------------------------------------------------------------------------------
def made(how: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers that lie one behind the other, across, apart, or at an odd place."""
    leads, tokens, width = shape
    if how == "across":
        return gaussian(tokens, leads, width, seed=seed, dtype=dtype).transpose(0, 1)
    if how == "apart":
        return gaussian(leads, tokens + 3, width + 8, seed=seed, dtype=dtype)[:, 2 : tokens + 2, :width]
    return gaussian(leads * tokens * width + 1, seed=seed, dtype=dtype)[int(how == "odd") :][: leads * tokens * width].view(
        shape
    )


class Caller:
    """One thread with keys of its own, which does anything that a caller may do, and knows what it must find."""

    def __init__(self, pool: HostPool, streams: Streams, keys: range) -> None:
        self.pool, self.streams, self.keys, self.rng = pool, streams, keys, random.Random(keys.start)
        self.sound: dict[int, list[torch.Tensor]] = {}
        self.waiting: list[Callable[[], None]] = []

    def work(self, steps: int) -> None:
        ways = [self.put] * 4 + [self.fetch] * 3 + [self.other] * 2
        for _ in range(steps):
            self.streams.some()
            self.rng.choice(ways)(self.rng.choice(self.keys))
        for waiting in self.waiting:
            waiting()
        for key in self.keys:
            self.pool.drop(key)

    def _how(self) -> str:
        return self.rng.choice(["", "", "", "across", "apart", "odd"])

    def put(self, key: int) -> None:
        """Tensors that the caller's stream is yet to fill, and may overwrite as soon as they are read."""
        stream, options, bad = self.streams.current(), self.rng.choice(OPTIONS[:1] * 3 + OPTIONS), self.rng.random() < 0.25
        seed = self.rng.randrange(100)
        how, kinds = self._how(), self.rng.choice(KINDS)
        xs = [made(how, *kind, seed + i) for i, kind in enumerate(kinds)]
        expected = [coded(x, **options) for x in xs]
        if bad:
            xs[-1][-1, -1, -1] = float("nan")
        true = [x.clone() for x in xs]
        for x in xs:
            x.fill_(7)
        stream.queue(lambda: [x.copy_(y) for x, y in zip(xs, true, strict=True)])
        if self.rng.random() < 0.1:
            self.streams.copies_left = self.rng.randrange(9)
        try:
            put = self.pool.put(key, xs, **options)
        except OSError:
            return
        put.read(stream)
        if self.rng.random() < 0.5:  # else the pool must keep them
            stream.queue(lambda: [x.fill_(float("nan")) for x in xs])
        if not bad:
            self.sound[key] = expected

        def wait() -> None:
            with pytest.raises(NonFiniteInput) if bad else nullcontext():
                put.wait()

        if self.rng.random() < 0.7:
            self.later(wait)

    def fetch(self, key: int) -> None:
        """Work that the caller's stream has behind a fetch finds the tensors filled."""
        stream, expected = self.streams.current(), self.sound.get(key)
        outs = None
        if expected is not None and self.rng.random() < 0.6:
            how = self._how()
            outs = [made(how, tuple(x.shape), x.dtype, 3) for x in expected]
            stream.queue(lambda: [x.fill_(5) for x in outs])
        try:
            found = self.pool.fetch(key, outs)
        except OSError:
            return
        assert (found is None) == (expected is None)
        if found is None or expected is None:
            return
        seen: list[list[torch.Tensor]] = []
        stream.queue(lambda: seen.append([x.clone() for x in found.tensors]))

        def wait() -> None:
            for ys in (found.wait(), (self.streams.until(lambda: bool(seen)), seen[0])[1]):
                assert all(same(x, y) for x, y in zip(ys, expected, strict=True))

        if self.rng.random() < 0.8:
            self.later(wait)

    def other(self, key: int) -> None:
        if self.waiting and self.rng.random() < 0.6:
            self.waiting.pop(self.rng.randrange(len(self.waiting)))()
        elif self.rng.random() < 0.5:
            assert self.pool.prefetch(key) == (key in self.sound)
        else:
            self.pool.drop(key)
            self.sound.pop(key, None)

    def later(self, wait: Callable[[], None]) -> None:
        """Wait now or some other time."""
        if self.rng.random() < 0.4:
            wait()
        else:
            self.waiting.append(wait)


@pytest.mark.parametrize("streams", range(12), indirect=True)
def test_whatever_the_streams_do_first_the_bits_are_the_same(streams: Streams, tmp_path: Path) -> None:
    rng = streams.rng
    capacity, piece_bytes = rng.choice([12000, 20000, 1 << 18]), rng.choice([1, 600, 1100, 2200, 1 << 20])
    callers = rng.choice([1, 1, 3])
    pool = HostPool(capacity, device="cpu", backend="triton", spill=tmp_path, piece_bytes=piece_bytes)
    with pool, ThreadPoolExecutor(callers) as threads:
        working = [threads.submit(Caller(pool, streams, range(9 * n, 9 * n + 3)).work, 80) for n in range(callers)]
        for done in working:
            done.result(timeout=120)
        streams.until(lambda: not any(stream.work for stream in streams.all))
        assert pool.usage().used_bytes == 0
    assert not streams.faults
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("streams", range(4), indirect=True)
def test_a_pool_that_is_dropped_in_flight_frees_nothing_that_is_in_use(streams: Streams) -> None:
    pool = HostPool(1 << 18, device="cpu", backend="triton", piece_bytes=600)
    caller = Caller(pool, streams, range(3))
    for _ in range(20):
        caller.put(streams.rng.randrange(3))
        caller.fetch(streams.rng.randrange(3))
    caller.waiting.clear()  # its handles keep the pool
    del caller, pool
    streams.until(lambda: not any(stream.work for stream in streams.all))
    assert not streams.faults
