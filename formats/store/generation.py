"""Law: one prompt through a model and a store: get, prefill of the rest, put, generate, put."""

from __future__ import annotations

from typing import Any, Protocol

from pqcodec.errors import InvalidArgument
from pqcodec.formats import transformers_cache as tc

PREFILL_TOKENS = 2048  # at once


class Store(Protocol):
    """What is wanted of a ``PrefixStore``."""

    def get(self, model: Any, tokens: Any, *, extra: str = "") -> tuple[Any, int]: ...

    def put(self, model: Any, tokens: Any, cache: Any, *, extra: str = "", wait: bool = True) -> Any: ...


def generate(store: Store, model: Any, input_ids: Any, *, extra: str, wait: bool, **options: Any) -> Any:
    """What ``PrefixStore.generate`` does."""
    import torch

    name = tc.argument_of(model)
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    mask = options.get("attention_mask")
    if len(ids) != 1 or not ids.shape[1]:
        raise InvalidArgument(f"input_ids {tuple(input_ids.shape)}: one prompt [1, n] is expected")
    if mask is not None and not bool(mask.all()):
        raise InvalidArgument(
            "the attention mask leaves tokens out; a prefix in the store is of all tokens: pass them unpadded"
        )
    if name in options or options.get("use_cache") is False:
        raise InvalidArgument(f"{name} and use_cache are the store's business here; leave them out")
    cache, length = store.get(model, ids, extra=extra)
    last = ids.shape[1] - 1
    with torch.no_grad():
        for start in range(length, last, PREFILL_TOKENS):
            model(input_ids=ids[:, start : min(start + PREFILL_TOKENS, last)], logits_to_keep=1, **{name: cache})
    longest = tc.longest_prefix(model.config)

    def keep(tokens: Any) -> None:
        if longest is None or tokens.shape[1] <= longest:  # beyond, keys depend on what follows
            store.put(model, tokens, cache, extra=extra, wait=wait)

    if length < last:
        keep(ids[:, :last])
    answers = _answers(model, options)
    if answers > 1:
        cache.batch_repeat_interleave(answers)
    result = model.generate(ids, **{name: cache}, **options)
    if answers == 1:
        sequence = result if isinstance(result, torch.Tensor) else result.sequences
        keep(sequence[:, :-1])  # the last token was not fed
    return result


def _answers(model: Any, options: dict[str, Any]) -> int:
    """How many sequences one prompt becomes."""
    config = options.get("generation_config") or model.generation_config
    return max(int(options.get(key) or getattr(config, key, None) or 1) for key in ("num_beams", "num_return_sequences"))
