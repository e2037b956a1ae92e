"""A store that many machines share, its index in Redis: one node puts, another gets; quotas, faults and the command line."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("redis")
if shutil.which("redis-server") is None:
    pytest.skip("there is no redis-server here: apt install redis-server", allow_module_level=True)

from store_stress import MODEL, cache_of, expected, stress, tokens_of, wrong
from typer.testing import CliRunner

from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.store import PrefixStore, blocks, writing
from pqcodec.formats.store.keys import tenant_id_of
from pqcodec.tools.cli import app
from tests.servers import RedisServer, redis_server

PROMPT = "1.2.3"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(str(tmp_path_factory.mktemp("redis"))) as running:
        yield running


@pytest.fixture
def address(server: RedisServer, tmp_path: Path) -> str:
    """Of a store of this test's own."""
    return f"{server.address}?store={tmp_path.name}"


def forget(store: PrefixStore) -> None:
    """The server loses all keys of a store."""
    index = store.shelf.index
    index.client.delete(*index.client.keys(index.key("*")))


@pytest.mark.parametrize("place", ["redis", "folder", "memory"])
@pytest.mark.parametrize("preset", ["exact", "pq3", "quad3"])
def test_what_one_node_puts_another_gets(address: str, tmp_path: Path, place: str, preset: str) -> None:
    data = {"redis": None, "folder": str(tmp_path / "files"), "memory": f"memory://{tmp_path.name}{preset}"}[place]
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, data=data, preset=preset) as one, PrefixStore(address, data=data, preset=preset) as two:
        stored = one.put(MODEL, ids, cache_of(numbers))
        assert stored.tokens == stored.new_tokens == len(ids)
        assert two.put(MODEL, ids, cache_of(numbers)).new_tokens == 0
        cache, length = two.get(MODEL, ids, leave=0)
        assert length == len(ids)
        assert not wrong(cache, length, numbers, preset == "exact")
        assert {file for file, _ in two.shelf.files.all()} == {row.file for row in one.shelf.index.all()}
        assert not [what for row in two.shelf.index.all() for what in two.shelf.problems(row)]
        assert two.shelf.gc(grace=0) == {"orphans": 0, "missing": 0, "evicted_bytes": 0}
    with PrefixStore(address, data=data, preset=preset, tenant="another") as other:
        assert other.get(MODEL, ids).length == 0


