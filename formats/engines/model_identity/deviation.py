"""Law: the deviation of a model: what, beside the weights, differs from what its class and config make of it.

A model is compared, module by module and attribute by attribute, with a shell: its class built anew from its config on the meta
device, with its computed buffers filled by the class's own ``_init_weights``. So an ordinary model has no deviation, whatever
its attributes are called. Where no shell can be built, everything counts as deviation.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import config_digest, is_config, json_digest
from pqcodec.formats.engines.model_identity.watch import CONTAINERS, OBJECTS, Named, classes_of, modules_of, own_attributes
from pqcodec.formats.engines.model_identity.written import WrittenAttributes, attributes_written_by
from pqcodec.formats.places.locks import ForkLock

_WHERE_FROM = {  # attributes about a model's origin or how it runs, which do not change its numbers
    "name_or_path",
    "model_tags",
    "hf_device_map",
    "hf_quantizer",
    "quantization_method",
    "peft_config",
    "warnings_issued",
    "generation_config",
    "gradient_checkpointing",
    "forward",  # see ``refusals``
}
_BY_FORWARD = {  # attributes that forward itself sets, for its own use
    "rope_deltas",
    "cached_rotary_positional_embedding",
    "cached_sequence_length",
    "attention_map",
    "attn_gradients",
    "generated_audio_codes",
    "last_hidden_state",
    "expert_capacity",
    "input_dtype",
    "layers_are_rescaled",
}
_OF_LIBRARIES = {  # private attributes that libraries set on any module
    "_is_hf_initialized",
    "_weight_conversions",
    "_use_kernels",
    "_is_expert_parallel",
    "_is_quantized",
    "_reversed_padding_repeated_twice",
    "_attn_implementation",
    "_old_forward",
    "_hf_hook",
    "_hf_peft_config_loaded",
    "_auto_class",
}
_BY_ROPE = ("inv_freq", "max_seq_len_cached")  # of a RoPE that changes with length: recomputed by each forward
_MADE_BY_ROPE = ("long_inv_freq", "attention_scaling")  # and computed once
_ROPE_UTILS = "transformers.modeling_rope_utils"
_OF_TRANSFORMERS = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "peft")
_SHELLS = 4  # shells that are kept
_DEPTH = 8

_shells: OrderedDict[Any, Shell | None] = OrderedDict()
_lock = ForkLock()
_NOTHING: Any = object()  # in place of a value that does not count


@dataclass(frozen=True)
class Shell:
    """What a class and a config make of a model."""

    types: dict[str, str]  # class of each module, by path
    attributes: dict[str, dict[str, Any]]  # of each module, by path and name
    buffers: dict[str, list[Any]]  # computed buffers by name, in all variants (device, dtype) that may occur


def deviation(model: Any, modules: Named, written: WrittenAttributes, digest: Callable[[str, Any], bytes]) -> list[Any]:
    """Everything that deviates, as JSON; [] for an ordinary model.

    ``written``: the attributes that foreign code writes; ``digest``: digest of a tensor's name and bytes. Raises
    InvalidArgument for a function without a lasting name.
    """
    shell = _shell_of(model)
    differences: list[Any] = []
    packages = {kind.__module__.split(".")[0] for kind in type(model).__mro__} | {"torch"}
    for path, module in modules:
        kind = code.type_name(type(module))
        known = shell is not None and path in shell.types
        if shell is None or not known or shell.types[path] != kind or kind.split(".")[0] not in packages:
            differences.append([path, kind])
        expected = shell.attributes[path] if known and shell else {}
        for name, value, deep in _attributes(module, written):
            if name.endswith(_MADE_BY_ROPE) and _is_made_by_rope(module, name, value):
                continue
            at = f"{path}.{name}"
            found = _described(value, partial(digest, at), deep)
            if found is not _NOTHING and found != expected.get(name, _NOTHING):
                if not name.startswith("_"):
                    _check_code(found, at)
                differences.append([path, name, found])
        differences += [[path, name, None] for name in expected.keys() - vars(module).keys()]
        for name, buffer in _computed(module):
            at = f"{path}.{name}"
            if shell is None or not _equal(buffer, shell.buffers.get(at)):
                differences.append([path, name, digest(at, buffer).hex()])
    if shell is not None:
        differences += [[path, None] for path in shell.types.keys() - {path for path, _ in modules}]
    return sorted(differences, key=json.dumps)


def watched_tensors(modules: Named, written: WrittenAttributes) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of the tensors that are in no state_dict: computed buffers, and tensors in attributes."""
    for path, module in modules:
        for name, buffer in _computed(module):
            yield f"{path}.{name}", buffer
        for name, value, deep in _attributes(module, written):
            yield from _tensors(value, f"{path}.{name}", deep)


