"""Law: work on a GPU: which bytes and which rows a launch is about, told in tables that lie on the device.

A ``Span`` is a run of blocks of one stream and the tensor's rows that they code; a ``Group`` is many spans of one kind (same
coding, head_dim, dtype ...), which a kernel does in one launch. The GPU backends share these, and the tables of ``plan``
on the device. Addresses are plain integers, so tensors of any size and strides are reached; a group keeps what it needs alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings import look_ups as t
from pqcodec.codings.plan import plan_for
from pqcodec.errors import CorruptStream
from pqcodec.stages import centre
from pqcodec.stream import sections
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header, RopeField
from pqcodec.stream.report import Damage

# Fields of a span's row, int64 [FIELDS]
STREAM = 0  # address of the stream's first byte
PAYLOAD = 1  # address of the payload's first byte (reckoned, where only a part of it is there)
LEADING = 2  # of the tensor
CODED = 3  # coded tokens of the tensor
EXACT = 4  # exact first tokens
FIRST_CHUNK = 5
FIRST_LEAD = 6
LEADS = 7  # of the span
FIRST_TOKEN = 8  # that the rows begin with
LAST_TOKEN = 9  # one behind
STRIDE = 10  # elements from one token to the next
STARTS = 11  # first entry of the span in the list of addresses, one a lead
FLAGS = 12  # number of the span
POSITION = 13  # of token 0 under RoPE, modulo 2^32
OFFSETS_AT = 14  # byte of the stream where the offsets begin
EXACT_AT = 15  # ... and the exact tokens
FIELDS = 16
OFFSET_EXPONENT_AT = c.OFFSET_EXPONENT_AT
RADIUS_EXPONENT_AT = c.RADIUS_EXPONENT_AT

MEAN_PARTS = 16  # programs that share the tokens of a mean


@dataclass(frozen=True)
class Span:
    """Blocks of the chunks and leads in ``chunks`` and ``leads``; rows for the tokens in ``tokens`` (all: first, last + 1)."""

    header: Header
    stream: int
    payload: int
    chunks: tuple[int, int]
    leads: tuple[int, int]
    tokens: tuple[int, int]
    starts: np.ndarray  # int64 [leads]: address of each lead's row of the first token in ``tokens``
    stride: int
    sides: bool = True  # whether offsets and exact tokens are this span's business

    @property
    def side_leads(self) -> int:
        return self.leads[1] - self.leads[0] if self.sides else 0

    @property
    def blocks(self) -> int:
        return (self.chunks[1] - self.chunks[0]) * (self.leads[1] - self.leads[0])

    def row(self, starts_at: int, number: int) -> list[int]:
        h = self.header
        position = h.rope.first_position % (1 << c.PHASE_BITS) if h.rope else 0
        return [
            self.stream,
            self.payload,
            h.leading,
            h.coded_tokens,
            h.first_tokens,
            self.chunks[0],
            self.leads[0],
            self.leads[1] - self.leads[0],
            *self.tokens,
            self.stride,
            starts_at,
            number,
            position,
            h.header_bytes,
            h.places[sections.EXACT_TOKENS].start,
        ]


class Group:
    """Spans of one kind, described on the device.

    ``brief``: its kernels are to end soon, bit by bit, so that work of a higher priority gets its turn between; an idle device
    takes up to a tenth longer for it.
    """

    brief = False

    def __init__(self, spans: Sequence[Span], device: Any) -> None:
        import torch

        self.header = spans[0].header
        self.spans = list(spans)
        self.device = torch.device(device)
        starts_at = np.concatenate([[0], np.cumsum([len(span.starts) for span in spans])])
        rows = np.array([span.row(int(at), i) for i, (span, at) in enumerate(zip(spans, starts_at, strict=False))], np.int64)
        self.blocks = sum(span.blocks for span in spans)
        self.leads = sum(span.side_leads for span in spans)
        self.search = (len(spans) - 1).bit_length()
        self.rows = self._put(rows)
        self.starts = self._put(np.concatenate([span.starts for span in spans]).astype(np.int64))
        self.block_firsts = self._put(self._firsts([span.blocks for span in spans]))
        self.lead_firsts = self._put(self._firsts([span.side_leads for span in spans]))
        words = max(self._words(span.header) for span in spans)
        self.keys = self._put(checksum_keys(words + 1).astype(np.int64))
        self.tables = tables_on(str(self.device), self.header.coding, *self._table_key())

    def _table_key(self) -> tuple[Any, ...]:
        h = self.header
        return h.head_dim, h.row_bits, h.radius_bits, h.seed, h.rounds, h.rope

    @staticmethod
    def _words(h: Header) -> int:
        """Words of the longest run of bytes under one checksum."""
        block = min(h.chunk_tokens, max(h.coded_tokens, 1)) * h.row_bytes
        sides = (place.entry_bytes for section, place in h.places.items() if section.of_leads)
        return -(-max(block, h.header_bytes, *sides) // 4)

    def _firsts(self, counts: list[int]) -> np.ndarray:
        """First block (or lead) of each span, then a number that is never reached."""
        firsts = np.full((1 << self.search) + 1, 1 << 62, np.int64)
        firsts[: len(counts)] = np.cumsum([0, *counts[:-1]])
        return firsts

    def _put(self, array: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @cached_property
    def block_flags(self) -> Any:
        return self.empty(max(self.blocks, 1), "int32")

    @cached_property
    def side_flags(self) -> Any:
        """Two numbers a lead."""
        return self.empty(max(2 * self.leads, 2), "int32")

    @property
    def checks_sides(self) -> bool:
        """Whether there are offsets or exact tokens to be checked."""
        return self.header.offsets or any(span.header.first_tokens for span in self.spans)

    @cached_property
    def span_flags(self) -> Any:
        return self.empty(len(self.spans), "int32")

    @cached_property
    def largest(self) -> Any:
        """A span's largest mean as float32 bits."""
        return self.empty(len(self.spans), "int32")

    def damage(self) -> list[Damage]:
        """What a check of blocks and sides found; waits. Raises CorruptStream where an offset is not finite."""
        found: list[Damage] = []
        sides = self.side_flags.cpu().numpy().reshape(-1, 2) if self.checks_sides else []
        at = 0
        for span in self.spans:
            for lead in range(*span.leads) if span.side_leads and len(sides) else ():
                offset, exact = sides[at]
                if offset & 1:
                    found.append(Damage("offset", lead, None))
                elif offset:
                    raise CorruptStream(f"offset of leading index {lead} is not finite")
                if exact:
                    found.append(Damage("exact tokens", lead, (0, span.header.first_tokens)))
                at += 1
        at = 0
        blocks = self.block_flags.cpu().numpy()
        for span in self.spans:
            h = span.header
            for index in np.nonzero(blocks[at : at + span.blocks])[0]:
                chunk, lead = divmod(int(index), span.leads[1] - span.leads[0])
                chunk, lead = chunk + span.chunks[0], lead + span.leads[0]
                start = h.first_tokens + h.blocks.first_token(chunk)
                found.append(Damage("payload", lead, (start, start + h.blocks.tokens(chunk))))
            at += span.blocks
        return found

    def sums(self, columns: int) -> Any:
        if "_sums" not in self.__dict__:
            self._sums = self.empty(self.leads * MEAN_PARTS * columns, "float64")
        return self._sums

    def empty(self, count: int, dtype: str) -> Any:
        import torch

        return torch.zeros(count, dtype=getattr(torch, dtype), device=self.device)


