"""Law: attention straight from streams: which tokens are coded, exact or recent, what a query sees of them, and their sum.

Coded keys and values are not decoded: ``kernels.attention`` tells the formulas. What streams hold exactly, and what the caller
adds as exact tokens, are parts of the same softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec import host
from pqcodec.backends import backend as backend_of
from pqcodec.backends import on_device
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.kernels.attention import (
    AttentionJob,
    CodedTokens,
    ExactRows,
    Partial,
    checked_number,
    checked_softcap,
    checked_window,
    decoded_rows,
    exact_part,
    exact_scores,
    merged,
    score_variances,
    softcapped,
)
from pqcodec.stages import centre, exact, keep
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.index import Bounds, checked_range, stream_parts
from pqcodec.stream.report import Damage, damage_error
from pqcodec.stream.source import Source, source_of
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import device_of, device_type, is_torch, widen

_READ_BYTES = 16 << 20  # of blocks that are read at once from a source whose reads are copies
_DECODED_TOKENS = 4096  # that are decoded at once where no codes are read
Pair = tuple[Any, Any]  # keys and values
# Of a stream: offsets float32 [leading, head_dim], exact vectors, and where RoPE turns kept tokens (``CodedTokens.positions``)
_Side = tuple[np.ndarray | None, ExactRows, np.ndarray | None]


# -- the verbs -----------------------------------------------------------------------------------------------------
def scores(
    keys: Any,
    q: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    tokens: tuple[int, int] | None = None,
    recent: Any = None,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Scores of queries q [..., q_heads, queries, head_dim] with encoded keys: float32 [..., q_heads, queries, tokens].

    ``keys``: a stream of a tensor [..., kv_heads, tokens, head_dim], or a list of streams that follow each other along the
    tokens. ``recent``: exact keys behind them. No token is masked; one that a stream of kept tokens lacks has -inf. Scores of a
    sketch (presets qjl) are estimates without bias, of which ``score_variance`` tells how far they are off. On an NVIDIA GPU
    those of wu44 and wu33 (head_dim 128, 16-bit numbers, few queries) come straight from the codes, good to a thousandth of the
    largest one. Other arguments, and the errors, are those of ``attend``.

    >>> import numpy as np, pqcodec
    >>> rng = np.random.default_rng(0)
    >>> k, q = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 100, 64), (4, 1, 64)))
    >>> data = pqcodec.encode(k, preset="quad3", backend="reference")
    >>> found = scores(data, q, backend="reference")
    >>> decoded = np.repeat(pqcodec.decode(data, backend="reference"), 2, 0)  # two heads of queries a head of keys
    >>> found.shape, bool(np.allclose(found, q @ decoded.swapaxes(1, 2) / 8, atol=1e-5))
    ((4, 1, 100), True)
    """
    if on_device(backend, device_type(device_of(q))):
        from pqcodec import attend_device

        asked_for = {"scale": scale, "softcap": softcap, "tokens": tokens, "recent": recent, "check": check, "backend": backend}
        return attend_device.scores_on_device(keys, q, **asked_for)
    asked = _Asked.of(q, _streams("keys", keys), None, scale, softcap, check, backend)
    wanted = checked_range("tokens", tokens, asked.streamed)
    _check_kept(asked, tokens is not None, False)
    found = [asked.in_place(stream, asked.scores_of(stream, part)) for stream, part in asked.parts(asked.keys, wanted)]
    if recent is not None:
        found.append(softcapped(exact_scores(asked.queries, asked.exact_rows("recent", recent, asked.keys[0])), asked.softcap))
    asked.check_damage()
    empty = np.zeros((*asked.queries.shape[:2], 0), asked.queries.dtype)
    whole = np.concatenate([empty, *found], -1)
    with np.errstate(over="ignore"):  # beyond float32: Inf
        return arrays.alike(q, whole.reshape(*q.shape[:-1], whole.shape[-1]).astype(np.float32), keep_dtype=False)


