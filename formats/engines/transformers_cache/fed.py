"""Law: what ``generate`` feeds on top of a cache: the text behind it, and never the cache's own text again.

It feeds the last ``tokens - cache.get_seq_length()`` ids of its prompt, and all of them where that is no number above 0: the
model then reads at positions that lie behind a text what is in it already. A cache of ours says so when it is asked its length.
"""

from __future__ import annotations

import sys
from typing import Any

from pqcodec.errors import InvalidArgument

_ASKING = "_prefill"  # the function of transformers' generation that asks for a length to feed by


def check_fed(length: int) -> int:
    """A cache's length, for the caller of who calls this; raises InvalidArgument where ``generate`` has nothing to feed."""
    frame: Any = sys._getframe(2)
    if frame.f_code.co_name == "get_seq_length":  # of an encoder-decoder's cache
        frame = frame.f_back
    if not length or frame is None or frame.f_code.co_name != _ASKING:
        return length
    told, options = frame.f_locals, frame.f_locals.get("model_kwargs")
    if not isinstance(options, dict) or not frame.f_globals.get("__name__", "").startswith("transformers."):
        return length
    of_all = bool(told.get("use_inputs_embeds"))
    given = options.get("inputs_embeds") if of_all else told.get("input_ids")
    tokens = getattr(given, "shape", (0, length + 1))[1]
    if not of_all:  # by the mask, which may have been put away: a shorter prompt is what follows alone
        decodes = getattr(getattr(told.get("self"), "config", None), "is_encoder_decoder", False)
        mask = options.get("decoder_attention_mask" if decodes else "attention_mask")
        masked = getattr(told.get("generation_config"), "_mask_length", -1) if mask is None else mask.shape[1]
        of_all = masked == tokens
    if of_all and tokens <= length:
        raise InvalidArgument(
            f"generate is given {tokens} tokens and a cache of {length}: it has to feed one at least, and would feed all again "
            "on top of them. Pass more tokens, all from the first one on, or a cache of fewer (PrefixStore.get leaves one)"
        )
    return length
