"""Law: the words that a shell offers for an option's value; typer asks for them, and installs itself in the shell."""

from __future__ import annotations

from collections.abc import Iterable


def presets(incomplete: str) -> list[str]:
    """Names of presets that begin so."""
    from pqcodec.codings.presets import PRESETS

    return _beginning(PRESETS, incomplete)


def backends(incomplete: str) -> list[str]:
    """Names of backends that begin so."""
    from pqcodec.backends import BACKENDS

    return _beginning(("auto", *BACKENDS), incomplete)


def containers(incomplete: str) -> list[str]:
    """Kinds of containers that begin so."""
    from pqcodec.formats.containers.kinds import KINDS

    return _beginning(KINDS, incomplete)


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
