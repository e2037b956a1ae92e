"""Law: the index of a prefix store in one SQLite file (SPEC IV.4), for the processes of one machine.

An index may come from a stranger: one with other tables, views or triggers counts as damaged.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.places.atomic import make_folders
from pqcodec.formats.store import folder as own
from pqcodec.formats.store import sqlite_eviction as eviction
from pqcodec.formats.store.connections import Connections, errno_of
from pqcodec.formats.store.index import Evicted, Row, limit_of, problem_of, warn_of_row
from pqcodec.formats.store.keys import is_keyed, is_tenant_id, unknown

INDEX, LOCK = "index.sqlite", "lock"  # files of a store's folder
VERSION = 2
AT_ONCE = 512  # rows that are evicted in one transaction
MOST_LEASE = 3600.0  # seconds; a lease that ends later was given by a clock that was wrong
CHECKED_BYTES = 64 << 20  # an index up to this size is checked completely when it is opened, which takes a fraction of a second
_SCHEMA_1 = """
CREATE TABLE IF NOT EXISTS roots (name BLOB PRIMARY KEY, label TEXT NOT NULL, settings TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks (
    name BLOB PRIMARY KEY, parent BLOB NOT NULL, root BLOB NOT NULL, start INTEGER NOT NULL, tokens BLOB NOT NULL,
    whole INTEGER NOT NULL, stateful INTEGER NOT NULL, file TEXT NOT NULL, size INTEGER NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL, hits INTEGER NOT NULL DEFAULT 0, pinned INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_parent ON blocks (parent);
CREATE INDEX IF NOT EXISTS by_use ON blocks (used);
CREATE TABLE IF NOT EXISTS places (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON blocks BEGIN
    UPDATE counters SET value = value + new.size WHERE name = 'bytes'; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON blocks BEGIN
    UPDATE counters SET value = value - old.size WHERE name = 'bytes'; END;
"""
_SCHEMA_2 = """
CREATE TABLE IF NOT EXISTS leases (name BLOB PRIMARY KEY, lease TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners (root BLOB PRIMARY KEY, tenant TEXT NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS owned AFTER INSERT ON blocks BEGIN
    INSERT OR IGNORE INTO owners VALUES (new.root, '', 0);
    UPDATE owners SET bytes = bytes + new.size WHERE root = new.root; END;
CREATE TRIGGER IF NOT EXISTS disowned AFTER DELETE ON blocks BEGIN
    UPDATE owners SET bytes = bytes - old.size WHERE root = old.root; END;
"""
_SCHEMAS = {1: _SCHEMA_1, VERSION: _SCHEMA_1 + _SCHEMA_2}  # by the version of an index; an older one is completed
_COUNT = """
INSERT OR REPLACE INTO counters SELECT 'bytes', CAST(TOTAL(size) AS INTEGER) FROM blocks;
UPDATE owners SET bytes = 0;
INSERT OR REPLACE INTO owners SELECT b.root, COALESCE((SELECT o.tenant FROM owners o WHERE o.root = b.root), ''),
    CAST(TOTAL(b.size) AS INTEGER) FROM blocks b GROUP BY b.root;
"""  # a sum could overflow
_COUNTED = """SELECT c.value IS (SELECT CAST(TOTAL(size) AS INTEGER) FROM blocks)
    AND c.value IS (SELECT CAST(TOTAL(bytes) AS INTEGER) FROM owners) FROM counters c WHERE c.name = 'bytes'"""
_OBJECTS = "SELECT type, name, tbl_name, sql FROM sqlite_master"
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO}  # a store can still be read
_BESIDE = ("", "-wal", "-shm")  # suffixes of the files that SQLite writes to


_COLUMNS = [field.name for field in fields(Row)]
_SELECT = f"SELECT {', '.join('b.' + column for column in _COLUMNS)} FROM blocks b"


def _row(values: tuple[Any, ...]) -> Row:
    """The row with the values of ``_COLUMNS``; raises ValueError for one that no store writes."""
    named = dict(zip(_COLUMNS, values, strict=True))
    truths = {key: named[key] for key in ("whole", "stateful", "pinned")}
    if type(named["tokens"]) is not bytes or any(value not in (0, 1) for value in truths.values()):
        raise ValueError("its fields are of other kinds")
    named["tokens"] = np.frombuffer(named["tokens"], "<i8")
    row = Row(**{**named, **{key: bool(value) for key, value in truths.items()}})
    if not row.file or (problem := problem_of(row)):
        raise ValueError(problem if row.file else "it has no file")
    return row


class SQLiteIndex:
    """The index in one file; safe for threads, processes and forks. ``shared``: other users may read and write it.

    ``denied``: why it cannot be written, if so; it is then read as it is, and methods that change it raise OSError. Any method
    raises OSError where the file cannot be used now, and CorruptStream where it is damaged; a mark then makes ``Shelf`` rebuild
    it when it is opened again. Raises InvalidArgument for a file that is not regular, and UnsupportedStream.
    """

    def __init__(self, path: Path, shared: bool = False, denied: OSError | None = None) -> None:
        self._path, self._denied = path, denied
        self.new = False  # whether the index was created now
        if denied is None:
            for ending in _BESIDE[1:]:
                own.check_file(path.with_name(path.name + ending), shared)
            own.make_file(path, shared)
        elif not own.is_regular(path):
            raise InvalidArgument(f"{path}: is no regular file; a store's index is one")
        if os.path.lexists(
            path.with_name(path.name + "-journal")
        ):  # a store leaves none, and a stranger's could name any file to delete
            self._damaged("a rollback journal lies beside it")
        self._connections = Connections(path, read_only=denied is not None)
        try:
            with self._named():
                self._open()
        except BaseException:
            self._connections.close()
            raise

    def _open(self) -> None:
        """Check the file, and create what is missing; a complete index is opened without a write."""
        version, objects = self._value("PRAGMA user_version"), set(self._select(_OBJECTS))
        self._has_owners = version == VERSION or self._denied is None
        if version != 0 and version not in _SCHEMAS:
            raise UnsupportedStream(f"{self._path}: an index of version {version}; install a newer pqcodec")
        if not objects <= _expected_objects(VERSION):  # before the check, which would evaluate a stranger's expressions
            raise sqlite3.DatabaseError("it holds tables, views or triggers that no store makes")
        if self._path.stat().st_size <= CHECKED_BYTES and (found := self._value("PRAGMA quick_check(1)")) != "ok":
            raise sqlite3.DatabaseError(found)
        whole = version == VERSION and objects == _expected_objects(VERSION)
        if self._denied is not None:
            if version == 0 or objects != _expected_objects(version):
                raise sqlite3.DatabaseError("it lacks what a store writes there")
            return
        if not whole or self._select(_COUNTED) != [(1,)]:
            with self._changing() as db:
                self.new = version == 0
                for statement in _statements(_SCHEMAS[VERSION] + _COUNT):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
        self._forget_ids()

    def _value(self, text: str) -> Any:
        return self._select(text)[0][0]

    def _forget_ids(self) -> None:
        """Erase, once, the token ids of tenants from an index of an older version, which stored them."""
        if self._select("SELECT 1 FROM places WHERE name = 'tenants'"):
            return
        keyed = [root for root, (_, settings) in self.roots().items() if is_keyed(root, settings)]
        rows = [row for root in keyed for row in self._rows("WHERE b.root = ?", (root,))]
        self._connections.run("PRAGMA secure_delete = ON")  # overwrites erased data in the file
        with self._changing() as db:
            for row in rows:
                db.execute("UPDATE blocks SET tokens = ? WHERE name = ?", (unknown(row.tokens).tobytes(), row.name))
        if keyed:
            self._connections.run("VACUUM")  # free pages may still hold rows that were removed before
            self._connections.run("PRAGMA wal_checkpoint(TRUNCATE)")
        with self._changing() as db:
            db.execute("INSERT OR REPLACE INTO places VALUES ('tenants', 'marks')")

    def close(self) -> None:
        """Close for good: all later calls raise InvalidArgument."""
        self._connections.close()

    def check_open(self) -> None:
        """Raises InvalidArgument after ``close``."""
        self._connections.check_open()

    def check_writable(self) -> None:
        """Raises OSError where the index can only be read, and InvalidArgument after ``close``."""
        self.check_open()
        if self._denied is not None:
            text = f"the store can be read, but not changed ({self._denied.strerror or self._denied})"
            raise OSError(self._denied.errno or errno.EACCES, text, str(self._path.parent))

    @contextmanager
    def _changing(self, little: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction; ``little``: as in ``Connections.changing``."""
        self.check_writable()
        with self._named(), self._connections.changing(little) as db:
            yield db

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A context that turns errors of SQLite into OSError or, for damage, CorruptStream."""
        try:
            yield
        except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:  # locked, disk full, closed: no damage
            raise OSError(errno_of(error), str(error), str(self._path)) from error
        except (sqlite3.DatabaseError, UnicodeError) as error:  # UnicodeError: a message that quotes damaged data
            self._damaged(str(error), error)

    def _damaged(self, what: str, error: Exception | None = None) -> NoReturn:
        """Mark the index as damaged and raise CorruptStream."""
        if self._denied is None:
            with suppress(OSError):  # without the mark the next opening finds the damage again
                own.make_file(self.damage_mark(self._path), shared=False)
        advice = "open the store again" if self._denied is None else "open the store with the right to write"
        raise CorruptStream(f"{self._path}: the index is damaged ({what}); {advice} to make it anew") from error

    @staticmethod
    def damage_mark(path: Path) -> Path:
        """The path of the file that marks an index as damaged."""
        return path.with_name(path.name + ".damaged")

    def _select(self, text: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._named():
            return self._connections.select(text, values)

    def _rows(self, clause: str, values: Sequence[Any] = ()) -> list[Row]:
        rows = []
        for found in self._select(f"{_SELECT} {clause}", values):
            try:
                rows.append(_row(found))
            except ValueError as error:
                self._forget(found[0], str(error))
        return rows

    def _forget(self, name: Any, problem: str) -> None:
        """Drop a row that no store has written, with a warning; its file is not touched."""
        dropped = False
        with suppress(OSError), self._changing(little=True) as db:
            db.execute("DELETE FROM blocks WHERE name IS ?", (name,))
            for statement in _statements(_COUNT):  # its size may not have been a number
                db.execute(statement)
            dropped = True
        warn_of_row(self._path, problem, dropped)

    # -- reading -------------------------------------------------------------------------------------------------
    def find(self, name: bytes) -> Row | None:
        """The block called ``name``; None where it is not committed."""
        return next(iter(self._rows("WHERE b.name = ?", (name,))), None)

    def children(self, parent: bytes) -> list[Row]:
        """The blocks that follow the block or root called ``parent``."""
        return self._rows("WHERE b.parent = ?", (parent,))

    def all(self) -> list[Row]:
        """Every block, parents before their children."""
        return self._rows("ORDER BY b.root, b.start, b.name")

    def roots(self) -> dict[bytes, tuple[str, dict[str, Any]]]:
        """(label, settings) of each root by its name; raises CorruptStream."""
        found = {}
        for name, label, settings in self._select("SELECT name, label, settings FROM roots"):
            try:
                parsed = json.loads(settings)
            except (TypeError, ValueError, RecursionError):
                parsed = None
            if type(name) is not bytes or type(label) is not str or not isinstance(parsed, dict):
                self._damaged("what it says of a root is no label and no settings")
            found[name] = (label, parsed)
        return found

    def counters(self) -> dict[str, int]:
        """The counters by name: "bytes" of all blocks, "max_bytes" and "max_age" if they are set, "gets", "hits", "puts" ..."""
        found = dict(self._select("SELECT name, value FROM counters"))
        if any(type(value) is not int for value in found.values()):
            self._damaged("its counters are no numbers")
        return found

    @property
    def data(self) -> str | None:
        """The folder or URL of the files; None where they are in ``blocks`` beside the index."""
        return next((str(value) for (value,) in self._select("SELECT value FROM places WHERE name = 'data'")), None)

    def owners(self) -> dict[bytes, str]:
        """The tenant's id of each root that has one."""
        found = self._select("SELECT root, tenant FROM owners WHERE tenant != ''") if self._has_owners else []
        return {root: tenant for root, tenant in found if is_tenant_id(tenant)}

    def tenant_bytes(self) -> dict[str, int]:
        """Bytes of the blocks of each tenant, by its id; "": of those without one."""
        if not self._has_owners:
            return {"": self.counters().get("bytes", 0)}
        return {"": 0, **dict(self._select(eviction.TENANT_BYTES))}

    def held(self, tenant: str | None = None) -> dict[bytes, int]:
        """Bytes, by name, of the blocks that are never evicted: pinned ones and their ancestors; ``tenant``: only its own."""
        if not self._has_owners:
            tenant = None
        whose = "" if tenant is None else f"AND {eviction.OWN}"
        pinned = f"SELECT name, parent, size FROM blocks b WHERE pinned = 1 {whose}"
        above = "SELECT b.name, b.parent, b.size FROM blocks b JOIN held ON b.name = held.parent"
        text = f"WITH RECURSIVE held AS ({pinned} UNION {above}) SELECT name, size FROM held WHERE size > 0"
        return dict(self._select(text, {} if tenant is None else {"tenant": tenant}))

    # -- writing -------------------------------------------------------------------------------------------------
    def add_root(self, name: bytes, label: str, settings: dict[str, Any], tenant: str = "") -> None:
        """Record what a root stands for, and whose it is; a known one stays as it is."""
        with self._changing() as db:
            text = json.dumps(settings, sort_keys=True)
            db.execute("INSERT OR IGNORE INTO roots VALUES (?, ?, ?)", (name, label, text))
            db.execute("INSERT OR IGNORE INTO owners VALUES (?, '', 0)", (name,))
            if tenant:
                db.execute("UPDATE owners SET tenant = ? WHERE root = ? AND tenant = ''", (tenant, name))

    def lease(self, name: bytes, seconds: float) -> str:
        """Take the lease of a block's name for ``seconds``; "" where another has it, or the block is there.

        Given without a record where others write all the time: to encode a block twice costs less than to wait for them.
        """
        self.check_writable()
        lease, now = secrets.token_hex(16), time.time()
        with suppress(OSError), self._changing(little=True) as db:
            db.execute("DELETE FROM leases WHERE until < ? OR until > ?", (now, now + MOST_LEASE))  # dead, or by another clock
            values = (name, lease, now + seconds, name)
            taken = db.execute(
                "INSERT OR IGNORE INTO leases SELECT ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM blocks WHERE name = ?)", values
            )
            return lease if taken.rowcount == 1 else ""
        return lease

    def release(self, name: bytes, lease: str) -> None:
        """End a lease that ``lease`` gave; another's stays."""
        with self._changing(little=True) as db:
            db.execute("DELETE FROM leases WHERE name = ? AND lease = ?", (name, lease))

    def add(self, row: Row) -> bool:
        """Commit a block, and end its lease; False where a block of that name is committed already."""
        now = time.time()
        values = {**row.__dict__, "tokens": row.tokens.astype("<i8").tobytes(), "created": now, "used": now}
        with self._changing() as db:
            marks = ", ".join("?" * len(_COLUMNS))
            db.execute("DELETE FROM leases WHERE name = ?", (row.name,))
            done = db.execute(
                f"INSERT OR IGNORE INTO blocks ({', '.join(_COLUMNS)}) VALUES ({marks})", [values[key] for key in _COLUMNS]
            )
            return done.rowcount == 1

    def remove(self, row: Row, little: bool = False, unused: bool = False) -> bool:
        """Remove a block's row if it still names the same file; False otherwise. The caller removes the file afterwards.

        ``little``: as in ``Connections.changing``. ``unused``: only if it is not pinned, no block follows it, and it was not
        used since it was added.
        """
        text = "DELETE FROM blocks WHERE name = ? AND file = ?"
        if unused:
            text += " AND pinned = 0 AND used = created AND name NOT IN (SELECT parent FROM blocks)"
        with self._changing(little) as db:
            return db.execute(text, (row.name, row.file)).rowcount == 1

    def evict(self, most: int = AT_ONCE) -> list[Evicted]:
        """Remove the rows that ``Shelf.evict`` says, ``most`` at once; the caller removes the files afterwards."""
        limits, now = self.counters(), time.time()
        if not any(name.startswith(("max_age", "max_bytes")) for name in limits):
            return []
        with self._changing() as db:
            return eviction.evicted(db, limits, now, most)

    def touch(self, rows: Sequence[Row], hit: bool = True, **counts: int) -> None:
        """Set the blocks' time of use to now, and their hits one up if ``hit``; add ``counts`` to the counters.

        Best effort: skipped where the index cannot be written at once, and a loss of power may undo it.
        """
        self.check_open()
        if self._denied is not None:
            return
        with suppress(OSError, CorruptStream), self._changing(little=True) as db:
            values = [(time.time(), int(hit), row.name) for row in rows]
            db.executemany("UPDATE blocks SET used = ?, hits = hits + ? WHERE name = ?", values)
            text = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
            db.executemany(text, counts.items())

    def pin(self, row: Row, pinned: bool) -> None:
        """Keep a block and its ancestors from eviction, or release them."""
        with self._changing() as db:
            db.execute("UPDATE blocks SET pinned = ? WHERE name = ?", (int(pinned), row.name))

    def set_limit(self, name: str, limit: int | None, tenant: str | None = None) -> None:
        """Set "max_bytes", the quota, or "max_age", seconds that an unused block lives, as a counter; None: no limit."""
        name = limit_of(name, tenant)
        with self._changing() as db:
            db.execute("DELETE FROM counters WHERE name = ?", (name,))
            if limit is not None:
                db.execute("INSERT INTO counters VALUES (?, ?)", (name, limit))

    def set_data(self, data: str) -> None:
        """Record the folder or URL of the files."""
        with self._changing() as db:
            db.execute("INSERT OR REPLACE INTO places VALUES ('data', ?)", (data,))


@lru_cache
def _expected_objects(version: int) -> frozenset[tuple[Any, ...]]:
    """The tables, indexes and triggers of an index of a version, as in sqlite_master."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_SCHEMAS[version])
        return frozenset(db.execute(_OBJECTS))


def _statements(script: str) -> list[str]:
    found, statement = [], ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            found.append(statement)
            statement = ""
    return found


# -- in a folder -------------------------------------------------------------------------------------------------
def open_in(folder: Path, shared: bool, denied: OSError | None = None) -> tuple[SQLiteIndex, str, OSError | None]:
    """The index in a store's folder, what is wrong with the one that it replaces ("" without), and why it can only be read.

    A missing folder or index is made, a damaged index is set aside and made anew. Where the folder cannot be written (a
    read-only mount, another user's, a full disk), or ``denied`` says why it is not to be, the index is opened for reading.
    Raises OSError, CorruptStream and InvalidArgument.
    """
    path = folder / INDEX
    paths = (folder, folder / LOCK, *(path.with_name(INDEX + ending) for ending in _BESIDE))
    denied = denied or next(filter(None, map(own.denied, paths)), None)
    if denied is None:
        try:
            make_folders(folder, own.SHARED if shared else own.PRIVATE)
            return (*_open_to_write(path, shared), None)
        except OSError as error:
            if error.errno not in _DENIED or not path.exists():
                raise
            denied = error
    if not path.exists():
        raise OSError(denied.errno, f"no store is there, and none can be made ({denied.strerror})", str(folder))
    if SQLiteIndex.damage_mark(path).exists():
        raise CorruptStream(f"{path}: the index is damaged; open the store with the right to write to make it anew")
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return SQLiteIndex(path, shared, denied), "", denied


def _open_to_write(path: Path, shared: bool) -> tuple[SQLiteIndex, str]:
    mark = SQLiteIndex.damage_mark(path)
    with _only_one(path.with_name(LOCK), shared):
        try:
            if not mark.exists():
                return SQLiteIndex(path, shared), ""
        except CorruptStream:
            pass
        beside = [mark, *(path.with_name(INDEX + suffix) for suffix in ("-wal", "-shm", "-journal"))]
        for each in (path, *beside):  # before anything is moved
            own.check_file(each, shared)
        aside = path.with_name(f"{INDEX}.damaged-{int(time.time())}")
        if path.exists():
            os.replace(path, aside)
        for each in beside:
            each.unlink(missing_ok=True)
        return SQLiteIndex(path, shared), f"{path} was damaged and is set aside as {aside.name}"


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
