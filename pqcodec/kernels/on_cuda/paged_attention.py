"""Law: ``attention.cu`` over pages of a pool and blocks of an engine's cache: what its launches share, and what may change.

Grid, kernel and memory are those of the room that was asked for. Which pages a sequence has is told by tables that ``place``
fills anew, in the same memory; where its last tokens lie, and how many there are, by the engine's own, which are read when the
kernel runs. So a captured CUDA graph sees all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pqcodec.kernels.on_cuda.attention import (
    FIELDS,
    MOST_BLOCKS,
    PAGED_FIELDS,
    RESIDENT,
    AttentionKind,
    CodedPair,
    CudaAttention,
    ExactFirst,
    PagedShare,
    Share,
    _share,
    _splits,
    divided,
)
from pqcodec.kernels.on_cuda.backend import _device, header_of_kind
from pqcodec.placed import Placed
from pqcodec.stream.pages import PagedStream

MOST_SEGMENTS = MOST_BLOCKS - 1  # of a sequence that have pages
Segments = Sequence[tuple[PagedStream, PagedStream]]  # keys and values of a sequence, in order


class RawBlocks(NamedTuple):
    """Where a serving engine keeps tokens that are not encoded, as addresses and strides in bytes."""

    keys: int  # address of block 0
    values: int
    blocks: int
    block: int  # tokens of one
    k_strides: tuple[int, int, int]  # from block to block, token to token, head to head
    v_strides: tuple[int, int, int]
    tables: int  # address of the first sequence's block numbers, int32
    columns: int  # numbers of a sequence
    table_stride: int  # from sequence to sequence

    @classmethod
    def of(cls, keys: Any, values: Any, tables: Any) -> RawBlocks:
        """Of keys and values, views [blocks, block, heads, head_dim], and block tables int32 [sequences, columns]."""
        return cls(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            blocks=keys.shape[0],
            block=keys.shape[1],
            k_strides=_strides(keys),
            v_strides=_strides(values),
            tables=tables.data_ptr(),
            columns=tables.shape[1],
            table_stride=tables.stride(0) * tables.element_size(),
        )


def _strides(x: Any) -> tuple[int, int, int]:
    """Bytes from block to block, token to token and head to head of a view [blocks, block, heads, head_dim]."""
    block, token, head = (x.stride(dim) * x.element_size() for dim in range(3))
    return block, token, head


def paged_shares(
    sequences: Mapping[int, Segments], pools: tuple[int, int], tables: int, room: int, raw: RawBlocks | None, splits: int
) -> tuple[np.ndarray, np.ndarray]:
    """What thread blocks take of some sequences, by their numbers: int64 [n, splits + 1, fields]; and pages, int32 [n, room].

    ``pools``: addresses of the first pages of keys and of values. ``tables``: address of the pages of sequence 0, where those
    of all are, int32 [sequences, room]. Of each sequence at least one segment is there, which may have no pages.
    """
    rows = np.zeros((len(sequences), splits + 1, len(FIELDS) + len(PAGED_FIELDS)), np.int64)
    pages = np.zeros((len(sequences), room), np.int32)
    for i, (n, segments) in enumerate(sequences.items()):
        pairs = [CodedPair(_placed(keys), _placed(values)) for keys, values in segments]
        counts = [keys.header.chunks for keys, _ in segments]
        at = np.cumsum([0, *counts])
        pages[i, : at[-1]] = np.concatenate([keys.pages for keys, _ in segments])
        own = [_share(pair)._replace(k_payload=pools[0], v_payload=pools[1]) for pair in pairs]
        for split, (number, begin, end) in enumerate(divided(counts, splits)):
            share = own[number]._replace(first_chunk=begin, last_chunk=end)
            rows[i, split] = (*share, *PagedShare(pages=tables + 4 * (n * room + int(at[number]))))
        coded = sum(keys.header.tokens for keys, _ in segments)
        rows[i, -1] = _exact_share(own[0], ExactFirst.of(pairs[0]), coded, raw, n)
    return rows, pages


def _exact_share(share: Share, first: ExactFirst, coded: int, raw: RawBlocks | None, n: int) -> tuple[int, ...]:
    """The share of the exact tokens of sequence ``n``, of which so many are coded."""
    share = share._replace(exact=first.tokens, k_exact=first.keys, v_exact=first.values, exact_head_stride=first.head_stride)
    if raw is None:  # no column of a table: tokens behind the coded ones would give NaN
        return (*share, *PagedShare(raw_first=coded, raw_table=share.k_means))
    share = share._replace(
        k_recent=raw.keys,
        v_recent=raw.values,
        k_head_stride=raw.k_strides[2],
        v_head_stride=raw.v_strides[2],
        k_stride=raw.k_strides[1],
        v_stride=raw.v_strides[1],
    )
    paged = PagedShare(
        raw_first=coded,
        raw_table=raw.tables + n * raw.table_stride,
        raw_columns=raw.columns,
        raw_blocks=raw.blocks,
        raw_block=raw.block,
        k_raw_block=raw.k_strides[0],
        v_raw_block=raw.v_strides[0],
    )
    return (*share, *paged)


def _placed(stream: PagedStream) -> Placed:
    """A stream's front as the kernel finds it; its payload is elsewhere."""
    return Placed(stream.header, stream.front.data_ptr(), (), None, stream.front)


