"""Trouble around a store: what cannot be locked, written or saved costs time at most, and the store tells the truth of it."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pqcodec.errors import InvalidArgument
from pqcodec.formats.store import PrefixStore
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.connections import Connections

pytest.importorskip("transformers")
from store_stress import MODEL, cache_of, expected, tokens_of, wrong
from test_transformers_cache import cached, check_same, prompt, read, tiny

from pqcodec.tools.cli import app

PROMPTS = ("0", "0.1", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three prompts."""
    torch.set_num_threads(1)  # a child of a fork has none of its parent's threads
    with PrefixStore(tmp_path / "store", preset="exact", shared=True) as store:
        for name in PROMPTS:
            put(store, name)
    return tmp_path / "store"


def put(store: PrefixStore, name: str, **options: Any) -> Any:
    return store.put(MODEL, tokens_of(name), cache_of(expected(name)), **options)


def found(store: PrefixStore, name: str) -> int:
    """How many tokens are found, all of them right."""
    cache, length = store.get(MODEL, tokens_of(name), leave=0)
    assert not wrong(cache, length, expected(name), exact=True)
    return int(length)


def whole(store: PrefixStore, *names: str) -> bool:
    return all(found(store, name) == len(tokens_of(name)) for name in names)


# -- an index that is locked, or cannot be written -----------------------------------------------------------------
@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another process writes all the time."""
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def test_getting_does_not_wait_for_who_writes(folder: Path) -> None:
    with PrefixStore(folder, preset="exact") as store, locked(folder):
        start = time.monotonic()
        assert whole(store, *PROMPTS)
        with PrefixStore(folder, preset="exact") as other:
            assert whole(other, *PROMPTS)
        assert time.monotonic() - start < 5


def test_getting_does_not_wait_for_a_thread_that_waits_to_write(folder: Path) -> None:
    with PrefixStore(folder, preset="exact") as store:
        with locked(folder):
            future = put(store, "3", wait=False)
            time.sleep(0.2)
            start = time.monotonic()
            assert whole(store, *PROMPTS)
            assert time.monotonic() - start < 3
            assert not future.done()
        assert future.result().tokens == len(tokens_of("3"))


def fails(*_: Any, **__: Any) -> Any:
    raise sqlite3.OperationalError("database or disk is full")


def test_a_note_of_use_that_fails_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PrefixStore(folder, preset="exact") as store, warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Connections, "changing", fails)
        assert whole(store, *PROMPTS)


def test_damage_that_cannot_be_dropped_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PrefixStore(folder, preset="exact") as store:
        row = next(row for row in store.shelf.index.all() if row.start == 0 and row.whole and whole(store, "0"))
        (folder / "blocks" / row.file).write_bytes(b"nothing")
        monkeypatch.setattr(Connections, "changing", fails)
        with pytest.warns(RuntimeWarning, match="is damaged, and cannot be dropped"):
            assert sum(found(store, name) == 0 for name in PROMPTS) >= 1


def test_where_the_index_cannot_be_read_nothing_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PrefixStore(folder, preset="exact") as store:
        monkeypatch.setattr(Connections, "select", fails)
        with pytest.warns(RuntimeWarning, match="cannot be read, so that nothing is found in it: .*disk is full"):
            assert found(store, "0") == 0


# -- stores that cannot be written -----------------------------------------------------------------------------------
def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def check_read(place: Path, out: Path) -> None:
    """It is read and looked after as far as that needs no right to write, and not a thing of it changes."""
    before = listing(place)
    with PrefixStore(place, preset="exact", max_bytes=10) as store:
        assert whole(store, *PROMPTS)
        for change in (
            lambda: put(store, "3"),
            lambda: put(store, "3", wait=False),
            lambda: store.pin(MODEL, tokens_of("0")),
            lambda: store.shelf.gc(0),
        ):
            with pytest.raises(OSError, match="the store can be read, but not changed") as told:
                change()
            assert told.value.errno in (errno.EROFS, errno.EACCES)
    for words in (("ls",), ("stats",), ("verify",), ("export", "--all")):
        assert (
            CliRunner().invoke(app, ["store", words[0], str(place), *words[1:], *([str(out)] if words[1:] else [])]).exit_code
            == 0
        )
    for words in (("gc", "--max-bytes", "1kB"), ("rm", "--all", "--yes")):
        done = CliRunner().invoke(app, ["store", words[0], str(place), *words[1:]])
        assert (done.exit_code, "can be read, but not changed" in done.stderr) == (4, True)
    assert listing(place) == before


def denying(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(
        own.os,
        "access",
        lambda path, mode, **more: not (mode & os.W_OK and str(path).startswith(str(folder))) and access(path, mode),
    )
    monkeypatch.setattr(own.os, "supports_effective_ids", {own.os.access})


def refusing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says that it can be written, and then it cannot."""

    def refused(path: Path, shared: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(own, "make_file", refused)


@pytest.mark.parametrize("fault", [denying, refusing])
def test_a_store_that_cannot_be_written_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    fault(folder, monkeypatch)
    check_read(folder, tmp_path / "out")


def test_a_mount_for_reading(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "mount"
    place.mkdir()
    mount = f"mount --bind {folder} {place} && mount -o remount,ro,bind {place}"
    if sys.platform != "linux" or subprocess.run(mount, shell=True, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        check_read(place, tmp_path / "out")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def in_child(work: Callable[[], bool]) -> None:
    """Fork, and check what the child finds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if work() else 2
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    end = time.monotonic() + 60
    while not (gone := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(gone[1]) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("state", ["closed", "open"])
def test_a_store_of_another_user(folder: Path, state: str) -> None:
    for path in (folder, *folder.parents):
        if path != Path("/") and path.stat().st_uid == 0 and path.name != "tmp":
            path.chmod(path.stat().st_mode | 0o055)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    owner = None
    if state == "open":  # by another process, whose log is not in the index yet
        code = f"from test_store_trouble import *; s = PrefixStore({str(folder)!r}, preset='exact', shared=True); put(s, '3')"
        owner = subprocess.Popen(
            [sys.executable, "-c", f"{code}; print('ready', flush=True); sys.stdin.read()"],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert (folder / "index.sqlite-wal").stat().st_size

    def work() -> bool:
        os.setgid(65534)
        os.setuid(65534)
        before = listing(folder)
        with PrefixStore(folder, preset="exact") as store:
            assert whole(store, *PROMPTS, *(["3"] if owner else []))
            with pytest.raises(PermissionError, match="can be read, but not changed"):
                put(store, "4")
        return listing(folder) == before

    in_child(work)
    if owner is not None:
        owner.communicate()


def test_a_log_that_cannot_be_read_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "index.sqlite-wal").write_bytes(b"what a killed writer leaves")
    denying(folder, monkeypatch)
    with pytest.raises(PermissionError, match="open the store once with the right to write"):
        PrefixStore(folder)
    with pytest.raises(OSError, match="no store is there, and none can be made"):
        PrefixStore(folder / "blocks")


# -- the quota -------------------------------------------------------------------------------------------------------
def test_a_put_tells_what_is_there(folder: Path) -> None:
    with PrefixStore(folder, preset="exact") as store:
        before = {row.name for row in store.shelf.index.all()}
        total = store.shelf.index.counters()["bytes"]
        store.shelf.index.set_limit("max_bytes", 30_000)  # less than a block takes
        with pytest.warns(RuntimeWarning, match=r"a prefix of \d+ tokens is left out: it takes \d+ bytes, and the quota"):
            done = put(store, "5.5.5.5")
        assert (done.new_tokens, done.new_bytes) == (0, 0)
        assert done.tokens == found(store, "5.5.5.5") < 10  # what it begins with by chance
        assert {row.name for row in store.shelf.index.all()} == before  # nothing was dropped for nothing
        store.shelf.index.set_limit("max_bytes", total)
        done = put(store, "4")  # fits where others go
        assert done.tokens == found(store, "4") == len(tokens_of("4")) == done.new_tokens
        assert done.new_bytes == sum(row.size for row in store.shelf.index.all() if row.name not in before)
        assert put(store, "4").new_tokens == 0
        for row in store.shelf.index.all():
            store.shelf.index.pin(row, True)
        store.shelf.index.set_limit("max_bytes", store.shelf.index.counters()["bytes"])
        with pytest.warns(RuntimeWarning, match="leaves room for"):
            assert put(store, "1").new_tokens == 0


def test_a_tail_stays_where_what_it_would_grow_into_is_too_large(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(400)
    cache = cached(model, ids)
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        first = store.put(model, ids[:, :300], cached(model, ids[:, :300]))
        store.shelf.index.set_limit("max_bytes", first.new_bytes + 100)
        with pytest.warns(RuntimeWarning, match="is left out"):
            done = store.put(model, ids, cache)
        assert (done.tokens, done.new_tokens) == (300, 0)
        assert store.get(model, ids).length == 300


def test_eviction_goes_on_after_a_row_that_no_store_writes(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE blocks SET used = 0, size = 'much' WHERE name = (SELECT MAX(name) FROM blocks WHERE whole = 0)")
    with PrefixStore(folder, preset="exact", max_bytes=0) as store:
        with pytest.warns(RuntimeWarning) as told:
            store.shelf.evict()
        assert store.shelf.index.all() == []
    assert "a row was dropped" in str(told[0].message)
    assert not any("pinned" in str(one.message) for one in told)


# -- forks, ends, and what is closed ---------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
def test_a_child_saves_in_its_own_background_and_waits_for_none_of_its_parents(folder: Path) -> None:
    with PrefixStore(folder, preset="exact") as store:
        gate, write = threading.Event(), store._write
        store._write = lambda work: gate.wait(60) and write(work)  # type: ignore[assignment, method-assign]
        future = put(store, "3", wait=False)

        def work() -> bool:
            store._write = write  # type: ignore[method-assign]
            store.flush()  # of the parent's saves there are none here
            saving = put(store, "4", wait=False)
            store.close()
            return bool(saving.done() and saving.result().tokens == len(tokens_of("4")))

        in_child(work)
        gate.set()
        store.flush()
        assert future.result().tokens == len(tokens_of("3"))
        assert whole(store, *PROMPTS, "3", "4")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
def test_no_connection_is_carried_through_a_fork(folder: Path) -> None:
    with PrefixStore(folder, preset="exact") as store:
        put(store, "3")
        connections = store.shelf.index._connections
        assert connections._writer.db is not None
        in_child(lambda: connections._writer.db is None and connections._reader.db is None and whole(store, "3"))
        assert whole(store, *PROMPTS, "3")


def test_saves_are_done_when_the_interpreter_ends_without_closing(tmp_path: Path) -> None:
    """Streams so large that encoding wants threads, which cannot be started any more when atexit is told."""
    code = f"""
import torch, numpy
from transformers import DynamicCache, LlamaConfig
from pqcodec.formats.engines.model_identity import Identity
from pqcodec.formats.store import PrefixStore
config = LlamaConfig(vocab_size=100, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4)
store = PrefixStore({str(tmp_path / "s")!r})
for number in range(2):
    cache = DynamicCache()
    for layer in range(8):
        cache.update(torch.randn(1, 4, 512, 64), torch.randn(1, 4, 512, 64), layer)
    store.put(Identity(config, "c" * 32, weights="w" * 32), numpy.arange(512) % 90 + number, cache, wait=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PQCODEC_THREADS": "2"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    with PrefixStore(tmp_path / "s") as store:
        assert sum(len(row.tokens) for row in store.shelf.index.all()) == 2 * 512


def test_a_closed_store_stays_closed(folder: Path) -> None:
    store = PrefixStore(folder, preset="exact")
    row = store.shelf.index.all()[0]
    store.close()
    store.close()
    uses: list[Callable[[], Any]] = [
        lambda: found(store, "0"),
        lambda: put(store, "0"),
        lambda: put(store, "0", wait=False),
        lambda: store.generate(tiny("llama"), prompt(5)),
        store.flush,
        lambda: store.pin(MODEL, tokens_of("0")),
        store.shelf.evict,
        store.shelf.gc,
        lambda: store.shelf.drop(row),
        lambda: store.shelf.problems(row),
        lambda: store.shelf.index.touch([row]),
    ]
    for use in uses:
        with pytest.raises(InvalidArgument, match="the store is closed"):
            use()


# -- inference mode --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["exact", "pq3"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba", "falcon-h1", "deepseek-v3.2"])
def test_inference_mode_around_and_after_a_get(tmp_path: Path, kind: str, preset: str) -> None:
    model, ids = tiny(kind), prompt(600)
    with PrefixStore(tmp_path / "s", preset=preset) as store:
        with torch.inference_mode():
            store.put(model, ids, cached(model, ids))
        plain = store.get(model, ids, leave=0)
        with torch.inference_mode():
            inside = store.get(model, ids, leave=0)
            assert store.get(model, ids[:, :599]).length == (
                0 if inside.length and kind in ("gemma3", "mamba", "falcon-h1") else 598
            )
        assert inside.length == plain.length == 600
        check_same(plain.cache, inside.cache, most=1e-30)
        for layer in inside.cache.layers:
            for value in vars(layer).values():
                assert not isinstance(value, torch.Tensor) or not value.is_inference()
        expected = read(model, prompt(3, seed=1), plain.cache)
        with torch.inference_mode():
            first = read(model, prompt(3, seed=1), inside.cache)
        assert torch.equal(first, expected)
        other = store.get(model, ids, leave=0)
        with torch.inference_mode():
            again = store.get(model, ids, leave=0)
        assert torch.equal(read(model, prompt(3, seed=1), again.cache), read(model, prompt(3, seed=1), other.cache))
