"""Law: ``generate`` must not feed a cache's own text to the model again.

It feeds the last ``tokens - cache.get_seq_length()`` ids of its prompt, but all of them where that difference is not positive:
the model would read the text a second time, at positions after it. pqcodec's caches detect this when they are asked for their
length, and raise an error.
"""

from __future__ import annotations

import sys
from typing import Any

from pqcodec.errors import InvalidArgument

_ASKING = "_prefill"  # the function of transformers that asks for the length in order to feed the rest


def check_fed(length: int) -> int:
    """``length``, the tokens of a cache; called by its ``get_seq_length``, whose caller in the stack is inspected.

    Raises InvalidArgument where that is ``generate`` with a prompt of no more tokens than the cache.
    """
    frame: Any = sys._getframe(2)
    if frame.f_code.co_name == "get_seq_length":  # an encoder-decoder's cache calls its part's
        frame = frame.f_back
    if not length or frame is None or frame.f_code.co_name != _ASKING:
        return length
    caller, options = frame.f_locals, frame.f_locals.get("model_kwargs")
    if not isinstance(options, dict) or not frame.f_globals.get("__name__", "").startswith("transformers."):
        return length
    of_all = bool(caller.get("use_inputs_embeds"))
    given = options.get("inputs_embeds") if of_all else caller.get("input_ids")
    tokens = getattr(given, "shape", (0, length + 1))[1]
    if not of_all:  # the mask, or its length in the config, exceeds a prompt that is the rest alone
        decodes = getattr(getattr(caller.get("self"), "config", None), "is_encoder_decoder", False)
        mask = options.get("decoder_attention_mask" if decodes else "attention_mask")
        masked = getattr(caller.get("generation_config"), "_mask_length", -1) if mask is None else mask.shape[1]
        of_all = masked == tokens
    if of_all and tokens <= length:
        raise InvalidArgument(
            f"generate is given {tokens} tokens and a cache of {length}: it has to feed one at least, and would feed all again "
            "on top of them. Pass more tokens, all from the first one on, or a cache of fewer (PrefixStore.get leaves one)"
        )
    return length