def score_variance(
    keys: Any,
    q: Any,
    *,
    scale: float | None = None,
    tokens: tuple[int, int] | None = None,
    recent: Any = None,
    check: bool = True,
) -> Any:
    """Variance of the estimates that ``scores`` gives of keys in a sketch: float32 [..., q_heads, queries, tokens].

    Over the seeds of the sketch, and at most: a query that points the way of a key has less. Exact tokens, and those that a
    stream of kept tokens lacks, have 0. Arguments as of ``scores``; q is in host memory. Source: arXiv 2406.03482, lemma 3.5.
    Raises InvalidArgument for keys that are no sketch, and what ``decode`` raises for a stream.

    >>> import numpy as np, pqcodec
    >>> rng = np.random.default_rng(0)
    >>> k, q = rng.standard_normal((1, 400, 64)).astype(np.float32), rng.standard_normal((1, 1, 64)).astype(np.float32)
    >>> data = pqcodec.encode(k, preset="qjl", backend="reference")
    >>> off = scores(data, q, backend="reference") - q @ k.swapaxes(1, 2) / 8
    >>> 0.9 < float((off**2 / score_variance(data, q)).mean()) < 1.1
    True
    """
    asked = _Asked.of(q, _streams("keys", keys), None, scale, None, check, "reference")
    if not all(stream.header.sketch for stream in asked.keys):
        raise InvalidArgument("keys are no sign sketch: their scores are those of decoded keys, and no estimates")
    wanted = checked_range("tokens", tokens, asked.streamed)
    _check_kept(asked, tokens is not None, False)
    found = [asked.in_place(stream, asked.variances_of(stream, part), 0) for stream, part in asked.parts(asked.keys, wanted)]
    if recent is not None:
        exact_tokens = asked.exact_rows("recent", recent, asked.keys[0]).shape[1]
        found.append(np.zeros((*asked.queries.shape[:2], exact_tokens)))
    asked.check_damage()
    whole = np.concatenate([np.zeros((*asked.queries.shape[:2], 0)), *found], -1)
    with np.errstate(over="ignore"):  # beyond float32: Inf
        return arrays.alike(q, whole.reshape(*q.shape[:-1], whole.shape[-1]).astype(np.float32), keep_dtype=False)


