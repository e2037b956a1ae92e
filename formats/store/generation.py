"""Law: ``PrefixStore.generate``: get, prefill of the rest, put, generate, put; the answer is that of ``model.generate``.

Where the store cannot help with a model or a request, ``model.generate`` runs alone, with a warning that says why. Errors of
the store become warnings and never change the answer.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any, Protocol

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.model_identity import Identity, unwrapped
from pqcodec.formats.store import contents
from pqcodec.formats.store.options import Request

PREFILL_TOKENS = 2048  # fed at once
STEPS = 64  # tokens after a kept prefix that are worth feeding one by one; with more, the whole prompt is fed at once


class Store(Protocol):
    """The methods of a ``PrefixStore`` that ``generate`` needs."""

    def get(self, model: Any, tokens: Any, *, extra: str = "", stepwise: bool = False) -> tuple[Any, int]:
        """``PrefixStore.get``."""
        ...

    def put(self, model: Any, tokens: Any, cache: Any, *, extra: str = "", wait: bool = True) -> Any:
        """``PrefixStore.put``."""
        ...


def generate(store: Store, model: Any, input_ids: Any, *, extra: str, wait: bool, **options: Any) -> Any:
    """``PrefixStore.generate`` with a store; arguments, result and errors are the same."""
    inner = unwrapped(model)
    if not hasattr(inner, "config"):
        raise InvalidArgument(f"a transformers model is expected, not {type(model).__name__}")
    request, identity = Request.of(inner, input_ids, options), Identity.of(inner)  # raises for what has no identity
    why = _why_alone(inner, identity, request)
    if why:
        warnings.warn(f"the model generates without the store: {why}", RuntimeWarning, stacklevel=3)
        return model.generate(request.ids, **request.options, **request.shown)
    return _through(store, model, identity, request, extra, wait)


def _why_alone(model: Any, identity: Identity, request: Request) -> str:
    """Why the model has to generate without the store, or an empty string. Raises InvalidArgument for an encoder-decoder."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise InvalidArgument(
            f"{type(model).__name__} is an encoder-decoder, whose cache depends on more than its tokens; call model.generate, "
            "and keep a cache with transformers_cache.save"
        )
    if request.padded:
        return (
            "generate leaves out tokens of the prompt that are the pad token; pass an attention_mask of ones if they are text"
        )
    if not request.caches:
        return "its generation config says use_cache=False, as if it were to keep nothing; pass use_cache=True to use the store"
    if request.inside:
        return "attentions and hidden states of a kept prefix are not there"
    longest = tc.longest_prefix(model.config)
    if longest is not None and request.ids.shape[1] > longest:
        return f"its RoPE scaling changes all keys of prompts beyond {longest} tokens"
    layers = tc.empty_cache(model.config).layers
    if request.answers > 1 and not all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
        return "a recurrent state cannot be repeated for several sequences"
    if request.shown and not contents.stand_ins(model.config):
        return "its config does not tell which tokens stand for what is shown"
    if not request.shown and not contents.is_text(request.ids[0].tolist(), model.config):
        return "some tokens stand for something that is not shown"
    if request.shown and tc.keeps_module_state(model):
        return f"{type(model).__name__} keeps the positions of what it is shown in its modules, beside the cache"
    behaviour = tc.behaviour(model, identity)
    if not behaviour.reusable or not behaviour.generates:
        return f"{type(model).__name__} does not compute the same from a kept prefix: {behaviour.objections}"
    return ""


def _through(store: Store, model: Any, identity: Identity, request: Request, extra: str, wait: bool) -> Any:
    inner, ids, last = unwrapped(model), request.ids, request.ids.shape[1] - 1
    name, runs = tc.argument_of(inner), tc.behaviour(inner, identity).runs
    longest, shown = tc.longest_prefix(inner.config), dict(request.shown)
    if shown:
        extra += f"\n{contents.digest(shown, ids)}"
    try:
        cache, length = store.get(model, ids, extra=extra, stepwise=True)
    except InvalidArgument:  # the request is refused before anything is computed
        raise
    except Exception as error:  # any error: the answer must not depend on the store
        _warn(f"nothing is taken from the store: {error!r}")
        cache, length = tc.empty_cache(inner.config), 0
    if not runs and 0 < length < last - STEPS:
        cache, length = tc.empty_cache(inner.config), 0
    if shown and not (length and _goes_on_as_text(inner, identity, request, cache, length, runs)):
        cache, length = tc.empty_cache(inner.config), 0
    elif shown:
        shown.clear()
    if not shown:
        _prefill(inner, name, ids[:, :last], cache, length, runs)
        tc.tell_tokens(cache, last)

    def keep(tokens: Any) -> None:
        if tokens.shape[1] > (longest or tokens.shape[1]) or not _holds(cache, tokens.shape[1]):
            return  # beyond ``longest`` keys depend on later tokens
        try:
            store.put(model, tokens, cache, extra=extra, wait=wait)
        except Exception as error:
            _warn(f"nothing is kept: {error!r}")

    if length < last and not shown:
        keep(ids[:, :last])
    if request.answers > 1 and not shown:
        cache.batch_repeat_interleave(request.answers)
    result = model.generate(ids, **{name: cache}, **request.options, **shown)
    if request.answers == 1:
        sequence = result if hasattr(result, "shape") else result.sequences
        keep(sequence[:, :-1])  # the last token was not fed
    return result


def _goes_on_as_text(model: Any, identity: Identity, request: Request, cache: Any, length: int, runs: bool) -> bool:
    """Whether a prompt's rest after a kept prefix is text, and the model continues it as if it had seen the shown inputs."""
    rest = request.ids[:, length:]
    if not contents.is_text(rest[0].tolist(), model.config) or (not runs and rest.shape[1] > 1):
        return False
    return tc.goes_on(model, identity, request.ids, cache, request.shown)


def _prefill(model: Any, name: str, ids: Any, cache: Any, first: int, runs: bool) -> None:
    """Feed ids [1, n] from position ``first`` on: in pieces or, without ``runs``, one by one after a prefix or all at once."""
    import torch

    last = ids.shape[1]
    step = PREFILL_TOKENS if runs else 1 if first else max(last, 1)
    with torch.no_grad():
        for start in range(first, last, step):
            model(input_ids=ids[:, start : min(start + step, last)], logits_to_keep=1, **{name: cache})


def _holds(cache: Any, tokens: int) -> bool:
    """Whether each layer of a cache that counts tokens has seen exactly ``tokens``."""
    return all(layer.tokens in (0, tokens) for layer in tc.state_of(cache).parts[""])


def _warn(what: str) -> None:
    with suppress(Warning):  # also where warnings are errors
        warnings.warn(f"the store is in trouble, {what}", RuntimeWarning, stacklevel=5)
