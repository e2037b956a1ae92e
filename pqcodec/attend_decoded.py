"""Law: attention on a GPU where no kernel reads the codes: some tokens at a time are decoded, and what is found is merged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from pqcodec import attend_parts
from pqcodec.attend_parts import AttendedTokens
from pqcodec.batch import DecodeBatch
from pqcodec.stream.header import DTYPE_NAMES

Part = tuple[Any, Sequence[DecodeBatch], Sequence[Any], Any]  # position of the first token, decoders, tensors, the end


class Decoding:
    """Attention of queries [sequences, q_heads, queries, head_dim]: parts of one softmax, merged by running maximum and sum.

    ``leading``: heads of keys; ``cap``: of scores, ``window``: of tokens, 0 for none.
    """

    def __init__(
        self,
        query_shape: tuple[int, ...],
        leading: int,
        tokens: AttendedTokens,
        backend: str,
        device: Any,
        scale: float,
        cap: float,
        window: int = 0,
        causal: bool = True,
    ) -> None:
        import torch

        self._tokens, self._scale, self._cap = tokens, scale, cap
        sequences, heads, queries, _ = query_shape
        total = torch.tensor(tokens.totals)[:, None]
        own = total - queries + torch.arange(queries)  # each query's own token: [sequences, queries]
        low = (own - window + 1).clamp(min=0) if window else torch.zeros_like(own)
        high = own if causal else (total - 1).expand_as(own)
        rows = heads // leading  # query heads of a head of keys; each query's bounds for all of them
        shape = (sequences, 1, rows * queries, 1)
        self._high, self._low = (x.repeat(1, rows).reshape(shape).to(device) for x in (high, low))
        self._end = tokens.before + torch.tensor(tokens.streamed).reshape(-1, 1, 1, 1).to(device)
        self._shape = (sequences, leading, rows * queries)
        most = max(tokens.streamed)
        step = min(attend_parts.STEP, most)
        headers = next(([placed.header for placed in part.streams] for parts in tokens.parts for part in parts), [])
        self._room = [
            torch.zeros((sequences, h.leading, step, h.head_dim), dtype=getattr(torch, DTYPE_NAMES[h.dtype]), device=device)
            for h in headers
        ]
        self._steps = [(at, list(self._batches(at, at + step, backend))) for at in range(0, most, step or 1)]

    def _batches(self, low: int, high: int, backend: str) -> Iterator[DecodeBatch]:
        """What fills the room with the tokens low .. high - 1 of all sequences' streams."""
        for number, parts in enumerate(self._tokens.parts):
            for part in parts:
                begin = part.position - self._tokens.before  # of the streams' first token among these
                wanted = part.within((low - begin, high - begin)).tokens
                if wanted[0] >= wanted[1]:
                    continue
                at = wanted[0] + begin - low
                outs = [
                    x[number].reshape(*placed.header.shape[:-2], *x.shape[-2:])[..., at : at + wanted[1] - wanted[0], :]
                    for x, placed in zip(self._room, part.streams, strict=True)
                ]
                yield DecodeBatch([placed.keeps for placed in part.streams], outs=outs, tokens=wanted, backend=backend)

    def _parts(self) -> Iterator[Part]:
        """All tokens: where each part begins, what decodes it, its keys and values, and where it ends, if not with these."""
        before = self._tokens.before
        if before:
            yield 0, [], self._tokens.first, None
        for at, batches in self._steps:
            yield before + at, batches, self._room, self._end
        if self._tokens.behind:
            yield self._end, [], self._tokens.recent, None

    def run(self, query: Any, out: Any) -> Any:
        """Fills ``out`` and returns it."""
        import torch

        q = query.float().reshape(*self._shape, -1) * self._scale
        most = torch.full((*self._shape, 1), -math.inf, device=q.device)
        total = torch.zeros_like(most)
        sums = torch.zeros((*self._shape, out.shape[-1]), device=q.device)
        for first, batches, pair, end in self._parts():
            scores = self._scores(q, batches, pair[0])
            values = pair[1].float()
            token = first + torch.arange(values.shape[-2], device=q.device)
            seen = (token <= self._high) & (token >= self._low)
            if end is not None:
                seen &= token < end
            scores = scores.masked_fill(~seen, -math.inf)
            larger = torch.maximum(most, scores.amax(-1, keepdim=True))
            finite = larger.masked_fill(larger == -math.inf, 0.0)  # of rows that have seen nothing yet
            weights, shrunk = torch.exp(scores - finite), torch.exp(most - finite)
            total = total * shrunk + weights.sum(-1, keepdim=True)
            sums = sums * shrunk + weights @ values.nan_to_num(0.0, 0.0, 0.0) + _nonfinite(seen, values)
            most = larger
        return out.copy_((sums / total).reshape(out.shape))

    def _scores(self, q: Any, batches: Sequence[DecodeBatch], keys: Any) -> Any:
        """Scores of a part's tokens, masked by nothing: float32 [sequences, leading, rows, tokens]."""
        import torch

        for batch in batches:
            batch.run()
        scores = q @ keys.float().mT
        return self._cap * torch.tanh(scores / self._cap) if self._cap else scores

    def score(self, query: Any, out: Any) -> Any:
        """Fills ``out`` [sequences, q_heads, queries, total] with all scores; the sequences are of one length."""
        q = query.float().reshape(*self._shape, -1) * self._scale
        rows, at = out.view(*self._shape, -1), 0
        for _, batches, pair, end in self._parts():
            count = min(pair[0].shape[-2], out.shape[-1] - self._tokens.behind - at) if end is not None else pair[0].shape[-2]
            rows[..., at : at + count] = self._scores(q, batches, pair[0])[..., :count]
            at += count
        return out


def _nonfinite(seen: Any, values: Any) -> Any:
    """What NaN and Inf in values add to the rows that see them, seen [..., rows, tokens]: [..., rows, head_dim].

    For other rows, too, their product with a weight of 0 would be NaN.
    """
    import torch

    rows, nothing = seen.float(), values.isnan()
    up, down = (torch.where(rows @ (nothing | (values == end)).float() > 0, math.inf, 0.0) for end in (math.inf, -math.inf))
    return up - down  # NaN where there are both
