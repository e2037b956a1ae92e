"""Law: files of shared tables on the command line: tables, or folders of one for each layer of keys and of values."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pqcodec.errors import InvalidArgument, MissingTable

if TYPE_CHECKING:
    from pqcodec.formats.containers.reader import TensorFile
    from pqcodec.stream.header import Header
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


def table_options(paths: Sequence[str]) -> dict[str, Any]:
    """Tables in files, or folders of tables, by the options of ``encode`` that take them; raises as ``read_table`` does."""
    found: dict[str, Any] = {}
    for path in paths:
        option, given = _given(path)
        if option in found:
            raise InvalidArgument(f"--table {path}: {option} are given twice; a folder has those of several layers")
        found[option] = given
    return found


def tables_at(paths: Sequence[str]) -> list[SharedTable]:
    """All tables in files, or folders of tables; raises as ``read_table`` does."""
    given = [found for _, found in map(_given, paths)]
    return [table for found in given for table in (found.values() if isinstance(found, dict) else [found])]


def open_with_tables(path: str, tables: Sequence[SharedTable]) -> TensorFile:
    """An encoded file whose streams may name some of the tables; a single stream that names another raises MissingTable."""
    from pqcodec.formats.containers.bare_stream import SingleStream
    from pqcodec.formats.containers.kinds import open_encoded

    file = open_encoded(path, tables)
    if isinstance(file, SingleStream):
        try:
            headers_with_tables(file, file.names[0], "the stream")
        except BaseException:
            file.close()
            raise
    return file


def headers_with_tables(file: TensorFile, name: str, what: str = "") -> list[Header]:
    """The headers of a coded tensor's streams; raises MissingTable where one names a table that is not given, nor in the file.

    ``what``: what the message calls the stream.
    """
    from pqcodec.stream.header import read_header

    headers = [read_header(file.stream(name, part)) for part in range(file.entry(name).parts)]
    for header in headers:
        for field, part in header.named.items():
            if not part.here:
                others = f", and none of the {len(file.given)} that were given is it" if file.given else ""
                raise MissingTable(
                    f"{file.label}: {what or f'tensor {name!r}'} names the shared table {part.name.hex()}, "
                    f"{_held(header, field)}{others}: give the file that holds it by --table PATH"
                )
    return headers


def _held(header: Header, field: str) -> str:
    """What the table holds that a header names in a field."""
    from pqcodec.codings.declared import DECLARED

    codebook = "codebooks" if DECLARED[header.coding].by_vectors else "levels"
    return {"basis": "a basis", "shared_ranges": "ranges", "codebook": codebook}[field]


def _given(path: str) -> tuple[str, Any]:
    """The option that a file's table is for and the table, or a folder's tables by role and layer."""
    from pqcodec.formats.places.remote import check_local

    check_local(path, "--table takes a local file or folder; download it first")
    if not os.path.isdir(path):
        table = read_table(path)
        return table.option, table
    named = {name: match for name in sorted(os.listdir(path)) if (match := _NAME.fullmatch(name))}
    if not named:
        raise InvalidArgument(f"{path}: holds no tables called key.0.pqt, value.0.pqt and so on, as train-vq writes them")
    found = {}
    for name, match in named.items():
        table = read_table(os.path.join(path, name))
        found[match[1], None if match[2] is None else int(match[2])] = table
    options = {table.option: table for table in found.values()}
    if len(options) > 1:
        kinds = " and ".join(table.content for table in options.values())
        raise InvalidArgument(f"{path}: holds {kinds}; a folder of one kind of tables is expected, and --table may be repeated")
    return next(iter(options)), found
