"""Law: the CUDA backend launches ``blocks.cu`` or ``quads.cu`` for groups that it ``takes``; every other group is Triton's.
So are side sections, but for the sums of tokens that means of groups that it takes are made of (``token_sums.py``).

NVIDIA GPUs of compute capability 8.0 and more; head_dim 64, 128 or 256, and of quads those of ``quads.py``, up to 576; rows
whose addresses are multiples of 16 bytes; quads to encode in blocks of up to 512 tokens. ``takes`` is the whole rule, but for
one thing that only the device knows: where ``kernel_layout`` finds no room in its shared memory, Triton's kernels code the
group as well. A kernel is compiled once a process for each kind of stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from typing import Any

import numpy as np
from cuda.bindings import driver

from pqcodec import constants as c
from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.on_cuda.compiled import Layout, compiled, definitions, layout, returned
from pqcodec.kernels.on_cuda.launches import SHARED_BYTES, launch, loaded
from pqcodec.kernels.on_cuda.quads import (
    BEST_ORDERS,
    DECODED_ORDERS,
    ENCODED_ORDERS,
    index_bytes,
    quads_definitions,
    quads_layout,
)
from pqcodec.kernels.on_cuda.tables import ORDERS, matrix_fits
from pqcodec.kernels.on_cuda.token_sums import PARTS, SumsKernel, SumsKind, sums_kind
from pqcodec.kernels.on_triton.backend import Triton
from pqcodec.kernels.spans import Group
from pqcodec.stream.header import Header

FEW = 8  # blocks for each multiprocessor, up to which large tables do not pay
SPREAD = 4  # blocks that a multiprocessor is given before the next one is used: four warps multiply together
MOST_TOKENS = 512  # of a block of quads that is encoded: a warp keeps its radii
LAUNCHES = 8  # of one group that may run at the same time; each has a line of 128 bytes to count in
_ALIGNED = 16  # bytes of a load; addresses of rows are multiples


def takes(verb: str, group: Group) -> bool:
    """Whether a kernel of this backend does ``verb`` ("encode" or "decode") to a group; if not, Triton's kernels do."""
    h = group.header
    of_quads = h.coding == c.CODING_QUADS
    row_bytes = index_bytes(h) if of_quads else h.row_bytes  # of words that a warp reads and writes
    rope = h.rope is None or h.rope.pairing == c.ROPE_INTERLEAVED or len(h.rope.frequencies) % 8 == 0
    item = c.ITEM_BYTES[h.dtype]
    return (
        h.affine is None
        and h.head_dim in (_quads_orders(verb, group.effort) if of_quads else ORDERS)
        and (h.chunk_tokens <= MOST_TOKENS or not of_quads or verb == "decode")
        and (h.rounds == 1 or matrix_fits(h.order, h.seed))
        and group.blocks < 1 << 31
        and all(tokens * row_bytes % 4 == 0 for s in group.spans for tokens in (h.chunk_tokens, s.header.coded_tokens))
        and rope
        and all(abs(s.stride) * item * h.chunk_tokens < 1 << 31 for s in group.spans)
        and all(s.payload % 4 == 0 and s.stride * item % _ALIGNED == 0 and not (s.starts % _ALIGNED).any() for s in group.spans)
    )


def _quads_orders(verb: str, effort: str) -> tuple[int, ...]:
    if verb == "decode":
        return DECODED_ORDERS
    return ENCODED_ORDERS if effort == "fast" else BEST_ORDERS


