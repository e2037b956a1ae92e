"""Law: what a fleet has to know before it buys storage: tokens a gigabyte, and the link from which on loading is quicker.

``python -m benchmarks.fleet`` computes the sizes of LMCache's objects, quotes the times in ``results/ttft*.json`` and what
``benchmarks.two_nodes`` found, writes results/fleet.json, and writes the tables of formats/FLEETS.md anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import results_file
from benchmarks.readme import ROOT, between_marks, preset_of, result
from pqcodec import Rope
from pqcodec.formats.engines.chunks import ChunkCodec

PAGE = ROOT / "formats" / "FLEETS.md"
TABLES = ("sizes", "links", "nodes")  # of the page, each between a mark of its name and one of its end
CHUNK = 256  # tokens of an object, LMCache's default
GB = 10**9
PRESETS = ("pq4", "quad3", "pq3", "pq2.5")


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says of its cache: layers, KV heads of all ranks, coordinates of a head."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def plain(self) -> int:
        """Bytes of a token in 16 bits."""
        return self.layers * self.kv_heads * 2 * self.head_dim * 2

    def coded(self, preset: str) -> float:
        """Bytes of a token in LMCache's objects, of which everything counts."""
        codec = ChunkCodec(self.head_dim, self.kv_heads, preset, rope=Rope())
        return codec.size((1, self.layers, CHUNK, self.kv_heads * 2 * self.head_dim), "bfloat16") / CHUNK


MODELS = (
    Shape("Llama 3.1 8B", 32, 8, 128),
    Shape("Llama 3.1 70B", 80, 8, 128),
    Shape("Qwen2.5 7B", 28, 4, 128),
    Shape("Qwen3 32B", 64, 8, 128),
    Shape("Mistral Small 24B", 40, 8, 128),
    Shape("SmolLM2 135M", 30, 3, 64),
)


def sizes() -> list[dict[str, Any]]:
    """Of each model: tokens a gigabyte in 16 bits and by preset."""
    return [
        {"model": shape.name, "kib_a_token": shape.plain / 1024, "plain": GB / shape.plain}
        | {preset: GB / shape.coded(preset) for preset in PRESETS}
        for shape in MODELS
    ]


def links() -> list[dict[str, Any]]:
    """Of each prefix that ``benchmarks.ttft`` measured: the link in GB/s above which loading it is quicker than computing it.

    What is loaded is fetched first and decoded then, in the time that it takes from the page cache.
    """
    found = []
    for name in ("ttft", "ttft_gpu"):
        told = result(name)
        for row in told["rows"]:
            saved = {kind: row["prefill_s"] - row[f"{kind}_load_s"] for kind in ("store", "raw")}
            figures = {kind: row[f"{kind}_bytes"] / saved[kind] / GB if saved[kind] > 0 else None for kind in saved}
            about = {"model": told["model"], "device": told["device"], "tokens": row["tokens"], "preset": preset_of(told)}
            found.append(about | figures)
    return found


def size_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of ``sizes``."""
    lines = [
        f"| model | KiB a token, 16 bits | {' | '.join(('16 bits', *PRESETS))} |",
        "|---|---:|" + "---:|" * (1 + len(PRESETS)),
    ]
    for row in rows:
        cells = (f"{row[name]:,.0f}" for name in ("plain", *PRESETS))
        lines.append(f"| {row['model']} | {row['kib_a_token']:,.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def speed(gb_s: float | None) -> str:
    """A link's speed in words, of two digits or three.

    >>> speed(0.00342), speed(4.3), speed(None)
    ('3.4 MB/s', '4.3 GB/s', 'never')
    """
    if gb_s is None:
        return "never"
    return f"{gb_s:.3g} GB/s" if gb_s >= 0.1 else f"{1000 * gb_s:.2g} MB/s"


def link_table(rows: list[dict[str, Any]]) -> str:
    """Markdown of ``links``."""
    lines = ["| prefix | computed on | kept as | encoded | 16 bits |", "|---|---|---|---:|---:|"]
    for row in rows:
        model = "a model of Llama 8B's shape" if row["model"] == "llama-shaped" else row["model"]
        device = f"{row['device']} of a CPU" if row["device"].endswith("threads") else row["device"]
        cells = (speed(row[kind]) for kind in ("store", "raw"))
        lines.append(f"| {row['tokens']:,} tokens of {model} | {device} | {row['preset']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def node_table(found: dict[str, Any]) -> str:
    """Markdown of what ``benchmarks.two_nodes`` found: a line for each prefix and way to its first token."""
    lines = [
        f"| prefix of {found['model']} that another node has put | MB on the wire | seconds to the first token |",
        "|---|---:|---:|",
    ]
    ways = {"store": f"a PrefixStore, {found['preset']}", "raw": "16-bit safetensors", "compute": "computed again"}
    for row in found["rows"]:
        for way, name in ways.items():
            sizes = f"{row['wire_bytes'][way] / 1e6:.1f}" if way != "compute" else "-"
            lines.append(f"| {row['tokens']:,} tokens: {name} | {sizes} | {row['first_token_s'][way]:.2f} |")
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """The page with what stands between its marks made anew."""
    tables = size_table(sizes()), link_table(links()), node_table(result("two_nodes"))
    for name, table in zip(TABLES, tables, strict=True):
        page = between_marks(page, name, table)
    return page


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(size_table(sizes()))
    print(link_table(links()))
    print(node_table(result("two_nodes")))
    results_file.write("fleet", "python -m benchmarks.fleet", {"chunk_tokens": CHUNK, "sizes": sizes(), "links": links()})


if __name__ == "__main__":
    main()
