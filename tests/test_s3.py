"""S3, spoken by a server behind a proxy that breaks connections: what is read is right, what is written is whole."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from pqcodec.errors import TruncatedStream
from pqcodec.formats import PQKVFile, PQKVWriter, load_cache, save_cache
from pqcodec.formats.cache import layer_pairs
from pqcodec.formats.containers.kinds import convert, open_encoded
from pqcodec.formats.places import remote

pytest.importorskip("moto.server", reason="needs a server that speaks S3: pip install 'moto[server]'")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")

import fsspec  # noqa: E402
import servers  # noqa: E402

REFERENCE = {"backend": "reference"}
URL = "s3://bucket/folder/a.pqkv"
KEY = "bucket/folder/a.pqkv"
PART = 5 << 20  # the smallest that S3 takes
SETTINGS = {
    "key": "key",
    "secret": "secret",
    "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 3, "read_timeout": 3},
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request
    with servers.s3_server() as place:
        yield place


@pytest.fixture(scope="module")
def line(server: tuple[str, int]) -> Iterator[servers.Proxy]:
    with servers.proxy(server) as made:
        yield made


@pytest.fixture(autouse=True)
def proxy(line: servers.Proxy, monkeypatch: pytest.MonkeyPatch) -> servers.Proxy:
    """What stands between pqcodec and the store, which is named as users do: to fsspec, through its variables."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own, of each thing that remote tries
    monkeypatch.setattr(fsspec.config, "conf", {})
    fsspec.config.set_conf_env(fsspec.config.conf, {"FSSPEC_S3_ENDPOINT_URL": line.url, "FSSPEC_S3": json.dumps(SETTINGS)})
    line.mend()
    line.exchanges.clear()
    return line


@pytest.fixture(scope="module")
def store_itself(server: tuple[str, int]) -> s3fs.S3FileSystem:
    url = "http://{}:{}".format(*server)
    return s3fs.S3FileSystem(key="key", secret="secret", endpoint_url=url, use_listings_cache=False)


@pytest.fixture(autouse=True)
def store(store_itself: s3fs.S3FileSystem, proxy: servers.Proxy) -> s3fs.S3FileSystem:
    """The store itself, with an empty bucket, past the proxy."""
    if store_itself.exists("bucket"):
        store_itself.rm("bucket", recursive=True)
    store_itself.mkdir("bucket")
    return store_itself


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def save(x: np.ndarray, url: str = URL) -> None:
    with PQKVWriter(url) as writer:
        writer.add_exact("x", x)


def loaded(url: str = URL) -> np.ndarray:
    with PQKVFile(url) as file:
        return file.decode("x")


# -- reading and writing -----------------------------------------------------------------------------------------
def test_a_cache_goes_to_s3_and_comes_back(store: s3fs.S3FileSystem) -> None:
    tensors = np.random.default_rng(0).standard_normal((2, 1, 2, 9, 16)).astype(np.float16)
    save_cache(URL, [tuple(tensors)], **REFERENCE)
    assert store.find("bucket") == [KEY]
    (key, value), (last_key, _) = load_cache(URL, **REFERENCE)[0], load_cache(URL, tokens=(7, 9), **REFERENCE)[0]
    assert key.shape == value.shape == (1, 2, 9, 16)
    np.testing.assert_array_equal(key[..., 7:9, :], last_key)
    assert remote.exists(URL)
    assert remote.exists("s3://bucket/folder")
    assert not remote.exists("s3://bucket/folder/a")


def test_only_wanted_bytes_cross_the_wire(proxy: servers.Proxy) -> None:
    with PQKVWriter(URL) as writer:
        for name in "ab":
            writer.add(name, np.random.default_rng(0).standard_normal((4, 1024, 64)).astype(np.float16), **REFERENCE)
    with PQKVFile(URL) as file:
        file.entry("b")
        before = len(proxy.exchanges)
        file.decode("b", tokens=(256, 512), leading=(2, 3), **REFERENCE)
    requests = proxy.exchanges[before:]
    useful = 256 * 64 * 3 // 8
    assert useful <= sum(request.asked for request in requests) <= useful / 0.9
    assert sum(request.received for request in requests) <= useful / 0.9 + 1000 * len(requests)  # headers


