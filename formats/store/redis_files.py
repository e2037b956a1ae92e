"""Law: the files of blocks as values of Redis, for stores of small blocks; ``BlockFiles`` are those of all other places."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pqcodec.formats.containers.pqkv.file import PQKVFile
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.files import fetched_ahead
from pqcodec.formats.store.redis_index import RedisIndex


class RedisFiles:
    """The block files beside an index in Redis, under the keys ``file:NAME``, with the time of each in ``files``.

    ``Files`` says what each method does.
    """

    def __init__(self, index: RedisIndex) -> None:
        self._index, self.location = index, index.label

    @contextmanager
    def writing(self, file: str) -> Iterator[str]:
        """A context with a path to write a block's file to; what is there at its end becomes the value."""
        key = self._key(file)
        with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:  # of this user alone
            path = Path(folder, "block")
            yield str(path)
            with self._index.named():
                done = self._index.client.pipeline()
                done.set(key, path.read_bytes())
                done.zadd(self._index.key("files"), {file: time.time()})
                done.execute()

    def open(self, file: str) -> PQKVFile:
        """An open block's file; raises FileNotFoundError, and as ``PQKVFile`` does."""
        key = self._key(file)
        with self._index.named():
            data = self._index.client.get(key)
        if data is None:
            raise FileNotFoundError(f"{self.location}: has no file {file}")
        return PQKVFile(data)

    def opening(self, files: Sequence[str]) -> AbstractContextManager[Callable[[str], PQKVFile]]:
        """A function that opens each of ``files``, in order; they are fetched ahead, several at once."""
        return fetched_ahead(self.open, files)

    def remove(self, file: str) -> None:
        """Remove a block's file if it exists."""
        with self._index.named():
            done = self._index.client.pipeline(transaction=False)  # a server whose memory is full takes no transaction
            done.delete(self._key(file))
            done.zrem(self._index.key("files"), file)
            done.execute()

    def check_there(self) -> None:
        """The server is there, if it is asked."""

    def all(self) -> Iterator[tuple[str, float]]:
        """(file, seconds since it was written) of every block's file."""
        with self._index.named():
            found = self._index.client.zrange(self._index.key("files"), 0, -1, withscores=True)
        for name, written in found:
            if own.is_block_file(file := name.decode(errors="replace")):
                yield file, time.time() - written

    def complete(self) -> Iterator[str]:
        """Every block's file."""
        yield from (file for file, _ in self.all())

    def _key(self, file: str) -> bytes:
        return self._index.key("file", own.checked_block_file(file).encode())
