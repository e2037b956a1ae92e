"""The CUDA kernel of scores from pair polar on a GPU: the reference's scores of the same codes, to float16's digits.

``test_pair_scores`` runs its source on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import gaussian, needs_cuda
from test_pair_scores import agrees, keys_of

from pqcodec.attend_parts import AttendedTokens, coded_and_exact
from pqcodec.attention import scores
from pqcodec.placed import lying
from pqcodec.stream.header import dtype_code

pytestmark = needs_cuda
CUDA = "cuda"
HALF, BRAIN = torch.float16, torch.bfloat16


def on_gpu(data: bytes, skew: int = 0) -> torch.Tensor:
    """A stream that begins ``skew`` bytes behind a multiple of 16."""
    room = torch.zeros(len(data) + 32, dtype=torch.uint8, device=CUDA)
    at = -room.data_ptr() % 16 + skew
    return room[at : at + len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Thread blocks of each launch of the kernel."""
    from pqcodec.kernels.on_cuda import pair_scores

    found: list[int] = []
    launch = pair_scores.launch_scores

    def counted(function: Any, shares: Any, blocks: int, *others: Any) -> None:
        found.append(blocks)
        launch(function, shares, blocks, *others)

    monkeypatch.setattr(pair_scores, "launch_scores", counted)
    return found


@pytest.mark.parametrize("preset", ["wu44", "wu33"])
@pytest.mark.parametrize(
    ("heads", "tokens", "rows", "dtype", "skew", "options"),
    [
        (8, 4096, 4, HALF, 0, {}),
        (3, 1000, 4, HALF, 4, {}),
        (2, 300, 1, HALF, 12, {"exact_tokens": 3}),
        (5, 4111, 8, HALF, 0, {"chunk_tokens": 256}),
        (1, 31, 7, BRAIN, 8, {}),
        (2, 1, 5, HALF, 4, {}),
        (3, 1000, 4, BRAIN, 8, {"pairing": "interleaved", "effort": "best"}),
        (2, 20000, 4, HALF, 12, {"chunk_tokens": 1024}),
    ],
    ids=str,
)
def test_scores_are_the_references(
    preset: str,
    heads: int,
    tokens: int,
    rows: int,
    dtype: torch.dtype,
    skew: int,
    options: dict[str, Any],
    launched: list[int],
) -> None:
    keys = keys_of(heads, tokens, dtype, preset=preset, **options)
    q = gaussian(heads * rows, 1, 128, seed=7).to(dtype).to(CUDA)
    found = scores(on_gpu(keys, skew), q)
    agrees(found, [keys], q)
    assert len(launched) == 1
    assert torch.equal(scores(on_gpu(keys, skew), q, backend="cuda"), found)


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_keys_and_queries_of_any_size(size: float, launched: list[int]) -> None:
    keys = keys_of(2, 300, BRAIN, preset="wu44", size=size)
    q = (gaussian(8, 1, 128, seed=7) / size).bfloat16().to(CUDA)
    agrees(scores(on_gpu(keys), q), [keys], q)
    assert launched


@pytest.mark.parametrize("asked", [{}, {"tokens": (77, 1380), "scale": 0.5}, {"tokens": (1, 2)}], ids=str)
def test_parts_of_several_streams_and_exact_tokens_stand_in_their_places(asked: dict[str, Any], launched: list[int]) -> None:
    streams = [keys_of(3, 700, preset="wu44"), keys_of(3, 650, preset="wu33", exact_tokens=2)]
    streams.append(keys_of(3, 140, preset="wu44"))
    q, recent = gaussian(6, 4, 128, seed=7).half().to(CUDA), gaussian(3, 3, 128, seed=8).half()
    found = scores(list(map(on_gpu, streams)), q, recent=recent.to(CUDA), **asked)
    agrees(found, streams, q, recent=recent.float(), **asked)
    assert len(launched) == (1 if asked.get("tokens") == (1, 2) else 2)


