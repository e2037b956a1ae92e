"""Law: attention to encoded keys and values on a GPU: prepared once, then run without a wait."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pqcodec.backends import device_backend
from pqcodec.batch import DecodeBatch
from pqcodec.errors import InvalidArgument
from pqcodec.kernels.attention import checked_number, checked_softcap, checked_window
from pqcodec.placed import Placed, current, lying, one_device
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.stream.report import Damage, damage_error

STEP = 4096  # tokens that are decoded at once where no kernel reads the codes
Pair = tuple[Any, Any]  # keys and values


class AttendBatch:
    """Attention of queries [sequences, q_heads, queries, head_dim] to encoded keys and values, on one GPU.

    ``keys``, ``values``: one stream a sequence, uint8 tensors on the GPU, of tensors [..., kv_heads, tokens, head_dim]; those
    of keys alike but for numbers and tokens, and those of values. q_heads is a multiple of kv_heads, and neighbouring heads of
    queries share one of keys. ``recent``: exact keys and values [sequences, kv_heads, n, head_dim] behind the streams, read
    where they lie at every run.

    The queries stand at the end of all tokens, and each sees the tokens up to its own; ``window``: of these the last so many.
    ``scale``: of scores, head_dim^-0.5 if None; ``softcap``: their bound. ``check``: whether the blocks' checksums are
    compared, once, when the batch is made.

    ``run`` fills ``out``, on the current stream, and can be captured in a CUDA graph. ``from_codes`` tells whether it is one
    launch that reads codes: quads of head_dim 64, 128 or 256 on NVIDIA GPUs, at most 16 rows (q_heads / kv_heads times queries)
    and, with a window, one query. Its result differs from attention to decoded numbers by a thousandth of the largest number,
    unless keys are many times smaller than their mean. All else is decoded, 4,096 tokens at a time; ``why`` tells why.

    Raises InvalidArgument, BackendUnavailable and CorruptStream.
    """

    why: str | None  # no kernel reads these codes; None where one does
    leading: tuple[int, ...]  # dimensions before the tokens of the first stream of keys

    def __init__(
        self,
        query: Any,
        keys: Sequence[Any],
        values: Sequence[Any],
        *,
        recent: Pair | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        check: bool = True,
        backend: str = "auto",
    ) -> None:
        import torch

        if any(not isinstance(side, (list, tuple)) for side in (keys, values)):
            raise InvalidArgument(
                f"keys, values: a {type(keys).__name__}, a {type(values).__name__}; lists of streams are expected"
            )
        if recent is not None and (not isinstance(recent, (list, tuple)) or len(recent) != 2):
            raise InvalidArgument(f"recent is a {type(recent).__name__}; a pair of tensors, keys and values, is expected")
        device = one_device([query, *keys, *values, *(recent or ())])
        device_backend(backend, device)  # before streams are read
        if not keys or len(keys) != len(values) or query.ndim != 4 or len(query) != len(keys):
            raise InvalidArgument(
                f"queries {tuple(query.shape)}, {len(keys)} streams of keys and {len(values)} of values; "
                f"[sequences, q_heads, queries, head_dim] and one stream of each a sequence are expected"
            )
        placed = _placed(keys, values, device, backend, check)
        headers = [(k.header, v.header) for k, v in placed]
        dtype = next((code for code, name in DTYPE_NAMES.items() if query.dtype == getattr(torch, name)), None)
        if dtype is None:
            raise InvalidArgument(f"queries are {query.dtype}; float16, bfloat16 or float32 is expected")
        _check_shapes(query, headers, recent)
        scale = query.shape[-1] ** -0.5 if scale is None else checked_number("scale", scale)
        cap, window = checked_softcap(softcap), checked_window(window)
        if window is not None:
            window = min(window, 1 << 62)  # so that torch takes it
        if recent is not None and not recent[0].shape[-2]:
            recent = None
        self._query, self.leading = query, tuple(headers[0][0].shape[:-2])
        self.out = torch.empty((*query.shape[:-1], headers[0][1].head_dim), dtype=query.dtype, device=device)
        least = [_least(window, k, recent) for k, _ in headers]
        self.why = _why_not(query, headers, recent, window, least, backend)
        if self.why is None:
            from pqcodec.kernels.on_cuda.attention import CodedPair, CudaAttention, ExactFirst

            with current(device):
                streams = [CodedPair(*pair, first) for pair, first in zip(placed, least, strict=True)]
                firsts = [ExactFirst.of(coded) for coded in streams]
                self._way: Any = CudaAttention(tuple(query.shape), dtype, [[x] for x in streams], firsts, recent, scale, cap)
        else:
            self._way = _Decoding(tuple(query.shape), placed, backend, recent, scale, cap, window)

    @property
    def from_codes(self) -> bool:
        """Whether a kernel reads the codes, which are not decoded to memory."""
        return self.why is None

    def run(self, query: Any = None) -> Any:
        """Attend with the queries of the tensor that the batch was made of, or of another one like it; returns ``out``."""
        query = self._query if query is None else query
        like = self._query
        if query.shape != like.shape or query.dtype != like.dtype or query.device != like.device:
            raise InvalidArgument(
                f"queries {tuple(query.shape)}, {query.dtype} on {query.device}; "
                f"the batch was made of {tuple(like.shape)}, {like.dtype} on {like.device}"
            )
        with current(like.device):
            return self._way.run(query.contiguous(), self.out)


def _placed(keys: Sequence[Any], values: Sequence[Any], device: Any, backend: str, check: bool) -> list[tuple[Placed, Placed]]:
    """Where each sequence's streams are; raises for those that differ in kind or are damaged."""
    damage: list[Damage] = []
    sides = [[lying(stream, None, None, damage) for stream in streams] for streams in (keys, values)]
    if damage:
        raise damage_error(damage)
    for name, side in zip(("keys", "values"), sides, strict=True):
        if len({(p.header.kind, p.header.leading) for p in side}) > 1:
            raise InvalidArgument(f"streams of {name} differ in heads or options; make a batch for each kind")
    if check:
        checked = DecodeBatch.of_placed([*sides[0], *sides[1]], device, backend, write=False)
        checked.run()
        checked.check()
    return list(zip(*sides, strict=True))


