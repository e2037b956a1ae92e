"""Law: files of object stores and servers (``s3://``, ``memory://`` ...) through fsspec, whose only home this is.

Reads request only the bytes that are wanted. A file to be written is made on the local disk and uploaded when it is complete,
so that a half-written one never has the final name. Requests that fail with the connection are tried again, as often as the
caller's patience says. Endpoints and credentials are configured in fsspec: ``FSSPEC_S3_ENDPOINT_URL=http://host:9000`` or
``fsspec.config.conf["s3"]``.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from pqcodec.errors import InvalidArgument, TruncatedStream
from pqcodec.formats.places.atomic import replacing
from pqcodec.stream.source import check_range

TRIES = 4
PAUSE = 0.2  # seconds before the second try; doubled before each further one
PART = 16 << 20  # bytes of a part of an upload to S3; objects of two parts or more are uploaded so, several parts at once
PARTS_AT_ONCE = 8  # where s3fs sets no limit
MOST_PARTS = 10_000  # of an S3 object
FILES = {"sftp", "ssh", "ftp"}  # servers that show a file while it is written
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ClientAuthenticationError"}
S3 = ("s3", "s3a")
PACKAGES = {
    **dict.fromkeys(S3, "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "smb": "smbprotocol",
    "webdav": "webdav4",
}
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a scheme of two letters or more: C:/ is a disk
Result = TypeVar("Result")


# -- patience ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Patience:
    """How often a request is tried, and the seconds that it may take; no further try begins after ``answer`` seconds.

    ``connect``, ``answer``: seconds that S3 may take to connect, and between bytes; of other stores they are their packages'.
    """

    tries: int = TRIES
    connect: float = math.inf
    answer: float = math.inf

    def s3(self) -> dict[str, Any]:
        """Arguments of s3fs; time-outs that the user has configured in fsspec hold."""
        from fsspec.config import conf

        if math.isinf(self.answer):
            return {}
        own = {"connect_timeout": self.connect, "read_timeout": self.answer, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": own | (conf.get("s3", {}) | conf.get("s3a", {})).get("config_kwargs", {})}


USUAL = Patience()
_patience: ContextVar[Patience] = ContextVar("patience", default=USUAL)


@contextmanager
def patience(chosen: Patience) -> Iterator[None]:
    """A context whose requests, of this thread, have that patience."""
    before = _patience.set(chosen)
    try:
        yield
    finally:
        _patience.reset(before)


# -- URLs --------------------------------------------------------------------------------------------------------
def is_url(place: Any) -> bool:
    """Whether a path is a URL of fsspec, such as s3://bucket/key.

    Raises InvalidArgument for a URL with one slash, which ``pathlib`` makes of it: it would become a local folder called s3:.
    """
    if isinstance(place, str) and "://" in place:
        return True
    if isinstance(place, (str, os.PathLike)) and _ONE_SLASH.match(text := os.fsdecode(place)):
        raise InvalidArgument(
            f"{text}: looks like a URL with one slash; pass s3://... as a string, or ./{text} for a local path"
        )
    return False


def check_path(place: Any, name: str) -> None:
    """Raises InvalidArgument where an argument called ``name`` is neither a path nor a URL, is empty, or begins with ~/.

    A folder called ~ would else be made in the current one.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise InvalidArgument(f"{name} is a {type(place).__name__}; a path or URL is expected")
    text = os.fsdecode(place)
    if not text:
        raise InvalidArgument(f"{name} is empty; a path or URL is expected, and '.' for the current folder")
    if text.split("/")[0] == "~":
        advice = f"pass os.path.expanduser({text!r}), or './{text}' for a folder of that name"
        raise InvalidArgument(f"{name} {text}: only a shell makes your home folder of ~; {advice}")


def check_local(place: str | os.PathLike[str], what: str) -> None:
    """Raises InvalidArgument if ``place`` is a URL; ``what``: the end of the message, what has to be local and what to do."""
    if is_url(place):
        raise InvalidArgument(f"{place}: is a URL; {what}")


def check_url(url: str) -> None:
    """Raises InvalidArgument for a URL whose scheme is unknown or lacks its package; sends no request."""
    _file_system(url)


