"""benchmarks.fidelity measures every model whose cache transformers_cache takes; its figures follow from what was coded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from test_transformers_cache import MODELS, MORE, PROMPT, WINDOW, cached, prompt, read, tiny

from benchmarks import model as lm
from benchmarks.fidelity.caches import all_caches
from benchmarks.fidelity.measures import Bench, attention_output, ratio, real_queries, standard_error
from benchmarks.fidelity.reading import Prefix, Reading, Window, windows_of
from benchmarks.fidelity.report import layer_table, layers_of, tables

CACHES = all_caches()
READABLE = [kind for kind in MODELS if kind != "mamba"]  # which keeps no keys and values


def window_of(seed: int = 0, tokens: int = PROMPT) -> Window:
    ids = prompt(tokens + MORE + 1, seed)[0]
    return Window(ids[:tokens], ids[tokens:-1], ids[tokens + 1 :])


def bench_of(kind: str, windows: int = 1) -> Bench:
    model = tiny(kind)
    readings = [Reading.of(model, window_of(seed)) for seed in range(windows)]
    greedy = torch.tensor([5, *lm.greedy(model, readings[0].prefix.cache(), 5, 4)])
    return Bench(model, readings, real_queries(model, readings[0]), greedy, [])


def nothing() -> None:
    """Nobody watches."""


@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_put_together_again_is_what_the_model_made(kind: str) -> None:
    model, window = tiny(kind), window_of()
    expected = read(model, window.fed[None], cached(model, window.prefix[None]))[0]
    prefix = Prefix.of(model, window.prefix)
    for _ in range(2):  # reading on does not change it
        assert torch.equal(lm.continuation_logits(model, prefix.cache(), window.fed), expected)


@pytest.mark.parametrize("kind", READABLE)
def test_every_model_is_measured(kind: str) -> None:
    bench = bench_of(kind)
    names = ["fp16", "pq6", "pq3", "kivi4", "turboquant4+cures"]
    rows = [bench.measure(CACHES[name], range(1), nothing) for name in names]
    for row in rows:
        assert -1e-12 < row["kl"] < 1, row["name"]
        row["watched_layers"] = list(bench.queries)
    by_name = {row["name"]: row for row in rows}
    assert by_name["fp16"]["kl"] < 1e-5
    assert by_name["fp16"]["bits"] == 16
    for role in lm.ROLES:
        assert by_name["pq6"][f"{role}_rel_mse"] < 0.1 * by_name["pq3"][f"{role}_rel_mse"]
    layers = layers_of(bench.readings[0].prefix)
    shown = [*tables("", rows, {"greedy_tokens": 4}), layer_table(by_name["pq3"], layers)]
    assert [table.row_count for table in shown] == [len(names), len(names), len(layers)]


def test_a_sliding_layer_holds_its_window_and_has_no_first_tokens() -> None:
    prefix = Prefix.of(tiny("gemma3"), window_of().prefix)
    kinds = [(layer["kind"], layer["tokens"]) for layer in layers_of(prefix)]
    assert kinds == [("sliding", WINDOW - 1), ("full", PROMPT), ("sliding", WINDOW - 1)]
    kept = CACHES["turboquant3+cures"].code(prefix, 0)
    for layer, exact in enumerate((False, True, False)):
        name = f"layers.{layer}.value"
        first = [x[..., :4, :] for x in (prefix.stored()[name].float(), kept.tensors[name])]
        assert torch.equal(*first) == exact


@pytest.mark.parametrize("name", ["pq3", "kivi2"])
def test_one_role_alone(name: str) -> None:
    prefix = Prefix.of(tiny("gemma3"), window_of().prefix)
    whole = CACHES[name].code(prefix, 0)
    for role in lm.ROLES:
        alone = CACHES[f"{name}:{role}"].code(prefix, 0)
        assert {prefix.roles[found].role for found in alone.tensors} == {role}
        assert all(torch.equal(x, whole.tensors[found]) for found, x in alone.tensors.items())
        assert alone.all_bits == sum(whole.bits[found] for found in alone.tensors)
    assert sum(whole.bits.values()) <= whole.all_bits


def test_windows_and_seeds_have_errors_of_their_own() -> None:
    bench = bench_of("llama", windows=3)
    ticks: list[int] = []
    one, other = (bench.measure(CACHES[name], range(2), lambda: ticks.append(1)) for name in ("pq2", "kivi2"))
    assert len(ticks) == 3 * 2 + 3
    assert one["token_kl"].shape == (3, 2, MORE)
    assert other["token_kl"].shape == (3, 1, MORE)
    assert other["kl_seed_error"] == 0
    assert one["kl_standard_error"] == pytest.approx(standard_error(torch.tensor(one["kl_by_window"])))
    assert one["kl_seed_error"] == pytest.approx(abs(one["kl_by_seed"][0] - one["kl_by_seed"][1]) / 2)
    assert ratio(one, one)[0] == 1
    assert ratio(one, other)[0] == pytest.approx(one["kl"] / other["kl"])


def test_attention_looks_back_as_far_as_its_window() -> None:
    key, value, query = torch.zeros(1, 3, 2), torch.eye(3)[None, :, :2], torch.zeros(1, 2, 2)
    assert attention_output(query, 1.0, key, value)[0].allclose(torch.full((2, 2), 1 / 3))
    found = attention_output(query, 1.0, key, value, window=4)[0]  # 3 tokens before the first query, 2 before the second
    assert found.allclose(torch.tensor([[1 / 3, 1 / 3], [0, 1 / 2]]))


def test_windows_begin_with_what_the_tokenizer_puts_there() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": [2] * add_special_tokens + [10, 11]}

    opening = lm.opening_ids(tokenizer)
    assert opening.tolist() == [2]
    windows = windows_of(torch.arange(100, 140), opening, 3, 8, 4)
    assert [window.prefix.tolist()[:2] for window in windows] == [[2, 100], [2, 114], [2, 128]]
    assert [window.following.tolist()[-1] for window in windows] == [111, 125, 139]
    with pytest.raises(SystemExit, match="3 windows of 20 do not fit"):
        windows_of(torch.arange(40), opening, 3, 16, 4)


def test_no_bos_is_fed_where_the_tokenizer_puts_none() -> None:
    assert lm.opening_ids(lambda text, add_special_tokens: {"input_ids": [10, 11]}).tolist() == []


def test_a_known_model_with_other_bytes_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "_carried", lambda distribution, folder: b"GGUF" + distribution.encode())
    monkeypatch.setitem(lm.KNOWN, "one", lm.Packed("one.gguf", "0" * 64, ("a==1", "b==2")))
    with pytest.raises(RuntimeError, match=r"one\.gguf has SHA-256"):
        lm.fetch("one", tmp_path)
    assert not list(tmp_path.iterdir())
    whole = lm.hashlib.sha256(b"GGUFa==1GGUFb==2").hexdigest()
    monkeypatch.setitem(lm.KNOWN, "one", lm.Packed("one.gguf", whole, ("a==1", "b==2")))
    assert lm.fetch("one", tmp_path).read_bytes() == b"GGUFa==1GGUFb==2"


def test_a_model_that_is_not_there(tmp_path: Any) -> None:
    with pytest.raises(SystemExit, match="is not there"):
        lm.load(str(tmp_path / "none.gguf"), tmp_path)
