"""Law: the README's figures are those of benchmarks/results: ``python -m benchmarks.readme`` writes its table anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = {"SmolLM2": "smollm2", "Qwen2.5-Coder 0.5B": "qwen2.5-coder-0.5b", "Gemma 3 270M": "gemma3-270m"}
TEXTS = ("linux", "devil", "chat", "policy")
MAIN_PIECE = 128  # MiB a step of a HostPool, its default
MARKS = "<!-- figures -->\n", "<!-- end of figures -->"


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def figures() -> str:
    """The table and the lines below it; a GPU's figures once they were measured."""
    rate, speed, files, *ttft = (result(name) for name in ("rate_distortion", "cpu_speed", "io_speed", "ttft", "ttft_gpu"))
    gpu = result("gpu_speed") if (ROOT / "benchmarks" / "results" / "gpu_speed.json").exists() else None
    gaussian = {row["preset"]: row for row in rate["gaussian"]["128"]}
    speeds = {row["preset"]: row for row in speed["rows"] if row["threads"] == speed["cores"] and not row["keys"]}
    fidelity = {model: [result(f"fidelity.{file}.{text}") for text in TEXTS] for model, file in MODELS.items()}
    lines = [
        "| preset | bits/coord | relMSE, Gaussian | against Lloyd-Max + f16 norm, equal bits | "
        f"next-token KL: {', '.join(fidelity)} | encode, decode against np.copyto |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in gaussian.items():
        kl = ", ".join(f"{one['kl']:.4f}" for found in fidelity.values() if (one := _found(found[0], name)))
        cpu = _ratios(speeds.get(name))
        lines.append(f"| {name} | {row['bits']:g} | {row['rel_mse']:.5f} | {row['ratio']:.2f}x | {kl} | {cpu} |")
    one = next(iter(fidelity.values()))[0]
    scored = one.get("windows", 1) * one["scored"]
    below = [
        f"head_dim 128, radius included; KL in nats over {scored} tokens of Linux documentation after a prefix of "
        f"{one['prefix']:,}, mean of {one['seeds']} seeds. Machine: {speed['machine']}, {speed['cores']} cores, np.copyto "
        f"{speeds['pq3']['copyto_gb_s']:.1f} GB/s of fp16."
    ]
    if gpu:
        on_gpu = gpu_speeds(result("quads/gpu_speed")) | gpu_speeds(gpu)
        cells = [f"encode, decode on {gpu['accelerator']}, share of a device copy", "---:"]
        cells += [_ratios(on_gpu.get(name)) for name in gaussian]
        lines = [line + (f"{cell}|" if cell == "---:" else f" {cell} |") for line, cell in zip(lines, cells, strict=True)]
        row = on_gpu["pq3"]
        below.append(
            f"GPU: {gpu['accelerator']}, bf16: a device copy reads and writes {row['copy_tb_s']:.2f} TB/s in all, "
            f"pq3 encodes {row['encode_gb_s']:.0f} and decodes {row['decode_gb_s']:.0f} GB/s of input."
        )
    offload, context = result("offload_speed"), result("long_context")
    quads = result("quads/equal_bits"), result("quads/gpu_speed"), result("quads/ttft")
    below += [file_speeds(files), against_peers(fidelity), *map(reloading, ttft), offloading(offload, context)]
    below.append(of_quads(*quads))
    measured = (rate, speed, gpu, one, files, *ttft, offload, context, *quads)
    commands = ", ".join(f"`{found['command']}`" for found in measured if found)
    return "\n".join([*lines, "", *below, f"Commands: {commands}; files: `benchmarks/results/`.", ""])


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


def reloading(ttft: dict[str, Any]) -> str:
    """What a stored prefix saves."""
    row = ttft["rows"][-1]
    on_cpu = ttft["device"].endswith("threads")
    where = f"{ttft['cores']} cores" if on_cpu else f"an {ttft['device']}"
    model = ttft["model"] if on_cpu else "a model of Llama 8B's shape"
    return (
        f"A prefix of {row['tokens']:,} tokens of {model} comes from a PrefixStore in {row['store_load_s']:.2f} s, "
        f"{row['prefill_over_store']:.0f} times faster than computing it again on {where}, in "
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


def _ratios(row: dict[str, Any] | None) -> str:
    return f"{row['encode_ratio']:.2f}, {row['decode_ratio']:.2f}" if row else ""


def with_figures(readme: str) -> str:
    """The README with the table between its marks made anew."""
    return re.sub(f"({MARKS[0]}).*?({MARKS[1]})", lambda m: m[1] + figures() + m[2], readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text()))


if __name__ == "__main__":
    main()
