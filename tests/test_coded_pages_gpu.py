"""Encoded pages on a GPU: attention to them is that to what they decode to, and graphs see new tokens, tables and pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import needs_cuda
from test_attention_gpu import with_turning_mean

import pqcodec
from pqcodec import Rope
from pqcodec.errors import BackendUnavailable, CorruptStream, InvalidArgument
from pqcodec.formats.offload import LAYOUTS, CodedPages, RawTokens, Segment, gather_blocks, scatter_blocks

pytestmark = needs_cuda
CUDA = torch.device("cuda", 0)
FUSED = LAYOUTS[0]
ROPE = Rope(theta=1e4)
# Of the largest number of a result: as in test_attention_gpu, and what decoding rounds to the dtype, which the kernel does not.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


class Engine:
    """An engine's cache of one layer, a pool of pages beside it, and sequences whose first tokens are in both.

    ``coded``: tokens of each sequence in pages; ``raw``: those behind them. All blocks and pages are in another order than
    their tokens.
    """

    def __init__(
        self,
        layout: str = FUSED,
        coded: tuple[int, ...] = (256, 64, 0),
        raw: tuple[int, ...] = (7, 70, 40),
        page: int = 64,
        block: int = 16,
        heads: int = 2,
        group: int = 4,
        dim: int = 128,
        dtype: torch.dtype = torch.float32,
        queries: int = 1,
        exact: int = 0,
        **options: Any,
    ) -> None:
        torch.manual_seed(dim + block)
        self.lengths = [a + b for a, b in zip(coded, raw, strict=True)]
        needed = [-(-(n + 2 * block) // block) for n in self.lengths]  # room for more tokens
        blocks = torch.randperm(sum(needed) + 3).tolist()
        self.tables = [[blocks.pop() for _ in range(n)] for n in needed]
        sizes = {"2": 2, "blocks": sum(needed) + 3, "block": block, "heads": heads, "dim": dim}
        shape = [sizes[name] for name in layout.split(",")]
        made = [torch.zeros(shape, dtype=dtype, device=CUDA) for _ in range(1 if "2" in layout.split(",") else 2)]
        self.cache: Any = made[0] if len(made) == 1 else tuple(made)
        self.layout, self.heads, self.group, self.dim, self.dtype = layout, heads, group, dim, dtype
        options = {"rope": ROPE, **options}
        for n, tokens in enumerate(needed):
            keys = with_turning_mean((heads, tokens * block, dim))
            pair = [x.to(dtype).to(CUDA) for x in (keys, torch.randn(heads, tokens * block, dim) + 0.3)]
            scatter_blocks(pair, self.cache, layout, self.tables[n])
        pages = sum((n - exact) // page for n in coded if n) + 3
        self.numbers = torch.randperm(pages).tolist()
        self.pool = CodedPages(pages, page, heads, dim, dtype=dtype, device=CUDA, **options)
        self.sequences = [[self.put(n, 0, tokens, exact)] if tokens else [] for n, tokens in enumerate(coded)]
        self.q = torch.randn(len(coded), heads * group, queries, dim).to(dtype).to(CUDA)

    def put(self, n: int, first: int, tokens: int, exact: int = 0, after: Segment | None = None) -> Segment:
        pages = [self.numbers.pop() for _ in range((tokens - exact) // self.pool.block)]
        where = self.cache, self.layout, self.tables[n], tokens, pages
        return self.pool.put_blocks(*where, first_token=first, exact_tokens=exact, after=after)

    def raw(self) -> RawTokens:
        """Tables and lengths as an engine has them: on the GPU, int32."""
        widest = max(map(len, self.tables))
        rows = [table + [-1] * (widest - len(table)) for table in self.tables]
        tables, lengths = (torch.tensor(x, dtype=torch.int32, device=CUDA) for x in (rows, self.lengths))
        return RawTokens(self.cache, self.layout, tables, lengths)

    def wanted(self, n: int, scale: float | None = None, softcap: float | None = None) -> torch.Tensor:
        """Attention of a sequence in float32 to what its pages decode to and to its raw tokens."""
        segments = self.sequences[n]
        parts = [[pqcodec.decode(stream.cpu().numpy().tobytes()) for stream in self.pool.get(segment)] for segment in segments]
        coded = sum(segment.tokens for segment in segments)
        found = gather_blocks(self.cache, self.layout, self.tables[n], self.lengths[n] - coded, first_token=coded)
        pairs = [*parts, [x.cpu() for x in found]]
        keys, values = (torch.cat([p[i].float() for p in pairs], 1).repeat_interleave(self.group, 0) for i in (0, 1))
        scores = self.q[n].cpu().float() @ keys.mT * (self.dim**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        queries, tokens = scores.shape[-2:]
        hidden = torch.arange(tokens) > tokens - queries + torch.arange(queries)[:, None]
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values

    def agrees(self, found: torch.Tensor, **options: Any) -> None:
        for n, got in enumerate(found.cpu()):
            wanted = self.wanted(n, **options)
            error = float((got.float() - wanted).abs().max() / wanted.abs().max())
            told = f"sequence {n} of {self.lengths[n]} tokens, {sum(s.tokens for s in self.sequences[n])} encoded: {error:.2e}"
            assert error <= TOLERANCE[self.dtype] * max((options.get("scale") or 0) * self.dim**0.5, 1), told

    def attend(self, **options: Any) -> None:
        """Twice the same bits, and those that decoding leads to."""
        found = [self.pool.attend(self.q, self.sequences, self.raw(), **options).clone() for _ in range(2)]
        assert torch.equal(*found)
        assert found[0].dtype == self.dtype
        self.agrees(found[0], **options)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_decoding(layout: str, block: int) -> None:
    Engine(layout, block=block).attend()


@pytest.mark.parametrize("preset", ["quad2", "quad2.5", "quad3", "quad3.5"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_rate_agrees_with_decoding(preset: str, dim: int) -> None:
    Engine(preset=preset, dim=dim).attend()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"rope": None},
        {"rope": None, "center": "mean"},
        {"preset": ("quad3", "quad2.5")},
        {"rope": Rope(theta=5e5, style="interleaved", first_position=123456)},
        {"group": 1},
        {"group": 7},
        {"group": 16, "heads": 1},
        {"queries": 4},
        {"exact": 4, "coded": (260, 68, 0)},
        {"page": 16, "coded": (256, 48, 16)},
        {"page": 32, "coded": (256, 32, 0)},
        {"page": 128, "coded": (4096, 128, 0)},
        {"coded": (64,) * 40, "raw": tuple(range(1, 41))},
        {"coded": (8192,), "raw": (1,)},
    ],
    ids=str,
)
def test_every_option_agrees_with_decoding(options: dict[str, Any]) -> None:
    Engine(**options).attend()


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"scale": 0.3}], ids=str)
def test_arguments_agree_with_decoding(options: dict[str, Any]) -> None:
    Engine().attend(**options)


def test_sequences_share_a_prefix_and_go_on_in_segments_of_their_own() -> None:
    engine = Engine(coded=(192, 0, 64), raw=(128, 200, 70))
    prefix = engine.sequences[0][0]
    engine.tables[1][:12] = engine.tables[0][:12]  # as an engine shares blocks
    engine.sequences[1] = [prefix]
    engine.sequences[0] = [prefix, engine.put(0, 192, 64)]
    engine.attend()


def test_a_segment_goes_on_as_one_stream() -> None:
    """Its new tokens are centred by the mean that it has; another sequence shares its first pages."""
    engine = Engine(coded=(132, 68), raw=(130, 70), exact=4)
    begun = engine.sequences[0][0]
    before = engine.pool.get(begun)
    grown = engine.put(0, 132, 64, after=begun)
    assert (grown.tokens, grown.pages[:2]) == (196, begun.pages)
    streams = engine.pool.get(grown)
    for stream, first in zip(streams, before, strict=True):
        data = stream.cpu().numpy().tobytes()
        assert pqcodec.verify(data) == []
        assert torch.equal(pqcodec.decode(data)[:, :132], pqcodec.decode(first.cpu().numpy().tobytes()))
    engine.tables[1][:8] = engine.tables[0][:8]
    engine.sequences = [[grown], [grown.first(68)]]
    engine.attend()


def test_pages_alone_need_no_cache() -> None:
    engine = Engine(coded=(128, 64), raw=(0, 0))
    engine.agrees(engine.pool.attend(engine.q, engine.sequences))


def test_a_captured_graph_sees_new_tokens_tables_and_pages() -> None:
    """What an engine changes in place between steps, and what ``place`` tells, without another capture."""
    engine = Engine(coded=(256, 64, 0), raw=(70, 70, 40))
    raw = engine.raw()
    prepared = engine.pool.prepare(engine.q, engine.sequences, raw, room=(6, 3))
    prepared.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()

    def check(told: str) -> None:
        prepared.out.zero_()
        graph.replay()
        try:
            engine.agrees(prepared.out)
        except AssertionError as error:
            raise AssertionError(f"after {told}: {error}") from None

    check("the capture")
    for n in range(3):  # a token more of each sequence
        pair = [torch.randn(engine.heads, 1, engine.dim, device=CUDA) for _ in range(2)]
        scatter_blocks(pair, engine.cache, engine.layout, engine.tables[n], first_token=engine.lengths[n])
        engine.lengths[n] += 1
    raw.lengths.add_(1)
    check("a token more")
    old, new = engine.tables[1][-3], next(b for b in range(1000) if all(b not in table for table in engine.tables))
    for x in (engine.cache[0], engine.cache[1]):
        x[new] = x[old]
    engine.tables[1][-3] = new
    raw.block_tables[1, len(engine.tables[1]) - 3] = new
    check("a block that moved")
    engine.sequences[0] = [*engine.sequences[0], engine.put(0, 256, 64)]
    prepared.place({0: engine.sequences[0]})
    check("a page more")
    engine.sequences[1] = [engine.put(1, 64, 64, after=engine.sequences[1][0])]
    prepared.place({1: engine.sequences[1]})
    check("a segment that went on")
    engine.sequences[1], engine.tables[1], engine.lengths[1] = engine.sequences[0], engine.tables[0], engine.lengths[0]
    raw.block_tables[1] = raw.block_tables[0]
    raw.lengths[1] = raw.lengths[0]
    prepared.place(dict(enumerate(engine.sequences)))
    check("another sequence in the place of one that ended")
    engine.q.neg_()
    check("other queries")


def test_a_block_outside_of_the_cache_is_no_number_and_harms_nobody() -> None:
    engine = Engine()
    raw = engine.raw()
    prepared = engine.pool.prepare(engine.q, engine.sequences, raw)
    kept = prepared.run()[[0, 2]].clone()
    for bad in (-1, 1 << 30):
        raw.block_tables[1, 64 // 16] = bad  # the first raw block of sequence 1
        found = prepared.run()
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2]], kept)


def test_streams_come_back_bit_for_bit_and_go_to_another_pool() -> None:
    engine = Engine(coded=(256,), raw=(9,), dtype=torch.float16)
    segment = engine.sequences[0][0]
    streams = engine.pool.get(segment)
    assert all(stream.is_cuda for stream in streams)
    on_host = CodedPages(4, 64, 2, 128, dtype="float16", rope=ROPE)
    there = on_host.put([stream.cpu() for stream in streams], [3, 0, 2, 1])
    assert on_host.get(there) == tuple(stream.cpu().numpy().tobytes() for stream in streams)
    again = engine.pool.put(on_host.get(there), segment.pages)
    assert all(torch.equal(a, b) for a, b in zip(engine.pool.get(again), streams, strict=True))
    wanted = on_host.attend(engine.q.cpu(), [[there]]).float()
    got = engine.pool.attend(engine.q, [[again]]).cpu().float()
    assert (got - wanted).abs().max() <= TOLERANCE[torch.float16] * wanted.abs().max()


def test_damage_is_named() -> None:
    engine = Engine(coded=(128,), raw=(1,))
    segment = engine.sequences[0][0]
    damaged = [stream.clone() for stream in engine.pool.get(segment)]
    damaged[1][-100] ^= 1
    with pytest.raises(CorruptStream):
        engine.pool.put(damaged, segment.pages)
    engine.pool.keys[segment.pages[1], 50] ^= 1
    assert [found.tokens for found in engine.pool.verify(segment)] == [(64, 128)]
    with pytest.raises(CorruptStream):
        engine.pool.attend(engine.q, engine.sequences, engine.raw(), check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "pq3"}, "quads"),
        ({"dim": 96}, "head_dim 96"),
        ({"group": 20, "heads": 1}, "more than 16"),
        ({"queries": 3, "raw": (2, 70, 40)}, "several queries are not encoded"),
    ],
    ids=str,
)
def test_what_no_kernel_reads_is_refused(options: dict[str, Any], words: str) -> None:
    engine = Engine(**options)
    with pytest.raises(BackendUnavailable, match=words):
        engine.pool.attend(engine.q, engine.sequences, engine.raw())


def test_what_does_not_fit_is_refused() -> None:
    engine = Engine(raw=(70, 70, 40))
    raw = engine.raw()
    with pytest.raises(BackendUnavailable, match="no window"):
        engine.pool.attend(engine.q, engine.sequences, raw, window=50)
    for wrong in (
        RawTokens(raw.kv_cache, raw.layout, raw.block_tables.long(), raw.lengths),
        RawTokens(raw.kv_cache, raw.layout, raw.block_tables, raw.lengths.cpu()),
        RawTokens(raw.kv_cache, raw.layout, engine.tables, raw.lengths),
    ):
        with pytest.raises(InvalidArgument, match="a tensor int32"):
            engine.pool.prepare(engine.q, engine.sequences, wrong)
    with pytest.raises(InvalidArgument, match="256 segments of a sequence are more than 255"):
        engine.pool.prepare(engine.q, engine.sequences, raw, room=(300, 256))
    with pytest.raises(InvalidArgument, match="codes in host memory"):
        CodedPages(4, 64, 2, 128, device=CUDA, backend="cpu")
    prepared = engine.pool.prepare(engine.q, engine.sequences, raw)
    more = engine.put(0, 256, 64)
    with pytest.raises(InvalidArgument, match="prepare anew, with more room"):
        prepared.place({0: [*engine.sequences[0], more]})
    with pytest.raises(InvalidArgument, match="sequence 3 is not there"):
        prepared.place({3: []})
    with pytest.raises(InvalidArgument, match="were prepared"):
        prepared.run(engine.q[:1])
    late = Engine(coded=(132, 0), raw=(70, 300), exact=4)
    first, numbers = late.sequences[0][0], [late.numbers.pop() for _ in range(2)]
    late.sequences[1] = [first, late.pool.put(late.pool.get(first), numbers)]
    with pytest.raises(InvalidArgument, match="only its first segment may have exact tokens"):
        late.pool.attend(late.q, late.sequences, late.raw())
