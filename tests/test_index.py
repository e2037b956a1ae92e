"""The index of a store, in SQLite and in Redis: random sequences of actions against a model in a few lines, and bad rows."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.store import sqlite_index
from pqcodec.formats.store.folder import new_block_file
from pqcodec.formats.store.index import Index, Row
from pqcodec.formats.store.redis_index import RedisIndex, is_address, server_and_store, without_password
from pqcodec.formats.store.sqlite_index import SQLiteIndex
from tests.servers import RedisServer, redis_server

ROOT = bytes(32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here: apt install redis-server")
    with redis_server(str(tmp_path_factory.mktemp("redis"))) as running:
        yield running


@pytest.fixture(params=["sqlite", "redis"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    if request.param == "sqlite":
        made: Index = SQLiteIndex(tmp_path / "index.sqlite")
    else:
        made = RedisIndex(f"{request.getfixturevalue('server').address}?store={tmp_path.name}")
    assert made.new
    yield made
    made.close()
    with pytest.raises(InvalidArgument, match="closed"):
        made.find(ROOT)


def row_of(number: int, parent: Row | None = None, size: int = 100) -> Row:
    name = number.to_bytes(32, "little")
    start = 0 if parent is None else parent.end
    above = ROOT if parent is None else parent.name
    return Row(name, above, ROOT, start, np.arange(256) + number, True, False, new_block_file(name), size)


class Model:
    """What an index should say."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.uses: list[bytes] = []  # least recent first

    def leaves(self) -> list[bytes]:
        parents = {row.parent for row in self.rows.values()}
        return [name for name in self.uses if name not in parents and not self.rows[name].pinned]

    def held(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for row in self.rows.values():
            at: Row | None = row if row.pinned else None
            while at is not None:
                found[at.name] = at.size
                at = self.rows.get(at.parent)
        return found


@pytest.mark.parametrize("seed", range(6))
def test_random_actions_leave_what_a_model_expects(index: Index, seed: int) -> None:
    rng, model = random.Random(seed), Model()
    for number in range(1, 250):
        rows = list(model.rows.values())
        action = rng.choice(["add"] * 4 + ["again", "remove", "remove old", "touch", "pin", "unpin", "evict"])
        if action == "add" or not rows:
            new = row_of(number, rng.choice([*rows, None]), rng.randrange(1000))
            assert index.add(new)
            model.rows[new.name] = new
            model.uses.append(new.name)
            continue
        row = rng.choice(rows)
        if action == "again":
            assert not index.add(replace(row, file=new_block_file(row.name)))
        elif action == "remove old":
            assert not index.remove(replace(row, file=new_block_file(row.name)))
        elif action == "remove":
            assert index.remove(row)
            assert not index.remove(row)
            del model.rows[row.name]
            model.uses.remove(row.name)
        elif action == "touch":
            index.touch([row], gets=1)
            model.rows[row.name] = replace(row, hits=row.hits + 1)
            model.uses.remove(row.name)
            model.uses.append(row.name)
        elif action in ("pin", "unpin"):
            index.pin(row, action == "pin")
            model.rows[row.name] = replace(row, pinned=action == "pin")
        else:
            coldest = index.coldest()
            assert (None if coldest is None else coldest.name) == next(iter(model.leaves()), None)
        assert index.held() == model.held()
    assert index.counters().get("bytes", 0) == sum(row.size for row in model.rows.values())
    found = index.all()
    assert [row.start for row in found] == sorted(row.start for row in found)
    for row in found:
        expected = model.rows[row.name]
        assert (row.file, row.size, row.hits, row.pinned) == (expected.file, expected.size, expected.hits, expected.pinned)
        assert np.array_equal(row.tokens, expected.tokens)
        same = index.find(row.name)
        assert same is not None
        assert same.created == row.created > 0
        assert {child.name for child in index.children(row.name)} == {
            other.name for other in model.rows.values() if other.parent == row.name
        }
    assert len(found) == len(model.rows)


def test_roots_quota_and_place(index: Index) -> None:
    index.add_root(ROOT, "a model", {"codec": {"preset": "pq3"}})
    index.add_root(ROOT, "another", {})
    assert index.roots() == {ROOT: ("a model", {"codec": {"preset": "pq3"}})}
    assert "max_bytes" not in index.counters()
    index.set_limit("max_bytes", 1 << 40)
    assert index.counters()["max_bytes"] == 1 << 40
    index.set_limit("max_bytes", None)
    assert "max_bytes" not in index.counters()
    assert index.data is None
    index.set_data("s3://bucket/é")
    assert index.data == "s3://bucket/é"


def test_of_all_who_want_a_lease_one_has_it_until_it_ends(index: Index) -> None:
    row, another = row_of(3), row_of(4)
    mine = index.lease(row.name, 60)
    assert mine
    assert index.lease(row.name, 60) == ""
    assert index.lease(another.name, 60)
    index.release(row.name, "of another")
    assert index.lease(row.name, 60) == ""
    index.release(row.name, mine)
    assert index.lease(row.name, 60)
    assert index.add(row)
    assert index.lease(row.name, 60) == ""  # it is there
    assert index.remove(row)
    assert index.lease(row.name, 0.02)  # the commit ended the lease before
    time.sleep(0.05)
    assert index.lease(row.name, 60)  # and whoever had the last one died


def test_of_many_threads_one_has_the_lease(index: Index) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(1, 20):
            name = row_of(number).name
            assert sum(map(bool, pool.map(lambda _, name=name: index.lease(name, 60), range(8)))) == 1


# -- SQLite alone ------------------------------------------------------------------------------------------------
def test_an_index_of_version_1_is_completed(tmp_path: Path) -> None:
    path, row = tmp_path / "index.sqlite", row_of(3)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(sqlite_index._SCHEMAS[1] + "INSERT INTO counters VALUES ('bytes', 0); PRAGMA user_version = 1;")
    read = SQLiteIndex(path, denied=OSError(errno.EROFS, "read-only"))
    assert read.all() == []
    read.close()
    index = SQLiteIndex(path)
    assert not index.new
    assert index.lease(row.name, 60)
    assert index.add(row)
    index.close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (sqlite_index.VERSION,)
        db.execute(f"PRAGMA user_version = {sqlite_index.VERSION + 1}")
    with pytest.raises(UnsupportedStream, match="newer"):
        SQLiteIndex(path)


# -- Redis alone -------------------------------------------------------------------------------------------------
def test_addresses() -> None:
    assert is_address("redis://a")
    assert is_address("rediss://a")
    assert is_address("unix:///a")
    assert not is_address("s3://a/redis://b")
    assert server_and_store("redis://u:p@h:1/2?store=a.b-c&protocol=3") == ("redis://u:p@h:1/2?protocol=3", "a.b-c")
    assert without_password("redis://user:secret@host:1/2?store=x") == "redis://user@host:1/2?store=x"
    assert without_password("redis://:secret@host:1/2") == "redis://@host:1/2"
    for bad in ("redis://h?store=", "redis://h?store=a%20b", "redis://h?store=" + 65 * "a"):
        with pytest.raises(InvalidArgument, match="store="):
            server_and_store(bad)


def test_bad_rows_are_dropped_and_bad_indexes_refused(server: RedisServer) -> None:
    address = f"{server.address}?store=bad"
    index = RedisIndex(address)
    row = row_of(7)
    bad = {
        "size": "-3",
        "file": "../../etc/passwd",
        "whole": "yes",
        "tokens": "1234567",
        "used": "nan",
        "start": "1e3",
        "root": "x",
    }
    for field, value in bad.items():
        assert index.add(row)
        index.client.hset(index.key("block", row.name), field, value)
        with pytest.warns(RuntimeWarning, match="no store writes"):
            assert index.find(row.name) is None
        assert index.find(row.name) is None
        assert index.coldest() is None
        assert not index.children(ROOT)
    assert index.add(row)
    index.client.hdel(index.key("block", row.name), "tokens")
    with pytest.warns(RuntimeWarning, match="no tokens"):
        assert index.all() == []
    index.client.set(index.key("counters"), "text")
    with pytest.raises(CorruptStream, match="another type"):
        index.counters()
    index.client.delete(index.key("counters"))
    index.client.hset(index.key("counters"), "bytes", "many")
    with pytest.raises(CorruptStream, match="no numbers"):
        index.counters()
    for text in ("nonsense", "[1, {}]", '["a", []]', "[" * 5000):
        index.client.hset(index.key("roots"), ROOT, text)
        with pytest.raises(CorruptStream, match="no label"):
            index.roots()
    index.client.set(index.key("version"), "2")
    with pytest.raises(UnsupportedStream, match="newer"):
        RedisIndex(address)


def add_many(index: Index) -> None:
    for number in range(2, 4000):
        index.add(row_of(number))


def test_a_server_that_is_gone_is_an_error_and_one_that_returns_has_all(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here: apt install redis-server")
    with redis_server(str(tmp_path)) as server:
        index, row = RedisIndex(server.address), row_of(1)
        assert index.add(row)
        server.stop(signal.SIGKILL)
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            index.find(row.name)
        index.touch([row])  # best effort
        server.start()
        assert index.find(row.name) is not None
        assert not index.add(row)
        index.client.config_set("maxmemory", "1mb")
        with pytest.raises(OSError, match="maxmemory"):
            add_many(index)
