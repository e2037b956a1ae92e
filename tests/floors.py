"""The floors of the house: who may import whom, and which way calls go; test_house and test_walk hold them."""

from __future__ import annotations

ORDER = [  # of the modules of the core, from the floor up: a module imports from the lines above its own
    "errors constants",
    "codings.declared codings.bits stages.circle stream.orders stream.prng stream.report stream.source tensors.numbers threads",
    "codings.presets stream.checksum stream.index tensors.rows",
    "stages.rotation stream.sections",
    "stream.header",
    "codings.angles stages.centre stages.exact stream.seal tensors.arrays",
    "codings.plan options stages.registry",
    "codings.split",
    "codings.paper",
    "codings.look_ups codings.registry",
    "kernels.cpu.disk_cache kernels.job kernels.spans placed",
    "kernels.cpu.lanes kernels.on_triton.blocks kernels.on_triton.words kernels.reference",
    "kernels.cpu.samples kernels.cpu.tiles kernels.on_triton.backend",
    "kernels.cpu.backend kernels.on_cuda.backend",
    "backends words",
    "batch host",
    "device",
    "codec",
]

FORMATS_ORDER = ["places", "plain", "containers", "policy", "cache", "engines", "store offload"]  # of folders; likewise
CORE_ORDER = [  # the same, folders as one
    "errors constants threads",
    "stream tensors stages codings",
    "options placed",
    "kernels",
    "backends words",
    "batch host",
    "device",
    "codec",
]