@dataclass(frozen=True)
class Tables:
    """A plan's tables on a device; torch tensors. Shapes: ``tables.py`` and below."""

    order: int
    columns: int  # head_dim's order, up to a power of two
    row_bytes: int
    root_budget: int
    radius_bits: int
    radius_steps: int
    energy_scale: int  # the encoder's: of squares behind R
    levels: int
    kind_16: int
    fixes: int
    path: Any  # int32 [groups, levels, 10]
    node_cos: Any  # float32 [kinds + 1, 256]; the last kind passes everything on
    node_sin: Any
    node_shift: Any  # int32
    look_up: Any  # uint8 [kinds + 1, widths, 1024]
    bounds: Any  # int32 [kinds + 1, widths, 129]
    grid_shift: Any  # int32 [kinds + 1]
    quad_ints: Any  # int32 [29, 3]: codes a cell, first record, last cell
    quad_floats: Any  # float32 [29]: 1 / codes
    quad_look_up: Any  # uint8 [29, 1024]
    records: Any  # int32 [records, 4]: n_a, n_b, K_a, K_b
    record_floats: Any  # float32 [records, 3]: cos, sin, 1 / n_b
    circle: Any  # float32 [2, 2048]
    mantissas: Any  # float32 [radius steps]
    paper: Any  # float32 [33]: cos [3, 4], sin [3, 4], squared bounds [3, 3]
    rotation: Any  # float16 [order, columns]: R
    partner: Any  # int32 [columns]: the other channel of a RoPE pair
    pair: Any  # int32 [columns]: number of the pair, or -1
    sign: Any  # float32 [columns]: -1 for the pair's first channel
    frequencies: Any  # int64 [pairs]
    phases: Any  # float32 [4, 256]


