"""Law: the committed blocks of a store's folder, rows and files together: commit, drop, quota, damage and leftovers.

This module does not depend on models or caches. A block's file is written before its row and removed after it: a row without a
file means that another process has just dropped the block.
"""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.places import remote
from pqcodec.formats.places.atomic import make_folders
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.blocks import row_in
from pqcodec.formats.store.files import GRACE, BlockFiles
from pqcodec.formats.store.index import Index, Row

INDEX, LOCK, BLOCKS = "index.sqlite", "lock", "blocks"
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO}  # a store can still be read


class Shelf:
    """The blocks of a store's folder; ``data``: the folder or URL of their files, to be passed whenever the store is opened.

    ``shared``: other users may use the store, as far as the umask allows; otherwise new files are private. A missing or
    damaged index is rebuilt from the files. Where the folder cannot be written (a read-only mount, another user's, a full
    disk), it can be read, and methods that change it raise OSError. Raises InvalidArgument for a URL as the folder, for links
    in it, and where the index records another place of the files than ``data``; OSError; and UnsupportedStream for an index
    of a newer version.
    """

    def __init__(
        self, folder: str | os.PathLike[str], data: str | os.PathLike[str] | None = None, *, shared: bool = False
    ) -> None:
        remote.check_path(folder, "folder")
        if data is not None:
            remote.check_path(data, "data")
        remote.check_local(folder, "the index of a store is in a local folder; pass the URL of its files as data (--data)")
        self.folder, self._shared = Path(folder), shared
        own.check_folder(self.folder)
        self.denied: OSError | None = None  # why the store can only be read
        self.index, damage = self._opened()
        try:
            self._check_data(None if data is None else os.fspath(data))
            if data is None and self.denied is None:
                own.make_folder(self.folder / BLOCKS, shared)
            self.files = BlockFiles(self.folder.absolute() / BLOCKS if data is None else data, shared)
        except BaseException:
            self.index.close()
            raise
        if self.index.new:
            self._refill(damage)

    def _check_data(self, data: str | None) -> None:
        """Record a new ``data``, or raise InvalidArgument where the index records another: only the user's word is followed."""
        recorded = self.index.data
        if recorded is None and data is not None and self.denied is None:
            self.index.set_data(data)
        elif recorded is not None and data is None:
            raise InvalidArgument(
                f"{self.folder}: its index says that its files lie in {recorded}; pass data={recorded!r} (--data) if so"
            )
        elif recorded != data:
            raise InvalidArgument(
                f"{self.folder}: the files of this store lie in {recorded or self.folder / BLOCKS}, not in {data}"
            )

    def close(self) -> None:
        """Close the index; later calls raise InvalidArgument."""
        self.index.close()

    # -- blocks --------------------------------------------------------------------------------------------------
    def commit(self, row: Row) -> bool:
        """Add the row of a block whose file is written; False, and the file is removed, if the block exists already."""
        if self.index.add(row):
            return True
        there = self.index.find(row.name)
        if there is None or there.file != row.file:  # equal if a rebuilt index found this very file
            self.files.remove(row.file)
        return False

    def drop(self, row: Row) -> bool:
        """Remove a block and its file; False where another process has done so.

        Blocks that follow it cannot be found until it is stored again.
        """
        done = self.index.remove(row)
        if done:
            self.files.remove(row.file)
        return done

    def give_up(self, row: Row, error: Exception) -> None:
        """Warn that a block cannot be read because of ``error``, and drop it if that is damage.

        Silent where another process has dropped it meanwhile. Raises nothing: a block that cannot be dropped stays.
        """
        what = f"block {row.name.hex()[:16]} (tokens {row.start} to {row.end - 1}) of {self.folder}"
        if isinstance(error, (CorruptStream, FileNotFoundError)):
            try:
                if not self.index.remove(row, little=True):
                    return
                self.index.touch([], damaged=1)
                text = f"{what} is damaged and was dropped; its tokens will be computed anew: {error}"
                with suppress(OSError):  # ``gc`` removes a file that stays
                    self.files.remove(row.file)
            except (OSError, CorruptStream) as problem:
                text = f"{what} is damaged, and cannot be dropped ({problem}); the prefix ends before it: {error}"
        else:
            text = f"{what} cannot be read, the prefix ends before it: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)

    # -- the quota -----------------------------------------------------------------------------------------------
    @property
    def max_bytes(self) -> int | None:
        """The quota in bytes; None: no quota."""
        return self.index.counters().get("max_bytes")

    def available_bytes(self, names: Collection[bytes] = ()) -> int | None:
        """Bytes available to a prefix: the quota less pinned blocks and their ancestors, except those in ``names``.

        None: no quota.
        """
        limit = self.max_bytes
        return None if limit is None else limit - sum(size for name, size in self.index.held().items() if name not in names)

    def evict(self) -> int:
        """Drop least recently used blocks, last blocks of prefixes first, until the quota holds; returns the bytes freed.

        Warns where the quota cannot be reached.
        """
        freed, why = 0, ""
        limit = self.max_bytes
        while limit is not None and not why and self.index.counters().get("bytes", 0) > limit:
            row = self.index.coldest()
            if row is None:
                why = self._why_nothing_goes()
                break
            try:
                if self.index.remove(row):
                    self.index.touch([], evicted=1)
                    self.files.remove(row.file)
                    freed += row.size
            except OSError as error:
                why = f"block {row.name.hex()[:16]} cannot be removed: {error}"
        if why:
            warnings.warn(f"{self.folder} is over its quota of {limit} bytes, and {why}", RuntimeWarning, stacklevel=4)
        return freed

    def _why_nothing_goes(self) -> str:
        """Why no block can be evicted, in words."""
        rows, held = self.index.all(), self.index.held()
        free = [row for row in rows if row.name not in held]
        if rows and not free:
            return "all of it is pinned"
        return f"none of its {len(free)} blocks that are not pinned ends a prefix, as no store writes it; move the index away"

    # -- upkeep --------------------------------------------------------------------------------------------------
    def problems(self, row: Row, backend: str = "auto") -> list[str]:
        """The damage of a block, every byte checked, in words; nothing is dropped. Raises OSError for a file out of reach."""
        self.index.check_open()
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
        """Remove files without a row, rows without a file, and blocks beyond the quota.

        Files younger than ``grace`` seconds stay, since they may still be written. Returns "orphans" (files), "missing" (rows)
        and "evicted_bytes". Raises InvalidArgument for a negative ``grace``, and OSError.
        """
        if not grace >= 0:
            raise InvalidArgument(f"grace {grace}: a number of seconds is expected, 0 or more")
        self.index.check_writable()
        before = self.index.all()
        there = dict(self.files.all())
        owned = {row.file for row in self.index.all()}  # read after the files: blocks may be committed meanwhile
        orphans = [file for file, age in there.items() if file not in owned and age >= grace]
        for file in orphans:
            self.files.remove(file)
        missing = sum(self.drop(row) for row in before if row.file not in there)
        return {"orphans": len(orphans), "missing": missing, "evicted_bytes": self.evict()}

    # -- the index -----------------------------------------------------------------------------------------------
    def _opened(self) -> tuple[Index, str]:
        """The index, and a description of the damaged one that it replaces ("" without); opened for reading if not writable."""
        path = self.folder / INDEX
        paths = (self.folder, self.folder / LOCK, *(path.with_name(INDEX + ending) for ending in ("", "-wal", "-shm")))
        self.denied = next(filter(None, map(own.denied, paths)), None)
        if self.denied is None:
            try:
                make_folders(self.folder, own.SHARED if self._shared else own.PRIVATE)
                return self._opened_to_write(path)
            except OSError as error:
                if error.errno not in _DENIED or not path.exists():
                    raise
                self.denied = error
        if not path.exists():
            raise OSError(
                self.denied.errno, f"no store is there, and none can be made ({self.denied.strerror})", str(self.folder)
            )
        if Index.damage_mark(path).exists():
            raise CorruptStream(f"{path}: the index is damaged; open the store with the right to write to make it anew")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return Index(path, self._shared, self.denied), ""

    def _opened_to_write(self, path: Path) -> tuple[Index, str]:
        mark = Index.damage_mark(path)
        with _only_one(self.folder / LOCK, self._shared):
            try:
                if not mark.exists():
                    return Index(path, self._shared), ""
            except CorruptStream:
                pass
            beside = [mark, *(path.with_name(INDEX + suffix) for suffix in ("-wal", "-shm", "-journal"))]
            for each in (path, *beside):  # before anything is moved
                own.check_file(each, self._shared)
            aside = path.with_name(f"{INDEX}.damaged-{int(time.time())}")
            if path.exists():
                os.replace(path, aside)
            for each in beside:
                each.unlink(missing_ok=True)
            return Index(path, self._shared), f"{path} was damaged and is set aside as {aside.name}"

    def _refill(self, damage: str) -> None:
        """Add rows to a new index for all files that describe their blocks; ``damage``: for the warning."""
        count = 0
        for file in self.files.complete():
            try:
                with self.files.open(file) as opened:
                    row, about = row_in(opened, file)
            except (CorruptStream, UnsupportedStream, FileNotFoundError, PermissionError):
                continue
            if not own.is_block_file(file, row.name):  # a renamed file, which no index may name
                continue
            self.index.add_root(row.root, about["label"], about["settings"])
            count += self.index.add(row)
        if damage or count:
            text = f"{damage or f'{self.folder / INDEX} was missing'}: {count} blocks were found again by their files"
            warnings.warn(text, RuntimeWarning, stacklevel=4)


@contextmanager
def _only_one(lock: Path, shared: bool) -> Iterator[None]:
    """A context for one process at a time, by a lock file, where the system has such locks (POSIX)."""
    own.make_file(lock, shared)
    with open(lock, "a") as file:
        if fcntl is None:
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for a child forked meanwhile, which has the file open
