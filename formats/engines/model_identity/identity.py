"""Law: computing the identity of a model, and reusing it for as long as nothing in the model has changed."""

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
_CONDITIONS = ("state", "mode", "attention", "autocast")  # fields that are "" for an ordinary model


@dataclass(frozen=True)
class Identity:
    """What identifies a model to its caches (SPEC IV.1); digests have 32 hexadecimal digits.

    ``weights`` is "" where only a config was given.

    >>> from transformers import LlamaConfig
    >>> one, other = Identity.of(LlamaConfig(hidden_size=64)), Identity.of(LlamaConfig(hidden_size=128))
    >>> one.as_dict() == {"config": one.config_digest}, one.digest() == other.digest()
    (True, False)
    """

    config: Any  # the model's config, from which RoPE is read
    config_digest: str
    weights: str = ""
    adapters: str = ""
    dtype: str = ""
    device: Any = None
    spread: bool = False  # the layers are on several devices
    state: str = ""  # digest of what differs from the config's model, beside weights
    mode: str = ""  # "train", or a digest of the modules in training mode; "" in eval mode
    attention: str = ""  # the implementation of attention, unless eager or sdpa
    autocast: str = ""  # the dtype of torch.autocast where it is on

    @classmethod
    def of(cls, model: Any, full: bool = False) -> Identity:
        """The identity of a transformers model, or of a config alone; an Identity is returned as it is.

        The first call reads all of a model. Later calls detect, without reading it all: other modules, hooks, attributes,
        members of containers in attributes, and settings of configs; tensors that were replaced, moved or written in place;
        and writes that bypass torch's version counters (``w.data += d``) if they change one of 16 elements spread over a
        tensor. So an edit of a whole tensor is detected, one of a few elements through ``.data`` perhaps not. On a GPU, and
        with ``full``, every call reads all bytes, so that an edit of a single element is detected.

        Functions registered for attention, masks, experts and RoPE count if the configs use their names; for settings of
        foreign modules see the package. Raises InvalidArgument for what has no identity: forward hooks, a ``forward`` of a
        module's own, functions without a lasting name that were registered or put into a class, dropout in training mode.
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
        """The device to load a cache to: ``device``, or the model's; "cpu" for a model on several, where layers move later."""
        if device is None and self.spread:
            return "cpu"
        return self.device if device is None else device

    def as_dict(self) -> dict[str, str]:
        """The fields for a file's metadata (SPEC IV.1), without empty ones."""
        fields = {"config": self.config_digest, "weights": self.weights, "adapters": self.adapters, "dtype": self.dtype}
        fields |= {key: getattr(self, key) for key in _CONDITIONS}
        return {key: value for key, value in fields.items() if value}

    def check(self, recorded: Any, label: str) -> None:
        """Raises InvalidArgument where ``recorded``, the ``as_dict`` in a file called ``label``, is of another model."""
        mine = self.as_dict()
        if not isinstance(recorded, dict):
            raise InvalidArgument(f"{label}: is the cache of a model of other model; compute it anew with this model")
        other = [key for key, value in mine.items() if key not in _CONDITIONS and recorded.get(key, value) != value]
        if "weights" in mine and "weights" in recorded:  # a config alone has no state
            other += [key for key in _CONDITIONS if recorded.get(key, "") != mine.get(key, "")]
        if other:
            raise InvalidArgument(
                f"{label}: is the cache of a model of other {' and '.join(other)}; compute it anew with this model"
            )

    def digest(self) -> bytes:
        """The digest of all fields: 32 bytes."""
        hashed = new_hash()
        for value in (self.config_digest, self.weights, self.adapters, self.dtype):
            hashed.update(f"{value}\n".encode())
        for key in _CONDITIONS:
            if getattr(self, key):
                hashed.update(f"{key} {getattr(self, key)}\n".encode())
        return hashed.digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """The digest of a tokenizer's vocabulary with its added tokens; raises InvalidArgument for no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        raise InvalidArgument(f"a tokenizer of transformers is expected, not {type(tokenizer).__name__}")
    return json_digest(sorted(tokenizer.get_vocab().items()))


def forget(model: Any) -> None:
    """Make the next ``Identity.of(model)`` read all of the model again."""
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
    """The last reading of a model. Never changed, only replaced, so that threads may share it."""

    identity: Identity
    watch: Watch
    tensors: list[ref[Any]]  # those of the state_dict first
    marks: list[tuple[Any, ...]]  # of each tensor
    evidence: Evidence
    digests: list[tuple[str, bytes]]  # name and digest of each tensor
    plain: bool  # the modules themselves hold all tensors of the state_dict

    def holds(self, full: bool) -> bool:
        """Whether no change is detected; ``full``: in any byte of the tensors."""
        if not self.plain or self.evidence.full < full:
            return False
        tensors = [tensor() for tensor in self.tensors]
        if any(tensor is None for tensor in tensors):
            return False
        held = storages(tensors)
        if marks(tensors) != self.marks:
            return False
        look = self.evidence.begin(tensors)  # a GPU sums bytes while the objects are compared
        same = self.watch.holds() and self.evidence.holds(look)
        del held
        return same

    def unchanged(self, named: Named, marked: list[tuple[Any, ...]], evidence: Evidence) -> dict[str, bytes]:
        """The digests that are still valid, by name.

        None at all if one tensor was written past its version counter, since others may have been.
        """
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
    deviating = [*deviation(model, modules, written, tensor_digest), *patched, *foreign(modules), *registered(modules, configs)]
    config = model.config
    identity = Identity(
        config,
        config_digest(config),
        str(hashed.hexdigest()[:32]),
        _adapters(adapting),
        str(model.dtype),
        model.device,
        len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1,
        json_digest(deviating) if deviating else "",
        mode,
        _attention(configs),
    )
    return _Seen(identity, watch, [ref(tensor) for tensor in tensors], marked, evidence, digests, plain)


def _attention(configs: list[Any]) -> str:
    """The implementations of attention in all configs, other than those that count as one; "" without any."""
    found = {str(kind) for each in configs if (kind := getattr(each, "_attn_implementation", None)) not in _SAME_ATTENTION}
    return ", ".join(sorted(found))


def _scan(model: Any) -> tuple[Named, Named, bool]:
    """The tensors of ``model.state_dict()`` sorted by name, the modules that may be adapters, and ``_Seen.plain``.

    One fast pass, since a model has hundreds of modules; ``state_dict`` itself is called only where a module customizes it.
    """
    tensors: dict[str, Any] = {}
    adapting: dict[int, tuple[str, Any]] = {}  # a shared module under its first path
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
    """Of a class of modules: whether it may be an adapter's (by attributes, or its own ``__getattr__``), and whether it uses
    torch's own ``state_dict``.
    """
    import torch

    asks = getattr(kind, "__getattr__", None) is not torch.nn.Module.__getattr__
    ways = ("state_dict", "_save_to_state_dict", "get_extra_state")
    plain = all(getattr(kind, way, None) is getattr(torch.nn.Module, way, None) for way in ways)
    return asks or any(hasattr(kind, name) for name in _ADAPTER_ATTRIBUTES), plain


def _adapters(modules: Named) -> str:
    """A digest of which adapters are active in ``modules``; "" without any."""
    found = []
    for name, module in modules:
        state = {key: getattr(module, key, None) for key in _ADAPTER_STATE if hasattr(module, "lora_A") or "adapter" in key}
        state = {key: value for key, value in state.items() if value is not None and not callable(value)}
        if state:
            found.append((name, {key: str(value) for key, value in state.items()}))
    return json_digest(found) if found else ""
