"""Law: blocks that are committed: their rows and their files together, what is dropped and when, and how damage is found.

Nothing here knows models or caches. A block's file is written before its row and removed after it, so that whoever finds a row
finds a file, or learns that another process has dropped both meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.store.blocks import row_in
from pqcodec.formats.store.files import EXTENSION, GRACE, BlockFiles
from pqcodec.formats.store.index import Index, Row

INDEX, LOCK = "index.sqlite", "lock"
UNREADABLE = (CorruptStream, UnsupportedStream, OSError)


class Shelf:
    """The blocks of a store's folder; ``data``: a folder or URL for their files, where they are not in the folder itself."""

    def __init__(self, folder: str | os.PathLike[str], data: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = BlockFiles(self.folder / "blocks" if data is None else data)
        self.index = self._opened()

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
        """Drop a block that cannot be read, with a warning, unless another process has dropped it meanwhile."""
        if self.drop(row):
            self.index.touch([], damaged=1)
            warnings.warn(
                f"block {row.name.hex()[:16]} (tokens {row.start} to {row.end - 1}) of {self.folder} is damaged and was "
                f"dropped; its tokens will be computed anew: {error}",
                RuntimeWarning,
                stacklevel=5,
            )

    def remove(self, row: Row) -> list[Row]:
        """Drop a block and all that follow it, the last ones first; returns them."""
        found = [row]
        for at in found:
            found += self.index.children(at.name)
        return [at for at in reversed(found) if self.drop(at)]

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
        """What is wrong with a block, checked byte by byte; nothing is dropped."""
        try:
            with self.files.open(row.file) as file:
                found, _ = row_in(file, row.file)
                wrong = [str(damage) for _, damage in file.verify(backend=backend)]
        except UNREADABLE as error:
            return [str(error)]
        same = (found.name, found.parent, found.start) == (row.name, row.parent, row.start)
        return wrong if same and np.array_equal(found.tokens, row.tokens) else [*wrong, "is another block"]

    def gc(self, grace: float = GRACE) -> dict[str, int]:
        """Remove files that no row has, rows without a file, and what is over the quota; returns how many of each.

        Files younger than ``grace`` seconds stay: they may be being written.
        """
        rows = {row.file: row for row in self.index.all()}
        there = dict(self.files.all())
        orphans = [file for file, age in there.items() if file not in rows and age >= grace]
        for file in orphans:
            self.files.remove(file)
        missing = sum(self.drop(row) for file, row in rows.items() if file not in there)
        return {"orphans": len(orphans), "missing": missing, "evicted_bytes": self.evict()}

    # -- the index -----------------------------------------------------------------------------------------------
    def _opened(self) -> Index:
        """The index; where it is missing or damaged, it is made anew from the blocks' files."""
        path = self.folder / INDEX
        with _only_one(self.folder / LOCK):
            try:
                index, damage = Index(path), None
            except sqlite3.OperationalError as error:  # locked, no space, no permission: nothing is damaged
                raise OSError(f"{path}: {error}") from error
            except sqlite3.DatabaseError as error:
                aside = path.with_name(f"{INDEX}.damaged-{int(time.time())}")
                os.replace(path, aside)
                for suffix in ("-wal", "-shm"):
                    path.with_name(INDEX + suffix).unlink(missing_ok=True)
                index, damage = Index(path), f"{path} was damaged ({error}) and is set aside as {aside.name}"
            found = self._refill(index) if index.new else 0
        if damage or found:
            text = f"{damage or f'{path} was missing'}: {found} blocks were found again by their files"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        return index

    def _refill(self, index: Index) -> int:
        """Rows for every file that says which block it is; returns how many."""
        count = 0
        for row, about in self._found():
            index.add_root(row.root, about["label"], about["settings"])
            count += index.add(row)
        return count

    def _found(self) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Every file that says which block it is."""
        for file, _ in self.files.all():
            if file.endswith(EXTENSION):
                try:
                    with self.files.open(file) as opened:
                        yield row_in(opened, file)
                except UNREADABLE:
                    continue


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """One process at a time, where the system can tell (POSIX)."""
    with open(lock, "a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
