"""A pool that is given what few callers give it, or is looked at in an unlucky moment: nothing is wrong, and nothing lost."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats.offload import HostPool, host_pool, pieces, pipeline
from pqcodec.formats.offload.graphs import copy_on
from pqcodec.formats.offload.handles import Put
from pqcodec.formats.offload.lanes import Lanes
from tests.conftest import DEVICE, GPU, gaussian
from tests.test_host_pool import SHAPE, block_bytes, coded, same, tensors, way

__all__ = ["way"]  # the fixture


# -- what few callers give -----------------------------------------------------------------------------------------
def test_empty_tensors_come_back_also_as_a_piece_of_their_own(way: dict[str, Any]) -> None:
    empty = [torch.empty(shape, device=way["device"]) for shape in ((0, 4, 64), (2, 0, 64), (0, 64))]
    xs = [empty[0], *tensors(way), *empty]
    with HostPool(1 << 20, piece_bytes=1, **way) as pool:
        for given in (xs, empty, empty[:1]):
            pool.put("a", given)
            strides = [x.stride() if x.numel() else [0] * x.ndim for x in given]
            outs = [x.new_empty(0).new_empty_strided(x.shape, how) for x, how in zip(given, strides, strict=True)]
            for found in (pool.get("a"), pool.get("a", out=outs)):
                assert all(x.shape == y.shape and same(y, coded(x)) for x, y in zip(given, found, strict=True))


@pytest.mark.parametrize("inside", ["pool", "put", "get"])
def test_what_was_prepared_in_inference_mode_is_used_outside_of_it(way: dict[str, Any], inside: str) -> None:
    xs = tensors(way)
    with torch.inference_mode(inside == "pool"):
        pool = HostPool(1 << 20, **way)
    with pool:
        for number, x in enumerate(xs):
            with torch.inference_mode(inside == "put" and number == 0):
                pool.put("a", x)
            with torch.inference_mode(inside == "get" and number == 0):
                found = pool.get("a")
            assert same(found, coded(x))


def test_the_default_device_changes_nothing(way: dict[str, Any]) -> None:
    xs = tensors(way)
    expected = [coded(x) for x in xs]
    with torch.device(DEVICE if GPU else "meta"), HostPool(1 << 20, **way) as pool:
        found = [(pool.put("a", x), pool.get("a"))[1] for x in xs]
    assert all(same(y, e) for y, e in zip(found, expected, strict=True))


def test_views_of_the_other_sign_are_coded_on_the_cpu_and_refused_elsewhere(way: dict[str, Any]) -> None:
    x, out = gaussian(*SHAPE).to(way["device"]), torch.zeros(SHAPE, device=way["device"])
    turned = torch._neg_view(x)
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", x)  # of the same strides
        assert same(pool.get("a", out=out), coded(x))
        if way["device"] == way["backend"] == "cpu":
            assert same(pool.get("a", out=torch._neg_view(out)).resolve_neg(), coded(x))
            pool.put("a", turned)
            assert same(pool.get("a"), coded(turned.resolve_neg()))
        else:
            with pytest.raises(InvalidArgument, match="resolve_neg"):
                pool.put("a", turned)
            with pytest.raises(InvalidArgument, match="out 0"):
                pool.get("a", out=torch._neg_view(out))
            assert same(pool.get("a", out=out), coded(x))


def test_tensors_without_strides_are_refused(way: dict[str, Any]) -> None:
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", gaussian(20, 64).to(way["device"]))
        with pytest.raises(InvalidArgument, match="without sizes or strides"):
            pool.get("a", out=gaussian(20, 64).to(way["device"]).to_sparse_csr())


# -- unlucky moments -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("waits", [(0, 1), (1, 0), (0,), ()])
def test_of_several_puts_that_are_not_sound_the_last_sound_block_stays(way: dict[str, Any], waits: tuple[int, ...]) -> None:
    """Whichever of them is looked at first."""
    xs = tensors(way)
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", xs[0], wait=True)
        puts = []
        for bad in tensors(way, 2, 5):
            bad[1, 3, 5] = float("nan")
            with suppress(NonFiniteInput):  # which tensors of the CPU raise at once
                puts.append(pool.put("a", bad))
        for number in waits[: len(puts)]:
            with pytest.raises(NonFiniteInput):
                puts[number].wait()
        assert same(pool.get("a"), coded(xs[0]))
        assert pool.counters.failed == 2
        pool.drop("a")
        assert pool.usage().used_bytes == 0


def test_a_put_is_told_what_became_of_it_though_another_thread_saw_it_first(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(block: Any, *rest: Any) -> Put:
        pool._settle(block)  # what a get does, in the moment between the block's entry and its handle
        return Put(block, *rest)

    monkeypatch.setattr(host_pool, "Put", late)
    with HostPool(1 << 20, **way) as pool:
        bad = tensors(way)
        bad[0][0, 0, 0] = float("nan")
        with pytest.raises(NonFiniteInput):
            pool.put("a", bad, wait=True)


def test_a_key_that_cannot_be_looked_up_takes_no_memory(way: dict[str, Any]) -> None:
    with HostPool(1 << 20, **way) as pool:
        with pytest.raises(TypeError, match="unhashable"):
            pool.put(["a"], tensors(way))
        assert pool.usage().used_bytes == 0


def test_addresses_that_were_copied_in_part_are_copied_again(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if way["device"] == way["backend"] == "cpu":
        pytest.skip("tensors of the CPU have no addresses on a device")
    first, second = ([x, gaussian(*SHAPE).to(way["device"])] for x in tensors(way))  # of two dtypes: two groups of one piece
    left = iter(range(1))

    def failing(stream: Any, target: Any, source: Any) -> None:
        if target.dtype == torch.int64 and next(left, None) is None:
            raise MemoryError("no room for the copy")
        copy_on(stream, target, source)

    with HostPool(1 << 20, **way) as pool:
        pool.put("a", first, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "copy_on", failing)
            with pytest.raises(MemoryError):
                pool.put("a", second)
        pool.put("a", first)
        assert all(same(y, coded(x)) for x, y in zip(first, pool.get("a"), strict=True))


def test_a_pool_that_is_dropped_waits_for_its_transfers_before_its_memory_goes(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, seen = HostPool(1 << 20, **way), []
    pool.put("a", tensors(way))
    arena, drain = weakref.ref(pool._arena), Lanes.drain

    def draining(lanes: Lanes) -> None:
        seen.append(arena() is not None)
        drain(lanes)

    monkeypatch.setattr(Lanes, "drain", draining)
    gc.disable()  # pipelines and batches refer to themselves
    try:
        del pool
        assert seen == [True]
        assert arena() is None
    finally:
        gc.enable()


def test_closing_waits_for_calls_that_use_a_replaced_block(way: dict[str, Any], tmp_path: Path) -> None:
    """Its file goes with the others."""
    xs = tensors(way)
    with ThreadPoolExecutor(1) as threads:
        pool = HostPool(block_bytes(way, 1), spill=tmp_path, **way)
        pool.put("a", xs[0], wait=True)
        pool.put("b", xs[0], wait=True)
        held = pool._use("a")  # as a call of another thread does
        assert held is not None
        assert held.path is not None
        pool.put("a", xs[1], wait=True)
        closing = threads.submit(pool.close)
        with pytest.raises(TimeoutError):
            closing.result(timeout=0.3)
        pool._used(held)
        closing.result(timeout=20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [False, True])
def test_closing_waits_for_puts_that_have_begun(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Such a put is refused, unless the block is kept before the pool closes; either way no memory stays."""
    began, go_on, encode = Event(), Event(), Lanes.encode
    coded(tensors(way)[0])  # kernels are compiled, which may take longer than anything below waits

    def slow(*given: Any) -> None:
        encode(*given)
        began.set()
        assert go_on.wait(20)

    monkeypatch.setattr(Lanes, "encode", slow)
    pool = HostPool(1 << 20, **way)
    if kept:
        go_on.set()
    with ThreadPoolExecutor(2) as threads:
        putting = threads.submit(pool.put, "a", tensors(way))
        assert began.wait(20)
        if kept:
            putting.result(timeout=20)
        closing = threads.submit(pool.close)
        if not kept:
            with pytest.raises(TimeoutError):
                closing.result(timeout=0.3)
            go_on.set()
            with pytest.raises(InvalidArgument, match="closed"):
                putting.result(timeout=20)
        closing.result(timeout=20)
    assert pool._arena.used_bytes == 0


