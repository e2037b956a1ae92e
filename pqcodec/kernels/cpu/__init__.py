"""Encode and decode on a CPU: kernels of numba on explicit SIMD lanes."""
