"""Law: how a block's tensors are cut into pieces: streams that are encoded together, stored side by side and copied at once.

A piece is what one step of a pipeline moves, and all of it comes from one device. A tensor larger than a piece becomes several
streams, cut along its first dimension. The first piece and the last are halves: copies out wait until the first is encoded, and
copies back are over when the last is yet to be decoded. Smaller ones would be copied before the host has queued the next, or
before that is encoded. The cut depends on shapes, dtypes, options and on which tensors share a device, and on nothing else, so
blocks of the same kind have the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from pqcodec import constants as c
from pqcodec.codings.presets import check_restores
from pqcodec.errors import InvalidArgument
from pqcodec.options import EncodeOptions
from pqcodec.placed import aligned
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.tensors import arrays

KNOWN = 64  # kinds of tensors that a layout remembers
_NUMBERS = count()
_KIND = attrgetter("shape", "dtype", "layout", "device")  # of a tensor


class Kinds(NamedTuple):
    """What tensors are: ``each`` kind, in the order in which they appear, and ``numbers``, the kind of each tensor.

    A kind: shape, dtype, layout, device, and strides if they are wanted. As most tensors are alike, this is soon compared.
    """

    each: tuple[Any, ...]
    numbers: tuple[int, ...]

    @property
    def devices(self) -> list[Any]:
        """The devices of the tensors."""
        return list(dict.fromkeys(kind[3] for kind in self.each))


def kinds_of(tensors: Iterable[Any], strides: bool = False) -> Kinds:
    """What torch tensors are; raises InvalidArgument for some that are not dense.

    It looks at each once, which takes most of the time before a block's first piece is queued.
    """
    try:
        kinds = [(*_KIND(x), x.stride()) for x in tensors] if strides else list(map(_KIND, tensors))
    except RuntimeError as error:  # torch's, for nested tensors and some sparse ones
        raise InvalidArgument(f"a tensor without sizes or strides: {error}; dense ones are expected") from error
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return Kinds(tuple(numbers), (0,) * len(kinds) if len(numbers) == 1 else tuple(map(numbers.__getitem__, kinds)))


@dataclass(frozen=True)
class PieceStream:
    """One stream of a piece, and the rows of the tensor that it encodes.

    ``tensor``: the tensor's number in its block. ``first``, ``last``: rows ``first`` to ``last - 1`` of the tensor's first
    dimension (0, -1: the whole tensor). ``offset``: bytes from the piece's beginning to the stream's.
    """

    tensor: int
    first: int
    last: int
    header: Header
    offset: int
    options: EncodeOptions

    def rows(self, x: Any) -> Any:
        """The rows of tensor ``x`` that the stream encodes, as a view."""
        return x if self.last < 0 else x[self.first : self.last]


@dataclass(frozen=True)
class BlockPiece:
    """Some streams of a block, all of one device; they take ``nbytes`` of memory, gaps for alignment included."""

    streams: tuple[PieceStream, ...]
    nbytes: int

    @cached_property
    def kind(self) -> int:
        """A number that pieces share if they hold the same headers at the same offsets, whichever tensors these belong to."""
        return _kind_number(tuple((stream.header, stream.offset) for stream in self.streams))

    def views(self, tensors: Sequence[Any]) -> list[Any]:
        """The rows of each stream, as views of the block's ``tensors``."""
        return [stream.rows(tensors[stream.tensor]) for stream in self.streams]

    def first_of(self, values: Sequence[Any]) -> Any:
        """The value of the piece's first tensor, from one value for each tensor of the block.

        That is the value of all tensors of the piece where these share it, such as their device.
        """
        return values[self.streams[0].tensor]

    def split(self, devices: Sequence[Any]) -> list[tuple[Any, BlockPiece, int]]:
        """(device, the piece of the streams there, the byte where it begins), from the device of each tensor of the block.

        One entry holds this very piece where all its tensors are on one device.
        """
        found: dict[Any, list[PieceStream]] = {}
        for stream in self.streams:
            found.setdefault(devices[stream.tensor], []).append(stream)
        if len(found) == 1:
            return [(*found, self, 0)]
        return [(device, *_piece_of(streams)) for device, streams in found.items()]


def _piece_of(streams: Sequence[PieceStream]) -> tuple[BlockPiece, int]:
    """Some streams of a piece, and the bytes between them, as a piece of their own; the byte of the old one where it begins."""
    start = streams[0].offset
    end = streams[-1].offset + aligned(streams[-1].header.stream_bytes)
    return BlockPiece(tuple(replace(stream, offset=stream.offset - start) for stream in streams), end - start), start


