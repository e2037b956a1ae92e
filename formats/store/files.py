"""Law: where the files of blocks are: below a folder, or below a URL of fsspec; each under a name that is used once."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from pqcodec.formats import remote
from pqcodec.formats.pqkv import PQKVFile

EXTENSION = ".pqkv"
GRACE = 3600.0  # seconds for which a file without a row may be one that is being written
AT_ONCE = 8  # objects of a store that are fetched at the same time
_COMPLETE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}-[0-9a-f]{12}\.pqkv")
_PARTIAL = re.compile(r"[0-9a-f]{2}/\.[0-9a-f]{64}-[0-9a-f]{12}\.pqkv\.[0-9a-f]+\.part")


class BlockFiles:
    """Block files below ``place``, a local folder or a URL. What else is there is never touched."""

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
    def opening(self, files: Sequence[str]) -> Iterator[Callable[[str], PQKVFile]]:
        """Opens files that are wanted one after the other; those of a URL are fetched some at once, ahead of their turn."""
        if not self.remote:
            yield self.open
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            coming = {file: pool.submit(self.open, file) for file in files}
            try:
                yield lambda file: coming.pop(file).result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def remove(self, file: str) -> None:
        if self.remote:
            remote.remove(self.path(file))
        else:
            Path(self.place, file).unlink(missing_ok=True)

    def all(self) -> Iterator[tuple[str, float]]:
        """(file, seconds since it was written) of every file that a store wrote here; the age is 0 where it is not known."""
        if self.remote:
            found = remote.ages(self.path(f"*/*{EXTENSION}"))
            yield from ((file, age) for url, age in found if _COMPLETE.fullmatch(file := "/".join(url.split("/")[-2:])))
            return
        for path in Path(self.place).glob("??/*"):
            file = f"{path.parent.name}/{path.name}"
            if _COMPLETE.fullmatch(file) or _PARTIAL.fullmatch(file):
                with suppress(FileNotFoundError):
                    yield file, time.time() - path.stat().st_mtime

    def complete(self) -> Iterator[str]:
        """Every file that was written to its end."""
        yield from (file for file, _ in self.all() if _COMPLETE.fullmatch(file))
