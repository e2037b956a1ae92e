"""A cache as arrays of zarr: any program that reads zarr can slice it, and files convert without decoding."""

from tempfile import TemporaryDirectory

import numpy as np
import zarr

from pqcodec.formats.cache import load_safetensors, save_zarr
from pqcodec.formats.containers import convert

x = np.random.default_rng(0).standard_normal((2, 2, 8, 1000, 64)).astype(np.float16)  # layers, keys and values

with TemporaryDirectory() as folder:
    save_zarr(f"{folder}/kv.zarr", [(key, value) for key, value in x], metadata={"model": "none"})
    array = zarr.open(f"{folder}/kv.zarr")["layers/1/value"]
    print(array.shape, array.dtype, "in chunks of", array.chunks)
    part = array[..., 500:510, :]  # decodes the one chunk that holds these tokens
    convert(f"{folder}/kv.zarr", f"{folder}/kv.safetensors")
    tensors = load_safetensors(f"{folder}/kv.safetensors")
    print("the same in safetensors:", bool((tensors["layers.1.value"][:, 500:510] == part).all()))
