"""Law: connections to the one file of an index: who may write waits for others, who reads or notes a use does not.

No connection outlives a fork: SQLite keeps locks by process, so a child that used its parent's could undo the parent's writes.
Where the file cannot be written, it is read as it is: nothing is made, locked or repaired beside it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from pqcodec.errors import InvalidArgument

WAIT = 120.0  # seconds that a process waits for another's write
READ_WAIT = 10.0  # seconds that a read waits for one who opens or closes the file, the only ones that are in its way
LITTLE = 0.2  # seconds that a note of use waits
FORK_WAIT = 5.0  # seconds that a fork waits for other threads' transactions
READS = 5  # tries at reading a file that others change meanwhile
ERRNOS = {  # what went wrong, by the primary code of SQLite's error
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
}
Print = tuple[Any, ...]  # of a file: it is another one after a change

_open: WeakSet[Connections] = WeakSet()
_left_behind: list[Any] = []  # a parent's connections, kept from being closed
_forking = threading.local()


class _Held:
    """A connection, or none yet, and the lock of whoever uses it."""

    def __init__(self, wait: float, synchronous: str) -> None:
        self.lock = threading.RLock()
        self.wait, self.synchronous = wait, synchronous
        self.db: sqlite3.Connection | None = None

    def close(self) -> None:
        if self.db is not None:
            self.db.close()
        self.db = None


class Connections:
    """One connection that writes and one that reads and notes uses, so that reading never waits for a thread that writes.

    Raises sqlite3.Error as it is; InvalidArgument after ``close``; PermissionError where a write-ahead log can be read only
    by who may write beside it.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self._path, self._read_only, self._closed = path, read_only, False
        self._print: Print | None = None  # of a file that is read without locks
        self._renew()
        _open.add(self)

    def _renew(self) -> None:
        self._writer = _Held(WAIT, "FULL")  # what is committed survives a loss of power
        self._reader = _Held(READ_WAIT, "NORMAL")  # what it commits does, or is as it was before

    def close(self) -> None:
        """Close for good."""
        self._closed = True
        for held in (self._writer, self._reader):
            with held.lock:
                held.close()

    def check_open(self) -> None:
        if self._closed:
            raise InvalidArgument(f"{self._path.parent}: the store is closed; open it anew")

    def select(self, text: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement that reads."""
        with self._reader.lock:
            if not self._read_only:
                return self._connected(self._reader).execute(text, values).fetchall()
            for _ in range(READS):
                before = self._now()
                try:
                    rows = self._reading(before).execute(text, values).fetchall()
                except sqlite3.DatabaseError:
                    if self._now() == before:
                        raise
                    continue  # what was read may be of two states
                if self._now() == before:
                    return rows
        raise sqlite3.OperationalError("others write to it all the time")

    @contextmanager
    def changing(self, little: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction that either happens or does not. ``little``: wait little, and a loss of power may undo it."""
        held = self._reader if little else self._writer
        with held.lock:
            db = self._connected(held)
            with _waiting(db, LITTLE if little else held.wait):
                db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # of a file that is gone, or cannot be read any more
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                raise

    def run(self, statement: str) -> None:
        """A statement outside of transactions, on the connection that writes."""
        with self._writer.lock:
            self._connected(self._writer).execute(statement).fetchall()

    # -- one connection ------------------------------------------------------------------------------------------
    def _connected(self, held: _Held) -> sqlite3.Connection:
        self.check_open()
        if held.db is None:
            held.db = db = _opened(str(self._path), held.wait, uri=False)
            try:
                if held is self._writer:
                    db.execute("PRAGMA journal_mode = WAL")
                db.execute(f"PRAGMA synchronous = {held.synchronous}")
            except BaseException:
                held.close()
                raise
        return held.db

    def _reading(self, now: Print) -> sqlite3.Connection:
        """A connection that makes nothing beside the file: with its owners' log and locks where these are there, or without."""
        self.check_open()
        held = self._reader
        if held.db is not None and now == self._print:
            return held.db
        held.close()
        log, locks = now[1:]
        if log and not locks:
            text = "holds changes that can be read only by who may write beside it; open the store once with the right to write"
            raise PermissionError(errno.EACCES, text, f"{self._path}-wal")
        mode = "mode=ro&readonly_shm=1" if log is not None and locks else "mode=ro&immutable=1"
        held.db, self._print = _opened(f"{self._path.absolute().as_uri()}?{mode}", held.wait, uri=True), now
        return held.db

    def _now(self) -> Print:
        """What tells whether the file is another one: without locks its print, with those of its owners nothing of it."""
        log, locks = _size(f"{self._path}-wal"), os.path.exists(f"{self._path}-shm")
        if log is not None and locks:
            return (None, 0, True)
        found = os.stat(self._path)
        return ((found.st_ino, found.st_size, found.st_mtime_ns), log, locks)

    # -- forks ---------------------------------------------------------------------------------------------------
    def _before_fork(self) -> list[threading.RLock]:
        """Close the connections that no thread uses, and keep them from being opened; returns the locks that are held."""
        taken: list[Any] = []
        for held in (self._writer, self._reader):
            if held.lock.acquire(timeout=FORK_WAIT):
                taken.append(held.lock)
                if held.db is not None and not held.db.in_transaction:
                    held.close()
        return taken

    def _in_child(self) -> None:
        _left_behind.extend(held.db for held in (self._writer, self._reader) if held.db is not None)
        self._print = None
        self._renew()


@contextmanager
def _waiting(db: sqlite3.Connection, seconds: float) -> Iterator[None]:
    """A connection that waits so long for others."""
    (before,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")
    try:
        yield
    finally:
        db.execute(f"PRAGMA busy_timeout = {before}")


def _opened(place: str, wait: float, uri: bool) -> sqlite3.Connection:
    db = sqlite3.connect(place, timeout=wait, isolation_level=None, check_same_thread=False, uri=uri)
    db.text_factory = lambda text: text.decode(errors="replace")  # what is no text is no name either
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def errno_of(error: sqlite3.Error) -> int:
    """What the system would call an error of SQLite."""
    return ERRNOS.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF, errno.EIO)


def _before_fork() -> None:
    _forking.locks = [lock for connections in list(_open) for lock in connections._before_fork()]


def _in_parent() -> None:
    for lock in reversed(_forking.__dict__.pop("locks", [])):
        lock.release()


def _in_child() -> None:
    _forking.__dict__.pop("locks", None)
    for connections in list(_open):
        connections._in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
