"""Law: the README's figures are those of benchmarks/results: ``python -m benchmarks.readme`` writes its table anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARKS = "<!-- figures -->\n", "<!-- end of figures -->"


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def figures() -> str:
    """The table and the lines below it; a GPU's figures once they were measured."""
    rate, speed, demo, files = (result(name) for name in ("rate_distortion", "cpu_speed", "demo", "io_speed"))
    gpu = result("gpu_speed") if (ROOT / "benchmarks" / "results" / "gpu_speed.json").exists() else None
    gaussian = {row["preset"]: row for row in rate["gaussian"]["128"]}
    speeds = {row["preset"]: row for row in speed["rows"] if row["threads"] == speed["cores"] and not row["keys"]}
    models = {row["preset"]: row for row in demo["presets"]}
    lines = [
        "| preset | bits/coord | relMSE, Gaussian | against Lloyd-Max + f16 norm, equal bits | KV file, SmolLM2 | "
        "next-token KL | encode, decode against np.copyto |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in gaussian.items():
        model = f"{models[name]['ratio']:.2f}x smaller | {models[name]['kl']:.4f}" if name in models else "|"
        cpu = _ratios(speeds.get(name))
        lines.append(f"| {name} | {row['bits']:g} | {row['rel_mse']:.5f} | {row['ratio']:.2f}x | {model} | {cpu} |")
    below = [
        f"head_dim 128, radius included; KL in nats over {demo['scored']} tokens after a prefix of {demo['tokens']:,}. "
        f"Machine: {speed['machine']}, {speed['cores']} cores, np.copyto {speeds['pq3']['copyto_gb_s']:.1f} GB/s of fp16."
    ]
    if gpu:
        on_gpu = gpu_speeds(gpu)
        cells = [f"encode, decode on {gpu['accelerator']}, share of a device copy", "---:"]
        cells += [_ratios(on_gpu.get(name)) for name in gaussian]
        lines = [line + (f"{cell}|" if cell == "---:" else f" {cell} |") for line, cell in zip(lines, cells, strict=True)]
        row = on_gpu["pq3"]
        below.append(
            f"GPU: {gpu['accelerator']}, bf16: a device copy reads and writes {row['copy_tb_s']:.2f} TB/s in all, "
            f"pq3 encodes {row['encode_gb_s']:.0f} and decodes {row['decode_gb_s']:.0f} GB/s of input."
        )
    below.append(file_speeds(files))
    commands = ", ".join(f"`{found['command']}`" for found in (rate, speed, gpu, demo, files) if found)
    return "\n".join([*lines, "", *below, f"Commands: {commands}; files: `benchmarks/results/`.", ""])


def file_speeds(files: dict[str, Any]) -> str:
    """What loading takes against raw safetensors, and what a partial read and a file add."""
    cold = ", ".join(f"{row['name'].removeprefix('pq3, ')} {row['cold_ratio']:.2f}x" for row in files["rows"][1:4])
    return (
        f"Files ({files['machine']}): loading {files['tensor_bytes'] / 2**30:.0f} GiB of fp16 kept as pq3, cold from a disk of "
        f"{files['rows'][0]['disk']:.1f} GB/s, takes of raw safetensors' time: {cold}; of a read of any 256 tokens of a head "
        f"{files['partial']['useful_share']:.0%} of the bytes are their rows."
    )


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
