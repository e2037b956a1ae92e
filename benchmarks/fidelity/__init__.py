"""Law: what a compressed KV cache does to a real model: presets and peers on the same prefixes, judged by what follows.

``reading`` takes a model's cache apart and reads on from it, ``caches`` are the ways to keep one, ``measures`` holds one
against the exact cache, ``report`` tells, and ``__main__`` is the command ``python -m benchmarks.fidelity``.
"""