class CudaPagedAttention(CudaAttention):
    """Attention of the queries of some sequences to their pages and raw tokens, prepared once.

    ``query_shape``: [sequences, q_heads, queries, head_dim]; ``pools`` of keys and values, uint8 [pages, page_bytes], whose
    streams are of the kind of ``sequences``; ``raw``: keys and values, views [blocks, block, heads, head_dim], and block
    tables int32 [sequences, columns]. ``room``: pages, and segments with pages, of a sequence at most. ``scale`` of scores;
    ``cap``: their bound, 0 for none.
    """

    def __init__(
        self,
        query_shape: tuple[int, ...],
        query_dtype: int,
        sequences: Sequence[Segments],
        pools: tuple[Any, Any],
        raw: tuple[Any, Any, Any] | None,
        room: tuple[int, int],
        scale: float,
        cap: float,
    ) -> None:
        import torch

        count, query_heads, queries, _ = query_shape
        k, v = (stream.header for stream in sequences[0][0])
        device, rows = pools[0].device, query_heads // k.leading * queries
        self._pools, self._raw, self._pages_room = pools, raw, max(room[0], 1)
        at_once = _device(str(device))[2] * RESIDENT[k.order]
        wanted = _splits(count * k.leading, [[room[0]]], k.chunk_tokens, at_once, k.order)
        self._splits = max(wanted, room[1])
        fields = len(FIELDS) + len(PAGED_FIELDS)
        self._shares = torch.zeros((count, self._splits + 1, fields), dtype=torch.int64, device=device)
        self._pages = torch.zeros((count, self._pages_room), dtype=torch.int32, device=device)
        kind = AttentionKind(header_of_kind(k), header_of_kind(v), rows, queries, query_dtype, cap, paged=True)
        self._prepare(kind, device, k.leading, count * k.leading, self._splits, scale)
        self._fronts: dict[int, list[Any]] = {}
        self.place(dict(enumerate(sequences)))

    def place(self, sequences: Mapping[int, Segments]) -> None:
        """Let launches from now on, and graphs that are captured, read other pages of some sequences; on the current stream."""
        import torch

        raw = RawBlocks.of(*self._raw) if self._raw else None
        pools = self._pools[0].data_ptr(), self._pools[1].data_ptr()
        found = paged_shares(sequences, pools, self._pages.data_ptr(), self._pages_room, raw, self._splits)
        index = torch.tensor(list(sequences), dtype=torch.int64, device=self._device)
        for kept, new in zip((self._shares, self._pages), found, strict=True):
            kept[index] = torch.from_numpy(new).to(self._device)
        self._fronts |= {n: [stream.front for pair in segments for stream in pair] for n, segments in sequences.items()}
