"""Law: what a cache was begun with, noted on it: the model, and the preset whose errors its numbers have.

Who keeps a cache asks here, so that numbers which have lost something once are not kept as another model's, or as more exact
than they are: a cache of a store, and one of a file, which may go into another store or another file.
"""

from __future__ import annotations

from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import Identity

EXACT = "exact"  # the preset that keeps all numbers
UNKNOWN = "unknown"  # of a file that does not tell its preset
_NOTE = "pqcodec_begun_by"  # attribute of a cache: the digest of the model's identity then, and the preset


def begin(cache: Any, identity: Identity | None, preset: str) -> None:
    """Note by which model, and how run, a cache was begun, and of which preset its numbers are ("": none has lost anything).

    A config alone, or None, is any model of its kind.
    """
    digest = identity.digest() if identity is not None and identity.weights else None
    setattr(cache, _NOTE, (digest, "" if preset == EXACT else preset))


def check_model(cache: Any, identity: Identity) -> None:
    """Raises InvalidArgument for a cache that was begun by another model, or one that has changed."""
    digest = getattr(cache, _NOTE, (None, ""))[0]
    if identity.weights and digest not in (None, identity.digest()):
        raise InvalidArgument("the model, or how it is run, has changed since this cache was begun; compute it anew")


def check_begun(cache: Any, identity: Identity, preset: str) -> None:
    """Raises InvalidArgument as ``check_model`` does, and for a cache that was begun with another preset."""
    check_model(cache, identity)
    before = getattr(cache, _NOTE, (None, ""))[1]
    if before not in ("", preset):
        raise InvalidArgument(
            f"this cache goes on from numbers of preset {before!s:.60}, whose errors a store of preset {preset} would keep as "
            "its own; compute it anew"
        )


def presets_of(cache: Any, preset: str = EXACT) -> str:
    """The presets whose errors a cache has once it is kept with one more; "" where it has lost nothing."""
    before = getattr(cache, _NOTE, (None, ""))[1]
    return " and ".join(sorted({*before.split(" and "), preset} - {"", EXACT}))
