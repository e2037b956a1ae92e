"""Containers of encoded tensors: .pqkv, .safetensors and zarr; ``convert`` moves tensors between them without decoding."""

from pqcodec.formats.containers.kinds import EXTENSIONS, KINDS, container_of, convert, kind_of, open_encoded, write

__all__ = ["EXTENSIONS", "KINDS", "container_of", "convert", "kind_of", "open_encoded", "write"]
