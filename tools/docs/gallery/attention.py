"""Attention straight from codes: queries meet encoded keys and values, which are not decoded."""

import numpy as np
import torch

import pqcodec
from pqcodec.attention import attend

rng = np.random.default_rng(0)
keys, values = rng.standard_normal((2, 8, 2000, 128)).astype(np.float32)  # [kv_heads, tokens, head_dim]
queries = keys[:, [77]].repeat(4, 0)  # four heads of queries share one of keys; all look for token 77
k, v = (torch.from_numpy(x).repeat_interleave(4, 0) for x in (keys, values))
exact = torch.nn.functional.scaled_dot_product_attention(torch.from_numpy(queries), k, v).numpy()

for preset in ("quad2", "quad3", "pq4"):
    streams = [pqcodec.encode(x, preset=preset) for x in (keys, values)]
    found = attend(queries, *streams)
    error = ((found - exact) ** 2).sum() / (exact**2).sum()
    print(f"{preset:5} {sum(map(len, streams)):7} bytes, squared error / squared norm {error:.3f}")
