"""A tensor: its bytes under several presets, and how far the decoded numbers are off."""

import numpy as np

import pqcodec

x = np.random.default_rng(0).standard_normal((8, 1024, 128)).astype(np.float16)  # [heads, tokens, head_dim]
print("preset  kB   times smaller  squared error / squared norm")
print(f"fp16    {x.nbytes // 1000}")
for preset in ("quad2", "quad3", "pq3", "pq4", "pq6"):
    data = pqcodec.encode(x, preset=preset)
    error = x.astype(np.float64) - pqcodec.decode(data)
    relative = (error**2).sum() / (x.astype(np.float64) ** 2).sum()
    print(f"{preset:6}  {len(data) // 1000:4} {pqcodec.inspect(data).ratio:14.1f}  {relative:.4f}")

part = pqcodec.decode(data, tokens=(256, 512))  # reads only the blocks that hold these tokens
print("tokens 256 to 511:", part.shape)