def _tensors(value: Any, name: str, objects: int, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "data_ptr"):
        yield name, value
    elif isinstance(value, CONTAINERS) and depth < _DEPTH:
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in members:
            yield from _tensors(member, f"{name}.{key}", objects, depth + 1)
    elif objects and _is_plain(value):
        for key, member in code.object_fields(value).items():
            yield from _tensors(member, f"{name}.{key}", objects - 1, depth + 1)


def _is_plain(value: Any) -> bool:
    return code.is_plain_object(value) and not is_config(value)


def _attributes(module: Any, written: WrittenAttributes) -> Iterator[tuple[str, Any, int]]:
    """(name, value, depth) of the attributes that count; ``depth``: nested objects to describe by their fields."""
    kind = type(module)
    own, turning, foreign = own_attributes(), _turns(module), code.is_foreign_class(kind)
    for name, value in vars(module).items():
        computed = turning and name.endswith(_BY_ROPE) and not name.endswith(_MADE_BY_ROPE)
        if name in own or name in _WHERE_FROM or name in _BY_FORWARD or computed:
            continue
        deep = OBJECTS if foreign and name not in written.changed else 0
        if callable(value) and not _is_module(value) and not isinstance(value, type) and hasattr(kind, name):
            if _overrides(module, name):
                yield name, value, deep
        elif not name.startswith("_") or (foreign and _is_set(kind, name, value, written)):
            yield name, value, deep


def _is_set(kind: Any, name: str, value: Any, written: WrittenAttributes) -> bool:
    """Whether a private attribute of foreign code is a setting, and not memory of the code or of a library."""
    if name in written.assigned or name in _OF_LIBRARIES:
        return False
    if any(hasattr(base, name) for base in kind.__mro__ if base.__module__ == "transformers.modeling_utils"):
        return False
    return name not in written.changed or isinstance(value, (bool, int, float, complex, str, bytes, type(None), type))


def _computed(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, buffer) of a module's buffers that are in no state_dict, without frequencies that forward recomputes."""
    turning = _turns(module)
    for name in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(name)
        kept = not (turning and name.endswith(_BY_ROPE)) or name.endswith("original_inv_freq") or _is_short(module, name)
        if buffer is not None and name not in _BY_FORWARD and kept:
            yield name, buffer


def _turns(module: Any) -> bool:
    """Whether a module is a RoPE that recomputes its frequencies as sequences grow."""
    return any("dynamic" in kind or kind == "longrope" for kind in _rope_types(module).values())


def _rope_types(module: Any) -> dict[str, str]:
    """The RoPE types of a module by type of layer; under "" where there is one for all layers."""
    kinds = vars(module).get("rope_type")
    kinds = kinds if isinstance(kinds, dict) else {"": kinds}
    return {str(layer): kind for layer, kind in kinds.items() if isinstance(kind, str)}


def _is_made_by_rope(module: Any, name: str, value: Any) -> bool:
    """Whether a changing RoPE's attribute is what transformers computes from the config, for short or long sequences."""
    kinds = _rope_types(module) if _turns(module) else {}
    layer = name.removesuffix(next(end for end in _MADE_BY_ROPE if name.endswith(end))).removesuffix("_")
    for each in [layer] if layer in kinds else kinds:
        found = list(_rope_parameters(module, each, kinds[each]))
        if not hasattr(value, "data_ptr"):
            if any(value == scaling for _, scaling in found):
                return True
        elif found and _is_close(value, found[-1][0]):  # those for long sequences
            return True
    return False


def _is_close(x: Any, y: Any) -> bool:
    import torch

    return x.shape == y.shape and torch.allclose(x.float().cpu(), y, rtol=1e-5, atol=0)


