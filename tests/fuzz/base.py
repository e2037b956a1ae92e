"""What all of it shares: where inputs lie, how large they may be, and the errors of the harness."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqcodec.errors import CorruptStream, InvalidArgument, MissingTable, PQError, TruncatedStream, UnsupportedStream

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
FOLDER = Path(__file__).parents[1] / "data" / "fuzz"  # TARGET/: seeds and what was kept; found/TARGET/: what showed a fault
MAX_BYTES, KEPT_BYTES = 8192, 3000  # of an input; of one that is kept
MOST_UNPACKED = 1100  # times, at the most, does deflate shrink
SMALL = 1 << 11  # coordinates of one token of every block: what the slow backend decodes, too
FEW = 1 << 8  # coordinates in all, dimensions of 0 counted as 1: what the decoder written from the specification decodes, too
HANG_SECONDS, DEAD_SECONDS, SLOW_SECONDS = 30.0, 90.0, 1.5  # ends an input; ends the process; is told
ROOM_BYTES, GROWTH_BYTES = 2 << 30, 64 << 20  # of address space; of memory that one input may take
Read = Callable[[bytes], None]
ERRORS = {  # the specification's words for them; of a single stream in the place of a file the program says what it is
    type(None): "",
    CorruptStream: "corrupt",
    InvalidArgument: "corrupt",
    TruncatedStream: "truncated",
    UnsupportedStream: "unsupported",
    MissingTable: "unsupported",
}
sys.path.append(str(HERE.parent))  # where second_decoder and second_reader lie


class Wrong(AssertionError):
    """Answers that contradict each other."""


class Hang(BaseException):
    """An input took too long."""


def attempt(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, PQError | None]:
    """What a call gives, or how it refuses."""
    try:
        return call(*args, **options), None
    except PQError as error:
        return None, error


def as_specified(read: Read, procedure: Callable[[bytes], str]) -> Read:
    """A target that refuses what a procedure of the specification refuses, with the same error."""

    def target(data: bytes) -> None:
        _, refused = attempt(read, data)
        said, told = ERRORS[type(refused)], procedure(data)
        if said != told:
            raise Wrong(f"the specification says {told or 'sound'}, the program {said or 'sound'}")
        if refused:
            raise refused

    return target


def signature(error: BaseException) -> str:
    """Kind of an error and where it arose: the last line of this project that it passed, and the last one of all."""
    root = error
    while isinstance(root.__cause__, Exception):  # where it arose, not where it was told on
        root = root.__cause__
    frames = traceback.extract_tb(root.__traceback__)
    ours = [
        f
        for f in frames
        if Path(f.filename).is_relative_to(ROOT) and ".venv" not in f.filename and HERE not in Path(f.filename).parents
    ]
    where = [f"{Path(f.filename).name}:{f.lineno}" for f in (ours[-1:] + frames[-1:])]
    return " ".join([type(error).__name__, *dict.fromkeys(where), *([str(error)] if isinstance(error, Wrong) else [])])
