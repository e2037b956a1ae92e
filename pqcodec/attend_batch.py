"""Law: attention to encoded keys and values on a GPU: prepared once, then run without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pqcodec.attend_decoded import Decoding
from pqcodec.attend_parts import AttendedTokens, Pair, Streams, WantedTokens, coded_and_exact, why_not_triton
from pqcodec.backends import device_backend
from pqcodec.batch import DecodeBatch
from pqcodec.errors import InvalidArgument
from pqcodec.kernels.attention import checked_number, checked_softcap, checked_window
from pqcodec.placed import Placed, current, lying, one_device
from pqcodec.stream.header import DTYPE_NAMES, Header, dtype_code
from pqcodec.stream.index import Bounds
from pqcodec.stream.report import Damage, damage_error


class AttendBatch:
    """Attention of queries [sequences, q_heads, queries, head_dim] to encoded keys and values, on one GPU.

    ``keys``, ``values``: of each sequence a stream, or a list of streams that follow each other along the tokens: uint8 tensors
    on the GPU, of tensors [..., kv_heads, tokens, head_dim]. All of keys have the same heads, head_dim and dtype, and all of
    values. q_heads is a multiple of kv_heads, and neighbouring heads of queries share one of keys. ``tokens``: a range of each
    sequence's streams. ``first``, ``recent``: exact keys and values [sequences, kv_heads, n, head_dim] of the streams' dtypes
    before and behind the streams, read where they lie at every run.

    The queries stand at the end of all tokens. ``causal``: each sees the tokens up to its own; ``window``: of these the last so
    many. ``scale``: of scores, head_dim^-0.5 if None; ``softcap``: their bound. ``check``: whether the blocks' checksums are
    compared, once, when the batch is made.

    ``run`` fills ``out``, on the current stream, and can be captured in a CUDA graph. ``from_codes`` tells whether kernels read
    the codes, and ``reader`` whose they are:

    - "cuda": one launch, on NVIDIA GPUs, of quads of one kind of head_dim 64, 128 or 256, at most 16 rows (q_heads / kv_heads
      times queries) and, with a window, one query and one stream. Its result differs from attention to decoded numbers by a
      thousandth of the largest number, by more where ``scale`` or keys many times smaller than their mean spread scores.
    - "triton": where backend="triton" is asked for, as decoding is faster on an H200. A launch for each kind of streams, one
      for exact tokens and one that merges, on any GPU, of every coding that a GPU has, of head_dim up to 256; compiled at the
      first run. A result is as good as one in float32.

    All else is decoded, 4,096 tokens at a time; ``why`` tells why.

    Raises InvalidArgument, BackendUnavailable and CorruptStream.
    """

    reader: str | None  # the backend whose kernels read the codes; None where they are decoded
    why: str | None  # ... and why they are; None where a kernel reads them
    leading: tuple[int, ...]  # dimensions before the tokens of the first stream of keys

    def __init__(
        self,
        query: Any,
        keys: Sequence[Any],
        values: Sequence[Any],
        *,
        first: Pair | None = None,
        recent: Pair | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        causal: bool = True,
        window: int | None = None,
        tokens: Bounds | None = None,
        check: bool = True,
        backend: str = "auto",
    ) -> None:
        import torch

        if any(not isinstance(side, (list, tuple)) for side in (keys, values)):
            raise InvalidArgument(
                f"keys, values: a {type(keys).__name__}, a {type(values).__name__}; lists of streams are expected"
            )
        exact = {"first": first, "recent": recent}
        for name, pair in exact.items():
            if pair is not None and (not isinstance(pair, (list, tuple)) or len(pair) != 2):
                raise InvalidArgument(f"{name} is a {type(pair).__name__}; a pair of tensors, keys and values, is expected")
        sides = [[list(each) if isinstance(each, (list, tuple)) else [each] for each in side] for side in (keys, values)]
        streams = [stream for side in sides for each in side for stream in each]
        device = one_device([query, *streams, *(first or ()), *(recent or ())])
        device_backend(backend, device)  # before streams are read
        counts = [[len(each) for each in side] for side in sides]
        if not keys or counts[0] != counts[1] or 0 in counts[0] or query.ndim != 4 or len(query) != len(keys):
            raise InvalidArgument(
                f"queries {tuple(query.shape)}, {len(keys)} sequences of {counts[0]} streams of keys and {len(values)} of "
                f"{counts[1]} of values; [sequences, q_heads, queries, head_dim] and as many streams of each are expected"
            )
        dtype = dtype_code(query.dtype)
        if dtype is None:
            raise InvalidArgument(f"queries are {query.dtype}; float16, bfloat16 or float32 is expected")
        sequences = placed_streams(sides, device, backend, check)
        _check_shapes(query, sequences)
        for name, pair in exact.items():
            check_exact(name, pair, len(query), sequences[0][0])
        scale = query.shape[-1] ** -0.5 if scale is None else checked_number("scale", scale)
        cap, window = checked_softcap(softcap), min(checked_window(window) or 0, 1 << 62)  # so that torch takes it
        attended = AttendedTokens.of(sequences, tokens, *(pair if pair and pair[0].shape[2] else () for pair in exact.values()))
        _check_queries(query.shape[2], attended, causal or window > 0)
        k, v = (placed.header for placed in sequences[0][0])
        self._query, self._attended, self.leading = query, attended, tuple(k.shape[:-2])
        self.out = torch.empty((*query.shape[:-1], v.head_dim), dtype=query.dtype, device=device)
        why_cuda = _why_not_cuda(query, sequences, attended, window, causal, backend)
        why_triton = why_not_triton(attended.headers, backend)
        self.why = f"{why_cuda}; {why_triton}" if why_cuda and why_triton else None
        self.reader = None if self.why else "triton" if why_cuda else "cuda"
        shape = tuple(query.shape)
        with current(device):
            if self.reader == "cuda":
                self._way: Any = _cuda_attention(shape, dtype, attended, scale, cap, window)
            elif self.reader == "triton":
                from pqcodec.kernels.on_triton.attending import TritonAttention

                parts = coded_and_exact(attended, backend)
                dims = (k.head_dim, v.head_dim)
                self._way = TritonAttention(shape, attended.totals, k.leading, dims, *parts, device, scale, cap, window, causal)
            else:
                self._way = Decoding(shape, k.leading, attended, backend, device, scale, cap, window, causal)

    @property
    def from_codes(self) -> bool:
        """Whether kernels read the codes, which are not decoded to memory."""
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


# -- what is asked -----------------------------------------------------------------------------------------------------
def placed_streams(sides: Sequence[Sequence[Sequence[Any]]], device: Any, backend: str, check: bool) -> list[list[Streams]]:
    """Where each sequence's streams are; ``sides``: of keys, and of values, each sequence's streams.

    Raises InvalidArgument for streams that do not go together, and CorruptStream.
    """
    damage: list[Damage] = []
    placed = [[[lying(stream, None, None, damage) for stream in each] for each in side] for side in sides]
    if damage:
        raise damage_error(damage)
    for name, side in zip(("keys", "values"), placed, strict=False):
        alike = {(p.header.leading, p.header.head_dim, DTYPE_NAMES[p.header.dtype]) for each in side for p in each}
        if len(alike) > 1:
            raise InvalidArgument(f"streams of {name} differ in heads, head_dim or dtype: {sorted(alike)}; one is expected")
    every = [p for side in placed for each in side for p in each]
    if check:
        checked = DecodeBatch.of_placed(every, device, backend, write=False)
        checked.run()
        checked.check()
    else:
        device_backend(backend, device, *(p.header for p in every))
    return [list(zip(*each, strict=True)) for each in zip(*placed, strict=True)]


def _check_shapes(query: Any, sequences: Sequence[Sequence[Streams]]) -> None:
    """Raises InvalidArgument where queries and streams do not go together."""
    heads, queries, head_dim = query.shape[1:]
    k = sequences[0][0][0].header
    if not k.leading or not heads or heads % k.leading or head_dim != k.head_dim or not queries:
        raise InvalidArgument(
            f"queries {tuple(query.shape)} do not go with keys {k.shape}: "
            f"a multiple of {k.leading} heads of {k.head_dim} numbers is expected"
        )
    for number, streams in enumerate(sequences):
        for k, v in ((keys.header, values.header) for keys, values in streams):
            if (k.leading, k.tokens) != (v.leading, v.tokens):
                raise InvalidArgument(
                    f"sequence {number}: values {v.shape} do not go with keys {k.shape}: heads or tokens differ"
                )


def check_exact(name: str, pair: Sequence[Any] | None, sequences: int, streams: Streams) -> None:
    """Raises InvalidArgument where exact tokens do not go with streams; of keys alone where only scores are asked for."""
    for side, x, placed in zip(("keys", "values"), pair or (), streams, strict=False):
        h, found = placed.header, tuple(x.shape)
        count = (pair or ())[0].shape[-2] if len(found) > 1 else 0
        expected = (sequences, h.leading, count, h.head_dim)
        if found != expected or str(x.dtype) != f"torch.{DTYPE_NAMES[h.dtype]}":
            raise InvalidArgument(f"{name} {side} {found}, {x.dtype}: {expected}, {DTYPE_NAMES[h.dtype]} is expected")


def _check_queries(queries: int, attended: AttendedTokens, last_ones: bool) -> None:
    """Raises InvalidArgument where there are too few tokens; ``last_ones``: the queries stand at the end of them."""
    for number, total in enumerate(attended.totals):
        if total < (queries if last_ones else 1):
            raise InvalidArgument(f"sequence {number}: {queries} queries stand at the end of {total} tokens")


# -- the CUDA kernel ---------------------------------------------------------------------------------------------------
def _why_not_cuda(
    query: Any, sequences: Sequence[Sequence[Streams]], attended: AttendedTokens, window: int, causal: bool, backend: str
) -> str | None:
    """Why the CUDA kernel does not attend to these codes; None where it does."""
    if device_backend(backend, query.device).name != "cuda":
        return "backend 'cuda' is not asked for"
    from pqcodec.kernels.on_cuda.attention import MOST_BLOCKS, is_readable, why_not

    queries, whole = query.shape[2], [sum(pair[0].header.tokens for pair in streams) for streams in sequences]
    pairs = [[(keys.header, values.header) for keys, values in streams] for streams in sequences]
    rows = query.shape[1] // pairs[0][0][0].leading * queries
    if whole != attended.streamed or not min(map(len, attended.parts)):
        return "a part of the streams' tokens is asked for"
    if queries > 1 and not causal:
        return "several queries see tokens behind their own"
    if queries > 1 and attended.behind < queries:
        return "the queries' own tokens are not all among the recent ones"
    if len({(k.kind, v.kind) for headers in pairs for k, v in headers}) > 1:
        return "streams are of several kinds"
    for headers in pairs:
        if reason := next((reason for k, v in headers if (reason := why_not(k, v, rows))), None):
            return reason
        if len(headers) > 1 and (reason := _why_not_several(headers, window, MOST_BLOCKS)):
            return reason
        if attended.first and (window or any(k.first_tokens for k, _ in headers)):
            return "there are exact tokens before the streams, and a window or exact tokens of the streams' own"
        least, k = _least(window, headers[0][0], attended.behind), headers[0][0]
        if 0 < least < k.first_tokens or (least and (queries > 1 or least > k.tokens)):
            return f"a window of {window} tokens begins among exact tokens, or is for several queries"
    for x in (*attended.first, *attended.recent):
        if not is_readable(x):
            return f"exact tokens have strides {x.stride()}"
    if not all(x.is_contiguous() for x in attended.first):
        return "the exact tokens before the streams are not contiguous"
    return None


def _why_not_several(headers: Sequence[tuple[Header, Header]], window: int, most: int) -> str | None:
    """Why the CUDA kernel does not attend to streams that follow each other; None where it does."""
    if window:
        return "there are a window and several streams of a sequence"
    if headers[0][1].offsets:
        return "values of several streams are centred"
    if any(k.first_tokens for k, _ in headers[1:]):
        return "there are exact tokens between streams"
    return f"{len(headers)} streams of a sequence are more than {most - 1}" if len(headers) >= most else None


def _streams_of(part: WantedTokens) -> tuple[Placed, Placed]:
    """A part's keys and values."""
    keys, values = part.streams
    return keys, values


def _least(window: int, k: Header, behind: int) -> int:
    """The first token of a stream that the last query sees."""
    return max(k.tokens + behind - window, 0) if window else 0


def _cuda_attention(shape: tuple[int, ...], dtype: int, attended: AttendedTokens, scale: float, cap: float, window: int) -> Any:
    """The kernel for sequences that ``_why_not_cuda`` has nothing against."""
    from pqcodec.kernels.on_cuda.attention import CodedPair, CudaAttention, ExactFirst

    sequences = [
        [CodedPair(keys, values, _least(window, keys.header, attended.behind)) for keys, values in map(_streams_of, parts)]
        for parts in attended.parts
    ]
    firsts = [ExactFirst.of(streams[0]) for streams in sequences]
    if attended.first:
        head_bytes = attended.first[0].stride(1) * attended.first[0].element_size()
        pairs = zip(*attended.first, strict=True)
        firsts = [ExactFirst(attended.before, k.data_ptr(), v.data_ptr(), head_bytes) for k, v in pairs]
    return CudaAttention(shape, dtype, sequences, firsts, tuple(attended.recent) or None, scale, cap)
