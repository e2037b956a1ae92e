"""LMCache's own adapters for a folder, Redis and S3 behind the plug-in: bytes on the wire, faults on the way and at rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lmcache.v1.distributed.serde")
from lmcache_processes import CODEC, COUNT, SERDE, SHAPE, manager, plug_in
from places import PLACES, Place, RedisPlace, place

ALL = list(range(COUNT))
SIZE = CODEC.size(SHAPE, "bfloat16")
ERROR = 0.01  # relMSE of a chunk that is the right one; another chunk's is 2


@pytest.fixture(params=PLACES)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place where a process of LMCache's has stored all objects."""
    with place(request.param, tmp_path) as made:
        assert manager("store", plug_in(made.params, SERDE), COUNT)["stored"]
        yield made


def load(made: Place) -> list[int]:
    """Which objects another process finds; each is the one that was asked for."""
    found = manager("load", plug_in(made.params, SERDE))
    assert all(error < ERROR for error in found["errors"]), found
    return found["found"]


def received(made: Place) -> int:
    return sum(exchange.received for exchange in made.proxy.exchanges) if made.proxy else 0


def test_what_one_process_stored_another_finds_and_nothing_more_goes_over_the_wire(stored: Place) -> None:
    assert [len(stored.read(name)) for name in stored.names()] == COUNT * [SIZE]
    before = received(stored)
    assert load(stored) == ALL
    if stored.proxy:
        assert COUNT * SIZE <= received(stored) - before < 1.05 * COUNT * SIZE


def test_damage_at_rest_is_a_miss_until_it_is_stored_anew(stored: Place) -> None:
    names = stored.names()
    good = stored.read(names[2])
    flipped = bytearray(good)
    flipped[SIZE // 3] ^= 16
    faults = [bytes(flipped), good[: SIZE // 2].ljust(SIZE, b"\0"), stored.read(names[1])]
    if not isinstance(stored, RedisPlace):  # LMCache waits for the rest of a short value, and Redis never tears one
        faults += [good[: SIZE // 2], b""]
    for bad in faults:
        stored.write(names[2], bad)
        assert load(stored) in ([], ALL[:2])
        if names[2] in stored.names():  # the adapter itself refused it, by its size
            assert load(stored) in ([], ALL[:2])
            stored.write(names[2], good)
        else:
            assert manager("store", plug_in(stored.params, SERDE), 1)["stored"]
        assert stored.read(names[2]) == good
    assert load(stored) == ALL


def test_connections_that_break_are_misses_and_lose_nothing(stored: Place) -> None:
    if not stored.proxy:
        pytest.skip("a folder has no connections")
    for reset in (True, False):
        stored.proxy.cut(100, after=SIZE // 2, reset=reset)
        assert set(load(stored)) <= set(ALL)
        stored.proxy.mend()
    assert load(stored) == ALL


def test_a_killed_server_loses_nothing_that_was_stored(stored: Place) -> None:
    if not isinstance(stored, RedisPlace):
        pytest.skip("only Redis is a process of its own here")
    stored.server.kill_and_start()
    assert load(stored) == ALL
