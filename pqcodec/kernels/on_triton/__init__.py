"""Encode and decode on any GPU that Triton compiles for."""
