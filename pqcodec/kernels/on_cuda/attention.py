"""Law: the CUDA kernel of attention to encoded keys and values (``attention.cu``): its tables, macros, memory and launch.

Keys and values in quads, of head_dim 64, 128 or 256, on NVIDIA GPUs of compute capability 8.0 and more; ``why_not`` tells what
it leaves. Everything is allocated when it is prepared, so that ``run`` can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import quads
from pqcodec.codings.plan import plan_for
from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.on_cuda.backend import _device, header_of_kind
from pqcodec.kernels.on_cuda.compiled import Layout, compiled
from pqcodec.kernels.on_cuda.launches import SHARED_BYTES, launch, loaded
from pqcodec.kernels.on_cuda.quads import index_bytes
from pqcodec.placed import Placed
from pqcodec.stages import rotation
from pqcodec.stream import sections
from pqcodec.stream.header import Header

ORDERS = (64, 128, 256)
MOST_ROWS = 16  # query heads of a head of keys, times queries
THREADS = {64: 256, 128: 256, 256: 128}
RESIDENT = {64: 2, 128: 2, 256: 2}  # thread blocks of a multiprocessor
TILE = 32  # tokens of a warp
UNIT = 64  # tokens of a warp with one turn of the coefficients of the keys' mean
TABLE_BYTES = 64 << 10  # of both tables' copies together
_RESERVED = 1024  # bytes of shared memory that the device takes for each thread block
MOST_BLOCKS = 256  # of a head, the exact tokens' included
LOG2_E = math.log2(math.e)
SEQUENCE_TILES = 4  # of a thread block, at the least
BEGINNING = 1100  # encoded tokens that take as long as a thread block's beginning, and one of exact tokens


class Share(NamedTuple):
    """What a thread block takes, of each head of a sequence, as the kernel reads it: int64. The last share is the exact tokens.

    As ``FIELDS``, where each number stands.
    """

    k_payload: int = 0  # addresses of a stream's first blocks
    v_payload: int = 0
    coded: int = 0  # coded tokens of the stream
    least: int = 0  # the first of them that counts
    first_chunk: int = 0  # that are taken
    last_chunk: int = 0
    position: int = 0  # of the stream's first coded token under RoPE, modulo 2^32
    k_exponent: int = 0  # addresses of what the keys' means are multiplied with (a power of two), and of the means
    k_means: int = 0
    v_exponent: int = 0
    v_means: int = 0
    exact: int = 0  # exact first tokens; the addresses of the first head's, and bytes from head to head
    k_exact: int = 0
    v_exact: int = 0
    exact_head_stride: int = 0
    k_recent: int = 0  # address of the first token that is not encoded, and bytes from head to head and from token to token
    v_recent: int = 0
    k_head_stride: int = 0
    v_head_stride: int = 0
    k_stride: int = 0
    v_stride: int = 0


FIELDS = Share(*range(len(Share._fields)))


class PagedShare(NamedTuple):
    """What stands behind a ``Share`` where streams lie in pages: int64. As ``PAGED_FIELDS``, where each number stands."""

    pages: int = 0  # address of the numbers, int32, of the pages of the stream's chunks
    raw_first: int = 0  # the first token of the sequence that is not encoded; the recent ones are those from it on
    raw_table: int = 0  # address of the numbers, int32, of the sequence's blocks in the engine's cache
    raw_columns: int = 0  # of these numbers
    raw_blocks: int = 0  # of the cache
    raw_block: int = 1  # tokens of a block
    k_raw_block: int = 0  # bytes from block to block; ``k_recent`` is the address of the first one
    v_raw_block: int = 0


PAGED_FIELDS = PagedShare(*range(len(FIELDS), len(FIELDS) + len(PagedShare._fields)))


class CodedPair(NamedTuple):
    """Streams of keys and of values of the same tokens [kv_heads, tokens, head_dim]; ``least``: the first token that counts."""

    keys: Placed
    values: Placed
    least: int = 0


class ExactFirst(NamedTuple):
    """Exact first tokens of a sequence: how many, addresses of the first head's keys and values, bytes from head to head."""

    tokens: int
    keys: int
    values: int
    head_stride: int

    @classmethod
    def of(cls, coded: CodedPair) -> ExactFirst:
        """Those that the streams hold, or none if one behind them is the first that counts."""
        h = coded.keys.header
        at = h.places[sections.EXACT_TOKENS]
        k, v = (placed.stream + placed.header.places[sections.EXACT_TOKENS].start for placed in coded[:2])
        return cls(0 if coded.least else h.first_tokens, k, v, at.entry_bytes)


