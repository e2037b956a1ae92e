"""Law: how a block of tensors becomes pieces: streams that are encoded together, lie together and are copied at once.

A piece is as much as one step of a pipeline moves, all of it of one device; a tensor larger than that becomes several streams,
along its first dimension. All follows from shapes, dtypes, options and which tensors lie on one device: of tensors of the same
kinds the pieces are the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count, pairwise
from typing import Any

from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.options import EncodeOptions
from pqcodec.placed import aligned
from pqcodec.stages.centre import Rope
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.tensors import arrays

_NUMBERS = count()


@dataclass(frozen=True)
class Coding:
    """How one tensor is encoded: the options of ``pqcodec.encode``."""

    preset: str = "pq3"
    center: str | None = None
    rope: Rope | None = None
    exact_tokens: int = 0

    def __post_init__(self) -> None:
        if self.rope is not None and not isinstance(self.rope.frequencies, Hashable):
            object.__setattr__(self, "rope", replace(self.rope, frequencies=tuple(self.rope.frequencies or ())))

    def header(self, shape: tuple[int, ...], dtype: int) -> Header:
        options = EncodeOptions(self.preset, center=self.center, rope=self.rope, exact_tokens=self.exact_tokens)
        header = options.header(shape, dtype)
        if header.coding == c.CODING_PAPER:
            raise InvalidArgument(f"preset {self.preset!r} looks at the numbers before it encodes: a pool takes the others")
        return header


@dataclass(frozen=True)
class Part:
    """One stream: rows ``first`` to ``last - 1`` of a tensor's first dimension (all of it: 0, -1); its place in the piece."""

    tensor: int
    first: int
    last: int
    header: Header
    place: int
    coding: Coding

    def of(self, x: Any) -> Any:
        """The part of a tensor."""
        return x if self.last < 0 else x[self.first : self.last]


@dataclass(frozen=True)
class Piece:
    parts: tuple[Part, ...]
    nbytes: int

    @cached_property
    def kind(self) -> int:
        """Pieces of one kind hold the same streams in the same places, of whichever tensors."""
        return _kind_number(tuple((part.header, part.place) for part in self.parts))

    def views(self, tensors: Sequence[Any]) -> list[Any]:
        return [part.of(tensors[part.tensor]) for part in self.parts]

    def of(self, each: Sequence[Any]) -> Any:
        """What is said of its tensors, which is the same of all that one piece holds."""
        return each[self.parts[0].tensor]

    def split(self, places: Sequence[Any]) -> list[tuple[Any, Piece, int]]:
        """(place, piece of the parts there, the byte where it begins), by the place of each tensor: itself if that is one."""
        found: dict[Any, list[Part]] = {}
        for part in self.parts:
            found.setdefault(places[part.tensor], []).append(part)
        if len(found) == 1:
            return [(*found, self, 0)]
        return [(place, *_joined(parts)) for place, parts in found.items()]


def _joined(parts: Sequence[Part]) -> tuple[Piece, int]:
    """Some parts of a piece, and all that lies between, as a piece of their own; the byte where that begins."""
    start = parts[0].place
    end = parts[-1].place + aligned(parts[-1].header.stream_bytes)
    return Piece(tuple(replace(part, place=part.place - start) for part in parts), end - start), start


@lru_cache(maxsize=1024)
def _kind_number(streams: tuple[tuple[Header, int], ...]) -> int:
    """A number that no other streams have."""
    return next(_NUMBERS)


@dataclass(frozen=True)
class Layout:
    """What a block's tensors are, and the pieces they make."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def nbytes(self) -> int:
        """Of all streams."""
        return sum(piece.nbytes for piece in self.pieces)

    @cached_property
    def logical_bytes(self) -> int:
        """Of the tensors."""
        return sum(_bytes(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def new_tensors(self, devices: Sequence[Any]) -> list[Any]:
        """One each, on the device of each."""
        import torch

        kinds = [getattr(torch, DTYPE_NAMES[dtype]) for dtype in self.dtypes]
        told = zip(self.shapes, kinds, devices, strict=True)
        return [torch.empty(shape, dtype=kind, device=device) for shape, kind, device in told]


def _bytes(shape: tuple[int, ...], dtype: int) -> int:
    size = c.ITEM_BYTES[dtype]
    for n in shape:
        size *= n
    return size


def layout_of(tensors: Sequence[Any], codings: Sequence[Coding], piece_bytes: int) -> Layout:
    """The layout of tensors [..., tokens, head_dim], cut where ``piece_bytes`` of them are full; raises InvalidArgument."""
    kinds: dict[Any, int] = {}
    places: dict[Any, int] = {}
    for x in tensors:
        places.setdefault(x.device, len(places))
        if (x.shape, x.dtype) not in kinds:
            kinds[x.shape, x.dtype] = arrays.view(x).dtype  # checks both
    told = tuple((tuple(x.shape), kinds[x.shape, x.dtype], places[x.device]) for x in tensors)
    return _layout(told, tuple(codings), piece_bytes)


@dataclass
class _Filling:
    """A piece that is not full yet."""

    parts: list[Part] = field(default_factory=list)
    filled: int = 0  # bytes of tensors
    nbytes: int = 0  # ... and of their streams

    def piece(self) -> Piece:
        return Piece(tuple(self.parts), self.nbytes)


@lru_cache(maxsize=256)
def _layout(kinds: tuple[tuple[tuple[int, ...], int, int], ...], codings: tuple[Coding, ...], piece_bytes: int) -> Layout:
    """``kinds``: shape, dtype and the number of the device, of each tensor."""
    headers = lru_cache(Coding.header)  # tensors of a kind share one
    pieces: list[Piece] = []
    filling: dict[int, _Filling] = {}
    for number, ((shape, dtype, place), coding) in enumerate(zip(kinds, codings, strict=True)):
        for first, last in _cuts(shape, dtype, piece_bytes):
            own = shape if last < 0 else (last - first, *shape[1:])
            size = _bytes(own, dtype)
            now = filling.setdefault(place, _Filling())
            if now.parts and now.filled + size > piece_bytes:
                pieces.append(now.piece())
                now = filling[place] = _Filling()
            header = headers(coding, own, dtype)
            now.parts.append(Part(number, first, last, header, now.nbytes, coding))
            now.filled, now.nbytes = now.filled + size, now.nbytes + aligned(header.stream_bytes)
    pieces += [now.piece() for now in filling.values()]
    return Layout(tuple(shape for shape, _, _ in kinds), tuple(dtype for _, dtype, _ in kinds), tuple(pieces))


def _cuts(shape: tuple[int, ...], dtype: int, piece_bytes: int) -> list[tuple[int, int]]:
    """Runs of a tensor's first dimension, of equal size as nearly as may be."""
    size = _bytes(shape, dtype)
    if size <= piece_bytes or len(shape) < 3 or shape[0] < 2:
        return [(0, -1)]
    runs = min(-(-size // piece_bytes), shape[0])
    return list(pairwise(shape[0] * i // runs for i in range(runs + 1)))
