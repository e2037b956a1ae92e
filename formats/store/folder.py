"""Law: the names, file types and permissions of what belongs to a store's folder (SPEC IV.4).

A store may come from a stranger: names of another form are refused, links are not followed, pipes are not opened, and new files
are private unless the user declares the store shared.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from pathlib import Path

from pqcodec.errors import CorruptStream, InvalidArgument

EXTENSION = ".pqkv"
PRIVATE, SHARED = 0o700, 0o777  # modes of folders; files get them without execution. The umask applies to both.
_BLOCK = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})-[0-9a-f]{12}\.pqkv")
_PARTIAL = re.compile(r"[0-9a-f]{2}/\.[0-9a-f]{64}-[0-9a-f]{12}\.pqkv\.[0-9a-f]+\.part")


# -- names -------------------------------------------------------------------------------------------------------
def new_block_file(name: bytes) -> str:
    """A name, unique to this write, for the file of the block called ``name``."""
    text = name.hex()
    return f"{text[:2]}/{text}-{secrets.token_hex(6)}{EXTENSION}"


def is_block_file(file: object, name: bytes | None = None) -> bool:
    """Whether ``file`` is a name that a store gives to a block's file (of the block called ``name``, if given).

    >>> is_block_file(new_block_file(bytes(32))), is_block_file("../../precious")
    (True, False)
    """
    found = _BLOCK.fullmatch(file) if isinstance(file, str) else None
    return found is not None and name in (None, bytes.fromhex(found[2]))


def is_partial_file(file: str) -> bool:
    """Whether ``file`` is the name of a block's file while it is being written."""
    return _PARTIAL.fullmatch(file) is not None


def checked_block_file(file: str) -> str:
    """``file``; raises CorruptStream for a name that a store does not give to a block's file."""
    if not is_block_file(file):
        form = f"xx/xx..-............{EXTENSION} with hexadecimal digits"
        raise CorruptStream(
            f"a block's file is called {file!r:.100}; a store calls them {form}: nothing of that name is touched"
        )
    return file


# -- folders and files -------------------------------------------------------------------------------------------
def check_folder(path: Path) -> None:
    """Raises InvalidArgument where ``path`` exists and is no folder."""
    if path.exists() and not path.is_dir():
        raise InvalidArgument(
            f"{path}: is a file, no prefix store, which is a folder; `pqcodec inspect` tells what a file holds"
        )


def make_folder(path: Path, shared: bool) -> None:
    """Make a folder of the store if it is missing; without ``shared``, make an existing one of this user private.

    Raises InvalidArgument for a link or a file at ``path``, and OSError.
    """
    try:
        path.mkdir(mode=SHARED if shared else PRIVATE)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            advice = "move it away, and name the place of the files as data (--data) if they lie elsewhere"
            raise InvalidArgument(f"{path}: is {type_in_words(found)}; a store's own folders are real ones: {advice}") from None
        if not shared:
            _narrow(path, found)


def make_file(path: Path, shared: bool) -> None:
    """Make an empty file of the store if it is missing; check an existing one (``check_file``).

    Raises InvalidArgument for a link, a pipe or a folder at ``path``, and OSError.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, (SHARED if shared else PRIVATE) & 0o666))
    except FileExistsError:
        check_file(path, shared)


def check_file(path: Path, shared: bool) -> None:
    """Check that a file is missing, or regular and without hard links; without ``shared``, make this user's private.

    Raises InvalidArgument, and OSError.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        what = type_in_words(found) if not stat.S_ISREG(found.st_mode) else f"one file under {found.st_nlink} names"
        raise InvalidArgument(f"{path}: is {what}; a store writes to regular files of its own only: move it away, or copy it")
    if not shared:
        _narrow(path, found)


def denied(path: Path) -> OSError | None:
    """The OSError (EROFS or EACCES) with which a write to ``path`` would fail; None where it is missing or writable."""
    if not path.exists() or os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        return None
    read_only = hasattr(os, "statvfs") and os.statvfs(path).f_flag & os.ST_RDONLY
    code = errno.EROFS if read_only else errno.EACCES
    return OSError(code, os.strerror(code), str(path))


def is_regular(path: Path) -> bool:
    """Whether a path is a regular file in a folder, neither being a link; raises FileNotFoundError."""
    return stat.S_ISDIR(os.lstat(path.parent).st_mode) and stat.S_ISREG(os.lstat(path).st_mode)


def type_in_words(found: os.stat_result) -> str:
    """The file type in a stat result, in words."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(found.st_mode), "no regular file")


def _narrow(path: Path, found: os.stat_result) -> None:
    if found.st_mode & 0o077 and hasattr(os, "geteuid") and found.st_uid == os.geteuid():
        os.chmod(path, stat.S_IMODE(found.st_mode) & PRIVATE)
