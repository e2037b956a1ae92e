"""Fuzzing of every parser, and edits of every container: ``python -m tests.fuzz``."""

from .base import FOLDER
from .codings import CODINGS, is_of
from .damage import CONTAINERS, Container, edits
from .mutations import EDITS
from .seeds import corpus
from .sessions import Session, random_session, warm
from .table import TARGETS, Target, mutated

__all__ = [
    "CODINGS",
    "CONTAINERS",
    "EDITS",
    "FOLDER",
    "TARGETS",
    "Container",
    "Session",
    "Target",
    "corpus",
    "edits",
    "is_of",
    "mutated",
    "random_session",
    "warm",
]