def _check_shapes(query: Any, headers: Sequence[tuple[Header, Header]], recent: Pair | None) -> None:
    """Raises InvalidArgument where queries, streams and recent tokens do not go together."""
    heads, queries, head_dim = query.shape[1:]
    k, v = headers[0]
    if not k.leading or not heads or heads % k.leading or head_dim != k.head_dim or not queries:
        raise InvalidArgument(
            f"queries {tuple(query.shape)} do not go with keys {k.shape}: "
            f"a multiple of {k.leading} heads of {k.head_dim} numbers is expected"
        )
    new = recent[0].shape[-2] if recent else 0
    for number, (k, v) in enumerate(headers):
        if (k.leading, k.tokens) != (v.leading, v.tokens):
            raise InvalidArgument(f"sequence {number}: values {v.shape} do not go with keys {k.shape}: heads or tokens differ")
        if k.tokens + new < queries:
            raise InvalidArgument(f"sequence {number}: {queries} queries stand at the end of {k.tokens + new} tokens")
    for name, x, h in zip(("keys", "values"), recent or (), (k, v), strict=False):
        expected = (len(query), h.leading, new, h.head_dim)
        if tuple(x.shape) != expected or str(x.dtype) != f"torch.{DTYPE_NAMES[h.dtype]}":
            raise InvalidArgument(f"recent {name} {tuple(x.shape)}, {x.dtype}: {expected}, {DTYPE_NAMES[h.dtype]} is expected")


def _least(window: int | None, k: Header, recent: Pair | None) -> int:
    """The first token of a stream that the last query sees."""
    return 0 if window is None else max(k.tokens + (recent[0].shape[-2] if recent else 0) - window, 0)


