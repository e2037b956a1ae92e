"""Law: files of plain tensors, read one tensor at a time and written whole: .safetensors, .npz and .npy.

The kind of a file to read follows from its first bytes, that of a file to write from its extension. Nothing is ever unpickled.
torch is imported only for files with dtypes that numpy lacks (bfloat16, float8).
"""

from __future__ import annotations

import errno
import math
import os
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, PQError
from pqcodec.formats.places import remote
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.documents import json_bytes, json_value
from pqcodec.formats.plain.in_memory import CuttableTensors, Tensors
from pqcodec.formats.plain.npy import NpyHeader, read_npy_header
from pqcodec.formats.plain.numbers import SAFETENSORS_CODES, SAFETENSORS_DTYPES, TORCH_ONLY
from pqcodec.stream.magic import FIRST_BYTES, check_no_folder, kind_by_magic, whose, whose_file
from pqcodec.stream.source import check_regular

_NO_SAFETENSORS = "is no safetensors file that holds together"
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own cap
_DEFLATED = 1032  # bytes that one byte of deflate unpacks to, at most
_UNPACKED_BYTES = 1 << 20  # read from an archive at once
_LOCAL_LENGTHS = 26  # offset in an archive member's own header of the lengths of what follows it


class TensorReader(CuttableTensors, Protocol):
    """An open file of tensors; a context manager."""

    format: str  # "safetensors", "npz" or "npy"
    metadata: dict[str, str]  # a safetensors file's ``__metadata__``; empty for others

    def held_bytes(self, name: str) -> int:
        """Bytes of memory that reading a tensor takes; 0 where it is mapped."""
        ...

    def problem(self, name: str) -> str:
        """Why a tensor cannot be read, or an empty string."""
        ...

    def __enter__(self) -> TensorReader: ...

    def __exit__(self, *error: object) -> None: ...


def file_kind(path: str | os.PathLike[str]) -> str:
    """The kind of a file by its first bytes: "pqkv", "stream", "safetensors", "npz" or "npy".

    Raises InvalidArgument or OSError.
    """
    check_regular(path)
    check_no_folder(path)
    with open(path, "rb") as file:
        return kind_of_bytes(path, file.read(FIRST_BYTES))


def kind_of_bytes(path: str | os.PathLike[str], first: bytes) -> str:
    """``file_kind`` of a file that begins with ``first`` (``FIRST_BYTES``); raises InvalidArgument."""
    if kind := kind_by_magic(first):
        return kind
    extension = Path(path).suffix.lower().removeprefix(".")
    if extension in ("pqkv", "safetensors"):
        return extension  # its reader reports the damage
    known = ".safetensors, .npy, .npz, .pqkv and single streams"
    raise InvalidArgument(f"{path}: begins with {first!r}; {known} are known: is this the right file?")


def open_tensors(path: str | os.PathLike[str]) -> TensorReader:
    """Open a .safetensors, .npz or .npy file. Raises InvalidArgument, CorruptStream or OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(folder + "/kv.npz", keys=np.ones((2, 40, 64), np.float16))
    ...     with open_tensors(folder + "/kv.npz") as reader:
    ...         reader.names, reader.describe("keys"), reader.read_tokens("keys", first=4, step=12).shape
    (('keys',), ((2, 40, 64), 'float16'), (2, 3, 64))
    """
    kind = file_kind(path)
    if kind not in _READERS or (kind == "safetensors" and holds_streams(path)):
        raise InvalidArgument(f"{path}: is encoded already; decode it first, or convert it into another container")
    return _READERS[kind](Path(path))