@lru_cache(maxsize=64)
def tables_on(
    device: str, coding: int, head_dim: int, row_bits: int, radius_bits: int, seed: int, rounds: int, rope: RopeField | None
) -> Tables:
    """The tables of a kind of streams, on a device."""
    import torch

    def put(array: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    shape = (1, head_dim)
    plan = plan_for(Header(coding, c.DTYPE_FLOAT32, shape, row_bits, radius_bits, seed, rounds=rounds))
    order, columns = plan.order, 1 << (plan.order - 1).bit_length()
    nodes, quads, path = t.node_arrays(order), plan.quads, t.paths(order)
    kinds = [(table.m_a, table.m_b) for table in plan.tree.tables]
    rotation = np.zeros((order, columns), np.float16)
    rotation[:, :order] = t.rotation_matrix(order, seed, rounds)
    circle_steps = [angles.circle_step(n) for n in (quads.n_a, quads.n_b)]
    paper = t.paper_cells()

    def extended(array: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([array, np.full_like(array[:1], value)])

    return Tables(
        order=order,
        columns=columns,
        row_bytes=plan.row_bytes,
        root_budget=plan.root_budget if coding == c.CODING_SPLIT else 0,
        radius_bits=radius_bits,
        radius_steps=plan.radius_steps if coding == c.CODING_SPLIT else 1,
        energy_scale=plan.energy_scale,
        levels=path.shape[1],
        kind_16=kinds.index((8, 8)),
        fixes=int(nodes.fixes.max()),
        path=put(path if path.size else np.zeros((1, 1, t.PATH_FIELDS), np.int32)),
        node_cos=put(extended(nodes.cos, 1)),
        node_sin=put(extended(nodes.sin, 1)),
        node_shift=put(extended(nodes.shift, 0)),
        look_up=put(extended(nodes.look_up, 0)),
        bounds=put(extended(nodes.bounds, 1 << 30)),
        grid_shift=put(extended(nodes.grid_shift, 0)),
        quad_ints=put(np.stack([quads.per_cell, quads.first, quads.cells - 1], 1).astype(np.int32)),
        quad_floats=put((1 / quads.per_cell).astype(np.float32)),
        quad_look_up=put(t.quad_look_up()),
        records=put(np.stack([quads.n_a, quads.n_b, *circle_steps], 1).astype(np.int32)),
        record_floats=put(np.stack([quads.cos, quads.sin, (1 / quads.n_b).astype(np.float32)], 1)),
        circle=put(np.stack([plan.circle_cos, plan.circle_sin])),
        mantissas=put(plan.mantissas),
        paper=put(np.concatenate([paper[1].ravel(), paper[2].ravel(), (paper[0] ** 2).ravel()]).astype(np.float32)),
        rotation=put(rotation),
        **{name: put(array) for name, array in _rope_columns(rope, columns).items()},
        phases=put(centre.phase_tables().copy()),
    )


def _rope_columns(rope: RopeField | None, columns: int) -> dict[str, np.ndarray]:
    partner, pair = np.arange(columns, dtype=np.int32), np.full(columns, -1, np.int32)
    sign, frequencies = np.zeros(columns, np.float32), np.zeros(1, np.int64)
    if rope:
        p, q = centre.pairs(rope)
        partner[p], partner[q] = q, p
        pair[p] = pair[q] = np.arange(len(p))
        sign[p], sign[q] = -1, 1
        frequencies = np.array(rope.frequencies, np.int64)
    return {"partner": partner, "pair": pair, "sign": sign, "frequencies": frequencies}
