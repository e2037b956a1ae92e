"""Encoded pages: attention to them is attention to what they decode to, wherever they lie, and what is wrong is named."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, bits, gaussian, needs_triton

import pqcodec
from pqcodec import Rope, codec
from pqcodec.errors import BackendUnavailable, CorruptStream, InvalidArgument
from pqcodec.formats.offload import LAYOUTS, CodedPages, RawTokens, Segment, gather_blocks

BLOCKS, HEADS, GROUP, DIM = 14, 2, 2, 64
ROPE = Rope(theta=1e4)
FUSED = LAYOUTS[0]


def cache_of(layout: str, block: int, dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> Any:
    """An engine's cache of a layout, full of tokens."""
    sizes = {"2": 2, "blocks": blocks, "block": block, "heads": HEADS, "dim": DIM}
    shape = [sizes[name] for name in layout.split(",")]
    made = [gaussian(*shape, seed=i, dtype=dtype) for i in range(2)]
    return made[0] if "2" in layout.split(",") else tuple(made)


def pool_of(block: int, backend: str = "cpu", **options: Any) -> CodedPages:
    return CodedPages(16, block, HEADS, DIM, **{"dtype": "float32", "rope": ROPE, "backend": backend, **options})


def queries(sequences: int, count: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return gaussian(sequences, HEADS * GROUP, count, DIM, seed=7, dtype=dtype)


def softmax(q: torch.Tensor, pairs: list[Any], window: int | None = None, softcap: float | None = None) -> torch.Tensor:
    """Attention in float32 to keys and values [heads, n, dim] that follow each other, as the formula has it."""
    keys, values = (torch.cat([pair[i].float() for pair in pairs], 1).repeat_interleave(GROUP, 0) for i in (0, 1))
    scores = q.float() @ keys.mT * DIM**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    token, own = torch.arange(keys.shape[1]), keys.shape[1] - q.shape[1] + torch.arange(q.shape[1])[:, None]
    seen = token <= own
    if window:
        seen &= token > own - window
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values


def decoded(pool: CodedPages, segment: Segment) -> list[torch.Tensor]:
    return [pqcodec.decode(stream) for stream in pool.get(segment)]


def check(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-3) -> None:
    error = float((found.float() - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance, error


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_is_that_to_what_pages_decode_to(layout: str, block: int) -> None:
    """Three sequences of other lengths, the first two with one prefix, pages in any order, the third without a page."""
    pool, cache = pool_of(block), cache_of(layout, block)
    tables = [[7, 3, 11, 0], [7, 3, 2, 9], [5, 6]]
    lengths = [3 * block + 5, 2 * block + 1, block + 9]
    prefix = pool.put_blocks(cache, layout, tables[0], 2 * block, [13, 4])
    more = pool.put_blocks(cache, layout, tables[0], block, [6], first_token=2 * block)
    q = queries(3)
    found = pool.attend(q, [[prefix, more], [prefix], []], RawTokens(cache, layout, tables, lengths))
    raw = [
        gather_blocks(cache, layout, tables[n], lengths[n] - at, first_token=at)
        for n, at in enumerate((3 * block, 2 * block, 0))
    ]
    coded = [[decoded(pool, prefix), decoded(pool, more)], [decoded(pool, prefix)], []]
    assert found.shape == q.shape
    for n in range(3):
        check(found[n], softmax(q[n], [*coded[n], raw[n]]))


def test_pages_hold_more_tokens_than_blocks_and_begin_anywhere() -> None:
    """Pages of 64 tokens of blocks of 16, behind four exact tokens; what is raw begins within a block."""
    pool, cache = pool_of(64), cache_of(FUSED, 16)
    table = [3, 1, 13, 0, 5, 6, 12, 8, 2]
    segment = pool.put_blocks(cache, FUSED, table, 4 + 128, [9, 2], exact_tokens=4)
    assert (segment.tokens, segment.pages) == (132, [9, 2])
    found = pool.attend(queries(1, 3), [[segment]], RawTokens(cache, FUSED, torch.tensor([table]), torch.tensor([140])))
    raw = gather_blocks(cache, FUSED, table, 8, first_token=132)
    check(found[0], softmax(queries(1, 3)[0], [decoded(pool, segment), raw]))
    first = [x[:, :4] for x in gather_blocks(cache, FUSED, table, 4)]
    assert all((bits(a[:, :4]) == bits(b)).all() for a, b in zip(decoded(pool, segment), first, strict=True))


@pytest.mark.parametrize("options", [{"window": 20}, {"window": 1}, {"softcap": 2.0}, {"window": 70, "softcap": 0.5}], ids=str)
def test_windows_and_softcaps_count_all_tokens(options: dict[str, Any]) -> None:
    pool, cache = pool_of(32), cache_of(FUSED, 32)
    segment = pool.put_blocks(cache, FUSED, [4, 2], 64, [0, 1])
    q = queries(1, 2)
    found = pool.attend(q, [[segment]], RawTokens(cache, FUSED, [[4, 2, 9]], [70]), **options)
    raw = gather_blocks(cache, FUSED, [4, 2, 9], 6, first_token=64)
    check(found[0], softmax(q[0], [decoded(pool, segment), raw], **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["quad2", ("pq4", "quad2.5"), "pq3"], ids=str)
def test_presets_and_dtypes_agree_between_backends(preset: Any, dtype: torch.dtype) -> None:
    cache, q = cache_of(FUSED, 16, dtype), queries(1)
    results = []
    for backend in ("reference", "cpu"):
        pool = pool_of(16, backend, preset=preset, dtype=dtype)
        segment = pool.put_blocks(cache, FUSED, [1, 2], 32, [3, 0])
        results.append(pool.attend(q, [[segment]]))
        wanted = softmax(q[0], [decoded(pool, segment)])
        check(results[-1][0], wanted, 1e-3 if dtype == torch.float16 else 8e-3)  # decoded numbers are rounded to the dtype
    check(*results)


def test_streams_come_back_bit_for_bit() -> None:
    """Also with a last page that is not full, and out of pages that are in another order than before."""
    pool = pool_of(16)
    x = gaussian(2, HEADS, 57, DIM)
    options = {"chunk_tokens": 16, "exact_tokens": 3}
    streams = [
        pqcodec.encode(x[0], preset="quad3", center="rope", rope=Rope(first_position=80), **options),
        pqcodec.encode(x[1], preset="quad3", **options),
    ]
    segment = pool.put(streams, [5, 12, 0, 7])
    assert pool.get(segment) == tuple(streams)
    again = pool.put(pool.get(segment), torch.tensor([1, 2, 8, 3]))
    assert pool.get(again) == tuple(streams)
    found = pool.attend(queries(1), [[again]])
    check(found[0], softmax(queries(1)[0], [decoded(pool, segment)]))


@pytest.mark.parametrize("rope", [ROPE, Rope(first_position=5), None], ids=str)
def test_a_segment_that_goes_on_is_one_stream(rope: Rope | None, backend: str) -> None:
    """Its new tokens are centred by the mean that it has, and its first ones are shared with a segment of their own."""
    pool, cache = pool_of(16, backend, rope=rope), cache_of(FUSED, 16)
    table = [7, 3, 11, 0, 9]
    begun = pool.put_blocks(cache, FUSED, table, 3 + 16, [5], exact_tokens=3)
    grown = pool.put_blocks(cache, FUSED, table, 32, [2, 9], first_token=19, after=begun)
    other = pool.put_blocks(cache, FUSED, table[::-1], 16, [1], first_token=19, after=begun)
    assert (grown.tokens, grown.pages, other.pages, begun.pages) == (51, [5, 2, 9], [5, 1], [5])
    whole, before = decoded(pool, grown), decoded(pool, begun)
    exact = gather_blocks(cache, FUSED, table, 51)
    for x, y, z in zip(whole, before, exact, strict=True):
        assert (bits(x[:, :19]) == bits(y)).all()
        assert float((x - z).norm() / z.norm()) < 0.3
    for stream, first in zip(pool.get(grown), pool.get(begun), strict=True):
        assert pqcodec.verify(stream) == []
        means = codec.means(stream)
        assert means is None or (means == codec.means(first)).all()
    raw = RawTokens(cache, FUSED, [table, table[::-1]], [60, 40])
    found = pool.attend(queries(2), [[grown], [other]], raw)
    check(found[0], softmax(queries(2)[0], [whole, gather_blocks(cache, FUSED, table, 9, first_token=51)]))
    check(found[1], softmax(queries(2)[1], [decoded(pool, other), gather_blocks(cache, FUSED, table[::-1], 5, first_token=35)]))
    shared = grown.first(35)
    assert shared.pages == [5, 2]
    assert all((bits(x) == bits(y[:, :35])).all() for x, y in zip(decoded(pool, shared), whole, strict=True))
    assert pool.get(grown.first(51)) == pool.get(grown)
    assert decoded(pool, grown.first(3))[0].shape == (HEADS, 3, DIM)


def test_segments_that_cannot_go_on_are_refused() -> None:
    pool, cache = pool_of(16), cache_of(FUSED, 16)
    segment = pool.put_blocks(cache, FUSED, [7, 3], 32, [5, 6])
    part = pool.put_blocks(cache, FUSED, [7, 3], 20, [8, 9])
    few = pool.put_blocks(cache, FUSED, [7], 3, [], exact_tokens=4)
    unknown = pool.put(pool.get(segment), [10, 11])
    wanted: dict[str, Any] = {"block_table": [7, 3, 1], "tokens": 16, "pages": [4], "first_token": 32, "after": segment}
    for change, words in (
        ({"exact_tokens": 2}, "exact_tokens is 2"),
        ({"after": part, "first_token": 20}, "20 encoded tokens"),
        ({"after": few, "first_token": 3}, "3 of 4 exact ones"),
        ({"pages": [6]}, "page 6, which holds tokens of the segment"),
        ({"first_token": 16}, "ends before token 32, not 16"),
        ({"after": unknown, "first_token": 16}, "ends at position 32, token 16 is at 16"),
        ({"after": 3}, "after is a int"),
        ({"pages": [4, 2]}, "take 1 pages of 16; 2 are named"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            pool.put_blocks(cache, FUSED, **{**wanted, **change})
    for tokens in (-16, 8, 33, 48):
        with pytest.raises(InvalidArgument, match="whole pages of 16"):
            segment.first(tokens)


def test_segments_stand_where_their_tokens_are() -> None:
    """Else what is behind them would be read from the wrong blocks."""
    pool, cache = pool_of(16), cache_of(FUSED, 16)
    first = pool.put_blocks(cache, FUSED, [7, 3], 16, [5])
    second = pool.put_blocks(cache, FUSED, [7, 3], 16, [6], first_token=16)
    for segments, words in (([second], "token 16, 0 is the next"), ([first, first], "token 0, 16 is the next")):
        with pytest.raises(InvalidArgument, match=words):
            pool.attend(queries(1), [segments])
    again = [pool.put(pool.get(second), [8], first_token=16), pool.put(pool.get(second), [9])]
    wanted = pool.attend(queries(1), [[first, second]])
    for segment in again:  # where it is not told, the caller knows
        assert torch.equal(pool.attend(queries(1), [[first, segment]]), wanted)


def test_a_segment_whose_pages_were_put_again_is_refused() -> None:
    pool, cache = pool_of(16), cache_of(FUSED, 16)
    old = pool.put_blocks(cache, FUSED, [1, 2], 32, [3, 0])
    kept = pool.put_blocks(cache, FUSED, [4], 16, [7])
    new = pool.put_blocks(cache, FUSED, [4, 5, 6], 32, [0, 2], first_token=16)  # page 0 was freed
    for call in (pool.get, pool.verify, lambda segment: pool.attend(queries(1), [[segment]])):
        with pytest.raises(InvalidArgument, match="page 0 was put again"):
            call(old)
        with pytest.raises(InvalidArgument, match="page 0 was put again"):
            call(old.first(32))
    assert pool.get(old.first(16))  # page 3 holds what it held
    found = pool.attend(queries(1), [[kept, new]])
    check(found[0], softmax(queries(1)[0], [decoded(pool, kept), decoded(pool, new)]))


def test_damage_is_named_and_nothing_is_written() -> None:
    pool, cache = pool_of(16), cache_of(FUSED, 16)
    good = pool.put_blocks(cache, FUSED, [1, 2], 32, [3, 0])
    streams = pool.get(good)
    for side, at in ((0, -9), (1, -9), (0, 300)):  # rows, and an offset
        damaged = list(streams)
        data = bytearray(streams[side])
        data[at] ^= 4
        damaged[side] = bytes(data)
        with pytest.raises(CorruptStream):
            pool.put(damaged, [3, 0])
    assert pool.get(good) == streams  # not overwritten, and not refused
    pool.values[0, 100] ^= 1
    assert [str(found) for found in pool.verify(good)] == ["payload, leading index 0, tokens 16 .. 31"]
    with pytest.raises(CorruptStream, match="tokens 16"):
        pool.attend(queries(1), [[good]], check=True)
    with pytest.raises(CorruptStream):
        pool.put([streams[0][:-1], streams[1]], [3, 0])


def test_wrong_pages_are_refused() -> None:
    pool, cache = pool_of(16), cache_of(FUSED, 16)
    for pages, words in (
        ([3], "take 2 pages of 16; 1 are named"),
        ([3, 16], "page 16, the pool has pages 0 .. 15"),
        ([-1, 3], "names page -1"),
        ([3, 3], "page 3 twice"),
        ([0.5, 1.0], "a list of page numbers"),
        ([[0, 1]], "a list of page numbers"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            pool.put_blocks(cache, FUSED, [1, 2], 32, pages)
    assert not pool.keys.any()


def test_streams_of_another_pool_or_kind_are_refused() -> None:
    pool = pool_of(16)
    x = gaussian(HEADS, 32, DIM)
    keys = pqcodec.encode(x, preset="quad3", center="rope", rope=ROPE, chunk_tokens=16)
    values = pqcodec.encode(x, preset="quad3", chunk_tokens=16)
    bad = torch.full((HEADS, 32, DIM), torch.nan)
    for streams, words in (
        ((keys,), "a pair of streams"),
        (keys, "a pair of streams"),
        ((keys, keys), "values was encoded by other options than the pool's: means or none"),
        ((keys, pqcodec.encode(x, preset="quad3")), "values has chunks of 64 tokens"),
        ((keys, pqcodec.encode(x.half(), preset="quad3", chunk_tokens=16)), "holds float16"),
        ((keys, pqcodec.encode(x[:1], preset="quad3", chunk_tokens=16)), "values holds float32"),
        ((keys, pqcodec.encode(x[:, :31], preset="quad3", chunk_tokens=16)), "values 31 and 0"),
        ((keys, pqcodec.encode(bad, preset="quad3", chunk_tokens=16, nonfinite="exact")), "64 exact vectors"),
        ((torch.zeros(4, 4, dtype=torch.uint8), values), "contiguous uint8 tensor"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            pool.put(streams, [0, 1])
    segment = pool.put((keys, values), [0, 1])
    with pytest.raises(InvalidArgument, match="of another pool"):
        pool_of(16).attend(queries(1), [[segment]])
    with pytest.raises(InvalidArgument, match="is a int"):
        pool.attend(queries(1), [[5]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pages": 0}, "pages is 0"),
        ({"block": 2.5}, "block is 2.5"),
        ({"dtype": "int8"}, "dtype int8"),
        ({"preset": ("quad3",)}, "1 are given for 2"),
        ({"preset": "kivi2-key"}, "codes .* tokens together"),
        ({"center": "median"}, "center 'median'"),
        ({"pages": 1 << 31}, "below 2.31"),
    ],
    ids=str,
)
def test_pools_that_cannot_be_are_refused(change: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = {"pages": 4, "block": 24, "kv_heads": HEADS, "head_dim": DIM, **change}
    with pytest.raises(InvalidArgument, match=words):
        CodedPages(options.pop("pages"), options.pop("block"), options.pop("kv_heads"), options.pop("head_dim"), **options)


def test_queries_and_caches_that_do_not_fit_are_refused() -> None:
    pool, cache = pool_of(16), cache_of(FUSED, 16)
    segment = pool.put_blocks(cache, FUSED, [1, 2], 32, [3, 0])
    raw = RawTokens(cache, FUSED, [[1, 2, 4]], [40])
    wrong: list[tuple[str, Any, Any, Any]] = [
        ("q: torch.float32", queries(1)[0], [[segment]], raw),
        ("q: ndarray", queries(1).numpy(), [[segment]], raw),
        ("2 sequences of queries", queries(2), [[segment]], raw),
        ("2 of segments", queries(1), [[segment], []], raw),
        ("31 tokens; 32 are in its segments", queries(1), [[segment]], RawTokens(cache, FUSED, [[1, 2]], [31])),
        ("50 queries", queries(1, 50), [[segment]], raw),
        ("lengths is float64", queries(1), [[segment]], RawTokens(cache, FUSED, [[1, 2]], [31.5])),
        ("2 block tables", queries(1), [[segment]], RawTokens(cache, FUSED, [[1, 2], [3]], [40])),
        ("block_table names 2", queries(1), [[segment]], RawTokens(cache, FUSED, [[1, 2]], [40])),
        ("names block 99", queries(1), [[segment]], RawTokens(cache, FUSED, [[1, 2, 99]], [40])),
        ("heads, head_dim, dtype", queries(1), [[segment]], RawTokens(cache.half(), FUSED, [[1, 2, 4]], [40])),
        ("layout 'NHD'", queries(1), [[segment]], RawTokens(cache, "NHD", [[1, 2, 4]], [40])),
        ("0 tokens; 0 are in its segments", queries(1), [[]], None),
    ]
    for words, q, sequences, tokens in wrong:
        with pytest.raises(InvalidArgument, match=words):
            pool.attend(q, sequences, tokens)
    table = [-1, -1, 4]  # blocks whose tokens are encoded may be free already
    check(
        pool.attend(queries(1), [[segment]], RawTokens(cache, FUSED, [table], [40])),
        pool.attend(queries(1), [[segment]], raw),
    )
    with pytest.raises(BackendUnavailable, match=r"call attend\(\)"):
        pool.prepare(queries(1), [[segment]], raw)


@needs_triton
def test_a_device_without_the_kernel_says_so() -> None:
    """Pages are encoded, checked and read back by Triton's kernels; attention is refused, and what no kernel could take."""
    cache = cache_of(FUSED, 16).to(DEVICE)
    pool = pool_of(16, "triton", device=DEVICE)
    segment = pool.put_blocks(cache, FUSED, [1, 2], 32, [3, 0])
    streams = pool.get(segment)
    assert pool.verify(segment) == []
    assert [pqcodec.decode(x, backend="triton").shape for x in streams] == [(HEADS, 32, DIM)] * 2
    grown = pool.put_blocks(cache, FUSED, [1, 2, 5], 16, [7], first_token=32, after=segment)
    before, after = (pqcodec.decode(pool.get(each)[0], backend="triton") for each in (segment, grown))
    assert torch.equal(after[:, :32], before)
    q, tables, lengths = queries(1).to(DEVICE), torch.zeros((1, 3), dtype=torch.int32, device=DEVICE), [40]
    counts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    with pytest.raises(BackendUnavailable, match="only backend 'cuda' reads codes"):
        pool.attend(q, [[segment]], RawTokens(cache, FUSED, tables, counts))
    with pytest.raises(BackendUnavailable, match="no window"):
        pool.attend(q, [[segment]], RawTokens(cache, FUSED, tables, counts), window=3)
    with pytest.raises(BackendUnavailable, match="several queries are not encoded"):
        pool.prepare(queries(1, 9).to(DEVICE), [[segment]], RawTokens(cache, FUSED, tables, counts))
    for raw, words in (
        (RawTokens(cache, FUSED, tables.long(), counts), "block_tables: a tensor int32"),
        (RawTokens(cache, FUSED, tables, lengths), "lengths: a tensor int32"),
        (RawTokens(cache, FUSED, tables[0], counts), "3 block tables"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            pool.prepare(q, [[segment]], raw)
    for wrong in (q[..., :32], q.double(), q[:, :3]):
        with pytest.raises(InvalidArgument, match="do not go with keys"):
            pool.prepare(wrong, [[segment]])


# -- what the CUDA kernel is told ------------------------------------------------------------------------------------
def bytes_at(address: int, count: int) -> bytes:
    return ctypes.string_at(address, count)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernel_of_pages_compiles_and_keeps_its_loop_in_registers(architecture: int) -> None:
    pytest.importorskip("cuda.bindings")
    pytest.importorskip("triton")
    from launch_shapes import local_bytes

    from pqcodec.kernels.on_cuda.attention import AttentionKind, attention_definitions, attention_layout
    from pqcodec.kernels.on_cuda.backend import header_of_kind
    from pqcodec.kernels.on_cuda.compiled import compiled

    pool = CodedPages(1, 64, HEADS, 128, rope=ROPE)
    kind = AttentionKind(*map(header_of_kind, pool._like), rows=4, queries=1, query_dtype=pool._like[0].dtype, paged=True)
    layout = attention_layout(kind)
    try:
        code = compiled("attention.cu", attention_definitions(kind, layout), f"sm_{architecture}")
    except BackendUnavailable as missing:
        if "NVRTC" not in str(missing):
            raise
        pytest.skip(f"no NVRTC here: {missing}")
    assert local_bytes(code)["attend"]["stack"] <= 64  # a few addresses, which a tile loads again


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kernels_tables_lead_to_every_byte(layout: str) -> None:
    """Addresses that ``attention.cu`` would compute, followed in host memory: blocks, means, exact tokens and raw ones."""
    pytest.importorskip("cuda.bindings")
    from pqcodec.formats.engines.block_tables import views_of
    from pqcodec.kernels.on_cuda.attention import FIELDS, PAGED_FIELDS
    from pqcodec.kernels.on_cuda.paged_attention import RawBlocks, paged_shares

    pool, cache = pool_of(32), cache_of(layout, 16)
    tables = torch.tensor([[7, 3, 11, 0, 5, 6, 2], [7, 3, 11, 0, 9, 13, 1], [8, 4, 12, 10, 1, 1, 1]], dtype=torch.int32)
    prefix = pool.put_blocks(cache, layout, tables[0], 4 + 64, [13, 4], exact_tokens=4)
    more = pool.put_blocks(cache, layout, tables[0], 32, [6], first_token=68)
    sequences, lengths = [[prefix, more], [prefix], [pool._empty]], [104, 80, 5]
    raw = RawBlocks.of(*views_of(cache, layout), tables)
    room, splits = 5, 4
    numbers = np.zeros((3, room), np.int32)
    pools = pool.keys.data_ptr(), pool.values.data_ptr()
    pairs = {n: [segment.pair for segment in some] for n, some in enumerate(sequences)}
    rows, numbers[:] = paged_shares(pairs, pools, numbers.ctypes.data, room, raw, splits)
    some = paged_shares({2: pairs[2], 0: pairs[0]}, pools, numbers.ctypes.data, room, raw, splits)
    assert all((x == y[[2, 0]]).all() for x, y in zip(some, (rows, numbers), strict=True))
    assert rows.shape == (3, splits + 1, len(FIELDS) + len(PAGED_FIELDS))
    for n, segments in enumerate(sequences):
        streams = [pool.get(segment) for segment in segments]
        taken = []
        for row in rows[n, :-1]:
            for chunk in range(row[FIELDS.first_chunk], row[FIELDS.last_chunk]):
                page = ctypes.c_int32.from_address(int(row[PAGED_FIELDS.pages]) + 4 * chunk).value
                number = next(i for i, s in enumerate(segments) if page in s.pages)
                assert segments[number].pages[chunk] == page
                taken.append((number, chunk))
                h = segments[number].keys.header
                assert row[FIELDS.position] == h.rope.first_position + h.first_tokens
                assert row[FIELDS.coded] == h.coded_tokens
                for side, base in enumerate((FIELDS.k_payload, FIELDS.v_payload)):
                    h, data = segments[number].pair[side].header, streams[number][side]
                    for head in range(HEADS):
                        size = h.blocks.size(chunk)
                        at = int(row[base]) + page * HEADS * h.blocks.chunk_bytes + head * size
                        place = h.blocks.place(chunk, head)
                        assert bytes_at(at, size) == data[place : place + size]
                keys = streams[number][0]
                head = segments[number].keys.header
                assert bytes_at(int(row[FIELDS.k_means]), 2 * DIM) == keys[head.header_bytes : head.header_bytes + 2 * DIM]
                assert bytes_at(int(row[FIELDS.k_exponent]), 2) == keys[40:42]
        assert taken == [(i, chunk) for i, s in enumerate(segments) for chunk in range(len(s.pages))]
        last = rows[n, -1]
        assert last[PAGED_FIELDS.raw_first] == sum(s.tokens for s in segments)
        assert last[FIELDS.exact] == segments[0].keys.header.first_tokens
        for side, (base, exact) in enumerate(((FIELDS.k_recent, FIELDS.k_exact), (FIELDS.v_recent, FIELDS.v_exact))):
            block_stride = (PAGED_FIELDS.k_raw_block, PAGED_FIELDS.v_raw_block)[side]
            token_stride, head_stride = ((FIELDS.k_stride, FIELDS.k_head_stride), (FIELDS.v_stride, FIELDS.v_head_stride))[side]
            whole = gather_blocks(cache, layout, tables[n], lengths[n])[side].numpy()
            for head in range(HEADS):
                for token in range(int(last[PAGED_FIELDS.raw_first]), lengths[n]):
                    column, slot = divmod(token, int(last[PAGED_FIELDS.raw_block]))
                    block = ctypes.c_int32.from_address(int(last[PAGED_FIELDS.raw_table]) + 4 * column).value
                    at = int(last[base]) + head * int(last[head_stride]) + block * int(last[block_stride])
                    assert bytes_at(at + slot * int(last[token_stride]), 4 * DIM) == whole[head, token].tobytes()
                for token in range(int(last[FIELDS.exact])):
                    at = int(last[exact]) + head * int(last[FIELDS.exact_head_stride]) + token * 4 * DIM
                    assert bytes_at(at, 4 * DIM) == whole[head, token].tobytes()
        assert (last[PAGED_FIELDS.raw_columns], last[PAGED_FIELDS.raw_blocks]) == (7, BLOCKS)
