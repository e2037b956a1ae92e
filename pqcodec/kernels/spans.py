"""Law: what one launch on a GPU works on: which bytes of which streams, and which rows of which tensors.

A ``Span`` is a run of blocks of one stream and the tensor's rows that they code. A ``Group`` is many spans of one kind (same
coding, head_dim, dtype ...), which a kernel codes in one launch; all GPU backends take groups. Addresses are plain integers,
so tensors of any size and strides can be reached. A group keeps its own tables on the device alive; the caller keeps the
streams and the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream
from pqcodec.kernels.device_tables import tables_on
from pqcodec.stream import sections
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header
from pqcodec.stream.report import Damage


class SpanRow(NamedTuple):
    """A span as kernels read it: int64. As ``SPAN``, where each number stands in a row of ``Group.rows``."""

    stream: int  # address of the stream's first byte
    payload: int  # address at which the payload begins, or would begin, were all of it there
    leading: int  # of the tensor
    coded: int  # coded tokens of the tensor
    exact: int  # exact first tokens of the tensor
    first_chunk: int
    first_lead: int
    leads: int  # of the span
    first_token: int  # of the rows
    last_token: int  # of the rows, plus one
    stride: int  # elements from one token to the next
    starts: int  # first entry of the span in ``Group.starts``
    position: int  # of token 0 under RoPE, modulo 2^32
    offsets_at: int  # byte of the stream at which the offsets begin
    exact_at: int  # ... and the exact tokens
    whole_bytes: int  # of a block of a whole chunk
    last_bytes: int  # ... and of the last chunk, which may have fewer tokens


SPAN = SpanRow(*range(len(SpanRow._fields)))

MEAN_PARTS = 32  # programs among which the tokens of a mean are divided


@dataclass(frozen=True)
class Span:
    """Blocks of some chunks and leads of a stream, and rows for some tokens; each range is (first, last + 1)."""

    header: Header
    stream: int
    payload: int
    chunks: tuple[int, int]
    leads: tuple[int, int]
    tokens: tuple[int, int]
    starts: np.ndarray  # int64 [leads]: address of each lead's row of the first token in ``tokens``
    stride: int
    sides: bool = True  # whether this span also checks offsets and exact tokens, and copies the latter

    @property
    def side_leads(self) -> int:
        """Leading indices whose side sections are this span's to write or check."""
        return self.leads[1] - self.leads[0] if self.sides else 0

    @property
    def blocks(self) -> int:
        """Blocks of the span: chunks times leading indices."""
        return (self.chunks[1] - self.chunks[0]) * (self.leads[1] - self.leads[0])

    def row(self, starts_at: int) -> SpanRow:
        """The span's row in the table that kernels read: int64 fields, in the order of ``SpanRow``."""
        h = self.header
        return SpanRow(
            stream=self.stream,
            payload=self.payload,
            leading=h.leading,
            coded=h.coded_tokens,
            exact=h.first_tokens,
            first_chunk=self.chunks[0],
            first_lead=self.leads[0],
            leads=self.leads[1] - self.leads[0],
            first_token=self.tokens[0],
            last_token=self.tokens[1],
            stride=self.stride,
            starts=starts_at,
            position=h.rope.first_position % (1 << c.PHASE_BITS) if h.rope else 0,
            offsets_at=h.places[sections.OFFSETS].start,
            exact_at=h.places[sections.EXACT_TOKENS].start,
            whole_bytes=h.blocks.chunk_bytes,
            last_bytes=h.blocks.size(h.chunks - 1) if h.chunks else 0,
        )


