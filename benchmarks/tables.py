"""Law: the site's tables are drawn from benchmarks/results: ``python -m benchmarks.tables`` prints them as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.readme import MAIN_PIECE, MODELS, TEXTS, gpu_speeds, preset_of, result

Row = dict[str, Any]
Cell = Callable[[Row], object]
MARK = re.compile(r"^<!-- table: ([\w-]+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Table:
    """Rows out of one result file, or several of one kind, and a cell of each for every heading."""

    files: Sequence[str]
    rows: Callable[[Row], Sequence[Row]]
    columns: dict[str, Cell]
    chart: str = ""

    def markdown(self) -> str:
        """The table, its chart, and below it the machines, commands and files."""
        found = {name: result(name) for name in self.files}
        lines = [_line(self.columns), _line("---" if i == 0 else "---:" for i in range(len(self.columns)))]
        lines += [_line(cell(row) for cell in self.columns.values()) for one in found.values() for row in self.rows(one)]
        machines = dict.fromkeys(machine(one) for one in found.values())
        below = [f"Machine: {'; '.join(machines)}.", "", "Command:" if len(found) == 1 else "Commands:", ""]
        below += [f"- `{one['command']}`: `benchmarks/results/{name}.json`" for name, one in found.items()]
        chart = [f"![{self.chart}](results/{self.chart}.png)", ""] if self.chart else []
        return "\n".join([*lines, "", *chart, *below])


def machine(found: Row) -> str:
    """Where and when a file was measured; a GPU's name first."""
    at = found.get("environment", {})
    processor, cores = at.get("processor", found.get("machine")), at.get("cores", found.get("cores"))
    gpu = found.get("accelerator") or (found["device"] if "NVIDIA" in found.get("device", "") else "")
    day = f", {found['date']}" if "date" in found else ""
    return f"{gpu + ', ' if gpu else ''}{processor}, {cores} cores{day}"


def _line(cells: Any) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def number(key: str, form: str = ".2f") -> Cell:
    """A cell: what lies under a dotted key, in a format; empty where it was not measured."""

    def cell(row: Row) -> str:
        found: Any = row
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return "" if found is None else format(found, form)

    return cell


def text(key: str) -> Cell:
    """A cell: what lies under a key, as it is."""
    return lambda row: row.get(key, "")


def _caches(found: Row) -> list[Row]:
    """One row of a file of fidelity: each cache's divergence, and some over others'."""
    kl = {row["name"]: row["kl"] for row in found["caches"]}
    return [found | {"kl": kl, "over": {pair.replace(".", "_"): one["kl_ratio"] for pair, one in found["ratios"].items()}}]


def _kl(cache: str) -> Cell:
    return lambda row: format(row["kl"][cache], ".4f") if cache in row["kl"] else ""


def _named_rows(found: Row) -> list[Row]:
    return [{"name": name, **row} for name, row in found["rows"].items() if "missing" not in row]


def _by_preset(found: Row) -> list[Row]:
    """The rows of a file of stored prefixes, each with the preset that they were stored by."""
    return [{"preset": preset_of(found), **row} for row in found["rows"]]


def _main_piece(found: Row) -> list[Row]:
    """The row of a HostPool's own size of a piece, with the preset and the GPU."""
    told = {"preset": found["preset"], "gpu": found["accelerator"]}
    return [told | row for row in found["speed"] if row["piece_mib"] == MAIN_PIECE]


def _microseconds(name: str) -> Cell:
    return number(f"microseconds.{name}", ".0f")


CODECS: dict[str, Cell] = {
    "system": text("system"),
    "bits, keys": number("key_bits"),
    "bits, values": number("value_bits"),
    "bits, all": number("bits"),
    "relMSE, keys": number("key_rel_mse", ".4f"),
    "relMSE, values": number("value_rel_mse", ".4f"),
    "error of scores": number("score_error", ".4f"),
    "next-token KL": number("kl", ".4f"),
    "KL over pq's at equal bits": number("kl_over_pq"),
}


def _codecs(family: str) -> Table:
    """The systems of one family, and what others published of them."""
    return Table(
        ["codecs"],
        lambda found: [row for row in found["rows"] if row["family"] == family],
        CODECS | {"as published": text("theirs")},
    )


