"""Law: what a compressed KV cache does to a real model: every preset and the peers, on the same prefix, judged by what follows.

``python -m benchmarks.fidelity --model FOLDER --text FILE`` rounds the cache of a prefix to float16, has each codec encode
and decode it, and lets the model (float32) read on from the result; what it then says is held against what it says from its
own float32 cache. The texts of the results are Debian's: ``linux`` is admin-guide/sysctl/kernel.rst of linux-doc-6.1,
``devil`` is dict-devil from its first word on. Writes results/fidelity.<model>.<text>.json and .png. A cache's KL, perplexity
and top-1 are means over the seeds; its errors, the greedy text and the retrieval are those of seed 0.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pqcodec
from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.peers import peers
from pqcodec import Rope
from pqcodec.formats import load_cache, save_cache

SMOLLM2 = "smollm2"
PROBED = 64  # scored tokens whose queries the attention error is taken from
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the needles, as shares of the prefix
RATIOS = (("pq3", "paper"), ("pq3", "turboquant3+cures"), ("pq4", "kivi4"), ("pq2.5", "kivi2"))
WIDEST = 9  # bits of a cache that is in the plot; what fp16 loses is too little to see
SHOWN = ("paper", "turboquant3+cures", "kivi2", "pq2.5", "pq3", "pq4")  # in the plot by layer

Layers = list[tuple[torch.Tensor, torch.Tensor]]
console = Console()


# -- the model and its texts -------------------------------------------------------------------------------------
def load_model(name: str) -> tuple[str, Any, Any]:
    """(short name, model, tokenizer), float32: ``smollm2``, a transformers checkpoint's folder, or a .gguf file."""
    if name == SMOLLM2:
        return name, *lm.load_smollm2(lm.cache_dir())
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    path = Path(name).expanduser()
    if not path.exists():
        raise SystemExit(f"{name} is not there; pass a checkpoint's folder, a .gguf file, or {SMOLLM2}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    place = path.parent if file else path
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file)
    return path.stem if file else path.name, model.eval(), AutoTokenizer.from_pretrained(place, **file)


def rope_for(model: Any) -> Rope:
    """The model's RoPE; where its config scales the frequencies, those that its rotary module holds."""
    try:
        return lm.rope_of(model.config)
    except ValueError:
        return Rope(frequencies=model.get_decoder().rotary_emb.inv_freq.double().tolist())


@dataclass(frozen=True)
class Reading:
    """A prefix's cache and what is read on from it: fed token ids [n], those that follow each, and the exact logits [n, V]."""

    layers: Layers  # float32, as the model made them
    fed: torch.Tensor
    following: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, model: Any, prefix: torch.Tensor, fed: torch.Tensor, following: torch.Tensor) -> Reading:
        layers = lm.prefill(model, prefix)
        return cls(layers, fed, following, lm.continuation_logits(model, layers, fed))

    def stored(self) -> Layers:
        """The cache in float16, which is what every codec is given."""
        return [(key.half(), value.half()) for key, value in self.layers]


def needle_readings(model: Any, tokenizer: Any, ids: torch.Tensor, prefix: int) -> list[Reading]:
    """A reading for each depth: a pass key hidden in the text's first tokens, asked for behind them."""
    readings = []
    for number, depth in enumerate(DEPTHS):
        key = str(random.Random(number).randrange(10_000, 100_000))
        needle = lm.token_ids(tokenizer, f"\n\nThe secret pass key is {key}. Remember it. {key} is the secret pass key.\n\n")
        question = lm.token_ids(tokenizer, "\n\nThe secret pass key is")
        answer = lm.token_ids(tokenizer, f" {key}")
        place = int(depth * (prefix - len(needle)))
        hay = torch.cat([ids[:place], needle, ids[place : prefix - len(needle)]])
        following = torch.cat([torch.full((len(question) - 1,), -1), answer])  # the question is nobody's to foretell
        readings.append(Reading.of(model, hay, torch.cat([question, answer[:-1]]), following))
    return readings


# -- the caches --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cache:
    """A way to keep a cache: ``code`` takes float16 layers and a seed, and returns float32 ones and bits a coordinate."""

    name: str
    seeded: bool
    code: Callable[[Layers, int], tuple[Layers, float]]


def coordinates(layers: lm.Layers) -> int:
    return sum(tensor.numel() for layer in layers for tensor in layer)


