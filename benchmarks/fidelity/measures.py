"""Law: what a kept cache costs: the model's words from it against those from its own float32 cache, over windows and seeds.

A figure's error has two parts: that of the windows, which are a sample of the text, and that of the seeds, which are a
sample of the rotations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

import torch

from benchmarks import model as lm
from benchmarks.fidelity.caches import Cache, Kept
from benchmarks.fidelity.reading import Prefix, Reading, Tensors

PROBED = 64  # scored tokens whose queries the attention error is taken from
BLOCK = 64  # scored tokens that count as one sample, where there is but one window
Queries = dict[int, tuple[torch.Tensor, float]]  # of a layer: [H, n, head_dim] after RoPE, and the factor its logits get


# -- what the model says -----------------------------------------------------------------------------------------
def token_scores(exact: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """``model.compare``'s kl, top1 and loss change of each token alone: float64 [n] each."""
    rows = [lm.compare(exact[i : i + 1], logits[i : i + 1], ids[i : i + 1]) for i in range(len(ids))]
    scores = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("kl", "top1")}
    losses = [math.log(row["perplexity"]) - math.log(row["exact_perplexity"]) for row in rows]
    return scores | {"loss_change": torch.tensor(losses, dtype=torch.float64)}


def samples(scores: torch.Tensor) -> torch.Tensor:
    """What is independent in scores [windows, n]: the windows' means, or those of the blocks of the only window."""
    return scores.mean(1) if len(scores) > 1 else torch.stack([block.mean() for block in scores[0].split(BLOCK)])


def standard_error(values: torch.Tensor) -> float:
    """Of the mean; 0 where there is one value."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0


# -- what became of the tensors ----------------------------------------------------------------------------------
def rel_mse(exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, list[float]]:
    """Squared error over squared norm, over all tensors and of each."""
    errors = [float((a - b).double().square().sum()) for a, b in zip(exact, other, strict=True)]
    norms = [float(a.double().square().sum()) for a in exact]
    return sum(errors) / sum(norms), [error / norm for error, norm in zip(errors, norms, strict=True)]


@contextmanager
def watching(model: Any) -> Iterator[Queries]:
    """The queries of each layer, of all tokens that the model last read inside; none where it attends in a way of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual, found = model.config._attn_implementation, Queries()
    if usual not in ALL_ATTENTION_FUNCTIONS:
        yield found
        return
    attention = ALL_ATTENTION_FUNCTIONS[usual]

    def watched(module: Any, query: torch.Tensor, *rest: Any, scaling: float, **options: Any) -> Any:
        found[module.layer_idx] = (query[0], scaling)
        return attention(module, query, *rest, scaling=scaling, **options)

    AttentionInterface.register("watched", watched)
    AttentionMaskInterface.register("watched", ALL_MASK_ATTENTION_FUNCTIONS[usual])
    model.set_attn_implementation("watched")
    try:
        yield found
    finally:
        model.set_attn_implementation(usual)


def real_queries(model: Any, reading: Reading) -> Queries:
    """The queries of the first fed tokens in each layer that reads its own keys and values."""
    with watching(model) as found:
        lm.continuation_logits(model, reading.prefix.cache(), reading.fed[:PROBED])
    exact = reading.prefix.exact
    dims = {index: exact[f"layers.{index}.key"].shape[-1] for index in sorted(found) if f"layers.{index}.key" in exact}
    return {index: found[index] for index, dim in dims.items() if found[index][0].shape[-1] == dim}