GPU_SPEEDS: dict[str, Cell] = {
    "preset": text("preset"),
    "encode, GB/s": number("encode_gb_s", ".0f"),
    "decode, GB/s": number("decode_gb_s", ".0f"),
    "encode, share of a device copy": number("encode_ratio"),
    "decode, share of a device copy": number("decode_ratio"),
}
MOVING: dict[str, Cell] = {
    "a kernel that only reads and writes what encode does": number("moving_as_encode_ratio"),
    "what decode does": number("moving_as_decode_ratio"),
}
RELOADS: dict[str, Cell] = {
    "preset": text("preset"),
    "tokens": number("tokens", ","),
    "computing the prefix, s": number("prefill_s", ".3f"),
    "loading it from a PrefixStore, s": number("store_load_s", ".3f"),
    "times faster": number("prefill_over_store", ".1f"),
    "time over raw safetensors": number("store_over_raw"),
    "bytes over raw safetensors": number("bytes_over_raw"),
}
TABLES = {
    "rate": Table(
        ["rate_distortion"],
        lambda found: found["gaussian"]["128"],
        {
            "preset": text("preset"),
            "bits a coordinate": number("bits", "g"),
            "relMSE": number("rel_mse", ".5f"),
            "over Lloyd-Max and a norm of 16 bits, at equal bits": number("ratio"),
        },
        "rate_distortion",
    ),
    "neighbours": Table(
        ["neighbours"],
        lambda found: found["rows"],
        {
            "preset": lambda row: row["preset"] + (", best effort" if row["effort"] == "best" else ""),
            "bits a coordinate": number("bits", "g"),
            "Gaussian": number("gaussian", ".4f"),
            "its algorithm alone": number("gaussian_known", ".4f"),
            "keys": number("key", ".4f"),
            "its algorithm alone, keys": number("key_known", ".4f"),
            "values": number("value", ".4f"),
            "encoding over pq3": number("encode_over_pq3", ".1f"),
            "decoding over pq3": number("decode_over_pq3", ".1f"),
        },
    ),
    "codecs": Table(
        ["codecs"],
        lambda found: found["rows"],
        {
            "on the frontier": lambda row: "yes" if row["frontier"] else "",
            **CODECS,
            "encoding over pq3": number("encode_over_pq3"),
            "decoding over pq3": number("decode_over_pq3"),
        },
        "codecs",
    ),
    "codecs-ours": _codecs("ours"),
    "codecs-paper": _codecs("the seed paper"),
    "codecs-wu": _codecs("Wu et al."),
    "codecs-kivi": _codecs("KIVI"),
    "codecs-llama-cpp": _codecs("llama.cpp"),
    "codecs-more-tokens": _codecs("More Tokens"),
    "codecs-kvquant": _codecs("KVQuant"),
    "codecs-qjl": _codecs("QJL"),
    "codecs-think": _codecs("ThinK"),
    "codecs-lorc": _codecs("LoRC"),
    "codecs-decoquant": _codecs("DecoQuant"),
    "codecs-combined": _codecs("combined"),
    "shared-ranges": Table(
        ["published"],
        lambda found: found["ranges"],
        {
            "preset": text("preset"),
            "bits, own ranges": number("own_bits"),
            "relMSE, own ranges": number("own", ".4f"),
            "bits, shared ranges": number("shared_bits"),
            "relMSE, shared ranges": number("shared", ".4f"),
            "KVQuant alone, shared ranges": number("known", ".4f"),
        },
    ),
    "q-norm": Table(
        ["q_norm"],
        lambda found: found["rows"],
        {
            "preset, of keys and of values": lambda row: f"{row['preset']}-key, {row['preset']}",
            "levels": text("way"),
            "bits": number("bits"),
            "relMSE, keys": number("key_rel_mse", ".4f"),
            "relMSE, values": number("value_rel_mse", ".4f"),
            "error of scores": number("score_error", ".4f"),
            "next-token KL": number("kl", ".4f"),
        },
    ),
    "decoquant": Table(
        ["published"],
        lambda found: found["decoquant"],
        {
            "preset": text("preset"),
            "of": text("role"),
            "bits": number("bits"),
            "relMSE": number("error", ".4f"),
            "DecoQuant alone": number("known", ".4f"),
            "relMSE of rounding alone": number("rounded", ".4f"),
            "rounding alone, known": number("rounded_known", ".4f"),
        },
    ),
    "kept": Table(
        ["kept_tokens"],
        lambda found: found["rows"],
        {
            "float16 tokens": number("budget", "g"),
            "bits": number("bits", "g"),
            "tokens kept": number("tokens", "g"),
            "error, plain": number("plain", ".3f"),
            "known": number("known", ".3f"),
            "error, first tokens exact": number("cured", ".3f"),
            "bytes over the budget's": number("size"),
        },
    ),
    "exact": Table(
        ["exact_vectors.smollm2", "exact_vectors.qwen2.5-coder-0.5b"],
        lambda found: [{"model": found["model"], **row} for row in found["rows"]],
        {
            "model": text("model"),
            "exact of a chunk": text("way"),
            "bytes over 16-bit": number("over_16_bits", ".4f"),
            "relMSE, keys": number("key_rel_mse", ".4f"),
            "relMSE, values": number("value_rel_mse", ".4f"),
            "next-token KL": number("kl", ".4f"),
            "standard error": number("kl_standard_error", ".4f"),
        },
    ),
    "kvquant": Table(
        ["neighbours"],
        lambda found: found["kvquant"],
        {
            "preset": text("preset"),
            "bits, keys": number("key_bits", ".2f"),
            "keys before RoPE": number("keys_before_rope", ".4f"),
            "KVQuant alone": number("keys_known", ".4f"),
            "keys after RoPE, centred before": number("keys_after_rope", ".4f"),
            "bits, values": number("value_bits", ".2f"),
            "values, heads joined": number("values_of_all_heads", ".4f"),
            "KVQuant alone, values": number("values_known", ".4f"),
            "values, single heads": number("values_of_one_head", ".4f"),
        },
    ),
    "sketch-scores": Table(
        ["neighbours"],
        lambda found: found["sketch_scores"],
        {
            "preset": text("preset"),
            "queries that share a key": text("queries"),
            "scores of 65,536 keys, ms": number("milliseconds", ".1f"),
            "times as fast as decoding them": number("over_decoding", ".1f"),
        },
    ),
    "fidelity": Table(
        [f"fidelity.{file}.{name}" for file in MODELS.values() for name in TEXTS],
        _caches,
        {
            "model": text("model"),
            "text": lambda row: row["text"].removesuffix(".txt"),
            **{cache: _kl(cache) for cache in ("quad3", "pq2.5", "pq3", "pq4", "pq6")},
            "pq3 over TurboQuant": number("over.pq3/turboquant3+cures"),
            "pq4 over KIVI-4": number("over.pq4/kivi4"),
            "pq2.5 over KIVI-2": number("over.pq2_5/kivi2"),
        },
    ),
    "equal-bits": Table(
        ["quads/equal_bits"],
        lambda found: found["lines"],
        {
            "model": text("model"),
            "text": lambda row: row["text"].removesuffix(".txt"),
            "split coding": text("split"),
            "effort of quads": text("effort"),
            "bits a coordinate": number("bits"),
            "KL of split coding": number("kl_split", ".4f"),
            "KL of quads": number("kl_quads", ".4f"),
            "quads over split": number("ratio"),
        },
    ),
    "adversarial": Table(
        ["adversarial"],
        lambda found: [row for row in found["rows"] if row["head_dim"] == 128],
        {
            "preset": text("preset"),
            "cases": number("cases", ","),
            "relMSE of Gaussian vectors": number("nominal", ".5f"),
            "worst case's mean over that": number("worst_mean"),
        },
    ),
    "demo": Table(
        ["demo"],
        lambda found: found["presets"],
        {
            "preset": text("preset"),
            "times smaller": number("ratio"),
            "bits a coordinate": number("bits_per_coordinate"),
            "next-token KL": number("kl", ".4f"),
            "same first choice": number("top1", ".1%"),
            "perplexity": number("ppl_change", "+.2%"),
        },
    ),
    "cpu": Table(
        ["cpu_speed"],
        lambda found: [row for row in found["rows"] if row["threads"] == found["cores"] and not row["keys"]],
        {
            "preset": text("preset"),
            "encode, GB/s": number("encode_gb_s"),
            "decode, GB/s": number("decode_gb_s"),
            "encode, share of np.copyto": number("encode_ratio"),
            "decode, share of np.copyto": number("decode_ratio"),
        },
    ),
    "gpu": Table(["gpu_speed"], lambda found: list(gpu_speeds(found).values()), GPU_SPEEDS, "gpu_speed"),
    "gpu-quads": Table(["quads/gpu_speed"], lambda found: list(gpu_speeds(found).values()), GPU_SPEEDS),
    "gpu-h200": Table(["quads/gpu_speed_h200"], lambda found: list(gpu_speeds(found).values()), GPU_SPEEDS | MOVING),
    "attention-cpu": Table(
        ["attention_cpu"],
        lambda found: found["rows"],
        {
            "preset": text("preset"),
            "tokens": number("tokens", ","),
            "heads, of keys": lambda row: f"{row['q_heads']}, {row['kv_heads']}",
            "queries": text("queries"),
            "RoPE centred": lambda row: "yes" if row["rope"] else "no",
            "from codes, ms": number("codes_ms", ".1f"),
            "times faster than decoding first": number("speedup"),
            "times as fast as exact float32 tensors": number("to_uncompressed"),
        },
    ),
    "attention-gpu": Table(
        ["attention_gpu"],
        lambda found: found["rows"],
        {
            "preset": text("preset"),
            "sequences": text("batch"),
            "tokens": number("tokens", ","),
            "from codes, µs": _microseconds("codes"),
            "decoded first, µs": _microseconds("decode_first"),
            "exact, flash, µs": _microseconds("flash"),
            "exact, cuDNN, µs": _microseconds("cudnn"),
            "times as fast as the best exact one": number("speedup"),
        },
    ),
    "wu-scores": Table(
        ["wu_scores"],
        lambda found: [row for row in found["rows"] if row["dtype"] == "float16"],
        {
            "preset": text("preset"),
            "tokens": number("tokens", ","),
            "from codes, µs": number("microseconds", ".0f"),
            "from codes by Triton, µs": number("triton_microseconds", ".0f"),
            "exact float16, torch's best, µs": lambda row: f"{row['exact_microseconds'][row['best_exact']]:.0f}",
            "times as fast as the exact one": number("speedup"),
        },
    ),
    "generate-gpu": Table(
        ["generate_gpu"],
        lambda found: found["rows"],
        {
            "preset": text("preset"),
            "sequences": text("batch"),
            "tokens before": number("tokens", ","),
            "a step from codes, ms": number("milliseconds.codes"),
            "exact, flash, ms": number("milliseconds.flash"),
            "exact, cuDNN, ms": number("milliseconds.cudnn"),
            "times as fast as the best exact one": number("speedup"),
            "from codes without graphs, ms": number("milliseconds.plain_codes"),
            "a token of generate, ms": number("generate_ms_a_token"),
        },
    ),
    "vq": Table(
        ["vq"],
        lambda found: found["rows"],
        {
            "vectors": text("tensor"),
            "preset": text("preset"),
            "bits a coordinate": number("bits", ".3f"),
            "relMSE": number("rel_mse", ".4f"),
            "known": number("known", ".4f"),
        },
    ),
    "files": Table(
        ["io_speed"],
        lambda found: found["rows"],
        {
            "file": text("name"),
            "MB": lambda row: f"{row['bytes'] / 1e6:.0f}",
            "save, s": number("save"),
            "load, cold, s": number("cold"),
            "load, warm, s": number("warm"),
            "load, cold, over raw": number("cold_ratio"),
        },
        "io_speed",
    ),
    "prefixes": Table(["ttft"], _by_preset, RELOADS, "ttft"),
    "prefixes-gpu": Table(["ttft_gpu"], _by_preset, RELOADS, "ttft_gpu"),
    "shared": Table(
        ["shared_store"],
        _by_preset,
        {
            "preset": text("preset"),
            "tokens": number("tokens", ","),
            "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
            "get, index and files in a folder, s": number("get_s.local", ".3f"),
            "get, index in Redis, s": number("get_s.shared", ".3f"),
            "get, all in Redis, s": number("get_s.redis", ".3f"),
        },
    ),
    "shared-clients": Table(
        ["shared_store"],
        lambda found: found["clients"],
        {
            "clients at once": number("clients", ""),
            "place": lambda row: {"shared": "index in Redis, blocks in a folder", "redis": "all in Redis"}[row["place"]],
            "get from the store, s": number("store.median_s", ".3f"),
            "get raw safetensors, s": number("raw.median_s", ".3f"),
            "store, GB/s of 16-bit cache": number("store.cache_gb_per_s"),
            "raw, GB/s of 16-bit cache": number("raw.cache_gb_per_s"),
        },
    ),
    "offload": Table(
        ["offload_speed", "quads/offload_speed_h200"],
        _main_piece,
        {
            "preset": text("preset"),
            "GPU": text("gpu"),
            "out, GB/s of tensors": number("out.pool_gb_s", ".0f"),
            "back, GB/s of tensors": number("back.pool_gb_s", ".0f"),
            "out, over pinned copies": number("out.ratio", ".1f"),
            "back, over pinned copies": number("back.ratio", ".1f"),
        },
        "offload_speed",
    ),
    "context": Table(
        ["long_context"],
        _named_rows,
        {
            "cache": text("name"),
            "tokens/s": number("tokens_per_s", ".1f"),
            "GPU memory at its peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
            "longest context, tokens": number("longest.tokens", ","),
        },
        "long_context",
    ),
}


def charts() -> list[str]:
    """The names of the pictures that the tables show, without their extension."""
    return [table.chart for table in TABLES.values() if table.chart]


def with_tables(page: str) -> str:
    """A page with a table after each mark ``<!-- table: NAME -->``; raises KeyError for a name that there is not."""
    return MARK.sub(lambda found: TABLES[found[1]].markdown(), page)


def main() -> None:
    for name, table in TABLES.items():
        print(f"## {name}\n\n{table.markdown()}\n")


if __name__ == "__main__":
    main()
