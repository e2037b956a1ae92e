"""Law: the state of a text that a model keeps in its modules beside its cache, read from the model and put back into it.

Models with M-RoPE (Qwen2-VL, GLM-4V ...) keep ``rope_deltas``: the offset from a sequence's token numbers to its positions. A
cache without it, or with the deltas of another text, continues at wrong positions.
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
    """Whether a model's modules have such attributes, set or not; for a config, whether the code of its model has."""
    model = unwrapped(model)
    if hasattr(model, "modules"):
        return next(_state_attributes(model), None) is not None
    return _config_tells(getattr(model, "config", model))


def module_state(model: Any) -> dict[str, Any]:
    """The state by the path of its attribute (``model.rope_deltas``): a tensor (a copy), an int, or None while not set.

    It belongs to the text that the model has read last. Wrappers (``unwrapped``) do not change the paths. Empty for a config.
    Raises InvalidArgument for state of another type.
    """
    import torch

    found: dict[str, Any] = {}
    for path, module, name in _state_attributes(unwrapped(model)):
        value = getattr(module, name)
        if not (value is None or type(value) is int or isinstance(value, torch.Tensor)):
            raise InvalidArgument(
                f"the model keeps {path} = {type(value).__name__}, which pqcodec cannot save; it would be lost"
            )
        found[path] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return found


def restore_module_state(model: Any, state: Mapping[str, Any]) -> None:
    """Put the result of ``module_state`` back into the same model, or another of the same class.

    Tensors are copied to the module's device. Raises InvalidArgument, before anything changes, if the model has other paths.
    """
    import torch

    own = {path: (module, name) for path, module, name in _state_attributes(unwrapped(model))}
    if set(own) != set(state):
        raise InvalidArgument(
            f"the cache goes with state of the model's modules, {sorted(state)}; this model's modules have {sorted(own)}: "
            "pass the model itself, of the class and the transformers version that the cache was made with"
        )
    for path, (module, name) in own.items():
        value = state[path]
        if isinstance(value, torch.Tensor):
            with torch.inference_mode(False):
                value = value.detach().to(next((p.device for p in module.parameters()), value.device), copy=True)
        setattr(module, name, value)


def check_rows(state: Mapping[str, Any], batches: set[int]) -> None:
    """Raises InvalidArgument where the state is of another number of sequences than the cache, so of a later text."""
    for path, value in state.items():
        rows = int(value.shape[0]) if getattr(value, "ndim", 0) else 1
        if any(batch % max(rows, 1) for batch in batches):
            raise InvalidArgument(
                f"the model's {path} is of {rows} sequences and the cache of {max(batches)}: the model has read another text "
                "since; save a cache right after the model has read it"
            )


def _state_attributes(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(path, module, attribute name) of the state in a model; nothing for other objects."""
    for prefix, module in model.named_modules() if hasattr(model, "named_modules") else ():
        for name in ATTRIBUTES:
            if name in vars(module) or name in module._buffers:
                yield f"{prefix}.{name}" if prefix else name, module, name


def _config_tells(config: Any) -> bool:
    """Whether the source of a config's model assigns such attributes; False for a pure text model's config."""
    module = type(config).__module__
    if not hasattr(config, "get_text_config") or ".configuration_" not in module:
        return False
    if config.get_text_config(decoder=True) is config:
        return False
    spec = find_spec(module.replace(".configuration_", ".modeling_"))
    if spec is None or spec.origin is None:
        return False
    return any(f".{name} = " in Path(spec.origin).read_text(encoding="utf-8") for name in ATTRIBUTES)