def test_many_ranges_come_at_once_and_exactly(proxy: servers.Proxy, store: s3fs.S3FileSystem) -> None:
    data = numbers(10_000)
    store.pipe_file(KEY, data.tobytes())
    source = remote.RemoteSource(URL)
    before = len(proxy.exchanges)
    proxy.cut(1, after=600, request="GET ")
    ranges = [(9000, 1000), (0, 10), (20, 30), (50, 50), (40, 10), (5, 0)]
    for (start, count), found in zip(ranges, source.read_many(ranges), strict=True):
        np.testing.assert_array_equal(found, data[start : start + count])
    assert sorted(request.asked for request in proxy.exchanges[before:] if not request.cut) == [10, 80, 1000]


def test_an_object_is_replaced_by_a_longer_and_by_a_shorter_one() -> None:
    fs, _ = fsspec.core.url_to_fs(URL)
    for count in (1000, 2000, 10):
        save(numbers(count, seed=count))
        np.testing.assert_array_equal(loaded(), numbers(count, seed=count))
        fs.ls("bucket/folder")  # which s3fs remembers


def test_matching_lists_the_objects_that_fit_now(store: s3fs.S3FileSystem) -> None:
    for name in ("b.pqkv", "a.pqkv", "a.txt", "c.pqkv/d", "d.zarr/zarr.json"):
        store.pipe_file(f"bucket/folder/{name}", b"x")
    assert remote.matching("s3://bucket/folder/*.pqkv") == [URL, "s3://bucket/folder/b.pqkv"]
    assert remote.matching("s3://bucket/folder/*.zarr") == ["s3://bucket/folder/d.zarr"]
    store.rm(KEY)
    assert remote.matching("s3://bucket/*/*.pqkv") == ["s3://bucket/folder/b.pqkv"]
    assert remote.matching("s3://nobucket/*.pqkv") == []


def test_a_size_that_was_listed_earlier_is_not_believed(store: s3fs.S3FileSystem) -> None:
    save(numbers(1000))
    fs, _ = fsspec.core.url_to_fs(URL)
    fs.ls("bucket/folder")
    save(numbers(10, seed=1), "s3://bucket/other")
    store.copy("bucket/other", KEY)  # as another process would
    np.testing.assert_array_equal(loaded(), numbers(10, seed=1))