def test_a_pool_may_be_closed_by_what_it_calls(way: dict[str, Any]) -> None:
    """The put that called it is refused."""
    xs, closed = tensors(way), []
    with HostPool(block_bytes(way, 1), on_displaced=lambda *_: closed.append(pool.close()), **way) as pool:
        pool.put("a", xs[0], wait=True)
        with pytest.raises(InvalidArgument, match="closed"):
            pool.put("b", xs[1], wait=True)
        assert closed == [None]
    assert pool._arena.used_bytes == 0


def test_a_spilled_file_that_cannot_be_deleted_is_told_of_once(
    way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = tensors(way)
    with HostPool(block_bytes(way, 1), spill=tmp_path, **way) as pool:
        pool.put("a", xs[0], wait=True)
        pool.put("b", xs[1], wait=True)

        def refuse(path: Path, missing_ok: bool = False) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.warns(RuntimeWarning, match=r"cannot be deleted \(Permission denied\); delete it"):
            assert pool.drop("a")
        monkeypatch.undo()
        pool.put("c", xs[0], wait=True)
        assert same(pool.get("c"), coded(xs[0]))
        assert same(pool.get("b"), coded(xs[1]))
        (left,) = (path for path in tmp_path.iterdir() if path not in {block.path for block in pool._blocks.values()})
    assert list(tmp_path.iterdir()) == [left]


# -- a long life ---------------------------------------------------------------------------------------------------
def test_no_list_grows_with_the_kinds_of_tensors_that_were_seen(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "KNOWN", 4)
    x = tensors(way)[0]
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", x, wait=True)
        layout = pool._blocks["a"].layout
        for apart in range(1, 12):
            wide = torch.empty((*x.shape[:-1], 64 * (apart + 1)), dtype=x.dtype, device=x.device)
            out = wide[..., : x.shape[-1]]
            pool.get("a", out=out)
            assert same(out, coded(x))
            assert len(layout._filled) <= 4


def test_what_was_prepared_for_rare_kinds_is_freed_without_the_garbage_collector(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "KINDS", 2)
    made: list[weakref.ref[Any]] = []
    keep = pipeline._Prepared._keep

    def kept(batch: Any, memory: Any, *given: Any) -> None:
        keep(batch, memory, *given)
        made.append(weakref.ref(memory))

    monkeypatch.setattr(pipeline._Prepared, "_keep", kept)
    gc.disable()
    try:
        with HostPool(1 << 22, **way) as pool:
            for tokens in range(1, 5):
                x = gaussian(1, 4 * tokens, 16).to(way["device"])
                pool.put(tokens, x, wait=True)
                assert same(pool.get(tokens), coded(x))
            assert sum(memory() is not None for memory in made) <= 2 * 2
        assert not any(memory() is not None for memory in made)
    finally:
        gc.enable()
