"""Caches as zarr groups (SPEC III.3): the arrays' codec, the writer, the reader, and the objects of a store."""
