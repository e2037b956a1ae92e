"""Law: steps of one token of a model whose cache attends from codes on a GPU, captured in a CUDA graph and replayed.

Launching the kernels of a step one by one costs the host more time than they take. What a step does differs from the one before
in three numbers, which the graph finds in memory: the token, its position, and how many tokens the layers' tails hold. When
more tokens are encoded, the next step runs as it is, and the one after it is captured anew.
"""

from __future__ import annotations

import functools
import warnings
from types import TracebackType
from typing import Any

import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity.watch import Watch, configs_of, modules_of
from pqcodec.formats.offload.encoded_cache import EncodedCache
from pqcodec.formats.offload.workspace import Step

_CACHES = ("cache", "past_key_values")  # names of the argument, in releases
_KNOWN = {"input_ids", "attention_mask", "position_ids", *_CACHES, "use_cache", "return_dict", "logits_to_keep"}


class CapturedSteps:
    """A context in which a model's steps of one token with an ``EncodedCache`` are replays of a CUDA graph.

    ``cache``: ``EncodedCache(model, place="device", preset="quad3")``, or another preset of quads, of a model of
    ``attn_implementation="pqcodec"`` on a GPU. All other calls of the model, and steps that no graph can stand for (of padded
    sequences, with other arguments, while nothing is encoded yet) run as ever. ``replays``: steps that were replayed. ``why``:
    what kept the last step from being captured or replayed, or None.

    ::

        with CapturedSteps(model, cache):
            model.generate(ids, cache=cache, max_new_tokens=1000)

    On a CPU nothing is captured. Weights are read where they lie, and may change there. A model whose modules, attributes,
    hooks or settings have changed since a step was captured (another adapter, say) runs as it is, and is captured anew. Raises
    InvalidArgument for a cache that no graph can stand for.
    """

    def __init__(self, model: Any, cache: EncodedCache) -> None:
        if not isinstance(cache, EncodedCache):
            raise InvalidArgument(f"cache is a {type(cache).__name__}; an EncodedCache is expected, behind the model")
        layers = cache.encoded_layers
        if len(layers) != len(cache.layers):
            raise InvalidArgument(
                "some layers' caches are transformers' own, as those of sliding windows: no graph can stand for them"
            )
        if cache.options.place != "device":
            raise InvalidArgument(f"the cache's tokens are in place {cache.options.place!r}; make it with place='device'")
        self._model, self._cache, self._layers = model, cache, layers
        self.replays = 0
        self.why: str | None = None
        self._seen: list[Any] = []  # what the last step's memory was
        self._captured: _Captured | None = None

    def __enter__(self) -> CapturedSteps:
        self._forward = self._model.forward

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._step(args, kwargs)

        self._model.forward = forward
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._model.forward  # the instance's own; the class has the real one
        self._captured, self._seen = None, []

    def _step(self, args: Any, kwargs: dict[str, Any]) -> Any:
        self.why = self._why_not(args, kwargs)
        if self.why is not None:
            return self._forward(*args, **kwargs)
        now = [x for layer in self._layers for x in layer.memory_of_steps]
        same = len(now) == len(self._seen) and all(a is b for a, b in zip(now, self._seen, strict=True))
        if not same:
            self._captured, self._seen = None, now
            self.why = "the memory of the cache has changed: the next step is captured"
            return self._forward(*args, **kwargs)
        if self._captured is None or not self._captured.stands_for(kwargs):
            if not all(layer.reads_codes for layer in self._layers):  # but where a step was broken off
                self.why = "some layers have encoded nothing yet"
                return self._forward(*args, **kwargs)
            self._captured = None  # frees its memory
            try:
                self._captured = _Captured(self._model, self._forward, self._layers, kwargs)
            except RuntimeError as error:
                self._seen = []
                self.why = f"it cannot be captured: {error}"
                warnings.warn(f"a step of {type(self._model).__name__}: {self.why}", RuntimeWarning, stacklevel=4)
                return self._forward(*args, **kwargs)
        found = self._captured.replay(kwargs)
        if found is None:
            self._captured, self.why = None, "the model has changed: the next step is captured"
            return self._forward(*args, **kwargs)
        self.replays += 1
        return found

    def _why_not(self, args: Any, kwargs: dict[str, Any]) -> str | None:
        """Why no graph can stand for a call; None where one can."""
        ids, mask, given = (
            kwargs.get("input_ids"),
            kwargs.get("attention_mask"),
            {k for k, v in kwargs.items() if v is not None},
        )
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if args or not given <= _KNOWN or cache is not self._cache or ids is None:
            return f"a step is called with input_ids, the cache and no others but {', '.join(sorted(_KNOWN))}"
        if not ids.is_cuda or ids.ndim != 2 or ids.shape[1] != 1:
            return f"a step of one token on a GPU is expected, these are {tuple(ids.shape)} tokens on {ids.device}"
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if not self._layers[0].reads_codes:  # as all do: they have one config, and encode in the same steps
            return "nothing is encoded yet, or attention does not read codes"
        if any(not layer.room_in_tail for layer in self._layers):
            return "tokens are encoded in this step"
        if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
            return "there is a mask"
        return None


class _Captured:
    """A captured step: its graph, and the memory through which it is told of its token."""

    def __init__(self, model: Any, forward: Any, layers: Any, kwargs: dict[str, Any]) -> None:
        self._layers, self._rest = layers, _rest(kwargs)
        modules = modules_of(model)
        self._watch = Watch(modules, configs_of(modules))
        (sequences, _), device = kwargs["input_ids"].shape, kwargs["input_ids"].device
        workspace = layers[0].workspace
        with torch.inference_mode(False):
            self._ids = torch.zeros((sequences, 1), dtype=kwargs["input_ids"].dtype, device=device)
            self._positions = torch.zeros((sequences, 1), dtype=torch.long, device=device)
            step = Step(torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.long, device=device))
        self._step = step
        self._tell(kwargs)
        self._graph = torch.cuda.CUDAGraph()
        workspace.step = step
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                inputs = {"input_ids": self._ids, "position_ids": self._positions}
                self._out = forward(**self._rest, **inputs)
        finally:
            workspace.step = None

    def stands_for(self, kwargs: dict[str, Any]) -> bool:
        """Whether the graph was captured for a call like this one."""
        ids = kwargs["input_ids"]
        return _rest(kwargs) == self._rest and (ids.shape, ids.dtype) == (self._ids.shape, self._ids.dtype)

    def _tell(self, kwargs: dict[str, Any]) -> None:
        layer, positions = self._layers[0], kwargs.get("position_ids")
        self._ids.copy_(kwargs["input_ids"])
        if positions is None:
            self._positions.fill_(layer.get_seq_length())
        else:
            self._positions.copy_(positions)
        self._step.tokens.fill_(layer.tokens_in_tail + 1)
        self._step.place.fill_(layer.tokens_in_tail)

    def replay(self, kwargs: dict[str, Any]) -> Any:
        """The output of a step; None if the model is another one by now, and the step is to be done as if it was not begun."""
        self._tell(kwargs)
        self._graph.replay()
        if not self._watch.holds():  # while the GPU works
            return None
        for layer in self._layers:
            layer.advance()
        own = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self._out.items()}
        return type(self._out)(**own)


def _rest(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are the same at each step."""
    return {k: v for k, v in kwargs.items() if v is not None and k not in ("input_ids", "attention_mask", "position_ids")}
