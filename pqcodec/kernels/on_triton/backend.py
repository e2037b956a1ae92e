"""Law: the Triton backend launches the kernels of ``blocks`` and ``sides`` for a group of spans; it allocates nothing itself.

Every launch is on the caller's current stream and may be captured in a CUDA graph. Without a GPU the same kernels run in
Triton's interpreter (TRITON_INTERPRET=1), on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pqcodec import constants as c
from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.job import MEAN_TOKENS
from pqcodec.kernels.on_triton import affine_blocks, blocks, sides
from pqcodec.kernels.on_triton.affine import affine_shape
from pqcodec.kernels.on_triton.numbers import Constants, interpreted
from pqcodec.kernels.spans import MEAN_PARTS, Group
from pqcodec.stream.header import Header

WARPS = 4
SUM_TILE = 1024
# Rows of a tile, by columns: as many as registers hold. tests/test_shapes.py lists the shapes that spill, and their bytes.
ENCODE_ROWS = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16, 512: 16, 1024: 16}
PAPER_ENCODE_ROWS = ENCODE_ROWS | {64: 32}
DECODE_ROWS = {16: 64, 32: 64, 64: 64, 128: 64, 256: 32, 512: 16, 1024: 16}
ROPE_DECODE_ROWS = DECODE_ROWS | {128: 32, 256: 16}
MEAN_ROWS = {16: 64, 32: 32, 64: 16, 128: 8, 256: 4, 512: 2, 1024: 1}
MEAN_TILE = 4096  # numbers of sums that are added up at once
PAIR_NUMBERS = 2048  # of a tile in which pair polar is encoded
_CODINGS = (c.CODING_SPLIT, c.CODING_PAPER, c.CODING_QUADS, c.CODING_PAIRS, c.CODING_SCALAR)
_UNITS = 2  # bytes of a unit in which ``sides`` copies


class Triton:
    """Any GPU that Triton compiles for."""

    name = "triton"

    def covers(self, header: Header) -> bool:
        """Whether this backend codes streams of such a header."""
        channels = header.affine.channels if header.affine else 1
        there = header.last_tokens or header.keep or header.inner or header.shared_ranges
        return header.coding in _CODINGS and not there and not channels & (channels - 1)

    def check_device(self, device: Any) -> None:
        """Raises BackendUnavailable where this backend cannot reach tensors of a device."""
        if device.type == "cpu" and not interpreted():
            raise BackendUnavailable(
                f"backend {self.name!r} codes tensors of a GPU, this one is on 'cpu': move it (bytes: pass device=), "
                "choose backend 'cpu', or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
            )

    def prepare(self, verb: str, group: Group) -> None:
        """Allocate the flags and sums that ``verb`` ("encode" or "decode") writes: the verb itself allocates nothing."""
        if verb == "decode":
            _ = group.block_flags, group.side_flags
        else:
            _ = group.block_flags, group.largest
            if group.header.offsets:
                group.sums(group.tables.columns)

    def encode(self, group: Group) -> None:
        """Encode every block of a group; ``group.block_flags`` counts each block's vectors with NaN or Inf."""
        if not group.blocks:
            return
        h, tables = group.header, group.tables
        blocks.clear_blocks[(group.blocks,)](
            group.rows,
            group.block_firsts,
            h.chunk_tokens,
            TILE=4 * SUM_TILE,
            SEARCH=group.search,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        if h.affine:
            affine_blocks.encode_affine_blocks[(group.blocks,)](
                *self._affine_arguments(group),
                **self._affine_constants(group),
                SHORTEST=group.effort == "best",
                ROWS=ENCODE_ROWS[tables.columns],
                GROUP_ROWS=self._group_rows(h),
                WIDTH=min(max(PAIR_NUMBERS // self._group_rows(h), 4), tables.columns // 2),
            )
            return
        blocks.encode_stream_blocks[(group.blocks,)](
            group.rows,
            group.block_firsts,
            group.starts,
            group.block_flags,
            group.keys,
            tables.path,
            tables.node_shift,
            tables.look_up,
            tables.bounds,
            tables.grid_shift,
            tables.quad_ints,
            tables.quad_look_up,
            tables.records,
            tables.paper,
            tables.representatives,
            tables.numbers,
            tables.aim,
            *self._offset_tables(group),
            h.radius_exponent,
            **self._shape(group),
            COUNT=len(tables.representatives),
            SEARCHED=max(c.QUADS_EFFORTS[group.effort]),
            ROWS=(PAPER_ENCODE_ROWS if h.coding == c.CODING_PAPER else ENCODE_ROWS)[tables.columns],
            ENERGY_SCALE=tables.energy_scale,
            FIXES=tables.fixes,
            TERMS=1 if h.dtype == c.DTYPE_BFLOAT16 and not h.offsets else 3,
            OPERAND=blocks.tl.float32 if interpreted() else blocks.tl.bfloat16,  # the interpreter multiplies no bfloat16
        )

    def decode(self, group: Group) -> None:
        """Check every block of a group (into ``group.block_flags``), and fill the rows that its spans want."""
        if not group.blocks:
            return
        h, tables = group.header, group.tables
        if h.affine:
            affine_blocks.decode_affine_blocks[(group.blocks,)](
                *self._affine_arguments(group),
                c.LARGEST_FINITE[h.dtype],
                **self._affine_constants(group),
                ROWS=ROPE_DECODE_ROWS[tables.columns],
            )
            return
        blocks.decode_stream_blocks[(group.blocks,)](
            group.rows,
            group.block_firsts,
            group.starts,
            group.block_flags,
            group.keys,
            tables.path,
            tables.node_cos,
            tables.node_sin,
            tables.node_shift,
            tables.quad_ints,
            tables.quad_floats,
            tables.records,
            tables.record_floats,
            tables.circle,
            tables.mantissas,
            tables.paper,
            tables.points,
            *self._offset_tables(group),
            h.radius_exponent,
            c.LARGEST_FINITE[h.dtype],
            **self._shape(group),
            ROWS=(ROPE_DECODE_ROWS if h.rope else DECODE_ROWS)[tables.columns],
        )

    def write_sides(self, group: Group, sum_tokens: Callable[[Group], int] | None = None) -> None:
        """Write the means and the exact tokens of every lead of a group into its streams.

        ``sum_tokens``: what does, if not this backend, as its own does.
        """
        h, tables = group.header, group.tables
        if not group.leads:
            return
        search = {"SEARCH": group.search, "num_warps": WARPS, "enable_fp_fusion": False}
        exact = any(span.header.first_tokens for span in group.spans)
        if h.offsets:
            parts, sums = (sum_tokens or self.sum_tokens)(group), group.sums(tables.columns)
            means = {"COLUMNS": tables.columns, "PARTS": parts, **search}
            sides.find_means[(group.leads,)](
                group.rows,
                group.lead_firsts,
                group.starts,
                sums,
                group.largest,
                group.keys,
                EXACT=exact,
                MEAN_TOKENS=MEAN_TOKENS,
                AT_ONCE=max(min(parts, MEAN_TILE // tables.columns), 1),
                TILE=SUM_TILE,
                **self._units(h),
                **means,
            )
            least, most = c.OFFSET_EXPONENTS
            sides.write_offsets[(group.leads,)](
                group.rows,
                group.lead_firsts,
                sums,
                group.largest,
                group.keys,
                HEAD_DIM=h.head_dim,
                LEAST=least,
                MOST=most,
                TILE=SUM_TILE,
                **means,
            )
        elif exact:
            sides.write_exact[(group.leads,)](
                group.rows, group.lead_firsts, group.starts, group.keys, TILE=SUM_TILE, **self._units(h), **search
            )

    def sum_tokens(self, group: Group) -> int:
        """Sum up the tokens of every lead's means into ``Group.sums``; returns into how many parts they are divided."""
        h, tables = group.header, group.tables
        sides.sum_tokens[(group.leads, MEAN_PARTS)](
            group.rows,
            group.lead_firsts,
            group.starts,
            group.sums(tables.columns),
            tables.ones,
            tables.twos,
            tables.pair_frequencies,
            tables.phases,
            DTYPE=h.dtype,
            HEAD_DIM=h.head_dim,
            COLUMNS=tables.columns,
            ROPE=h.rope is not None,
            MEAN_TOKENS=MEAN_TOKENS,
            PARTS=MEAN_PARTS,
            ROWS=MEAN_ROWS[tables.columns],
            IN_HALVES=tables.in_halves,
            SEARCH=group.search,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        return MEAN_PARTS

    def read_sides(self, group: Group) -> None:
        """Check offsets and exact tokens of every lead (into ``group.side_flags``), and fill the exact rows that are wanted."""
        h = group.header
        if group.leads and (h.offsets or any(span.header.first_tokens for span in group.spans)):
            sides.read_sides[(group.leads,)](
                group.rows,
                group.lead_firsts,
                group.starts,
                group.side_flags,
                group.keys,
                HEAD_DIM=h.head_dim,
                OFFSETS=h.offsets,
                TILE=SUM_TILE,
                SEARCH=group.search,
                num_warps=WARPS,
                enable_fp_fusion=False,
                **self._units(h),
            )

    @staticmethod
    def _units(h: Header) -> dict[str, int]:
        return {"UNITS": c.ITEM_BYTES[h.dtype] // _UNITS, "ROW_UNITS": h.vector_bytes // _UNITS}

    @staticmethod
    def _offset_tables(group: Group) -> tuple[Any, ...]:
        tables = group.tables
        return (tables.rotation, tables.partner, tables.pair, tables.sign, tables.frequencies, tables.phases)

    @staticmethod
    def _group_rows(h: Header) -> int:
        """Rows of the largest group of tokens, rounded up to a power of two."""
        assert h.affine is not None
        return 1 << (h.affine.tokens - 1).bit_length()

    def _affine_arguments(self, group: Group) -> tuple[Any, ...]:
        read = (group.rows, group.block_firsts, group.starts, group.block_flags, group.keys, group.levels)
        return (*read, *self._offset_tables(group)[1:])

    @staticmethod
    def _affine_constants(group: Group) -> dict[str, Any]:
        h, tables = group.header, group.tables
        assert h.affine is not None
        return {
            "SHAPE": Constants(affine_shape(h)),
            "CODING": h.coding,
            "DTYPE": h.dtype,
            "HEAD_DIM": h.head_dim,
            "ORDER": tables.order,
            "COLUMNS": tables.columns,
            "INTERLEAVED": h.affine.pairing == c.ROPE_INTERLEAVED,
            "CHUNK": h.chunk_tokens,
            "OFFSETS": h.offsets,
            "ROPE": h.rope is not None,
            "SEARCH": group.search,
            "SUM_TILE": SUM_TILE,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }

    @staticmethod
    def _shape(group: Group) -> dict[str, Any]:
        h, tables = group.header, group.tables
        return {
            "CODING": h.coding,
            "DTYPE": h.dtype,
            "HEAD_DIM": h.head_dim,
            "ORDER": tables.order,
            "COLUMNS": tables.columns,
            "ROW_BYTES": tables.row_bytes,
            "QUAD_BITS": tables.quad_bits,
            "ROOT_BUDGET": tables.root_budget,
            "RADIUS_BITS": tables.radius_bits,
            "RADIUS_STEPS": tables.radius_steps,
            "CHUNK": h.chunk_tokens,
            "LEVELS": tables.levels,
            "KIND_16": tables.kind_16,
            "OFFSETS": h.offsets,
            "ROPE": h.rope is not None,
            "RUNS": h.runs,
            "SEARCH": group.search,
            "SUM_TILE": SUM_TILE,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }
