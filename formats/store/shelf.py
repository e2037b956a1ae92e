"""Law: blocks that are committed: their rows and their files together, what is dropped and when, and how damage is found.

Nothing here knows models or caches. A block's file is written before its row and removed after it, so that whoever finds a row
finds a file, or learns that another process has dropped both meanwhile.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.store.blocks import row_in
from pqcodec.formats.store.files import GRACE, BlockFiles
from pqcodec.formats.store.index import Index, Row

INDEX, LOCK = "index.sqlite", "lock"


class Shelf:
    """The blocks of a store's folder; ``data``: a folder or URL for their files, which the folder remembers.

    An index that is missing or damaged is made anew from the files. Raises InvalidArgument where the folder's files are known
    to lie elsewhere than in ``data``, OSError, and UnsupportedStream for an index of a newer version.
    """

    def __init__(self, folder: str | os.PathLike[str], data: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index, damage = self._opened()
        if data is not None and self.index.data not in (None, os.fspath(data)):
            self.index.close()
            raise InvalidArgument(f"{folder}: the files of this store lie in {self.index.data}, not in {data}")
        if data is not None and self.index.data is None:
            self.index.set_data(os.fspath(data))
        self.files = BlockFiles(self.index.data or self.folder / "blocks")
        if self.index.new:
            self._refill(damage)

    def close(self) -> None:
        self.index.close()

    # -- blocks --------------------------------------------------------------------------------------------------
    def commit(self, row: Row) -> bool:
        """Add the row of a block whose file is written; False, and the file is gone, where the block is there already."""
        if self.index.add(row):
            return True
        there = self.index.find(row.name)
        if there is None or there.file != row.file:  # not one that was found by its file, when the index was made anew
            self.files.remove(row.file)
        return False

    def drop(self, row: Row) -> bool:
        """Take a block out; False where another process has done so. Blocks behind it are usable once it is there again."""
        done = self.index.remove(row)
        if done:
            self.files.remove(row.file)
        return done

    def give_up(self, row: Row, error: Exception) -> None:
        """A block cannot be read: warn, and drop it if it is damaged, unless another process has dropped it meanwhile."""
        what = f"block {row.name.hex()[:16]} (tokens {row.start} to {row.end - 1}) of {self.folder}"
        if isinstance(error, (CorruptStream, FileNotFoundError)):
            if not self.drop(row):
                return
            self.index.touch([], damaged=1)
            text = f"{what} is damaged and was dropped; its tokens will be computed anew: {error}"
        else:
            text = f"{what} cannot be read, the prefix ends before it: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)

    # -- the quota -----------------------------------------------------------------------------------------------
    @property
    def max_bytes(self) -> int | None:
        """The quota of the folder; None: there is none."""
        return self.index.counters().get("max_bytes")

    def evict(self) -> int:
        """Drop the prefixes that were used longest ago, from their ends on, until the quota holds; returns bytes."""
        freed = 0
        limit = self.max_bytes
        while limit is not None and self.index.counters()["bytes"] > limit:
            row = self.index.coldest()
            if row is None:
                text = f"{self.folder} is over its quota of {limit} bytes, and all of it is pinned"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
                break
            if self.drop(row):
                freed += row.size
                self.index.touch([], evicted=1)
        return freed

    # -- upkeep --------------------------------------------------------------------------------------------------
    def problems(self, row: Row, backend: str = "auto") -> list[str]:
        """What is wrong with a block, checked byte by byte; nothing is dropped. Raises OSError for a file out of reach."""
        try:
            with self.files.open(row.file) as file:
                found, _ = row_in(file, row.file)
                damage = file.verify(backend=backend)
        except (CorruptStream, UnsupportedStream, FileNotFoundError) as error:
            return [str(error)]
        wrong = [f"{'' if name is None else f'tensor {name!r}: '}{what}" for name, what in damage]
        same = (found.name, found.parent, found.start) == (row.name, row.parent, row.start)
        return wrong if same and np.array_equal(found.tokens, row.tokens) else [*wrong, "is another block"]

    def gc(self, grace: float = GRACE) -> dict[str, int]:
        """Remove files that no row has, rows without a file, and what is over the quota; returns how many of each.

        Files younger than ``grace`` seconds stay: they may be being written.
        """
        before = self.index.all()
        there = dict(self.files.all())
        owned = {row.file for row in self.index.all()}  # by now, for blocks are committed meanwhile
        orphans = [file for file, age in there.items() if file not in owned and age >= grace]
        for file in orphans:
            self.files.remove(file)
        missing = sum(self.drop(row) for row in before if row.file not in there)
        return {"orphans": len(orphans), "missing": missing, "evicted_bytes": self.evict()}

    # -- the index -----------------------------------------------------------------------------------------------
    def _opened(self) -> tuple[Index, str]:
        """The index, and what was wrong with the one that was there: it is set aside."""
        path = self.folder / INDEX
        mark = Index.damage_mark(path)
        with _only_one(self.folder / LOCK):
            try:
                if not mark.exists():
                    return Index(path), ""
            except CorruptStream:
                pass
            aside = path.with_name(f"{INDEX}.damaged-{int(time.time())}")
            if path.exists():
                os.replace(path, aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(INDEX + suffix).unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
            return Index(path), f"{path} was damaged and is set aside as {aside.name}"

    def _refill(self, damage: str) -> None:
        """Rows for every file that says which block it is, in an index that is new."""
        count = 0
        for file in self.files.complete():
            try:
                with self.files.open(file) as opened:
                    row, about = row_in(opened, file)
            except (CorruptStream, UnsupportedStream, FileNotFoundError):
                continue
            self.index.add_root(row.root, about["label"], about["settings"])
            count += self.index.add(row)
        if damage or count:
            text = f"{damage or f'{self.folder / INDEX} was missing'}: {count} blocks were found again by their files"
            warnings.warn(text, RuntimeWarning, stacklevel=4)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """One process at a time, where the system can tell (POSIX)."""
    with open(lock, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
