"""Law: ``--memory``: measuring free memory, and refusing tensors before they are allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.sizes import size_of
from pqcodec.tools.outcome import bytes_text

Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory that tensors may take at once, such as 4GB (default: what is free)."),
]
_CGROUPS = (  # both versions of control groups: folder, limit, usage, prefix of the names of cached files' sizes
    ("sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class Limit:
    """The memory that a tensor of one file may take."""

    bytes: int | None  # None: unknown, so no limit
    source: str  # its origin, for the message

    @classmethod
    def of(cls, text: str | None, jobs: int) -> Limit:
        """The share of one of ``jobs`` files in the size of ``--memory``, or in free memory; raises InvalidArgument."""
        given = available() if text is None else size_of(text, "--memory")
        if given is None:
            return cls(None, "")
        source = f"{bytes_text(given)} are free here" if text is None else f"--memory allows {bytes_text(given)}"
        if jobs > 1:
            source += f", {bytes_text(given // jobs)} for each of {jobs} jobs"
        return cls(given // max(jobs, 1), source)

    def check(self, file: str, name: str, needed: int, ways: str) -> None:
        """Raises InvalidArgument for a tensor that needs more bytes; ``ways``: what else would help, for the message."""
        if self.bytes is not None and needed > self.bytes:
            takes = f"{file}: tensor {name!r} takes {bytes_text(needed)} of memory at once"
            raise InvalidArgument(f"{takes}, {self.source}; pass a larger --memory, {ways}")


def available(root: Path = Path("/")) -> int | None:
    """Bytes available without swapping, within this process's control groups; None where that is unknown."""
    found = [_free(root)]
    for folder, limit, taken, prefix in _CGROUPS:
        for group in _groups(root):
            group_folder = root / folder / group
            most, used = _number(group_folder / limit), _number(group_folder / taken)
            if most is not None and used is not None:
                found.append(max(most - used + _cached(group_folder / "memory.stat", prefix), 0))
    return min((size for size in found if size is not None), default=None)


def _free(root: Path) -> int | None:
    """Available bytes of the whole machine; its total where only that is known."""
    kilobytes = _fields(root / "proc/meminfo").get("MemAvailable:")
    if kilobytes is not None:
        return 1024 * kilobytes
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _groups(root: Path) -> list[Path]:
    """The memory control groups of this process and their ancestors, as relative paths."""
    found = {Path(".")}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, kinds, path = (*line.split(":", 2), "", "", "")[:3]
        if not kinds or "memory" in kinds.split(","):
            below = Path(path.lstrip("/"))
            found |= {below, *below.parents}
    return sorted(group for group in found if ".." not in group.parts)


def _cached(stat: Path, prefix: str) -> int:
    """Bytes of a group's cached files, which the kernel can free."""
    fields = _fields(stat)
    return sum(fields.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """The numbers in a file with lines of a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
