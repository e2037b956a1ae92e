"""A pool of host memory that is too small for its blocks: those used longest ago go to disk, and come back."""

from tempfile import TemporaryDirectory

import torch

from pqcodec.formats import HostPool

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
blocks = {f"request {n}": torch.randn(2, 8, 512, 128, device=device).half() for n in range(4)}  # keys and values of a layer

with TemporaryDirectory() as folder, HostPool("1MB", spill=folder) as pool:
    for name, block in blocks.items():
        pool.put(name, block)
    for name, block in blocks.items():
        back = pool.get(name)
        error = ((block.double() - back.double()) ** 2).sum() / (block.double() ** 2).sum()
        print(f"{name}: {tuple(back.shape)}, squared error / squared norm {float(error):.3f}")
    usage = pool.usage()
    print(f"{usage.blocks} blocks, {usage.blocks_on_disk} of them on disk only; {usage.logical_bytes} bytes of tensors")
