"""Law: the public verbs. They check their arguments, choose between host memory and a device, and do nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec import host
from pqcodec.backends import on_device
from pqcodec.codings.declared import DECLARED, Codebook, half_numbers
from pqcodec.codings.presets import DEFAULT_PRESET, preset_name
from pqcodec.errors import InvalidArgument
from pqcodec.options import EncodeOptions, Progress, check_numbers
from pqcodec.stages.centre import Halves, Rope
from pqcodec.stream.header import DTYPE_CODES, DTYPE_NAMES, Header, read_header
from pqcodec.stream.header_ranges import PAIRING_NAMES
from pqcodec.stream.linear import LINEAR_NAMES
from pqcodec.stream.report import Damage, StreamInfo
from pqcodec.stream.source import Source, source_of
from pqcodec.stream.tables import tables_by_name, with_tables
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import device_of, device_type


def encode(
    x: Any,
    *,
    preset: str = DEFAULT_PRESET,
    seed: int = 0,
    center: str | None = None,
    rope: Rope | None = None,
    exact_tokens: int = 0,
    exact_vectors: Any = (),
    nonfinite: str = "error",
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
    effort: str = "fast",
    pairing: str | None = None,
    exact_last: int = 0,
    keep: Any = None,
    levels: Any = None,
    codebooks: Any = None,
    before_rope: bool = False,
    join_heads: bool = False,
    channels: Any = None,
    block_basis: Any = None,
    basis: Any = None,
    ranges: Any = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> bytes:
    """Encode a tensor [..., tokens, head_dim] of float16, bfloat16 or float32 (torch or numpy) into one stream.

    ``center``: None, "mean" (subtract the mean over tokens of each leading index) or "rope" (the mean before RoPE, described by
    ``rope``). ``exact_tokens``, ``exact_last``: first and last tokens kept in the tensor's own dtype (the last not by backends
    of GPUs). ``exact_vectors``: further vectors that are kept so, as pairs (leading index, token), or a number n: the n vectors
    of each leading index that lie farthest from its mean (under RoPE from the mean at their position; of equally far ones the
    earlier), which backends of GPUs refuse. ``nonfinite``: "error", or "exact" to keep vectors that hold NaN or Inf as they
    are. ``chunk_tokens``: tokens under one checksum; whole groups where tokens share fields (wu44: multiples of 128).
    ``effort``: "fast", or "best" for a smaller error from a longer search (presets of quads, and of pair polar, whose range of
    angles then begins behind the largest gap; the others have no search, and a decoder sees no difference). ``pairing``: the
    channels that pair polar codes together, "half" (i and i + head_dim/2) or "interleaved" (2i and 2i+1); None is ``rope``'s,
    else "half". ``keep``: ascending positions [n] of the tokens that the stream holds, or [..., n] where leading indices keep
    others; what is said of tokens, but for ``exact_vectors``, is then said of kept ones, RoPE turns them at their own
    positions, and backends of GPUs refuse. ``levels``: for presets of levels (nuq4) 2^bits ascending numbers, as places -1 .. 1
    in the range of a group, or a ``LevelTable`` of them, which the stream names and does not hold; None fits them to the
    tensor. ``codebooks``: for presets of residual VQ (rvq8) a ``VectorTable``, which the stream names likewise.
    ``before_rope``: code vectors as they were before ``rope`` turned them, less their mean with center="mean". ``join_heads``:
    code the vectors that the heads [..., heads, tokens, head_dim] have of a token as one of at most 1024 numbers. ``channels``:
    ascending channels [n] of vectors, or [..., n] where leading indices keep others, that are coded; the others decode to 0, or
    to the mean with ``center``. ``basis``: a matrix [n, numbers] whose rows' combinations vectors become, n numbers each, a
    ``BasisTable`` of one, which the stream names likewise, or n for the first principal directions of the tensor itself.
    ``block_basis``: a matrix [16, 16] that each 16 channels are combined of, or True for that of least error. Matrices are
    rounded to float16; ``channels``, ``basis`` and ``block_basis`` are of all heads' at most 4096 numbers with ``join_heads``.
    ``ranges``: for presets of scalar coding a ``RangeTable`` of scales and zeros that were calibrated beforehand, which the
    stream names likewise; None takes the tensor's own. Backends of GPUs refuse all of these. A tensor of a GPU is encoded there
    (``batch.EncodeBatch`` leaves the stream there, too), and ``progress`` is told only at the end. Raises InvalidArgument,
    NonFiniteInput or BackendUnavailable.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 100, 64)).astype(np.float32)
    >>> data = encode(x, backend="reference")
    >>> len(data) == encoded_size(x.shape, "float32")
    True
    >>> y = decode(data, backend="reference")
    >>> bool(((x - y) ** 2).sum() < 0.04 * (x**2).sum())
    True
    """
    kept = (exact_tokens, chunk_tokens, exact_vectors, nonfinite)
    stages: tuple[Any, ...] = (
        exact_last,
        keep,
        levels,
        codebooks,
        before_rope,
        join_heads,
        channels,
        block_basis,
        basis,
        ranges,
    )
    options = EncodeOptions(preset, seed, center, rope, *kept, effort, pairing, *stages)
    return encode_by(options, x, backend, progress)[1]


def encode_by(
    options: EncodeOptions,
    x: Any,
    backend: str = "auto",
    progress: Progress | None = None,
    means: Halves | None = None,
) -> tuple[Header, bytes]:
    """``encode`` with its options in one object: the stream, and its header, which so need not be read out of it.

    ``means``: what is subtracted from a tensor that is centred, instead of its own mean (``centre.stored_means``).

    >>> import numpy as np
    >>> header, data = encode_by(EncodeOptions("pq2"), np.ones((2, 10, 64), np.float16), backend="reference")
    >>> header.tokens, header.stream_bytes == len(data)
    (10, True)
    """
    view = arrays.view(x)
    if on_device(backend, view.device):
        from pqcodec import device

        return device.encode(x, options, backend, progress, means)
    return host.encode(view, options, backend, progress, means)


def encoded_size(
    shape: tuple[int, ...],
    dtype: str = "float16",
    *,
    preset: str = DEFAULT_PRESET,
    center: str | None = None,
    rope: Rope | None = None,
    exact_tokens: int = 0,
    exact_vectors: int = 0,
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
    exact_last: int = 0,
    keep: Any = None,
    levels: Any = None,
    codebooks: Any = None,
    before_rope: bool = False,
    join_heads: bool = False,
    channels: Any = None,
    block_basis: Any = None,
    basis: Any = None,
    ranges: Any = None,
) -> int:
    """Bytes that ``encode`` returns for a finite tensor of that shape; nothing is encoded. Raises InvalidArgument.

    ``exact_vectors``: how many of each leading index; a stream's size by pairs depends on which of them are coded.

    >>> encoded_size((32, 8, 4096, 128), preset="quad3") / (32 * 8 * 4096 * 128 * 2)
    0.192...
    """
    if dtype not in DTYPE_CODES:
        raise InvalidArgument(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPE_CODES)}")
    more: dict[str, Any] = {"exact_last": exact_last, "keep": keep, "levels": levels, "codebooks": codebooks}
    more |= {"before_rope": before_rope, "join_heads": join_heads}
    more |= {"channels": channels, "block_basis": block_basis, "basis": basis, "ranges": ranges}
    if not isinstance(exact_vectors, Integral):
        raise InvalidArgument(f"exact_vectors {exact_vectors!r}: how many of each leading index is expected here, not which")
    check_numbers(exact_vectors=exact_vectors)
    options = EncodeOptions(preset, 0, center, rope, exact_tokens, chunk_tokens, exact_vectors, **more)
    return options.header(tuple(shape), DTYPE_CODES[dtype]).stream_bytes


def decode(
    data: Any,
    *,
    device: Any = None,
    backend: str = "auto",
    tokens: tuple[int, int] | None = None,
    leading: tuple[int, int] | None = None,
    out: Any = None,
    fill: Any = None,
    tables: Any = (),
    estimate: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Decode a stream (bytes-like, or a seekable binary file) into a tensor of the shape, dtype and kind that was encoded.

    ``tokens`` = (first, last + 1) decodes that range only and reads only the blocks that hold it: [..., last+1-first,
    head_dim]. ``leading`` = (first, last + 1) does the same for the flattened leading dimensions: [n, tokens, head_dim].
    ``device``: a torch device for the result; on a GPU the stream is decoded there. ``out``: a tensor of the result's shape and
    dtype to fill instead, with any strides, such as a part of a larger cache; after an error its content is undefined.
    ``fill``: of a stream that kept only some tokens (``encode(keep=)``), what stands where none was kept; without it such a
    stream is refused, and ``decode_kept`` gives its rows. The result is then as large as the whole tensor, however small a
    stranger's stream is: ``inspect`` tells ``tensor_bytes``, and what memory has no room for is refused. ``tables``:
    SharedTables, among which that which the stream may name has to be. ``estimate``: of a sketch (presets qjl), which tells
    inner products alone (``attention.scores``), the vectors whose inner products these are, "unbiased", or those times what
    makes their error least, "shrunk"; without it such a stream is refused. Either is far from what was encoded: ``inspect``
    tells how far.
    Raises InvalidArgument, TruncatedStream, CorruptStream, UnsupportedStream or MissingTable.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 100, 64)).astype(np.float32)
    >>> data = encode(x, preset="pq4", backend="reference")
    >>> whole = decode(data, backend="reference")
    >>> part = decode(data, tokens=(30, 40), leading=(1, 2), backend="reference")
    >>> part.shape, bool((part == whole[1:, 30:40]).all())
    ((1, 10, 64), True)
    """
    if tables:
        data = given_tables(data, tables)
    where = device_of(out) if out is not None else device
    at = device_type(where if where is not None else device_of(data))
    if on_device(backend, at):
        from pqcodec import device as on_gpu

        return on_gpu.decode(data, where, backend, out, tokens, leading, progress)
    result = host.decode(source_of(data), backend, out, tokens, leading, progress, fill, estimate)
    return result if device is None or out is not None else arrays.to_device(result, device)


