"""Law: a file or folder appears whole or not at all, and is private unless ``permissions`` allows more.

It is written under a temporary name beside its final one and renamed when it is complete. What a writer of the same final name
left behind when it was killed is removed first (``leftovers``).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pqcodec.formats.places.leftovers import OLD, PART, remove_dead, temporary_name

PRIVATE = 0o600
_wanted: ContextVar[int | None] = ContextVar("permissions", default=None)


@contextmanager
def permissions(mode: int) -> Iterator[None]:
    """Files written inside the block get ``mode`` less the umask; folders get it too, and the bits to search them.

    Outside such a block a new file is private (0600), and a file that replaces another keeps the other's mode.
    """
    before = _wanted.set(mode)
    try:
        yield
    finally:
        _wanted.reset(before)


def _kept_mode(final: Path) -> int | None:
    """The mode that the new file takes over from the replaced one; None without such a file, or inside ``permissions``."""
    return final.stat().st_mode & 0o777 if _wanted.get() is None and final.exists() else None


def searchable(mode: int) -> int:
    """The mode of a folder whose files have ``mode``: readers may search it, its owner may fill and remove it."""
    return 0o700 | mode | (mode & 0o444) >> 2


def make_folders(path: Path, mode: int) -> None:
    """Make a folder and its missing parents, all of ``mode`` less the umask; raises OSError."""
    for place in reversed([place for place in (path, *path.parents) if not place.is_dir()]):
        place.mkdir(mode=mode, exist_ok=True)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; it replaces ``path`` when the block succeeds and is removed when it fails.

    A ``path`` that is no regular file (a device, a pipe) is written directly. Raises OSError.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file is to be written here", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(final.parent))
    if final.exists() and not final.is_file():
        yield final
        return
    remove_dead(final)
    temporary = final.with_name(temporary_name(final) + PART)
    try:
        wanted = _wanted.get() or PRIVATE
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, wanted | PRIVATE))
        mode = _kept_mode(final) or temporary.stat().st_mode & wanted
        yield temporary
        _sync(temporary)
        os.chmod(temporary, mode)  # a library may have replaced the temporary file by its own
        os.replace(temporary, final)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name_full_disk(error, path)
        raise
    if os.name == "posix":
        _sync(final.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], mark: str) -> Iterator[Path]:
    """A temporary folder to write into; it replaces ``path`` when the block succeeds and is removed when it fails.

    An existing folder is replaced only if it is empty or holds a file called ``mark``; it is set aside until the new one is
    renamed, and put back if that fails. Raises OSError.
    """
    final = Path(os.path.realpath(path))
    remove_dead(final)
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder, a folder is to be written here", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(final.parent))
    if final.is_dir() and any(final.iterdir()) and not (final / mark).is_file():
        raise FileExistsError(errno.EEXIST, f"is a folder without a {mark}, which is not replaced", str(path))
    unique = temporary_name(final)
    temporary, aside = final.with_name(unique + PART), final.with_name(unique + OLD)
    try:
        wanted = searchable(_wanted.get() or PRIVATE)
        temporary.mkdir(mode=wanted)
        mode = _kept_mode(final) or temporary.stat().st_mode & wanted
        files = mode & (_wanted.get() or 0o666)
        yield temporary
        for place, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _sync(Path(place, name))
                os.chmod(Path(place, name), files)
            os.chmod(place, mode)
            if os.name == "posix":
                _sync(Path(place))
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
    except BaseException as error:
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        shutil.rmtree(temporary, ignore_errors=True)
        _name_full_disk(error, path)
        raise
    if os.name == "posix":
        _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _name_full_disk(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Name the file in an error of a write, which only names what was opened."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if hasattr(errno, "EDQUOT") else (errno.ENOSPC, errno.EFBIG)
    if isinstance(error, OSError) and error.filename is None and error.errno in full:
        error.filename = os.fspath(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
