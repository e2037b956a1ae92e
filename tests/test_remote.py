"""URLs: whole and partial reads, uploads that are whole or not at all, and connections that break."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from pqcodec.errors import InvalidArgument, TruncatedStream
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter, load_cache, save_cache
from pqcodec.formats.places import remote

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
    """A store whose calls each break some times before they work."""

    def __init__(self, fs: fsspec.AbstractFileSystem, breaks: int) -> None:
        self._fs, self._breaks, self._left = fs, breaks, breaks

    def __getattr__(self, name: str) -> object:
        member = getattr(self._fs, name)
        if name not in ("info", "cat_file", "cat_ranges", "get_file", "put_file"):
            return member

        def call(*args: object, **options: object) -> object:
            if self._left:
                self._left -= 1
                raise ConnectionResetError("the connection was reset")
            self._left = self._breaks
            return member(*args, **options)

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


def test_what_is_not_there_is_told_at_once() -> None:
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


# -- many ranges -------------------------------------------------------------------------------------------------
DATA = np.random.default_rng(1).integers(0, 256, 1000, np.uint8)


@pytest.fixture
def source(store: fsspec.AbstractFileSystem) -> remote.RemoteSource:
    store.pipe_file("/bucket/data", DATA.tobytes())
    return remote.RemoteSource("memory://bucket/data")


@pytest.mark.parametrize(
    ("ranges", "requests"),
    [
        ([], []),
        ([(5, 0), (1000, 0)], []),
        ([(10, 20)], [(10, 30)]),
        ([(10, 20), (30, 5), (35, 1)], [(10, 36)]),  # they touch
        ([(500, 100), (0, 10), (11, 9)], [(0, 10), (11, 20), (500, 600)]),  # a byte between them is not asked for
        ([(0, 50), (10, 5), (40, 20), (0, 50)], [(0, 60)]),  # no byte is asked for twice
        ([(990, 10), (3, 0), (0, 1)], [(0, 1), (990, 1000)]),
    ],
)
def test_many_ranges_come_exactly_and_what_touches_in_one_request(
    source: remote.RemoteSource,
    store: fsspec.AbstractFileSystem,
    monkeypatch: pytest.MonkeyPatch,
    ranges: list[tuple[int, int]],
    requests: list[tuple[int, int]],
) -> None:
    asked = []
    cat_file = type(store).cat_file
    monkeypatch.setattr(
        type(store), "cat_file", lambda self, path, start, end: asked.append((start, end)) or cat_file(self, path, start, end)
    )
    for (start, count), found in zip(ranges, source.read_many(ranges), strict=True):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, DATA[start : start + count])
    assert asked == requests


def test_many_ranges_outside_the_file_ask_for_nothing(source: remote.RemoteSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_fs", None)
    with pytest.raises(TruncatedStream, match=r"bytes 999 .. 1001 wanted, 1000 are there"):
        source.read_many([(0, 1), (999, 2)])


def test_of_many_ranges_only_those_that_failed_are_tried_again(
    source: remote.RemoteSource, store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, breaks = [], remote.TRIES
    cat_file = type(store).cat_file

    def flaky(self: object, path: str, start: int, end: int) -> bytes:
        asked.append(start)
        if start == 20 and asked.count(20) < breaks:
            raise ConnectionResetError("the connection was reset")
        return cat_file(self, path, start, end)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    found = source.read_many([(40, 3), (20, 3), (0, 3)])
    np.testing.assert_array_equal(np.concatenate(found), DATA[[40, 41, 42, 20, 21, 22, 0, 1, 2]])
    assert asked == [0, 20, 40] + [20] * (remote.TRIES - 1)
    asked.clear()
    told = r"memory://bucket/data: reading 4 bytes in 2 requests failed 1 times.*reset"
    with remote.patience(remote.Patience(tries=1)), pytest.raises(OSError, match=told):
        source.read_many([(20, 2), (0, 2)])


def test_of_many_ranges_one_that_comes_short_is_told(source: remote.RemoteSource, store: fsspec.AbstractFileSystem) -> None:
    store.pipe_file("/bucket/data", DATA[:500].tobytes())
    with pytest.raises(TruncatedStream, match=r"bytes 490 .. 510: 10 came; has the file changed"):
        source.read_many([(0, 1), (490, 20)])


# -- whole files -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "suffix"), [("a.safetensors", ".safetensors"), ("b.tar.gz", ".gz"), ("c", "")])
def test_a_download_is_a_file_of_the_same_kind(store: fsspec.AbstractFileSystem, name: str, suffix: str) -> None:
    store.pipe_file(f"/bucket/{name}", DATA.tobytes())
    with remote.downloaded(f"memory://bucket/{name}") as path:
        assert path.read_bytes() == DATA.tobytes()
        assert path.suffix == suffix
    assert not path.parent.exists()


def test_a_download_that_breaks_or_comes_short_is_tried_again(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://bucket/data"
    with pytest.raises(FileNotFoundError, match=url), remote.downloaded(url):
        pass
    store.pipe_file("/bucket/data", DATA.tobytes())
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_file_system", lambda url: (Broken(store, remote.TRIES - 1), "/bucket/data"))
        with remote.downloaded(url) as path:
            assert path.read_bytes() == DATA.tobytes()
    monkeypatch.setattr(type(store), "get_file", lambda self, path, local: Path(local).write_bytes(b"half"))
    with pytest.raises(OSError, match=r"downloading it failed 4 times.*4 bytes came, 1000 are there"), remote.downloaded(url):
        pass


def test_placing_takes_a_path_or_a_url(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    for target in (tmp_path / "a.bin", str(tmp_path / "b.bin"), "memory://bucket/c.bin", (tmp_path / "d.bin").as_uri()):
        for content in (b"old", b"new"):
            with remote.placing(target) as path:
                assert path.suffix == (".bin" if str(target).startswith("memory") else ".part")
                path.write_bytes(content)
        with pytest.raises(ZeroDivisionError), remote.placing(target) as path:
            path.write_bytes(bytes(1 // 0))
        assert not path.exists()
        assert fsspec.open(str(target)).open().read() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin", "d.bin"]


def test_exists(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not remote.exists(URL)
    store.pipe_file("/bucket/a.pqkv", b"x")
    assert remote.exists(URL)
    assert remote.exists("memory://bucket")
    broken = Broken(store, remote.TRIES - 1)
    monkeypatch.setattr(remote, "_file_system", lambda url: (broken, url.removeprefix("memory:/")))
    assert remote.exists(URL)
    broken = Broken(store, remote.TRIES)
    with pytest.raises(OSError, match="failed 4 times"):
        remote.exists(URL)


def test_matching_lists_the_objects_that_fit(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    for name in ("b.pqkv", "a.pqkv", "a.txt", "folder.pqkv/c.pqkv", "d.zarr/zarr.json"):
        store.pipe_file(f"/bucket/{name}", b"x")
    assert remote.matching("memory://bucket/*.pqkv") == ["memory://bucket/a.pqkv", "memory://bucket/b.pqkv"]
    assert remote.matching("memory://bucket/d*") == ["memory://bucket/d.zarr"]
    assert remote.matching("memory://bucket/**/c.*") == ["memory://bucket/folder.pqkv/c.pqkv"]
    assert remote.matching("memory://nobucket/*") == []
    (tmp_path / "a.pqkv").touch()
    assert remote.matching(f"{tmp_path.as_uri()}/*.pqkv") == [(tmp_path / "a.pqkv").as_uri()]


def test_a_server_that_shows_files_while_they_are_written_gets_them_under_another_name(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FILES", {"memory"})
    put_file, places = type(store).put_file, []

    def breaks(self: fsspec.AbstractFileSystem, local: str, path: str) -> None:
        places.append(path)
        if len(places) != 2:
            self.pipe_file(path, b"half")
            raise ConnectionResetError("the connection was reset")
        put_file(self, local, path)

    monkeypatch.setattr(type(store), "put_file", breaks)
    with remote.uploading("memory://bucket/a") as path:
        path.write_bytes(b"whole")
    with pytest.raises(OSError, match="uploading 5 bytes failed 4 times"), remote.uploading("memory://bucket/a") as path:
        path.write_bytes(b"other")
    assert all(place.startswith("/bucket/.a.") and place.endswith(".part") for place in places)
    assert store.find("/") == ["/bucket/a"]
    assert store.cat_file("/bucket/a") == b"whole"


def test_an_upload_that_was_ended_by_a_request_whose_answer_got_lost_is_done_again(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file, tries = type(store).put_file, []

    def ended(self: fsspec.AbstractFileSystem, local: str, path: str) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise FileNotFoundError("none") from OSError("An error occurred (NoSuchUpload) when completing")
        put_file(self, local, path)

    monkeypatch.setattr(type(store), "put_file", ended)
    with remote.uploading(URL) as path:
        path.write_bytes(b"whole")
    assert len(tries) == 2
    assert store.cat_file(URL) == b"whole"


def test_uploads_are_ended_but_for_those_that_are_gone_until_the_store_cannot_be_reached() -> None:
    class Store:
        asked: ClassVar[list[int]] = []

        def call_s3(self, method: str, number: int) -> None:
            self.asked.append(number)
            if number in (0, 2):
                raise [FileNotFoundError(), None, ConnectionResetError()][number]

    remote._abort(Store(), [{"number": number} for number in range(4)])
    assert Store.asked == [0, 1, 2]


# -- errors ------------------------------------------------------------------------------------------------------
def test_a_folder_is_no_object(store: fsspec.AbstractFileSystem) -> None:
    store.pipe_file("/bucket/folder/a", b"x")
    with pytest.raises(IsADirectoryError, match="name an object in it: 'memory://bucket/folder'"):
        remote.RemoteSource("memory://bucket/folder")
    with pytest.raises(IsADirectoryError, match="memory://bucket/folder"), remote.downloaded("memory://bucket/folder"):
        pass
    with pytest.raises(IsADirectoryError, match="memory://bucket/folder/"), remote.uploading("memory://bucket/folder/"):
        pass


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InvalidArgument, match=r"gs://b/a: gs:// needs a package.*: pip install 'pqcodec\[remote\]' gcsfs$"):
        remote.exists("gs://b/a")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InvalidArgument, match=r"URLs need fsspec: pip install 'pqcodec\[remote\]' s3fs$"):
        remote.exists("s3://b/a")


class Refused(Exception):
    status = 403


class NoCredentialsError(Exception):
    """Named as botocore's."""


@pytest.mark.parametrize("error", [PermissionError("no"), Refused("no"), NoCredentialsError("no")])
def test_what_the_store_does_not_allow_is_told_at_once(
    store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = []

    def refuse(self: object, path: str) -> None:
        asked.append(path)
        raise error

    monkeypatch.setattr(type(store), "info", refuse)
    with pytest.raises(PermissionError, match=r"does not allow it \(no\); check the credentials.*memory://bucket/a.pqkv"):
        PQKVFile(URL)
    assert len(asked) == 1


def test_a_server_that_does_not_tell_the_size(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe_file("/bucket/a.pqkv", b"whole")
    monkeypatch.setattr(type(store), "info", lambda self, path: {"name": path, "type": "file", "size": None})
    monkeypatch.setattr(type(store), "get_file", lambda self, path, local: Path(local).write_bytes(self.cat_file(path)))
    with pytest.raises(InvalidArgument, match="does not tell the size"):
        PQKVFile(URL)
    with remote.downloaded(URL) as path:
        assert path.read_bytes() == b"whole"
