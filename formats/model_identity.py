"""Law: which model a cache belongs to: the numbers of all its weights, its config, dtype and adapters, as one digest.

A cache under another model is wrong without a sign, so nothing is taken from names or paths. All weights are read once for each
model object (at the speed of memory); afterwards torch's version counters tell which tensors have changed. Writing through
``parameter.data`` escapes these counters: load the model anew, or call ``forget(model)``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from pqcodec.errors import InvalidArgument

PERSON = b"pqcodec-model"
_AT_RUN_TIME = {  # settings of a config that leave the cache's numbers as they are, or say where it came from
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
    "attn_implementation",
    "experts_implementation",
}
_ADAPTER_STATE = ("active_adapters", "active_adapter", "disable_adapters", "merged_adapters", "scaling")
_ADAPTER_ATTRIBUTES = {*_ADAPTER_STATE, "lora_A"}
_WORDS, _ROW = 1 << 18, 1024  # int64 words that are summed at once, and weights of the sum

_digests: WeakKeyDictionary[Any, dict[str, tuple[Any, bytes]]] = WeakKeyDictionary()


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

    @classmethod
    def of(cls, model: Any) -> Identity:
        """The identity of a transformers model, of a config alone, or the Identity itself; raises InvalidArgument."""
        if isinstance(model, Identity):
            return model
        config = getattr(model, "config", model)
        if not hasattr(config, "to_dict") or not hasattr(config, "get_text_config"):
            raise InvalidArgument(f"a transformers model or its config is expected, not {type(model).__name__}")
        if config is model:
            return cls(config, _config_digest(config))
        spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        tensors, adapting = _scan(model)
        digests = (_config_digest(config), _weights_digest(model, tensors), _adapters(adapting))
        return cls(config, *digests, str(model.dtype), model.device, spread)

    def target(self, device: Any = None) -> Any:
        """The device for a cache of the model; raises InvalidArgument where it would be several."""
        if device is None and self.spread:
            raise InvalidArgument(
                "the model's layers are on several devices: pass device='cpu', and move each layer's keys and values to its own"
            )
        return self.device if device is None else device

    def as_dict(self) -> dict[str, str]:
        """For a file's metadata."""
        told = {"config": self.config_digest, "weights": self.weights, "adapters": self.adapters, "dtype": self.dtype}
        return {key: value for key, value in told.items() if value}

    def check(self, told: Any, label: str) -> None:
        """Raises InvalidArgument where a file says that it belongs to another model."""
        mine = self.as_dict()
        other = [key for key, value in mine.items() if isinstance(told, dict) and told.get(key, value) != value]
        if other or not isinstance(told, dict):
            what = " and ".join(other) if other else "model"
            raise InvalidArgument(f"{label}: is the cache of a model of other {what}; compute it anew with this model")

    def digest(self) -> bytes:
        """32 bytes that stand for all of it."""
        hashed = _hash()
        for value in (self.config_digest, self.weights, self.adapters, self.dtype):
            hashed.update(f"{value}\n".encode())
        return hashed.digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """The vocabulary of a tokenizer and its added tokens; raises InvalidArgument."""
    if not hasattr(tokenizer, "get_vocab"):
        raise InvalidArgument(f"a tokenizer of transformers is expected, not {type(tokenizer).__name__}")
    return _json_digest(sorted(tokenizer.get_vocab().items()))


def forget(model: Any) -> None:
    """Read all weights of a model again the next time."""
    _digests.pop(model, None)


def _hash() -> Any:
    return hashlib.blake2b(digest_size=32, person=PERSON)


def _json_digest(value: Any) -> str:
    hashed = _hash()
    hashed.update(json.dumps(value, sort_keys=True, default=str).encode())
    return str(hashed.hexdigest()[:32])


def _config_digest(config: Any) -> str:
    return _json_digest(_lasting(config.to_dict()))


def _lasting(value: Any) -> Any:
    """A config's settings, nested ones too, without those that do not count."""
    if isinstance(value, dict):
        kept = {str(key): _lasting(member) for key, member in value.items()}
        return {key: member for key, member in kept.items() if key not in _AT_RUN_TIME and not key.startswith("_")}
    return [_lasting(member) for member in value] if isinstance(value, (list, tuple)) else value


Named = list[tuple[str, Any]]


def _scan(model: Any) -> tuple[Named, Named]:
    """The tensors of ``model.state_dict()`` in the order of their names, and the modules that may be adapters.

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
    return sorted(item for item in tensors.items() if hasattr(item[1], "data_ptr")), list(adapting.values())


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
    return _json_digest(found) if found else ""


def _weights_digest(model: Any, tensors: Named) -> str:
    known = _digests.setdefault(model, {})
    hashed = _hash()
    for name, tensor in tensors:
        version = (tensor.data_ptr(), tensor.shape, tensor.stride(), None if tensor.is_inference() else tensor._version)
        if known.get(name, (None, b""))[0] != version:
            known[name] = (version, _tensor_digest(name, tensor))
        hashed.update(known[name][1])
    return str(hashed.hexdigest()[:32])


def _tensor_digest(name: str, tensor: Any) -> bytes:
    """Digest of a tensor's name, dtype, shape and all its bytes.

    The bytes, as little-endian int64 words in rows of 1,024, enter by sums modulo 2^64: one of all words, each times the odd
    number of its column and of its row. That is quick on any device; it tells models apart, but is no defence against someone
    who wants two models to look alike.
    """
    import torch

    if tensor.device.type == "meta":
        raise InvalidArgument(
            f"the weight {name!r} is not loaded (device meta), so the model cannot be told from others: load it, or pass an "
            "Identity of your own, Identity(config, config_digest=..., weights=...)"
        )
    hashed = _hash()
    hashed.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words, rest = raw[: raw.numel() // 8 * 8], raw[raw.numel() // 8 * 8 :]
    hashed.update(bytes(rest.tolist()))
    if words.numel():
        if words.storage_offset() % 8 or words.data_ptr() % 8:
            words = words.clone()
        total = _weighted_sum(words.view(torch.int64))
        hashed.update(int(total).to_bytes(8, "little", signed=True))
    return bytes(hashed.digest())


def _weighted_sum(words: Any) -> Any:
    import torch

    columns = _odd(_ROW, 0, words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _WORDS):
        piece = words[start : start + _WORDS]
        whole = piece[: piece.numel() // _ROW * _ROW].reshape(-1, _ROW)
        last = piece[whole.numel() :]
        rows = _odd(len(whole) + 1, start // _ROW, words.device)
        total += ((whole * columns).sum(1) * rows[:-1]).sum() + (last * columns[: last.numel()]).sum() * rows[-1]
    return total


def _odd(count: int, first: int, device: Any) -> Any:
    """Odd int64 numbers that look random (the steps of SplitMix64), from a place on."""
    import torch

    x = (torch.arange(first, first + count, dtype=torch.int64, device=device) + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1
