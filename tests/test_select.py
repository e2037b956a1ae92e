"""Which tokens are kept: held to the authors' algorithms, written anew in torch, head by head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import gaussian

import pqcodec
from pqcodec import InvalidArgument
from pqcodec.attention import attend
from pqcodec.select import h2o, pyramid_budgets, received_attention, snapkv, streaming_llm


def attention_of(q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of queries at the end [queries, head_dim] to keys [tokens, head_dim]: float64 [queries, tokens]."""
    count, tokens = len(q), len(keys)
    seen = torch.ones(count, tokens, dtype=torch.bool).tril(tokens - count)
    return (q.double() @ keys.double().T * scale).masked_fill(~seen, -torch.inf).softmax(-1)


def snapkv_of_a_head(q: torch.Tensor, keys: torch.Tensor, n: int, pool: int) -> list[int]:
    """SnapKV as its authors' code does it for one head of keys and queries [group, window, head_dim]."""
    window, before = q.shape[1], len(keys) - q.shape[1]
    total = sum(attention_of(one, keys, q.shape[-1] ** -0.5)[:, :before].sum(0) for one in q)
    pooled = torch.nn.functional.max_pool1d(total[None], pool, stride=1, padding=pool // 2)[0]
    return [*sorted(pooled.topk(n - window).indices.tolist()), *range(before, len(keys))]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("pool", [1, 7])
def test_snapkv_is_that_of_its_authors(group: int, pool: int) -> None:
    q, keys = gaussian(2, 2 * group, 8, 64) * 2, gaussian(2, 2, 150, 64, seed=1)
    found = snapkv(q, keys, 40, pool=pool)
    assert found.shape == (2, 2, 40)
    assert found.dtype == torch.int64
    for batch in range(2):
        for head in range(2):
            queries = q[batch, head * group : (head + 1) * group]
            scores = np.sort(found[batch, head].tolist())
            assert (found[batch, head].numpy() == scores).all()
            wanted = snapkv_of_a_head(queries, keys[batch, head], 40, pool)
            # of neighbours with one pooled score any may be taken; ours are the first ones
            assert len(set(wanted) ^ set(scores.tolist())) <= (0 if pool == 1 else 6)


def test_of_equal_scores_the_first_are_kept() -> None:
    q, keys = np.zeros((1, 2, 8), np.float32), np.zeros((1, 20, 8), np.float32)
    assert snapkv(q, keys, 5)[0].tolist() == [0, 1, 2, 18, 19]
    assert h2o(q, keys, 5)[0].tolist() == [0, 1, 2, 18, 19]


def test_pooling_keeps_the_neighbours_of_a_token_that_is_looked_at() -> None:
    keys = np.zeros((1, 60, 8), np.float32)
    keys[0, 30, 0] = 50
    q = np.zeros((1, 4, 8), np.float32)
    q[..., 0] = 1
    assert snapkv(q, keys, 11)[0].tolist() == [*range(27, 34), *range(56, 60)]
    assert snapkv(q, keys, 5, pool=1)[0].tolist() == [30, *range(56, 60)]


@pytest.mark.parametrize("recent", [None, 0, 7])
def test_h2o_sums_the_attention_of_all_queries(recent: int | None) -> None:
    q, keys = gaussian(4, 90, 32), gaussian(2, 90, 32, seed=1)
    found, last = h2o(q, keys, 20, recent=recent), 10 if recent is None else recent
    for head in range(2):
        total = sum(attention_of(one, keys[head], 32**-0.5).sum(0) for one in q[2 * head : 2 * head + 2])
        heavy = sorted(total[: 90 - last].topk(20 - last).indices.tolist())
        assert found[head].tolist() == [*heavy, *range(90 - last, 90)]


def test_received_attention_adds_up_to_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = gaussian(6, 50, 32), gaussian(3, 120, 32, seed=1)
    found = received_attention(q, keys)
    np.testing.assert_allclose(found.sum(-1), 2 * 50, rtol=1e-5)
    monkeypatch.setattr("pqcodec.select._AT_ONCE", 500)  # some queries at a time
    np.testing.assert_allclose(received_attention(q, keys), found, rtol=1e-5)
    large = received_attention(q.numpy() * 1e4, keys.numpy(), scale=1.0)  # one token takes all
    assert np.isfinite(large).all()


def test_streaming_keeps_both_ends() -> None:
    assert streaming_llm(10, 3, first=1).tolist() == [0, 8, 9]
    assert streaming_llm(10, 4).tolist() == [0, 1, 2, 3]
    assert streaming_llm(3, 4).tolist() == [0, 1, 2]
    assert streaming_llm(10, 0, first=0).tolist() == []


@pytest.mark.parametrize(
    ("n", "layers", "window"), [(128, 32, 8), (64, 30, 8), (9, 7, 8), (100, 1, 32), (8, 5, 8), (1000, 3, 0)]
)
def test_budgets_fall_along_a_line_and_add_up(n: int, layers: int, window: int) -> None:
    found = pyramid_budgets(n, layers, window=window)
    assert sum(found) == n * layers
    assert found == sorted(found, reverse=True)
    assert min(found) >= window
    if layers > 1:
        least = (n - window) / 20
        line = window + np.linspace(2 * (n - window) - least, least, layers)
        assert np.abs(found - line).max() < 1 + 1e-9


def test_everything_is_kept_where_that_is_not_more() -> None:
    q, keys = gaussian(2, 4, 16), gaussian(1, 9, 16)
    for choose in (snapkv, h2o):
        for n in (9, 20):
            assert choose(q, keys, n).tolist() == [list(range(9))]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda q, k: snapkv(q[0], k, 9), "does not go with keys"),
        (lambda q, k: snapkv(q[..., :8], k, 9), "does not go with keys"),
        (lambda q, k: snapkv(q[:3], k, 9), "do not go with 2 heads"),
        (lambda q, k: snapkv(q, k[:, :3], 9), "at most"),
        (lambda q, k: snapkv(q[:, :0], k, 9), "at most"),
        (lambda q, k: snapkv(q, k, 3), "n 3: 4 or more"),
        (lambda q, k: snapkv(q, k, 9.0), "n 9.0 is no whole number"),
        (lambda q, k: snapkv(q, k, 9, pool=4), "pool 4 is even"),
        (lambda q, k: snapkv(q, k, 9, pool=0), "pool 0"),
        (lambda q, k: snapkv(q, k, 9, scale="1"), "scale"),
        (lambda q, k: snapkv(q * float("nan"), k, 9), "NaN or Inf"),
        (lambda q, k: snapkv(q.tolist(), k, 9), "a torch.Tensor or numpy.ndarray"),
        (lambda q, k: h2o(q, k, 9, recent=10), "n 9: 10 or more"),
        (lambda q, k: h2o(q, k, 9, recent=-1), "recent -1"),
        (lambda q, k: streaming_llm(10, 3), "first 4: 0 to 3"),
        (lambda q, k: pyramid_budgets(7, 3), "n 7: 8 or more"),
        (lambda q, k: pyramid_budgets(70, 0), "layers 0"),
        (lambda q, k: pyramid_budgets(70, 3, beta=0.5), "beta"),
    ],
)
def test_what_does_not_go_together_is_refused(work: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        work(gaussian(4, 4, 16), gaussian(2, 30, 16))


def test_more_tokens_of_fewer_bits_err_less_until_bits_are_too_few() -> None:
    """The order of arXiv 2412.12706 at one budget, 64 tokens of 16 bits: 4 bits x 256 before 16 x 64, and 2 x 512 last."""
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((2, 1024, 64)).astype(np.float32) for _ in range(2))
    alike = rng.standard_normal((4, 1, 64)) + 0.6 * rng.standard_normal((4, 48, 64))  # what is asked is asked again
    asked, later = np.split((3 * alike).astype(np.float32), [32], 1)
    scores = (later @ keys.repeat(2, 0).swapaxes(1, 2) / 8).astype(np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exactly = weights @ values.repeat(2, 0) / weights.sum(-1, keepdims=True)
    errors = []
    for preset, n in ((None, 64), ("pq4", 256), ("pq2", 512)):
        positions = snapkv(asked, keys, n, pool=1)
        options: dict[str, Any] = {"preset": preset} if preset else {"exact_tokens": n}
        streams = [pqcodec.encode(x, keep=positions, backend="cpu", **options) for x in (keys, values)]
        out = attend(later, *streams, causal=False, backend="cpu")
        errors.append(((out - exactly) ** 2).sum() / (exactly**2).sum())
    exact, four, two = errors
    assert four < 0.06 < 0.25 < exact < 0.35 < two


def test_positions_go_into_a_stream_as_they_are() -> None:
    q, keys = gaussian(1, 4, 8, 64), gaussian(1, 2, 200, 64, seed=1)
    positions = snapkv(q, keys, 50)
    rows, kept = pqcodec.decode_kept(pqcodec.encode(keys, keep=positions, exact_last=8, backend="cpu"))
    assert (kept == positions).all()
    torch.testing.assert_close(rows[..., -8:, :], keys[..., -8:, :], rtol=0, atol=0)