@lru_cache(maxsize=1024)
def _kind_number(streams: tuple[tuple[Header, int], ...]) -> int:
    """A number that no other streams have."""
    return next(_NUMBERS)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """What a block's tensors are (shapes, stored dtypes, devices), and the pieces that their streams make."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[int, ...]
    devices: tuple[Any, ...]
    pieces: tuple[BlockPiece, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each piece."""
        return [piece.nbytes for piece in self.pieces]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(self.sizes)

    @cached_property
    def logical_bytes(self) -> int:
        """Bytes of the tensors that the block decodes to."""
        return sum(_bytes(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    @cached_property
    def _filled(self) -> set[Kinds]:
        """Kinds of tensors, ``KNOWN`` at the most, that are known to have room for the block's."""
        return set()

    def check_outs(self, outs: Sequence[Any], kinds: Kinds) -> None:
        """Raises InvalidArgument for tensors of ``kinds``, with strides, that have no room for the block's where they lie."""
        if kinds in self._filled:
            return
        for number, (x, shape, dtype) in enumerate(zip(outs, self.shapes, self.dtypes, strict=True)):
            if not arrays.fits(x, shape, dtype):
                raise InvalidArgument(f"out {number} has strides {x.stride()}; its last dimension must be contiguous")
        if len(self._filled) == KNOWN:
            self._filled.clear()
        self._filled.add(kinds)

    def new_tensors(self, devices: Sequence[Any]) -> list[Any]:
        """Uninitialised tensors of the block's shapes and dtypes, each on its device of ``devices``."""
        import torch

        kinds = [getattr(torch, DTYPE_NAMES[dtype]) for dtype in self.dtypes]
        wanted = zip(self.shapes, kinds, devices, strict=True)
        return [torch.empty(shape, dtype=kind, device=device) for shape, kind, device in wanted]


@lru_cache(maxsize=64)
def plain_options(preset: str, exact_tokens: int) -> EncodeOptions:
    """The options of tensors that are not centred, checked once."""
    check_restores(preset, "a pool")
    return EncodeOptions(preset, exact_tokens=exact_tokens)


def _bytes(shape: tuple[int, ...], dtype: int) -> int:
    size = c.ITEM_BYTES[dtype]
    for n in shape:
        size *= n
    return size


def layout_of(kinds: Kinds, options: Sequence[EncodeOptions], piece_bytes: int) -> BlockLayout:
    """The layout of torch tensors [..., tokens, head_dim], with one of ``options`` for all of them, or one each.

    A piece is full with ``piece_bytes`` of tensors. Raises InvalidArgument for shapes, dtypes and presets that a pool does not
    take.
    """
    return _layout(kinds, tuple(options), piece_bytes)


@dataclass
class _Filling:
    """A piece that is not full yet. ``room``: bytes of tensors with which it is."""

    room: int
    streams: list[PieceStream] = field(default_factory=list)
    filled: int = 0  # bytes of tensors
    nbytes: int = 0  # bytes of their streams

    def piece(self) -> BlockPiece:
        """The piece, full as it is."""
        return BlockPiece(tuple(self.streams), self.nbytes)


def _room(rest: int, piece_bytes: int) -> int:
    """Bytes of tensors of the piece behind the first one, where ``rest`` are to come: half a piece stays for the last one."""
    half = piece_bytes // 2
    return min(piece_bytes, max(rest - half, half))


@lru_cache(maxsize=256)
def _layout(kinds: Kinds, options: tuple[EncodeOptions, ...], piece_bytes: int) -> BlockLayout:
    headers = lru_cache(_header)  # tensors of a kind share one
    stored = [arrays.stored_kind(*kind[:3]) for kind in kinds.each]
    shapes, dtypes = tuple(stored[n][0] for n in kinds.numbers), tuple(stored[n][1] for n in kinds.numbers)
    devices = tuple(kinds.each[n][3] for n in kinds.numbers)
    rest: dict[Any, int] = {}  # bytes of a device's tensors that are in no piece yet
    for shape, dtype, device in zip(shapes, dtypes, devices, strict=True):
        rest[device] = rest.get(device, 0) + _bytes(shape, dtype)
    pieces: list[BlockPiece] = []
    filling = {device: _Filling(piece_bytes // 2) for device in rest}
    told = zip(shapes, dtypes, devices, options * len(shapes) if len(options) == 1 else options, strict=True)
    for number, (shape, dtype, device, how) in enumerate(told):
        for first, last in _cuts(shape, dtype, piece_bytes):
            own = shape if last < 0 else (last - first, *shape[1:])
            size, now = _bytes(own, dtype), filling[device]
            if now.streams and now.filled + size > now.room:
                pieces.append(now.piece())
                now = filling[device] = _Filling(_room(rest[device], piece_bytes))
            header = headers(how, own, dtype)
            now.streams.append(PieceStream(number, first, last, header, now.nbytes, how))
            now.filled, now.nbytes = now.filled + size, now.nbytes + aligned(header.stream_bytes)
            rest[device] -= size
    pieces += [now.piece() for now in filling.values()]
    return BlockLayout(shapes, dtypes, devices, tuple(pieces))


def _header(options: EncodeOptions, shape: tuple[int, ...], dtype: int) -> Header:
    """The header of a tensor's stream; raises InvalidArgument for a preset whose header depends on the numbers."""
    header = options.header(shape, dtype)
    if header.coding == c.CODING_PAPER or (header.codebook and options.levels is None):
        raise InvalidArgument(f"preset {options.preset!r} looks at the numbers before it encodes: a pool takes the others")
    return header


def _cuts(shape: tuple[int, ...], dtype: int, piece_bytes: int) -> list[tuple[int, int]]:
    """Runs (first, last + 1) of a tensor's first dimension, of nearly equal size; (0, -1) where the tensor stays whole."""
    size = _bytes(shape, dtype)
    if size <= piece_bytes or len(shape) < 3 or shape[0] < 2:
        return [(0, -1)]
    runs = min(-(-size // piece_bytes), shape[0])
    return list(pairwise(shape[0] * i // runs for i in range(runs + 1)))