def _rope_parameters(module: Any, layer: str, kind: str) -> Iterator[tuple[Any, float]]:
    """(frequencies, scaling) that transformers computes for sequences within and beyond the original length.

    Empty frequencies and 1.0 for an unknown kind.
    """
    import torch

    make = getattr(sys.modules.get(_ROPE_UTILS), "ROPE_INIT_FUNCTIONS", {}).get(kind)
    if make is None:
        yield torch.empty(0), 1.0
        return
    own = getattr(module, f"{layer}_original_max_seq_len" if layer else "", getattr(module, "original_max_seq_len", None))
    beyond = [int(length) + 1 for length in (own, _original_length(module, layer)) if length]
    for length in (None, *beyond):
        with contextlib.suppress(Exception):  # a config that the function cannot read
            frequencies, scaling = make(module.config, "cpu", seq_len=length, **({"layer_type": layer} if layer else {}))
            yield frequencies.float(), scaling


def _original_length(module: Any, layer: str) -> Any:
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    parameters = parameters.get(layer, parameters) if layer else parameters
    return parameters.get("original_max_position_embeddings")


def _is_short(module: Any, name: str) -> bool:
    """Whether a dynamic RoPE has seen no sequence beyond its original length, so that it still uses the buffer ``name``."""
    prefix = name.removesuffix("inv_freq")
    kind = _rope_types(module).get(prefix.removesuffix("_"), "")
    seen = getattr(module, f"{prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", None))
    own = getattr(module, "original_max_seq_len", None)
    return "dynamic" in kind and seen is not None and own is not None and int(seen) <= int(own)


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _overrides(module: Any, name: str) -> bool:
    """Whether an attribute hides a method of the model's own code, which ``forward`` may call."""
    home = next((base for base in type(module).__mro__ if name in vars(base)), None)
    return home is not None and callable(vars(home)[name]) and not home.__module__.startswith(_OF_TRANSFORMERS)