def header_of_kind(h: Header) -> Header:
    """The header that stands for all streams of a kind: without their shape, exact tokens and first position."""
    rope = h.rope and type(h.rope)(0, h.rope.pairing, h.rope.frequencies)
    return Header(
        h.coding,
        h.dtype,
        (1, h.head_dim),
        h.row_bits,
        h.radius_bits,
        h.seed,
        h.chunk_tokens,
        offsets=h.offsets,
        rope=rope,
        runs=h.runs,
        rounds=h.rounds,
    )


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on a device."""

    function: Any
    layout: Layout
    blob: Any  # the layout's, a torch tensor on the device


def kernel_layout(
    verb: str, kind: Header, few: bool, major: int = 9, limit: int = 232448, effort: str = "fast"
) -> Layout | None:
    """The layout of the kernel of one direction for a kind of streams; None where there is too little shared memory.

    ``few``: there are few blocks. ``major``: of the compute capability. ``limit``: bytes of shared memory. ``effort``: of an
    encoder's search.
    """
    if kind.coding == c.CODING_QUADS and verb == "decode":
        return quads_layout(kind, few, major, limit)
    return layout(verb, kind, few, major, limit, effort)


def machine_code(verb: str, kind: Header, found: Layout, architecture: str, effort: str = "fast") -> bytes:
    """The kernel as ``compiled`` gives it, for an architecture such as "sm_90"; ``effort``: of an encoder's search."""
    if kind.coding == c.CODING_QUADS and verb == "decode":
        source = "quads_teams.cu" if found.sharing > 1 else "quads.cu"
        macros = quads_definitions(verb, kind, found)
    else:
        source, macros = "blocks.cu", definitions(verb, kind, found, effort)
    return compiled(source, macros, architecture + "a" * found.warpgroups)


@lru_cache(maxsize=64)
def _kernel(verb: str, kind: Header, few: bool, device: str, effort: str) -> Kernel | None:
    """The kernel of one direction for a kind of streams; None where the device has too little shared memory."""
    import torch

    major, architecture, _, limit = _device(device)
    found = kernel_layout(verb, kind, few, major, limit, effort)
    if found is None:
        return None
    code = machine_code(verb, kind, found, architecture, effort)
    function = loaded(code, f"{verb}_stream_blocks", device, {SHARED_BYTES: found.shared_bytes})
    return Kernel(function, found, torch.from_numpy(found.blob).to(device))


@lru_cache(maxsize=64)
def _sums_kernel(kind: SumsKind, device: str) -> SumsKernel:
    """The kernel that sums up means' tokens."""
    import torch

    function = loaded(kind.machine_code(_device(device)[1]), "sum_tokens", device)
    return SumsKernel(function, kind, torch.from_numpy(kind.blob()[0]).to(device))