def _why_not(
    query: Any,
    headers: Sequence[tuple[Header, Header]],
    recent: Pair | None,
    window: int | None,
    least: Sequence[int],
    backend: str,
) -> str | None:
    """Why no kernel attends to these codes; None where one does."""
    if device_backend(backend, query.device).name != "cuda":
        return "only backend 'cuda' reads codes"
    from pqcodec.kernels.on_cuda.attention import is_readable, why_not

    queries, new = query.shape[2], recent[0].shape[-2] if recent else 0
    rows = query.shape[1] // headers[0][0].leading * queries
    for (k, v), first in zip(headers, least, strict=True):
        if reason := why_not(k, v, rows):
            return reason
        if 0 < first < k.first_tokens or (first and (queries > 1 or first > k.tokens)):
            return f"a window of {window} tokens begins among exact tokens, or is for several queries"
    if queries > 1 and new < queries:
        return "the queries' own tokens are not all among the recent ones"
    for x in recent or ():
        if not is_readable(x):
            return f"recent tokens have strides {x.stride()}"
    return None


class _Decoding:
    """Attention to what is decoded, some tokens at a time: parts of one softmax, merged by running maximum and sum."""

    def __init__(
        self,
        query_shape: tuple[int, ...],
        placed: Sequence[tuple[Placed, Placed]],
        backend: str,
        recent: Pair | None,
        scale: float,
        cap: float,
        window: int | None,
    ) -> None:
        import torch

        self._recent, self._scale, self._cap = recent, scale, cap
        sequences, heads, queries, _ = query_shape
        k, v = (p.header for p in placed[0])
        device = placed[0][0].keeps.device
        new = recent[0].shape[-2] if recent else 0
        tokens = torch.tensor([pair[0].header.tokens for pair in placed])
        own = (tokens + new - queries)[:, None] + torch.arange(queries)  # each query's own token: [sequences, queries]
        low = (own - window + 1).clamp(min=0) if window else torch.zeros_like(own)
        rows = heads // k.leading  # query heads of a head of keys; each query's bounds for all of them
        shape = (sequences, 1, rows * queries, 1)
        self._high, self._low = (x.repeat(1, rows).reshape(shape).to(device) for x in (own, low))
        self._tokens = tokens.reshape(-1, 1, 1, 1).to(device)
        self._shape = (sequences, k.leading, rows * queries)
        most = int(tokens.max())
        step = min(STEP, most)
        self._room = [
            torch.zeros((sequences, h.leading, step, h.head_dim), dtype=getattr(torch, DTYPE_NAMES[h.dtype]), device=device)
            for h in (k, v)
        ]
        self._steps = []
        for first in range(0, most, step or 1):
            batches = []
            for n, pair in enumerate(placed):
                last = min(first + step, pair[0].header.tokens)
                if first < last:
                    outs = [
                        x[n].reshape(*p.header.shape[:-2], *x.shape[-2:])[..., : last - first, :]
                        for x, p in zip(self._room, pair, strict=True)
                    ]
                    streams = [p.keeps for p in pair]
                    batches.append(DecodeBatch(streams, outs=outs, tokens=(first, last), backend=backend))
            self._steps.append((first, batches))

    def run(self, query: Any, out: Any) -> Any:
        """Fills ``out`` and returns it."""
        import torch

        q = query.float().reshape(*self._shape, -1) * self._scale
        most = torch.full((*self._shape, 1), -math.inf, device=q.device)
        total = torch.zeros_like(most)
        sums = torch.zeros((*self._shape, out.shape[-1]), device=q.device)
        parts: list[Any] = [(first, batches, self._room, self._tokens) for first, batches in self._steps]
        if self._recent:
            parts.append((self._tokens, [], list(self._recent), None))
        for first, batches, pair, end in parts:
            for batch in batches:
                batch.run()
            keys, values = (x.float() for x in pair)
            scores = q @ keys.mT
            if self._cap:
                scores = self._cap * torch.tanh(scores / self._cap)
            token = first + torch.arange(keys.shape[-2], device=q.device)
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


def _nonfinite(seen: Any, values: Any) -> Any:
    """What NaN and Inf in values add to the rows that see them, seen [..., rows, tokens]: [..., rows, head_dim].

    For other rows, too, their product with a weight of 0 would be NaN.
    """
    import torch

    rows, nothing = seen.float(), values.isnan()
    up, down = (torch.where(rows @ (nothing | (values == end)).float() > 0, math.inf, 0.0) for end in (math.inf, -math.inf))
    return up - down  # NaN where there are both