def all_caches(rope: Rope) -> dict[str, Cache]:
    """The peers, then every preset of the split coding through a .pqkv file in memory, all of whose bytes count."""

    def of_peer(peer: Any) -> Cache:
        def code(layers: Layers, seed: int) -> tuple[Layers, float]:
            found = [peer.apply(key, value, seed) for key, value in layers]
            return [(key, value) for key, value, _ in found], mean(bits for *_, bits in found)

        return Cache(peer.name, peer.seeded, code)

    def of_preset(name: str) -> Cache:
        def code(layers: Layers, seed: int) -> tuple[Layers, float]:
            file = io.BytesIO()
            save_cache(file, [(key[None], value[None]) for key, value in layers], preset=name, rope=rope, seed=seed)
            decoded = [(key[0].float(), value[0].float()) for key, value in load_cache(file.getvalue())]
            return decoded, 8 * len(file.getvalue()) / coordinates(layers)

        return Cache(name, True, code)

    presets = [name for name in pqcodec.PRESETS if name != "paper"]
    found = [*map(of_peer, peers(rope).values()), *map(of_preset, presets)]
    return {cache.name: cache for cache in found}


# -- what is measured --------------------------------------------------------------------------------------------
def token_scores(exact: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """``model.compare``'s kl, top1 and loss change of each token alone: float64 [n] each."""
    rows = [lm.compare(exact[i : i + 1], logits[i : i + 1], ids[i : i + 1]) for i in range(len(ids))]
    scores = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("kl", "top1")}
    losses = [math.log(row["perplexity"]) - math.log(row["exact_perplexity"]) for row in rows]
    return scores | {"loss_change": torch.tensor(losses, dtype=torch.float64)}


def rel_mse(exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, list[float]]:
    """Squared error over squared norm, over all tensors and of each."""
    errors = [float((a - b).double().square().sum()) for a, b in zip(exact, other, strict=True)]
    norms = [float(a.double().square().sum()) for a in exact]
    return sum(errors) / sum(norms), [error / norm for error, norm in zip(errors, norms, strict=True)]


@torch.inference_mode()
def real_queries(model: Any, reading: Reading) -> list[tuple[torch.Tensor, float]]:
    """The queries [H, n, D], after RoPE, of the first fed tokens in each layer, and the factor its logits get."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    found: dict[int, tuple[torch.Tensor, float]] = {}

    def watched(module: Any, query: torch.Tensor, *rest: Any, scaling: float, **options: Any) -> Any:
        found[module.layer_idx] = (query[0], scaling)
        return sdpa_attention_forward(module, query, *rest, scaling=scaling, **options)

    AttentionInterface.register("watched", watched)
    AttentionMaskInterface.register("watched", sdpa_mask)
    usual = model.config._attn_implementation
    model.set_attn_implementation("watched")
    lm.continuation_logits(model, reading.layers, reading.fed[:PROBED])
    model.set_attn_implementation(usual)
    return [found[index] for index in sorted(found)]


def attention_output(query: torch.Tensor, factor: float, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What heads [H, n, D] read from the prefix's cache [Hkv, T, D] alone: [H, n, D]."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    return (query @ key.mT * factor).softmax(-1) @ value


@dataclass(frozen=True)
class Bench:
    """One model on one text: the exact readings that every cache is held against."""

    model: Any
    text: Reading
    queries: list[tuple[torch.Tensor, float]]
    greedy: torch.Tensor | None  # token ids: the one fed first, then the model's own
    needles: list[tuple[Reading, bool]]  # and whether the model finds the answer in its exact cache

    def measure(self, cache: Cache, seeds: Sequence[int], tick: Callable[[], None]) -> dict[str, Any]:
        """All figures of a cache; ``tick`` is called after each seed."""
        stored, runs = self.text.stored(), []
        for seed in seeds if cache.seeded else seeds[:1]:
            layers, bits = cache.code(stored, seed)
            logits = lm.continuation_logits(self.model, layers, self.text.fed)
            runs.append(token_scores(self.text.logits, logits, self.text.following))
            if seed == seeds[0]:
                once = {"name": cache.name, "bits": bits, **self.errors(layers), **self.greedy_text(layers)}
                once |= self.retrieval(cache, seed)
            tick()
        token_kl = torch.stack([run["kl"] for run in runs]).mean(0)
        by_seed = [run["kl"].mean().item() for run in runs]
        return {
            **once,
            "kl": token_kl.mean().item(),
            "kl_standard_error": (token_kl.std() / len(token_kl) ** 0.5).item(),
            "kl_by_seed": by_seed,
            "kl_spread": pstdev(by_seed),
            "ppl_change": mean(math.exp(run["loss_change"].mean().item()) - 1 for run in runs),
            "top1": mean(run["top1"].mean().item() for run in runs),
            "token_kl": token_kl,
        }

    def errors(self, layers: Layers) -> dict[str, Any]:
        """relMSE of keys, of values and of the attention's output, over all layers and by layer."""
        exact, figures = self.text.layers, {}
        for index, role in enumerate(lm.ROLES):
            figures[f"{role}_rel_mse"], figures[f"{role}_rel_mse_by_layer"] = rel_mse(
                [layer[index] for layer in exact], [layer[index] for layer in layers]
            )
        outputs = [
            [attention_output(*query, *layer) for query, layer in zip(self.queries, cache, strict=True)]
            for cache in (exact, layers)
        ]
        figures["attention_rel_mse"], figures["attention_rel_mse_by_layer"] = rel_mse(*outputs)
        return figures

    def greedy_text(self, layers: Layers) -> dict[str, int]:
        """Tokens before the first that differs from the exact cache's greedy text, and how many of that text's tokens are
        the likeliest here too, each after the exact text's own (both from one pass over that text).
        """
        if self.greedy is None:
            return {}
        same = lm.continuation_logits(self.model, layers, self.greedy[:-1]).argmax(-1) == self.greedy[1:]
        return {"greedy_before_difference": int(same.long().cumprod(0).sum()), "greedy_same": int(same.sum())}

    def retrieval(self, cache: Cache, seed: int) -> dict[str, Any]:
        """Of the needles that the exact cache finds, those found here; the right answers' negative log-likelihood, nats."""
        if not self.needles:
            return {}
        found, nll = 0, 0.0
        for needle, able in self.needles:
            layers, _ = cache.code(needle.stored(), seed)
            right, loss = answer_of(lm.continuation_logits(self.model, layers, needle.fed), needle.following)
            found, nll = found + (able and right), nll + loss / len(self.needles)
        return {"needles_found": found, "needle_nll": nll}