def decode_kept(
    data: Any, *, leading: tuple[int, int] | None = None, backend: str = "auto", estimate: str | None = None
) -> tuple[Any, Any]:
    """The rows that a stream holds, and the positions that they had in the tensor: ([..., n, head_dim], int64 [n] or [..., n]).

    Positions are [n] where all leading indices kept the same tokens; of a stream without a keep list they are 0 .. tokens - 1.
    ``leading`` and ``estimate`` as in ``decode``: [leads, n, head_dim], and positions [leads, n] of lists that differ. Both are
    of the kind that was encoded. Raises as ``decode`` does.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 100, 64)).astype(np.float32)
    >>> data = encode(x, keep=[0, 1, 98, 99], exact_tokens=4, backend="reference")
    >>> rows, positions = decode_kept(data, backend="reference")
    >>> positions.tolist(), bool((rows == x[:, positions]).all())
    ([0, 1, 98, 99], True)
    >>> decode(data, fill=0, backend="reference").shape
    (2, 100, 64)
    """
    rows, positions = host.decode_kept(source_of(data), backend, leading=leading, estimate=estimate)
    return rows, arrays.alike(rows, positions, keep_dtype=False)


def given_tables(data: Any, tables: Any) -> Source:
    """A stream with the shared tables that it may name, for every function that takes streams; raises as ``decode`` does.

    >>> import numpy as np
    >>> from pqcodec.stream.tables import LevelTable
    >>> table = LevelTable((-1, -0.3, 0.3, 1))
    >>> data = encode(np.ones((4, 64), np.float16), preset="nuq2", levels=table, backend="reference")
    >>> inspect(data).table == table.name, inspect(data).levels, len(inspect(given_tables(data, [table])).levels)
    (True, None, 4)
    """
    return with_tables(source_of(data), tables_by_name(tables))


