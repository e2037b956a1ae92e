"""Law: files of object stores and servers (``s3://``, ``memory://`` ...) through fsspec, whose only home this is.

Reading asks for the bytes that are wanted and no others. A file to be written is made on the local disk and uploaded when it is
complete, so that a half-written one never stands under the final name. What a connection breaks is tried again.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pqcodec.errors import InvalidArgument, TruncatedStream
from pqcodec.source import check_range

TRIES = 4
PAUSE = 0.2  # seconds before the second try; doubled before each other one
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # errors that another try does not mend
Result = TypeVar("Result")


def is_url(place: Any) -> bool:
    """Whether a path is a URL of fsspec, such as s3://bucket/key."""
    return isinstance(place, str) and "://" in place


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise InvalidArgument(f"{url}: URLs need fsspec: pip install 'pqcodec[remote]'") from error
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise InvalidArgument(f"{url}: {error}") from error


def _tried(url: str, what: str, work: Callable[[], Result]) -> Result:
    """The result of ``work``, which is tried again where a connection fails."""
    for left in reversed(range(TRIES)):
        try:
            return work()
        except LASTING:
            raise
        except Exception as error:  # what stores raise is of many kinds: botocore's, aiohttp's, the system's
            if not left:
                raise OSError(
                    f"{url}: {what} failed {TRIES} times, the last time with {error!r}; is the store there?"
                ) from error
            time.sleep(PAUSE * 2 ** (TRIES - 1 - left))
    raise AssertionError


class RemoteSource:
    """The bytes of a URL, read by place."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = _file_system(url)
        self.size = int(_tried(url, "asking for its size", lambda: self._fs.info(self._path))["size"])

    def read(self, start: int, count: int) -> np.ndarray:
        check_range(start, count, self.size)
        if not count:
            return np.zeros(0, np.uint8)
        what = f"reading bytes {start} .. {start + count}"
        data = _tried(self._url, what, lambda: self._fs.cat_file(self._path, start=start, end=start + count))
        if len(data) != count:
            raise TruncatedStream(f"{self._url}: {what}: {len(data)} came; has the file changed meanwhile?")
        return np.frombuffer(data, np.uint8)


@contextmanager
def uploading(url: str) -> Iterator[Path]:
    """A local path to write to; it is uploaded to ``url`` when the block ends well, and removed in any case."""
    fs, path = _file_system(url)
    with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:
        local = Path(folder) / "file"
        yield local
        _tried(url, f"uploading {os.path.getsize(local)} bytes", lambda: fs.put_file(str(local), path))