def attention_output(
    query: torch.Tensor, factor: float, key: torch.Tensor, value: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """What heads [H, n, D] read from the prefix's cache [Hkv, T, D] alone: [H, n, D]; each looks back ``window`` tokens."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    logits = query @ key.mT * factor
    if window is not None:
        distance = torch.arange(query.shape[1])[:, None] + key.shape[1] - torch.arange(key.shape[1])
        logits = logits.masked_fill(distance >= window, -torch.inf)
    return logits.softmax(-1) @ value


@dataclass(frozen=True)
class Bench:
    """One model on one text: the exact readings that every cache is held against.

    Errors of tensors, the greedy text and the needles are those of the first window and the first seed.
    """

    model: Any
    readings: Sequence[Reading]
    queries: Queries
    greedy: torch.Tensor | None  # token ids: the one fed first, then the model's own
    needles: Sequence[tuple[Reading, bool]]  # and whether the model finds the answer in its exact cache

    def measure(self, cache: Cache, seeds: Sequence[int], tick: Callable[[], None]) -> dict[str, Any]:
        """All figures of a cache; ``tick`` is called after each run. ``token_kl`` is float64 [windows, seeds, n]."""
        seeds = seeds if cache.seeded else seeds[:1]
        runs: list[list[dict[str, torch.Tensor]]] = []
        once: dict[str, Any] = {}
        for reading in self.readings:
            runs.append([])
            for seed in seeds:
                kept = cache.code(reading.prefix, seed)
                logits = lm.continuation_logits(self.model, reading.prefix.cache(kept.tensors), reading.fed)
                runs[-1].append(token_scores(reading.logits, logits, reading.following))
                if not once:
                    once = {"name": cache.name, "bits": kept.bits_per_coordinate, **self.errors(kept)}
                    once |= self.greedy_text(kept.tensors) | self.retrieval(cache, seed)
                tick()
        kl, top1, loss = (torch.stack([torch.stack([run[name] for run in row]) for row in runs]) for name in runs[0][0])
        by_seed = kl.mean((0, 2))
        return {
            **once,
            "kl": kl.mean().item(),
            "kl_standard_error": standard_error(samples(kl.mean(1))),
            "kl_seed_error": standard_error(by_seed),
            "kl_by_window": kl.mean((1, 2)).tolist(),
            "kl_by_seed": by_seed.tolist(),
            "kl_spread": pstdev(by_seed.tolist()),
            "ppl_change": mean(math.exp(change) - 1 for change in loss.mean((0, 2)).tolist()),
            "top1": top1.mean().item(),
            "token_kl": kl,
        }

    def errors(self, kept: Kept) -> dict[str, Any]:
        """relMSE of keys, of values and of the attention's output, over all layers and by layer; bits by layer."""
        prefix, figures = self.readings[0].prefix, {}
        for role in lm.ROLES:
            names = [name for name, tensor in prefix.roles.items() if tensor.role == role]
            both = [[tensors[name] for name in names] for tensors in (prefix.exact, {**prefix.exact, **kept.tensors})]
            figures[f"{role}_rel_mse"], figures[f"{role}_rel_mse_by_layer"] = rel_mse(*both)
            bits = [kept.bits[name] / prefix.exact[name].numel() if name in kept.bits else None for name in names]
            figures[f"{role}_bits_by_layer"] = bits
        if self.queries:
            outputs = [self._attention(prefix, {**prefix.exact, **tensors}) for tensors in ({}, kept.tensors)]
            figures["attention_rel_mse"], figures["attention_rel_mse_by_layer"] = rel_mse(*outputs)
        return figures

    def _attention(self, prefix: Prefix, tensors: Tensors) -> list[torch.Tensor]:
        """What the watched layers read."""
        found = []
        for index, query in self.queries.items():
            key, value = (tensors[f"layers.{index}.{role}"][0] for role in lm.ROLES)
            window = prefix.layer(index).fields.get("sliding_window")
            found.append(attention_output(*query, key, value, window))
        return found

    def greedy_text(self, tensors: Tensors) -> dict[str, int]:
        """Tokens before the first that differs from the exact cache's greedy text, and how many of that text's tokens are
        the likeliest here too, each after the exact text's own (both from one pass over that text).
        """
        if self.greedy is None:
            return {}
        logits = lm.continuation_logits(self.model, self.readings[0].prefix.cache(tensors), self.greedy[:-1])
        same = logits.argmax(-1) == self.greedy[1:]
        return {"greedy_before_difference": int(same.long().cumprod(0).sum()), "greedy_same": int(same.sum())}

    def retrieval(self, cache: Cache, seed: int) -> dict[str, Any]:
        """Of the needles that the exact cache finds, those found here; the right answers' negative log-likelihood, nats."""
        if not self.needles:
            return {}
        found, nll = 0, 0.0
        for needle, able in self.needles:
            tensors = cache.code(needle.prefix, seed).tensors
            logits = lm.continuation_logits(self.model, needle.prefix.cache(tensors), needle.fed)
            right, loss = answer_of(logits, needle.following)
            found, nll = found + (able and right), nll + loss / len(self.needles)
        return {"needles_found": found, "needle_nll": nll}


def answer_of(logits: torch.Tensor, following: torch.Tensor) -> tuple[bool, float]:
    """Whether the right answer is the likeliest at each of its tokens, and its negative log-likelihood, nats."""
    logits, ids = logits[following >= 0], following[following >= 0]
    return bool((logits.argmax(-1) == ids).all()), float(torch.nn.functional.cross_entropy(logits, ids, reduction="sum"))


def ratio(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """KL of one cache over another's, and the standard error of it that windows (which both share) and seeds leave."""
    found = one["kl"] / other["kl"]
    left = one["token_kl"].mean(1) - found * other["token_kl"].mean(1)
    error = math.hypot(standard_error(samples(left)), one["kl_seed_error"], found * other["kl_seed_error"])
    return found, error / other["kl"]
