"""Law: sizes in bytes as users give them, to the command line and to public classes: 5000000000, "5GB", "512MiB"."""

from __future__ import annotations

import re
from numbers import Real

from pqcodec.errors import InvalidArgument

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
