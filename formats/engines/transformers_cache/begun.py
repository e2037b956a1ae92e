"""Law: a note on each loaded cache: the model it belongs to, and the preset whose coding errors its numbers already have.

Whatever saves a cache checks the note first, so that a cache which came from a store or a file is not saved as another model's,
or under a preset that claims smaller errors than it has.
"""

from __future__ import annotations

from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import Identity

EXACT = "exact"  # the preset that keeps all numbers as they are
UNKNOWN = "unknown"  # in place of the preset of a file that does not record it
_NOTE = "pqcodec_begun_by"  # attribute of a cache: (digest of the model's identity, preset)


def begin(cache: Any, identity: Identity | None, preset: str) -> None:
    """Note on a cache its model and the preset that its numbers were decoded from ("": all numbers are the model's own).

    An identity without weights (of a config), or None, leaves the model open.
    """
    digest = identity.digest() if identity is not None and identity.weights else None
    setattr(cache, _NOTE, (digest, "" if preset == EXACT else preset))


def check_model(cache: Any, identity: Identity) -> None:
    """Raises InvalidArgument for a cache of another model, or of this one before it changed; a cache without a note passes."""
    digest, _ = _note(cache)
    if identity.weights and digest not in (None, identity.digest()):
        raise InvalidArgument("the model, or how it is run, has changed since this cache was begun; compute it anew")


def check_begun(cache: Any, identity: Identity, preset: str) -> None:
    """Raises InvalidArgument as ``check_model`` does, and for a cache whose numbers were decoded from another preset."""
    check_model(cache, identity)
    _, before = _note(cache)
    if before not in ("", preset):
        raise InvalidArgument(
            f"this cache goes on from numbers of preset {before!s:.60}, whose errors a store of preset {preset} would keep as "
            "its own; compute it anew"
        )


def presets_of(cache: Any, *presets: str) -> str:
    """The presets, joined by " and ", whose errors a cache has once it is saved with ``presets``; "" for exact numbers."""
    _, before = _note(cache)
    return " and ".join(sorted({*before.split(" and "), *presets} - {"", EXACT}))


def _note(cache: Any) -> tuple[bytes | None, str]:
    """The note on a cache; one without a note is of any model and exact."""
    found: tuple[bytes | None, str] = getattr(cache, _NOTE, (None, ""))
    return found