def _described(value: Any, tensor: Callable[[Any], bytes], objects: int = 0, depth: int = 0) -> Any:
    """A value as JSON, or _NOTHING where it does not count.

    ``tensor``: digest of a tensor; ``objects``: nested objects to describe by their fields; ``depth``: of containers so far.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value if not hasattr(value, "value") else repr(value)
    if isinstance(value, (float, complex, bytes)):
        return {"number": repr(value)}
    if isinstance(value, (np.generic, np.ndarray)):
        return {"numbers": f"{value.dtype}{value.shape}", "digest": json_digest(value.tobytes().hex())}
    if hasattr(value, "data_ptr"):
        return {"tensor": tensor(value).hex() if value.device.type != "meta" else None}
    if isinstance(value, CONTAINERS) and depth < _DEPTH:
        if isinstance(value, dict):
            pairs = [[str(key), _described(member, tensor, objects, depth + 1)] for key, member in value.items()]
            return {"dict": sorted((pair for pair in pairs if pair[1] is not _NOTHING), key=json.dumps)}
        members = [_described(member, tensor, objects, depth + 1) for member in value]
        members = [None if member is _NOTHING else member for member in members]
        return {"set": sorted(members, key=json.dumps)} if isinstance(value, (set, frozenset)) else members
    if _is_module(value) or type(value).__module__ == "torch":  # devices, dtypes; modules are compared by themselves
        return _NOTHING
    if not isinstance(value, type) and is_config(value):
        return {"config": config_digest(value)}
    if isinstance(value, type):
        return {"code": code.type_name(value)}
    if isinstance(value, partial):
        parts = [_described(part, tensor, objects, depth + 1) for part in (value.func, value.args, value.keywords)]
        return {"partial": [None if part is _NOTHING else part for part in parts]}
    if callable(value) and hasattr(code.unbound(value), "__code__"):
        name, where = code.name_of(value), code.unbound(value).__code__.co_firstlineno
        content = {"code": name if code.is_lasting(name) else f"{name}:{where}"}
        if code.package_of(value) not in code.KNOWN + code.LIBRARIES:
            content["digest"] = json_digest(code.function_content(code.unbound(value)))
        return content
    if objects and _is_plain(value):
        fields = _described(code.object_fields(value), tensor, objects - 1, depth + 1)
        return {"object": code.type_name(type(value)), "class": json_digest(code.class_content(type(value))), "fields": fields}
    return {"object": code.type_name(type(value))}


def _check_code(found: Any, name: str) -> None:
    """Raises InvalidArgument for a function without a lasting name, also in containers."""
    if isinstance(found, (dict, list)):
        for member in found.values() if isinstance(found, dict) else found:
            _check_code(member, name)
    if isinstance(found, dict) and not code.is_lasting(str(found.get("code", ""))):
        raise InvalidArgument(
            f"the attribute {name!r} is or holds the function {found['code']}, which has no name of its own and is not what "
            "the model's class puts there: delete it, or pass an Identity of your own"
        )


def _equal(buffer: Any, computed: Any) -> bool:
    """Whether a buffer equals, byte for byte, one of the variants that the class computes."""
    import torch

    for each in computed or ():
        if buffer.dtype == each.dtype and buffer.shape == each.shape:
            one, two = (side.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for side in (buffer, each))
            if torch.equal(one, two):
                return True
    return False


# -- the shell ---------------------------------------------------------------------------------------------------
def _shell_of(model: Any) -> Shell | None:
    settings = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    attention = str(getattr(model.config, "_attn_implementation", None))
    key = (type(model), model.dtype, str(model.device), settings, attention)
    with _lock.held():
        if key in _shells:
            _shells.move_to_end(key)
            return _shells[key]
    try:
        shell = _built(model)
    except Exception:  # a class that needs more than its config, or memory
        shell = None
    with _lock.held():
        _shells[key] = shell
        while len(_shells) > _SHELLS:
            _shells.popitem(last=False)
    return shell


def _built(model: Any) -> Shell:
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        with torch.device("meta"), _made_as(model.dtype):
            shell = type(model)(copy.deepcopy(model.config))
        modules = modules_of(shell)
        written = attributes_written_by(classes_of(modules))
        attributes = {path: dict(_shell_attributes(module, written)) for path, module in modules}
        buffers: dict[str, list[Any]] = {}
        for device in {"cpu", model.device.type}:  # the last bits depend on device and dtype
            for dtype in {torch.get_default_dtype(), model.dtype}:
                with _made_as(dtype):
                    for name, value in _filled(shell, modules, model.device if device != "cpu" else "cpu").items():
                        buffers.setdefault(name, []).append(value)
    return Shell({path: code.type_name(type(module)) for path, module in modules}, attributes, buffers)


def _shell_attributes(module: Any, written: WrittenAttributes) -> Iterator[tuple[str, Any]]:
    for name, value, deep in _attributes(module, written):
        found = _described(value, lambda tensor: b"", deep)
        if found is not _NOTHING:
            yield name, found


def _filled(shell: Any, modules: Named, device: Any) -> dict[str, Any]:
    """The computed buffers by name that the classes' own code fills, as filled on a device."""
    import torch

    owners = {path: module for path, module in modules if hasattr(module, "_init_weights")}
    runs = []
    for fill in (0, 1):  # a buffer that is equal after both was filled
        for _, module in modules:
            for name, buffer in _computed(module):
                module._buffers[name] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device)
        with torch.device(device):
            for path, module in reversed(modules):  # inner modules first, as transformers does
                _initialize(owners, path, module)
        runs.append({f"{path}.{name}": buffer for path, module in modules for name, buffer in _computed(module)})
    one, two = runs
    return {name: buffer for name, buffer in one.items() if not buffer.numel() or _equal(buffer, [two[name]])}


def _initialize(owners: dict[str, Any], path: str, module: Any) -> None:
    """Call ``_init_weights`` of the innermost model of transformers that contains a module."""
    while path not in owners and path:
        path = path.rpartition(".")[0]
    with contextlib.suppress(Exception):  # code that needs memory for weights
        owners[path]._init_weights(module)


def _made_as(dtype: Any) -> Any:
    """A context in which new tensors of torch's default dtype have ``dtype``, in this thread only."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._device import _device_constructors

    constructors, default = _device_constructors(), torch.get_default_dtype()

    class Made(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            unasked = function in constructors and (kwargs or {}).get("dtype") is None
            return made.to(dtype) if unasked and getattr(made, "dtype", None) == default else made

    return Made()
