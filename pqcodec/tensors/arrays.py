"""Law: the only file that knows torch: tensors of torch and numpy in and out, seen as flat arrays of stored numbers.

torch is imported only when a torch tensor is given or wanted.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.stream.header import DTYPE_NAMES
from pqcodec.tensors.numbers import is_torch, widen
from pqcodec.tensors.rows import DeviceRows, Values, address, values_of

_LINE = 64  # bytes
_NUMPY_DTYPES = {np.dtype(np.float16): c.DTYPE_FLOAT16, np.dtype(np.float32): c.DTYPE_FLOAT32}


@dataclass(frozen=True)
class View:
    """A tensor as the codec sees it."""

    shape: tuple[int, ...]
    dtype: int
    numpy: bool
    device: str
    stored: np.ndarray  # uint16 or float32, any strides, the tensor's own memory where that is possible

    def values(self) -> Values:
        """Rows in place; a tensor whose last dimension is not contiguous is copied."""
        stored = self.stored
        if stored.size and ((stored.strides[-1] != stored.itemsize and stored.shape[-1] > 1) or min(stored.strides) < 0):
            stored = np.ascontiguousarray(stored)
        return values_of(stored)


def view(x: Any) -> View:
    """See a torch or numpy tensor [..., tokens, head_dim]; raises InvalidArgument."""
    if isinstance(x, np.ndarray):
        if x.dtype not in _NUMPY_DTYPES:
            raise InvalidArgument(
                f"dtype {x.dtype} of the array; float16 and float32 are supported (bfloat16 as torch tensors)"
            )
        dtype, stored, device = _NUMPY_DTYPES[x.dtype], x.view(np.uint16) if x.dtype == np.float16 else x, "cpu"
        return View(_checked(x.shape), dtype, True, device, stored)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        raise InvalidArgument(f"a torch.Tensor or numpy.ndarray is expected, not {type(x).__name__}")
    shape, dtype = stored_kind(x.shape, x.dtype, x.layout)
    if x.device.type != "cpu":
        return View(shape, dtype, False, x.device.type, np.zeros(0, np.uint16))
    return View(shape, dtype, False, "cpu", _torch_stored(x.detach().resolve_neg()))


def stored_kind(shape: Any, dtype: Any, layout: Any) -> tuple[tuple[int, ...], int]:
    """The shape and the stored dtype of torch tensors of a shape, dtype and layout; raises InvalidArgument for others."""
    import torch

    dtypes = {torch.float16: c.DTYPE_FLOAT16, torch.bfloat16: c.DTYPE_BFLOAT16, torch.float32: c.DTYPE_FLOAT32}
    if dtype not in dtypes or layout != torch.strided:
        raise InvalidArgument(f"dtype {dtype}, layout {layout} of the tensor; dense {', '.join(DTYPE_NAMES.values())} expected")
    return _checked(tuple(shape)), dtypes[dtype]


def _torch_stored(x: Any) -> np.ndarray:
    import torch

    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)


def _checked(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not 1 <= len(shape) <= c.MAX_NDIM:
        raise InvalidArgument(f"shape {tuple(shape)}: 1 .. {c.MAX_NDIM} dimensions [..., tokens, head_dim] are expected")
    if not 1 <= shape[-1] <= c.MAX_HEAD_DIM:
        raise InvalidArgument(
            f"shape {tuple(shape)}: head_dim {shape[-1]} is outside 1 .. {c.MAX_HEAD_DIM}; reshape the last dimension"
        )
    return tuple(int(n) for n in shape)


def empty(shape: tuple[int, ...], dtype: int, numpy: bool) -> tuple[Any, np.ndarray]:
    """A new tensor to decode into, and its stored numbers (the same memory).

    numpy has no bfloat16: a bfloat16 tensor is always torch's.
    """
    if numpy and dtype != c.DTYPE_BFLOAT16:
        array = _aligned_empty(shape, np.float16 if dtype == c.DTYPE_FLOAT16 else np.float32)
        return array, array.view(np.uint16) if dtype == c.DTYPE_FLOAT16 else array
    import torch

    stored = _aligned_empty(shape, np.int16 if c.ITEM_BYTES[dtype] == 2 else np.float32)
    tensor = torch.from_numpy(stored).view(getattr(torch, DTYPE_NAMES[dtype]))
    return tensor, stored.view(np.uint16) if stored.itemsize == 2 else stored


def _aligned_empty(shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """numpy's memory, for it asks the system for huge pages: a third of decoding into torch's is faults of small ones.

    It begins at a line of the cache, so that kernels may store past the caches.
    """
    size = math.prod(shape) * np.dtype(kind).itemsize
    raw = np.empty(size + _LINE, np.uint8)
    start = -address(raw) % _LINE
    return raw[start : start + size].view(kind).reshape(shape)


def to_device(x: Any, device: Any) -> Any:
    """``x`` on a torch device (a numpy array becomes a tensor)."""
    import torch

    return torch.as_tensor(x).to(device)


def numbers_of(x: Any) -> np.ndarray:
    """The numbers of a torch or numpy tensor of the CPU, float32; raises InvalidArgument."""
    found = view(x)
    if found.device != "cpu":
        raise InvalidArgument(f"the tensor is on {found.device!r}, the work is done on the CPU; pass x.cpu()")
    return widen(found.stored, found.dtype)


def bytes_of(stream: Any) -> np.ndarray:
    """The bytes of a stream in a torch tensor of the CPU: uint8 [bytes]; raises InvalidArgument for another kind of tensor."""
    if str(stream.dtype) != "torch.uint8" or stream.ndim != 1 or not stream.is_contiguous():
        raise InvalidArgument(
            f"a stream in a tensor is a contiguous uint8 tensor [bytes]; this one is {stream.dtype} {tuple(stream.shape)}"
        )
    return stream.numpy()  # type: ignore[no-any-return]


def alike(x: Any, numbers: np.ndarray, keep_dtype: bool = True) -> Any:
    """``numbers`` as a tensor of the kind and dtype of ``x``, or of its kind alone; beyond a dtype's range: Inf."""
    if is_torch(x):
        import torch

        found = torch.from_numpy(np.ascontiguousarray(numbers))
        return found.to(x.dtype) if keep_dtype else found
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers.astype(x.dtype) if keep_dtype else numbers


