"""The floors of the house: who may import whom, and which way calls go; test_house and test_walk hold them."""

from __future__ import annotations

ORDER = [  # of the core's modules and folders, from the ground up: what is on a line imports from its own and from those above
    "errors constants threads sizes",
    "stream tensors stages codings",
    "options placed select bases calibrate",
    "kernels",
    "backends words",
    "batch host training",
    "device attend_parts attend_decoded attend_batch attend_layer attend_pages attend_device attention",
    "codec",
]

FORMATS_ORDER = [  # of folders, and of a module that stands elsewhere than its folder; likewise
    "places",
    "plain",
    "containers",
    "policy",
    "cache",
    "engines",
    "store offload",
    "engines.vllm",  # a plug-in that is on top of a store
]