@dataclass(frozen=True)
class AttentionKind:
    """What the kernels are compiled for."""

    keys: Header  # ``header_of_kind``
    values: Header
    rows: int  # query heads of a head of keys, times queries
    queries: int
    query_dtype: int
    cap: float = 0.0  # of scores; 0: none
    paged: bool = False  # streams lie in pages, recent tokens in an engine's blocks


def why_not(keys: Header, values: Header, rows: int) -> str | None:
    """Why the kernel cannot attend to streams of such headers; None where it can.

    ``rows``: query heads of a head of keys, times queries.
    """
    for name, h in (("keys", keys), ("values", values)):
        if h.coding != c.CODING_QUADS:
            return f"{name} are not coded as quads"
        if h.head_dim not in ORDERS:
            return f"head_dim {h.head_dim} of {name} is none of {ORDERS}"
        if h.exceptions:
            return f"{name} have exact vectors"
        if h.payload_start % 4 or (h.first_tokens and h.places[sections.EXACT_TOKENS].start % 4):
            return f"the parts of {name} do not begin at multiples of 4 bytes"
    if keys.rope and keys.rope.channels % 16:
        return f"RoPE turns {keys.rope.channels} channels of keys, no multiple of 16"
    if values.rope:
        return "values are centred under RoPE"
    for what in ("shape", "chunk_tokens", "dtype", "seed", "first_tokens"):
        if getattr(keys, what) != getattr(values, what):
            return f"{what} of keys is {getattr(keys, what)}, of values {getattr(values, what)}"
    if rows > MOST_ROWS:
        return f"{rows} query heads of a head of keys, times queries, are more than {MOST_ROWS}"
    return None


