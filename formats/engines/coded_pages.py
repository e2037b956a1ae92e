"""Law: one layer's encoded keys and values in pages of a pool, as serving engines keep them, and attention to these.

A page holds the coded rows of ``block`` tokens of all heads. What was encoded together is a segment; sequences are lists of
segments, which they may share, and tokens behind them that the engine still has in its own cache. Pages are checked when they
are put; a segment whose pages were put again since is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pqcodec import attention, codec
from pqcodec.attend_pages import AttendPages
from pqcodec.backends import on_device
from pqcodec.codings.presets import check_restores
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.formats.engines.block_tables import encode_blocks, gather_blocks, slots_of, views_of
from pqcodec.formats.engines.page_segments import RawTokens, Segment, Sequences, on_gpu, segment_tokens, whole_numbers
from pqcodec.options import EncodeOptions, each
from pqcodec.placed import DeviceSource, device_named, stream_on
from pqcodec.stages.centre import Rope, stored_means
from pqcodec.stream.header import DTYPE_NAMES, Header, dtype_code, read_header
from pqcodec.stream.pages import PagedStream, checked_pages, page_bytes
from pqcodec.stream.report import Damage, damage_error
from pqcodec.stream.source import MemorySource, source_of
from pqcodec.tensors.numbers import is_torch

_OPTIONS = {  # of a stream, by the field of its header
    "coding": "the coding",
    "row_bits": "the bits of a vector",
    "rounds": "the rotation",
    "seed": "the seed",
    "offsets": "means or none",
    "rope": "RoPE",
    "before_rope": "keys before RoPE",
    "runs": "means that turn run by run (flag 512) or, as 0.1.0 encoded keys of quads, do not: encode again",
}


class CodedPages:
    """A pool of ``pages`` pages of one layer's keys and values, each of ``block`` tokens of ``kv_heads`` heads.

    ``dtype``: of the tensors that are encoded, torch's or its name. ``preset``: one for keys and values, or a pair. ``center``:
    of the keys; ``rope``, which implies center="rope": its first position is that of a sequence's token 0. Pages are on
    ``device``: ``keys`` and ``values`` are uint8 tensors [pages, page_bytes] there. On NVIDIA GPUs ``attend`` and ``prepare``
    read quads of head_dim 64, 128 or 256; blocks of 32 tokens and more fill the kernel's tiles. Raises InvalidArgument.

    >>> import torch
    >>> cache, layout = torch.randn(2, 9, 16, 2, 64), "2,blocks,block,heads,dim"
    >>> pool = CodedPages(8, 16, 2, 64, dtype="float32", backend="reference")
    >>> prompt = pool.put_blocks(cache, layout, [7, 3], 32, pages=[5, 0])
    >>> q = torch.randn(1, 4, 1, 64)
    >>> pool.attend(q, [[prompt]], RawTokens(cache, layout, [[7, 3, 1]], [40])).shape  # the last 8 tokens are in block 1
    torch.Size([1, 4, 1, 64])
    """

    def __init__(
        self,
        pages: int,
        block: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: Any = "float16",
        preset: str | tuple[str, str] = "quad3",
        center: str | None = None,
        rope: Rope | None = None,
        device: Any = "cpu",
        backend: str = "auto",
    ) -> None:
        import torch

        for name, value in (("pages", pages), ("block", block), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidArgument(f"{name} is {value!r}; a whole number from 1 on is expected")
        code = dtype_code(dtype)
        if code is None:
            raise InvalidArgument(f"dtype {dtype} is unknown; choose from {', '.join(DTYPE_NAMES.values())}")
        self.block, self._backend, self.device = block, backend, device_named(device)
        if self.device.type != "cpu" and not on_device(backend, self.device.type):
            raise InvalidArgument(f"backend {backend!r} codes in host memory, the pool is on {self.device}; keep it on the CPU")
        self._center, self._rope = center or ("rope" if rope is not None else None), rope
        self._presets = tuple(each("preset", preset, 2, str))
        for name in self._presets:
            check_restores(name, "attention to pages")
        options = (
            EncodeOptions(self._presets[0], center=self._center, rope=rope, chunk_tokens=block),
            EncodeOptions(self._presets[1], chunk_tokens=block),
        )
        nothing = torch.zeros(kv_heads, 0, head_dim, dtype=getattr(torch, DTYPE_NAMES[code]))
        empty = [codec.encode_by(one, nothing, "reference")[1] for one in options]
        self._like = tuple(read_header(source_of(data)) for data in empty)
        for name, h in zip(self._presets, self._like, strict=True):
            if h.chunk_tokens != block:
                raise InvalidArgument(f"preset {name!r} codes {h.chunk_tokens} tokens together, a page holds {block}")
        if pages * kv_heads >= 1 << 31:
            raise InvalidArgument(f"{pages} pages of {kv_heads} heads; their product must be below 2^31")
        self.keys, self.values = (
            torch.zeros((pages, page_bytes(h)), dtype=torch.uint8, device=self.device) for h in self._like
        )
        self._versions = np.zeros(pages, np.int64)
        self._empty = self._put(empty, [], None, check=False)

    # -- into pages ------------------------------------------------------------------------------------------------
    def put_blocks(
        self,
        kv_cache: Any,
        layout: str,
        block_table: Any,
        tokens: int,
        pages: Any,
        *,
        first_token: int = 0,
        exact_tokens: int = 0,
        after: Segment | None = None,
    ) -> Segment:
        """Encode tokens of a sequence from ``first_token`` on out of the engine's blocks into pages: a segment.

        ``kv_cache``, ``layout``, ``block_table``: those of ``encode_blocks``. ``exact_tokens``: the first of these tokens that
        stay exact, beside the pages. ``pages``: numbers of as many as the other tokens take, ``block`` each; what was in them
        is overwritten, after everything is checked. ``after``: a segment that these tokens go on: what comes back is that one
        and they, centred by its mean. So a sequence that grows page by page is one segment. Raises InvalidArgument and
        NonFiniteInput.
        """
        numbers, means = checked_pages("pages", pages, len(self._versions)), None
        if after is not None:
            self._check_growth(after, numbers, first_token, exact_tokens)
            header, front = after.keys.header, after.keys.front.cpu().numpy()
            means = stored_means(MemorySource(front, header), header)
        streams = encode_blocks(
            kv_cache,
            layout,
            block_table,
            tokens,
            first_token=first_token,
            preset=self._presets,  # type: ignore[arg-type]
            center=self._center,
            rope=self._rope,
            exact_tokens=exact_tokens,
            chunk_tokens=self.block,
            means=means,
            backend=self._backend,
        )
        new = self._put(streams, numbers, first_token, check=False)
        if after is None:
            return new
        pages = np.concatenate([after.keys.pages, numbers])
        return after._resized(after.tokens + new.tokens, pages, np.concatenate([after.versions, new.versions]))

    def _check_growth(self, segment: Segment, pages: np.ndarray, first_token: int, exact_tokens: int) -> None:
        """Raises InvalidArgument where a segment cannot go on in these pages with a token of its sequence."""
        self._check_segment("after", segment)
        h = segment.keys.header
        if exact_tokens or h.coded_tokens % self.block or h.first_tokens < h.exact_tokens:
            raise InvalidArgument(
                f"after: a segment goes on with encoded tokens behind whole pages of {self.block}; it has {h.coded_tokens} "
                f"encoded tokens, {h.first_tokens} of {h.exact_tokens} exact ones, and exact_tokens is {exact_tokens}"
            )
        both = np.intersect1d(pages, segment.keys.pages)
        if both.size:
            raise InvalidArgument(f"pages names page {both[0]}, which holds tokens of the segment that goes on")
        if segment.first_token is not None and segment.first_token + h.tokens != first_token:
            raise InvalidArgument(f"after: the segment ends before token {segment.first_token + h.tokens}, not {first_token}")
        if h.rope is not None and self._rope is not None:
            position, wanted = h.rope.first_position + h.tokens, self._rope.first_position + first_token
            if position != wanted:
                raise InvalidArgument(f"after: the segment ends at position {position}, token {first_token} is at {wanted}")

    def put(self, streams: Sequence[Any], pages: Any, *, first_token: int | None = None) -> Segment:
        """Put streams of keys and of values [kv_heads, tokens, head_dim] into pages: a segment.

        Streams are bytes, files, or uint8 tensors, with chunks of ``block`` tokens. All their checksums are compared, and
        nothing is written if one does not hold. ``first_token``: of a sequence, that their first one is; where it is told, the
        segment is refused in another place. Raises InvalidArgument, and what ``decode`` raises for a stream.
        """
        return self._put(streams, pages, first_token, check=True)

    def _put(self, streams: Sequence[Any], pages: Any, first_token: int | None, check: bool) -> Segment:
        import torch

        if not isinstance(streams, (list, tuple)) or len(streams) != 2:
            raise InvalidArgument(f"streams is a {type(streams).__name__}; a pair of streams, keys and values, is expected")
        pair = [_bytes_of(stream, self.device) for stream in streams]
        headers = [read_header(DeviceSource(x)) for x in pair]
        self._check_headers(headers)
        numbers = checked_pages("pages", pages, len(self._versions))
        if len(numbers) != headers[0].chunks:
            raise InvalidArgument(
                f"{headers[0].coded_tokens} encoded tokens take {headers[0].chunks} pages of {self.block}; "
                f"{len(numbers)} are named"
            )
        if check:
            damage = [found for x in pair for found in codec.verify(_as_stream(x), backend=self._backend)]
            if damage:
                raise damage_error(damage)
        index = torch.from_numpy(numbers).to(self.device)
        for pool, x, h in zip((self.keys, self.values), pair, headers, strict=True):
            payload = x[h.payload_start :]
            room = torch.zeros(len(numbers) * pool.shape[1], dtype=torch.uint8, device=self.device)
            room[: len(payload)] = payload
            pool[index] = room.view(len(numbers), pool.shape[1])
        self._versions[numbers] += 1
        keys, values = (PagedStream(h, x[: h.payload_start].clone(), numbers) for x, h in zip(pair, headers, strict=True))
        return Segment(keys, values, self, self._versions[numbers], first_token)

    def _check_headers(self, headers: Sequence[Header]) -> None:
        """Raises InvalidArgument for streams that are not of this pool's kind, or do not belong together."""
        for name, h, like in zip(("keys", "values"), headers, self._like, strict=True):
            heads, _, dim = like.shape
            if len(h.shape) != 3 or (h.shape[0], h.shape[2], h.dtype) != (heads, dim, like.dtype):
                raise InvalidArgument(
                    f"the stream of {name} holds {DTYPE_NAMES[h.dtype]} {h.shape}, "
                    f"the pool {DTYPE_NAMES[like.dtype]} ({heads}, tokens, {dim})"
                )
            if h.chunk_tokens != self.block:
                raise InvalidArgument(f"the stream of {name} has chunks of {h.chunk_tokens} tokens, a page holds {self.block}")
            if h.kind != like.kind:
                other = ", ".join(words for field, words in _OPTIONS.items() if getattr(h, field) != getattr(like, field))
                raise InvalidArgument(f"the stream of {name} was encoded by other options than the pool's: {other or 'stages'}")
            if h.exceptions:
                raise InvalidArgument(f"the stream of {name} holds {h.exceptions} exact vectors; pages have no room for them")
        k, v = headers
        if (k.tokens, k.first_tokens) != (v.tokens, v.first_tokens):
            raise InvalidArgument(
                f"keys hold {k.tokens} tokens, {k.first_tokens} of them exact, values {v.tokens} and {v.first_tokens}; "
                f"pass two that belong together"
            )

    # -- out of pages ----------------------------------------------------------------------------------------------
    def get(self, segment: Segment) -> tuple[Any, Any]:
        """The streams of keys and of values that were put, bit for bit: bytes, or uint8 tensors on a GPU.

        Raises InvalidArgument for a segment of another pool, or whose pages were put again.
        """
        self._check_segment("the segment", segment)
        found = [stream.gathered(pool) for stream, pool in zip(segment.pair, (self.keys, self.values), strict=True)]
        keys, values = map(_as_stream, found)
        return keys, values

    def verify(self, segment: Segment) -> list[Damage]:
        """Compare the checksums of a segment's pages again: what does not hold, of keys and then of values."""
        return [found for stream in self.get(segment) for found in codec.verify(stream, backend=self._backend)]

    def _check_segment(self, name: str, segment: Segment) -> None:
        if not isinstance(segment, Segment):
            raise InvalidArgument(f"{name} is a {type(segment).__name__}; a Segment that put() returned is expected")
        if segment.pool is not self:
            raise InvalidArgument(f"{name} is of another pool; pools of several layers do not share segments")
        new = segment.keys.pages[self._versions[segment.keys.pages] != segment.versions]
        if new.size:
            raise InvalidArgument(
                f"{name}: page {new[0]} was put again since, and holds other tokens; its sequence ended there"
            )

    # -- attention -------------------------------------------------------------------------------------------------
    def attend(
        self,
        q: Any,
        sequences: Sequences,
        raw: RawTokens | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        check: bool = False,
    ) -> Any:
        """Attention of q [sequences, q_heads, queries, head_dim] to each sequence's segments and raw tokens, a tensor like q.

        The queries stand at the end of the tokens, and each sees those up to its own; ``window``: of these the last so many (on
        the CPU). ``scale``, ``softcap``: as in ``pqcodec.attention.attend``. ``check``: whether checksums are compared again.
        On the CPU pages are gathered some at a time, and codes are not decoded where ``attend`` reads them. On a GPU it is one
        launch; ``prepare`` it where it is made again and again. Raises InvalidArgument, BackendUnavailable and CorruptStream.
        """
        import torch

        lists, lengths = self._checked(q, sequences, raw)
        if on_device(self._backend, self.device.type):
            if window is not None:
                raise BackendUnavailable(
                    "attention to pages on a GPU knows no window; leave it out, or keep the pool on the CPU"
                )
            if check:
                damage = [
                    found for segment in {id(s): s for some in lists for s in some}.values() for found in self.verify(segment)
                ]
                if damage:
                    raise damage_error(damage)
            if raw is not None:
                view = views_of(raw.kv_cache, raw.layout)[0]
                for table, segments, length in zip(raw.block_tables, lists, lengths, strict=True):
                    coded = segment_tokens(segments)
                    slots_of(view, table, length - coded, coded, once=False)
            return PreparedPages(self, q, sequences, on_gpu(raw, self.device), scale=scale, softcap=softcap).run()
        results = []
        for n, (segments, length) in enumerate(zip(lists, lengths, strict=True)):
            coded = segment_tokens(segments)
            recent = None
            if raw is not None and length > coded:
                table = raw.block_tables[n]
                recent = gather_blocks(raw.kv_cache, raw.layout, table, length - coded, first_token=coded)
            sources = [[s.keys.source(self.keys) for s in segments], [s.values.source(self.values) for s in segments]]
            options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "check": check}
            results.append(attention.attend(q[n], *sources, recent=recent, backend=self._backend, **options))
        return torch.stack(results)

    def prepare(
        self,
        q: Any,
        sequences: Sequences,
        raw: RawTokens | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        room: tuple[int, int] = (0, 0),
    ) -> PreparedPages:
        """``attend`` on a GPU, prepared once and then run without a wait, also in a CUDA graph; see ``PreparedPages``.

        ``raw``: its block tables int32 [sequences, n] and lengths int32 [sequences] are tensors on the GPU. ``room``: pages and
        segments of a sequence that there may be later. Raises InvalidArgument and BackendUnavailable.
        """
        if not on_device(self._backend, self.device.type):
            raise BackendUnavailable(f"pages on {self.device} are attended to without preparation; call attend()")
        return PreparedPages(self, q, sequences, raw, scale=scale, softcap=softcap, room=room)

    def _checked(self, q: Any, sequences: Sequences, raw: RawTokens | None) -> tuple[list[list[Segment]], list[int]]:
        """The segments of each sequence, one at least, and its number of tokens; raises InvalidArgument."""
        if not is_torch(q) or q.ndim != 4 or q.device != self.device:
            found = f"{q.dtype} {tuple(q.shape)} on {q.device}" if is_torch(q) else type(q).__name__
            raise InvalidArgument(f"q: {found}; a tensor [sequences, q_heads, queries, head_dim] on {self.device} is expected")
        count, queries = len(q), q.shape[2]
        lists = self._segments(dict(enumerate(sequences)))
        coded = [segment_tokens(each) for each in lists]
        lengths = coded if raw is None else whole_numbers("lengths", raw.lengths)
        if not len(lists) == len(lengths) == count:
            raise InvalidArgument(f"{count} sequences of queries, {len(lists)} of segments, {len(lengths)} lengths")
        if raw is not None:
            if len(raw.block_tables) != count:
                raise InvalidArgument(f"{count} sequences of queries, {len(raw.block_tables)} block tables")
            self._check_cache(raw)
        for n, (length, there) in enumerate(zip(lengths, coded, strict=True)):
            if length < max(there, queries):
                raise InvalidArgument(
                    f"sequence {n} has {length} tokens; {there} are in its segments, and there are {queries} queries"
                )
        return lists, lengths

    def _segments(self, sequences: Mapping[int, Sequence[Segment]]) -> list[list[Segment]]:
        """Each sequence's segments; an empty one where there are none. Raises InvalidArgument."""
        for n, segments in sequences.items():
            at = 0
            for segment in segments:
                self._check_segment(f"sequence {n}", segment)
                if segment.first_token not in (None, at):
                    raise InvalidArgument(f"sequence {n}: a segment begins with token {segment.first_token}, {at} is the next")
                at += segment.tokens
        return [list(segments) or [self._empty] for segments in sequences.values()]

    def _check_cache(self, raw: RawTokens) -> None:
        """Raises InvalidArgument where the engine's cache is not of the pool's heads, head_dim, dtype and device."""
        heads, _, dim = self._like[0].shape
        for name, x in zip(("keys", "values"), views_of(raw.kv_cache, raw.layout), strict=True):
            found = (x.shape[2], x.shape[3], str(x.dtype).removeprefix("torch."), x.device)
            wanted = (heads, dim, DTYPE_NAMES[self._like[0].dtype], self.device)
            if found != wanted:
                raise InvalidArgument(f"the engine's {name} have heads, head_dim, dtype and device {found}, the pool {wanted}")


