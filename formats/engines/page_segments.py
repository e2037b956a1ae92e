"""Law: what sequences of an engine are to attention: segments in pages of a pool, and raw tokens in the engine's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.stream.pages import PagedStream
from pqcodec.tensors.numbers import is_torch

if TYPE_CHECKING:
    from pqcodec.formats.engines.coded_pages import CodedPages


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens that were encoded together, and the pages of a pool that they are in. ``CodedPages.put`` makes it."""

    keys: PagedStream
    values: PagedStream
    pool: CodedPages
    versions: np.ndarray  # of its pages, int64 [pages]: how often each had been put
    first_token: int | None  # which token of a sequence its first one is; None: its streams do not tell

    @property
    def tokens(self) -> int:
        """Tokens of a sequence that it stands for, exact ones included."""
        return self.keys.header.tokens

    @property
    def pages(self) -> list[int]:
        """Its pages, in the order of their tokens."""
        return [int(page) for page in self.keys.pages]

    def first(self, tokens: int) -> Segment:
        """Its first tokens, in the same pages: what another sequence shares. Raises InvalidArgument within a page."""
        h = self.keys.header
        count, behind = divmod(tokens - h.first_tokens, self.pool.block)
        if count < 0 or tokens > h.tokens or (behind and tokens < h.tokens):
            raise InvalidArgument(
                f"the first {tokens} of {h.tokens} tokens; {h.first_tokens} exact ones and whole pages of {self.pool.block} "
                f"are expected"
            )
        last = count + bool(behind)
        return self._resized(tokens, self.keys.pages[:last], self.versions[:last])

    def _resized(self, tokens: int, pages: np.ndarray, versions: np.ndarray) -> Segment:
        """So many tokens that are in these pages, with the same means and exact tokens."""
        keys, values = self.keys.resized(tokens, pages), self.values.resized(tokens, pages)
        return Segment(keys, values, self.pool, versions, self.first_token)

    @property
    def pair(self) -> tuple[PagedStream, PagedStream]:
        """Keys and values."""
        return self.keys, self.values


def segment_tokens(segments: Sequence[Segment]) -> int:
    """Tokens of all of some segments."""
    return sum(segment.tokens for segment in segments)


Sequences = Sequence[Sequence[Segment]]  # the segments of each sequence, in the order of their tokens


@dataclass(frozen=True, eq=False)
class RawTokens:
    """Where a serving engine keeps the tokens that are not encoded.

    ``kv_cache``: one tensor, or a pair of keys and values, of a ``layout`` in LAYOUTS. ``block_tables``: block numbers of each
    sequence, lists or a tensor [sequences, n]: token t of sequence s is in block ``block_tables[s][t // block]``; numbers of
    blocks whose tokens are all encoded are not looked at. ``lengths`` [sequences]: all tokens of each, encoded ones included.
    """

    kv_cache: Any
    layout: str
    block_tables: Any
    lengths: Any


def whole_numbers(name: str, given: Any) -> list[int]:
    """Whole numbers from 0 on; raises InvalidArgument."""
    found = np.asarray(given.cpu() if is_torch(given) else given)
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or found.min() < 0)):
        raise InvalidArgument(f"{name} is {found.dtype} {found.shape}; whole numbers [sequences] from 0 on are expected")
    return [int(n) for n in found]


def on_gpu(raw: RawTokens | None, device: Any) -> RawTokens | None:
    """Block tables and lengths as a kernel reads them; rows of other lengths are filled with -1."""
    import torch

    if raw is None:
        return None
    rows = [torch.as_tensor(row, dtype=torch.int32).reshape(-1).to(device) for row in raw.block_tables]
    tables = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return RawTokens(raw.kv_cache, raw.layout, tables, torch.as_tensor(raw.lengths, dtype=torch.int32).to(device))
