"""Law: files of plain tensors, read one tensor at a time and written whole: .safetensors, .npz and .npy.

What a file is, is read from its first bytes; what is written, follows from the extension. Nothing is ever unpickled, and
torch is imported only for a file that holds what numpy has no numbers for (bfloat16, float8).
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, PQError
from pqcodec.formats import exact, listing, remote
from pqcodec.formats.frames import json_value
from pqcodec.formats.npy import read_npy_header

_NO_SAFETENSORS = "is no safetensors file that holds together"
_MOST_HEADER_BYTES = 100_000_000  # the library's cap
TORCH_ONLY = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # safetensors' names


SAFETENSORS_CODES = {  # safetensors' names of dtypes
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "bfloat16": "BF16",
    "complex64": "C64",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
SAFETENSORS_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}


class TensorReader(Protocol):
    """An open file of tensors; a context manager."""

    format: str  # "safetensors", "npz" or "npy"
    metadata: dict[str, str]  # what a safetensors file says of itself
    names: tuple[str, ...]
    total_bytes: int  # about what reading all tensors takes

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor."""
        ...

    def read(self, name: str) -> Any: ...

    def __enter__(self) -> TensorReader: ...

    def __exit__(self, *error: object) -> None: ...


def file_kind(path: str | os.PathLike[str]) -> str:
    """ "pqkv", "stream", "safetensors", "npz" or "npy", from a file's first bytes; raises InvalidArgument or OSError."""
    with open(path, "rb") as file:
        return kind_of_bytes(path, file.read(9))


def kind_of_bytes(path: str | os.PathLike[str], first: bytes) -> str:
    """``file_kind`` of a file that begins with these nine bytes."""
    magics = {c.FILE_MAGIC: "pqkv", c.STREAM_MAGIC: "stream", b"PK\x03\x04": "npz", b"PK\x05\x06": "npz", b"\x93NUM": "npy"}
    if first[:4] in magics:
        return magics[first[:4]]
    if first[8:] == b"{":
        return "safetensors"
    extension = Path(path).suffix.lower().removeprefix(".")
    if extension in ("pqkv", "safetensors"):
        return extension  # what is damaged there, its reader tells
    known = ".safetensors, .npy, .npz, .pqkv and single streams"
    raise InvalidArgument(f"{path}: begins with {first!r}; {known} are known: is this the right file?")


def open_tensors(path: str | os.PathLike[str]) -> TensorReader:
    """Open a .safetensors, .npz or .npy file. Raises InvalidArgument, CorruptStream or OSError."""
    kind = file_kind(path)
    if kind not in _READERS or (kind == "safetensors" and holds_streams(path)):
        raise InvalidArgument(f"{path}: is encoded already; decode it first, or convert it into another container")
    return _READERS[kind](Path(path))


def write_tensors(path: str | os.PathLike[str], tensors: Iterable[tuple[str, Any]], metadata: dict[str, str]) -> None:
    """Write tensors into a file of the kind that the extension names; ``metadata`` goes into safetensors files only.

    The file appears when it is complete. Raises InvalidArgument or OSError.
    """
    write = _WRITERS[checked_extension(path)]
    if not remote.is_url(path) and Path(path).exists() and not Path(path).is_file():
        raise InvalidArgument(f"{path}: is no regular file; tensors are written to regular files only")
    with remote.placing(path) as temporary:
        write(temporary, tensors, metadata)


def checked_extension(path: str | os.PathLike[str]) -> str:
    """The extension of a file to write; raises InvalidArgument."""
    extension = Path(path).suffix.lower()
    if extension not in _WRITERS:
        raise InvalidArgument(f"{path}: extension {extension!r} is unknown; choose from {', '.join(_WRITERS)}")
    return extension


def safetensors_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file or URL, checked by the library, and the byte where its tensors begin.

    Raises CorruptStream or OSError; a name that stands twice is damage, too.
    """
    if remote.is_url(path):
        return _remote_header(str(path))
    with _library_errors(path, _NO_SAFETENSORS, CorruptStream), _safe_open(path):
        pass
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json_value(file.read(size), f"{path}: header"), 8 + size


def holds_streams(path: str | os.PathLike[str]) -> bool:
    """Whether a .safetensors file is an encoded cache. Raises as ``safetensors_header`` does."""
    return listing.is_listing(safetensors_header(path)[0].get("__metadata__") or {})


def _remote_header(url: str) -> tuple[dict[str, Any], int]:
    """Likewise of a URL: the library looks at a file of the same size that holds the header and nothing else."""
    source = remote.RemoteSource(url)
    first = source.read(0, min(source.size, 8)).tobytes()
    size = int.from_bytes(first, "little")
    if len(first) < 8 or size > min(source.size - 8, _MOST_HEADER_BYTES):
        raise CorruptStream(f"{url}: {_NO_SAFETENSORS}: a header of {size} bytes in a file of {source.size}")
    raw = source.read(8, size).tobytes()
    with tempfile.NamedTemporaryFile(prefix="pqcodec-") as copy:
        copy.write(first + raw)
        copy.truncate(source.size)  # the rest takes no room on the disk
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
    """What an open file closes at its end."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Safetensors(_Closing):
    format = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__()
        from safetensors import safe_open

        self._path, self.total_bytes = path, path.stat().st_size
        with _library_errors(path, _NO_SAFETENSORS, CorruptStream):
            self._file = self._stack.enter_context(safe_open(path, framework="np"))
            self.names = tuple(self._file.keys())
            self.metadata = dict(sorted((self._file.metadata() or {}).items()))  # the library's order is random
            if any(self._file.get_slice(name).get_dtype() in TORCH_ONLY for name in self.names):
                self._file = self._stack.enter_context(safe_open(path, framework="pt"))

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        with _library_errors(self._path, f"tensor {name!r} cannot be read", CorruptStream):
            part = self._file.get_slice(name)
            return tuple(part.get_shape()), SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype())

    def read(self, name: str) -> Any:
        _, dtype = self.describe(name)
        if dtype not in SAFETENSORS_CODES:
            known = ", ".join(SAFETENSORS_CODES)
            raise InvalidArgument(f"{self._path}: tensor {name!r} is of dtype {dtype}, which is unknown; {known} are known")
        with _library_errors(self._path, f"tensor {name!r} cannot be read", CorruptStream):
            return self._file.get_tensor(name)