def write_tensors(path: str | os.PathLike[str], tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write tensors into a file or URL of the kind that the extension names; only safetensors files hold ``metadata``.

    One tensor is read and held at a time; the file appears when it is complete. Raises InvalidArgument or OSError, and what
    reading a tensor raises.

    >>> import tempfile
    >>> from pqcodec.formats.plain.in_memory import InMemory
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(folder + "/kv.safetensors", InMemory({"keys": np.ones((2, 40, 64))}), {"model": "tiny"})
    ...     with open_tensors(folder + "/kv.safetensors") as reader:
    ...         reader.format, reader.metadata, reader.describe("keys")
    ('safetensors', {'model': 'tiny'}, ((2, 40, 64), 'float64'))
    """
    write = _WRITERS[checked_extension(path)]
    if not remote.is_url(path) and Path(path).exists() and not Path(path).is_file():
        raise InvalidArgument(f"{path}: is no regular file; tensors are written to regular files only")
    with remote.placing(path) as temporary:
        write(temporary, tensors, metadata)


def checked_extension(path: str | os.PathLike[str]) -> str:
    """The extension, in lower case, of a file to write; raises InvalidArgument for an unknown one."""
    extension = Path(path).suffix.lower()
    if extension not in _WRITERS:
        raise InvalidArgument(f"{path}: extension {extension!r} is unknown; choose from {', '.join(_WRITERS)}")
    return extension


def safetensors_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file or URL, checked by safetensors, and the offset of its first tensor in bytes.

    Raises CorruptStream, also for a name that occurs twice, or OSError.
    """
    if remote.is_url(path):
        return _remote_header(str(path))
    check_no_folder(path)
    try:
        with _library_errors(path, _NO_SAFETENSORS, CorruptStream), _safe_open(path):
            pass
    except CorruptStream as error:
        raise CorruptStream(f"{error}{whose_file(path, 'safetensors')}") from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json_value(file.read(size), f"{path}: header"), 8 + size


def is_listing(values: Mapping[str, Any]) -> bool:
    """Whether a file's metadata have a key of the listing (SPEC III.1)."""
    return any(key.startswith(c.LISTING_PREFIX) for key in values)


def holds_streams(path: str | os.PathLike[str]) -> bool:
    """Whether a .safetensors file is an encoded cache; raises as ``safetensors_header`` does."""
    return is_listing(safetensors_header(path)[0].get("__metadata__") or {})


def _remote_header(url: str) -> tuple[dict[str, Any], int]:
    """``safetensors_header`` of a URL: safetensors checks a sparse local file of the same size with the same header."""
    source = remote.RemoteSource(url)
    first = source.read(0, min(source.size, 8)).tobytes()
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > min(source.size - 8, _MOST_HEADER_BYTES):
        told = whose(source.read(0, min(source.size, FIRST_BYTES)).tobytes(), "safetensors")
        raise CorruptStream(f"{url}: {_NO_SAFETENSORS}: a header of {size} bytes in a file of {source.size}{told}")
    raw = source.read(8, size).tobytes()
    with tempfile.NamedTemporaryFile(prefix="pqcodec-") as copy:
        copy.write(first + raw)
        copy.truncate(source.size)  # sparse: the rest takes no disk space
        copy.flush()
        with _library_errors(url, _NO_SAFETENSORS, CorruptStream), _safe_open(copy.name):
            pass
    return json_value(raw, f"{url}: header"), 8 + size


def _safe_open(path: str | os.PathLike[str]) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="np")


