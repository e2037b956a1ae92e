"""Caches as zarr groups, and the codec of their arrays (SPEC, Part III)."""