def decode_together(
    sources: Sequence[Source],
    outs: Sequence[Any],
    starts: Sequence[int],
    backend: str = "auto",
    firsts: Sequence[int] | None = None,
) -> None:
    """Decode whole streams into tensors of one device, all at once: what many small streams cost beside their numbers, once.

    Each stream goes to the tokens of its out [..., tokens, head_dim] from a start on; many may share one out. On the CPU an out
    may be a list of tensors that follow each other along their first dimension. ``firsts``: where in its out's first dimension
    each stream's begins; None: each has all of its out's. Raises as ``decode`` does, and does not say which of the streams is
    damaged.

    >>> import numpy as np
    >>> x, out = np.ones((2, 10, 64), np.float16), np.zeros((2, 20, 64), np.float16)
    >>> streams = [source_of(encode(part, backend="reference")) for part in (x, -x)]
    >>> decode_together(streams, [out, out], [0, 10], backend="reference")
    >>> np.sign(out[0, :, 0]).tolist() == 10 * [1.0] + 10 * [-1.0]
    True
    """
    if len(outs) and on_device(backend, device_type(device_of(outs[0]))):  # a list of tensors is the CPU's
        from pqcodec import device

        if firsts is not None:
            counts = [read_header(source).shape[0] for source in sources]
            outs = [out[first : first + count] for out, first, count in zip(outs, firsts, counts, strict=True)]
        return device.decode_together(sources, outs, starts, backend)
    return host.decode_together(sources, outs, starts, backend, firsts)


