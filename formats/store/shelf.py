"""Law: the committed blocks of a store, rows and files together: commit, drop, quota, damage and leftovers.

This module does not depend on models or caches. A block's file is written before its row and removed after it: a row without a
file means that another process has just dropped the block.
"""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.places import remote
from pqcodec.formats.store import folder as own
from pqcodec.formats.store import redis_index, sqlite_index
from pqcodec.formats.store.blocks import row_in
from pqcodec.formats.store.files import GRACE, BlockFiles, Files
from pqcodec.formats.store.index import Index, Row, limit_of, warn_of_row
from pqcodec.formats.store.redis_files import RedisFiles
from pqcodec.formats.store.redis_index import RedisIndex

BLOCKS = "blocks"  # the folder of the files, beside the index


class Shelf:
    """The blocks of a store in a folder, or in Redis for many machines (an address as ``RedisIndex`` takes it).

    ``data``: the folder or URL of their files, to be passed whenever the store is opened; without, they are in the folder
    "blocks", or values of Redis. ``shared``: other users may use the store, as far as the umask allows; otherwise new files are
    private. ``read_only``: it is only read, as where the folder cannot be written. A missing or damaged index is rebuilt from
    the files. Where the folder cannot be written (a read-only mount, another user's, a full disk), it can be read, and methods
    that change it raise OSError. Raises InvalidArgument for another URL as the folder, for links in it, and where the index
    records another place of the files than ``data``; OSError; and UnsupportedStream for an index of a newer version.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        data: str | os.PathLike[str] | None = None,
        *,
        shared: bool = False,
        read_only: bool = False,
    ) -> None:
        remote.check_path(folder, "folder")
        if data is not None:
            remote.check_path(data, "data")
        self.place: str  # in messages
        self.denied = OSError(errno.EROFS, "it was opened so") if read_only else None  # why it is only read
        self.index: Index
        if redis_index.is_address(folder):
            self.index, damage = RedisIndex(os.fspath(folder), read_only), ""
            self.place = self.index.label
            beside = "Redis itself"
        else:
            remote.check_local(
                folder, "the index of a store is in a local folder or in Redis; pass the URL of its files as data (--data)"
            )
            self.folder, self.place = Path(folder), os.fspath(folder)
            own.check_folder(self.folder)
            self.index, damage, self.denied = sqlite_index.open_in(self.folder, shared, self.denied)
            beside = str(self.folder / BLOCKS)
        try:
            place = self._data_place(data, beside)
            self.files = self._files_of(place, shared)
        except BaseException:
            self.index.close()
            raise
        if self.index.new and self.denied is None:
            self._refill(damage)

    def _files_of(self, data: str | None, shared: bool) -> Files:
        """The files at ``data``, or the index's own."""
        if data is not None:
            return BlockFiles(data, shared)
        if isinstance(self.index, RedisIndex):
            return RedisFiles(self.index)
        if self.denied is None:
            own.make_folder(self.folder / BLOCKS, shared)
        return BlockFiles(self.folder.absolute() / BLOCKS, shared)

    def _data_place(self, given: str | os.PathLike[str] | None, beside: str) -> str | None:
        """The place ``given`` as data, an absolute path or a URL, which is recorded if it is new.

        ``beside``: the place of files that are the index's own. Raises InvalidArgument where the index records another place:
        only the user's word is followed.
        """
        data = None if given is None else os.fspath(given)
        if data is not None and not remote.is_url(data):
            data = os.path.abspath(data)
        recorded = self.index.data
        forgetful = isinstance(self.index, RedisIndex) and recorded == data
        if data is not None and self.denied is None and (recorded is None or forgetful):
            self.index.set_data(data)
            recorded = self.index.data  # of two who open a store at once, one is first
        if recorded is not None and data is None:
            raise InvalidArgument(
                f"{self.place}: its index says that its files lie in {recorded}; pass data={recorded!r} (--data) if so"
            )
        if recorded != data and (given is None or recorded != os.fspath(given)):  # older versions record a relative path
            raise InvalidArgument(f"{self.place}: the files of this store lie in {recorded or beside}, not in {data}")
        return data

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

    def drop(self, row: Row, unused: bool = False) -> bool:
        """Remove a block and its file; False where another process has done so.

        Blocks that follow it cannot be found until it is stored again. ``unused``: as in ``Index.remove``.
        """
        done = self.index.remove(row, unused=unused)
        if done:
            self.files.remove(row.file)
        return done

    def give_up(self, row: Row, error: Exception) -> None:
        """Warn that a block cannot be read because of ``error``, and drop it if that is damage.

        Silent where another process has dropped it meanwhile. Raises nothing: a block that cannot be dropped stays.
        """
        what = f"block {row.name.hex()[:16]} (tokens {row.start} to {row.end - 1}) of {self.place}"
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

    # -- limits --------------------------------------------------------------------------------------------------
    def limit(self, name: str, tenant: str | None = None) -> int | None:
        """The limit "max_bytes", a quota, or "max_age", seconds that a block lives after its last use; None: there is none.

        ``tenant``: that of a tenant by its id ("": of blocks without one), which holds beside that of the store.
        """
        return self.index.counters().get(limit_of(name, tenant))

    @property
    def max_bytes(self) -> int | None:
        """The quota of the store in bytes; None: no quota."""
        return self.limit("max_bytes")

    @property
    def max_age(self) -> int | None:
        """Seconds that a block of the store lives after it was used last; None: for ever."""
        return self.limit("max_age")

    def expired(self, rows: Sequence[Row], tenant: str = "") -> set[bytes]:
        """The names of those, all of one tenant, that have lived too long: they are found no more, and ``evict`` drops them.

        Pinned blocks and their ancestors live for ever.
        """
        counters = self.index.counters() if rows else {}
        limits = [counters[name] for name in ("max_age", limit_of("max_age", tenant)) if name in counters]
        old = {row.name for row in rows if row.used < time.time() - min(limits)} if limits else set()
        return old - self.index.held().keys() if old else old

    def available_bytes(self, names: Collection[bytes] = (), tenant: str = "") -> int | None:
        """Bytes available to a prefix of a tenant: its quota and the store's, less pinned blocks and their ancestors.

        Those in ``names`` are not counted. None: no quota.
        """
        counters, found = self.index.counters(), []
        for whose in (None, tenant):
            limit = counters.get(limit_of("max_bytes", whose))
            if limit is not None:
                held = self.index.held(whose)
                found.append(limit - sum(size for name, size in held.items() if name not in names))
        return min(found, default=None)

    def evict(self) -> int:
        """Drop what is too old and what is over a quota, last blocks of prefixes first; returns the bytes freed.

        A tenant that is over its quota loses those of its blocks that were used longest ago. Where the store is over its own,
        so does the tenant that holds most: no tenant loses a block to others while it holds less than they do. Blocks without
        a tenant count as those of one. Warns where a quota cannot be reached.
        """
        freed, why = 0, ""
        while not why and (gone := self.index.evict()):
            old = sum(block.expired for block in gone)
            self.index.touch([], evicted=len(gone) - old, expired=old)
            for block in gone:
                if block.size < 0 or not own.is_block_file(block.file, block.name):
                    warn_of_row(self.place, f"its file is called {block.file!r:.100}, and has {block.size} bytes", True)
                    continue
                freed += block.size
                try:
                    self.files.remove(block.file)
                except OSError as error:  # ``gc`` removes the file later
                    why = f"the file of block {block.name.hex()[:16]} cannot be removed: {error}"
        if why:
            warnings.warn(f"{self.place}: {why}", RuntimeWarning, stacklevel=5)
        elif over := self._over():
            warnings.warn(f"{self.place} is over {over}, and {self._why_nothing_goes()}", RuntimeWarning, stacklevel=5)
        return freed

    def _over(self) -> str:
        """The quota that the store is over, in words, or an empty string."""
        counters = self.index.counters()
        if counters.get("bytes", 0) > counters.get("max_bytes", counters.get("bytes", 0)):
            return f"its quota of {counters['max_bytes']} bytes"
        limited = {name.partition(":")[2]: limit for name, limit in counters.items() if name.startswith("max_bytes:")}
        held = self.index.tenant_bytes() if limited else {}
        over = [tenant for tenant, limit in limited.items() if held.get(tenant, 0) > limit]
        return f"the quota of {limited[over[0]]} bytes of tenant {over[0] or 'none'}" if over else ""

    def _why_nothing_goes(self) -> str:
        """Why no block can be evicted, in words."""
        rows, held = self.index.all(), self.index.held()
        free = [row for row in rows if row.name not in held]
        if rows and not free:
            return "all of it is pinned"
        return f"none of its {len(free)} blocks that are not pinned can go, as no store writes it; move the index away"

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
        if isinstance(self.index, RedisIndex) and self.index.is_lost():
            self._refill("")
        before = self.index.all()
        if before:
            self.files.check_there()
        there = dict(self.files.all())
        owned = {row.file for row in self.index.all()}  # read after the files: blocks may be committed meanwhile
        orphans = [file for file, age in there.items() if file not in owned and age >= grace]
        for file in orphans:
            self.files.remove(file)
        missing = sum(self.drop(row) for row in before if row.file not in there)
        return {"orphans": len(orphans), "missing": missing, "evicted_bytes": self.evict()}

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
        if isinstance(self.index, RedisIndex):
            self.index.begun()
        if damage or count:
            text = f"{damage or f'the index of {self.place} was missing'}: {count} blocks were found again by their files"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
