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
            expected = next(iter(model.leaves()), None)
            total = sum(row.size for row in model.rows.values())
            index.set_limit("max_bytes", max(total - 1, 0))
            gone = index.evict(most=1)
            index.set_limit("max_bytes", None)
            assert [block.name for block in gone] == [name for name in [expected] if name and total]
            for block in gone:
                assert (block.file, block.size) == (model.rows[block.name].file, model.rows[block.name].size)
                del model.rows[block.name]
                model.uses.remove(block.name)
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


def test_tenants_have_blocks_and_limits_of_their_own(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random actions of three tenants; what is evicted is what a few lines of Python choose."""
    rng, clock = random.Random(5), [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    roots = {tenant: bytes([number]) * 32 for number, tenant in enumerate(("", "a" * 32, "b" * 32), 50)}
    rows: dict[bytes, tuple[str, Row, float]] = {}
    for tenant, root in roots.items():
        index.add_root(root, "a model", {}, tenant)
    index.add_root(roots["a" * 32], "a model", {}, "b" * 32)  # it has a tenant already
    assert index.owners() == {root: tenant for tenant, root in roots.items() if tenant}
    limits = {"max_bytes": 6000, f"max_bytes:{'a' * 32}": 1500, f"max_age:{'b' * 32}": 60, "max_bytes:": 2500, "max_age": 200}
    for name, limit in limits.items():
        kind, _, tenant = name.partition(":")
        index.set_limit(kind, limit, tenant if ":" in name else None)
    assert index.counters() == {"bytes": 0, **limits}

    def coldest(tenant: str) -> tuple[bytes, float]:
        parents = {row.parent for _, row, _ in rows.values()}
        leaves = [(used, name) for name, (own, _, used) in rows.items() if own == tenant and name not in parents]
        return min(leaves)[::-1] if leaves else (b"", clock[0])

    def held(tenant: str) -> int:
        return sum(row.size for own, row, _ in rows.values() if own == tenant)

    def expected() -> set[bytes]:
        before = set(rows)
        for tenant in roots:
            age = min(limits["max_age"], limits.get(f"max_age:{tenant}", 1000))
            while coldest(tenant)[1] < clock[0] - age:
                del rows[coldest(tenant)[0]]
            while held(tenant) > limits.get(f"max_bytes:{tenant}", 1 << 30):
                del rows[coldest(tenant)[0]]
        while sum(row.size for _, row, _ in rows.values()) > limits["max_bytes"]:
            del rows[coldest(max(roots, key=held))[0]]
        return before - set(rows)

    evicted = 0
    for number in range(1, 300):
        clock[0] += rng.expovariate(0.5)
        tenant = rng.choice([*roots])
        parents = [row for own, row, _ in rows.values() if own == tenant]
        row = replace(row_of(number, rng.choice([*parents, None]), rng.randrange(1, 300)), root=roots[tenant])
        row = replace(row, parent=roots[tenant]) if row.parent == ROOT else row
        assert index.add(row)
        rows[row.name] = tenant, row, clock[0]
        if rng.random() < 0.5:
            name, (own, used, _) = rng.choice([*rows.items()])
            index.touch([used])
            rows[name] = own, used, clock[0]
        if rng.random() < 0.7:
            gone = {block.name for block in index.evict()}
            assert gone == expected()
            evicted += len(gone)
            assert dict.fromkeys(roots, 0) | index.tenant_bytes() == {tenant: held(tenant) for tenant in roots}
            assert index.counters()["bytes"] == sum(map(held, roots))
    assert evicted > 100
    pinned = next(row for own, row, _ in rows.values() if own == "b" * 32)
    index.pin(pinned, True)
    assert pinned.name in index.held("b" * 32)
    assert index.held("a" * 32) == {}
    assert index.held() == index.held("b" * 32)


def test_a_root_that_gets_a_tenant_brings_its_blocks(index: Index) -> None:
    first, own = row_of(1, size=300), bytes([9]) * 32
    first = replace(first, root=own, parent=own)
    second = replace(row_of(2, first, 200), root=own)
    other = row_of(3, size=50)
    for row in (first, second, other):
        assert index.add(row)
    assert index.tenant_bytes() == {"": 550}
    index.add_root(own, "a model", {}, "c" * 32)
    assert index.tenant_bytes() == {"": 50, "c" * 32: 500}
    index.set_limit("max_bytes", 400, "c" * 32)
    assert [block.name for block in index.evict()] == [second.name]
    assert index.tenant_bytes() == {"": 50, "c" * 32: 300}
    index.set_limit("max_bytes", 0)
    assert [block.name for block in index.evict()] == [first.name, other.name]  # of who holds most
    assert index.tenant_bytes() == {"": 0, "c" * 32: 0}


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
        values = (
            bytes([9]) * 32,
            ROOT,
            ROOT,
            0,
            np.arange(256).tobytes(),
            1,
            0,
            new_block_file(bytes([9]) * 32),
            7,
            1.0,
            1.0,
            0,
            0,
        )
        db.execute(f"INSERT INTO blocks VALUES ({', '.join('?' * len(values))})", values)
        db.commit()
    read = SQLiteIndex(path, denied=OSError(errno.EROFS, "read-only"))
    assert [row.size for row in read.all()] == [7]
    assert (read.owners(), read.tenant_bytes()) == ({}, {"": 7})
    read.close()
    index = SQLiteIndex(path)
    assert not index.new
    assert index.lease(row.name, 60)
    assert index.add(row)
    assert index.tenant_bytes() == {"": 100 + 7}
    index.add_root(ROOT, "a model", {}, "d" * 32)
    assert index.tenant_bytes() == {"": 0, "d" * 32: 100 + 7}
    index.close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (sqlite_index.VERSION,)
        db.execute(f"PRAGMA user_version = {sqlite_index.VERSION + 1}")
    with pytest.raises(UnsupportedStream, match="newer"):
        SQLiteIndex(path)


@pytest.mark.parametrize(("tenant", "size"), [(b"\x00\xff", "many"), ("\x1b[31m", -5), ("a" * 32, 1 << 62), ("", 2.5)])
def test_owners_that_no_store_writes_cost_no_block_its_end(tmp_path: Path, tenant: object, size: object) -> None:
    path, rows = tmp_path / "index.sqlite", [row_of(number) for number in (1, 2, 3)]
    index = SQLiteIndex(path)
    for row in rows:
        assert index.add(row)
    index.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE owners SET tenant = ?, bytes = ?", (tenant, size))
        db.commit()
    index = SQLiteIndex(path)
    assert index.owners() == ({ROOT: tenant} if tenant == "a" * 32 else {})
    assert sum(index.tenant_bytes().values()) == 300
    index.set_limit("max_bytes", 100)
    assert [block.name for block in index.evict()] == [row.name for row in rows[:2]]
    index.close()


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
    index.client.set(index.key("version"), "3")
    with pytest.raises(UnsupportedStream, match="newer"):
        RedisIndex(address)


def test_an_index_of_version_1_in_redis_is_gone_on_with(server: RedisServer) -> None:
    """Version 1 had neither tenants nor a tenant in a block's hash."""
    address = f"{server.address}?store=older"
    index, row = RedisIndex(address), row_of(7)
    index.begun()
    assert index.add(row)
    index.client.hdel(index.key("block", row.name), "tenant")
    index.client.set(index.key("version"), "1")
    index.close()
    index = RedisIndex(address)
    assert not index.new
    assert index.client.get(index.key("version")) == b"2"
    assert index.tenant_bytes() == {"": 100}
    index.add_root(ROOT, "a model", {}, "e" * 32)
    assert index.tenant_bytes() == {"": 0, "e" * 32: 100}
    assert index.remove(row)
    assert index.tenant_bytes() == {"": 0, "e" * 32: 0}
    index.close()


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
        time.sleep(0.4)  # for which it is not asked
        assert index.find(row.name) is not None
        assert not index.add(row)
        index.client.config_set("maxmemory", "1mb")
        with pytest.raises(OSError, match="maxmemory"):
            add_many(index)
