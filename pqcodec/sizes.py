"""Law: sizes and times as users give them, to the command line and to public classes: 5000000000, "5GB", "512MiB"; "30d"."""

from __future__ import annotations

import re
from numbers import Real

from pqcodec.errors import InvalidArgument

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size_of(value: int | float | str, name: str) -> int:
    """A size in bytes; ``name``: of the option or argument, for the message. Raises InvalidArgument.

    >>> size_of("20GB", "--memory"), size_of("1.5 MiB", "--memory"), size_of("4096", "--memory"), size_of(4096, "max_bytes")
    (20000000000, 1572864, 4096, 4096)
    """
    words = f"{name} {value!r:.40}: a size such as 20GB, 500MB, 4GiB or 1000000 is expected"
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", value.strip().lower())
        if found is None or (found[3] and not found[2]):
            raise InvalidArgument(words)
        size = float(found[1]) * (1024 if found[3] else 1000) ** _PREFIXES[found[2]]
    elif isinstance(value, Real) and not isinstance(value, bool) and value >= 0:
        size = value
    else:
        raise InvalidArgument(words)
    if size >= 1 << 63:
        raise InvalidArgument(f"{name} {value!r:.40}: is larger than any memory or disk; 8 EiB are too many")
    return round(size)


def seconds_of(value: float | str, name: str) -> int:
    """A time in whole seconds, 1 or more; ``name``: of the option or argument, for the message. Raises InvalidArgument.

    >>> seconds_of("30d", "max_age"), seconds_of("1.5h", "max_age"), seconds_of(90, "max_age")
    (2592000, 5400, 90)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", str(value).strip().lower())
    seconds = float(found[1]) * _SECONDS.get(found[2], 0) if found and not isinstance(value, bool) else 0.0
    if not 1 <= seconds < 1 << 40:
        raise InvalidArgument(f"{name} {value!r:.40}: a time such as 30d, 12h, 90min or 3600 (seconds) is expected")
    return round(seconds)