def answer_of(logits: torch.Tensor, following: torch.Tensor) -> tuple[bool, float]:
    """Whether the right answer is the likeliest at each of its tokens, and its negative log-likelihood, nats."""
    logits, ids = logits[following >= 0], following[following >= 0]
    return bool((logits.argmax(-1) == ids).all()), float(torch.nn.functional.cross_entropy(logits, ids, reduction="sum"))


def ratio(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """KL of one cache over another's, and the standard error of it that the tokens, which both share, leave."""
    found = one["kl"] / other["kl"]
    left = one["token_kl"] - found * other["token_kl"]
    return found, (left.std() / len(left) ** 0.5 / other["kl"]).item()


# -- what is told ------------------------------------------------------------------------------------------------
def tables(title: str, rows: list[dict[str, Any]], report: dict[str, Any]) -> tuple[Table, Table]:
    """What the model says, and why."""
    heads = ["bits", "KL, nats", "± tokens", "± seeds", "ppl change", "top-1 same"]
    costs = _table(title, heads)
    heads = ["keys", "values", "attention"]
    heads += ["same until", "same"] * ("greedy_tokens" in report) + ["found", "NLL"] * ("needles" in report)
    errors = _table("relMSE; greedy text; needles", heads)
    for row in rows:
        spread = f"{row['kl_spread']:.5f}" if len(row["kl_by_seed"]) > 1 else ""
        change = f"{100 * row['ppl_change']:+.2f} %" if row["ppl_change"] < 10 else f"x {1 + row['ppl_change']:.4g}"
        cells = [f"{row['bits']:.3f}", f"{row['kl']:.5f}", f"{row['kl_standard_error']:.5f}", spread]
        costs.add_row(row["name"], *cells, change, f"{100 * row['top1']:.1f} %")
        cells = [f"{row[f'{what}_rel_mse']:.5f}" for what in (*lm.ROLES, "attention")]
        if "greedy_tokens" in report:
            cells += [str(row["greedy_before_difference"]), f"{row['greedy_same']}/{report['greedy_tokens']}"]
        if "needles" in report:
            cells += [f"{row['needles_found']}/{report['needles']}", f"{row['needle_nll']:.3f}"]
        errors.add_row(row["name"], *cells)
    return costs, errors


def _table(title: str, heads: Sequence[str]) -> Table:
    shown = Table(title=title, padding=0)
    shown.add_column("cache", no_wrap=True)
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    return shown


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for row in (row for row in rows if row["bits"] < WIDEST):
        ours = row["name"] in pqcodec.PRESETS and row["name"] != "paper"
        left.semilogy(row["bits"], row["kl"], "o" if ours else "s", color="tab:blue" if ours else "tab:gray")
        left.annotate(row["name"], (row["bits"], row["kl"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
        if row["name"] in SHOWN:
            right.semilogy(row["attention_rel_mse_by_layer"], "-" if ours else "--", label=row["name"])
    left.set(title=title, xlabel="bits per coordinate, everything stored", ylabel="next-token KL, nats")
    right.set(title="relMSE of the attention's output", xlabel="layer")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    if right.get_lines():
        low, high = right.get_ylim()
        right.set_ylim(low / 4, high)  # room for the legend
        right.legend(fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def read_bench(options: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Bench, dict[str, Any]]:
    """The exact readings and what the report says of them."""
    ids = lm.token_ids(tokenizer, options.text.read_text(encoding="utf-8"))
    prefix, end = options.prefix, options.prefix + options.scored
    if len(ids) <= end:
        raise SystemExit(f"{options.text} has {len(ids)} tokens; more than {end} are needed")
    text = Reading.of(model, ids[:prefix], ids[prefix:end], ids[prefix + 1 : end + 1])
    config, key = model.config, text.layers[0][0]
    report = {"model_type": config.model_type, "layers": len(text.layers), "kv_heads": key.shape[0], "head_dim": key.shape[2]}
    report |= {"prefix": prefix, "scored": options.scored, "seeds": options.seeds}
    report["perplexity"] = lm.compare(text.logits, text.logits, text.following)["perplexity"]
    greedy = None
    if options.greedy:
        first = int(text.fed[0])
        raw = SimpleNamespace(decode=list)  # the ids are wanted, not their text
        greedy = torch.tensor([first, *lm.greedy(model, raw, text.layers, first, options.greedy)])
        report["greedy_tokens"] = options.greedy
    needles: list[tuple[Reading, bool]] = []
    if options.retrieval:
        hidden = needle_readings(model, tokenizer, ids, prefix)
        answers = [answer_of(needle.logits, needle.following) for needle in hidden]
        needles = [(needle, able) for needle, (able, _) in zip(hidden, answers, strict=True)]
        report |= {"needles_hidden": len(hidden), "needles": sum(able for able, _ in answers)}
        report["needle_nll"] = mean(nll for _, nll in answers)
    return Bench(model, text, real_queries(model, text), greedy, needles), report


def run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    console.print(f"load {options.model}")
    name, model, tokenizer = load_model(options.model)
    caches = all_caches(rope_for(model))
    chosen = options.caches.split(",") if options.caches else list(caches)
    unknown = [cache for cache in chosen if cache not in caches]
    if unknown:
        raise SystemExit(f"caches {', '.join(unknown)} are unknown; choose from {', '.join(caches)}")
    console.print("read the text: the exact cache, what follows it, its greedy text and the needles")
    bench, report = read_bench(options, model, tokenizer)
    seeds, rows = range(options.seeds), []
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(seeds) if caches[cache].seeded else 1 for cache in chosen))
        for cache in chosen:
            progress.update(task, description=cache)
            rows.append(bench.measure(caches[cache], seeds, lambda: progress.advance(task)))
    rows.sort(key=lambda row: row["bits"])
    by_name = {row["name"]: row for row in rows}
    title = f"{name}, {options.text.stem}: {options.scored} tokens after a prefix of {options.prefix:,}"
    for table in tables(title, rows, report):
        console.print(table)
    ratios = {}
    for one, other in RATIOS:
        if one in by_name and other in by_name:
            found, error = ratio(by_name[one], by_name[other])
            ratios[f"{one}/{other}"] = {"kl_ratio": found, "standard_error": error}
            console.print(f"KL({one}) / KL({other}) = {found:.3f} ± {error:.3f}")
    for row in rows:
        del row["token_kl"]
    report = {"model": name, "text": options.text.name, **report, "ratios": ratios, "caches": rows}
    report |= {"torch": torch.__version__, "seconds": round(time.perf_counter() - start, 1)}
    arguments = f"--model {name} --text {options.text.name} --prefix {options.prefix} --scored {options.scored}"
    arguments += f" --seeds {options.seeds} --greedy {options.greedy}" + ("" if options.retrieval else " --no-retrieval")
    arguments += f" --caches {options.caches}" if options.caches else ""
    path = results_file.write(f"fidelity.{name}.{options.text.stem}", f"python -m benchmarks.fidelity {arguments}", report)
    picture = path.with_name(f"{path.name.removesuffix('.json')}.png")
    plot(title, rows, picture)
    console.print(f"wrote {path} and {picture.name} after {report['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description="What a compressed cache does to a model."
    )
    parser.add_argument("--model", default=SMOLLM2, help=f"a checkpoint's folder, a .gguf file, or {SMOLLM2} (default)")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text longer than what is read of it")
    parser.add_argument("--prefix", type=int, default=1024, metavar="N", help="tokens whose cache is coded")
    parser.add_argument("--scored", type=int, default=512, metavar="N", help="tokens read on from it")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="rotations that are tried where there is one")
    parser.add_argument("--caches", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--greedy", type=int, default=64, metavar="N", help="tokens of greedy text; 0: none")
    parser.add_argument("--retrieval", action=argparse.BooleanOptionalAction, default=True, help="hide and ask for pass keys")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads that torch uses")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
