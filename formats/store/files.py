"""Law: what a store needs of a place for its blocks' files, and such a place: a local folder or a URL.

Each write has a name of its own, and what is written is there whole or not at all.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from pqcodec.errors import CorruptStream
from pqcodec.formats.containers.pqkv.file import PQKVFile
from pqcodec.formats.places import remote
from pqcodec.formats.places.atomic import make_folders, permissions
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.breaker import CircuitBreaker

GRACE = 3600.0  # seconds for which a file without a row may still be in the middle of being written
AT_ONCE = 8  # objects that are fetched at the same time
PATIENCE = remote.Patience(tries=2, connect=0.5, answer=2.0)  # with a URL, since generations wait for what is read


class Files(Protocol):
    """A place for the files of blocks; safe for threads, processes and forks.

    Every method raises CorruptStream for a name that no store gives to a file, and OSError.
    """

    location: str  # in messages

    def writing(self, file: str) -> AbstractContextManager[str]:
        """A context with the path or URL to write a block's file to, by which it is there when the context has ended."""

    def open(self, file: str) -> PQKVFile:
        """An open block's file; raises FileNotFoundError, and as ``PQKVFile`` does."""

    def opening(self, files: Sequence[str]) -> AbstractContextManager[Callable[[str], PQKVFile]]:
        """A function that opens each of ``files``, in order; they may be fetched ahead."""

    def remove(self, file: str) -> None:
        """Remove a block's file if it exists."""

    def check_there(self) -> None:
        """Raises OSError where the place itself is missing, which is not taken for the loss of all files."""

    def all(self) -> Iterator[tuple[str, float]]:
        """(file, seconds since it was written) of every block's file, also partial ones; 0 s where the age is unknown."""

    def complete(self) -> Iterator[str]:
        """Every complete block's file."""


class BlockFiles:
    """The block files below ``location``, a local folder or a URL; other files there are never touched.

    ``shared``: other users may read and write, as far as the umask allows. ``Files`` says what each method does. A URL out of
    reach costs one time-out, and calls raise OSError at once for a while (``breaker``).
    """

    def __init__(self, location: str | os.PathLike[str], shared: bool = False) -> None:
        location = os.fspath(location)
        self.location = location.removeprefix("file://").removeprefix("local://")  # so that local rules apply to these URLs too
        self.remote = remote.is_url(self.location)
        self.shared = shared
        self._breaker = CircuitBreaker()
        if self.remote:
            remote.check_url(self.location)

    @contextmanager
    def writing(self, file: str) -> Iterator[str]:
        """A context with the path or URL to write a block's file to; raises InvalidArgument where its folder is a link."""
        if self.remote:
            with self._asking():
                yield self._url(file)
            return
        path = self._local(file)
        make_folders(Path(self.location), own.SHARED if self.shared else own.PRIVATE)
        own.make_folder(path.parent, self.shared)
        with permissions(0o666 if self.shared else 0o600):
            yield str(path)

    def open(self, file: str) -> PQKVFile:
        """An open block's file; raises FileNotFoundError, CorruptStream for no regular file, and as ``PQKVFile`` does."""
        if self.remote:
            with self._asking():
                return PQKVFile(remote.read_all(self._url(file)).data)
        path = self._local(file)
        try:
            regular = own.is_regular(path)
        except FileNotFoundError:
            self.check_there()
            raise
        if not regular:
            raise CorruptStream(f"{path}: is no regular file in a folder of the store; it is not opened")
        return PQKVFile(path)

    @contextmanager
    def opening(self, files: Sequence[str]) -> Iterator[Callable[[str], PQKVFile]]:
        """A function that opens each of ``files``, in order; files of a URL are fetched ahead, several at once."""
        if not self.remote:
            yield self.open
            return
        with fetched_ahead(self.open, files) as opened:
            yield opened

    def check_there(self) -> None:
        """Raises OSError where a local folder of the files is missing, which is not taken for the loss of all of them."""
        if not self.remote and not os.path.isdir(self.location):
            text = "the folder of the store's files is missing: is it mounted? If the files are gone, make an empty folder"
            raise OSError(errno.ENODEV, text, self.location)

    def remove(self, file: str) -> None:
        """Remove a block's file if it exists; the target of a link, and a folder of that name, are left alone."""
        if self.remote:
            with self._asking():
                remote.remove(self._url(file))
            return
        path = self._local(file)
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path.parent).st_mode) and not stat.S_ISDIR(os.lstat(path).st_mode):
                path.unlink()

    def all(self) -> Iterator[tuple[str, float]]:
        """(file, seconds since it was written) of every block's file, also partial ones; 0 s where the age is unknown."""
        if self.remote:
            with self._asking():
                found = remote.ages(f"{self.location.rstrip('/')}/*/*{own.EXTENSION}")
            yield from ((file, age) for url, age in found if own.is_block_file(file := "/".join(url.split("/")[-2:])))
            return
        for path in Path(self.location).glob("??/*"):
            file = f"{path.parent.name}/{path.name}"
            if own.is_block_file(file) or own.is_partial_file(file):
                with suppress(FileNotFoundError):
                    if own.is_regular(path):
                        yield file, time.time() - path.lstat().st_mtime

    def complete(self) -> Iterator[str]:
        """Every complete block's file."""
        yield from (file for file, _ in self.all() if own.is_block_file(file))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A context of requests to the URL; raises OSError at once where it did not answer a moment ago."""
        if pause := self._breaker.remaining():
            raise OSError(errno.ECONNREFUSED, f"it did not answer, and is asked again in {pause:.1f} s", self.location)
        with remote.patience(PATIENCE):
            try:
                yield
            except ConnectionError:
                self._breaker.failed()
                raise
        self._breaker.answered()

    def _url(self, file: str) -> str:
        return f"{self.location.rstrip('/')}/{own.checked_block_file(file)}"

    def _local(self, file: str) -> Path:
        """The path of a block's file, or of a partial one that a killed writer left."""
        return Path(self.location, file if own.is_partial_file(file) else own.checked_block_file(file))


@contextmanager
def fetched_ahead(fetch: Callable[[str], PQKVFile], files: Sequence[str]) -> Iterator[Callable[[str], PQKVFile]]:
    """A function that gives what ``fetch`` gives for each of ``files``, in order; several are fetched at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        coming = {file: pool.submit(fetch, file) for file in files}
        try:
            yield lambda file: coming.pop(file).result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
