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
from cuda.bindings import driver

from pqcodec import constants as c
from pqcodec.codings import quads
from pqcodec.codings.plan import plan_for
from pqcodec.kernels.on_cuda.backend import _device, header_of_kind
from pqcodec.kernels.on_cuda.compiled import Layout, compiled, returned
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
MOST_BLOCKS = 256  # of a head, the exact tokens' included
LOG2_E = math.log2(math.e)
SEQUENCE_TILES = 4  # of a thread block, at the least


class SequenceRow(NamedTuple):
    """A sequence as the kernels read it: int64. As ``FIELDS``, where each number stands in a row."""

    k_payload: int  # addresses of the first blocks
    v_payload: int
    coded: int  # coded tokens
    least: int  # first coded token that counts
    position: int  # of the first coded token under RoPE, modulo 2^32
    k_exponent: int  # addresses of what the keys' means are multiplied with (a power of two), and of the means
    k_means: int
    v_exponent: int
    v_means: int
    exact: int  # exact first tokens, and the addresses of the first head's
    k_exact: int
    v_exact: int
    recent: int  # tokens that are not encoded
    k_recent: int
    v_recent: int
    k_head_stride: int  # bytes
    v_head_stride: int
    k_stride: int
    v_stride: int


FIELDS = SequenceRow(*range(len(SequenceRow._fields)))


@dataclass(frozen=True)
class AttentionKind:
    """What the kernels are compiled for."""

    keys: Header  # ``header_of_kind``
    values: Header
    rows: int  # query heads of a head of keys, times queries
    queries: int
    query_dtype: int
    cap: float = 0.0  # of scores; 0: none


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