# -- errors ------------------------------------------------------------------------------------------------------
@contextmanager
def _library_errors(path: object, what: str, fault: type[InvalidArgument] | type[CorruptStream]) -> Iterator[None]:
    """Errors of numpy, zipfile and safetensors become ours and name the file."""
    from safetensors import SafetensorError

    try:
        yield
    except PQError as error:
        raise type(error)(f"{path}: {what}: {error}") from error
    except SafetensorError as error:
        if "os error" in str(error) or "I/O error" in str(error):
            raise OSError(errno.EIO, str(error), str(path)) from error
        raise fault(f"{path}: {what}: {error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise fault(f"{path}: {what}: {error}") from error


# -- reading -----------------------------------------------------------------------------------------------------
class _Closing:
    """A context manager that closes what ``_stack`` holds."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Safetensors(_Closing):
    """An open .safetensors file; a ``TensorReader``."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__()
        from safetensors import safe_open

        self._path, self._mapped = path, False
        with _library_errors(path, _NO_SAFETENSORS, CorruptStream):
            self._file = self._stack.enter_context(safe_open(path, framework="np"))
            self.names = tuple(self._file.keys())
            self.metadata = dict(sorted((self._file.metadata() or {}).items()))  # safetensors returns them in random order
            parts = {name: self._file.get_slice(name) for name in self.names}
            self._described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
            if any(code in TORCH_ONLY for _, code in self._described.values()):
                self._file, self._mapped = self._stack.enter_context(safe_open(path, framework="pt")), True

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        shape, code = self._described[name]
        return shape, SAFETENSORS_DTYPES.get(code, code)

    def held_bytes(self, name: str) -> int:
        shape, dtype = self.describe(name)
        return 0 if self._mapped else math.prod(shape) * c.EXACT_ITEM_BYTES.get(dtype, 0)

    def problem(self, name: str) -> str:
        _, dtype = self.describe(name)
        known = ", ".join(SAFETENSORS_CODES)
        return "" if dtype in SAFETENSORS_CODES else f"is of dtype {dtype}, which is unknown; {known} are known"

    def read(self, name: str) -> Any:
        if problem := self.problem(name):
            raise InvalidArgument(f"{self._path}: tensor {name!r} {problem}")
        return self._tensor(name)

    def _tensor(self, name: str) -> Any:
        """A tensor of a dtype that is known: mapped if it is torch's, else a copy."""
        with _library_errors(self._path, f"tensor {name!r} cannot be read", CorruptStream):
            return self._file.get_tensor(name)

    def read_tokens(self, name: str, first: int, step: int = 1) -> Any:
        shape, dtype = self.describe(name)
        if self._mapped or dtype not in exact.NUMPY_DTYPES or not math.prod(shape):
            return self._tensor(name)[..., first::step, :]
        header, start = self._header
        with _library_errors(self._path, f"tensor {name!r} cannot be read", CorruptStream):
            start += header[name]["data_offsets"][0]
            return np.memmap(self._path, exact.NUMPY_DTYPES[dtype].newbyteorder("<"), "r", start, shape)[..., first::step, :]

    @cached_property
    def _header(self) -> tuple[dict[str, Any], int]:
        return safetensors_header(self._path)


class _Npz(_Closing):
    """An open .npz archive; a ``TensorReader``."""

    format = "npz"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._size, self.metadata = path, path.stat().st_size, dict[str, str]()
        with _library_errors(path, "is no .npz file that holds together", CorruptStream):
            self._file = self._stack.enter_context(zipfile.ZipFile(path))
            infos = self._file.infolist()
        if problem := _npz_problem(infos):
            self._stack.close()
            raise InvalidArgument(f"{path}: {problem}")
        self.names = tuple(info.filename.removesuffix(".npy") for info in infos)
        self._headers: dict[str, NpyHeader] = {}  # of the arrays that were asked for

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        header = self._header_of(name)
        return header.shape, header.dtype_name

    def held_bytes(self, name: str) -> int:
        header = self._header_of(name)
        return header.data_bytes + header.copied_bytes

    def problem(self, name: str) -> str:
        return self._header_of(name).problem

    def _header_of(self, name: str) -> NpyHeader:
        if name not in self._headers:
            with self._member(name) as (header, _):
                self._headers[name] = header
        return self._headers[name]

    def read(self, name: str) -> Any:
        with self._member(name) as (header, member):
            header.check()
            data, filled = np.empty(header.data_bytes, np.uint8), 0
            while filled < data.size:
                piece = member.read(min(data.size - filled, _UNPACKED_BYTES))
                if not piece:
                    raise CorruptStream(f"{_size_text(header)}, {filled} are there")
                data[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
                filled += len(piece)
            return header.array(data)

    def read_tokens(self, name: str, first: int, step: int = 1) -> Any:
        part = (..., slice(first, None, step), slice(None))
        info = self._file.getinfo(name + ".npy")
        if info.compress_type != zipfile.ZIP_STORED or not self._header_of(name).data_bytes:
            return self.read(name)[part]
        with self._member(name) as (header, member), open(self._path, "rb") as file:
            file.seek(info.header_offset + _LOCAL_LENGTHS)  # zipfile has checked this header
            lengths = struct.unpack("<HH", file.read(4))  # of the name and of what else stands before the data
            start = info.header_offset + _LOCAL_LENGTHS + 4 + sum(lengths) + member.tell()
            return header.array(np.memmap(self._path, np.uint8, "r", start, (header.data_bytes,)), part)

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[NpyHeader, Any]]:
        """The header of an array and the file with its numbers, whose size was checked against the header."""
        info = self._file.getinfo(name + ".npy")
        with _library_errors(self._path, f"array {name!r}", CorruptStream), self._file.open(info) as member:
            packed = min(info.compress_size, self._size)
            most = packed if info.compress_type == zipfile.ZIP_STORED else _DEFLATED * packed
            if info.file_size > most:
                raise CorruptStream(f"{info.file_size} bytes are told of, {packed} packed ones hold {most} at most")
            header = read_npy_header(member)
            if not header.problem and header.data_bytes != (there := info.file_size - member.tell()):
                raise CorruptStream(f"{_size_text(header)}, {there} are there")
            yield header, member


def _npz_problem(infos: Sequence[zipfile.ZipInfo]) -> str:
    """Why an archive is not one of numpy's, or an empty string."""
    foreign = [info.filename for info in infos if not info.filename.endswith(".npy")]
    if any(name.endswith("/data.pkl") for name in foreign):
        return "is torch.save's; pickles are never loaded: save the tensors as .safetensors"
    if foreign:
        return f"holds {foreign[0]!r}; an .npz file of .npy arrays is expected"
    for info in infos:
        if _leads_out(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
            return f"holds {info.filename!r:.200}, which leads out of the archive; it is not opened"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            return f"{info.filename!r} is encrypted, or compressed in a way that numpy does not; save it with numpy.savez"
    return ""


def _size_text(header: NpyHeader) -> str:
    return f"{header.shape} of {header.dtype} takes {header.data_bytes} bytes"


def _leads_out(name: str) -> bool:
    """Whether a name in an archive, unpacked as a path, leads out of the folder."""
    path = name.replace("\\", "/")
    return ".." in path.split("/") or path.startswith("/") or path[1:3] == ":/"


class _Npy(_Closing):
    """An open .npy file, whose one tensor is called as the file is; a ``TensorReader``."""

    format = "npy"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.metadata = path, dict[str, str]()
        self.names: tuple[str, ...] = (path.stem,)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        with self._header() as (header, _):
            return header.shape, header.dtype_name

    def held_bytes(self, name: str) -> int:
        with self._header() as (header, _):
            return header.copied_bytes

    def problem(self, name: str) -> str:
        with self._header() as (header, _):
            return header.problem

    def read(self, name: str) -> Any:
        return self._mapped(...)

    def read_tokens(self, name: str, first: int, step: int = 1) -> Any:
        return self._mapped((..., slice(first, None, step), slice(None)))

    def _mapped(self, part: Any) -> np.ndarray:
        with self._header() as (header, start):
            header.check()
            there = header.data_bytes
            return header.array(np.memmap(self._path, np.uint8, "r", start, (there,)) if there else b"", part)

    @contextmanager
    def _header(self) -> Iterator[tuple[NpyHeader, int]]:
        """The header and the offset of the numbers in bytes; the file's size was checked against the header."""
        with _library_errors(self._path, "array", CorruptStream):
            with open(self._path, "rb") as file:
                header, start = read_npy_header(file), file.tell()
            if not header.problem and header.data_bytes != (there := os.path.getsize(self._path) - start):
                raise CorruptStream(f"{_size_text(header)}, {there} are there")
            yield header, start


_READERS: dict[str, Callable[[Path], TensorReader]] = {"safetensors": _Safetensors, "npz": _Npz, "npy": _Npy}


# -- writing -----------------------------------------------------------------------------------------------------
def _write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    described = {name: tensors.describe(name) for name in tensors.names}
    order = list(SAFETENSORS_CODES)
    for name, (_, dtype) in described.items():
        if dtype not in SAFETENSORS_CODES or name == "__metadata__":
            why = f"safetensors has no {dtype}" if name != "__metadata__" else "safetensors keeps this name for itself"
            raise InvalidArgument(f"tensor {name!r}: {why}; write an .npz file")
    names = sorted(described, key=lambda name: (order.index(described[name][1]), name))
    with open(path, "wb") as file:
        _put(file, _header({name: described[name] for name in names}, metadata))
        for name in names:
            _put(file, exact.to_bytes(_read(tensors, name)).data)


def _put(file: BinaryIO, data: bytes | memoryview) -> None:
    try:
        file.write(data)
    except OSError as error:
        error.filename = file.name
        raise


def _header(described: Mapping[str, tuple[tuple[int, ...], str]], metadata: dict[str, str]) -> bytes:
    """The header of a .safetensors file, byte for byte as safetensors writes it for the same tensors."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidArgument("the metadata of a safetensors file are strings, the input's are not; write an .npz file")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, (shape, dtype) in described.items():
        start, end = end, end + math.prod(shape) * c.EXACT_ITEM_BYTES[dtype]
        header[name] = {"dtype": SAFETENSORS_CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    data = json_bytes(header, "the header", _MOST_HEADER_BYTES)
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _write_npz(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    for name in tensors.names:
        if _leads_out(name):
            raise InvalidArgument(f"tensor {name!r}: would lie outside an archive; write a .safetensors file")
        _check_numpy(tensors, name)
    with zipfile.ZipFile(path, "w") as archive:
        for name in tensors.names:
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _as_numpy(_read(tensors, name)), allow_pickle=False)


def _write_npy(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    if len(tensors.names) != 1:
        raise InvalidArgument(
            f"an .npy file holds one tensor, not {len(tensors.names)}; write .npz or .safetensors, or choose one tensor"
        )
    _check_numpy(tensors, tensors.names[0])
    with open(path, "wb") as file:
        np.lib.format.write_array(file, _as_numpy(_read(tensors, tensors.names[0])), allow_pickle=False)


def _check_numpy(tensors: Tensors, name: str) -> None:
    _, dtype = tensors.describe(name)
    if dtype not in exact.NUMPY_DTYPES:
        raise InvalidArgument(f"tensor {name!r}: numpy has no {dtype}; write a .safetensors file")


def _read(tensors: Tensors, name: str) -> Any:
    """A tensor whose shape and dtype are those that ``describe`` gave; raises InvalidArgument otherwise."""
    x, expected = tensors.read(name), tensors.describe(name)
    found = tuple(x.shape), exact.dtype_name(x)
    if found != expected:
        raise InvalidArgument(f"tensor {name!r}: is {found[1]} {found[0]}, {expected[1]} {expected[0]} was said")
    return x


def _as_numpy(x: Any) -> np.ndarray:
    return x.cpu().numpy() if exact.is_torch(x) else x


_WRITERS: dict[str, Callable[[Path, Tensors, dict[str, str]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".npy": _write_npy,
}