def inspect(data: Any) -> StreamInfo:
    """What a stream says of itself; reads only its header. Raises as ``decode`` does.

    >>> import numpy as np
    >>> inspect(encode(np.zeros((4, 64), np.float16), preset="pq4", backend="reference")).preset
    'pq4'
    """
    return inspect_header(read_header(source_of(data)))


def inspect_header(h: Header) -> StreamInfo:
    """What a header says of its stream."""
    return StreamInfo(
        version=c.STREAM_VERSION,
        preset=preset_name(h.coding, h.row_bits, h.radius_bits, h.order, h.affine, isinstance(h.codebook, Codebook), h.sketch),
        coding=DECLARED[h.coding].name,
        dtype=DTYPE_NAMES[h.dtype],
        shape=h.shape,
        seed=h.seed,
        rounds=h.rounds,
        centered=("rope" if h.rope and not h.before_rope else "mean") if h.offsets else None,
        exact_tokens=h.exact_tokens,
        exact_last=h.exact_last,
        exact_vectors=h.exceptions,
        chunk_tokens=h.chunk_tokens,
        order=h.order,
        stream_bytes=h.stream_bytes,
        header_bytes=h.header_bytes,
        side_bytes=h.payload_start - h.header_bytes,
        payload_bytes=h.stream_bytes - h.payload_start,
        tensor_bytes=math.prod(h.whole_shape) * c.ITEM_BYTES[h.dtype],
        group=(h.affine.tokens, h.affine.channels) if h.affine else None,
        pairing=PAIRING_NAMES.get(h.affine.pairing) if h.affine else None,
        kept_of=h.keep.tokens if h.keep else None,
        outliers=h.affine.outliers if h.affine else 0,
        levels=half_numbers(h.codebook.levels) if isinstance(h.codebook, Codebook) and h.codebook.levels else None,
        table=h.codebook.name.hex() or None if h.codebook else None,
        before_rope=h.before_rope,
        joined_heads=h.heads if h.joined else None,
        linear=LINEAR_NAMES[h.linear.kind] if h.linear else None,
        basis_table=h.basis.name.hex() if h.basis else None,
        range_table=h.shared_ranges.name.hex() if h.shared_ranges else None,
        width=h.width,
        estimate_error=h.sketch.error(h.head_dim, h.order) if h.sketch else None,
    )


def verify(data: Any, *, backend: str = "auto", progress: Progress | None = None) -> list[Damage]:
    """Check every checksum of a stream; an empty list is a sound stream.

    A stream by itself does not tell blocks of equal size that changed places together with their checksums; files of many
    tensors do, by an order seal (SPEC 4.3). A header that does not hold raises, as in ``decode``.

    >>> import numpy as np
    >>> data = bytearray(encode(np.ones((2, 100, 64), np.float16), backend="reference"))
    >>> verify(data, backend="reference")
    []
    >>> data[-1] ^= 1
    >>> print(*verify(data, backend="reference"))
    payload, leading index 1, tokens 64 .. 99
    """
    if on_device(backend, device_type(device_of(data))):
        from pqcodec import device

        return device.verify(data, backend, progress)
    return host.verify(source_of(data), backend, progress)


def means(data: Any) -> np.ndarray | None:
    """What a stream's encoder subtracted: float32 [leading, head_dim], turned back to position 0 under RoPE; None for nothing.

    Raises as ``decode`` does.

    >>> import numpy as np
    >>> means(encode(np.full((3, 10, 64), 2, np.float16), center="mean", backend="reference"))[:, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    return host.means(source_of(data))
