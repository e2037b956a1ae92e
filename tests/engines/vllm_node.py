"""A node of a fleet: vLLM on this machine's CPU, with the weights in a folder, in front of an LMCache server or of none.

``python vllm_node.py MODEL PORT`` (0: no server) answers every line of JSON on stdin, a list of prompts (lists of token ids),
by a line "answers " and JSON: for each prompt its ``tokens``, the likeliest next ones, and how many tokens of the prompt were
``cached``, which means that LMCache had them: vLLM's own prefix cache is off.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

ANSWERS = "answers "
TOKENS = 16


def connector(port: int) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        kv_connector_module_path="lmcache.integration.vllm.lmcache_mp_connector",
        kv_connector_extra_config={"lmcache.mp.host": "127.0.0.1", "lmcache.mp.port": port},
    )


def answers(model: LLM, prompts: list[list[int]]) -> list[dict[str, Any]]:
    told = []
    for prompt in prompts:
        chosen = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS)
        start = time.perf_counter()
        (answer,) = model.generate([{"prompt_token_ids": prompt}], chosen, use_tqdm=False)
        spent = time.perf_counter() - start
        told.append({"tokens": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens, "seconds": spent})
    return told


def hide_llvmlite() -> None:
    """vLLM 0.32 looks into ``__dict__`` of all that modules hold; llvmlite (numba's) makes up every attribute it is asked."""
    from llvmlite.binding import ffi

    made_up = ffi._lib_wrapper.__getattr__

    def only_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return made_up(self, name)

    ffi._lib_wrapper.__getattr__ = only_functions


def main(folder: str, port: str) -> None:
    hide_llvmlite()
    model = LLM(
        folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=1,
        enable_prefix_caching=False,
        kv_transfer_config=connector(int(port)) if int(port) else None,
    )
    print(ANSWERS + json.dumps([]), flush=True)
    for line in sys.stdin:
        print(ANSWERS + json.dumps(answers(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
