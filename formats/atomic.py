"""Law: a file is there whole or not at all: it is written beside its place and renamed when it is complete."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; it takes the place of ``path`` when the block ends well and is removed when it does not.

    A place that is no regular file (a device, a pipe) is written directly. Raises OSError.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, a file is to be written here", str(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(final.parent))
    if final.exists() and not final.is_file():
        yield final
        return
    temporary = final.with_name(f".{final.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = (final if final.exists() else temporary).stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # a library may have put a file of its own in this place
        _sync(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
