"""Law: the end of a verb: messages, JSON and exit codes; bad input never causes a traceback."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from pqcodec.errors import CorruptStream, InvalidArgument, PQError, UnsupportedStream

DAMAGED, USAGE, UNSUPPORTED, IO_ERROR, INTERRUPTED = 1, 2, 3, 4, 130
CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (UnsupportedStream, UNSUPPORTED),
    (CorruptStream, DAMAGED),
    (InvalidArgument, USAGE),
    (BrokenPipeError, CLOSED_PIPE),
    (OSError, IO_ERROR),
    (MemoryError, IO_ERROR),
    (KeyboardInterrupt, INTERRUPTED),
)


def reported(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that turns expected errors into a line on stderr (with --json also an object on stdout) and an exit code."""

    @functools.wraps(verb)
    def run(*args: Any, **options: Any) -> None:
        try:
            verb(*args, **options)
            sys.stdout.flush()
        except (PQError, OSError, MemoryError, KeyboardInterrupt) as error:
            if os.environ.get("PQCODEC_DEBUG") == "1":
                traceback.print_exc()
            code = code_of(error)
            if isinstance(error, BrokenPipeError):
                discard_output()
            else:
                if options.get("as_json"):
                    print_json({"error": {"kind": type(error).__name__, "message": message_of(error), "exit_code": code}})
                say(f"pqcodec: {message_of(error)}")
            raise typer.Exit(code) from None

    return run


def discard_output() -> None:
    """Let go of what stdout and stderr have buffered, for nobody reads it: a later flush would fail again, with a message."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def code_of(error: BaseException) -> int:
    """The exit code for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), DAMAGED)


def say(line: str) -> None:
    """Print a line on stderr, with control characters, which a stranger's file may contain in names, escaped."""
    print("".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in line), file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """Print a value as one line of JSON in ASCII on stdout."""
    print(json.dumps(value, ensure_ascii=True, allow_nan=False))


def shown(name: str) -> str:
    """A name for a terminal, escaped if it has unprintable characters."""
    return name if name.isprintable() else ascii(name)


def bytes_text(count: float) -> str:
    """A size in B, kB, MB, GB or TB (powers of 1,000), to three digits.

    >>> bytes_text(999), bytes_text(1234567)
    ('999 B', '1.23 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def message_of(error: BaseException) -> str:
    """The message for an error, without a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return f"out of memory {error}".strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
