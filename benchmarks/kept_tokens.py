"""More tokens of fewer bits (arXiv 2412.12706) on a real model: ``python -m benchmarks.kept_tokens``.

Of 2,304 tokens of a text SnapKV keeps n, by the last 32 queries; kept keys and values take 16, 4, 3 or 2 bits, and n is
as many times larger. What 64 later queries get from them by attention is compared with what they get from all tokens: as
others code them, and with the first 4 tokens exact and keys centred before RoPE. Figures are means of several seeds. Sizes are
those of whole streams, keep lists and headers included, over the kept tokens' that take 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pqcodec
from benchmarks import model as models
from benchmarks import results_file
from pqcodec.attention import attend
from pqcodec.select import snapkv

TOKENS, LATER, WINDOW = 2304, 64, 32
LAYERS, BUDGETS, SEEDS = (1, 15, 29), (72, 144, 288), range(5)
RATES = {16: None, 4: "pq4", 3: "pq3", 2: "pq2"}  # bits: preset
# The same measured beforehand in plain numpy, without streams and of one seed: by bits, of each budget
KNOWN = {16: (0.188, 0.112, 0.067), 4: (0.067, 0.033, 0.018), 3: (0.061, 0.041, 0.033), 2: (0.25, 0.25, 0.25)}
TEXT = results_file.RESULTS.parent / "data" / "prose.txt"


@torch.inference_mode()
def captured(
    model: Any, ids: torch.Tensor, layers: Sequence[int] = LAYERS
) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of some layers, after RoPE: [heads, tokens, head_dim] each, of a model of transformers."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def look(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        if module.layer_idx in layers:
            found[module.layer_idx] = (query[0], key[0], value[0])
        return sdpa_attention_forward(module, query, key, value, *args, **options)

    AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    model(input_ids=ids[None], logits_to_keep=1, use_cache=False)
    return found


def encoded(x: torch.Tensor, positions: torch.Tensor, preset: str | None, options: dict[str, Any]) -> bytes:
    """A stream of the kept tokens of x [heads, tokens, head_dim]; ``preset``: None keeps them exactly, in float16."""
    options = {"exact_tokens": positions.shape[-1]} if preset is None else {"preset": preset, **options}
    return pqcodec.encode(x[None], keep=positions[None], **options)


def error(queries: torch.Tensor, exactly: torch.Tensor, streams: tuple[bytes, ...]) -> float:
    """Squared error of the output of attention over its squared norm."""
    out = attend(queries[None], *streams, causal=False)[0].double()
    return float(((out - exactly) ** 2).sum() / (exactly**2).sum())


def rows_of(layers: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], rope: pqcodec.Rope) -> list[dict[str, Any]]:
    """Error and size of every budget and rate, the mean of the layers and seeds."""
    rows = []
    for number, budget in enumerate(BUDGETS):
        for bits, preset in RATES.items():
            n, sizes = min(budget * 16 // bits, TOKENS), []
            errors: dict[str, list[float]] = {"plain": [], "cured": []}
            for q, k, v in layers.values():
                keys, values = (x[:, :TOKENS].half() for x in (k, v))
                queries, group = q[:, TOKENS:].float(), len(q) // len(k)
                weights = (queries @ keys.float().repeat_interleave(group, 0).mT * q.shape[-1] ** -0.5).double().softmax(-1)
                exactly = weights @ values.double().repeat_interleave(group, 0)
                positions = snapkv(q[:, TOKENS - WINDOW : TOKENS].float(), keys, n)
                for kind, cure in (("plain", {}), ("cured", {"exact_tokens": 4})):
                    of_keys = cure | {"center": "rope", "rope": rope} if cure else {}
                    for seed in SEEDS if preset else (0,):
                        streams = tuple(
                            encoded(x, positions, preset, {"seed": seed + at, **options})
                            for x, at, options in ((keys, 0, of_keys), (values, len(SEEDS), cure))
                        )
                        errors[kind].append(error(queries, exactly, streams))
                    sizes.append(sum(map(len, streams)) / (2 * len(k) * budget * k.shape[-1] * 2))
            row = {"budget": budget, "bits": bits, "tokens": n, "known": KNOWN[bits][number], "size": float(np.mean(sizes))}
            rows.append(row | {kind: float(np.mean(found)) for kind, found in errors.items()})
    return rows


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = models.load_smollm2(models.cache_dir())
    ids = models.token_ids(tokenizer, TEXT.read_text())[: TOKENS + LATER]
    rows = rows_of(captured(model, ids), models.rope_of(model.config))
    shown = Table(
        title=f"{TOKENS} tokens of SmolLM2, {LATER} later queries: relMSE of attention's output, mean of layers {LAYERS}"
    )
    for heading in ("16-bit tokens", "bits", "tokens kept", "plain", "known", "first 4 exact", "bytes over 16-bit"):
        shown.add_column(heading, justify="right")
    for row in rows:
        numbers = (f"{row[key]:.3g}" for key in ("plain", "known", "cured", "size"))
        shown.add_row(str(row["budget"]), str(row["bits"]), str(row["tokens"]), *numbers)
    Console().print(shown)
    print(f"wrote {results_file.write('kept_tokens', 'python -m benchmarks.kept_tokens', {'rows': rows})}")


if __name__ == "__main__":
    main()
