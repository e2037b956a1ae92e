"""Law: files of shared tables on the command line: one table, or a folder of one for each layer of keys and of values."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from pqcodec.errors import InvalidArgument

if TYPE_CHECKING:
    from pqcodec.stream.tables import SharedTable

Key = tuple[str, int | None]  # role and layer; None: all layers that have no table of their own
_NAME = re.compile(r"(key|value)(?:\.(0|[1-9][0-9]{0,5}))?\.pqt")


def table_file(key: Key) -> str:
    """The name in a folder of the table of a role and a layer.

    >>> table_file(("key", 12)), table_file(("value", None))
    ('key.12.pqt', 'value.pqt')
    """
    role, layer = key
    return f"{role}.pqt" if layer is None else f"{role}.{layer}.pqt"


def read_table(path: str) -> SharedTable:
    """The shared table in a file; raises InvalidArgument, OSError, CorruptStream or UnsupportedStream."""
    from pqcodec import constants as c
    from pqcodec.formats.containers.reader import named
    from pqcodec.stream.source import check_regular
    from pqcodec.stream.tables import SharedTable

    check_regular(path)
    with open(path, "rb") as file, named(path):
        return SharedTable.from_bytes(file.read(c.MAX_TABLE_BYTES + 1))


def table_options(path: str | None) -> dict[str, Any]:
    """The option of a ``Recipe`` that the table in a file, or the codebooks in a folder, are; raises as ``read_table`` does."""
    if path is None:
        return {}
    if not os.path.isdir(path):
        table = read_table(path)
        return {table.option: table}
    named = {name: match for name in sorted(os.listdir(path)) if (match := _NAME.fullmatch(name))}
    if not named:
        raise InvalidArgument(f"{path}: holds no tables called key.0.pqt, value.0.pqt and so on, as train-vq writes them")
    found = {}
    for name, match in named.items():
        table = read_table(os.path.join(path, name))
        if table.option != "codebooks":
            raise InvalidArgument(f"{os.path.join(path, name)}: holds {table.content}; a folder of codebooks is expected")
        found[match[1], None if match[2] is None else int(match[2])] = table
    return {"codebooks": found}
