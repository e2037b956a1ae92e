"""Law: what the verbs of ``pqcodec store`` share: opening a store, its prefixes, and finding blocks by the names users type."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.outcome import say

if TYPE_CHECKING:
    from pqcodec.formats.store.index import Row
    from pqcodec.formats.store.shelf import Shelf

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="The store's folder, or the URL of Redis with its index.")]
Data = Annotated[
    str | None, typer.Option("--data", metavar="PLACE", help="Folder or URL of the store's files, where they are elsewhere.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
Models = dict[bytes, tuple[str, str]]  # label and preset of each root
SHORT = 12  # hexadecimal digits of a name in tables
NO_TENANT = "none"  # blocks that were put without a salt
LEAST = 6  # digits that a user has to give


@contextmanager
def opened(folder: str, data: str | None, new: bool = False, shared: bool = False) -> Iterator[Shelf]:
    """A context with the store in a folder; its warnings become lines on stderr. ``new``: create a missing store.

    Raises FileNotFoundError, InvalidArgument, and as ``Shelf`` does.
    """
    from pqcodec.formats.store.redis_index import is_address
    from pqcodec.formats.store.shelf import Shelf

    if is_address(folder):
        _check_address(folder, data, new)
    else:
        _check_folder(folder, data, new)
        shared = shared or (not new and _is_shared(Path(folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_: say(f"pqcodec: {message}")  # type: ignore[assignment]
        shelf = Shelf(folder, data, shared=shared)
        try:
            yield shelf
        finally:
            shelf.close()


def _check_folder(folder: str, data: str | None, new: bool) -> None:
    """Raises InvalidArgument or FileNotFoundError where a local store is none, unless it is to be made."""
    from pqcodec.formats.places.remote import check_local
    from pqcodec.formats.store.folder import check_folder

    check_local(folder, "the index of a store is in a local folder or in Redis; pass the URL of its files by --data")
    check_folder(Path(folder))
    if not new and not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    if not new and data is None and not is_store(Path(folder)):
        raise InvalidArgument(f"{folder}: is no prefix store; it has no index")


def _check_address(address: str, data: str | None, new: bool) -> None:
    """Raises InvalidArgument where a server has no store of that name, unless it is to be made."""
    from pqcodec.formats.store.redis_index import RedisIndex

    index = RedisIndex(address)
    index.close()
    if index.new and not new and data is None:
        raise InvalidArgument(f"{index.label}: is no prefix store; the server has none of that name (store=NAME, else default)")


def is_store(folder: Path) -> bool:
    """Whether a folder has the index or the blocks of a store."""
    from pqcodec.formats.store.sqlite_index import INDEX

    return (folder / INDEX).is_file() or any(folder.glob("blocks/*/*.pqkv"))


def _is_shared(folder: Path) -> bool:
    """Whether a store's index is open to other users, which upkeep must not change."""
    from pqcodec.formats.store.sqlite_index import INDEX

    index = folder / INDEX
    return index.is_file() and index.stat().st_mode & 0o077 != 0


def check_place(shelf: Shelf) -> None:
    """Raises InvalidArgument for a store with blocks but none of their files, which are probably elsewhere."""
    files = {row.file for row in shelf.index.all()}
    if files and not any(file in files for file, _ in shelf.files.all()):
        raise InvalidArgument(
            f"{shelf.place}: none of its {len(files)} blocks has a file in {shelf.files.location}; "
            "pass by --data where they lie"
        )


def models_of(shelf: Shelf) -> Models:
    """(label, preset) of each root, ("?", "?") for an unknown one."""
    found: Models = defaultdict(lambda: ("?", "?"))
    for root, (label, settings) in shelf.index.roots().items():
        codec = settings.get("codec")
        found[root] = (label, str(codec.get("preset", "?")) if isinstance(codec, dict) else "?")
    return found


def tenant_of(shelf: Shelf, text: str) -> str:
    """The id of a tenant of a store that begins with ``text``, or a whole one; "" for "none". Raises InvalidArgument."""
    from pqcodec.formats.store.keys import is_tenant_id

    if text == NO_TENANT:
        return ""
    found = {tenant for tenant in shelf.index.owners().values() if len(text) >= LEAST and tenant.startswith(text.lower())}
    if len(found) == 1:
        return found.pop()
    if is_tenant_id(text.lower()):  # who has no block yet
        return text.lower()
    what = f"{len(found)} tenants are called so" if found else "no tenant is called so"
    raise InvalidArgument(f"--tenant {text}: {what}; give the id that stats tells, all of its 32 digits if it is new, or none")


# -- names -------------------------------------------------------------------------------------------------------
def short(row: Row) -> str:
    """The first digits of a block's name."""
    return row.name.hex()[:SHORT]


def named(rows: Sequence[Row], text: str) -> Row:
    """The block whose name begins with ``text``; raises InvalidArgument for none or several."""
    if not re.fullmatch(f"[0-9a-f]{{{LEAST},64}}", text.lower()):
        raise InvalidArgument(f"{text!r}: the name of a block is expected, {LEAST} of its hexadecimal digits or more; see ls")
    found = [row for row in rows if row.name.hex().startswith(text.lower())]
    if len(found) > 1:
        some = ", ".join(short(row) for row in found[:5]) + (" ..." if len(found) > 5 else "")
        raise InvalidArgument(f"{text}: {len(found)} blocks are called so: {some}; give more digits")
    if not found:
        raise InvalidArgument(f"{text}: no block is called so; see ls, or ls --blocks")
    return found[0]


# -- prefixes ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PrefixBlocks:
    """A prefix: a block without children, and its ancestors."""

    blocks: list[Row]  # from the first token on
    own: list[Row]  # those in no other prefix

    @property
    def end(self) -> Row:
        """The last block."""
        return self.blocks[-1]

    @property
    def complete(self) -> bool:
        """Whether the store has all blocks from token 0 on."""
        return self.blocks[0].start == 0


def prefixes(rows: Sequence[Row]) -> list[PrefixBlocks]:
    """The prefixes that some blocks form, most recently used first."""
    by_name, parents = {row.name: row for row in rows}, {row.parent for row in rows}
    chains = []
    for row in rows:
        if row.name not in parents:
            chain = [row]
            while (before := by_name.get(chain[-1].parent)) is not None and before.whole and before.end == chain[-1].start:
                chain.append(before)
            chains.append(chain[::-1])
    users = Counter(row.name for chain in chains for row in chain)
    found = [PrefixBlocks(chain, [row for row in chain if users[row.name] == 1]) for chain in chains]
    return sorted(found, key=lambda prefix: -prefix.end.used)
