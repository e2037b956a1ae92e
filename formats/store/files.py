"""Law: where the files of blocks are: below a folder, or below a URL of fsspec; each under a name that is used once."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pqcodec.formats import remote
from pqcodec.formats.pqkv import PQKVFile

EXTENSION = ".pqkv"
AT_ONCE = 8  # objects of a store that are fetched at the same time
GRACE = 3600.0  # seconds for which a file without a row may be one that is being written


class BlockFiles:
    """Block files below ``place``, a local folder or a URL."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = os.fspath(place)
        self.remote = remote.is_url(self.place)

    def new(self, name: bytes) -> str:
        """A name for a block's file that no other write has."""
        text = name.hex()
        return f"{text[:2]}/{text}-{secrets.token_hex(6)}{EXTENSION}"

    def path(self, file: str) -> str:
        """Where a file is; its folder exists."""
        if self.remote:
            return f"{self.place.rstrip('/')}/{file}"
        path = Path(self.place, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def open(self, file: str) -> PQKVFile:
        """Raises FileNotFoundError, and as ``PQKVFile`` does."""
        return PQKVFile(remote.fetched(self.path(file)).data) if self.remote else PQKVFile(Path(self.place, file))

    @contextmanager
    def opened(self, files: Sequence[str]) -> Iterator[Callable[[str], PQKVFile]]:
        """Opens files that are wanted one after the other; a store's are fetched some at once, ahead of their turn."""
        with ExitStack() as stack:
            if not self.remote:
                yield lambda file: stack.enter_context(self.open(file))
                return
            pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
            coming = {file: pool.submit(self.open, file) for file in files}
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            yield lambda file: coming[file].result()

    def remove(self, file: str) -> None:
        if self.remote:
            remote.remove(self.path(file))
        else:
            Path(self.place, file).unlink(missing_ok=True)

    def all(self) -> Iterator[tuple[str, float]]:
        """(file, seconds since it was written) of every file, unfinished ones too; of a URL the age is infinite."""
        if self.remote:
            for url in remote.matching(self.path("**" + EXTENSION)):
                yield url.removeprefix(self.place.rstrip("/") + "/"), float("inf")
            return
        for folder, _, names in os.walk(self.place):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    yield str(path.relative_to(self.place)), time.time() - path.stat().st_mtime
