"""Law: reading a file of coded and exact tensors, the same for every container.

A container's reader lists its tensors (``names``, ``_read_entry``), finds their bytes (``_read_parts``, ``_read_exact``) and
lists what ``verify`` checks (``_checks``); the rest is here.
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
from pqcodec.stream.report import Damage, StreamInfo, damage_error
from pqcodec.stream.seal import order_problem
from pqcodec.stream.source import Source, reading_ahead
from pqcodec.stream.tables import Tables, with_tables
from pqcodec.tensors import arrays

LAYOUT, NO_LAYOUT = "..., tokens, head_dim", "..."
Progress = Callable[[int, int], None]  # called with the units done and the units in all: bytes, tensors or blocks
Findings = list[tuple[str | None, Damage | str]]  # the result of ``verify``: (tensor, damage); None: no single tensor


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: the file's description of it, and the offset of its body.

    >>> entry = Entry("layers.0.key", True, 0, "key", (2, 40, 64), "float16", LAYOUT, body_start=200, body_bytes=2160)
    >>> entry.tokens, entry.tensor_bytes, entry.continued_by((2, 8, 64), "float16")
    (40, 10240, True)
    """

    name: str
    coded: bool  # False: kept exactly, as plain numbers
    layer: int | None
    role: str  # "key", "value" or "other"
    shape: tuple[int, ...]
    dtype: str
    layout: str  # names of the dimensions: LAYOUT or NO_LAYOUT
    body_start: int  # offset in the file of the first part; 0 where each tensor has files of its own
    body_bytes: int  # all parts together
    parts: int = 1  # streams of a coded tensor, which follow each other along the tokens
    numpy: bool = False  # an exact tensor that was a numpy array
    rel_mse: float | None = None  # relative squared error that its writer measured, on a sample or on all numbers
    seal: int | None = None  # of the body, from its frame (SPEC II.2); None in older files and other containers

    def __post_init__(self) -> None:
        if self.numpy and self.dtype not in exact.NUMPY_DTYPES:
            raise CorruptStream(f"numpy has no dtype {self.dtype}")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor's own numbers, decoded."""
        return math.prod(self.shape) * c.EXACT_ITEM_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """The second last dimension; 1 for a single vector."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    def continued_by(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a tensor of this shape and dtype can follow along the tokens: all other dimensions are equal."""
        whole = min(len(shape), len(self.shape)) > 1
        return whole and (shape[:-2], shape[-1], dtype) == (self.shape[:-2], self.shape[-1], self.dtype)

    def with_tokens(self, tokens: int, parts: int, body_bytes: int, rel_mse: float | None = None) -> Entry:
        """This entry with another number of tokens, in ``parts`` streams of ``body_bytes`` bytes together."""
        shape = (*self.shape[:-2], tokens, self.shape[-1])
        return replace(self, shape=shape, parts=parts, body_bytes=body_bytes, rel_mse=rel_mse)


@dataclass(frozen=True)
class StreamPart:
    """One stream of a coded tensor: its number of tokens, and a function that opens it."""

    tokens: int
    open: Callable[[bool], Source]  # argument: whether all of the stream is wanted; it is then read at once

    def decode(self, whole: bool, verb: Callable[..., Any] = codec.decode, **options: Any) -> Any:
        """The decoded tensor; ``whole``: all of the stream is read, and its order seal checked too.

        ``options``, result and errors are those of ``verb``; raises CorruptStream where the order seal does not hold.
        """
        source = self.open(whole)
        decoded = verb(source, **options)
        if whole and (problem := order_problem(source)):
            raise CorruptStream(problem)
        return decoded

    def sound(self, backend: str = "auto") -> Source:
        """The stream, whole and with every byte checked; raises CorruptStream where a checksum or the order seal fails."""
        source = self.open(True)
        if damage := codec.verify(source, backend=backend):
            raise damage_error(damage)
        if problem := order_problem(source):
            raise CorruptStream(problem)
        return source

    def damage(self, backend: str, progress: codec.Progress) -> list[Damage | str]:
        """The damage that ``codec.verify`` finds; if there is none, a problem of the order seal, if there is one."""
        source = self.open(True)
        found: list[Damage | str] = [*codec.verify(source, backend=backend, progress=progress)]
        return found or [problem for problem in (order_problem(source),) if problem]


@dataclass(frozen=True)
class Check:
    """A run of a file's bytes that ``verify`` checks."""

    name: str | None  # the tensor it belongs to
    start: int  # bytes that are checked before it, for the progress
    size: int  # bytes
    damage: Callable[[str, codec.Progress], Sequence[Damage | str]]  # checks it with a backend and a progress


