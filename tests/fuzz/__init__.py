"""Fuzzing of every parser, and edits of every container: ``python -m tests.fuzz``."""

from .base import FOLDER
from .damage import CONTAINERS, Container, edits
from .mutations import EDITS
from .seeds import corpus
from .sessions import Session, random_session, warm
from .table import TARGETS, Target

__all__ = [
    "CONTAINERS",
    "EDITS",
    "FOLDER",
    "TARGETS",
    "Container",
    "Session",
    "Target",
    "corpus",
    "edits",
    "random_session",
    "warm",
]
