"""Law: what a model keeps of a text in its modules instead of its cache, read from the model and put back into it.

Models with M-RoPE (Qwen2-VL, GLM-4V ...) keep ``rope_deltas``: how far the positions of each sequence are from its tokens'
numbers. A cache without it goes on at wrong positions, and so does a cache beside the deltas of another text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import unwrapped

ATTRIBUTES = ("rope_deltas", "_cached_decode_position_ids", "_prefill_len")  # of modules; the last two are GLM-Image's


def keeps_module_state(model: Any) -> bool:
    """Whether a model has such state, be it set or not. Of a config: whether transformers' code of its model has such state."""
    model = unwrapped(model)
    if hasattr(model, "modules"):
        return next(_places(model), None) is not None
    return _config_tells(getattr(model, "config", model))


def module_state(model: Any) -> dict[str, Any]:
    """All such state, by the path of its attribute (``model.rope_deltas``): a tensor (a copy), a number, or None while not set.

    It is that of the text which the model has read last; wrappers (``unwrapped``) do not change the paths. A config has none.
    Raises InvalidArgument for state of another type.
    """
    import torch

    found: dict[str, Any] = {}
    for path, module, name in _places(unwrapped(model)):
        value = getattr(module, name)
        if not (value is None or type(value) is int or isinstance(value, torch.Tensor)):
            raise InvalidArgument(
                f"the model keeps {path} = {type(value).__name__}, which pqcodec cannot save; it would be lost"
            )
        found[path] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return found


def restore_module_state(model: Any, state: Mapping[str, Any]) -> None:
    """Put what ``module_state`` told back into the same model, or another of its kind.

    Tensors go to the device of the module. Raises InvalidArgument, before anything is changed, where the model has other paths.
    """
    import torch

    places = {path: (module, name) for path, module, name in _places(unwrapped(model))}
    if set(places) != set(state):
        raise InvalidArgument(
            f"the cache goes with state of the model's modules, {sorted(state)}; this model's modules have {sorted(places)}: "
            "pass the model itself, of the class and the transformers version that the cache was made with"
        )
    for path, (module, name) in places.items():
        value = state[path]
        if isinstance(value, torch.Tensor):
            with torch.inference_mode(False):
                value = value.detach().to(next((p.device for p in module.parameters()), value.device), copy=True)
        setattr(module, name, value)


def check_rows(state: Mapping[str, Any], batches: set[int]) -> None:
    """Raises InvalidArgument where the state is of other sequences than the cache: of a text that was read later."""
    for path, value in state.items():
        rows = int(value.shape[0]) if getattr(value, "ndim", 0) else 1
        if any(batch % max(rows, 1) for batch in batches):
            raise InvalidArgument(
                f"the model's {path} is of {rows} sequences and the cache of {max(batches)}: the model has read another text "
                "since; save a cache right after the model has read it"
            )


def _places(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(path, module, attribute) of the state in a model; nothing of what is no model."""
    for prefix, module in model.named_modules() if hasattr(model, "named_modules") else ():
        for name in ATTRIBUTES:
            if name in vars(module) or name in module._buffers:
                yield f"{prefix}.{name}" if prefix else name, module, name


def _config_tells(config: Any) -> bool:
    """A config knows only the code of its model; one of a text model alone is no M-RoPE model's."""
    place = type(config).__module__
    if not hasattr(config, "get_text_config") or ".configuration_" not in place:
        return False
    if config.get_text_config(decoder=True) is config:
        return False
    spec = find_spec(place.replace(".configuration_", ".modeling_"))
    if spec is None or spec.origin is None:
        return False
    return any(f".{name} = " in Path(spec.origin).read_text(encoding="utf-8") for name in ATTRIBUTES)