# -- outputs of the caller -----------------------------------------------------------------------------------------
def fits(out: Any, shape: tuple[int, ...], dtype: int) -> bool:
    """Whether a result can be written into ``out`` where it lies; raises InvalidArgument where shape or dtype are others."""
    found = view(out)
    if found.shape != tuple(shape) or found.dtype != dtype:
        raise InvalidArgument(
            f"out is {DTYPE_NAMES[found.dtype]} {found.shape}, the result is {DTYPE_NAMES[dtype]} {tuple(shape)}; "
            "pass a tensor of that shape and dtype"
        )
    if not found.numpy and out.is_neg():
        return False  # a view of numbers with the other sign
    strides = [stride for stride, size in zip(_strides(out), shape, strict=True) if size > 1]
    return 0 in shape or not strides or (min(strides) > 0 and (shape[-1] == 1 or strides[-1] == 1))


def _strides(x: Any) -> tuple[int, ...]:
    """Elements from one index to the next, one a dimension."""
    return tuple(stride // x.itemsize for stride in x.strides) if isinstance(x, np.ndarray) else tuple(x.stride())


class _Span:
    """Memory from one address on, as numpy takes it; ``owners`` hold what is used of it, the rest is somebody else's."""

    def __init__(self, address: int, items: int, kind: np.dtype, owners: Any) -> None:
        self.owners = owners
        self.__array_interface__ = {"data": (address, False), "shape": (items,), "typestr": kind.str, "version": 3}


def values_in_place(out: Any) -> Values:
    """The rows of a tensor of the CPU that is to be written to, or of a list of such tensors, one behind the other along their
    leading dimensions, wherever they lie; raises InvalidArgument where rows are not contiguous.
    """
    if isinstance(out, (list, tuple)):
        parts = [values_in_place(x) for x in out]
        kind, stride, head_dim = parts[0].flat.dtype, parts[0].stride, parts[0].head_dim
        if any((part.flat.dtype, part.stride, part.head_dim) != (kind, stride, head_dim) for part in parts):
            raise InvalidArgument("tensors of several dtypes or strides were given as one out; pass tensors of one kind")
        places = [address(part.flat) for part in parts]
        first = min(places)
        end = max(place + part.flat.nbytes for place, part in zip(places, parts, strict=True))
        starts = [part.starts + (place - first) // kind.itemsize for place, part in zip(places, parts, strict=True)]
        flat = np.asarray(_Span(first, (end - first) // kind.itemsize, kind, parts))
        return Values(flat, np.concatenate(starts), stride, head_dim)
    found = view(out)
    if not fits(out, found.shape, found.dtype):
        raise InvalidArgument(f"out has strides {_strides(out)}; its last dimension must be contiguous")
    return values_of(found.stored)


Room = tuple[str, tuple[int, ...]]  # dtype and shape


def room_of(out: Any) -> Room:
    """What a tensor has room for, or a list of tensors that follow each other along their first dimension."""
    if not isinstance(out, (list, tuple)):
        return str(out.dtype).removeprefix("torch."), tuple(out.shape)
    rooms = {(name, shape[1:]) for name, shape in map(room_of, out)}
    if len(rooms) != 1 or any(x.ndim < 3 for x in out):
        raise InvalidArgument(f"tensors {sorted(rooms)} were given as one out; tensors of one kind, [n, ..., tokens, head_dim]")
    name, rest = rooms.pop()
    return name, (sum(len(x) for x in out), *rest)


def part_of(room: Room, values: Values, first: int, count: int) -> tuple[Room, Values]:
    """The part of an out of three or more dimensions that is ``count`` from ``first`` on along its first one.

    Raises InvalidArgument where that is outside of it.
    """
    name, (there, *rest) = room
    if len(rest) < 2 or not 0 <= first <= there - count:
        raise InvalidArgument(f"{count} from {first} on are not in the first dimension of an out {room}")
    each = len(values.starts) // max(there, 1)
    starts = values.starts[first * each : (first + count) * each]
    return (name, (count, *rest)), Values(values.flat, starts, values.stride, values.head_dim)


def holds(room: Room, shape: tuple[int, ...], dtype: int, start: int) -> bool:
    """Whether a tensor of a shape [..., tokens, head_dim], or [head_dim], and a dtype goes there from a token on."""
    name, size = room
    if name != DTYPE_NAMES[dtype] or len(size) != len(shape):
        return False
    if len(shape) < 2:
        return start == 0 and size == shape
    return (size[:-2], size[-1]) == (shape[:-2], shape[-1]) and 0 <= start <= size[-2] - shape[-2]


def seen(out: Any) -> tuple[Any, np.ndarray]:
    """A tensor of the CPU and its stored numbers."""
    return out, view(out).stored


def copied(out: Any, result: Any) -> Any:
    """``out`` with the numbers of ``result``."""
    if isinstance(out, np.ndarray):
        out[...] = np.asarray(result)
    else:
        import torch

        out.copy_(torch.as_tensor(result))
    return out


def concatenated(parts: Any) -> Any:
    """Tensors [..., tokens, head_dim] of one kind, one behind the other along the tokens."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    if is_torch(parts[0]):
        import torch

        return torch.cat(parts, -2)
    return np.concatenate(parts, -2)


# -- devices -------------------------------------------------------------------------------------------------------


def device_rows(x: Any) -> DeviceRows:
    """See a torch tensor by address; raises InvalidArgument where the last dimension is not contiguous."""
    if not is_torch(x):
        raise InvalidArgument(f"a torch.Tensor is expected, not {type(x).__name__}")
    found = view(x)
    strides = x.stride()
    if x.is_neg():
        raise InvalidArgument("the tensor is a view of numbers with the other sign; pass x.resolve_neg()")
    if x.numel() and found.shape[-1] > 1 and strides[-1] != 1:
        raise InvalidArgument(f"strides {strides} of the tensor: the last dimension must be contiguous; pass x.contiguous()")
    starts = np.array([x.data_ptr()], np.int64)
    for size, stride in zip(found.shape[:-2], strides[:-2], strict=True):
        starts = (starts[:, None] + np.arange(size) * (stride * x.itemsize)).ravel()
    return DeviceRows(x, found.shape, found.dtype, str(x.device), starts, strides[-2] if x.ndim > 1 else 0)