def attention_layout(kind: AttentionKind, limit: int = 232448) -> Layout:
    """The quickest layout of which a multiprocessor runs RESIDENT thread blocks, or else the first that fits, or is smallest.

    ``limit``: bytes of shared memory of a multiprocessor.
    """
    found = [_layout(kind, most, half) for most in (16, 8, 4) for half in (UNIT, TILE)]
    room = [limit // count - _RESERVED * (count - 1) for count in (RESIDENT[kind.keys.order], 1)]
    return next((each for bytes_ in room for each in found if each.shared_bytes <= bytes_), found[-1])


def _layout(kind: AttentionKind, most: int, half: int) -> Layout:
    """Tables of points (of values too, if theirs are others), turns of tokens, coefficients, what each warp needs.

    ``most``: copies of a point; ``half``: HALF of ``attention.cu``, if it is BOTH.
    """
    tables, copies = _tables(kind, most)
    k_copies, v_copies = copies[0], copies[-1]
    k_bytes = len(tables[0]) * 8 * k_copies
    v_at = k_bytes if len(tables) > 1 else 0
    turns_at = k_bytes + (len(tables[1]) * 8 * v_copies if len(tables) > 1 else 0)
    pairs = len(kind.keys.rope.frequencies) if kind.keys.rope else 0
    both = _both(kind)
    turns = _turns(kind.keys.rope.frequencies, half if both else UNIT) if kind.keys.rope else np.zeros(0, np.uint8)
    threads, order, rows, halves = THREADS[kind.keys.order], kind.keys.order, kind.rows, -(-kind.rows // 8)
    lanes = 16 if rows <= 4 else 32
    blob = np.concatenate([*(table.reshape(-1).view(np.uint8) for table in tables), turns])
    blob_bytes = turns_at + turns.size
    coefficients_at = max(blob_bytes, 4 * order * (1 + 2 * threads // 32))  # queries are prepared where tables will be
    inputs_at = coefficients_at + rows * pairs * 8
    warps_at = inputs_at + order // 16 * halves * lanes * 8
    warp_bytes = 4 * (2 * TILE + (32 * halves + pairs // 8 * (halves * (32 if both else lanes) * 2 + 8) if pairs else 0))
    warp_bytes += both * half * 32
    results = 4 * max(
        threads * order * halves // 4,
        threads // 32 * rows * order,
        rows * (MOST_BLOCKS + 6 + order) + (4 * threads + threads // 32 * order),
    )
    size = max(warps_at + threads // 32 * warp_bytes, results)
    places = {
        "HALF": half,
        "K_COPIES": k_copies,
        "V_COPIES": v_copies,
        "V_AT": v_at,
        "TURNS_AT": turns_at,
        "BLOB_BYTES": blob_bytes,
        "COEFFICIENTS_AT": coefficients_at,
        "INPUTS_AT": inputs_at,
        "WARPS_AT": warps_at,
    }
    return Layout(threads, 0, False, False, blob, places, size)


def _tables(kind: AttentionKind, most: int) -> tuple[list[np.ndarray], list[int]]:
    """Points as float16 [2^bits, 4] of keys, and of values if they have others; and how many copies of each there are."""
    bits = [quads.table_of(plan_for(h)).bits for h in (kind.keys, kind.values)]
    kept = sorted(set(bits), key=bits.index)
    tables = [quads.points_of(each).points.astype("<f2").view(np.uint16) for each in kept]
    room = TABLE_BYTES // len(kept)
    return tables, [min(most, room // (8 << each)) for each in kept]


def _both(kind: AttentionKind) -> bool:
    """Whether the kernel finds what the keys' mean adds for two halves of a unit at once (BOTH in ``attention.cu``)."""
    return kind.keys.rope is not None and kind.keys.offsets and kind.rows <= 4 and kind.keys.chunk_tokens % TILE == 0


def _turns(frequencies: Sequence[int], tokens: int) -> np.ndarray:
    """cos - 1 and sin of each pair, float16, at some tokens, as operands of mma: uint8 [bytes] of [tokens / 16, steps, lanes, 2
    pairs, 2 tokens, 2]."""
    lane = np.arange(32)[:, None, None]
    token = np.arange(tokens // 16)[:, None, None, None, None] * 16 + (lane >> 2) + np.array([0, 8])
    pair = np.arange(len(frequencies) // 8)[:, None, None, None] * 8 + (lane & 3) + np.array([0, 4])[:, None]
    phase = token * np.array(frequencies, np.int64)[pair] % (1 << c.PHASE_BITS)
    angle = 2 * np.pi * phase / (1 << c.PHASE_BITS)
    return np.stack([np.cos(angle) - 1, np.sin(angle)], -1).astype(np.float16).view(np.uint8).reshape(-1)


def attention_definitions(kind: AttentionKind, found: Layout) -> dict[str, Any]:
    """The macros of ``attention.cu``."""
    k, v = kind.keys, kind.values
    mantissas = [float(np.log2(plan_for(h).mantissas[0])) for h in (k, v)]
    return {
        "ORDER": k.order,
        "THREADS": found.threads,
        "RESIDENT": RESIDENT[k.order],
        "HALVES": -(-kind.rows // 8),
        "ROWS_USED": kind.rows,
        "QUERIES": kind.queries,
        "CHUNK": k.chunk_tokens,
        "K_BITS": quads.table_of(plan_for(k)).bits,
        "V_BITS": quads.table_of(plan_for(v)).bits,
        "K_BYTES": index_bytes(k),
        "V_BYTES": index_bytes(v),
        "K_MANTISSA": f"({mantissas[0]!r}f)",
        "V_MANTISSA": f"({mantissas[1]!r}f)",
        "RADIUS_STEPS": c.QUADS_RADIUS_STEPS,
        "MOST_BLOCKS": MOST_BLOCKS,
        "PAIRS": len(k.rope.frequencies) if k.rope else 0,
        "INTERLEAVED": int(k.rope is not None and k.rope.pairing == c.ROPE_INTERLEAVED),
        "K_OFFSETS": int(k.offsets),
        "V_OFFSETS": int(v.offsets),
        "ALIGN": k.blocks.align,
        "BESIDE": k.blocks.beside,
        "FLOAT16": c.DTYPE_FLOAT16,
        "BFLOAT16": c.DTYPE_BFLOAT16,
        "FLOAT32": c.DTYPE_FLOAT32,
        "Q_TYPE": kind.query_dtype,
        "TYPE": k.dtype,
        "FIELDS": len(FIELDS) + kind.paged * len(PAGED_FIELDS),
        **{name.upper(): place for name, place in FIELDS._asdict().items()},
        **({"PAGED": 1} | {name.upper(): place for name, place in PAGED_FIELDS._asdict().items()} if kind.paged else {}),
        **({"CAP": f"{kind.cap!r}f"} if kind.cap else {}),
        **found.places,
    }


@dataclass(frozen=True)
class AttentionKernel:
    """The compiled kernel on a device, and its tables there."""

    function: Any
    layout: Layout
    blob: Any  # torch tensors on the device
    frequencies: Any
    rotation: Any  # int32 [3, order]: the signs of the first round and of the second, and the permutation between them


@lru_cache(maxsize=32)
def kernel(kind: AttentionKind, device: str) -> AttentionKernel:
    """The kernel for a kind, compiled once a process; raises BackendUnavailable where shared memory has no room for it."""
    import torch

    _, architecture, _, limit = _device(device)
    found = attention_layout(kind, limit)
    if found.shared_bytes > limit:
        raise BackendUnavailable(
            f"attention to these codes takes {found.shared_bytes} bytes of shared memory, this GPU has {limit}; "
            f"choose backend 'triton'"
        )
    code = compiled("attention.cu", attention_definitions(kind, found), architecture)
    function = loaded(code, "attend", device, {SHARED_BYTES: found.shared_bytes})
    h = kind.keys
    frequencies = np.array(h.rope.frequencies if h.rope else [0], np.uint32).view(np.int32)
    signs = [rotation.signs(h.seed, h.order, first_round) for first_round in (True, False)]
    arrays = [found.blob, frequencies, np.stack([*signs, rotation.permutation(h.order)]).astype(np.int32)]
    return AttentionKernel(function, found, *(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in arrays))


class CudaAttention:
    """Attention of the queries of some sequences to their encoded keys and values, prepared once.

    ``query_shape``: [sequences, q_heads, queries, head_dim]; ``sequences``: the streams of each, in order, all of one kind; of
    a sequence of several, values are not centred. ``firsts``: of each sequence, in the tensors' dtype. ``recent``: memory of
    exact keys and values behind the streams, [sequences, kv_heads, n, head_dim]. ``scale`` of scores; ``cap``: their bound, 0
    for none.
    """

    def __init__(
        self,
        query_shape: tuple[int, ...],
        query_dtype: int,
        sequences: Sequence[Sequence[CodedPair]],
        firsts: Sequence[ExactFirst],
        recent: tuple[Any, Any] | None,
        scale: float,
        cap: float,
    ) -> None:
        import torch

        _, query_heads, queries, _ = query_shape
        keys, values, _ = sequences[0][0]
        k, v, device = keys.header, values.header, keys.keeps.device
        rows = query_heads // k.leading * queries
        kind = AttentionKind(header_of_kind(k), header_of_kind(v), rows, queries, query_dtype, cap)
        self._kept = [*(placed.keeps for streams in sequences for coded in streams for placed in coded[:2]), *(recent or ())]
        whole = len(sequences) * k.leading
        chunks = [[coded.keys.header.chunks for coded in streams] for streams in sequences]
        at_once = _device(str(device))[2] * RESIDENT[k.order]
        splits = _splits(whole, chunks, k.chunk_tokens, at_once, k.order)
        part = small_part(max(map(sum, chunks)), splits, whole, at_once, k.chunk_tokens)
        splits += part > 0
        table = [
            _shares(streams, divided(counts, splits, part), first, recent, n)
            for n, (streams, counts, first) in enumerate(zip(sequences, chunks, firsts, strict=True))
        ]
        self._shares = torch.tensor(table, dtype=torch.int64).to(device)
        self._room = recent[0].shape[-2] if recent else 0
        self._prepare(kind, device, k.leading, whole, splits, scale)

    def _prepare(self, kind: AttentionKind, device: Any, heads: int, whole: int, splits: int, scale: float) -> None:
        """The kernel, and memory for the partial results of ``whole`` heads of all sequences in ``splits`` shares each."""
        import torch

        self._kernel = kernel(kind, str(device))
        self._device, self._heads, self._scale = device, heads, np.float32(scale * LOG2_E)
        self._blocks, self._grid = splits + 1, whole * (splits + 1)
        results = whole * (splits + 1) * kind.rows
        self._sums = torch.empty(results * kind.keys.order, dtype=torch.float32, device=device)
        self._about = torch.empty(results * 2, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(whole, dtype=torch.int32, device=device)

    def run(self, query: Any, out: Any, recent: Any = None, new: tuple[Any, Any] | None = None) -> Any:
        """Fills ``out`` and returns it. Both are contiguous; on the current stream.

        ``recent``: how many tokens of the recent memory count, from the first on, if not all; a tensor int32 [1] on the device
        is read when the kernel runs. ``new``: keys and values of the last of these, [sequences, kv_heads, queries, head_dim] of
        the memory's dtype, which are put there; ``is_readable`` must hold for them.
        """
        found, count = self._kernel, self._room if recent is None else recent
        at, count = (np.uint64(0), count) if isinstance(count, int) else (count, 0)
        values = [
            *(self._shares, np.int32(self._heads), np.int32(self._blocks), found.blob, found.frequencies, found.rotation),
            *(query, self._scale, self._sums, self._about, self._arrived, out, at, np.int32(count)),
            *(np.int32(new[0].shape[2] if new else 0), *(_new_rows(x) for x in new or (None, None))),
        ]
        launch(found.function, self._grid, found.layout.threads, found.layout.shared_bytes, self._device, values)
        return out


def is_readable(x: Any) -> bool:
    """Whether the kernel can read exact keys or values [..., head_dim] as they lie."""
    return x.stride(-1) == 1 and not x.data_ptr() % 4 and not any(s * x.element_size() % 4 for s in x.stride()[:-1])


def _new_rows(x: Any) -> np.ndarray:
    """NewRows of ``attention.cu``."""
    strides = [] if x is None else [x.data_ptr(), *(x.stride(dim) * x.element_size() for dim in range(3))]
    return np.array(strides or [0] * 4, np.int64)


def _splits(heads: int, chunks: Sequence[Sequence[int]], chunk_tokens: int, at_once: int, order: int) -> int:
    """Thread blocks among which a head's chunks are divided, so that all multiprocessors are busy to the end.

    ``chunks``: of each stream of each sequence; ``at_once``: thread blocks that the device runs at a time.
    """
    longest = max(sum(each) for each in chunks)
    tiles = longest * -(-chunk_tokens // TILE)
    most = max(1, min(tiles // (SEQUENCE_TILES * THREADS[order] // 32), longest, MOST_BLOCKS - 1))
    wanted = at_once // heads if heads <= at_once else -(-4 * at_once // heads)
    streams = max(sum(n > 0 for n in each) for each in chunks)
    wanted -= wanted > 8  # a block of few tiles may wait for that of exact tokens
    return max(1, streams, min(most, wanted))


def small_part(chunks: int, splits: int, heads: int, at_once: int, chunk_tokens: int) -> float:
    """The part of a head's chunks that one thread block more takes, where ``splits`` of each of ``heads`` leave room for few.

    These small blocks run one after the other beside the others, each with that of exact tokens, and end when they do. 0 where
    they would hold too little.

    >>> round(small_part(2048, 4, 64, 264, 64), 3)  # 64 more in the room of 8
    0.022
    """
    room = at_once - heads * splits
    if room <= 0 or not chunks or splits + 2 > MOST_BLOCKS:
        return 0.0
    rounds = -(-heads // room)
    part = (chunks / splits - rounds * BEGINNING / chunk_tokens) / (rounds + 1 / splits) / chunks
    return part if part * chunks * chunk_tokens > BEGINNING / 2 else 0.0


def divided(chunks: Sequence[int], shares: int, small: float = 0.0) -> list[tuple[int, int, int]]:
    """The chunks of some streams, divided into ``shares``, of one stream each: (stream, its first chunk, its last chunk + 1).

    The largest share is as small as can be. Shares that nothing is left for take chunks 0 to 0. Streams without chunks have no
    share, and there are at least as many shares as others. ``small``: the part of all chunks that the last share takes, of the
    longest stream's.

    >>> divided([5, 1], 4)
    [(0, 0, 1), (0, 1, 3), (0, 3, 5), (1, 0, 1)]
    >>> divided([10], 3, 0.1)
    [(0, 0, 4), (0, 4, 9), (0, 9, 10)]
    """
    longest = max(range(len(chunks)), key=chunks.__getitem__)
    last = min(int(small * sum(chunks)), chunks[longest] - 1)
    if last > 0:
        left = [n - last * (i == longest) for i, n in enumerate(chunks)]
        return [*divided(left, shares - 1), (longest, left[longest], chunks[longest])]
    parts = [min(n, 1) for n in chunks]
    for _ in range(shares - sum(parts)):
        largest = max(range(len(chunks)), key=lambda i: chunks[i] / parts[i] if parts[i] else 0)
        if parts[largest] >= chunks[largest]:
            break
        parts[largest] += 1
    owned = enumerate(zip(chunks, parts, strict=True))
    found = [(i, n * j // own, n * (j + 1) // own) for i, (n, own) in owned for j in range(own)]
    return found + [(0, 0, 0)] * (shares - len(found))


def _shares(
    streams: Sequence[CodedPair],
    shares: Sequence[tuple[int, int, int]],
    first: ExactFirst,
    recent: tuple[Any, Any] | None,
    n: int,
) -> list[Share]:
    """The shares of sequence ``n``, that of the exact tokens behind the others."""
    own = [_share(coded) for coded in streams]
    strides = [[x.stride(dim) * x.element_size() for x in recent] if recent else [0, 0] for dim in (1, 2)]
    exact = own[0]._replace(
        exact=first.tokens,
        k_exact=first.keys,
        v_exact=first.values,
        exact_head_stride=first.head_stride,
        k_recent=recent[0][n].data_ptr() if recent else 0,
        v_recent=recent[1][n].data_ptr() if recent else 0,
        k_head_stride=strides[0][0],
        v_head_stride=strides[0][1],
        k_stride=strides[1][0],
        v_stride=strides[1][1],
    )
    return [*(own[i]._replace(first_chunk=begin, last_chunk=end) for i, begin, end in shares), exact]


def _share(coded: CodedPair) -> Share:
    """A stream as the kernel reads it, and none of its chunks."""
    (k, h), (v, of_values) = ((placed.stream, placed.header) for placed in coded[:2])
    return Share(
        k_payload=k + h.payload_start,
        v_payload=v + of_values.payload_start,
        coded=h.coded_tokens,
        least=max(coded.least - h.first_tokens, 0),
        position=((h.rope.first_position if h.rope else 0) + h.first_tokens) % (1 << c.PHASE_BITS),
        k_exponent=k + c.OFFSET_EXPONENT_AT,
        k_means=k + h.header_bytes,
        v_exponent=v + c.OFFSET_EXPONENT_AT,
        v_means=v + of_values.header_bytes,
    )
