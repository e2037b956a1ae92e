"""Law: one system on one model and text, or its speed: a part, measured once and kept as JSON outside of the repository.

A part that was measured by the same settings is not measured again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks import model as lm
from benchmarks.codecs.systems import BASE, SYSTEMS, WINDOW, Coder, Given, System
from benchmarks.fidelity.measures import Queries, real_queries, rel_mse, samples, standard_error, token_scores, watching
from benchmarks.fidelity.reading import Reading, windows_of
from pqcodec import Rope
from pqcodec.formats.policy.names import TensorRole

TIMED, TURNS = (4, 1024, 128), 3  # a tensor whose coding is timed; how often, in turns with BASE
SPEED = "speed"  # in the place of a model and a text


# -- kept parts ----------------------------------------------------------------------------------------------------
def part(
    folder: Path, model: str, text: str, system: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> None:
    """Measure a part, unless it is there as these settings make it."""
    path = folder / f"{model}.{text}.{system.replace('/', '_').replace(' ', '_')}.json"
    head = {"model": model, "text": text, "system": system, "settings": settings}
    if path.exists() and head.items() <= json.loads(path.read_text()).items():
        return
    found = json.dumps({**head, **make()})
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(found)
    path.with_suffix(".new").replace(path)


def kept_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """All parts of systems that are in the table still."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if found["system"] in SYSTEMS:
            yield found


# -- a model on a text ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Exact:
    """What the model says from its own cache, the queries that it then asks, and those at the end of the prefix."""

    reading: Reading
    asked: Queries
    last: Queries

    @classmethod
    def of(cls, model: Any, window: Any) -> Exact:
        with watching(model) as found:
            reading_of_prefix = lm.prefill(model, window.prefix)
        last = {layer: (query[:, -WINDOW:].clone(), factor) for layer, (query, factor) in found.items()}
        del reading_of_prefix
        reading = Reading.of(model, window)
        return cls(reading, real_queries(model, reading), last)


@dataclass(frozen=True)
class Bench:
    """A model on the windows of a text."""

    model: Any
    windows: Sequence[Exact]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, text: str, windows: int, prefix: int, scored: int) -> Bench:
        ids = lm.token_ids(tokenizer, text)
        found = windows_of(ids, lm.opening_ids(tokenizer), windows, prefix, scored)
        return cls(model, [Exact.of(model, window) for window in found])

    def measure(self, system: System) -> dict[str, Any]:
        """Bits a coordinate of all tokens; errors of the kept ones, the mean of the layers and windows; KL, nats a token."""
        found, kl = [], []
        for exact in self.windows:
            kept, decoded = _coded(exact, system)
            found.append(kept)
            first = exact.reading.prefix.layer(0).tokens if system.keep else None
            logits = lm.continuation_logits(self.model, exact.reading.prefix.cache(decoded), exact.reading.fed, first)
            kl.append(token_scores(exact.reading.logits, logits, exact.reading.following)["kl"])
        errors = {name: mean(one[name] for one in found) for name in found[0]}
        all_kl = torch.stack(kl)
        return {**errors, "kl": all_kl.mean().item(), "kl_standard_error": standard_error(samples(all_kl))}


def _coded(exact: Exact, system: System) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Bits and errors of a prefix's cache, and its tensors as the system gives them back, float32 [1, heads, n, head_dim]."""
    prefix = exact.reading.prefix
    stored, tensors, bits, scores = prefix.stored(), {}, dict.fromkeys(lm.ROLES, 0), []
    pairs: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {role: ([], []) for role in lm.ROLES}
    for layer in prefix.layers():
        kept = None
        if system.keep:
            kept = system.keep.positions(exact.last[layer][0], stored[f"layers.{layer}.key"][0])
        for role, coder in zip(lm.ROLES, (system.keys, system.values), strict=True):
            name = f"layers.{layer}.{role}"
            given = Given(stored[name][0], prefix.roles[name], exact.last[layer][0], kept=kept)
            coded = coder.encode(given)
            tensors[name] = coder.decode(coded).float()[None]
            bits[role] += coder.bits(coded)
            wanted = replace(given, x=prefix.exact[name][0]).kept_rows()
            pairs[role][0].append(wanted)
            pairs[role][1].append(tensors[name][0])
        keys = pairs["key"]
        scores.append(score_error(exact.asked[layer][0], keys[0][-1], keys[1][-1]))
    numbers = {role: sum(prefix.exact[f"layers.{layer}.{role}"].numel() for layer in prefix.layers()) for role in lm.ROLES}
    found = {f"{role}_bits": bits[role] / numbers[role] for role in lm.ROLES}
    found |= {f"{role}_rel_mse": mean(rel_mse(*pairs[role])[1]) for role in lm.ROLES}
    found |= {"bits": sum(bits.values()) / sum(numbers.values()), "score_error": mean(scores)}
    return found, tensors


def score_error(queries: torch.Tensor, exact: torch.Tensor, other: torch.Tensor) -> float:
    """Squared error of q.k, up to a constant a query (which softmax does not see), over the scores' own variance.

    Queries [heads, n, head_dim], keys [kv_heads, tokens, head_dim].
    """
    q = queries.unflatten(0, (len(exact), -1)).flatten(1, 2).double()
    scores, errors = (q @ k.double().mT for k in (exact, other.to(exact.dtype) - exact))
    squares = [float((x - x.mean(-1, keepdim=True)).square().sum()) for x in (errors, scores)]
    return squares[0] / squares[1]


# -- speed ---------------------------------------------------------------------------------------------------------
def speeds(system: System) -> dict[str, Any]:
    """How many times as fast as BASE keys and values are encoded and decoded, by the CPU's seconds, the least of all turns."""
    x = torch.randn(TIMED, generator=torch.Generator().manual_seed(0)).half()
    rope = Rope(theta=1e4)
    queries = torch.randn((TIMED[0], WINDOW, TIMED[2]), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[tuple[float, float]]] = {BASE: [], system.name: []}
    for _ in range(TURNS + 1):  # the first compiles
        for one in (SYSTEMS[BASE], system):
            kept = one.keep.positions(queries, x) if one.keep else None
            given = [
                Given(x, TensorRole(role, 0, turned), queries, kept=kept) for role, turned in (("key", rope), ("value", None))
            ]
            times = [_seconds(coder, role) for coder, role in zip((one.keys, one.values), given, strict=True)]
            seconds[one.name].append((sum(t[0] for t in times), sum(t[1] for t in times)))
    best = {name: [min(times) for times in zip(*turns[1:], strict=True)] for name, turns in seconds.items()}
    return {f"{verb}_over_{BASE}": best[BASE][n] / best[system.name][n] for n, verb in enumerate(("encode", "decode"))}


def _seconds(coder: Coder, given: Given) -> tuple[float, float]:
    """Of the CPU, all its threads together, to encode and to decode."""
    start = time.process_time()
    stored = coder.encode(given)
    between = time.process_time()
    coder.decode(stored)
    return between - start, time.process_time() - between
