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
    """The table and the lines below it."""
    rate, speed, demo = result("rate_distortion"), result("cpu_speed"), result("demo")
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
        cpu = f"{speeds[name]['encode_ratio']:.2f}, {speeds[name]['decode_ratio']:.2f}" if name in speeds else ""
        lines.append(f"| {name} | {row['bits']:g} | {row['rel_mse']:.5f} | {row['ratio']:.2f}x | {model} | {cpu} |")
    machine = f"{speed['machine']}, {speed['cores']} cores, np.copyto {speeds['pq3']['copyto_gb_s']:.1f} GB/s of fp16"
    return "\n".join(
        [
            *lines,
            "",
            f"head_dim 128, radius included; KL in nats over {demo['scored']} tokens after a prefix of {demo['tokens']:,}. "
            f"Machine: {machine}.",
            f"Commands: `{rate['command']}`, `{speed['command']}`, `{demo['command']}`; files: `benchmarks/results/`.",
            "",
        ]
    )


def with_figures(readme: str) -> str:
    """The README with the table between its marks made anew."""
    return re.sub(f"({MARKS[0]}).*?({MARKS[1]})", lambda m: m[1] + figures() + m[2], readme, flags=re.DOTALL)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(with_figures(path.read_text()))


if __name__ == "__main__":
    main()
