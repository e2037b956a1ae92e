"""benchmarks.codecs: every system of the table is measured, pruned caches stand where they stood, parts are put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gaussian, rel_mse

pytest.importorskip("transformers")
pytest.importorskip("rich")

from rich.console import Console
from test_fidelity import window_of
from test_transformers_cache import tiny

from benchmarks import model as lm
from benchmarks.codecs.parts import SPEED, Bench, Exact, kept_parts, part, score_error
from benchmarks.codecs.report import PQ, printed, together, with_speeds
from benchmarks.codecs.systems import SYSTEMS, WINDOW
from pqcodec.formats.engines.transformers_cache import argument_of

TOKENS = 16 * WINDOW  # of which a sixteenth is as many as the queries that choose


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = tiny("llama")
    return Bench(model, [Exact.of(model, window_of(tokens=TOKENS))])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_measured(bench: Bench, name: str) -> None:
    system, found = SYSTEMS[name], bench.measure(SYSTEMS[name])
    assert 0 <= found["kl"] < 1
    assert found["bits"] == pytest.approx((found["key_bits"] + found["value_bits"]) / 2)
    assert name.endswith("float16") == (max(found["key_rel_mse"], found["value_rel_mse"]) < 1e-6)
    if name == "float16":
        assert found["bits"] == 16
        assert found["kl"] < 1e-5
    if system.keep:
        assert found["bits"] < 30 / system.keep.part


def test_a_pruned_cache_is_read_as_a_whole_one_whose_other_tokens_are_masked(bench: Bench) -> None:
    reading, kept = bench.windows[0].reading, torch.tensor([0, 1, 5, *range(300, TOKENS)])
    pruned = {name: x[:, :, kept] for name, x in reading.prefix.exact.items()}
    found = lm.continuation_logits(bench.model, reading.prefix.cache(pruned), reading.fed, TOKENS)
    mask = torch.zeros(1, TOKENS + len(reading.fed), dtype=torch.long)
    mask[:, kept], mask[:, TOKENS:] = 1, 1
    at = torch.arange(TOKENS, TOKENS + len(reading.fed))[None]
    with torch.inference_mode():
        cache = {argument_of(bench.model): reading.prefix.cache()}
        whole = bench.model(reading.fed[None], attention_mask=mask, position_ids=at, **cache).logits[0]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_the_score_error_passes_over_constants_of_a_query_and_is_the_relative_error_of_others() -> None:
    queries, keys, noise = gaussian(4, 400, 64), gaussian(2, 500, 64, seed=1), gaussian(2, 500, 64, seed=2)
    assert score_error(queries, keys, keys + gaussian(2, 1, 64, seed=3)) < 1e-10
    assert score_error(queries, keys, keys + noise / 5) == pytest.approx(rel_mse(keys, keys + noise / 5), rel=0.02)


def told(folder: Path, model: str, system: str, settings: dict[str, Any], **figures: float) -> bool:
    """Whether a part is measured."""
    made = []

    def make() -> dict[str, float]:
        made.append(True)
        return dict.fromkeys(("key_bits", "value_bits", "key_rel_mse", "value_rel_mse", "score_error"), 0.5) | figures

    part(folder, model, "text", system, settings, make)
    return bool(made)


def test_parts_are_measured_once_and_put_together(tmp_path: Path) -> None:
    settings, kl = {"windows": 1}, dict(zip(PQ, (0.08, 0.04, 0.02, 0.01, 0.005), strict=True))
    for model in ("a", "b"):
        for bits, (name, one) in enumerate(kl.items(), 4):
            assert told(tmp_path, model, name, settings, bits=bits / 2, kl=one, kl_standard_error=0)
        assert told(tmp_path, model, "snapkv/4 x int4", settings, bits=2.5, kl=0.02, kl_standard_error=0)
    assert not told(tmp_path, "a", "pq3", settings)
    assert told(tmp_path, "a", "q8_0", settings, bits=8.5, kl=0.001, kl_standard_error=0)  # and not on b
    assert told(tmp_path, SPEED, "pq3", {}, encode_over_pq3=1, decode_over_pq3=1)
    found = together(kept_parts(tmp_path))
    rows = {row["system"]: row for row in found["rows"]}
    assert list(rows) == ["pq2", "snapkv/4 x int4", "pq2.5", "pq3", "pq3.5", "pq4"]
    assert [name for name, row in rows.items() if row["frontier"]] == ["pq2", "snapkv/4 x int4", "pq3.5", "pq4"]
    assert rows["snapkv/4 x int4"]["kl_over_pq"] == pytest.approx(0.5)
    assert rows["pq3"]["encode_over_pq3"] == 1
    assert sorted([*rows, *found["left_out"]]) == sorted(SYSTEMS)
    console = Console(width=80, record=True)
    console.print(printed(json.loads(json.dumps(found))))
    assert "snapkv/4 x int4" in console.export_text()
    told(tmp_path, "a", "pq2", {"windows": 2}, bits=2, kl=1, kl_standard_error=0)
    with pytest.raises(ValueError, match="parts of"):
        together(kept_parts(tmp_path))


def test_speeds_alone_go_into_the_table_that_is_there(tmp_path: Path) -> None:
    rows = [{"system": "pq2", "kl": 1.0, "encode_over_pq3": 0.5}, {"system": "pq4", "kl": 0.1}]
    told(tmp_path, SPEED, "pq4", {}, encode_over_pq3=0.9, decode_over_pq3=0.8)
    found = with_speeds({"measured_on": [["a", "b"]], "rows": rows}, kept_parts(tmp_path), {"machine": "m"})
    assert found["rows"] == [rows[0], {**rows[1], "encode_over_pq3": 0.9, "decode_over_pq3": 0.8}]
    assert found["speeds_of"] == {"machine": "m", "systems": ["pq4"]}
