"""Law: what a file is by its first bytes and which function reads it, for those who gave it to another one."""

from __future__ import annotations

import errno
import os

from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.stream.source import check_regular

FIRST_BYTES = 9  # that tell the kind of a file
_MAGICS = {c.FILE_MAGIC: "pqkv", c.STREAM_MAGIC: "stream", b"PK\x03\x04": "npz", b"PK\x05\x06": "npz", b"\x93NUM": "npy"}
_READERS = {
    "pqkv": "a .pqkv file, which pqcodec.formats.load_cache reads",
    "stream": "a single stream, which pqcodec.decode reads",
    "safetensors": "a .safetensors file, which pqcodec.formats.cache.load_safetensors reads",
    "zarr": "a folder of zarr, which pqcodec.formats.cache.load_zarr reads",
    "npz": "an archive of plain arrays, which numpy.load reads and `pqcodec encode` encodes",
    "npy": "a plain array, which numpy.load reads and `pqcodec encode` encodes",
}


def kind_by_magic(first: bytes) -> str | None:
    r"""The kind of a file that begins with these ``FIRST_BYTES``; None where they tell none.

    >>> kind_by_magic(b"PK\x03\x04....."), kind_by_magic(b"\x10\0\0\0\0\0\0\0{"), kind_by_magic(b"GIF89a...")
    ('npz', 'safetensors', None)
    """
    return _MAGICS.get(first[:4]) or ("safetensors" if first[8:9] == b"{" else None)


def whose(first: bytes, expected: str = "") -> str:
    r"""The end of a message about a file that is not of the kind ``expected``: what reads it, or a question.

    Empty where the first bytes are of that kind: then the file is damaged.

    >>> whose(b"PK\x03\x04.....", "pqkv")
    '; it is an archive of plain arrays, which numpy.load reads and `pqcodec encode` encodes'
    """
    kind = kind_by_magic(first)
    if kind is not None and kind == expected:
        return ""
    return f"; it is {_READERS[kind]}" if kind else "; is this the right file?"


def whose_file(path: str | os.PathLike[str], expected: str = "") -> str:
    """``whose`` of a local file or folder; empty where it is neither, or cannot be read."""
    if os.path.isdir(path):
        return f"; it is {_READERS['zarr'] if os.path.exists(os.path.join(path, 'zarr.json')) else 'a folder'}"
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return whose(file.read(FIRST_BYTES), expected)
    except (OSError, InvalidArgument):
        return ""


def check_no_folder(path: str | os.PathLike[str]) -> None:
    """Raises IsADirectoryError, which says what reads it, for a folder where a file is expected."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, f"a file is expected{whose_file(path)}", os.fspath(path))
