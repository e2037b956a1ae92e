"""Law: what a store needs of its index: a row for each committed block, found by name, and how blocks come, go and are used.

A block exists when its row does. Its file is written before the row and removed after it, under a name of its own, so a crash
leaves files without a row (``Shelf.gc`` removes them), never a row without its file. An index may come from a stranger: a row
that no store writes is dropped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pqcodec.formats.store import folder as own
from pqcodec.formats.store.keys import BLOCK_TOKENS, NAME_BYTES


@dataclass(frozen=True)
class Row:
    """A committed block."""

    name: bytes  # 32 bytes each (SPEC IV.2)
    parent: bytes
    root: bytes
    start: int  # position in the prefix of its first token
    tokens: np.ndarray  # int64 [n]: token ids, or a tenant's marks of them (``keys.Chain.marks``)
    whole: bool  # 256 tokens; False: the tail of a prefix, which no block follows
    stateful: bool  # some layers cannot be cut: a tail is usable only as a whole
    file: str  # name below the folder or URL of the files
    size: int  # of the file, in bytes
    created: float = 0.0  # Unix time
    used: float = 0.0  # Unix time of the last get or put
    hits: int = 0  # gets that used it
    pinned: bool = False  # never evicted

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Evicted:
    """A block that ``Index.evict`` has removed."""

    name: bytes
    file: str  # not checked: a stranger may have written the row
    size: int  # negative: the row is one that no store writes
    expired: bool  # too old; False: for a quota


def limit_of(name: str, tenant: str | None) -> str:
    """The counter of the limit "max_bytes" or "max_age" of a store or, by its id, of a tenant ("": of blocks without one).

    >>> limit_of("max_age", None), limit_of("max_age", "0f3a")
    ('max_age', 'max_age:0f3a')
    """
    return name if tenant is None else f"{name}:{tenant}"


def problem_of(row: Row) -> str:
    """What in a row no store writes, in words, or an empty string."""
    if {type(name) for name in (row.name, row.parent, row.root)} != {bytes} or row.name == row.parent:
        return "its names are no names of blocks"
    if {len(name) for name in (row.name, row.parent, row.root)} != {NAME_BYTES}:
        return "its names are no names of blocks"
    if row.file and not own.is_block_file(row.file, row.name):
        return f"its file is called {row.file!r:.100}"
    numbers = (row.start, row.size, row.hits)
    if any(type(number) is not int or number < 0 for number in numbers) or row.start % BLOCK_TOKENS:
        return f"it begins at token {row.start!r:.20}, has {row.size!r:.20} bytes and {row.hits!r:.20} hits"
    if any(type(when) is not float or not math.isfinite(when) for when in (row.created, row.used)):
        return "its times are no times"
    if len(row.tokens) > BLOCK_TOKENS or row.whole != (len(row.tokens) == BLOCK_TOKENS):
        return f"it is of {len(row.tokens)} tokens"
    return ""


def warn_of_row(place: object, problem: str, dropped: bool) -> None:
    """Warn of a row that no store writes, in the index at ``place``."""
    done = "dropped" if dropped else "skipped"
    text = f"{place}: a row was {done} that no store writes: {problem}; no file was touched"
    warnings.warn(text, RuntimeWarning, stacklevel=6)


class Index(Protocol):
    """The index of a store; safe for threads, processes and forks.

    Any method raises OSError where the index cannot be used now, and CorruptStream where it is damaged.
    """

    new: bool  # whether the index was created now

    def close(self) -> None:
        """Close for good: all later calls raise InvalidArgument."""

    def check_open(self) -> None:
        """Raises InvalidArgument after ``close``."""

    def check_writable(self) -> None:
        """Raises OSError where the index can only be read, and InvalidArgument after ``close``."""

    # -- reading -------------------------------------------------------------------------------------------------
    def find(self, name: bytes) -> Row | None:
        """The block called ``name``; None where it is not committed."""

    def children(self, parent: bytes) -> list[Row]:
        """The blocks that follow the block or root called ``parent``."""

    def all(self) -> list[Row]:
        """Every block, parents before their children."""

    def roots(self) -> dict[bytes, tuple[str, dict[str, Any]]]:
        """(label, settings) of each root by its name; raises CorruptStream."""

    def counters(self) -> dict[str, int]:
        """The counters by name: "bytes" of all blocks, limits (``limit_of``) if they are set, "gets", "hits", "puts" ..."""

    @property
    def data(self) -> str | None:
        """The folder or URL of the files, as it was recorded; None where they are the index's own."""

    def owners(self) -> dict[bytes, str]:
        """The tenant's id (``Chain.tenant_id``) of each root that has one."""

    def tenant_bytes(self) -> dict[str, int]:
        """Bytes of the blocks of each tenant, by its id; "": of those without one."""

    def held(self, tenant: str | None = None) -> dict[bytes, int]:
        """Bytes, by name, of the blocks that are never evicted: pinned ones and their ancestors; ``tenant``: only its own."""

    # -- writing -------------------------------------------------------------------------------------------------
    def add_root(self, name: bytes, label: str, settings: dict[str, Any], tenant: str = "") -> None:
        """Record what a root stands for, and the id of the tenant whose blocks are below it; a known one stays as it is.

        The first to name a tenant makes the root that tenant's, with the blocks that are below it by then.
        """

    def lease(self, name: bytes, seconds: float) -> str:
        """Take the lease of a block's name for ``seconds``; "" where another has it, or the block is there.

        A block is encoded under its lease, so that one of those who put it at once does so. Whoever commits the
        block ends its lease; ``release`` does so where it is not committed.
        """

    def release(self, name: bytes, lease: str) -> None:
        """End a lease that ``lease`` gave; another's stays."""

    def add(self, row: Row) -> bool:
        """Commit a block, and end its lease; False where a block of that name is committed already."""

    def remove(self, row: Row, little: bool = False, unused: bool = False) -> bool:
        """Remove a block's row if it still names the same file; False otherwise. The caller removes the file afterwards.

        ``little``: wait little for others; a loss of power may undo it. ``unused``: only if it is not pinned, no block follows
        it, and it was not used since it was added.
        """

    def evict(self, most: int = 512) -> list[Evicted]:
        """Remove the rows that ``Shelf.evict`` says, ``most`` at once; the caller removes the files afterwards."""

    def touch(self, rows: Sequence[Row], hit: bool = True, **counts: int) -> None:
        """Set the blocks' time of use to now, and their hits one up if ``hit``; add ``counts`` to the counters.

        Best effort: skipped where the index cannot be written at once, and a loss of power may undo it.
        """

    def pin(self, row: Row, pinned: bool) -> None:
        """Keep a block and its ancestors from eviction, or release them."""

    def set_limit(self, name: str, limit: int | None, tenant: str | None = None) -> None:
        """Set "max_bytes", the quota, or "max_age", seconds that an unused block lives, as a counter; None: no limit.

        ``tenant``: of that tenant's blocks, beside those of the store (``limit_of``).
        """

    def set_data(self, data: str) -> None:
        """Record the folder or URL of the files."""