@pytest.mark.parametrize(
    ("options", "dtype", "rows", "asked"),
    [
        ({"preset": "wu35"}, HALF, 4, {}),
        ({"preset": "wu44"}, torch.float32, 4, {}),
        ({"preset": "wu44"}, HALF, 9, {}),
        ({"preset": "wu44"}, HALF, 4, {"softcap": 2.0}),
        ({"preset": "wu44", "center": "mean"}, HALF, 4, {}),
        ({"preset": "wu33", "exact_vectors": [[0, 5], [1, 299]]}, HALF, 4, {}),
        ({"preset": "wu44"}, HALF, 4, {"backend": "triton"}),
    ],
    ids=str,
)
def test_what_the_kernel_leaves_is_scored_without_it(
    options: dict[str, Any], dtype: torch.dtype, rows: int, asked: dict[str, Any], launched: list[int]
) -> None:
    keys = keys_of(2, 300, dtype, **options)
    q = gaussian(2 * rows, 1, 128, seed=7).to(dtype).to(CUDA)
    found = scores(on_gpu(keys), q, **asked)
    agrees(found, [keys], q, **{name: value for name, value in asked.items() if name != "backend"})
    assert not launched


class Prepared:
    """Scores of two sequences, of a stream and recent keys each, into memory that is all NaN."""

    def __init__(self, rows: int, **options: Any) -> None:
        from pqcodec.kernels.on_cuda.pair_scores import PairScores

        self.keys = [keys_of(2, 500, preset="wu44", seed=seed, exact_tokens=3, **options) for seed in range(2)]
        self.recent = gaussian(2, 2, 5, 128, seed=9).half().to(CUDA)
        self.q = gaussian(2, 2 * rows, 1, 128, seed=7).half().to(CUDA)
        placed = [[(lying(on_gpu(data), None, None, []),)] for data in self.keys]
        attended = AttendedTokens.of(placed, None, [], [self.recent])
        shape, device = tuple(self.q.shape), self.q.device
        parts = (shape, attended.totals, 2, (128,), *coded_and_exact(attended, "cuda"), device, 128**-0.5, 0.0)
        self.way = PairScores(*parts, query_dtype=dtype_code(self.q.dtype))
        self.out = torch.full((*shape[:3], 505), float("nan"), device=device)

    def score(self) -> None:
        self.way.score(self.q, self.out)

    def agrees(self) -> None:
        for n, data in enumerate(self.keys):
            agrees(self.out[n], [data], self.q[n], recent=self.recent[n].cpu().float())


@pytest.mark.parametrize("options", [{"rows": 4}, {"rows": 9}, {"rows": 4, "exact_vectors": [[0, 5]]}], ids=str)
def test_every_score_of_a_batch_is_written_by_the_kernel_or_by_tritons(options: dict[str, Any], launched: list[int]) -> None:
    prepared = Prepared(**options)
    prepared.score()
    prepared.agrees()
    assert len(launched) == (options == {"rows": 4})


def test_a_captured_graph_sees_new_queries_and_recent_keys(launched: list[int]) -> None:
    prepared = Prepared(rows=4)
    prepared.score()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.score()
    assert len(launched) == 2
    prepared.q.copy_(prepared.q.flip(-1))
    prepared.recent.neg_()
    prepared.out.fill_(float("nan"))
    graph.replay()
    prepared.agrees()


def test_scores_are_found_on_the_current_stream() -> None:
    """New queries are written late, on a stream of one's own: work on any other stream would still find the old ones."""
    prepared = Prepared(rows=4)
    prepared.score()
    new = prepared.q.flip(-1)
    torch.cuda.synchronize()
    own = torch.cuda.Stream()
    with torch.cuda.stream(own):
        torch.cuda._sleep(200_000_000)
        prepared.q.copy_(new)
        prepared.score()
    own.synchronize()
    prepared.agrees()