class Group:
    """Spans of one kind, described on the device.

    ``brief``: the launch has many short thread blocks, so that work of a higher priority gets its turn between them; alone on a
    device it takes up to a tenth longer.
    """

    brief = False
    effort = "fast"  # of encoders' search: an ``EncodeOptions.effort``

    def __init__(self, spans: Sequence[Span], device: Any) -> None:
        import torch

        self.header = spans[0].header
        self.spans = list(spans)
        self.device = torch.device(device)
        starts_at = np.concatenate([[0], np.cumsum([len(span.starts) for span in spans])])
        rows = np.array([span.row(int(at)) for span, at in zip(spans, starts_at, strict=False)], np.int64)
        self.blocks = sum(span.blocks for span in spans)
        self.leads = sum(span.side_leads for span in spans)
        self.search = (len(spans) - 1).bit_length()
        self.rows = self.put(rows)
        self.starts = self.put(np.concatenate([span.starts for span in spans]).astype(np.int64))
        self.block_firsts = self.put(self._firsts([span.blocks for span in spans]))
        self.lead_firsts = self.put(self._firsts([span.side_leads for span in spans]))
        words = max(self._words(span.header) for span in spans)
        self.keys = self.put(checksum_keys(words + 1).astype(np.int64))
        self.tables = tables_on(str(self.device), self.header.coding, *self._table_key())
        self._found: dict[str, Any] = {}
        wanted = any(span.tokens[0] < span.tokens[1] for span in spans)  # a stream is checked without its shared table
        self.levels = self.put(np.array([*(self.header.levels if wanted else ()), 0], np.float32))

    def _table_key(self) -> tuple[Any, ...]:
        h = self.header
        return h.head_dim, h.row_bits, h.radius_bits, h.seed, h.rounds, h.affine, h.rope

    @staticmethod
    def _words(h: Header) -> int:
        """32-bit words of the longest run of bytes that one checksum covers."""
        block = h.blocks.size_of(min(h.chunk_tokens, max(h.coded_tokens, 1)))
        sides = (place.entry_bytes for section, place in h.places.items() if section.leads(h) is not None)
        return -(-max(block, h.header_bytes, *sides) // 4)

    def _firsts(self, counts: list[int]) -> np.ndarray:
        """First block (or lead) of each span, padded to 1 + 2^search entries with a number that no index reaches."""
        firsts = np.full((1 << self.search) + 1, 1 << 62, np.int64)
        firsts[: len(counts)] = np.cumsum([0, *counts[:-1]])
        return firsts

    def put(self, array: np.ndarray) -> Any:
        """The array as a tensor on the group's device."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @cached_property
    def block_flags(self) -> Any:
        """int32 [blocks] on the device: vectors with NaN or Inf of an encoded block; 0 of a decoded one that is whole."""
        return self.empty(max(self.blocks, 1), "int32")

    @cached_property
    def side_flags(self) -> Any:
        """int32 [2 * leads], as ``read_sides`` fills them."""
        return self.empty(max(2 * self.leads, 2), "int32")

    @property
    def checks_sides(self) -> bool:
        """Whether there are offsets or exact tokens to be checked."""
        return self.header.offsets or any(span.header.first_tokens for span in self.spans)

    @cached_property
    def largest(self) -> Any:
        """The largest magnitude among each lead's means: float32 [leads]."""
        return self.empty(max(self.leads, 1), "float32")

    def nonfinite(self) -> list[int]:
        """How many vectors of each span held NaN or Inf when they were encoded; waits."""
        if not self.block_flags.any():
            return [0] * len(self.spans)
        counts = np.concatenate([[0], np.cumsum(self.block_flags.cpu().numpy())])
        ends = np.cumsum([span.blocks for span in self.spans])
        return [int(counts[end] - counts[end - span.blocks]) for span, end in zip(self.spans, ends, strict=True)]

    def damage(self) -> list[Damage]:
        """The damage that the checks of blocks and sides found; waits. Raises CorruptStream where an offset is not finite."""
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
        """Scratch for means: float64 [leads, parts, columns], allocated once."""
        return self.once("sums", lambda: self.empty(self.leads * MEAN_PARTS * columns, "float64"))

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What ``find`` returned when this name was asked for first; a backend's kernels, for instance, take time to find."""
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    def empty(self, count: int, dtype: str) -> Any:
        """Zeros [count] of that dtype on the group's device."""
        import torch

        return torch.zeros(count, dtype=getattr(torch, dtype), device=self.device)