def exists(url: str) -> bool:
    """Whether an object, or a folder of objects, exists; raises OSError."""
    fs, path = _file_system(url)
    try:
        _info(fs, path, url)
    except FileNotFoundError:
        return False
    return True


def read_all(url: str) -> np.ndarray:
    """All bytes of an object, uint8 [size]; raises FileNotFoundError, or as ``RemoteSource`` does."""
    source = RemoteSource(url)
    return source.read(0, source.size)


def remove(url: str) -> None:
    """Remove an object; a missing one is no error."""
    fs, path = _file_system(url)
    with suppress(FileNotFoundError):
        _tried(url, "removing it", lambda: fs.rm_file(path))


def matching(pattern: str, folders: str = ".zarr") -> list[str]:
    """The URLs that match a pattern such as s3://bucket/caches/*.pqkv, sorted.

    Objects match; folders only if their names end in ``folders``.
    """
    fs, path = _file_system(pattern)
    found = _fitting(fs, path, pattern)
    names = [name for name, info in found.items() if info["type"] != "directory" or name.lower().endswith(folders)]
    head, fits, _ = pattern.rpartition(path.lstrip("/"))
    return sorted(head + name.lstrip("/") if fits else fs.unstrip_protocol(name) for name in names)


def ages(pattern: str) -> list[tuple[str, float]]:
    """(path, seconds since it was written) of every object that matches a pattern; 0 s where the store keeps no time."""
    fs, path = _file_system(pattern)
    now = time.time()

    def age(info: dict[str, Any]) -> float:
        written = next(
            (info[key] for key in ("LastModified", "updated", "last_modified", "mtime", "created") if info.get(key)), now
        )
        seconds = written.timestamp() if hasattr(written, "timestamp") else written
        return now - seconds if isinstance(seconds, (int, float)) else 0.0

    return [(name, age(info)) for name, info in _fitting(fs, path, pattern).items() if info["type"] != "directory"]


def _fitting(fs: Any, path: str, pattern: str) -> dict[str, dict[str, Any]]:
    def look() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        return dict(fs.glob(path, detail=True))

    return _tried(pattern, "looking for what fits it", look)


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.split("://")[0].split("::")[-1]
    package = PACKAGES.get(protocol, "")
    install = f"pip install 'pqcodec[remote]' {package}".strip()
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise InvalidArgument(f"{url}: URLs need fsspec: {install}") from error
    patience = _patience.get()
    try:
        fs, path = fsspec.core.url_to_fs(url, **(patience.s3() if protocol in S3 else {}))
    except ImportError as error:
        raise InvalidArgument(f"{url}: {protocol}:// needs a package that is missing ({error}): {install}") from error
    except ValueError as error:
        raise InvalidArgument(f"{url}: {error}") from error
    if protocol in S3 and math.isfinite(patience.answer):
        fs.retries = 1  # of each request that is tried here
    return fs, path


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _info(fs: Any, path: str, url: str) -> dict[str, Any]:
    """fsspec's description of an object, asked for anew."""

    def ask() -> Any:
        fs.invalidate_cache(path)
        return fs.info(path)

    return dict(_tried(url, "asking for its size", ask))


def _object_size(fs: Any, path: str, url: str) -> int | None:
    """Bytes of an object; None where the server does not report them."""
    info = _info(fs, path, url)
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "is a folder of the store, not an object; name an object in it", url)
    size = info.get("size")
    return None if size is None else int(size)


def _local_name(url: str) -> str:
    return "file" + PurePosixPath(url.split("?")[0]).suffix


# -- trying again ------------------------------------------------------------------------------------------------
def _tried(url: str, what: str, work: Callable[[], Result], advice: str = "is the store there?") -> Result:
    """The result of ``work``, tried as often as patience says.

    Raises ConnectionError, or at once an error that another try cannot mend.
    """
    patience, begun = _patience.get(), time.monotonic()
    for number in range(patience.tries):
        try:
            return work()
        except Exception as error:  # what stores raise is of many kinds: botocore's, aiohttp's, the system's
            if lasting := _lasting(error, url, what):
                raise lasting from error
            if number + 1 == patience.tries or time.monotonic() > begun + patience.answer:
                times = f"failed {number + 1} times, the last time with {error!r}"
                raise ConnectionError(f"{url}: {what} {times}; {advice}") from error
            time.sleep(PAUSE * 2**number)
    raise AssertionError