def attention_layout(kind: AttentionKind) -> Layout:
    """Tables of points (of values too, if theirs are others), turns of a tile's tokens, coefficients, what each warp needs."""
    tables, copies = _tables(kind)
    k_copies, v_copies = copies[0], copies[-1]
    k_bytes = len(tables[0]) * 8 * k_copies
    v_at = k_bytes if len(tables) > 1 else 0
    turns_at = k_bytes + (len(tables[1]) * 8 * v_copies if len(tables) > 1 else 0)
    pairs = len(kind.keys.rope.frequencies) if kind.keys.rope else 0
    turns = _turns(kind.keys.rope.frequencies) if kind.keys.rope else np.zeros(0, np.uint8)
    threads, order, rows, halves = THREADS[kind.keys.order], kind.keys.order, kind.rows, -(-kind.rows // 8)
    lanes = 16 if rows <= 4 else 32
    blob = np.concatenate([*(table.reshape(-1).view(np.uint8) for table in tables), turns])
    blob_bytes = turns_at + turns.size
    coefficients_at = max(blob_bytes, 4 * order * (1 + 2 * threads // 32))  # queries are prepared where tables will be
    inputs_at = coefficients_at + rows * pairs * 8
    warps_at = inputs_at + order // 16 * halves * lanes * 8
    warp_bytes = 4 * (2 * TILE + (8 * halves + pairs // 8 * (halves * lanes * 2 + 8) if pairs else 0))
    results = 4 * max(
        threads * order * halves // 4,
        threads // 32 * rows * order,
        rows * (MOST_BLOCKS + 6 + order) + (4 * threads + threads // 32 * order),
    )
    size = max(warps_at + threads // 32 * warp_bytes, results)
    places = {
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


def _tables(kind: AttentionKind) -> tuple[list[np.ndarray], list[int]]:
    """Points as float16 [2^bits, 4] of keys, and of values if they have others; and how many copies of each there are."""
    bits = [quads.table_of(plan_for(h)).bits for h in (kind.keys, kind.values)]
    kept = sorted(set(bits), key=bits.index)
    tables = [quads.points_of(each).points.astype("<f2").view(np.uint16) for each in kept]
    for table in tables:
        table[:, :2] = table[:, :2].byteswap()  # so that one shift brings four signs to their places
    room = TABLE_BYTES // len(kept)
    return tables, [min(32, room // (8 << each)) for each in kept]


def _turns(frequencies: Sequence[int]) -> np.ndarray:
    """cos - 1 and sin of each pair, float16, at the tokens of a unit, as operands of mma: uint8 [bytes] of [tokens / 16, steps,
    lanes, 2 pairs, 2 tokens, 2]."""
    lane = np.arange(32)[:, None, None]
    token = np.arange(UNIT // 16)[:, None, None, None, None] * 16 + (lane >> 2) + np.array([0, 8])
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
        "FIELDS": len(FIELDS),
        **{name.upper(): place for name, place in FIELDS._asdict().items()},
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
    """The kernel for a kind, compiled once a process."""
    import torch

    _, architecture, _, _ = _device(device)
    found = attention_layout(kind)
    code = compiled("attention.cu", attention_definitions(kind, found), architecture)
    with torch.cuda.device(device):
        module = returned(driver.cuModuleLoadData(code))
        function = returned(driver.cuModuleGetFunction(module, b"attend"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        returned(driver.cuFuncSetAttribute(function, attribute, found.shared_bytes))
    h = kind.keys
    frequencies = np.array(h.rope.frequencies if h.rope else [0], np.uint32).view(np.int32)
    signs = [rotation.signs(h.seed, h.order, first_round) for first_round in (True, False)]
    arrays = [found.blob, frequencies, np.stack([*signs, rotation.permutation(h.order)]).astype(np.int32)]
    return AttentionKernel(function, found, *(torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in arrays))


class CudaAttention:
    """Attention of the queries of some sequences to their encoded keys and values, prepared once.

    ``query_shape``: [sequences, q_heads, queries, head_dim]; ``keys``, ``values``: each sequence's stream, of tensors of
    [kv_heads, tokens, head_dim] in all, of one kind. ``recent``: exact keys and values behind them, [sequences, kv_heads, n,
    head_dim]. ``scale`` of scores; ``cap``: their bound, 0 for none; ``least``: the first token of each stream that counts.
    """

    def __init__(
        self,
        query_shape: tuple[int, ...],
        query_dtype: int,
        keys: Sequence[Placed],
        values: Sequence[Placed],
        recent: tuple[Any, Any] | None,
        scale: float,
        cap: float,
        least: Sequence[int],
    ) -> None:
        import torch

        sequences, query_heads, queries, _ = query_shape
        k, v, device = keys[0].header, values[0].header, keys[0].keeps.device
        rows = query_heads // k.leading * queries
        self._kind = AttentionKind(header_of_kind(k), header_of_kind(v), rows, queries, query_dtype, cap)
        self._kernel = kernel(self._kind, str(device))
        self._device, self._heads, self._scale = device, k.leading, np.float32(scale * LOG2_E)
        self._kept = [*(placed.keeps for placed in (*keys, *values)), *(recent or ())]
        pairs = zip(keys, values, strict=True)
        self._rows = torch.tensor([_row(pair, recent, n, least[n]) for n, pair in enumerate(pairs)], dtype=torch.int64).to(
            device
        )
        self._whole = whole = sequences * k.leading
        self._splits = _splits(whole, max(p.header.chunks for p in keys), k.chunk_tokens, _device(str(device))[2], k.order)
        results = whole * (self._splits + 1) * rows
        self._sums = torch.empty(results * k.order, dtype=torch.float32, device=device)
        self._about = torch.empty(results * 2, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(whole, dtype=torch.int32, device=device)

    def run(self, query: Any, out: Any) -> Any:
        """Fills ``out`` and returns it. Both are contiguous; on the current stream."""
        import torch

        found = self._kernel
        values = [
            *(self._rows, np.int32(self._heads), found.blob, found.frequencies, found.rotation, query, self._scale),
            *(self._sums, self._about, self._arrived, out),
        ]
        stream = torch.cuda.current_stream(self._device).cuda_stream
        grid = (self._splits + 1, self._whole)
        with torch.cuda.device(self._device):
            _launch(found.function, grid, found.layout.threads, found.layout.shared_bytes, stream, values)
        return out


def _launch(function: Any, grid: tuple[int, int], threads: int, shared: int, stream: int, arguments: Sequence[Any]) -> None:
    values = [np.array(x.data_ptr() if hasattr(x, "data_ptr") else x, None if np.isscalar(x) else np.uint64) for x in arguments]
    pointers = np.array([value.ctypes.data for value in values], np.uint64)
    returned(driver.cuLaunchKernel(function, *grid, 1, threads, 1, 1, shared, stream, pointers.ctypes.data, 0))


def _splits(heads: int, chunks: int, chunk_tokens: int, multiprocessors: int, order: int) -> int:
    """Thread blocks among which a head's chunks are divided, so that all multiprocessors are busy to the end."""
    tiles = chunks * -(-chunk_tokens // TILE)
    most = max(1, min(tiles // (SEQUENCE_TILES * THREADS[order] // 32), chunks, MOST_BLOCKS - 1))
    at_once = multiprocessors * RESIDENT[order]
    wanted = at_once // heads if heads <= at_once else -(-4 * at_once // heads)
    return max(1, min(most, wanted - 1 if wanted > 8 else wanted))  # a block of few tiles may wait for that of exact tokens


def _row(pair: tuple[Placed, Placed], recent: tuple[Any, Any] | None, n: int, least: int) -> SequenceRow:
    """Sequence ``n`` as the kernel reads it."""
    h = pair[0].header
    (k, k_means, k_exact), (v, v_means, v_exact) = (
        (placed.stream, placed.header.header_bytes, placed.header.places[sections.EXACT_TOKENS].start) for placed in pair
    )
    strides = [[x.stride(dim) * x.element_size() for x in recent] if recent else [0, 0] for dim in (1, 2)]
    return SequenceRow(
        k_payload=k + h.payload_start,
        v_payload=v + pair[1].header.payload_start,
        coded=h.coded_tokens,
        least=max(least - h.first_tokens, 0),
        position=((h.rope.first_position if h.rope else 0) + h.first_tokens) % (1 << c.PHASE_BITS),
        k_exponent=k + c.OFFSET_EXPONENT_AT,
        k_means=k + k_means,
        v_exponent=v + c.OFFSET_EXPONENT_AT,
        v_means=v + v_means,
        exact=0 if least else h.first_tokens,
        k_exact=k + k_exact,
        v_exact=v + v_exact,
        recent=recent[0].shape[-2] if recent else 0,
        k_recent=recent[0][n].data_ptr() if recent else 0,
        v_recent=recent[1][n].data_ptr() if recent else 0,
        k_head_stride=strides[0][0],
        v_head_stride=strides[0][1],
        k_stride=strides[1][0],
        v_stride=strides[1][1],
    )