def test_two_nodes_that_put_one_prefix_at_once_keep_it_once(address: str) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    stores = [PrefixStore(address, preset="pq3") for _ in range(4)]
    threads = [threading.Thread(target=store.put, args=(MODEL, ids, cache_of(numbers))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = stores[0].shelf.index.all()
    assert sum(len(row.tokens) for row in rows) == len(ids)
    assert {file for file, _ in stores[0].shelf.files.all()} == {row.file for row in rows}
    assert stores[0].shelf.index.counters()["bytes"] == sum(row.size for row in rows)


@pytest.mark.parametrize("shared", [False, True])
def test_of_all_who_put_a_block_at_once_one_encodes_it(
    address: str, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, numbers, place = tokens_of("4.4.4"), expected("4.4.4"), address if shared else tmp_path / "local"
    encoded: list[int] = []
    write_block = blocks.write_block

    def slowly(path: str, row: Any, *more: Any) -> int:
        encoded.append(row.start)
        time.sleep(0.02)
        return write_block(path, row, *more)

    monkeypatch.setattr(blocks, "write_block", slowly)
    stores = [PrefixStore(place, preset="pq3") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        stored = [*pool.map(lambda store: store.put(MODEL, ids, cache_of(numbers)), stores)]
    assert sorted(encoded) == list(range(0, len(ids), 256))
    assert sum(one.new_tokens for one in stored) == len(ids)
    assert all(one.pending_tokens or one.tokens == len(ids) for one in stored)
    for store in stores:
        cache, length = store.get(MODEL, ids, leave=0)
        assert length == len(ids)
        assert not wrong(cache, length, numbers, exact=False)
        store.close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_whose_writer_died_is_left_out_until_its_lease_ends(
    address: str, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    monkeypatch.setattr(writing, "PATIENCE", 0.05)
    with PrefixStore(address if shared else tmp_path / "local", preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        row = store.shelf.index.all()[1]
        store.shelf.drop(row)
        assert store.shelf.index.lease(row.name, 0.5)  # of a node that is gone
        start = time.monotonic()
        stored = store.put(MODEL, ids, cache_of(numbers))
        assert time.monotonic() - start < 0.4
        assert (stored.tokens, stored.new_tokens, stored.pending_tokens) == (256, 0, 256)
        assert store.put(MODEL, ids, cache_of(numbers), pin=True).tokens == len(ids)  # is never left to others
        store.pin(MODEL, ids, pinned=False)
        store.shelf.drop(store.shelf.index.find(row.name))
        assert store.shelf.index.lease(row.name, 0.1)
        time.sleep(0.15)
        assert store.put(MODEL, ids, cache_of(numbers)).tokens == len(ids)


def test_who_cannot_write_a_block_gives_its_lease_back(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    with PrefixStore(address, preset="pq3") as store:
        with monkeypatch.context() as fault:
            fault.setattr(blocks, "write_block", full)
            with pytest.raises(OSError, match="full"):
                store.put(MODEL, ids, cache_of(numbers))
        stored = store.put(MODEL, ids, cache_of(numbers))
        assert (stored.tokens, stored.pending_tokens) == (len(ids), 0)


@pytest.mark.parametrize("place", ["redis", "folder", "memory"])
def test_what_a_node_wrote_that_died_before_its_commit_is_collected(address: str, tmp_path: Path, place: str) -> None:
    data = {"redis": None, "folder": str(tmp_path / "files"), "memory": f"memory://{tmp_path.name}"}[place]
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, data=data, preset="pq3") as store:
        with pytest.MonkeyPatch.context() as fault:
            fault.setattr(store.shelf.index, "add", dies)
            with pytest.raises(SystemExit):
                store.put(MODEL, ids, cache_of(numbers))
        assert len([*store.shelf.files.all()]) == 1
        assert store.get(MODEL, ids, leave=0).length == 0
        assert store.shelf.gc()["orphans"] == 0  # it is young
        assert store.shelf.gc(grace=0) == {"orphans": 1, "missing": 0, "evicted_bytes": 0}
        assert not [*store.shelf.files.all()]


def dies(*_: Any) -> bool:
    raise SystemExit


def test_a_quota_holds_for_all_nodes_and_pins_are_kept(address: str) -> None:
    with PrefixStore(address, preset="pq3", max_bytes="100KB") as one, PrefixStore(address, preset="pq3") as two:
        assert two.shelf.max_bytes == 100_000
        one.put(MODEL, tokens_of("0"), cache_of(expected("0")), pin=True)
        for prompt in ("1", "2.1", "3.2.1", "4.1.1", "5.0.0", "2.2.2"):
            two.put(MODEL, tokens_of(prompt), cache_of(expected(prompt)))
            assert one.shelf.index.counters()["bytes"] <= 100_000
        assert one.get(MODEL, tokens_of("0"), leave=0).length == len(tokens_of("0"))
        assert two.shelf.index.counters()["evicted"] > 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_tenant_that_fills_the_store_loses_its_own(address: str, tmp_path: Path, shared: bool) -> None:
    place, prompts = address if shared else tmp_path / "local", ("0", "1", "2.1", "3.2.1", "4.1.1", "5.0.0", "2.2.2")
    with (
        PrefixStore(place, preset="pq3", tenant="one", max_bytes="100KB", tenant_max_bytes="60KB") as one,
        PrefixStore(place, preset="pq3", tenant="two") as two,
        PrefixStore(place, preset="pq3") as nobody,
    ):
        index, mine = one.shelf.index, one.tenant_id
        assert (mine, nobody.tenant_id) == (tenant_id_of("one"), "")
        assert (one.shelf.limit("max_bytes"), one.shelf.limit("max_bytes", mine)) == (100_000, 60_000)
        for store in (two, nobody):
            store.put(MODEL, tokens_of("0"), cache_of(expected("0")))
        for prompt in prompts:
            one.put(MODEL, tokens_of(prompt), cache_of(expected(prompt)))
            assert index.tenant_bytes()[mine] <= 60_000
        assert index.counters()["evicted"] > 0
        assert one.get(MODEL, tokens_of(prompts[0]), leave=0).length < len(tokens_of(prompts[0]))
        for prompt in prompts:  # without a quota of its own it is the store's that holds
            two.put(MODEL, tokens_of(prompt), cache_of(expected(prompt)))
            assert index.counters()["bytes"] <= 100_000
        held = index.tenant_bytes()
        assert held[mine] > 30_000
        assert nobody.get(MODEL, tokens_of("0"), leave=0).length == len(tokens_of("0"))  # who holds least loses nothing
        found = CliRunner().invoke(app, ["store", "stats", str(place), "--json"])
        told = {one["tenant"]: one for one in json.loads(found.output)["tenants"]}
        assert {name: of["bytes"] for name, of in told.items()} == {name or "none": size for name, size in held.items()}
        assert told[mine]["max_bytes"] == 60_000
        assert mine[:8] in CliRunner().invoke(app, ["store", "stats", str(place)], env={"COLUMNS": "120"}).output
        set_limit = ["store", "gc", str(place), "--tenant", mine[:8], "--max-bytes", "20KB"]
        assert CliRunner().invoke(app, set_limit).exit_code == 0
        assert index.tenant_bytes()[mine] <= 20_000
        with pytest.warns(RuntimeWarning, match="a prefix of .* is left out"):
            one.put(MODEL, tokens_of("4.4.4"), cache_of(expected("4.4.4")))
    for wrong_id in ("zz", "f" * 31):
        done = CliRunner().invoke(app, ["store", "gc", str(place), "--tenant", wrong_id, "--max-bytes", "1GB"])
        assert (done.exit_code, "no tenant is called so" in done.output) == (2, True)
    assert CliRunner().invoke(app, ["store", "gc", str(place), "--tenant", "f" * 32]).exit_code == 2  # without a limit


@pytest.mark.parametrize("shared", [False, True])
def test_a_tenant_may_have_its_own_age(address: str, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, place = [time.time()], address if shared else tmp_path / "local"
    monkeypatch.setattr(time, "time", lambda: clock[0])
    ids, cache = tokens_of("0"), cache_of(expected("0"))
    with (
        PrefixStore(place, preset="pq3", tenant="one", tenant_max_age="1h") as one,
        PrefixStore(place, preset="pq3", tenant="two") as two,
    ):
        one.put(MODEL, ids, cache)
        two.put(MODEL, ids, cache)
        clock[0] += 4000
        assert (one.get(MODEL, ids, leave=0).length, two.get(MODEL, ids, leave=0).length) == (0, len(ids))
        assert two.shelf.gc()["evicted_bytes"] > 0
        assert set(two.shelf.index.owners().values()) == {tenant_id_of("one"), tenant_id_of("two")}
        assert {two.shelf.index.owners()[row.root] for row in two.shelf.index.all()} == {tenant_id_of("two")}


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_not_used_for_long_is_neither_found_nor_kept(
    address: str, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with PrefixStore(address if shared else tmp_path / "local", preset="pq3", max_age="1h") as store:
        for prompt, pin in (("0", False), ("1.1", True), ("2.1.1", False)):
            store.put(MODEL, tokens_of(prompt), cache_of(expected(prompt)), pin=pin)
        clock[0] += 3000
        assert store.get(MODEL, tokens_of("0"), leave=0).length == len(tokens_of("0"))
        clock[0] += 3000
        found = {prompt: store.get(MODEL, tokens_of(prompt), leave=0).length for prompt in ("0", "1.1", "2.1.1")}
        assert found == {"0": len(tokens_of("0")), "1.1": len(tokens_of("1.1")), "2.1.1": 0}
        assert store.shelf.gc(grace=0)["evicted_bytes"] > 0
        assert store.shelf.index.counters()["expired"] > 0 == store.shelf.index.counters()["evicted"]
        left = {row.name for row in store.shelf.index.all()}
        store.put(MODEL, tokens_of("2.1.1"), cache_of(expected("2.1.1")))
        assert store.get(MODEL, tokens_of("2.1.1"), leave=0).length == len(tokens_of("2.1.1"))
        clock[0] += 10 * 3600
        store.put(MODEL, tokens_of("3"), cache_of(expected("3")))
        kept = {row.name for row in store.shelf.index.all()}
        assert len(left & kept) == len({row.name for row in store.shelf.index.all()} & store.shelf.index.held().keys())
        assert store.get(MODEL, tokens_of("1.1"), leave=0).length == len(tokens_of("1.1"))
        store.shelf.index.set_limit("max_age", None)
        clock[0] += 1e6
        assert store.get(MODEL, tokens_of("3"), leave=0).length == len(tokens_of("3"))


@pytest.mark.parametrize("given", ["soon", "0", -1, "3 moons", True, "", "1e3"])
def test_times_that_are_none(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^max_age .* a time such as 30d"):
        PrefixStore(tmp_path / "s", max_age=given)
    assert not (tmp_path / "s").exists()


def test_damage_is_a_miss_and_dropped(address: str) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        index, row = store.shelf.index, store.shelf.index.all()[1]
        key = index.key("file", row.file.encode())
        data = bytearray(index.client.get(key))
        data[len(data) // 2] ^= 1
        index.client.set(key, bytes(data))
        with pytest.warns(RuntimeWarning, match="damaged"):
            cache, length = store.get(MODEL, ids, leave=0)
        assert length == row.start
        assert not wrong(cache, length, numbers, exact=False)
        assert index.find(row.name) is None
        store.put(MODEL, ids, cache_of(numbers))
        assert store.get(MODEL, ids, leave=0).length == len(ids)
        index.client.delete(*(index.key("file", row.file.encode()) for row in index.all()))
        with pytest.warns(RuntimeWarning, match="no file"):
            assert store.get(MODEL, ids, leave=0).length == 0


def test_a_lost_index_is_made_anew_from_the_files(address: str, tmp_path: Path) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, data=tmp_path / "files", preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        forget(store)
    with (
        pytest.warns(RuntimeWarning, match="found again by their files"),
        PrefixStore(address, data=tmp_path / "files", preset="pq3") as store,
    ):
        assert store.get(MODEL, ids, leave=0).length == len(ids)


def test_a_server_that_is_gone_finds_nothing_and_says_so(tmp_path: Path) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with redis_server(str(tmp_path)) as server, PrefixStore(server.address, preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        server.stop(signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="nothing is found"):
            assert store.get(MODEL, ids).length == 0
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            store.put(MODEL, tokens_of("0"), cache_of(expected("0")))
        server.start()
        time.sleep(0.4)  # for which it is not asked
        assert store.get(MODEL, ids, leave=0).length == len(ids)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "hung"])
def test_a_server_that_does_not_answer_costs_one_time_out(tmp_path: Path, how: signal.Signals) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with redis_server(str(tmp_path)) as server:
        address = f"{server.address}?socket_timeout=0.3&socket_connect_timeout=0.3"
        with PrefixStore(address, preset="pq3") as store:
            store.put(MODEL, ids, cache_of(numbers))
            (server.stop if how == signal.SIGKILL else server.send)(how)
            with pytest.warns(RuntimeWarning, match="nothing is found"):
                assert store.get(MODEL, ids, leave=0).length == 0
            start, calls = time.monotonic(), 0
            while time.monotonic() < start + 0.2:
                with pytest.warns(RuntimeWarning, match="it did not answer, and is asked again in"):
                    assert store.get(MODEL, ids, leave=0).length == 0
                with pytest.raises(OSError, match=r"127\.0\.0\.1"):
                    store.put(MODEL, ids, cache_of(numbers))
                calls += 1
            assert calls >= 5  # of some milliseconds each
            if how == signal.SIGKILL:
                server.start()
            else:
                server.send(signal.SIGCONT)
            time.sleep(0.6)
            assert store.get(MODEL, ids, leave=0).length == len(ids)


@pytest.mark.parametrize("shared", [False, True])
def test_a_store_that_is_opened_to_be_read_is_not_changed(address: str, tmp_path: Path, shared: bool) -> None:
    ids, numbers, place = tokens_of(PROMPT), expected(PROMPT), address if shared else tmp_path / "local"
    with PrefixStore(place, preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        before = [(row.name, row.used, row.hits) for row in store.shelf.index.all()]
        with PrefixStore(place, preset="pq3", read_only=True, max_bytes=1) as reader:
            assert reader.get(MODEL, ids, leave=0).length == len(ids)
            row = reader.shelf.index.all()[0]
            for change in (
                lambda: reader.put(MODEL, tokens_of("0"), cache_of(expected("0"))),
                lambda: reader.pin(MODEL, ids),
                lambda: reader.shelf.gc(0),
                lambda: reader.shelf.drop(row),
                lambda: reader.shelf.index.set_limit("max_bytes", 1),
                lambda: reader.shelf.index.set_data("elsewhere"),
            ):
                with pytest.raises(OSError, match="the store can be read, but not changed") as found:
                    change()
                assert found.value.errno == errno.EROFS
        assert [(row.name, row.used, row.hits) for row in store.shelf.index.all()] == before
        assert store.shelf.max_bytes is None


def test_tls_by_address(tmp_path: Path) -> None:
    ids, numbers, key, certificate = tokens_of(PROMPT), expected(PROMPT), tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    if shutil.which("openssl") is None or subprocess.run([*make, *name], capture_output=True).returncode:
        pytest.skip("there is no openssl here that makes certificates")
    try:
        server = RedisServer(str(tmp_path), tls=(str(certificate), str(key)))
    except TimeoutError:
        pytest.skip("this redis-server has no TLS")
    try:
        with PrefixStore(f"{server.address}?ssl_ca_certs={certificate}", preset="pq3") as store:
            store.put(MODEL, ids, cache_of(numbers))
            assert store.get(MODEL, ids, leave=0).length == len(ids)
        for address in (server.address, server.address.replace("rediss", "redis")):  # an unknown certificate, and no TLS
            with pytest.raises(OSError, match=r"127\.0\.0\.1"):
                PrefixStore(address)
    finally:
        server.stop()


def test_places_that_are_none(address: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="in a local folder or in Redis"):
        PrefixStore("s3://bucket/store")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        PrefixStore("redis://127.0.0.1:1/0")
    with pytest.raises(InvalidArgument, match="store="):
        PrefixStore("redis://127.0.0.1:1/0?store=a/b")
    for parameter in ("foo=1", "decode_responses=True", "encoding=utf-16", "retry=3", "connection_class=x"):
        with pytest.raises(InvalidArgument, match=r"is unknown; store, db"):
            PrefixStore(f"{address}&{parameter}")
    for none in ("redis://[::1", "redis://127.0.0.1:abc", "redis://127.0.0.1:99999", f"{address}&socket_timeout=x"):
        with pytest.raises(InvalidArgument, match="is no address that can be used"):
            PrefixStore(none)
    with pytest.raises(OSError, match=f"connecting to {tmp_path}/none"):
        PrefixStore(f"unix://{tmp_path}/none?db=0")
    PrefixStore(address, data=tmp_path / "files").close()
    with pytest.raises(InvalidArgument, match="pass data="):
        PrefixStore(address)
    with pytest.raises(InvalidArgument, match="lie in"):
        PrefixStore(address, data=tmp_path / "others")


@pytest.mark.parametrize(
    "address",
    [
        "redis://user:secret@127.0.0.1:1/0",
        "redis://user:a@secret@127.0.0.1:1/0",
        "redis://user:a/secret@127.0.0.1:1/0",
        "redis://user:a?secret=1#@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?username=user&password=secret",
    ],
)
def test_a_password_is_never_shown(address: str) -> None:
    with pytest.raises((OSError, InvalidArgument), match=r"127\.0\.0\.1:1") as found:
        PrefixStore(address)
    assert "secret" not in str(found.value)


# -- what a stranger, or a fault, can do -------------------------------------------------------------------------
def test_another_prefix_among_the_blocks_that_follow_is_not_taken(address: str) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, preset="exact") as store:
        store.put(MODEL, ids, cache_of(numbers))
        store.put(MODEL, ids, cache_of(-numbers), extra="another")
        index = store.shelf.index
        own, *_ = (root for root, (_, settings) in index.roots().items() if not settings["extra"])
        mine = {row.start: row for row in index.all() if row.root == own}
        for row in index.all():
            if row.root != own:
                index.client.sadd(index.key("children", mine[row.start].parent), row.name)
        for row in mine.values():
            index.remove(row)
        assert store.get(MODEL, ids, leave=0).length == 0
        assert store.put(MODEL, ids, cache_of(numbers)).new_tokens == len(ids)
        cache, length = store.get(MODEL, ids, leave=0)
        assert not wrong(cache, length, numbers, exact=True)


@pytest.mark.parametrize(("field", "value"), [("stateful", 1), ("whole", 0)])
def test_a_row_that_says_another_kind_of_block_than_its_file_is_damage(address: str, field: str, value: int) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, preset="exact") as store:
        store.put(MODEL, ids, cache_of(numbers))
        index = store.shelf.index
        row = next(row for row in index.all() if row.whole == (field == "whole"))
        index.client.hset(index.key("block", row.name), field, value)
        with pytest.warns(RuntimeWarning, match=r"is another block|row was dropped"):
            assert store.get(MODEL, ids, leave=0).length == row.start


def test_a_row_of_another_type_is_dropped(address: str) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        index, row = store.shelf.index, store.shelf.index.all()[1]
        index.client.delete(index.key("block", row.name))
        index.client.rpush(index.key("block", row.name), "x")
        with pytest.warns(RuntimeWarning, match="its key is of another type"):
            assert len(index.all()) == 2
        store.put(MODEL, ids, cache_of(numbers))
        assert store.get(MODEL, ids, leave=0).length == len(ids)
        index.client.delete(index.key("counters"))
        index.client.rpush(index.key("counters"), "x")
        with pytest.raises(CorruptStream, match=r"without the keys that begin with \{pqcodec:"):
            store.shelf.gc()


def test_what_a_server_forgot_is_recorded_anew_and_its_files_stay(address: str, tmp_path: Path) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(address, data=tmp_path / "files", preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        forget(store)
        with pytest.warns(RuntimeWarning, match="3 blocks were found again by their files"):
            assert store.shelf.gc(grace=0) == {"orphans": 0, "missing": 0, "evicted_bytes": 0}
        assert store.get(MODEL, ids, leave=0).length == len(ids)
        forget(store)
        store.put(MODEL, tokens_of("0"), cache_of(expected("0")))
        with pytest.raises(InvalidArgument, match="pass data="):
            PrefixStore(address)
    with pytest.warns(RuntimeWarning, match="found again"), PrefixStore(address, data=tmp_path / "files") as store:
        assert len(store.shelf.index.all()) == 5


def test_a_place_that_is_not_mounted_costs_no_block(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    monkeypatch.chdir(tmp_path)
    with PrefixStore(address, data="files", preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert store.get(MODEL, ids, leave=0).length == len(ids)
        with pytest.raises(InvalidArgument, match="lie in"):
            PrefixStore(address, data="files")
        (tmp_path / "files").rename(tmp_path / "away")
        with pytest.warns(RuntimeWarning, match="is it mounted"):
            assert store.get(MODEL, ids, leave=0).length == 0
        with pytest.raises(OSError, match="is it mounted"):
            store.shelf.gc(grace=0)
        (tmp_path / "away").rename(tmp_path / "files")
        assert store.get(MODEL, ids, leave=0).length == len(ids)
        (tmp_path / "files").rename(tmp_path / "gone")
        (tmp_path / "files").mkdir()
        assert store.shelf.gc(grace=0)["missing"] == 3


def test_who_may_not_write_or_not_enter_is_told_so(tmp_path: Path) -> None:
    with redis_server(str(tmp_path)) as server:
        with PrefixStore(server.address, preset="pq3") as store:
            store.put(MODEL, tokens_of("0"), cache_of(expected("0")))
            client = store.shelf.index.client
            client.execute_command("ACL", "SETUSER", "reader", "on", ">pass", "~*", "+@read", "+@connection")
            client.config_set("requirepass", "secret")
        with PrefixStore(server.address.replace("://", "://reader:pass@"), preset="pq3") as reader:
            assert reader.get(MODEL, tokens_of("0"), leave=0).length == len(tokens_of("0"))
            with pytest.raises(OSError, match="no permissions") as found:
                reader.put(MODEL, tokens_of("1"), cache_of(expected("1")))
            assert found.value.errno == errno.EACCES
        for address in (server.address, server.address.replace("://", "://:pass@")):
            with pytest.raises(OSError, match="does the address name the user and the password") as found:
                PrefixStore(address)
            assert found.value.errno == errno.EACCES


def test_a_server_without_memory_gives_it_back_and_one_that_only_reads_is_read(tmp_path: Path) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with redis_server(str(tmp_path)) as server, PrefixStore(server.address, preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        client = store.shelf.index.client
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with PrefixStore(server.address, preset="pq3") as reader:
            assert reader.get(MODEL, ids, leave=0).length == len(ids)
            with pytest.raises(OSError, match="read only") as found:
                reader.put(MODEL, tokens_of("0"), cache_of(expected("0")))
            assert found.value.errno == errno.EROFS
        client.execute_command("REPLICAOF", "NO", "ONE")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", "1gb")
        with pytest.warns(RuntimeWarning, match="drops keys of the index"):
            PrefixStore(server.address).close()
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        with PrefixStore(server.address, preset="pq3") as full:
            with pytest.raises(OSError, match="maxmemory") as found:
                full.put(MODEL, tokens_of("0"), cache_of(expected("0")))
            assert found.value.errno == errno.ENOSPC
            assert full.shelf.drop(full.shelf.index.all()[-1])
            assert len([*full.shelf.files.all()]) == 2


@pytest.mark.parametrize("verb", [["ls"], ["stats"], ["verify"], ["gc"], ["rm", "--all", "--yes"]])
def test_the_command_line_makes_no_store_of_a_name_that_is_wrong(server: RedisServer, verb: list[str]) -> None:
    name, *options = verb
    found = CliRunner().invoke(app, ["store", name, f"{server.address}?store=none-{name}", *options])
    assert found.exit_code == 2
    assert "is no prefix store; the server has none of that name" in found.output
    with PrefixStore(f"{server.address}?store=none-{name}") as store:
        assert store.shelf.index.new
    assert CliRunner().invoke(app, ["store", "gc", f"{server.address}?store=none-{name}"]).exit_code == 0  # it is empty now


def test_the_command_line_takes_addresses(address: str, tmp_path: Path) -> None:
    with PrefixStore(address, preset="pq3") as store:
        store.put(MODEL, tokens_of(PROMPT), cache_of(expected(PROMPT)))
    run = CliRunner()
    for verb, *options in (["ls"], ["stats"], ["verify"], ["gc", "--max-age", "30d"]):
        found = run.invoke(app, ["store", verb, address, *options])
        assert found.exit_code == 0, found.output
    with PrefixStore(address, preset="pq3") as store:
        last = max(store.shelf.index.all(), key=lambda row: row.start)
    archive, local = str(tmp_path / "archive.pqkv"), str(tmp_path / "local")
    exported = run.invoke(app, ["store", "export", address, last.name.hex(), archive])
    assert exported.exit_code == 0, exported.output
    digest = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    imported = run.invoke(app, ["store", "import", local, archive, "--sha256", digest])
    assert imported.exit_code == 0, imported.output
    with PrefixStore(local, preset="pq3") as store:
        assert store.get(MODEL, tokens_of(PROMPT), leave=0).length == len(tokens_of(PROMPT))
    assert run.invoke(app, ["store", "rm", address, "--all", "--yes"]).exit_code == 0
    with PrefixStore(address, preset="pq3") as store:
        assert not store.shelf.index.all()
        assert not [*store.shelf.files.all()]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("quota", [False, True])
def test_killed_clients_and_a_killed_server_lose_nothing(tmp_path: Path, quota: bool) -> None:
    (tmp_path / "redis").mkdir()
    with redis_server(str(tmp_path / "redis")) as server:
        found = stress(
            tmp_path / "s",
            processes=4,
            operations=40,
            seed=2,
            quota=quota,
            address=server.address,
            halfway=server.kill_and_start,
        )
    assert (found["wrong"], found["lost"], found["problems"], found["crashes"]) == (0, 0, [], 0)
    assert found["puts"] + found["gets"] >= 4 * 40 - found["server_gone"]
