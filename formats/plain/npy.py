"""Law: the header of numpy's .npy data, versions 1.0 and 2.0, checked before use; objects are never unpickled."""

from __future__ import annotations

import io
import math
import tokenize
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.plain.documents import shape_problem
from pqcodec.formats.plain.numbers import NUMPY_DTYPES

_MOST_HEADER_BYTES = 1024  # numpy allows 10,000, which a contrived header takes seconds to parse
_VERSIONS = {  # version: bytes of the header's length field, and the function that parses the header
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}


@dataclass(frozen=True)
class NpyHeader:
    """Shape, order and dtype of an array, which its file states before the numbers."""

    shape: tuple[int, ...]
    fortran: bool  # column-major
    dtype: np.dtype  # in the file's byte order

    @property
    def dtype_name(self) -> str:
        """The dtype's name without a byte order, such as "float16"."""
        return self.dtype.newbyteorder("=").name

    @property
    def problem(self) -> str:
        """Why the array cannot be read, or an empty string."""
        if self.dtype.hasobject:
            return "holds pickled Python objects, which are never loaded; save numbers"
        if self.dtype_name not in NUMPY_DTYPES:
            return f"dtype {self.dtype} cannot be stored; choose from {', '.join(NUMPY_DTYPES)}"
        return ""

    def check(self) -> None:
        """Raises InvalidArgument for an array with a ``problem``."""
        if self.problem:
            raise InvalidArgument(self.problem)

    @property
    def data_bytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies made on reading: one for a foreign byte order, one for column-major order."""
        return self.data_bytes * ((not self.dtype.isnative) + (self.fortran and len(self.shape) > 1))

    def array(self, data: Any, part: Any = ...) -> np.ndarray:
        """The array over ``data`` (uint8 [data_bytes]), or its ``part`` (an index), native; raises InvalidArgument."""
        self.check()
        x = np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")[part]
        return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def read_npy_header(file: BinaryIO | Any) -> NpyHeader:
    """The header at a file's current position, of an array that holds no numbers, too (``problem``); raises CorruptStream."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in _VERSIONS:
            raise CorruptStream(f".npy version {version[0]}.{version[1]}; 1.0 and 2.0 are supported")
        width, parse = _VERSIONS[version]
        length = file.read(width)
        if int.from_bytes(length, "little") > _MOST_HEADER_BYTES:
            raise CorruptStream(f"a header of {int.from_bytes(length, 'little')} bytes; at most {_MOST_HEADER_BYTES} are taken")
        head = io.BytesIO(length + file.read(int.from_bytes(length, "little")))
        shape, fortran, dtype = parse(head, max_header_size=_MOST_HEADER_BYTES)
    except (ValueError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise CorruptStream(f"is no .npy data that holds together: {text:.200}") from error
    if problem := shape_problem(shape):
        raise CorruptStream(f"is no .npy data that holds together: {problem}")
    return NpyHeader(shape, bool(fortran), dtype)