def attend(
    q: Any,
    keys: Any,
    values: Any,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
    tokens: tuple[int, int] | None = None,
    first: Pair | None = None,
    recent: Pair | None = None,
    check: bool = True,
    backend: str = "auto",
) -> Any:
    """Attention of queries q [..., q_heads, queries, head_dim] to encoded keys and values: [..., q_heads, queries, head_dim].

    ``keys``, ``values``: streams, wherever ``decode`` takes them, of tensors [..., kv_heads, tokens, head_dim]; q_heads is a
    multiple of kv_heads, and neighbouring heads of queries share one of keys. Lists are streams that follow each other along
    the tokens. Keys and values may differ in preset, dtype, chunks and head_dim. ``tokens``: a range of the streams' tokens, as
    in ``decode``. ``first``, ``recent``: exact keys and values [..., kv_heads, n, head_dim] before and behind the streams'.

    ``scale``: of scores, head_dim^-0.5 if None; ``softcap``: bound of scores, which become softcap tanh(score / softcap).
    The queries stand at the end of all tokens. ``causal``: each sees the tokens up to its own; ``window``: of these the last so
    many. Streams of kept tokens (``encode(keep=)``) must keep the same of keys and of values, are seen by every query, and do
    not go with ``tokens``, ``window`` or causal queries that are not among the ``recent`` tokens, but for one.
    ``check``: whether the checksums of the blocks that are read are compared.

    Where the queries are on a GPU, so is the work: an ``AttendBatch`` is made for one call. Streams in host memory are moved
    there, and exact tokens have the streams' dtypes.

    The result has q's dtype and kind, and no gradient. Decoded numbers are not rounded to the streams' dtype in between, but
    for those of streams of ``encode(before_rope=True)``, whose codes no kernel reads: they are decoded as by ``decode``. NaN
    and Inf in exact vectors, and scores beyond float32, do to a query what they do in ``softmax``. Streams that are sketches
    are refused: weights of estimated scores are no estimates without bias, since softmax bends errors upwards. Means of quads
    turn by each token's own angle, and differ by less than 2^-9 of themselves from those that ``decode`` adds (SPEC 9.5).
    Raises InvalidArgument, BackendUnavailable and what ``decode`` raises for a stream.

    >>> import numpy as np, pqcodec
    >>> rng = np.random.default_rng(0)
    >>> k, v, q = (rng.standard_normal((2, n, 64)).astype(np.float32) for n in (100, 100, 1))
    >>> streams = [pqcodec.encode(x, preset="quad3", center="mean", backend="reference") for x in (k, v)]
    >>> out = attend(q, *streams, backend="reference")
    >>> k, v = (pqcodec.decode(data, backend="reference") for data in streams)
    >>> p = np.exp(q @ k.swapaxes(1, 2) / 8)
    >>> bool(np.allclose(out, p @ v / p.sum(-1, keepdims=True), atol=1e-5))
    True
    """
    if on_device(backend, device_type(device_of(q))):
        from pqcodec import attend_device

        exact = {"first": first, "recent": recent}
        options = {"softcap": softcap, "causal": causal, "window": window, "tokens": tokens, "check": check, "backend": backend}
        return attend_device.attend_on_device(q, keys, values, exact, scale=scale, **options)
    asked = _Asked.of(q, _streams("keys", keys), _streams("values", values), scale, softcap, check, backend)
    for name, streams in (("keys", asked.keys), ("values", asked.values)):
        if any(stream.header.sketch for stream in streams):
            raise InvalidArgument(
                f"{name} are a sign sketch, whose inner products have no bias, but attention by them has: "
                "use scores() and score_variance(), or attend to other presets"
            )
    wanted = checked_range("tokens", tokens, asked.streamed)
    before, behind = asked.exact_pair("first", first), asked.exact_pair("recent", recent)
    late = q.shape[-2] > behind[0].shape[1] + 1
    _check_kept(asked, tokens is not None or window is not None, causal and late)
    counts = before[0].shape[1], wanted[1] - wanted[0], behind[0].shape[1]
    bounds = _bounds(q.shape[-2], q.shape[-3] // max(asked.keys[0].header.shape[-3], 1), sum(counts), causal, window)
    if not asked.queries.size:
        return arrays.alike(q, np.zeros(asked.out_shape, np.float32))
    found = [
        asked.attend_to_exact(pair, bounds - at) for pair, at in ((before, 0), (behind, sum(counts[:2]))) if pair[0].shape[1]
    ]
    at = counts[0]
    for (k, part), (v, _) in zip(asked.parts(asked.keys, wanted), asked.parts(asked.values, wanted), strict=True):
        found += asked.attend_to(k, v, part, bounds - at + part[0])
        at += part[1] - part[0]
    asked.check_damage()
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        out = merged(found).result().astype(np.float32)
    return arrays.alike(q, out.reshape(asked.out_shape))


# -- what is asked -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Stream:
    source: Source
    header: Header


def _streams(name: str, data: Any) -> list[_Stream]:
    """One stream, or each of a list; raises as reading a header does."""
    many = list(data) if isinstance(data, (list, tuple)) else [data]
    if not many:
        raise InvalidArgument(f"{name}: an empty list; at least one stream is expected")
    found = []
    for one in many:
        if device_type(device_of(one)) != "cpu":
            raise BackendUnavailable(
                f"{name}: a stream is on {device_of(one)}, the queries are in host memory: pass .cpu(), or move the queries"
            )
        source = source_of(arrays.bytes_of(one) if is_torch(one) else one)
        found.append(_Stream(source, read_header(source)))
    shapes = {(*stream.header.shape[:-2], stream.header.head_dim) for stream in found}
    if len(found[0].header.shape) < 3 or len(shapes) > 1:
        each = ", ".join(str(stream.header.shape) for stream in found)
        raise InvalidArgument(
            f"{name} of shapes {each}: [..., kv_heads, tokens, head_dim] are expected, alike but for the tokens"
        )
    return found


@dataclass(frozen=True)
class _Asked:
    """Queries and streams that go together; ``queries``: [leading, rows, head_dim], times the scale, of the work's dtype."""

    queries: np.ndarray
    keys: list[_Stream]
    values: list[_Stream]
    out_shape: tuple[int, ...]
    softcap: float
    check: bool
    backend: Any
    damage: list[Damage]

    @classmethod
    def of(
        cls,
        q: Any,
        keys: list[_Stream],
        values: list[_Stream] | None,
        scale: float | None,
        softcap: float | None,
        check: bool,
        backend: str,
    ) -> _Asked:
        """Raises InvalidArgument where something does not go together, and BackendUnavailable."""
        numbers, h = arrays.numbers_of(q), keys[0].header
        if numbers.ndim < 3 or numbers.shape[:-3] != h.shape[:-3] or numbers.shape[-1] != h.head_dim:
            raise InvalidArgument(
                f"q {numbers.shape} does not go with keys {h.shape}: [..., q_heads, queries, head_dim] is expected"
            )
        if numbers.shape[-3] % max(h.shape[-3], 1) or (h.shape[-3] == 0) != (numbers.shape[-3] == 0):
            raise InvalidArgument(f"{numbers.shape[-3]} heads of queries are no multiple of {h.shape[-3]} heads of keys")
        for k, v in zip(keys, keys if values is None else values, strict=False):
            if k.header.shape[:-1] != v.header.shape[:-1]:
                raise InvalidArgument(f"values {v.header.shape} do not go with keys {k.header.shape}: heads or tokens differ")
        if values is not None and len(values) != len(keys):
            raise InvalidArgument(f"{len(keys)} streams of keys and {len(values)} of values; as many are expected")
        kernel = backend_of(backend, "cpu", *(stream.header for stream in [*keys, *(values or [])]))
        exactly = np.float64 if kernel.name == "reference" else np.float32
        factor = h.head_dim**-0.5 if scale is None else checked_number("scale", scale)
        queries = np.zeros((h.leading, 0, h.head_dim), exactly)
        if numbers.size:
            with np.errstate(over="ignore", invalid="ignore"):
                queries = (numbers * np.float64(factor)).astype(exactly).reshape(h.leading, -1, h.head_dim)
        cap = checked_softcap(softcap)
        out_shape = (*numbers.shape[:-1], (values or keys)[0].header.head_dim)
        return cls(queries, keys, values or [], out_shape, cap, bool(check), kernel, [])

    @property
    def streamed(self) -> int:
        """Tokens in all streams."""
        return sum(stream.header.tokens for stream in self.keys)

    @staticmethod
    def parts(streams: Sequence[_Stream], wanted: Bounds) -> Iterator[tuple[_Stream, Bounds]]:
        """The streams that hold some of the wanted tokens, and which of their own these are."""
        for number, part, _ in stream_parts([stream.header.tokens for stream in streams], wanted):
            yield streams[number], part

    def check_damage(self) -> None:
        """Raises CorruptStream if anything that was read is damaged."""
        if self.damage:
            raise damage_error(self.damage)

    # -- exact tokens ----------------------------------------------------------------------------------------------
    def exact_rows(self, name: str, x: Any, like: _Stream) -> np.ndarray:
        """An exact tensor [..., kv_heads, n, head_dim] as [leading, n, head_dim]; raises InvalidArgument."""
        numbers, h = arrays.numbers_of(x), like.header
        if numbers.ndim != len(h.shape) or (*numbers.shape[:-2], numbers.shape[-1]) != (*h.shape[:-2], h.head_dim):
            raise InvalidArgument(f"{name} {numbers.shape} does not go with streams of {h.shape}: only the tokens may differ")
        return numbers.reshape(h.leading, numbers.shape[-2], h.head_dim).astype(self.queries.dtype)

    def exact_pair(self, name: str, pair: Pair | None) -> tuple[np.ndarray, np.ndarray]:
        """Exact keys and values, of no token where there are none; raises InvalidArgument."""
        k, v = self.keys[0], self.values[0]
        if pair is None:
            return tuple(np.zeros((s.header.leading, 0, s.header.head_dim), self.queries.dtype) for s in (k, v))  # type: ignore[return-value]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidArgument(f"{name} is a {type(pair).__name__}; a pair of tensors, keys and values, is expected")
        keys, values = self.exact_rows(f"{name} keys", pair[0], k), self.exact_rows(f"{name} values", pair[1], v)
        if keys.shape[1] != values.shape[1]:
            raise InvalidArgument(f"{name}: {keys.shape[1]} tokens of keys, {values.shape[1]} of values; as many are expected")
        return keys, values

    def attend_to_exact(self, pair: tuple[np.ndarray, np.ndarray], bounds: np.ndarray) -> Partial:
        """Attention to exact tokens, from token 0 of ``bounds`` on."""
        return exact_part(self.queries, *pair, bounds, self.softcap)

    # -- streams ---------------------------------------------------------------------------------------------------
    def attend_to(self, k: _Stream, v: _Stream, part: Bounds, bounds: np.ndarray) -> Iterator[Partial]:
        """Attention to some tokens of a pair of streams; ``bounds`` count these streams' tokens."""
        bounds = bounds.clip(*part)
        seen = bounds[bounds[:, 0] < bounds[:, 1]]
        if not len(seen):
            return
        low, high = int(seen[:, 0].min()), int(seen[:, 1].max())
        first, last = _coded_part((k, v), (low, high))
        of_keys, of_values = self._side(k), self._side(v)
        for begin, end in ((low, first), (last, high)):  # exact in one of them at least, or rows of stages
            for at in range(begin, end, _DECODED_TOKENS):
                tokens = (at, min(at + _DECODED_TOKENS, end))
                pair = self._decoded(k, of_keys, tokens), self._decoded(v, of_values, tokens)
                yield self.attend_to_exact(pair, bounds - at)
        for tokens in _steps((k, v), (first, last)):
            keys, values = self._coded(k, of_keys, tokens), self._coded(v, of_values, tokens)
            yield self.backend.attend(self._job(keys, values, tokens, bounds))

    def scores_of(self, k: _Stream, part: Bounds) -> np.ndarray:
        """Scores of some tokens of a stream: [leading, rows, tokens]."""
        first, last = _coded_part((k,), part)
        bounds, side = np.repeat([part], self.queries.shape[1], 0), self._side(k)
        coded = [
            self.backend.scores(self._job(self._coded(k, side, tokens), None, tokens, bounds))
            for tokens in _steps((k,), (first, last))
        ]
        before, behind = (
            [softcapped(exact_scores(self.queries, x), self.softcap) for x in self._exact_part(k, tokens)]
            for tokens in ((part[0], first), (last, part[1]))
        )
        return np.concatenate([*before, *coded, *behind], -1)

    def variances_of(self, k: _Stream, part: Bounds) -> np.ndarray:
        """Variances of the scores of some tokens of a sketch: [leading, rows, tokens]."""
        first, last = _coded_part((k,), part)
        bounds, side = np.repeat([part], self.queries.shape[1], 0), self._side(k)
        found = np.zeros((*self.queries.shape[:2], part[1] - part[0]))
        for tokens in _steps((k,), (first, last)):
            job = self._job(self._coded(k, side, tokens), None, tokens, bounds)
            found[..., tokens[0] - part[0] : tokens[1] - part[0]] = score_variances(job)
        return found

    def in_place(self, stream: _Stream, scores: np.ndarray, missing: float = -np.inf) -> np.ndarray:
        """Scores of a stream's tokens, [leading, rows, tokens], where these stand in the tensor; ``missing``: of others."""
        h = stream.header
        if h.keep is None:
            return scores
        positions = host.read_positions(stream.source, h, (0, h.leading))
        found = np.full((*scores.shape[:2], h.keep.tokens), missing, scores.dtype)
        np.put_along_axis(found, np.broadcast_to(positions[:, None], scores.shape).astype(np.intp), scores, -1)
        return found

    def _job(self, keys: CodedTokens, values: CodedTokens | None, tokens: Bounds, bounds: np.ndarray) -> AttentionJob:
        return AttentionJob(keys, values, self.queries, tokens, bounds.clip(*tokens), self.softcap, self.check, self.damage)

    def _decoded(self, stream: _Stream, side: _Side, tokens: Bounds) -> np.ndarray:
        """Some tokens, exact and coded ones, as vectors that are not rounded: [leading, n, head_dim]."""
        first, last = _coded_part((stream,), tokens)
        found = self._exact_part(stream, (tokens[0], first))
        if first < last:
            found.append(decoded_rows(self._coded(stream, side, (first, last)), (first, last), self.backend, self.damage))
        return np.concatenate([*found, *self._exact_part(stream, (last, tokens[1]))], 1)

    def _exact_part(self, stream: _Stream, tokens: Bounds) -> list[np.ndarray]:
        """Exact tokens of a stream, [leading, n, head_dim], in a list; nothing where there are none."""
        if tokens[0] == tokens[1]:
            return []
        stored, _ = host.decode_kept(stream.source, self.backend.name, tokens, estimate="unbiased")  # exact ones have no other
        return [self.exact_rows("exact tokens", stored, stream)]

    def _side(self, stream: _Stream) -> _Side:
        """The offsets and the exact vectors of a stream; notes what of them is damaged."""
        h = stream.header
        offsets = centre.read_means(stream.source, h, (0, h.leading), self.damage)
        rows, raw = exact.read_vectors(stream.source, h, self.damage) or (
            np.zeros(0, np.int64),
            np.zeros((0, h.vector_bytes), np.uint8),
        )
        leads, tokens = np.divmod(rows, max(h.coded_tokens, 1))
        vectors = widen(raw.view(np.float32 if h.vector_bytes == 4 * h.head_dim else np.uint16), h.dtype)
        positions = host.turning(h, keep.read(stream.source, h, (0, h.leading), self.damage))
        return offsets, ExactRows(leads, tokens + h.first_tokens, vectors.reshape(-1, h.head_dim)), positions

    @staticmethod
    def _coded(stream: _Stream, side: _Side, tokens: Bounds) -> CodedTokens:
        h = stream.header
        chunks = h.blocks.of_tokens(tokens[0] - h.first_tokens, tokens[1] - h.first_tokens)
        payload = h.blocks.read(stream.source, chunks, (0, h.leading))
        return CodedTokens(h, payload, chunks, side[0], side[1].within(tokens), side[2])


def _check_kept(asked: _Asked, ranges: bool, late: bool) -> None:
    """Raises InvalidArgument where streams of kept tokens do not go with each other, or with what is asked of them.

    ``ranges``: whether some of the tokens are asked for; ``late``: whether a query stands among a stream's tokens.
    """
    if not any(stream.header.keep for stream in [*asked.keys, *asked.values]):
        return
    if ranges or late:
        what = "tokens= and window= count" if ranges else "causal queries, more than recent tokens and one, stand among"
        raise InvalidArgument(f"{what} tokens of which a stream holds only some; decode it, with fill=value or by decode_kept")
    for k, v in zip(asked.keys, asked.values, strict=False):
        lists = [host.read_positions(s.source, s.header, (0, s.header.leading)) for s in (k, v) if s.header.keep]
        if (
            len(lists) == 1
            or k.header.whole_shape[:-1] != v.header.whole_shape[:-1]
            or (lists and (lists[0] != lists[1]).any())
        ):
            raise InvalidArgument("keys and values keep other tokens; encode both with the same keep")


def _coded_part(streams: Sequence[_Stream], tokens: Bounds) -> Bounds:
    """The part of some tokens whose codes are read: behind exact first tokens of all streams, before exact last ones.

    Nothing where stages made rows of vectors, for which no kernel has formulas: those are decoded.
    """
    low, high = tokens
    if any(stream.header.inner for stream in streams):
        return high, high
    first = min(max(low, *(stream.header.first_tokens for stream in streams)), high)
    return first, max(min(high, *(stream.header.last_start for stream in streams)), first)


def _steps(streams: Sequence[_Stream], tokens: Bounds) -> Iterator[Bounds]:
    """Runs of coded tokens whose blocks are read at once: all of them, where reads are views."""
    headers = [stream.header for stream in streams]
    if tokens[0] >= tokens[1] or not headers[0].leading:
        return
    step = tokens[1] - tokens[0]
    if not all(getattr(stream.source, "views", False) for stream in streams):
        chunks = [max(_READ_BYTES // (h.leading * h.row_bytes * h.chunk_tokens), 1) * h.chunk_tokens for h in headers]
        step = min(chunks)  # never less than a chunk: it would be read again for every step
    for low in range(tokens[0], tokens[1], step):
        yield low, min(low + step, tokens[1])


def _bounds(queries: int, heads: int, tokens: int, causal: bool, window: int | None) -> np.ndarray:
    """The tokens that each row sees, first and last + 1: int64 [heads * queries, 2]; raises InvalidArgument.

    ``heads``: of queries that share a head of keys.
    """
    window = checked_window(window)
    if not tokens:
        raise InvalidArgument("there is no token to attend to: neither coded, first nor recent ones")
    if queries > tokens and (causal or window):
        raise InvalidArgument(f"{queries} queries stand at the end of {tokens} tokens; the first would see none")
    own = tokens - queries + np.arange(queries)  # each query's own token
    high = own + 1 if causal else np.full(queries, tokens)
    low = np.maximum(own - min(window, tokens) + 1, 0) if window else np.zeros(queries, np.int64)
    return np.tile(np.stack([low, high], 1), (heads, 1))
