"""What each parser is asked, and what a reader tells."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import MissingTable
from pqcodec.stream.sections import EXACT_VECTORS

from .base import FEW, MOST_UNPACKED, SMALL, Read, Wrong, attempt, signature
from .codings import tables
from .shapes import unpacked


def numbers(x: Any) -> tuple[str, str, tuple[int, ...], bytes]:
    """All of a tensor of torch or numpy, to be compared bit for bit."""
    if isinstance(x, np.ndarray | np.generic):
        return "numpy", str(x.dtype), tuple(x.shape), x.tobytes()
    import torch

    raw = x.contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else np.zeros(0, np.uint8)
    return "torch", str(x.dtype), tuple(x.shape), raw.tobytes()


def everything(file: Any) -> dict[str, Any]:
    """All that an open cache tells: its metadata, and of each tensor what it is and its numbers."""
    found: dict[str, Any] = {"metadata": file.metadata}
    for name in file.names:
        entry = file.entry(name)
        said = (entry.coded, entry.layer, entry.role, entry.shape, entry.dtype, entry.layout)
        kept = entry.coded and entry.parts == 1 and file.inspect(name).kept_of is not None
        read = {"backend": "cpu", "estimate": "unbiased"}  # of sketches, which have no other numbers
        x = file.decode_kept(name, **read)[0] if kept else file.decode(name, **read)
        found["tensor " + name] = (said, numbers(x))
    return found


@cache
def scratch() -> Path:
    """A file to be read by path."""
    folder = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "f"


def on_disk(data: bytes) -> Path:
    path = scratch()
    path.write_bytes(data)
    return path


def of_a_header(data: bytes) -> str:
    """The error that a stream's header makes, by SPEC 3.3."""
    import second_decoder

    return str(second_decoder.refusal(data))


def of_a_file(data: bytes) -> str:
    """The error that a .pqkv file makes, by SPEC II.5."""
    import second_reader

    return str(second_reader.refusal(data))


def header(data: bytes) -> None:
    """The header of a stream."""
    import pqcodec

    pqcodec.inspect(data)


def stream(data: bytes) -> None:
    """One stream: inspect, decode, verify and parts agree with each other, and the backends bit for bit.

    The tables that it may name are there (``codings.tables``); one that does not go with it is refused where it is given.
    """
    import pqcodec
    from pqcodec.stream.header import Header

    info, refused = attempt(pqcodec.inspect, data)
    if refused:
        if not attempt(decoded, data, backend="cpu")[1]:
            raise Wrong("decode takes what inspect refuses")
        raise refused
    h = Header.from_bytes(data)
    if h.to_bytes() != data[: info.header_bytes]:
        raise Wrong("the header that was read is not the one that would be written")
    read, few = decoded if h.keep is None else kept_rows, math.prod(max(n, 1) for n in (*h.shape[:-1], h.order)) <= FEW
    given, refused = attempt(pqcodec.given_tables, data, tables())
    if refused:
        if few:
            _numbers_are_those_of_the_specification(data, None, refused)
        raise refused
    x, refused = attempt(read, given, backend="cpu")
    damage, complaint = attempt(pqcodec.verify, given, backend="cpu")
    if h.leading * h.chunks * h.order <= SMALL:
        y, other = attempt(read, given, backend="reference")
        if str(refused) != str(other) or (refused is None and numbers(x) != numbers(y)):
            raise Wrong("cpu and reference decode differently")
        told, other = attempt(pqcodec.verify, given, backend="reference")
        if (damage, str(complaint)) != (told, str(other)):
            raise Wrong("cpu and reference verify differently")
    if few:
        _numbers_are_those_of_the_specification(data, x, refused)
    unsound = bool(damage or complaint)
    if refused:
        if not unsound and not isinstance(refused, MissingTable):  # whose bytes are as they were written
            raise Wrong("verify is silent where decode refuses")
        raise refused
    if unsound and math.prod(info.shape):
        raise Wrong("decode takes what verify refuses")
    if not unsound and math.prod(info.shape):
        _exact_rows_ascend(data, h)
        if h.keep is None:
            _parts_are_those_of_the_whole(given, x)
        elif math.prod(h.whole_shape) <= SMALL:
            _kept_rows_have_their_places(given)


def decoded(data: Any, **options: Any) -> Any:
    """The tensor of a stream; of a sketch the estimate without bias."""
    import pqcodec

    return pqcodec.decode(data, estimate="unbiased", **options)


def kept_rows(data: Any, backend: str) -> Any:
    """The rows that a stream keeps."""
    import pqcodec

    return pqcodec.decode_kept(data, backend=backend, estimate="unbiased")[0]


def _kept_rows_have_their_places(data: Any) -> None:
    import pqcodec

    whole = decoded(data, fill=0, backend="cpu")
    rows, positions = pqcodec.decode_kept(data, backend="cpu", estimate="unbiased")
    tokens, n = whole.shape[-2], rows.shape[-2]
    for full, some, at in zip(
        whole.reshape(-1, tokens, whole.shape[-1]),
        rows.reshape(-1, n, rows.shape[-1]),
        np.broadcast_to(np.asarray(positions), rows.shape[:-1]).reshape(-1, n),
        strict=True,
    ):
        dropped = np.setdiff1d(np.arange(tokens), at)
        if numbers(full[at]) != numbers(some) or full[dropped].any():
            raise Wrong("kept rows are not where their positions say, or others are there, too")


