"""Law: the devices of the layers of a model that is spread over several, and moving a cache's layers to them."""

from __future__ import annotations

from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import unwrapped
from pqcodec.formats.engines.transformers_cache.state import CacheState, LayerState


def layer_devices(model: Any) -> list[Any]:
    """The device of each layer of a model's decoder, None for a layer without parameters; raises InvalidArgument."""
    decoder = unwrapped(model).get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise InvalidArgument(
            f"the layers of a {type(decoder).__name__}, which is on several devices, are not where others have them: pass "
            "device='cpu', and move each layer's keys and values to its own"
        )
    return [next((p.device for p in layer.parameters()), None) for layer in layers]


def placed(state: CacheState, devices: list[Any]) -> CacheState:
    """The state with the tensors of layer i moved to ``devices[i]``."""

    def moved(layer: LayerState, device: Any) -> LayerState:
        return LayerState(layer.kind, {path: x.to(device) for path, x in layer.tensors.items()}, layer.fields)

    def of(layers: Any) -> list[LayerState]:  # a model has more layers than its cache where some share others' keys
        return [moved(layer, device) for layer, device in zip(layers, devices, strict=False)]

    return CacheState(state.kind, {name: of(layers) for name, layers in state.parts.items()})
