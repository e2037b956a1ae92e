"""Law: the identity of a model, as its caches know it, and when it has to be found anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import refusals
from pqcodec.formats.engines.model_identity.deviation import deviation, watched_tensors
from pqcodec.formats.engines.model_identity.digests import config_digest, is_config, json_digest, new_hash
from pqcodec.formats.engines.model_identity.foreign import foreign, foreign_classes, homes_of
from pqcodec.formats.engines.model_identity.registries import dicts_of, registered
from pqcodec.formats.engines.model_identity.tensors import Evidence, marks, refuse_unloaded, storages, tensor_digest
from pqcodec.formats.engines.model_identity.watch import Named, Watch, classes_of, configs_of, modules_of
from pqcodec.formats.engines.model_identity.wrappers import unwrapped
from pqcodec.formats.engines.model_identity.written import attributes_written_by

_ADAPTER_STATE = ("active_adapters", "active_adapter", "disable_adapters", "merged_adapters", "scaling")
_ADAPTER_ATTRIBUTES = {*_ADAPTER_STATE, "lora_A"}
_SAME_ATTENTION = (None, "eager", "sdpa")  # implementations that count as one
_CONDITIONS = ("state", "mode", "attention", "autocast")  # "" for an ordinary model


@dataclass(frozen=True)
class Identity:
    """A model as its caches know it; each digest is 32 hexadecimal digits. ``weights`` is "" where only a config was given."""

    config: Any  # the model's config, from which RoPE is read
    config_digest: str
    weights: str = ""
    adapters: str = ""
    dtype: str = ""
    device: Any = None
    spread: bool = False  # over several devices
    state: str = ""  # a digest of what, beside weights, is other than the config makes it
    mode: str = ""  # "train" or a digest of the modules that train; "" in eval mode
    attention: str = ""  # its implementation, unless eager or sdpa
    autocast: str = ""  # the dtype, where torch.autocast is on

    @classmethod
    def of(cls, model: Any, full: bool = False) -> Identity:
        """The identity of a transformers model, of a config alone, or the Identity itself; raises InvalidArgument.

        A model is read in full once. Every other call sees, without reading it all: modules, hooks, attributes, members of
        containers among these and settings of configs that are others; tensors that were exchanged, moved or written in
        place; and writing that bypasses torch's version counters (``w.data += d``) where it changes one of 16 elements spread
        over each tensor. So edits of whole tensors are seen, those of a few elements through ``.data`` may not be. On a GPU,
        and with ``full``, all bytes are looked at on every call, so that an edit of one element is seen.

        Functions that are registered for attention, masks, experts and RoPE are looked at by the names that are in use, and
        what modules of code other than transformers' and torch's are set to (see the package's own words). Forward hooks, a
        ``forward`` of a module's own, functions without a lasting name that were registered or put into a class, and dropout in
        training mode are refused.
        """
        if isinstance(model, Identity):
            return model
        model = unwrapped(model)
        config = getattr(model, "config", model)
        if not is_config(config):
            raise InvalidArgument(f"a transformers model or its config is expected, not {type(model).__name__}")
        if config is model:
            return cls(config, config_digest(config))
        refusals.refuse_global_hooks()
        seen = _seen.get(model)
        if seen is None or not seen.holds(full):
            seen = _seen[model] = _read(model, seen, full)
        autocast = _autocast(seen.identity.device)
        return replace(seen.identity, autocast=autocast) if autocast else seen.identity

    def target(self, device: Any = None) -> Any:
        """The device for a cache of the model: the CPU where its layers, which are on several, are put beside theirs later."""
        if device is None and self.spread:
            return "cpu"
        return self.device if device is None else device

    def as_dict(self) -> dict[str, str]:
        """For a file's metadata."""
        told = {"config": self.config_digest, "weights": self.weights, "adapters": self.adapters, "dtype": self.dtype}
        told |= {key: getattr(self, key) for key in _CONDITIONS}
        return {key: value for key, value in told.items() if value}

    def check(self, told: Any, label: str) -> None:
        """Raises InvalidArgument where a file says that it belongs to another model."""
        mine = self.as_dict()
        if not isinstance(told, dict):
            raise InvalidArgument(f"{label}: is the cache of a model of other model; compute it anew with this model")
        other = [key for key, value in mine.items() if key not in _CONDITIONS and told.get(key, value) != value]
        if "weights" in mine and "weights" in told:  # a config alone has no state
            other += [key for key in _CONDITIONS if told.get(key, "") != mine.get(key, "")]
        if other:
            raise InvalidArgument(
                f"{label}: is the cache of a model of other {' and '.join(other)}; compute it anew with this model"
            )

    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        hashed = new_hash()
        for value in (self.config_digest, self.weights, self.adapters, self.dtype):
            hashed.update(f"{value}\n".encode())
        for key in _CONDITIONS:
            if getattr(self, key):
                hashed.update(f"{key} {getattr(self, key)}\n".encode())
        return hashed.digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """The vocabulary of a tokenizer and its added tokens; raises InvalidArgument."""
    if not hasattr(tokenizer, "get_vocab"):
        raise InvalidArgument(f"a tokenizer of transformers is expected, not {type(tokenizer).__name__}")
    return json_digest(sorted(tokenizer.get_vocab().items()))


def forget(model: Any) -> None:
    """Read all of a model again the next time."""
    _seen.pop(unwrapped(model), None)


def _autocast(device: Any) -> str:
    """The dtype that torch.autocast computes in on a device; "" where it is off."""
    import torch

    kind = getattr(device, "type", "cpu")
    try:
        on = torch.is_autocast_enabled(kind)
    except RuntimeError:  # a device without autocast
        return ""
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if on else ""


# -- reading a model ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Seen:
    """A model as it was read last. Never changed, only replaced, so that threads may ask at once."""

    identity: Identity
    watch: Watch
    tensors: list[ref[Any]]  # those of the state_dict, then others
    marks: list[tuple[Any, ...]]
    evidence: Evidence
    digests: list[tuple[str, bytes]]  # of each tensor, with its name
    plain: bool  # the modules hold all tensors of the state_dict

    def holds(self, full: bool) -> bool:
        """Whether nothing has changed, as far as is looked."""
        if not self.plain or self.evidence.full < full:
            return False
        tensors = [tensor() for tensor in self.tensors]
        if any(tensor is None for tensor in tensors):
            return False
        held = storages(tensors)
        if marks(tensors) != self.marks:
            return False
        look = self.evidence.begin(tensors)  # a GPU sums while the objects are looked at
        same = self.watch.holds() and self.evidence.holds(look)
        del held
        return same

    def unchanged(self, named: Named, marked: list[tuple[Any, ...]], evidence: Evidence) -> dict[str, bytes]:
        """Digests that still hold, by name: none where one tensor was written past its counter, for others may have been."""
        at = {name: index for index, (name, _) in enumerate(self.digests)}
        found = {}
        for index, (name, _) in enumerate(named):
            before = at.get(name)
            if before is not None and self.marks[before] == marked[index]:
                if self.evidence.full != evidence.full or self.evidence.of(before) != evidence.of(index):
                    return {}
                found[name] = self.digests[before][1]
        return found


_seen: WeakKeyDictionary[Any, _Seen] = WeakKeyDictionary()


def _read(model: Any, before: _Seen | None, full: bool) -> _Seen:
    modules = modules_of(model)
    refusals.refuse_hooks(modules)
    refusals.refuse_forwards(modules)
    mode, patched = refusals.training_mode(modules), refusals.patched_classes(modules)
    configs = configs_of(modules)
    written = attributes_written_by(classes_of(modules))
    watch = Watch(modules, configs, [*foreign_classes(modules), *homes_of(modules)], written.changed, dicts_of(modules))
    in_state, adapting, plain = _scan(model)
    named = in_state + [(f"{name} (not in the state)", tensor) for name, tensor in watched_tensors(modules, written)]
    tensors = [tensor for _, tensor in named]
    refuse_unloaded(named)
    held = storages(tensors)
    marked, evidence = marks(tensors), Evidence(tensors, full)
    del held
    known = before.unchanged(named, marked, evidence) if before else {}
    digests = [(name, known.get(name) or tensor_digest(name, tensor)) for name, tensor in named]
    hashed = new_hash()
    for _, digest in digests[: len(in_state)]:
        hashed.update(digest)
    told = [*deviation(model, modules, written, tensor_digest), *patched, *foreign(modules), *registered(modules, configs)]
    config = model.config
    identity = Identity(
        config,
        config_digest(config),
        str(hashed.hexdigest()[:32]),
        _adapters(adapting),
        str(model.dtype),
        model.device,
        len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1,
        json_digest(told) if told else "",
        mode,
        _attention(configs),
    )
    return _Seen(identity, watch, [ref(tensor) for tensor in tensors], marked, evidence, digests, plain)


def _attention(configs: list[Any]) -> str:
    """The implementations of attention that count, of all configs."""
    found = {str(kind) for each in configs if (kind := getattr(each, "_attn_implementation", None)) not in _SAME_ATTENTION}
    return ", ".join(sorted(found))


def _scan(model: Any) -> tuple[Named, Named, bool]:
    """The tensors of ``model.state_dict()`` in the order of their names, the modules that may be adapters, and whether the
    modules hold all these tensors themselves.

    In one pass that spares what it can, for a model has hundreds of modules; torch is asked where a module has its own way with
    its state.
    """
    tensors: dict[str, Any] = {}
    adapting: dict[int, tuple[str, Any]] = {}  # a shared module at its first place
    plain, none_in = True, _ADAPTER_ATTRIBUTES.isdisjoint
    waiting: Named = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        below, parameters, buffers = module._modules, module._parameters, module._buffers
        kind: Any = type(module)
        class_adapts, class_is_plain = _class_ways(kind)
        if class_adapts or not (none_in(vars(module)) and none_in(below) and none_in(parameters) and none_in(buffers)):
            adapting.setdefault(id(module), (prefix.removesuffix("."), module))
        plain &= class_is_plain and not module._state_dict_hooks and not module._state_dict_pre_hooks
        for name, tensor in parameters.items():
            tensors[prefix + name] = tensor
        for name, tensor in buffers.items():
            if name not in module._non_persistent_buffers_set:
                tensors[prefix + name] = tensor
        if below:
            waiting += [(f"{prefix}{key}.", child) for key, child in reversed(below.items()) if child is not None]
    if not plain:
        tensors = model.state_dict(keep_vars=True)
    return sorted(item for item in tensors.items() if hasattr(item[1], "data_ptr")), list(adapting.values()), plain


@lru_cache(maxsize=1024)
def _class_ways(kind: Any) -> tuple[bool, bool]:
    """Whether a class of modules has an adapter's attributes, or tells of attributes only when it is asked; and whether it
    leaves it to torch what a state_dict holds.
    """
    import torch

    asks = getattr(kind, "__getattr__", None) is not torch.nn.Module.__getattr__
    ways = ("state_dict", "_save_to_state_dict", "get_extra_state")
    plain = all(getattr(kind, way, None) is getattr(torch.nn.Module, way, None) for way in ways)
    return asks or any(hasattr(kind, name) for name in _ADAPTER_ATTRIBUTES), plain


def _adapters(modules: Named) -> str:
    """The adapters that are switched on, of those modules that may be any; "" where there are none."""
    found = []
    for name, module in modules:
        state = {key: getattr(module, key, None) for key in _ADAPTER_STATE if hasattr(module, "lora_A") or "adapter" in key}
        state = {key: value for key, value in state.items() if value is not None and not callable(value)}
        if state:
            found.append((name, {key: str(value) for key, value in state.items()}))
    return json_digest(found) if found else ""