class _Npz(_Closing):
    format = "npz"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.metadata = path, dict[str, str]()
        with _library_errors(path, "is no .npz file that holds together", CorruptStream):
            self._file = self._stack.enter_context(zipfile.ZipFile(path))
            infos = self._file.infolist()
        if problem := _npz_problem(infos):
            self._stack.close()
            raise InvalidArgument(f"{path}: {problem}")
        self.names = tuple(info.filename.removesuffix(".npy") for info in infos)
        self.total_bytes = sum(info.file_size for info in infos)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        with self._member(name) as member:
            header = read_npy_header(member)
            return header.shape, header.dtype_name

    def read(self, name: str) -> Any:
        with self._member(name) as member:
            header, size = read_npy_header(member), self._file.getinfo(name + ".npy").file_size
            if header.data_bytes > size:
                raise CorruptStream(f"{header.shape} of {header.dtype} takes {header.data_bytes} bytes, {size} are there")
            data = member.read(header.data_bytes)
            if len(data) < header.data_bytes:
                raise CorruptStream(f"{header.shape} of {header.dtype} takes {header.data_bytes} bytes, {len(data)} are there")
            return header.array(data)

    @contextmanager
    def _member(self, name: str) -> Iterator[Any]:
        with _library_errors(self._path, f"array {name!r}", CorruptStream), self._file.open(name + ".npy") as member:
            yield member


def _npz_problem(infos: Sequence[zipfile.ZipInfo]) -> str:
    """Why an archive is none of numpy's, or an empty string."""
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


def _leads_out(name: str) -> bool:
    """Whether a name in an archive, unpacked as a path, would lie outside the folder."""
    path = name.replace("\\", "/")
    return ".." in path.split("/") or path.startswith("/") or path[1:3] == ":/"


class _Npy(_Closing):
    format = "npy"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.metadata = path, dict[str, str]()
        self.names: tuple[str, ...] = (path.stem,)
        self.total_bytes = path.stat().st_size

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        with _library_errors(self._path, "array", CorruptStream), open(self._path, "rb") as file:
            header = read_npy_header(file)
            return header.shape, header.dtype_name

    def read(self, name: str) -> Any:
        with _library_errors(self._path, "array", CorruptStream), open(self._path, "rb") as file:
            header, start = read_npy_header(file), file.tell()
            there = os.path.getsize(self._path) - start
            if header.data_bytes != there:
                raise CorruptStream(f"{header.shape} of {header.dtype} takes {header.data_bytes} bytes, {there} are there")
            return header.array(np.memmap(self._path, np.uint8, "r", start, (there,)) if there else b"")


_READERS: dict[str, Callable[[Path], TensorReader]] = {"safetensors": _Safetensors, "npz": _Npz, "npy": _Npy}


# -- writing -----------------------------------------------------------------------------------------------------
def _write_safetensors(path: Path, tensors: Iterable[tuple[str, Any]], metadata: dict[str, str]) -> None:
    found = {name: exact.contiguous(x) for name, x in tensors}
    with _library_errors(path, "cannot be written", InvalidArgument):
        if any(exact.is_torch(x) for x in found.values()):
            from safetensors.torch import save_file

            save_file({name: exact.as_torch(x) for name, x in found.items()}, path, metadata=metadata or None)
        else:
            from safetensors.numpy import save_file as save_arrays

            save_arrays(found, path, metadata=metadata or None)


def _write_npz(path: Path, tensors: Iterable[tuple[str, Any]], metadata: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in tensors:
            if _leads_out(name):
                raise InvalidArgument(f"tensor {name!r}: would lie outside an archive; write a .safetensors file")
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _as_numpy(name, x), allow_pickle=False)


def _write_npy(path: Path, tensors: Iterable[tuple[str, Any]], metadata: dict[str, str]) -> None:
    found = list(tensors)
    if len(found) != 1:
        raise InvalidArgument(
            f"an .npy file holds one tensor, not {len(found)}; write .npz or .safetensors, or choose one tensor"
        )
    with open(path, "wb") as file:
        np.lib.format.write_array(file, _as_numpy(*found[0]), allow_pickle=False)


def _as_numpy(name: str, x: Any) -> np.ndarray:
    if exact.dtype_name(x) not in exact.NUMPY_DTYPES:
        raise InvalidArgument(f"tensor {name!r}: numpy has no {exact.dtype_name(x)}; write a .safetensors file")
    return x.cpu().numpy() if exact.is_torch(x) else x


_WRITERS: dict[str, Callable[[Path, Iterable[tuple[str, Any]], dict[str, str]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".npy": _write_npy,
}