def test_a_large_file_is_uploaded_in_parts(
    proxy: servers.Proxy, store: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", PART)
    x = numbers(2 * PART + 1000)
    save(x)
    assert sum("partNumber=" in request.line for request in proxy.exchanges) == 3
    assert store.info(KEY)["ETag"].strip('"').endswith("-3")
    np.testing.assert_array_equal(loaded(), x)
    assert store.list_multipart_uploads("bucket") == []


def test_a_download_has_all_bytes_though_it_is_cut(proxy: servers.Proxy, store: s3fs.S3FileSystem) -> None:
    data = numbers(300_000).tobytes()
    store.pipe_file(KEY, data)
    for reset in (True, False):
        proxy.cut(2, after=100_000, request="GET ", reset=reset)
        with remote.downloaded(URL) as path:
            assert path.read_bytes() == data
            assert path.suffix == ".pqkv"
    assert sum(request.cut for request in proxy.exchanges) == 4


# -- connections that break in the middle of a read --------------------------------------------------------------
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("after", [0, 100, 200_000], ids=["at once", "in the headers", "in the body"])
def test_a_read_that_is_cut_is_tried_again(proxy: servers.Proxy, after: int, reset: bool) -> None:
    x = numbers(300_000)
    save(x)
    with PQKVFile(URL) as file:
        file.entry("x")
        proxy.cut(remote.TRIES - 1, after=after, reset=reset)
        np.testing.assert_array_equal(file.decode("x"), x)
    assert sum(request.cut for request in proxy.exchanges) >= 1


def test_a_store_that_always_breaks_is_given_up_soon(proxy: servers.Proxy) -> None:
    save(numbers(300_000))
    with PQKVFile(URL) as file:
        file.entry("x")
        proxy.cut(100, after=200_000)
        begin = time.monotonic()
        with pytest.raises(
            OSError, match=rf"{URL}: reading bytes \d+ .. \d+ failed 4 times, the last time with .*is the store"
        ):
            file.decode("x")
        assert time.monotonic() - begin < 10
    assert 0 < sum(request.cut for request in proxy.exchanges) <= 2 * remote.TRIES


def test_an_object_that_shrinks_meanwhile_is_told(store: s3fs.S3FileSystem) -> None:
    save(numbers(1000))
    with PQKVFile(URL) as file:
        for rest in (500, 20):
            store.pipe_file(KEY, store.cat_file(KEY)[:rest])
            with pytest.raises(TruncatedStream, match=f"{URL}.*has the file changed meanwhile"):
                file.decode("x")


# -- connections that break in the middle of a write -------------------------------------------------------------
@pytest.mark.parametrize("before", [None, 10], ids=["new", "replacing"])
@pytest.mark.parametrize(
    ("side", "after", "arrives"),
    [("request", 10, False), ("request", 100_000, False), ("response", 0, False), ("response", 100, True)],
    ids=["in its headers", "in its body", "before it", "in the answer"],  # two times 25 bytes of an answer say "go on"
)
def test_a_write_that_is_cut_is_whole_or_not_there(
    proxy: servers.Proxy, store: s3fs.S3FileSystem, side: str, after: int, arrives: bool, before: int | None
) -> None:
    x = numbers(300_000)
    if before:
        save(numbers(before))
    proxy.cut(1, after=after, side=side, request="PUT ")
    save(x)
    np.testing.assert_array_equal(loaded(), x)
    if before:
        save(numbers(before))
    else:
        store.rm(KEY)
    proxy.cut(100, after=after, side=side, request="PUT ")
    with pytest.raises(OSError, match=rf"{URL}: uploading \d+ bytes failed 4 times.*[Nn]othing half-written.*write it again"):
        save(x)
    proxy.mend()
    if arrives:  # only the answer got lost
        np.testing.assert_array_equal(loaded(), x)
    elif before:
        np.testing.assert_array_equal(loaded(), numbers(before))
    else:
        assert store.find("bucket") == []


COMPLETE = "POST /bucket/folder/a.pqkv?uploadId="


@pytest.mark.parametrize("retries", [1, 2])  # of s3fs: its second request to complete an upload finds no such upload
@pytest.mark.parametrize(
    ("request_line", "side", "after"),
    [
        ("?uploads", "response", 0),
        ("partNumber=1", "request", 1 << 20),
        ("partNumber=", "response", 100),
        (COMPLETE, "request", 10),
        (COMPLETE, "response", 0),  # it is complete, and nobody is told
    ],
)
def test_an_upload_in_parts_that_is_cut_once_is_done_again(
    proxy: servers.Proxy,
    store: s3fs.S3FileSystem,
    monkeypatch: pytest.MonkeyPatch,
    request_line: str,
    side: str,
    after: int,
    retries: int,
) -> None:
    monkeypatch.setattr(remote, "PART", PART)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", retries)
    proxy.cut(1, after=after, side=side, request=request_line, reset=False)
    x = numbers(2 * PART + 1000)
    save(x)
    assert sum(request.cut for request in proxy.exchanges) == 1
    np.testing.assert_array_equal(loaded(), x)
    left = len(store.list_multipart_uploads("bucket"))
    assert left == (request_line == "?uploads")  # whose name nobody was told


@pytest.mark.parametrize("abort_breaks", [False, True])
def test_an_upload_in_parts_that_always_breaks_leaves_what_was_there(
    proxy: servers.Proxy, store: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch, abort_breaks: bool
) -> None:
    old = numbers(10)
    save(old)
    monkeypatch.setattr(remote, "PART", PART)
    proxy.cut(100, after=1 << 20, side="request", request="partNumber=2")
    proxy.cut(100 if abort_breaks else 0, request="DELETE ")
    begin = time.monotonic()
    with pytest.raises(OSError, match=f"{URL}: uploading 1.* bytes failed 4 times.*partNumber=2"):
        save(numbers(2 * PART + 1000))
    assert time.monotonic() - begin < 10
    np.testing.assert_array_equal(loaded(), old)
    assert abort_breaks or store.list_multipart_uploads("bucket") == []  # no parts stay


def test_parts_of_an_earlier_try_do_not_stay_when_a_later_one_comes_through(
    proxy: servers.Proxy, store: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", PART)
    begun = []
    put = remote._put_in_parts

    def observed(*args: object) -> None:
        put(*args)
        begun.extend(store.list_multipart_uploads("bucket"))

    monkeypatch.setattr(remote, "_put_in_parts", observed)
    proxy.cut(6, after=1000, side="request", request="partNumber=")
    x = numbers(2 * PART + 1000)
    save(x)
    assert len(begun) >= 1
    assert store.list_multipart_uploads("bucket") == []
    np.testing.assert_array_equal(loaded(), x)


def test_a_writer_that_fails_uploads_nothing(proxy: servers.Proxy) -> None:
    with pytest.raises(ZeroDivisionError), PQKVWriter(URL) as writer:
        writer.add_exact("x", numbers(10 // 0))
    assert not any(request.line.startswith("PUT") for request in proxy.exchanges)


# -- what another try does not mend ------------------------------------------------------------------------------
def test_what_is_not_there_is_told_at_once(proxy: servers.Proxy) -> None:
    for url in ("s3://bucket/none.pqkv", "s3://nobucket/none.pqkv"):
        before = len(proxy.exchanges)
        with pytest.raises(FileNotFoundError, match=f"no such object, or no such bucket: '{url}'"):
            PQKVFile(url)
        with pytest.raises(FileNotFoundError, match=url), remote.downloaded(url):
            pass
        assert not remote.exists(url)
        assert len(proxy.exchanges) - before <= 6  # of each the object, and whether it is a folder
    with pytest.raises(FileNotFoundError, match=r"uploading .*no such bucket: 's3://nobucket/none.pqkv'"):
        save(numbers(10), "s3://nobucket/none.pqkv")


def test_a_folder_is_no_object() -> None:
    save(numbers(10))
    for url in ("s3://bucket/folder", "s3://bucket/folder/", "s3://bucket"):
        with pytest.raises(IsADirectoryError, match=f"name an object in it: '{url}'"):
            PQKVFile(url)
    for url in ("s3://bucket/folder/", "s3://bucket"):
        with pytest.raises(IsADirectoryError, match=f"an object is to be written here: '{url}'"):
            save(numbers(10), url)


def test_wrong_credentials_are_told_at_once(server: tuple[str, int], proxy: servers.Proxy) -> None:
    save(numbers(10))

    def check_after(actions: str) -> None:
        place = "http://{}:{}/moto-api/reset-auth".format(*server)
        request = urllib.request.Request(place, actions.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=5).close()

    before = len(proxy.exchanges)
    check_after("0")
    try:
        for work in (loaded, lambda: save(numbers(20)), lambda: remote.exists(URL)):
            with pytest.raises(PermissionError, match=f"check the credentials, and what they allow: '{URL}'"):
                work()
    finally:
        check_after("inf")
    assert len(proxy.exchanges) - before == 3
    np.testing.assert_array_equal(loaded(), numbers(10))


def test_no_credentials_are_told_at_once(proxy: servers.Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("key", "secret"):
        del fsspec.config.conf["s3"][name]
    with pytest.raises(PermissionError, match=f"Unable to locate credentials.*check the credentials.*{URL}"):
        PQKVFile(URL)
    assert proxy.exchanges == []


# -- every container -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_every_container_lives_in_a_store(kind: str, proxy: servers.Proxy, store: s3fs.S3FileSystem) -> None:
    """Converted there and back within the store, read whole and in part; a connection that breaks is tried again."""
    pytest.importorskip("zarr", reason="needs zarr: pip install zarr") if kind == "zarr" else None
    tensors = np.random.default_rng(0).standard_normal((2, 1, 4, 600, 64)).astype(np.float16)
    save_cache(URL, [tuple(tensors)], **REFERENCE)
    url = f"s3://bucket/other/b.{kind}"
    convert(URL, url)
    convert(url, "s3://bucket/back.pqkv")
    assert store.cat("bucket/back.pqkv") == store.cat(KEY)
    expected = load_cache(URL, **REFERENCE)[0][0]
    with open_encoded(url) as file:
        assert file.verify(**REFERENCE) == []
        np.testing.assert_array_equal(file.decode("layers.0.key", **REFERENCE), expected)
    proxy.exchanges.clear()
    with open_encoded(url) as file:
        part = file.decode("layers.0.key", tokens=(100, 356), leading=(1, 2), **REFERENCE)
    np.testing.assert_array_equal(part[0], expected[0, 1, 100:356])
    assert sum(exchange.received for exchange in proxy.exchanges) < 0.7 * store.size(KEY)
    if kind != "zarr":  # whose own store tries again, or does not
        proxy.cut(1, after=20)
        assert [x.shape for x in layer_pairs(open_encoded(url), **REFERENCE)[0]] == [(1, 4, 600, 64)] * 2