class PreparedPages:
    """Attention of a batch of sequences to pages on a GPU, prepared by ``CodedPages.prepare``.

    ``run`` fills ``out``, and can be captured in a CUDA graph. Without a new capture, the next replay sees: numbers in the
    engine's cache, its block tables and lengths, in the memory where they were when this was prepared; and other segments,
    after ``place``. A new capture is needed for another number of sequences or queries, or where ``room`` is too small.
    """

    def __init__(self, pool: CodedPages, q: Any, sequences: Sequences, raw: RawTokens | None, **options: Any) -> None:
        import torch

        lists, lengths = pool._checked(q, sequences, raw)
        self._pool, views = pool, None
        counts = torch.tensor(lengths, dtype=torch.int32, device=pool.device)
        if raw is not None:
            for name, x, ndim in (("block_tables", raw.block_tables, 2), ("lengths", raw.lengths, 1)):
                if not is_torch(x) or (x.dtype, x.ndim, x.device) != (torch.int32, ndim, pool.device) or x.stride(-1) != 1:
                    shape = "[sequences, n]" if ndim == 2 else "[sequences]"
                    raise InvalidArgument(
                        f"{name}: a tensor int32 {shape} on {pool.device} is expected, which is read at every run"
                    )
            views, counts = (*views_of(raw.kv_cache, raw.layout), raw.block_tables), raw.lengths
        short = [n for n, some in enumerate(lists) if lengths[n] - segment_tokens(some) < q.shape[2] and q.shape[2] > 1]
        if short:
            raise BackendUnavailable(f"sequence {short[0]}: on a GPU the tokens of several queries are not encoded yet")
        pairs = [[segment.pair for segment in some] for some in lists]
        self._way = AttendPages(q, pairs, (pool.keys, pool.values), views, counts, backend=pool._backend, **options)

    @property
    def out(self) -> Any:
        """What ``run`` fills: like the queries."""
        return self._way.out

    def run(self, q: Any = None) -> Any:
        """Attend with the queries that were prepared, or with others like them; returns ``out``. Waits for nothing."""
        return self._way.run(q)

    def place(self, sequences: Mapping[int, Sequence[Segment]]) -> None:
        """Give some sequences, by their numbers in the batch, these segments from now on; the others keep theirs.

        Raises InvalidArgument where there is no room for them.
        """
        lists = self._pool._segments(sequences)
        self._way.place({n: [segment.pair for segment in some] for n, some in zip(sequences, lists, strict=True)})


def _as_stream(x: Any) -> Any:
    """A stream uint8 [bytes] as ``encode_blocks`` gives it: bytes in host memory, a tensor elsewhere."""
    return x.numpy().tobytes() if x.device.type == "cpu" else x


def _bytes_of(stream: Any, device: Any) -> Any:
    """A stream as a uint8 tensor [bytes] on a device; raises InvalidArgument, and what reading a header raises."""
    import torch

    if is_torch(stream) and (stream.dtype != torch.uint8 or stream.ndim != 1 or not stream.is_contiguous()):
        raise InvalidArgument(
            f"a stream is a contiguous uint8 tensor [bytes]; this one is {stream.dtype} {tuple(stream.shape)}"
        )
    return stream_on(stream, device)
