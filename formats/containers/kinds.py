"""Law: the containers of encoded tensors and how one is chosen: by content to read, by extension to write.

Conversion decodes nothing: streams move byte for byte and exact tensors bit for bit, with names, order, layers, roles, measured
errors and metadata.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pqcodec.errors import InvalidArgument
from pqcodec.formats.containers.reader import Progress, TensorFile
from pqcodec.formats.containers.writer import Piece, pieces_of
from pqcodec.formats.places import remote
from pqcodec.formats.plain.files import file_kind, kind_of_bytes
from pqcodec.stream.magic import FIRST_BYTES
from pqcodec.stream.tables import tables_by_name

EXTENSIONS = {".pqkv": "pqkv", ".safetensors": "safetensors", ".zarr": "zarr"}
KINDS = tuple(EXTENSIONS.values())
_WRITERS = {"pqkv": "pqkv.file", "safetensors": "safetensors", "zarr": "zarr.writer"}  # modules with a ``write_pieces``
_READERS = {
    "pqkv": ("pqkv.file", "PQKVFile"),
    "stream": ("bare_stream", "SingleStream"),
    "safetensors": ("safetensors", "SafetensorsCache"),
    "zarr": ("zarr.reader", "ZarrCache"),
}
_ZARR_MARK = "zarr.json"


def container_of(path: str | os.PathLike[str], to: str | None = None) -> str:
    """The kind of container to write at a path: ``to``, or by its extension; raises InvalidArgument.

    >>> container_of("cache.safetensors"), container_of("s3://bucket/cache.zarr"), container_of("cache", to="pqkv")
    ('safetensors', 'zarr', 'pqkv')
    """
    if to is not None:
        if to not in KINDS:
            raise InvalidArgument(f"container {to!r} is unknown; choose from {', '.join(KINDS)}")
        return to
    extension = _extension(path)
    if extension not in EXTENSIONS:
        raise InvalidArgument(
            f"{path}: extension {extension!r} is unknown; choose from {', '.join(EXTENSIONS)}, or name the kind"
        )
    return EXTENSIONS[extension]


def write(
    path: str | os.PathLike[str] | BinaryIO,
    pieces: Sequence[Piece],
    metadata: dict[str, Any] | None = None,
    *,
    to: str,
    progress: Progress | None = None,
) -> int:
    """Write tensors into a container of kind ``to`` and return its size in bytes.

    The container appears when it is complete and replaces what was there. ``progress`` is called with (tensors done, tensors
    in all). Raises InvalidArgument, OSError, and what making a tensor raises.

    >>> import tempfile, numpy as np
    >>> piece = Piece("positions", False, None, "other", (4,), "int64", "...", lambda: np.arange(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = write(folder + "/cache.safetensors", [piece], to="safetensors")
    ...     kind_of(folder + "/cache.safetensors")
    'safetensors'
    """
    if to != "pqkv" and not isinstance(path, (str, os.PathLike)):
        raise InvalidArgument(f"a {to} container cannot be written to a pipe; name a path, or choose pqkv")
    writer: Callable[..., int] = container_module(_WRITERS[to]).write_pieces
    return writer(path, pieces, metadata, progress)


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of what a path or URL holds: "pqkv", "stream", "safetensors", "zarr", "npz" or "npy".

    Raises InvalidArgument or OSError.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(folder + "/x.npy", np.ones(3))
    ...     kind_of(folder + "/x.npy")
    'npy'
    """
    remote.check_path(path, "path")
    if remote.is_url(path):
        if _extension(path) == ".zarr":
            return "zarr"
        source = remote.RemoteSource(str(path))
        return kind_of_bytes(str(path), source.read(0, min(FIRST_BYTES, source.size)).tobytes())
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, _ZARR_MARK)):
            return "zarr"
        raise InvalidArgument(f"{path}: is a folder without a {_ZARR_MARK}, no cache in zarr; name a file in it")
    return file_kind(path)


def open_encoded(path: str | os.PathLike[str], tables: Any = ()) -> TensorFile:
    """Open an encoded file of any container, or a single stream.

    ``tables``: SharedTables that streams may name; containers carry theirs. A stream without its table is opened, too, but its
    numbers are not read: that raises MissingTable.
    Raises InvalidArgument for any other file, and as the container's reader does.

    >>> import tempfile, numpy as np
    >>> piece = Piece("positions", False, None, "other", (4,), "int64", "...", lambda: np.arange(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = write(folder + "/cache.pqkv", [piece], {"model": "tiny"}, to="pqkv")
    ...     with open_encoded(folder + "/cache.pqkv") as file:
    ...         file.names, file.metadata, file.decode("positions").tolist()
    (('positions',), {'model': 'tiny'}, [0, 1, 2, 3])
    """
    kind = kind_of(path)
    if kind not in _READERS:
        raise InvalidArgument(f"{path}: is a {kind} file of plain tensors; {', '.join(KINDS)} or a single stream is expected")
    module, reader = _READERS[kind]
    known = tables_by_name(tables)
    found: TensorFile = getattr(container_module(module), reader)(path)
    found.given = known
    return found


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | BinaryIO,
    *,
    to: str | None = None,
    check: bool = True,
    tables: Any = (),
    progress: Progress | None = None,
) -> int:
    """Write the tensors of an encoded file into another container and return its size in bytes; nothing is decoded.

    ``check``: refuse a stream with damage, by CorruptStream; with ``check=False`` it is copied too and stays detectable.
    ``tables``: SharedTables, of which the container carries those that streams name and the source lacks; where one is not
    among them, MissingTable is raised. Raises InvalidArgument for tensors that the container cannot hold, and as reading and
    writing do.

    >>> import tempfile, numpy as np
    >>> piece = Piece("positions", False, None, "other", (4,), "int64", "...", lambda: np.arange(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = write(folder + "/cache.pqkv", [piece], to="pqkv")
    ...     size = convert(folder + "/cache.pqkv", folder + "/cache.safetensors")
    ...     with open_encoded(folder + "/cache.safetensors") as file:
    ...         file.decode("positions").tolist()
    [0, 1, 2, 3]
    """
    kind = container_of(target, to) if isinstance(target, (str, os.PathLike)) else to or "pqkv"
    with open_encoded(source, tables) as file:
        return write(target, pieces_of(file, check), file.metadata or None, to=kind, progress=progress)


def container_module(name: str) -> Any:
    """A module of this folder by name; raises InvalidArgument where zarr, which it needs, is not installed."""
    try:
        return import_module(f"pqcodec.formats.containers.{name}")
    except ModuleNotFoundError as error:
        if error.name != "zarr":
            raise
        raise InvalidArgument("caches in zarr need a package that is missing: pip install 'pqcodec[zarr]'") from error


def _extension(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return PurePosixPath(text.rstrip("/")).suffix.lower() if remote.is_url(text) else Path(text).suffix.lower()
