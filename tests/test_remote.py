"""URLs: whole and partial reads, uploads that are whole or not at all, and connections that break."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest

from pqcodec.errors import InvalidArgument, TruncatedStream
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter, load_cache, remote, save_cache

REFERENCE = {"backend": "reference"}
URL = "memory://bucket/a.pqkv"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> fsspec.AbstractFileSystem:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    return fs


def tensor(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def test_a_cache_goes_to_a_store_and_comes_back() -> None:
    cache = [(tensor(1, 2, 9, 16), tensor(1, 2, 9, 16))]
    save_cache(URL, cache, **REFERENCE)
    assert load_cache(URL, tokens=(2, 5), **REFERENCE)[0][0].shape == (1, 2, 3, 16)


def test_only_wanted_bytes_are_asked_for(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with PQKVWriter(URL) as writer:
        for name in "ab":
            writer.add(name, tensor(4, 1024, 64), **REFERENCE)
    asked = []
    cat_file = type(store).cat_file
    monkeypatch.setattr(
        type(store), "cat_file", lambda self, path, start, end: asked.append(end - start) or cat_file(self, path, start, end)
    )
    with PQKVFile(URL) as file:
        file.entry("b")
        asked.clear()
        file.decode("b", tokens=(256, 512), leading=(2, 3), **REFERENCE)
    useful = 256 * 64 * 3 // 8
    assert useful <= sum(asked) <= useful / 0.9


def test_what_fails_leaves_no_object(store: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(InvalidArgument), PQKVWriter(URL) as writer:
        writer.add("a", tensor(4, 16), preset="none")
    assert not store.exists(URL)


class Broken:
    """A store whose every call breaks some times before it works."""

    def __init__(self, fs: fsspec.AbstractFileSystem, breaks: int) -> None:
        self._fs, self._breaks, self._left = fs, breaks, breaks

    def __getattr__(self, name: str) -> object:
        def call(*args: object, **options: object) -> object:
            if self._left:
                self._left -= 1
                raise ConnectionResetError("the connection was reset")
            self._left = self._breaks
            return getattr(self._fs, name)(*args, **options)

        return call


def test_a_connection_that_breaks_is_tried_again(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Broken(store, remote.TRIES - 1)
    monkeypatch.setattr(remote, "_file_system", lambda url: (broken, url.removeprefix("memory:/")))
    x = tensor(4, 16)
    with PQKVWriter(URL) as writer:
        writer.add_exact("a", x)
    with PQKVFile(URL) as file:
        np.testing.assert_array_equal(file.decode("a"), x)
    monkeypatch.setattr(remote, "_file_system", lambda url: (Broken(store, remote.TRIES), url))
    with pytest.raises(OSError, match=r"memory://bucket/a.pqkv: asking for its size failed 4 times.*reset"):
        PQKVFile(URL)


def test_what_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TRIES", 1)
    with pytest.raises(FileNotFoundError):
        PQKVFile("memory://bucket/none.pqkv")
    with pytest.raises(InvalidArgument, match="nothing://"):
        PQKVFile("nothing://a")
    with pytest.raises(InvalidArgument, match="do not grow in place"), PQKVAppender(URL):
        pass


def test_an_object_that_shrinks_meanwhile_is_told(store: fsspec.AbstractFileSystem) -> None:
    with PQKVWriter(URL) as writer:
        writer.add_exact("a", tensor(64, 16))
    with PQKVFile(URL) as file:
        store.pipe_file("/bucket/a.pqkv", b"x")
        with pytest.raises(TruncatedStream, match="has the file changed"):
            file.decode("a")