def _lasting(error: Exception, url: str, what: str) -> Exception | None:
    """The error to raise where another try cannot help; None where it may."""
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    if status == "416" or "InvalidRange" in str(error.__cause__):
        return TruncatedStream(f"{url}: {what}: the store has no such bytes; has the file changed meanwhile?")
    if isinstance(error, FileNotFoundError):
        if "NoSuchUpload" in str(error.__cause__):  # an earlier request ended the upload, and its answer was lost
            return None
        return FileNotFoundError(errno.ENOENT, f"{what}: the store has no such object, or no such bucket", url)
    if isinstance(error, PermissionError) or type(error).__name__ in NO_CREDENTIALS or status in ("401", "403"):
        hint = "check the credentials, and what they allow"
        return PermissionError(errno.EACCES, f"{what}: the store does not allow it ({error}); {hint}", url)
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return type(error)(error.errno or errno.EISDIR, f"{what}: {error}", url)
    return None


# -- reading -----------------------------------------------------------------------------------------------------
class RemoteSource:
    """The bytes of a URL, read by range; a ``Source``.

    Raises FileNotFoundError, IsADirectoryError, PermissionError or OSError; InvalidArgument where the server reports no size.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = _file_system(url)
        size = _object_size(self._fs, self._path, url)
        if size is None:
            raise InvalidArgument(f"{url}: the server does not tell the size, so no parts can be read; download the file first")
        self.size = size

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count] from byte ``start``, by one request; raises TruncatedStream or OSError."""
        check_range(start, count, self.size)
        if not count:
            return np.zeros(0, np.uint8)
        what = f"reading bytes {start} .. {start + count}"
        data = _tried(self._url, what, lambda: self._fs.cat_file(self._path, start=start, end=start + count))
        return self._checked(data, start, count)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """uint8 [count] of each (start, count), all requested at once; ranges that touch or overlap share a request."""
        ranges = [(int(start), int(count)) for start, count in ranges]
        requests: list[list[int]] = []  # [start, end]
        homes: dict[tuple[int, int], list[int]] = {}  # the request that covers each range
        for start, count in sorted(set(ranges)):
            check_range(start, count, self.size)
            if not count:
                continue
            if requests and start <= requests[-1][1]:
                requests[-1][1] = max(requests[-1][1], start + count)
            else:
                requests.append([start, start + count])
            homes[start, count] = requests[-1]
        if len(requests) == 1:
            first, end = requests[0]
            came = {first: self.read(first, end - first)}
        else:
            came = self._requested(requests)

        def part(start: int, count: int) -> np.ndarray:
            first = homes[start, count][0]
            return came[first][start - first : start - first + count]

        return [part(start, count) if count else np.zeros(0, np.uint8) for start, count in ranges]

    def _requested(self, requests: list[list[int]]) -> dict[int, np.ndarray]:
        """The bytes of each [start, end] by its start; only the requests that failed are repeated."""
        came: dict[int, bytes] = {}

        def ask() -> None:
            rest = [(start, end) for start, end in requests if start not in came]
            starts, ends = [start for start, _ in rest], [end for _, end in rest]
            found = self._fs.cat_ranges([self._path] * len(rest), starts, ends, on_error="return")
            errors = [data for data in found if isinstance(data, BaseException)]
            came.update({start: data for start, data in zip(starts, found, strict=True) if not isinstance(data, BaseException)})
            if errors:
                raise errors[0]

        if requests:
            total = sum(end - start for start, end in requests)
            _tried(self._url, f"reading {total} bytes in {len(requests)} requests", ask)
        return {start: self._checked(came[start], start, end - start) for start, end in requests}

    def _checked(self, data: bytes, start: int, count: int) -> np.ndarray:
        if len(data) != count:
            what = f"reading bytes {start} .. {start + count}"
            ranges = " Or does the server not know ranges?" if len(data) > count else ""
            raise TruncatedStream(f"{self._url}: {what}: {len(data)} came; has the file changed meanwhile?" + ranges)
        return np.frombuffer(data, np.uint8)


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """A temporary local copy of a URL with the same extension, removed when the block ends; raises as ``RemoteSource`` does."""
    fs, path = _file_system(url)
    size = _object_size(fs, path, url)
    with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:
        local = Path(folder) / _local_name(url)

        def fetch() -> None:
            fs.get_file(path, str(local))
            if size not in (None, came := os.path.getsize(local)):
                raise ConnectionError(f"{came} bytes came, {size} are there")

        _tried(url, "downloading it", fetch)
        yield local


