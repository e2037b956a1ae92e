"""A node of a fleet: vLLM on this machine's CPU, with the weights in a folder, in front of LMCache, of a store or of neither.

``python vllm_node.py MODEL WHERE``: WHERE is the port of an LMCache server (0: none), or the JSON of pqcodec's connector. Every
line of JSON on stdin, a list of prompts (lists of token ids, or objects of ``prompt_token_ids`` and ``cache_salt``), is
answered by a line "answers " and JSON: for each prompt its ``tokens``, the likeliest next ones, the first one's ``logprobs`` by
token, and how many tokens of the prompt were ``cached``, which means outside of vLLM: its own prefix cache is off.
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


def connector(where: Any) -> KVTransferConfig | None:
    if isinstance(where, dict):
        return KVTransferConfig(
            kv_connector="PQCodecConnector",
            kv_role="kv_both",
            kv_connector_module_path="pqcodec.formats.engines.vllm",
            kv_connector_extra_config=where,
        )
    if not where:
        return None
    return KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        kv_connector_module_path="lmcache.integration.vllm.lmcache_mp_connector",
        kv_connector_extra_config={"lmcache.mp.host": "127.0.0.1", "lmcache.mp.port": where},
    )


def answers(model: LLM, prompts: list[Any]) -> list[dict[str, Any]]:
    told = []
    for prompt in prompts:
        asked = prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt}
        chosen = SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, logprobs=5)
        start = time.perf_counter()
        (answer,) = model.generate([asked], chosen, use_tqdm=False)
        spent = time.perf_counter() - start
        (said,) = answer.outputs
        first = {token: found.logprob for token, found in said.logprobs[0].items()}
        told.append({"tokens": list(said.token_ids), "cached": answer.num_cached_tokens, "seconds": spent, "logprobs": first})
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


def main(folder: str, where: str) -> None:
    hide_llvmlite()
    model = LLM(
        folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=1,
        enable_prefix_caching=False,
        kv_transfer_config=connector(json.loads(where)),
    )
    print(ANSWERS + json.dumps([]), flush=True)
    for line in sys.stdin:
        print(ANSWERS + json.dumps(answers(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
