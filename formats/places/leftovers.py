"""Law: temporary names tell who writes under them, so that what a killed process left behind is found and removed.

A name holds a digest of the place where its writer runs (the boot of the machine and the namespace of process numbers, or the
machine's name where there is neither) and the writer's process number. Of the same place, a process whose number nobody has is
gone, and nobody else writes under its names. What another machine, container or boot left is not judged, and stays.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

PART, OLD = ".part", ".old"  # being written; set aside until a new one is in its place
_LONGEST = 200  # characters of the final name: with the rest, a name of any file system


def temporary_name(final: Path) -> str:
    """A name beside ``final`` that is unique to this write, and its writer's; ``PART`` or ``OLD`` follows it."""
    return f"{_beginning(final)}{_place()}{os.getpid():08x}{secrets.token_hex(4)}"


def remove_dead(final: Path) -> None:
    """Remove what writers of ``final`` that are gone left beside it; an old folder goes back where no new one came."""
    name = re.compile(re.escape(_beginning(final)) + _place() + f"([0-9a-f]{{8,}})[0-9a-f]{{8}}({PART}|{OLD})")
    with suppress(OSError), os.scandir(final.parent) as there:
        found = [(Path(entry.path), match) for entry in there if (match := name.fullmatch(entry.name))]
        for path, match in found:
            if _is_gone(int(match[1], 16)):
                if match[2] == OLD and not final.exists():
                    os.rename(path, final)
                else:
                    _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder and what is in it, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _beginning(final: Path) -> str:
    return f".{final.name[:_LONGEST]}."


def _is_gone(process: int) -> bool:
    """Whether no process has this number; False where that cannot be asked."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user, or no process number
        return False
    return False


@cache
def _place() -> str:
    """8 hexadecimal digits for where process numbers are this process's own."""
    parts = []
    with suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.blake2b("\0".join(parts or [platform.node()]).encode(), digest_size=4).hexdigest()
