"""Law: attention to codes by Triton, prepared once: shares of tokens, tables, memory for partial results, and the launches.

Everything is allocated when it is prepared, so that ``run`` can be captured in a CUDA graph. How tokens are divided depends on
the device and on the lengths alone: results are the same from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.kernels.device_tables import Tables, tables_on
from pqcodec.kernels.on_triton import attention
from pqcodec.kernels.on_triton.affine import AffineShape, affine_shape
from pqcodec.kernels.on_triton.backend import Triton
from pqcodec.kernels.on_triton.numbers import Constants, interpreted
from pqcodec.kernels.on_triton.shares import (
    CodedShare,
    ExactRowsShare,
    ExactShare,
    SideShape,
    SideShare,
    SideTables,
)
from pqcodec.placed import Placed
from pqcodec.stream.header import Header, dtype_code
from pqcodec.stream.index import Bounds

MOST_HEAD_DIM = 256  # a tile of longer vectors does not fit in registers
SHARE_TOKENS = 256  # of a program, at the least
RESIDENT = 2  # programs of a multiprocessor
WARPS = 8
SCORE_NUMBERS, SCORE_WARPS = 4096, 1  # of a tile of scores of codes that share fields in groups of whole tiles
SCORE_PROGRAMS, SCORE_REGISTERS = 32, 128  # ... of a multiprocessor; of a lane, so that sixteen programs work side by side
LEAST_TILE = 16
MERGE_ROWS = 8  # of a program that merges
# Tokens of a tile, and rows of queries of a program at the most, by columns
TILES = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}
MOST_ROWS = {16: 32, 32: 32, 64: 32, 128: 32, 256: 32}


class CodedSegment(NamedTuple):
    """Some tokens of streams of keys and of values, which are coded in both."""

    sequence: int
    keys: Placed
    values: Placed | None  # None where only scores are asked for
    tokens: Bounds  # of the streams
    position: int  # of the streams' first token in the sequence
    skipped: Any = None  # tensor uint8 [leading, tokens of the streams]: 1 where a token is exact; None: nowhere


class ExactSegment(NamedTuple):
    """Exact keys and values of a sequence, tensors [leading, n, head_dim] of any strides, read at every run."""

    sequence: int
    keys: Any
    values: Any  # None where only scores are asked for
    position: int = 0  # of the first token in the sequence
    places: Any = None  # tensor int64 [leading, n]: where each token stands in the sequence, -1: nowhere; None: in a row


def why_not(headers: Sequence[Header]) -> str | None:
    """Why the kernels cannot attend to streams of such headers; None where they can."""
    for h in headers:
        if not Triton().covers(h):
            return "no GPU codes such streams"
        if h.affine and h.affine.outliers:
            return "numbers are kept apart"
        if h.head_dim > MOST_HEAD_DIM:
            return f"head_dim {h.head_dim} is more than {MOST_HEAD_DIM}"
    return None


@dataclass(frozen=True)
class CodedGroup:
    """Shares of one kind, and what their kernels need."""

    members: Sequence[CodedSegment]
    shares: Any  # int64 [shares, CODED_FIELDS], on the device
    count: int
    sides: tuple[Constants, ...]  # SideShape of keys, and of values
    tables: Any  # int64 [2, SideTables]
    keeps: list[Any]
    skips: bool


@dataclass(frozen=True)
class _Exact:
    """Shares of exact tokens of the same dtypes."""

    shares: Any
    count: int
    dtypes: tuple[int | None, ...]


class TritonAttention:
    """Attention of the queries of some sequences [sequences, q_heads, queries, head_dim] to their coded and exact tokens.

    ``totals``: tokens of each sequence; ``leading``: heads of keys; ``head_dims``: of keys, and of values where these are
    asked for. ``cap``: of scores, 0 for none; ``window``: 0 for none. All parts must stay where they are.
    """

    def __init__(
        self,
        query_shape: tuple[int, ...],
        totals: Sequence[int],
        leading: int,
        head_dims: tuple[int, ...],
        coded: Sequence[CodedSegment],
        exact: Sequence[ExactSegment],
        device: Any,
        scale: float,
        cap: float = 0.0,
        window: int = 0,
        causal: bool = True,
    ) -> None:
        import torch

        _, heads, self._queries, _ = query_shape
        self._sequences, self._leads, self._rows = len(totals), leading, heads // leading * self._queries
        self._scale, self._cap, self._window, self._causal = scale, cap, window, causal
        self._dims, self._device, self._totals = head_dims, torch.device(device), totals
        self._native = not interpreted() and torch.version.hip is None and self._device.type != "xpu"
        self._columns = tuple(1 << max(dim - 1, 15).bit_length() for dim in head_dims)
        widest = 1 << (max(head_dims) - 1).bit_length() if max(head_dims) > 16 else 16
        self._tile = TILES[widest]
        self._block_rows = min(MOST_ROWS[widest], max(16, 1 << (self._rows - 1).bit_length()))
        self._grid = (leading, -(-self._rows // self._block_rows))
        coded = [part._replace(tokens=self._seen(part.sequence, part.position, part.tokens)) for part in coded]
        self._kept = [coded, exact]
        share = self._share_tokens(coded)
        self._slots: list[int] = []  # the sequence of each share
        self._coded = list(self._coded_groups(coded, share))
        self._exact = list(self._exact_groups(exact, share))
        if len(head_dims) > 1:
            self._place_partials()

    def _seen(self, sequence: int, position: int, tokens: Bounds) -> Bounds:
        """Those of some tokens in a row that the window of a query reaches; ``position``: of token 0 in the sequence."""
        least = self._totals[sequence] - self._queries - self._window + 1 - position if self._window else 0
        return min(max(tokens[0], least), tokens[1]), tokens[1]

    # -- shares ----------------------------------------------------------------------------------------------------
    def _share_tokens(self, coded: Sequence[CodedSegment]) -> int:
        """Coded tokens that a program takes, so that all multiprocessors are busy: of scores, groups that share fields."""
        only_scores = all(part.values is None and part.keys.header.affine for part in coded)
        groups = {affine_shape(part.keys.header).group_tokens for part in coded} if only_scores else {1}
        programs = (SCORE_PROGRAMS if only_scores else RESIDENT) * _multiprocessors(self._device)
        work = sum(part.tokens[1] - part.tokens[0] for part in coded) * self._grid[0] * self._grid[1]
        wanted = max(SHARE_TOKENS, -(-work // programs))
        unit = math.lcm(self._tile, *groups)
        return -(-wanted // unit) * unit

    def _slot(self, sequence: int) -> int:
        self._slots.append(sequence)
        return len(self._slots) - 1

    def _coded_groups(self, parts: Sequence[CodedSegment], share: int) -> Iterator[CodedGroup]:
        """Shares by kind."""
        import torch

        kinds: dict[Any, list[CodedSegment]] = {}
        for part in parts:
            kinds.setdefault(tuple(placed.header.kind for placed in part[1:3] if placed), []).append(part)
        for members in kinds.values():
            headers = [placed.header for placed in members[0][1:3] if placed]
            tables = [_tables(h, self._device) for h in headers]
            levels = [torch.tensor([*h.levels, 0], dtype=torch.float32, device=self._device) for h in headers]
            rows = [
                _flat(
                    CodedShare(
                        part.sequence,
                        self._totals[part.sequence],
                        *tokens,
                        part.position,
                        self._slot(part.sequence),
                        0 if part.skipped is None else part.skipped.data_ptr(),
                        part.keys.header.tokens,
                        _side_share(part.keys),
                        _side_share(part.values) if part.values else SideShare(),
                    )
                )
                for part in members
                for tokens in _cut(part.tokens, share)
            ]
            if not rows:
                continue
            yield CodedGroup(
                members,
                self._put(rows),
                len(rows),
                tuple(Constants(_side_shape(h, t, self._native)) for h, t in zip(headers, tables, strict=True)),
                self._put([_side_tables(*each) for each in zip(headers, tables, levels, strict=True)]),
                [*tables, *levels],
                any(part.skipped is not None for part in members),
            )

    def _exact_groups(self, parts: Sequence[ExactSegment], share: int) -> Iterator[_Exact]:
        """Shares by dtypes."""
        kinds: dict[tuple[int | None, ...], list[ExactSegment]] = {}
        for part in parts:
            kinds.setdefault(tuple(dtype_code(x.dtype) for x in part[1:3] if x is not None), []).append(part)
        for dtypes, members in kinds.items():
            rows = [
                _flat(
                    ExactShare(
                        part.sequence,
                        self._totals[part.sequence],
                        *tokens,
                        part.position,
                        self._slot(part.sequence),
                        0 if part.places is None else part.places.data_ptr(),
                        part.keys.shape[1],
                        _rows_share(part.keys),
                        ExactRowsShare() if part.values is None else _rows_share(part.values),
                    )
                )
                for part in members
                for tokens in _cut(self._wanted(part), share)
            ]
            if rows:
                yield _Exact(self._put(rows), len(rows), dtypes)

    def _wanted(self, part: ExactSegment) -> Bounds:
        """The exact tokens of a part that a query may see."""
        tokens = (0, part.keys.shape[1])
        return self._seen(part.sequence, part.position, tokens) if part.places is None else tokens

    def _place_partials(self) -> None:
        """Number the slots sequence by sequence, and allocate the partial results."""
        import torch

        order = np.argsort(self._slots, kind="stable")
        numbers = np.empty(len(order), np.int64)
        numbers[order] = np.arange(len(order))
        at = CodedShare._fields.index("slot")
        assert ExactShare._fields.index("slot") == at
        for shares in [group.shares for group in self._coded] + [group.shares for group in self._exact]:
            shares[:, at] = self._put(numbers)[shares[:, at]]
        counts = np.bincount(np.array(self._slots, np.int64), minlength=self._sequences)
        self._firsts = self._put(np.concatenate([[0], np.cumsum(counts)]))
        results = len(self._slots) * self._leads * self._rows
        self._sums = torch.empty(results * self._dims[1], dtype=torch.float32, device=self._device)
        self._about = torch.empty(results * 2, dtype=torch.float32, device=self._device)

    def _put(self, rows: Any) -> Any:
        import torch

        return torch.from_numpy(np.array(rows, np.int64)).to(self._device)

    # -- launches --------------------------------------------------------------------------------------------------
    def run(self, query: Any, out: Any) -> Any:
        """Fills ``out``, of the queries' shape but for the values' head_dim, and returns it; both are contiguous."""
        sizes = (self._leads, self._rows)
        asked = (*sizes, self._queries, self._scale, self._cap, self._window)
        shape = self._shape()
        for coded in self._coded:
            keys, values = coded.sides
            attention.attend_to_codes[(coded.count, *self._grid)](
                coded.shares,
                coded.tables[0],
                coded.tables[1],
                query,
                self._sums,
                self._about,
                *asked,
                KEYS=keys,
                VALUES=values,
                CAUSAL=self._causal,
                SKIPS=coded.skips,
                **shape,
            )
        for exact in self._exact:
            attention.attend_to_exact[(exact.count, *self._grid)](
                exact.shares,
                query,
                self._sums,
                self._about,
                *asked,
                KEY_DIM=self._dims[0],
                VALUE_DIM=self._dims[1],
                KEY_COLUMNS=self._columns[0],
                VALUE_COLUMNS=self._columns[1],
                KEY_TYPE=exact.dtypes[0],
                VALUE_TYPE=exact.dtypes[1],
                CAUSAL=self._causal,
                **shape,
            )
        attention.merge_shares[(self._sequences, self._leads, -(-self._rows // MERGE_ROWS))](
            self._firsts,
            self._sums,
            self._about,
            out,
            *sizes,
            HEAD_DIM=self._dims[1],
            COLUMNS=self._columns[1],
            OF_BFLOAT16=dtype_code(out.dtype) == c.DTYPE_BFLOAT16,
            ROWS=MERGE_ROWS,
            num_warps=WARPS,
        )
        return out

    def score(self, query: Any, out: Any) -> Any:
        """Fills ``out`` float32 [sequences, q_heads, queries, total] with the scores of all tokens, and returns it.

        The sequences are of one length.
        """
        asked = (self._leads, self._rows, self._scale, self._cap)
        for coded in self._coded:
            self._score_codes(coded, query, out)
        for exact in self._exact:
            attention.score_exact[(exact.count, *self._grid)](
                exact.shares,
                query,
                out,
                *asked,
                HEAD_DIM=self._dims[0],
                COLUMNS=self._columns[0],
                DTYPE=exact.dtypes[0],
                **self._shape(),
            )
        return out

    def _score_codes(self, coded: CodedGroup, query: Any, out: Any) -> None:
        """Scores of the tokens of a group of shares."""
        kernel, own = self._score_kernel(coded.sides[0])
        asked = (self._leads, self._rows, self._scale, self._cap)
        kernel[(coded.count, *self._grid)](
            coded.shares, coded.tables[0], query, out, *asked, KEYS=coded.sides[0], SKIPS=coded.skips, **self._shape() | own
        )

    def _score_kernel(self, side: Constants) -> tuple[Any, dict[str, Any]]:
        """The kernel of scores, and what its shape has else: keys that share fields in groups of whole tiles have their own."""
        tile = math.gcd(side.record.group_tokens, SCORE_NUMBERS // side.record.columns)
        if not side.record.bits or tile < LEAST_TILE:
            return attention.score_codes, {}
        rows = 8 if self._rows <= 8 else self._block_rows
        registers = {"maxnreg": SCORE_REGISTERS} if self._native else {}
        return attention.score_groups, {"ROWS": rows, "TILE": tile, "num_warps": SCORE_WARPS, **registers}

    def _shape(self) -> dict[str, Any]:
        return {"CAPPED": self._cap > 0, "ROWS": self._block_rows, "TILE": self._tile, "num_warps": WARPS, "num_stages": 1}


def _multiprocessors(device: Any) -> int:
    """Of a device; one of the CPU, where the kernels are interpreted."""
    import torch

    if device.type == "cpu":
        return 1
    properties = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


def _cut(tokens: Bounds, share: int) -> Iterator[Bounds]:
    """Tokens in runs of a share."""
    first, last = tokens
    return ((at, min(at + share, last)) for at in range(first, last, share))


def _flat(row: Any) -> list[int]:
    """A row of numbers, and of rows of numbers."""
    return [number for field in row for number in (field if isinstance(field, tuple) else (field,))]


def _rows_share(x: Any) -> ExactRowsShare:
    return ExactRowsShare(x.data_ptr(), x.stride(0) * x.element_size(), x.stride(1), x.stride(2))


def _side_share(placed: Placed) -> SideShare:
    h = placed.header
    turn = h.rope.first_position % (1 << c.PHASE_BITS) if h.rope else 0
    sizes = h.blocks.chunk_bytes, h.blocks.size(h.chunks - 1)
    starts = placed.stream, placed.stream + h.payload_start
    return SideShare(*starts, h.coded_tokens, h.first_tokens, h.header_bytes, turn, *sizes)


def _tables(h: Header, device: Any) -> Tables:
    rope = replace(h.rope, first_position=0) if h.rope else None
    return tables_on(str(device), h.coding, h.head_dim, h.row_bits, h.radius_bits, h.seed, h.rounds, h.affine, rope)


def _side_tables(h: Header, tables: Tables, levels: Any) -> SideTables:
    addresses = [getattr(tables, name).data_ptr() for name in SideTables._fields[:-2]]
    return SideTables._make([*addresses, levels.data_ptr(), h.radius_exponent])


def _side_shape(h: Header, tables: Tables, native: bool) -> SideShape:
    affine = affine_shape(h)
    pairs = len(h.rope.frequencies) if h.rope else 0
    return SideShape(
        coding=h.coding,
        head_dim=h.head_dim,
        order=tables.order,
        columns=tables.columns,
        row_bytes=tables.row_bytes,
        chunk=h.chunk_tokens,
        root_budget=tables.root_budget,
        radius_bits=tables.radius_bits,
        radius_steps=tables.radius_steps,
        levels=tables.levels,
        kind_16=tables.kind_16,
        quad_bits=tables.quad_bits,
        offsets=h.offsets,
        pairs=pairs,
        pair_columns=max(8, 1 << max(pairs - 1, 0).bit_length()),
        interleaved=h.rope is not None and h.rope.pairing == c.ROPE_INTERLEAVED,
        fine=h.affine is not None and h.dtype == c.DTYPE_FLOAT32,
        native=native,
        interleaved_units=h.affine is not None and h.affine.pairing == c.ROPE_INTERLEAVED,
        **{name: getattr(affine, name) for name in SideShape._fields if name in AffineShape._fields and name != "row_bytes"},
    )
