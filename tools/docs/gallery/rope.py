"""Keys under RoPE: what it is worth to name the model's rotation, and what a wrong theta costs."""

import matplotlib.pyplot as plt
import numpy as np

import pqcodec

rng = np.random.default_rng(0)
tokens, half, theta = 96, 32, 10000.0
angle = np.arange(tokens)[:, None] * theta ** (-np.arange(half) / half)  # radians [tokens, pairs of channels]
plain = rng.standard_normal((tokens, 2 * half)) + 6 * rng.standard_normal(2 * half)  # a mean that all tokens share
p, q = plain[:, :half], plain[:, half:]
keys = np.concatenate([p * np.cos(angle) - q * np.sin(angle), p * np.sin(angle) + q * np.cos(angle)], 1).astype(np.float32)

ways = {
    "as they are": {},
    "center='mean'": {"center": "mean"},
    "Rope(theta=1e6)": {"center": "rope", "rope": pqcodec.Rope(theta=1e6)},
    "Rope(theta=1e4)": {"center": "rope", "rope": pqcodec.Rope(theta=theta)},
}
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.imshow(keys.T, cmap="RdBu", vmin=-12, vmax=12, aspect="auto", interpolation="nearest")
left.set(title="keys after RoPE", xlabel="token", ylabel="channel")
for name, options in ways.items():
    error = keys - pqcodec.decode(pqcodec.encode(keys, **options))
    right.semilogy((error**2).mean(0), label=name)
    print(f"{name:16} mean squared error {(error**2).mean():.3f}")
right.set(title="squared error at 3 bits", xlabel="channel", ylim=(0.01, 10))
right.legend(ncols=2)
figure.savefig("rope.png", dpi=72)