def _numbers_are_those_of_the_specification(data: bytes, x: Any, refused: Exception | None) -> None:
    import second_decoder

    try:
        found = second_decoder.decode(data, [table.to_bytes() for table in tables()]).tobytes()
    except ValueError:
        found = None
    if found != (None if refused else numbers(x)[-1]):
        raise Wrong("a decoder written from the specification decodes differently")


def _exact_rows_ascend(data: bytes, h: Any) -> None:
    size = 8 + h.vector_bytes
    rows = [int.from_bytes(data[h.places[EXACT_VECTORS].start + i * size :][:8], "little") for i in range(h.exceptions)]
    if rows != sorted(set(rows)) or any(row >= h.leading * h.coded_tokens for row in rows):
        raise Wrong("exact vectors out of order are taken")


def _parts_are_those_of_the_whole(data: Any, x: Any) -> None:
    """Ranges of tokens and leading indices, and an output with room around it that must stay as it is."""
    if x.ndim < 2:
        return
    tokens, head_dim = x.shape[-2:]
    first, last = tokens // 3, tokens - tokens // 4
    if numbers(decoded(data, backend="cpu", tokens=(first, last))) != numbers(x[..., first:last, :]):
        raise Wrong("a range of tokens is not that of the whole tensor")
    heads = x.reshape(-1, tokens, head_dim)
    low = len(heads) // 2
    part = decoded(data, backend="cpu", tokens=(first, last), leading=(low, len(heads)))
    if numbers(part) != numbers(heads[low:, first:last]):
        raise Wrong("a range of leading indices is not that of the whole tensor")
    like = np.full if isinstance(x, np.ndarray) else sys.modules["torch"].full
    room = like((*x.shape[:-2], tokens + 2, head_dim + 2), 7.0, dtype=x.dtype)
    out = room[..., 1:-1, 1:-1]
    decoded(data, backend="cpu", out=out)
    if numbers(out) != numbers(x):
        raise Wrong("an output of the caller's holds other numbers")
    out[...] = 7.0
    if not bool((room == 7.0).all()):
        raise Wrong("decoding writes beside the output")


def cache_reader(opened: Callable[[bytes], Any], beyond: bool = False) -> Read:
    """The target of a reader of caches (names, metadata, entry, decode, verify): what verify passes can be read, and back.

    A shared table that is not there is no damage, so verify does not tell it; one that no stream names may be damaged, and only
    verify tells that. ``beyond``: verify also looks at other things that reading does not need.
    """

    def target(data: bytes) -> None:
        with opened(data) as file:
            _, refused = attempt(everything, file)
            complaints, also = attempt(file.verify, backend="cpu")
            torn = bool(getattr(file, "torn_bytes", 0))
            grave = also or [name for name, _ in complaints if not (torn and name is None)]
            if refused and not grave and not isinstance(refused, MissingTable):
                raise Wrong(f"verify is silent where reading refuses: {signature(refused)}")
            if refused:
                raise refused
            if (also or [name for name in grave if name is not None]) and not beyond:
                raise Wrong("reading takes what verify refuses")

    return target


def _open_pqkv(data: bytes) -> Any:
    from pqcodec.formats import PQKVFile

    return PQKVFile(data)


def _open_safetensors(data: bytes) -> Any:
    from pqcodec.formats.containers.safetensors import SafetensorsCache

    return SafetensorsCache(on_disk(data))


def _open_store(data: bytes) -> Any:
    from zarr.core.buffer.cpu import Buffer
    from zarr.storage import MemoryStore

    from pqcodec.formats.containers.zarr.reader import ZarrCache

    return ZarrCache(MemoryStore({key: Buffer.from_bytes(value) for key, value in unpacked(data).items()}))


def plain(data: bytes) -> None:
    """A file of plain tensors, .safetensors, .npz or .npy."""
    from pqcodec.formats.plain.files import open_tensors

    with open_tensors(on_disk(data)) as file:
        for name in file.names:
            x = file.read(name)
            if math.prod(x.shape) > MOST_UNPACKED * len(data):
                raise Wrong("numbers come out of nothing")
            numbers(x)
            dtype = str(x.dtype).removeprefix("torch.") if hasattr(x, "numel") else x.dtype.newbyteorder("=").name
            if hasattr(file, "describe") and file.describe(name) != (tuple(x.shape), dtype):
                raise Wrong("a tensor is not what it was described as")


CHUNK = (2, 9, 16)


@cache
def _zarr(dtype: str) -> tuple[dict[str, Any], Any, Callable[[bytes], Any]]:
    """The objects of a store, an array of one chunk in it, and what makes an object of bytes."""
    import zarr
    from zarr.core.buffer.cpu import Buffer
    from zarr.storage import MemoryStore

    from pqcodec.formats.containers.zarr.codec import PQCodec

    objects: dict[str, Any] = {}
    options = {"shape": CHUNK, "chunks": CHUNK, "dtype": dtype, "serializer": PQCodec("pq2"), "compressors": None}
    return objects, zarr.create_array(MemoryStore(objects), fill_value=1, **options), Buffer.from_bytes


def _chunk(data: bytes) -> Any:
    objects, array, buffer = _zarr("float32" if data[6:7] == bytes([c.DTYPE_FLOAT32]) else "float16")
    objects["c/0/0/0"] = buffer(data)
    return array


def zarr_chunk(data: bytes) -> None:
    """One chunk of a zarr array: what can be read of all can be read in parts."""
    array = _chunk(data)
    whole = array[...]
    for place in ((slice(None), slice(3, 7)), (1, 8), (slice(None), slice(0, 1)), (slice(None), slice(None, None, 4))):
        if numbers(array[place]) != numbers(whole[place]):
            raise Wrong("a part of the chunk is not that of the whole")