@lru_cache(maxsize=64)
def _device(device: str) -> tuple[int, str, int, int]:
    """Major compute capability, architecture, multiprocessors, and bytes of shared memory that a block may have."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # a context for the driver
        which = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        limit = returned(driver.cuDeviceGetAttribute(which, returned(driver.cuCtxGetDevice())))
    return properties.major, f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, limit


def thread_blocks(found: Layout, group: Group, processors: int) -> int:
    """How many thread blocks code a group on a device of so many multiprocessors."""
    coders = found.teams * found.sharing  # warps
    grid = min(max(processors // found.parts, 1), -(-group.blocks // min(coders, SPREAD) * found.sharing))
    if group.brief:  # as many blocks as warps that code, so that this launch's blocks end soon
        grid = max(grid, -(-group.blocks // coders))
    return grid * found.parts


def arguments(kernel: Kernel, group: Group) -> tuple[Any, ...]:
    """What a launch gets."""
    tensors = (group.rows, group.block_firsts, group.starts, group.block_flags, group.keys, kernel.blob)
    numbers = (np.int64(group.blocks), np.int32(group.search))
    return (*tensors, *numbers, *((next(_claims(group)),) if kernel.layout.couriers else ()))


def _claims(group: Group) -> Iterator[Any]:
    """Where teams of a launch count the blocks that they claim, int32 [2] zeros, of each launch in turn."""

    def make() -> Iterator[Any]:
        return cycle(group.put(np.zeros((LAUNCHES, 32), np.int32)))

    found: Iterator[Any] = group.once("claims", make)
    return found


class Cuda:
    """NVIDIA GPUs. Most of side sections, and groups that no kernel of its own takes, go to a Triton backend."""

    name = "cuda"

    def __init__(self) -> None:
        self._triton = Triton()

    def covers(self, header: Header) -> bool:
        """Whether this backend codes streams of such a header: those that ``takes`` leaves are Triton's."""
        return self._triton.covers(header)

    def check_device(self, device: Any) -> None:
        """Raises BackendUnavailable where this backend cannot reach tensors of a device."""
        import torch

        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 8:
            raise BackendUnavailable(
                f"backend 'cuda' codes tensors of NVIDIA GPUs of compute capability 8.0 and more, this one is on "
                f"{str(device)!r}; move it (bytes: pass device='cuda'), or choose backend 'triton' (other GPUs) or 'cpu'"
            )

    def prepare(self, verb: str, group: Group) -> None:
        """Allocate what ``verb`` ("encode" or "decode") writes, and load its kernel: a stream under capture allows neither."""
        self._triton.prepare(verb, group)
        kernel = self._once(verb, group)
        if kernel and kernel.layout.couriers:
            _claims(group)
        if verb == "encode":
            self._once_sums(group)

    def encode(self, group: Group) -> None:
        """Encode every block of a group; ``group.block_flags`` counts each block's vectors with NaN or Inf."""
        kernel = self._once("encode", group)
        if kernel is None:
            return self._triton.encode(group)
        self._launch(kernel, group)

    def decode(self, group: Group) -> None:
        """Check every block of a group (into ``group.block_flags``), and fill the rows that its spans want."""
        kernel = self._once("decode", group)
        if kernel is None:
            return self._triton.decode(group)
        self._launch(kernel, group)

    def write_sides(self, group: Group) -> None:
        """Write the means and the exact tokens of every lead of a group into its streams."""
        self._triton.write_sides(group, self._sum_tokens)

    def read_sides(self, group: Group) -> None:
        """Check offsets and exact tokens of every lead (into ``group.side_flags``), and fill the exact rows that are wanted."""
        self._triton.read_sides(group)

    def _once(self, verb: str, group: Group) -> Kernel | None:
        kernel: Kernel | None = group.once(verb, lambda: self._kernel(verb, group))
        return kernel

    def _once_sums(self, group: Group) -> SumsKernel | None:
        """The kernel that sums up tokens of a group's means; None where Triton's does."""

        def find() -> SumsKernel | None:
            kind = sums_kind(group) if self._once("encode", group) else None
            return None if kind is None else self._sums_kernel(kind, group)

        kernel: SumsKernel | None = group.once("sum_tokens", find)
        return kernel

    @staticmethod
    def _kernel(verb: str, group: Group) -> Kernel | None:
        """The kernel that codes a group; None where Triton's kernels do."""
        if not takes(verb, group):
            return None
        device = str(group.device)
        few = group.blocks <= FEW * _device(device)[2]
        effort = group.effort if group.header.coding == c.CODING_QUADS else "fast"  # of others it changes nothing
        return _kernel(verb, header_of_kind(group.header), few, device, effort)

    @staticmethod
    def _launch(kernel: Kernel, group: Group) -> None:
        if not group.blocks:
            return
        grid, found = thread_blocks(kernel.layout, group, _device(str(group.device))[2]), kernel.layout
        launch(kernel.function, grid, found.threads, found.shared_bytes, group.device, arguments(kernel, group))

    @staticmethod
    def _sums_kernel(kind: SumsKind, group: Group) -> SumsKernel:
        return _sums_kernel(kind, str(group.device))

    def _sum_tokens(self, group: Group) -> int:
        kernel = self._once_sums(group)
        if kernel is None:
            return self._triton.sum_tokens(group)
        self._launch_sums(kernel, group)
        return PARTS

    @staticmethod
    def _launch_sums(kernel: SumsKernel, group: Group) -> None:
        launch(kernel.function, kernel.grid(group), kernel.kind.threads, 0, group.device, kernel.arguments(group))
