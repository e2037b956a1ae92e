"""Law: exact tensors: torch and numpy tensors <-> the little-endian bytes of their numbers, bit for bit.

torch is imported only where a torch tensor is given or wanted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import InvalidArgument, UnsupportedStream
from pqcodec.stream.index import checked_range
from pqcodec.tensors.numbers import is_torch as is_torch  # part of this module's interface

NUMPY_DTYPES = {name: np.dtype(name) for name in c.EXACT_ITEM_BYTES if name != "bfloat16" and not name.startswith("float8")}

TORCH_ONLY = ("BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")  # safetensors' names
SAFETENSORS_CODES = {  # safetensors' names of dtypes, in the order in which the library writes them, so that all are aligned
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
SAFETENSORS_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}


def is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor or a numpy array."""
    return is_torch(x) or isinstance(x, np.ndarray)


def dtype_name(x: Any) -> str:
    """The name of a tensor's dtype: "float16", "int64", "bfloat16" ...; of an unknown dtype its own text."""
    return str(x.dtype).removeprefix("torch.") if is_torch(x) else x.dtype.newbyteorder("=").name


def nbytes(x: Any) -> int:
    """Bytes of a tensor's numbers."""
    return math.prod(x.shape) * int(x.dtype.itemsize)


def to_bytes(x: Any) -> np.ndarray:
    """The numbers of a torch or numpy tensor, row-major and little-endian, as uint8 [bytes]; raises InvalidArgument."""
    if not is_tensor(x):
        raise InvalidArgument(f"a torch.Tensor or numpy.ndarray is expected, not {type(x).__name__}")
    name = dtype_name(x)
    if name not in c.EXACT_ITEM_BYTES:
        raise InvalidArgument(f"dtype {x.dtype} cannot be stored; choose from {', '.join(c.EXACT_ITEM_BYTES)}")
    if x.ndim > c.MAX_EXACT_NDIM:
        raise InvalidArgument(f"{x.ndim} dimensions; at most {c.MAX_EXACT_NDIM} are supported")
    if is_torch(x):
        import torch

        if x.layout != torch.strided:
            raise InvalidArgument(f"layout {x.layout} of the tensor; a dense tensor is expected")
        raw = x.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        raw = np.ascontiguousarray(x, x.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    return _truth(raw) if name == "bool" else raw


def _truth(raw: np.ndarray) -> np.ndarray:
    """Bytes of bools as 0 and 1: any other byte than 0, which a view of other numbers may hold, is 1."""
    return np.minimum(raw, 1) if raw.max(initial=0) > 1 else raw


def over_bytes(raw: np.ndarray, shape: tuple[int, ...], dtype: str, numpy: bool) -> Any:
    """A tensor on the memory of ``raw`` uint8 [bytes], of numpy or torch; raises UnsupportedStream for a dtype torch lacks.

    Bools whose bytes are neither 0 nor 1 get memory of their own.
    """
    raw = _truth(raw) if dtype == "bool" else raw
    if numpy:
        return raw.view(NUMPY_DTYPES[dtype].newbyteorder("<")).reshape(shape)
    import torch

    kind = getattr(torch, dtype, None)
    if kind is None:
        raise UnsupportedStream(f"this torch has no dtype {dtype}: install a newer one")
    return torch.from_numpy(raw).view(kind).reshape(shape) if raw.size else torch.empty(shape, dtype=kind)


def on_cpu(x: Any) -> Any:
    """``x`` itself, or a CPU copy of a tensor on a GPU."""
    return x.detach().cpu() if is_torch(x) else x


def cut(x: Any, tokens: tuple[int, int] | None, leading: tuple[int, int] | None) -> Any:
    """``tokens`` and ``leading`` (first, last + 1) of an exact tensor, as in ``pqcodec.decode``; raises InvalidArgument."""
    if tokens is None and leading is None:
        return x
    if x.ndim < 2:
        raise InvalidArgument(f"shape {tuple(x.shape)}: tokens and leading need [..., tokens, head_dim]")
    first, last = checked_range("tokens", tokens, x.shape[-2])
    if leading is not None:
        low, high = checked_range("leading", leading, math.prod(x.shape[:-2]))
        x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])[low:high]
    return x[..., first:last, :]
