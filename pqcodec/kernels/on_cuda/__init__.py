"""Encode and decode on NVIDIA GPUs, by CUDA C++ that is compiled at run time."""
