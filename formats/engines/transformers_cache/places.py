"""Law: where the layers of a model lie that is spread over several devices, and a cache whose layers lie beside them."""

from __future__ import annotations

from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import unwrapped
from pqcodec.formats.engines.transformers_cache.state import CacheState, LayerState


def layer_devices(model: Any) -> list[Any]:
    """The device of each layer of a model's decoder; raises InvalidArgument where its layers cannot be found."""
    decoder = unwrapped(model).get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise InvalidArgument(
            f"the layers of a {type(decoder).__name__}, which is on several devices, are not where others have them: pass "
            "device='cpu', and move each layer's keys and values to its own"
        )
    return [next((p.device for p in layer.parameters()), None) for layer in layers]


def placed(state: CacheState, devices: list[Any]) -> CacheState:
    """The state with each layer's tensors on its device."""

    def moved(layer: LayerState, device: Any) -> LayerState:
        return LayerState(layer.kind, {path: x.to(device) for path, x in layer.tensors.items()}, layer.fields)

    def of(layers: Any) -> list[LayerState]:  # layers that share the keys of others have none of their own
        return [moved(layer, device) for layer, device in zip(layers, devices, strict=False)]

    return CacheState(state.kind, {name: of(layers) for name, layers in state.parts.items()})
