"""Law: ``--memory``: bytes of a size, what the machine has to give, and who is refused before anything is allocated."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.outcome import bytes_text

Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory that tensors may take at once, such as 4GB (default: what is free)."),
]
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_CGROUPS = (  # of both versions: the folder, the limit, what is taken, and the beginning of what could be given back
    ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def size_of(text: str, option: str) -> int:
    """Bytes of a size as people write it; raises InvalidArgument.

    >>> size_of("20GB", "--memory"), size_of("1.5 MiB", "--memory"), size_of("4096", "--memory")
    (20000000000, 1572864, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise InvalidArgument(f"{option} {text!r}: a size such as 20GB, 500MB, 4GiB or 1000000 is expected")
    size = float(found[1]) * (1024 if found[3] else 1000) ** _PREFIXES[found[2]]
    if size >= 1 << 63:
        raise InvalidArgument(f"{option} {text:.40}: is larger than any memory or disk; 8 EiB are too many")
    return round(size)


@dataclass(frozen=True)
class Limit:
    """Memory that one file's tensor may take."""

    bytes: int | None  # None: the machine does not tell
    told: str  # where it comes from

    @classmethod
    def of(cls, text: str | None, jobs: int) -> Limit:
        """What ``--memory`` says, or what is there, for each of so many files at once; raises InvalidArgument."""
        given = available() if text is None else size_of(text, "--memory")
        if given is None:
            return cls(None, "")
        told = f"{bytes_text(given)} are free here" if text is None else f"--memory allows {bytes_text(given)}"
        if jobs > 1:
            told += f", {bytes_text(given // jobs)} for each of {jobs} jobs"
        return cls(given // max(jobs, 1), told)

    def check(self, file: str, name: str, needed: int, ways: str) -> None:
        """Refuse a tensor that takes more; ``ways``: what else helps. Raises InvalidArgument."""
        if self.bytes is not None and needed > self.bytes:
            takes = f"{file}: tensor {name!r} takes {bytes_text(needed)} of memory at once"
            raise InvalidArgument(f"{takes}, {self.told}; pass a larger --memory, {ways}")


def available(root: Path = Path("/")) -> int | None:
    """Bytes to be had without swapping, inside this process's control groups too; None where the machine tells nothing."""
    found = [_free(root)]
    for folder, limit, taken, prefix in _CGROUPS:
        for group in _groups(root):
            place = root / folder / group
            most, used = _number(place / limit), _number(place / taken)
            if most is not None and used is not None:
                found.append(max(most - used + _cached(place / "memory.stat", prefix), 0))
    return min((size for size in found if size is not None), default=None)


def _free(root: Path) -> int | None:
    """Of the whole machine; where it says only what it has at all, that."""
    told = _fields(root / "proc/meminfo").get("MemAvailable:")
    if told is not None:
        return 1024 * told
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _groups(root: Path) -> list[Path]:
    """The control groups of this process and all above them, relative to the folder that holds them."""
    found = {Path(".")}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = (*line.split(":", 2), "", "", "")[:3]
        if not kinds or "memory" in kinds.split(","):
            place = Path(path.lstrip("/"))
            found |= {place, *place.parents}
    return sorted(group for group in found if ".." not in group.parts)


def _cached(stat: Path, prefix: str) -> int:
    """Bytes of a group's files in the system's cache, which gives them back."""
    fields = _fields(stat)
    return sum(fields.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file whose lines are a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