class named:  # noqa: N801 - reads as a function
    """A context that puts ``where`` in front of the message of a PQError raised inside it."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PQError):
            raise error.at(self._where) from error


class TensorFile(ABC):
    """An open file of tensors; a context manager. Opening reads the list of tensors, decoding only the bytes it needs."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.given: Tables = {}  # shared tables that its streams may name, beside those that it carries
        self._stack = ExitStack()
        self._entries: dict[str, Entry] = {}
        self._parts: dict[str, list[StreamPart]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that this object opened; one that was passed in stays open."""
        self._stack.close()

    @property
    def label(self) -> str:
        """The file's name in error messages."""
        return self._label

    def read_ahead(self) -> None:
        """Start reading local files into the system's cache in the background, for a caller that will read all of them."""
        self._stack.enter_context(reading_ahead(self._local_files()))

    # -- what each container implements --------------------------------------------------------------------------
    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in writing order."""

    @property
    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """The ``metadata`` that the writer was given; empty without any."""

    @property
    def tables(self) -> Tables:
        """The shared tables that the file carries (SPEC 16.3), by the bytes of their names; raises CorruptStream."""
        return {}

    @abstractmethod
    def _read_entry(self, name: str) -> Entry:
        """The entry of a tensor in ``names``."""

    @abstractmethod
    def _read_parts(self, entry: Entry) -> list[StreamPart]:
        """The streams of a coded tensor; each is checked against the entry when it is opened."""

    @abstractmethod
    def _read_exact(self, entry: Entry) -> Any:
        """The numbers of an exact tensor, uint8 [bytes] in memory of their own, checked against their checksum."""

    @abstractmethod
    def _has_order_seal(self, entry: Entry) -> bool:
        """Whether the file holds the order seals (SPEC 4.3) of a coded tensor's streams."""

    def _local_files(self) -> list[str]:
        """The local files that hold the bytes, in the order of the tensors; empty for a remote or in-memory source."""
        return []

    @abstractmethod
    def _checks(self) -> Iterator[Check]:
        """All that ``verify`` checks, in file order."""

    # -- reading -------------------------------------------------------------------------------------------------
    def entry(self, name: str) -> Entry:
        """Role, layer, shape, dtype and offset of a tensor; raises InvalidArgument for an unknown name, or CorruptStream."""
        if name not in self._entries:
            if name not in self.names:
                some = ", ".join(repr(n) for n in self.names[:5]) + (" ..." if len(self.names) > 5 else "")
                raise InvalidArgument(f"{self._label}: no tensor is called {name!r}; there are {some or 'none'}")
            with self._named(name):
                self._entries[name] = _plausible(self._read_entry(name))
        return self._entries[name]

    def forget(self, name: str) -> None:
        """Free what is cached of a tensor's streams (headers) for the next decode."""
        self._parts.pop(name, None)

    def stream(self, name: str, part: int = 0, *, check: bool = False) -> Source:
        """The stream of a coded tensor, or one part of a tensor of several, as a ``Source``.

        ``check``: read it at once, and check every byte. Raises InvalidArgument for an exact tensor or a missing part, and
        CorruptStream.
        """
        parts = self._streams(name)
        with self._named(name):
            if not 0 <= part < len(parts):
                raise InvalidArgument(f"has no part {part}, there are {len(parts)}")
            return parts[part].sound() if check else parts[part].open(False)

    def inspect(self, name: str) -> StreamInfo:
        """The header fields of a coded tensor, its parts' sizes added up; reads only the headers.

        Fields are those of the first part; of preset, centring and pairing all are named, joined by " + ", where parts differ.
        """
        parts = self._streams(name)
        with self._named(name):
            found = [codec.inspect(part.open(False)) for part in parts]
            sizes = ("stream_bytes", "header_bytes", "side_bytes", "payload_bytes", "tensor_bytes")
            whole: dict[str, Any] = {key: sum(getattr(info, key) for info in found) for key in sizes}
            for key in ("preset", "centered", "pairing"):
                each = dict.fromkeys(getattr(info, key) or "none" for info in found)
                whole |= {key: " + ".join(each)} if len(each) > 1 else {}
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
        fill: Any = None,
        estimate: str | None = None,
        progress: codec.Progress | None = None,
    ) -> Any:
        """The tensor ``name``; arguments, result and errors as of ``pqcodec.decode``.

        Of a coded tensor only the chunks that hold the wanted tokens are read, of an exact one all bytes.
        """
        entry = self.entry(name)
        with self._named(name):
            if entry.coded:
                options = {"device": device, "backend": backend, "leading": leading, "progress": progress}
                options |= {"fill": fill, "estimate": estimate}
                parts = self._streams(name)
                if len(parts) == 1:
                    return parts[0].decode(tokens is None and leading is None, tokens=tokens, out=out, **options)
                wanted = _wanted(entry, parts, tokens, leading is None)
                if out is None and device is None and not on_device(backend):
                    return _filled(entry, wanted, options)
                joined = arrays.concatenated(one.decode(**options) for one in wanted)
                return joined if out is None else arrays.copied(out, joined)
            x = exact.over_bytes(self._read_exact(entry), entry.shape, entry.dtype, entry.numpy)
            x = exact.cut(x, tokens, leading)
            if out is not None:
                return arrays.copied(out, x)
            return x if device is None else arrays.to_device(x, device)

    def decode_kept(
        self, name: str, *, leading: tuple[int, int] | None = None, backend: str = "auto", estimate: str | None = None
    ) -> tuple[Any, Any]:
        """The rows that are there of a coded tensor, and their positions; arguments, result and errors as of the core's verb.

        Raises InvalidArgument where the tensor is kept exactly, or has grown: then all of its tokens are there.
        """
        entry = self.entry(name)
        with self._named(name):
            parts = self._streams(name) if entry.coded else []
            if len(parts) != 1:
                raise InvalidArgument("is not one stream, which alone may hold some of a tensor's tokens; use decode()")
            options = {"leading": leading, "backend": backend, "estimate": estimate}
            return parts[0].decode(leading is None, codec.decode_kept, **options)  # type: ignore[no-any-return]

    def verify(self, progress: Progress | None = None, *, backend: str = "auto") -> Findings:
        """Check every byte and return the damage as (tensor or None, what); an empty list means that the file is sound.

        ``progress`` is called with (bytes done, bytes in all).
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

    def unsealed(self) -> list[str]:
        """The coded tensors without order seals (SPEC 4.3): blocks of theirs that changed places are damage that nobody finds.

        Such are single streams, and files of releases before there were seals. A tensor whose entry is damaged is left out.
        """
        found = []
        for name in self.names:
            try:
                entry = self.entry(name)
                if entry.coded and not self._has_order_seal(entry):
                    found.append(name)
            except (CorruptStream, UnsupportedStream):
                continue
        return found

    def _known_tables(self) -> Tables:
        """The shared tables that are given, and those that the file carries; raises as ``tables`` does."""
        return {**self.given, **self.tables}

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
    """A range of tokens to decode from one part of a tensor."""

    part: StreamPart
    tokens: tuple[int, int]  # counted within the part
    start: int  # index of the first of them in the result
    whole: bool  # the range needs all bytes of the part

    def decode(self, **options: Any) -> Any:
        return self.part.decode(self.whole, tokens=self.tokens, **options)


def _plausible(entry: Entry) -> Entry:
    """The entry; raises CorruptStream where its body is too short for its shape, whatever is coded of it (SPEC 3.3)."""
    most = c.MAX_NUMBERS_PER_BYTE * entry.body_bytes
    if entry.coded and math.prod(entry.shape) > most:
        raise CorruptStream(f"{entry.dtype} {entry.shape}: streams of {entry.body_bytes} bytes hold {most} numbers at most")
    return entry


def _wanted(entry: Entry, parts: list[StreamPart], tokens: tuple[int, int] | None, all_leading: bool) -> list[_PartRange]:
    """The ranges of the parts that hold ``tokens``; an empty range of the last part where that is none.

    Where all tokens are wanted (None), parts without any are among them: who decodes everything checks everything (SPEC II.5).
    """
    first, last = checked_range("tokens", tokens, entry.tokens)
    begin, found = 0, []
    for part in parts:
        low, high = max(first, begin), min(last, begin + part.tokens)
        if low < high or tokens is None:
            wanted = (low - begin, high - begin)
            found.append(_PartRange(part, wanted, low - first, all_leading and wanted == (0, part.tokens)))
        begin += part.tokens
    return found or [_PartRange(parts[-1], (0, 0), 0, False)]


def _filled(entry: Entry, wanted: list[_PartRange], options: dict[str, Any]) -> Any:
    """A new tensor into which the ranges of the parts are decoded."""
    header = read_header(wanted[0].part.open(False))
    tokens = sum(high - low for low, high in (one.tokens for one in wanted))
    shape = (*entry.shape[:-2], tokens, header.head_dim)
    if options["leading"] is not None:
        low, high = checked_range("leading", options["leading"], header.leading)
        shape = (high - low, tokens, header.head_dim)
    result, _ = arrays.empty(shape, header.dtype, header.numpy)
    for one in wanted:
        end = one.start + one.tokens[1] - one.tokens[0]
        one.decode(out=result[..., one.start : end, :], **options)
    return result


def stream_of(source: Source, entry: Entry, tables: Callable[[], Tables], tokens: int | None = None) -> Source:
    """``source``, whose header has the entry's shape (with ``tokens`` tokens, if given) and dtype; raises CorruptStream.

    ``tables``: those that are known, asked for where the stream names one, and then given to it.
    """
    header = read_header(source)
    shape = entry.shape if tokens is None else (*entry.shape[:-2], tokens, entry.shape[-1])
    if (header.shape, DTYPE_NAMES[header.dtype]) != (shape, entry.dtype):
        found = f"{header.shape} of {DTYPE_NAMES[header.dtype]}"
        raise CorruptStream(f"the file says {shape} of {entry.dtype}, the stream {found}")
    return with_tables(source, tables()) if header.named else source
