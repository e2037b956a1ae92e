"""Law: what every file of coded and exact tensors offers its reader, whatever container it is.

A container tells what it holds (``names``, ``_read_entry``), where the streams of a tensor lie (``_read_parts``) and how each
of its places is checked (``_checks``); all else is here, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.backends import on_device
from pqcodec.errors import CorruptStream, InvalidArgument, PQError, UnsupportedStream
from pqcodec.formats.plain import numbers as exact
from pqcodec.stream.header import DTYPE_NAMES, read_header
from pqcodec.stream.index import checked_range
from pqcodec.stream.report import Damage, StreamInfo
from pqcodec.stream.seal import order_problem
from pqcodec.stream.source import Source, reading_ahead
from pqcodec.tensors import arrays

LAYOUT, NO_LAYOUT = "..., tokens, head_dim", "..."
Progress = Callable[[int, int], None]  # bytes done, bytes in all
Findings = list[tuple[str | None, Damage | str]]  # what ``verify`` tells


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what the file says of it and where its body lies."""

    name: str
    coded: bool  # False: kept exactly, as plain numbers
    layer: int | None
    role: str  # "key", "value" or "other"
    shape: tuple[int, ...]
    dtype: str
    layout: str  # what the dimensions are
    body_start: int  # byte of the file; of the first part; 0 where a tensor has files of its own
    body_bytes: int  # of all parts
    parts: int = 1  # streams that hold its tokens one behind the other
    numpy: bool = False  # an exact tensor that was numpy's
    rel_mse: float | None = None  # what its writer measured, of a sample or of all numbers
    seal: int | None = None  # what a frame tells of its body (SPEC II.2); None: an older file, or another container

    def __post_init__(self) -> None:
        if self.numpy and self.dtype not in exact.NUMPY_DTYPES:
            raise CorruptStream(f"numpy has no dtype {self.dtype}")

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * c.EXACT_ITEM_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        return self.shape[-2] if len(self.shape) > 1 else 1

    def continued_by(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether tokens of a shape and dtype can stand behind these."""
        whole = min(len(shape), len(self.shape)) > 1
        return whole and (shape[:-2], shape[-1], dtype) == (self.shape[:-2], self.shape[-1], self.dtype)

    def with_tokens(self, tokens: int, parts: int, body_bytes: int) -> Entry:
        return replace(self, shape=(*self.shape[:-2], tokens, self.shape[-1]), parts=parts, body_bytes=body_bytes)


@dataclass(frozen=True)
class StreamPart:
    """One stream of a coded tensor: so many tokens, and how to reach it."""

    tokens: int
    open: Callable[[bool], Source]  # is told whether all of it is wanted, which is read at once then

    def decode(self, whole: bool, **options: Any) -> Any:
        """What ``codec.decode`` gives; all of a stream has to be in the order in which it was written. Raises CorruptStream."""
        source = self.open(whole)
        decoded = codec.decode(source, **options)
        if whole and (problem := order_problem(source)):
            raise CorruptStream(problem)
        return decoded

    def damage(self, backend: str, progress: codec.Progress) -> list[Damage | str]:
        """What ``codec.verify`` finds, and where that is nothing, what is wrong with the order."""
        source = self.open(True)
        found: list[Damage | str] = [*codec.verify(source, backend=backend, progress=progress)]
        return found or [problem for problem in (order_problem(source),) if problem]


@dataclass(frozen=True)
class Check:
    """A place of a file that ``verify`` looks at: whose it is, its bytes, and what is wrong with it."""

    name: str | None
    start: int  # of all that is checked
    size: int
    damage: Callable[[str, codec.Progress], Sequence[Damage | str]]  # of a backend and a progress


class named:  # noqa: N801 - reads as a function
    """A context: errors of pqcodec inside it say first where they arose."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PQError):
            raise type(error)(f"{self._place}: {error}") from error


class TensorFile(ABC):
    """An open file of tensors; a context manager. Opening reads what lists them, decoding the bytes of what is wanted."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stack = ExitStack()
        self._entries: dict[str, Entry] = {}
        self._parts: dict[str, list[StreamPart]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what this object opened."""
        self._stack.close()

    @property
    def label(self) -> str:
        """The file as errors name it."""
        return self._label

    def read_ahead(self) -> None:
        """Have all bytes of local files come from the disk meanwhile, for a reader that wants them all."""
        self._stack.enter_context(reading_ahead(self._local_files()))

    # -- what a container tells ----------------------------------------------------------------------------------
    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order in which they were written."""

    @property
    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What the writer was given as ``metadata``; empty if nothing was."""

    @abstractmethod
    def _read_entry(self, name: str) -> Entry: ...

    @abstractmethod
    def _read_parts(self, entry: Entry) -> list[StreamPart]:
        """The streams of a coded tensor, each of which goes with the entry."""

    @abstractmethod
    def _read_exact(self, entry: Entry) -> Any:
        """The numbers of an exact tensor as uint8, checked, in memory of their own."""

    def _local_files(self) -> list[str]:
        """The files that all bytes lie in, in the order of the tensors; none where a store holds them."""
        return []

    @abstractmethod
    def _checks(self) -> Iterator[Check]:
        """Every place of the file, in its order."""

    # -- what a reader asks --------------------------------------------------------------------------------------
    def entry(self, name: str) -> Entry:
        """Role, layer, shape, dtype and place of a tensor."""
        if name not in self._entries:
            if name not in self.names:
                some = ", ".join(repr(n) for n in self.names[:5]) + (" ..." if len(self.names) > 5 else "")
                raise InvalidArgument(f"{self._label}: no tensor is called {name!r}; there are {some or 'none'}")
            with self._named(name):
                self._entries[name] = _plausible(self._read_entry(name))
        return self._entries[name]

    def forget(self, name: str) -> None:
        """Give back the memory that decoding a tensor leaves behind for the next time."""
        self._parts.pop(name, None)

    def stream(self, name: str, part: int = 0) -> Source:
        """The stream of a coded tensor (or of one part of a grown one), to be read by place or moved as it is."""
        parts = self._streams(name)
        with self._named(name):
            if not 0 <= part < len(parts):
                raise InvalidArgument(f"has no part {part}, there are {len(parts)}")
            return parts[part].open(False)

    def inspect(self, name: str) -> StreamInfo:
        """What the stream of a coded tensor says of itself; reads only its header."""
        parts = self._streams(name)
        with self._named(name):
            found = [codec.inspect(part.open(False)) for part in parts]
            sizes = ("stream_bytes", "header_bytes", "side_bytes", "payload_bytes", "tensor_bytes")
            whole = {key: sum(getattr(info, key) for info in found) for key in sizes}
            return replace(found[0], shape=self.entry(name).shape, **whole)

    def decode(
        self,
        name: str,
        *,
        tokens: tuple[int, int] | None = None,
        leading: tuple[int, int] | None = None,
        device: Any = None,
        backend: str = "auto",
        out: Any = None,
        progress: codec.Progress | None = None,
    ) -> Any:
        """The tensor ``name``; arguments and result are those of ``pqcodec.decode``.

        Of a coded tensor only the blocks that are wanted are read, of an exact one all bytes.
        """
        entry = self.entry(name)
        with self._named(name):
            if entry.coded:
                options = {"device": device, "backend": backend, "leading": leading, "progress": progress}
                parts = self._streams(name)
                if len(parts) == 1:
                    return parts[0].decode(tokens is None and leading is None, tokens=tokens, out=out, **options)
                wanted = _wanted(entry, parts, tokens, leading is None)
                if out is None and device is None and not on_device(backend):
                    return _filled(entry, wanted, options)
                joined = arrays.joined(one.decode(**options) for one in wanted)
                return joined if out is None else arrays.copied(out, joined)
            x = exact.over_bytes(self._read_exact(entry), entry.shape, entry.dtype, entry.numpy)
            x = exact.cut(x, tokens, leading)
            if out is not None:
                return arrays.copied(out, x)
            return x if device is None else arrays.to_device(x, device)

    def verify(self, progress: Progress | None = None, *, backend: str = "auto") -> Findings:
        """Check every byte; an empty list is a sound file. The name is None where no tensor is concerned.

        ``progress`` is told (bytes done, bytes in all).
        """
        found: Findings = []
        self.read_ahead()
        for check in self._checks():

            def advance(done: int, total: int, check: Check = check) -> None:
                if progress:
                    progress(check.start + check.size * done // max(total, 1), self.size)

            try:
                found += [(check.name, damage) for damage in check.damage(backend, advance)]
            except (CorruptStream, UnsupportedStream) as error:
                found.append((check.name, str(error)))
            advance(1, 1)
        return found

    def _streams(self, name: str) -> list[StreamPart]:
        entry = self.entry(name)
        with self._named(name):
            if not entry.coded:
                raise InvalidArgument("is kept exactly, it has no stream; see entry(name)")
            if name not in self._parts:
                self._parts[name] = self._read_parts(entry)
            return self._parts[name]

    def _named(self, name: str) -> Any:
        return named(f"{self._label}: tensor {name!r}")


@dataclass(frozen=True)
class _PartRange:
    """What is wanted of one part of a tensor."""

    part: StreamPart
    tokens: tuple[int, int]  # of the part
    place: int  # of the first of them in the result
    whole: bool  # all of its bytes are

    def decode(self, **options: Any) -> Any:
        return self.part.decode(self.whole, tokens=self.tokens, **options)


def _plausible(entry: Entry) -> Entry:
    """An entry whose bytes can hold what it tells; raises CorruptStream. A stream takes at least a bit of each coordinate."""
    most = 8 * entry.body_bytes * c.EXACT_ITEM_BYTES[entry.dtype]
    if entry.coded and entry.tensor_bytes > most:
        told = f"{entry.dtype} {entry.shape} takes {entry.tensor_bytes} bytes"
        raise CorruptStream(f"{told}, its streams of {entry.body_bytes} bytes hold {most} at most")
    return entry


def _wanted(entry: Entry, parts: list[StreamPart], tokens: tuple[int, int] | None, all_leading: bool) -> list[_PartRange]:
    """The parts that hold a range of tokens; at least one."""
    first, last = checked_range("tokens", tokens, entry.tokens)
    begin, found = 0, []
    for part in parts:
        low, high = max(first, begin), min(last, begin + part.tokens)
        if low < high:
            wanted = (low - begin, high - begin)
            found.append(_PartRange(part, wanted, low - first, all_leading and wanted == (0, part.tokens)))
        begin += part.tokens
    return found or [_PartRange(parts[-1], (0, 0), 0, False)]


def _filled(entry: Entry, wanted: list[_PartRange], options: dict[str, Any]) -> Any:
    """A tensor that its parts were decoded into."""
    header = read_header(wanted[0].part.open(False))
    tokens = sum(high - low for low, high in (one.tokens for one in wanted))
    shape = (*entry.shape[:-2], tokens, header.head_dim)
    if options["leading"] is not None:
        low, high = checked_range("leading", options["leading"], header.leading)
        shape = (high - low, tokens, header.head_dim)
    result, _ = arrays.empty(shape, header.dtype, header.numpy)
    for one in wanted:
        end = one.place + one.tokens[1] - one.tokens[0]
        one.decode(out=result[..., one.place : end, :], **options)
    return result


def stream_of(source: Source, entry: Entry, tokens: int | None = None) -> Source:
    """A stream that goes with the entry of its tensor (or holds so many of its tokens); raises CorruptStream."""
    header = read_header(source)
    shape = entry.shape if tokens is None else (*entry.shape[:-2], tokens, entry.shape[-1])
    if (header.shape, DTYPE_NAMES[header.dtype]) != (shape, entry.dtype):
        found = f"{header.shape} of {DTYPE_NAMES[header.dtype]}"
        raise CorruptStream(f"the file says {shape} of {entry.dtype}, the stream {found}")
    return source