# -- writing -----------------------------------------------------------------------------------------------------
def placing(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """A local path to write to; its content replaces a path or URL when the block succeeds (``replacing``, ``uploading``).

    Raises InvalidArgument as ``check_path`` does.
    """
    check_path(path, "path")
    return uploading(str(path)) if is_url(path) else replacing(path)


@contextmanager
def uploading(url: str) -> Iterator[Path]:
    """A local path to write to; it is uploaded to ``url`` when the block succeeds, and removed in any case. Raises OSError."""
    fs, path = _file_system(url)
    if url.endswith("/") or (hasattr(fs, "split_path") and not fs.split_path(path)[1]):
        raise IsADirectoryError(errno.EISDIR, "is a folder of the store, an object is to be written here", url)
    if "file" in _protocols(fs):
        with replacing(path) as local:
            yield local
        return
    with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:
        local = Path(folder) / _local_name(url)
        yield local
        _upload(fs, path, url, local)


def _upload(fs: Any, path: str, url: str, local: Path) -> None:
    """Upload a local file, whole or not at all."""
    size = os.path.getsize(local)
    begun: list[dict[str, Any]] = []  # uploads in parts that were begun and not completed

    def put() -> None:
        if size >= 2 * PART and hasattr(fs, "call_s3"):
            _put_in_parts(fs, path, local, size, begun)
        elif _protocols(fs) & FILES:
            _put_beside(fs, path, local)
        else:
            fs.put_file(str(local), path)  # an object store shows an object only when all of it has arrived

    advice = "is the store there? Nothing half-written stands under this name: write it again"
    try:
        _tried(url, f"uploading {size} bytes", put, advice)
    finally:
        _abort(fs, begun)


def _put_in_parts(fs: Any, path: str, local: Path, size: int, begun: list[dict[str, Any]]) -> None:
    """Upload to S3 in parts, which a last request joins into the object.

    s3fs does so too, but on an error aborts only once, while parts are still being sent, and forgets the upload if that fails.
    """
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    upload = {**place, "UploadId": fs.call_s3("create_multipart_upload", **place)["UploadId"]}
    begun.append(upload)
    part_bytes = max(PART, math.ceil(size / MOST_PARTS))

    def send(number: int) -> dict[str, Any]:
        with open(local, "rb") as file:
            file.seek((number - 1) * part_bytes)
            body = file.read(part_bytes)
        return {"PartNumber": number, "ETag": fs.call_s3("upload_part", PartNumber=number, Body=body, **upload)["ETag"]}

    with ThreadPoolExecutor(getattr(fs, "max_concurrency", PARTS_AT_ONCE)) as pool:
        parts = list(pool.map(send, range(1, math.ceil(size / part_bytes) + 1)))
    fs.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
    begun.remove(upload)
    fs.invalidate_cache(path)


def _abort(fs: Any, begun: list[dict[str, Any]]) -> None:
    """Abort unfinished uploads: the store would keep their parts, invisible and charged for."""
    for upload in begun:
        try:
            fs.call_s3("abort_multipart_upload", **upload)
        except FileNotFoundError:  # the upload was completed, and only the answer was lost
            continue
        except Exception:  # the store is out of reach, which the upload's own error reports
            return


def _put_beside(fs: Any, path: str, local: Path) -> None:
    """Upload a file under a temporary name in the same folder and rename it when it is complete."""
    name = path.rpartition("/")[2]
    temporary = f"{path.removesuffix(name)}.{name[:200]}.{secrets.token_hex(4)}.part"
    try:
        fs.put_file(str(local), temporary)
        fs.mv(temporary, path)
    except BaseException:
        with suppress(Exception):
            fs.rm_file(temporary)
        raise
