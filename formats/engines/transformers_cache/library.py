"""Law: which releases of transformers this code knows; others are refused before they can answer wrong.

Before 5.24 ``generate`` never asks a purely recurrent cache what it holds, and with ``prefill_chunk_size`` feeds a cache's own
text to the model again: both give a wrong answer that no cache can see coming.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import Any

from pqcodec.errors import InvalidArgument

FIRST, BEYOND = (5, 24), (5, 25)  # the first known release, and the first that was not tried


def cache_utils() -> Any:
    """transformers' module of caches; raises InvalidArgument where transformers is missing or older than ``FIRST``."""
    check()
    from transformers import cache_utils

    return cache_utils


@lru_cache(maxsize=1)
def check() -> None:
    """Raises InvalidArgument where transformers is missing or older than ``FIRST``."""
    try:
        import transformers
    except ImportError as error:
        raise InvalidArgument(
            "caches of transformers need a package that is missing: pip install 'pqcodec[transformers]'"
        ) from error
    problem = release_problem(getattr(transformers, "__version__", None) or version("transformers"))
    if problem:
        raise InvalidArgument(problem)


def release_problem(release: str) -> str:
    """Why a release of transformers cannot be used, or an empty string. Later ones than were tried may be.

    >>> release_problem("5.24.1")
    ''
    >>> release_problem("5.20.0")
    "transformers 5.20.0 may feed a kept cache's text to the model again; ... pip install 'transformers>=5.24,<5.25'"
    """
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in (*release.split("."), "0")[:2])
    if (major, minor) >= FIRST:
        return ""
    known, beyond = (".".join(map(str, each)) for each in (FIRST, BEYOND))
    return (
        f"transformers {release} may feed a kept cache's text to the model again; install a newer one: "
        f"pip install 'transformers>={known},<{beyond}'"
    )
