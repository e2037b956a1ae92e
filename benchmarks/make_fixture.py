"""Law: the KV tensors of a real model that the tests read: which layers, how many tokens, and how the file was made.

``python -m benchmarks.make_fixture`` writes tests/data/smollm2_kv.safetensors once; it never replaces it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from benchmarks import model as lm

PROSE = Path(__file__).parent / "data" / "prose.txt"
FIXTURE = Path(__file__).parent.parent / "tests" / "data" / "smollm2_kv.safetensors"
LAYERS = (0, 1, 15, 29)  # the first two hold most outliers
TOKENS = 324  # 3,072 bytes each
MAX_BYTES = 1_000_000


def main() -> None:
    if FIXTURE.exists():
        sys.exit(f"{FIXTURE} is there already, and a fixture is made once; remove it first if a new one is meant")
    model, tokenizer = lm.load_smollm2(lm.cache_dir())
    ids = lm.token_ids(tokenizer, PROSE.read_text(encoding="utf-8"))[:TOKENS]
    layers = lm.prefill(model, ids)
    metadata = {
        "model": lm.MODEL,
        "weights": f"{lm.GGUF} from {lm.DISTRIBUTION}",
        "licence": lm.LICENCE,
        "rope_theta": repr(lm.rope_of(model.config).theta),
        "text": f"first {TOKENS} tokens of benchmarks/data/prose.txt",
        "command": "python -m benchmarks.make_fixture",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    FIXTURE.parent.mkdir(parents=True, exist_ok=True)
    save_file(lm.named_tensors(layers, LAYERS), FIXTURE, metadata)
    size = FIXTURE.stat().st_size
    if size > MAX_BYTES:
        FIXTURE.unlink()
        sys.exit(f"the fixture would have {size} bytes; {MAX_BYTES} are allowed: lower TOKENS")
    print(f"{FIXTURE}: layers {LAYERS}, {TOKENS} tokens, {size} bytes")


if __name__ == "__main__":
    main()
