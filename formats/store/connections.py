"""Law: SQLite connections to the file of an index: a write waits for other writers, reads and notes of use do not.

No connection survives a fork: SQLite keeps locks per process, so a child that used its parent's connection could undo the
parent's writes. A file that cannot be written is read as it is: no file is created, locked or repaired beside it.
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

WAIT = 120.0  # seconds that a write waits for another process's write
READ_WAIT = 10.0  # seconds that a read waits for a process that opens or closes the file; nothing else blocks it
LITTLE = 0.2  # seconds that a note of use waits
FORK_WAIT = 5.0  # seconds that a fork waits for transactions of other threads
READS = 5  # tries to read a file that others change at the same time
ERRNOS = {  # errno by the primary code of SQLite's error
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
}
Print = tuple[Any, ...]  # a file's fingerprint, which differs after a change

_open: WeakSet[Connections] = WeakSet()
_left_behind: list[Any] = []  # connections of the parent process, which must not be closed in the child
_forking = threading.local()


class _Held:
    """A connection that is opened when needed, and the lock of the thread that uses it."""

    def __init__(self, wait: float, synchronous: str) -> None:
        self.lock = threading.RLock()
        self.wait, self.synchronous = wait, synchronous
        self.db: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the connection, if it is open."""
        if self.db is not None:
            self.db.close()
        self.db = None


class Connections:
    """One connection for writes, and one for reads and notes of use, so that a read never waits for a writing thread.

    Passes sqlite3.Error on; raises InvalidArgument after ``close``, and PermissionError where the file has a write-ahead log
    that only a process with the right to write can read.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self._path, self._read_only, self._closed = path, read_only, False
        self._print: Print | None = None  # of the file that is open without locks
        self._renew()
        _open.add(self)

    def _renew(self) -> None:
        self._writer = _Held(WAIT, "FULL")  # commits survive a loss of power
        self._reader = _Held(READ_WAIT, "NORMAL")  # commits may be undone by a loss of power, as a whole

    def close(self) -> None:
        """Close both connections for good."""
        self._closed = True
        for held in (self._writer, self._reader):
            with held.lock:
                held.close()

    def check_open(self) -> None:
        """Raises InvalidArgument after ``close``."""
        if self._closed:
            raise InvalidArgument(f"{self._path.parent}: the store is closed; open it anew")

    def select(self, text: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a SELECT or PRAGMA with parameters ``values``."""
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
                    continue  # the file changed while it was read
                if self._now() == before:
                    return rows
        raise sqlite3.OperationalError("others write to it all the time")

    @contextmanager
    def changing(self, little: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction, committed when the block succeeds and rolled back when it fails.

        ``little``: wait at most ``LITTLE`` seconds for other writers, and let a loss of power undo the commit.
        """
        held = self._reader if little else self._writer
        with held.lock:
            db = self._connected(held)
            with _waiting(db, LITTLE if little else held.wait):
                db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # the file may be gone or unreadable
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                raise

    def run(self, statement: str) -> None:
        """Execute a statement outside of transactions, on the connection for writes."""
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
        """A connection that creates no files: it uses the write-ahead log and locks of the owners if they exist."""
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
        """(fingerprint, bytes of the log or None, whether locks exist); a constant if the owners' locks protect the read."""
        log, locks = _size(f"{self._path}-wal"), os.path.exists(f"{self._path}-shm")
        if log is not None and locks:
            return (None, 0, True)
        found = os.stat(self._path)
        return ((found.st_ino, found.st_size, found.st_mtime_ns), log, locks)

    # -- forks ---------------------------------------------------------------------------------------------------
    def _before_fork(self) -> list[threading.RLock]:
        """Close the connections that no thread uses, and keep them closed until after the fork; returns the locks taken."""
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
    """A context in which a connection waits ``seconds`` for other processes."""
    (before,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")
    try:
        yield
    finally:
        db.execute(f"PRAGMA busy_timeout = {before}")


def _opened(database: str, wait: float, uri: bool) -> sqlite3.Connection:
    db = sqlite3.connect(database, timeout=wait, isolation_level=None, check_same_thread=False, uri=uri)
    db.text_factory = lambda text: text.decode(errors="replace")  # bytes that are no UTF-8 name nothing
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _size(path: str) -> int | None:
    """Bytes of a file; None where it is missing."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def errno_of(error: sqlite3.Error) -> int:
    """The errno that corresponds to an error of SQLite."""
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
