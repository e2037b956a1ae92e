"""Law: figures in texts are those of benchmarks/results: ``python -m benchmarks.readme`` writes them anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = {"SmolLM2": "smollm2", "Qwen2.5-Coder 0.5B": "qwen2.5-coder-0.5b", "Gemma 3 270M": "gemma3-270m"}
TEXTS = ("linux", "devil", "chat", "policy")
SHOWN = ("pq2", "pq2.5", "pq3", "pq4", "pq6", "quad2", "quad3", "paper")  # in the README
MAIN_PIECE = 128  # MiB a step of a HostPool, its default


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table() -> str:
    """The README's table: the presets between which people choose."""
    rate, speed, gpu, quads = (result(name) for name in ("rate_distortion", "cpu_speed", "gpu_speed", "quads/gpu_speed"))
    gaussian = {row["preset"]: row for row in rate["gaussian"]["128"]}
    on_cpu = {row["preset"]: row for row in speed["rows"] if row["threads"] == speed["cores"] and not row["keys"]}
    on_gpu = gpu_speeds(quads) | gpu_speeds(gpu)
    fidelity = _fidelity()
    lines = [
        "| preset | bits/coordinate | smaller than fp16 | relMSE | next-token KL | CPU, GB/s | GPU, GB/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in SHOWN:
        row = gaussian[name]
        kl = [found["kl"] for texts in fidelity.values() if (found := _found(texts[0], name))]
        cells = f"{row['bits']:g}", f"{16 / row['bits']:.1f}x", f"{row['rel_mse']:.4f}", f"{fmean(kl):.4f}" if kl else ""
        lines.append(f"| {' | '.join((name, *cells, _speeds(on_cpu.get(name), '.1f'), _speeds(on_gpu.get(name), '.0f')))} |")
    one = next(iter(fidelity.values()))[0]
    below = (
        "head_dim 128, radius included. relMSE of Gaussian vectors; KL in nats over Linux documentation behind an encoded "
        f"prefix of {one['prefix']:,} tokens, mean of {', '.join(fidelity)}; encode, decode of fp16 on {speed['cores']} cores "
        f"({speed['machine']}), of bf16 on an {gpu['accelerator']}."
    )
    return "\n".join([*lines, "", below, ""])


def words() -> str:
    """What the site says in words: of files, peers, prefixes, offload and quads."""
    files, *ttft = (result(name) for name in ("io_speed", "ttft", "ttft_gpu"))
    offload, context = result("offload_speed"), result("long_context")
    quads = result("quads/equal_bits"), result("quads/gpu_speed"), result("quads/ttft")
    told = [
        file_speeds(files),
        against_peers(_fidelity()),
        *map(reloading, ttft),
        offloading(offload, context),
        of_quads(*quads),
    ]
    return "\n".join([*(f"- {line}" for line in told), ""])


def _fidelity() -> dict[str, list[dict[str, Any]]]:
    """What each model says behind an encoded prefix, text by text."""
    return {model: [result(f"fidelity.{file}.{text}") for text in TEXTS] for model, file in MODELS.items()}


def file_speeds(files: dict[str, Any]) -> str:
    """What loading takes against raw safetensors, and what a partial read and a file add."""
    cold = ", ".join(f"{row['name'].removeprefix('pq3, ')} {row['cold_ratio']:.2f}x" for row in files["rows"][1:4])
    return (
        f"Files ({files['machine']}): loading {files['tensor_bytes'] / 2**30:.0f} GiB of fp16 kept as pq3, cold from a disk of "
        f"{files['rows'][0]['disk']:.1f} GB/s, takes of raw safetensors' time: {cold}; of a read of any 256 tokens of a head "
        f"{files['partial']['useful_share']:.0%} of the bytes are their rows."
    )


def against_peers(fidelity: dict[str, list[dict[str, Any]]]) -> str:
    """KL over that of peers: the geometric mean over models and texts, and the worst model's over its texts."""
    named = {
        "pq3/paper": "the paper's setting",
        "pq3/turboquant3+cures": "TurboQuant with the same two cures",
        "pq4/kivi4": "KIVI-4",
        "pq2.5/kivi2": "KIVI-2",
    }
    told = []
    for pair, peer in named.items():
        each = {model: geometric_mean([one["ratios"][pair]["kl_ratio"] for one in texts]) for model, texts in fidelity.items()}
        worst = max(each, key=lambda model: each[model])
        mean = geometric_mean(list(each.values()))
        bits = fmean(_of(one, pair.split("/")[1])["bits"] for texts in fidelity.values() for one in texts)
        told.append(f"{pair.split('/')[0]} {mean:.2g} of {peer} of {bits:.1f} bits ({worst} {each[worst]:.2g})")
    return f"KL over {len(TEXTS)} texts of each model, the mean and (in brackets) the worst model: {'; '.join(told)}."


def preset_of(found: dict[str, Any]) -> str:
    """What the prefixes of a results file were stored as: files that do not say it are of the default of their time."""
    preset: str = found.get("preset", "pq3")
    return preset


def reloading(ttft: dict[str, Any]) -> str:
    """What a stored prefix saves."""
    row = ttft["rows"][-1]
    on_cpu = ttft["device"].endswith("threads")
    where = f"{ttft['cores']} cores" if on_cpu else f"an {ttft['device']}"
    model = ttft["model"] if on_cpu else "a model of Llama 8B's shape"
    return (
        f"A prefix of {row['tokens']:,} tokens of {model}, as {preset_of(ttft)}, comes from a PrefixStore in "
        f"{row['store_load_s']:.2f} s, {row['prefill_over_store']:.0f} times faster than computing it again on {where}, in "
        f"{row['store_over_raw']:.2f} of the time and {row['bytes_over_raw']:.2f} of the bytes of raw 16-bit safetensors."
    )


def of_quads(equal: dict[str, Any], gpu: dict[str, Any], ttft: dict[str, Any]) -> str:
    """What quads do to models, to keys under RoPE and to a reload, against split coding or raw files."""
    fast, best = equal["ratios"]["fast"], equal["ratios"]["best"]
    models = {line["model"] for line in equal["lines"]}
    keys = {row["preset"]: row["decode_gb_s"] for row in gpu["rows"] if row["keys"]}
    row = ttft["rows"][0]
    searched = f"{best['geometric_mean']:.2f} instead of {best['geometric_mean_of_fast_there']:.2f} on {best['lines']} lines"
    return (
        f"Quads: at the bits of pq2.5 and pq3, next-token KL is {fast['geometric_mean']:.2f} of theirs, the mean over "
        f"{len(models)} models and {fast['lines']} lines of which the worst is {fast['worst']:.2f}; with best effort "
        f"{searched}. Keys that are centred under RoPE decode {keys['quad3'] / keys['pq3']:.1f} times as fast as with pq3 "
        f"({gpu['accelerator']}). A prefix of {row['tokens']:,} tokens comes from a PrefixStore in "
        f"{row['store_over_raw']:.2f} of the time of raw safetensors ({ttft['machine']})."
    )


def offloading(offload: dict[str, Any], context: dict[str, Any]) -> str:
    """Out of a GPU and back, and generation behind a long context."""
    speed = next(row for row in offload["speed"] if row["piece_mib"] == MAIN_PIECE)
    out, back = speed["out"], speed["back"]
    beside = [row for row in offload["beside"] if row["work"].startswith("pool") and row["piece_mib"] == MAIN_PIECE]
    equal, first = ([row for row in beside if row["priority"] == priority] for priority in (0, -1))
    host = context["rows"]["pq3 on the host"]["tokens_per_s"]
    return (
        f"Offload ({offload['accelerator']}, bf16 as pq3): to host memory at {out['pool_gb_s']:.0f} GB/s of tensors and back "
        f"at {back['pool_gb_s']:.0f}, {out['ratio']:.1f} and {back['ratio']:.1f} times as fast as pinned copies; beside matrix "
        f"products at {_least(equal):.0f} GB/s, which slows these by {_most(equal):.0%}, or at {_least(first):.0f} and by "
        f"{_most(first):.0%} if their stream has a higher priority. An 8B Llama behind "
        f"{context['tokens']:,} tokens in host memory makes {host:.0f} tokens/s, {context['host_over_offloaded']:.1f} times as "
        f"many as with transformers' offloaded cache; encoded on the GPU, a context {context['longest_over_exact']:.1f} times "
        f"as long as an exact one fits into {context['budget_gib']:.0f} GiB."
    )


def _least(beside: list[dict[str, Any]]) -> float:
    return min(row["gb_s"] for row in beside)


def _most(beside: list[dict[str, Any]]) -> float:
    return max(row["slow_down"] for row in beside)


def _of(fidelity: dict[str, Any], cache: str) -> dict[str, Any]:
    return next(row for row in fidelity["caches"] if row["name"] == cache)


def _found(fidelity: dict[str, Any], cache: str) -> dict[str, Any] | None:
    """The cache's row, where it was measured."""
    return next((row for row in fidelity["caches"] if row["name"] == cache), None)


def gpu_speeds(gpu: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The GPU's rows of bf16 tensors of head_dim 128 without options, by preset."""
    wanted = {"head_dim": 128, "dtype": "bfloat16", "backend": "auto", "keys": False}
    return {row["preset"]: row for row in gpu["rows"] if wanted.items() <= row.items()}


def _speeds(row: dict[str, Any] | None, form: str) -> str:
    return f"{row['encode_gb_s']:{form}}, {row['decode_gb_s']:{form}}" if row else ""


def between_marks(page: str, name: str, text: str) -> str:
    """The page with ``text`` between its marks ``<!-- name -->`` and ``<!-- end of name -->``."""
    marks = f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    return re.sub(marks, lambda m: m[1] + text + m[2], page, flags=re.DOTALL)


def with_figures(name: str) -> str:
    """A page of ``PAGES`` with what stands between its marks made anew."""
    return between_marks((ROOT / name).read_text(), "figures", PAGES[name]())


PAGES = {"README.md": table, "tools/docs/pages/benchmarks.md": words}


def main() -> None:
    for name in PAGES:
        (ROOT / name).write_text(with_figures(name))


if __name__ == "__main__":
    main()
