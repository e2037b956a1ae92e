"""Law: where a verb reads and writes: "-" is stdin or stdout, and no file is replaced that the user did not offer."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pqcodec.errors import InvalidArgument

STANDARD = "-"


@contextmanager
def input_file(name: str) -> Iterator[Path]:
    """The path of an input; stdin is first copied into a temporary file, because readers go from place to place."""
    if name != STANDARD:
        yield Path(name)
        return
    if sys.stdin.isatty():
        raise InvalidArgument("INPUT is '-', but stdin is a terminal; pipe a file into it")
    with tempfile.NamedTemporaryFile(prefix="pqcodec-", suffix=".stdin") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
        copy.flush()
        yield Path(copy.name)


def check_output(source: str, target: str, force: bool) -> None:
    """Refuse an output that is the input, or that exists without ``force``; raises InvalidArgument."""
    if target == STANDARD:
        if sys.stdout.isatty():
            raise InvalidArgument("OUTPUT is '-', but stdout is a terminal; pipe it somewhere")
        return
    if not os.path.exists(target):
        return
    if source != STANDARD and os.path.exists(source) and os.path.samefile(source, target):
        raise InvalidArgument(f"{target}: is the input as well; write to another file")
    if not force and os.path.isfile(target):
        raise InvalidArgument(f"{target}: exists; pass --force to replace it")
