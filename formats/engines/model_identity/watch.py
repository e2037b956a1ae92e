"""Law: whether a model still consists of the same objects: one flat pass over its modules on every call.

Objects are compared by ``id``. Modules, tensors and functions are held by weak references, so that the model is not kept alive;
numbers, strings and the like are held strongly. So a new object at the address of a dead one is never taken for the same.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import is_config

Named = list[tuple[str, Any]]
CONTAINERS = (dict, list, tuple, set, frozenset)
_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum)
_DEPTH = 8  # nested containers that are followed
OBJECTS = 3  # nested plain objects that are followed


def modules_of(model: Any) -> Named:
    """(path, module) of all modules of a model, each once."""
    return list(model.named_modules())


def configs_of(modules: Iterable[tuple[str, Any]]) -> list[Any]:
    """The configs in attributes of modules, and the configs in these, each once."""
    found: dict[int, Any] = {}
    waiting = [value for _, module in modules for value in vars(module).values() if _holds_settings(value)]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            waiting += [value for value in vars(config).values() if _holds_settings(value)]
    return list(found.values())


def _holds_settings(value: Any) -> bool:
    return not isinstance(value, (*_IMMUTABLE, *CONTAINERS, type)) and is_config(value) and hasattr(value, "__dict__")


def classes_of(modules: Iterable[tuple[str, Any]]) -> list[Any]:
    """The classes of modules, each once."""
    return list(dict.fromkeys(type(module) for _, module in modules))


@lru_cache(maxsize=1)
def own_attributes() -> frozenset[str]:
    """The names of the attributes that torch gives every module."""
    import torch

    return frozenset(vars(torch.nn.Module()))


class Watch:
    """The objects that a model consists of, for comparison with a later state.

    Detected are: modules that were added, removed or replaced; parameters, buffers and attributes that are other objects;
    changed members of dicts, lists and sets in attributes (also nested) and numbers of numpy arrays there; hooks; attributes of
    configs; other classes of modules, or another ``forward`` of a class; changed members of ``spaces`` (classes and Python
    modules) and of ``tables`` (dicts, which are kept alive); and, in foreign modules, changed fields of plain objects in
    attributes, except attributes in ``changing``, which the code itself changes. Contents of tensors are not compared.
    """

    def __init__(
        self,
        modules: Named,
        configs: Sequence[Any],
        spaces: Sequence[Any] = (),
        changing: Collection[str] = (),
        tables: Sequence[dict[str, Any]] = (),
    ) -> None:
        own, classes = own_attributes(), classes_of(modules)
        nodes = [module for _, module in modules] + list(configs)
        self._modules = len(modules)
        self._nodes, self._classes = [weakref.ref(node) for node in nodes], [weakref.ref(kind) for kind in classes]
        self._paths: list[tuple[int, tuple[Any, ...]]] = []  # of each container: number of its node, and keys from there
        self._objects: list[tuple[int, tuple[Any, ...]]] = []  # likewise of plain objects, and of what is in them
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._held: dict[int, Any] = {}
        self._arrays: list[weakref.ref[np.ndarray]] = []
        self._values = [_getter(tuple(_names(node, own if i < self._modules else frozenset()))) for i, node in enumerate(nodes)]
        for index, node in enumerate(nodes):
            space = vars(node)
            for name, value in space.items():
                if index >= self._modules or name not in own:
                    self._keep(value, index, (name,))
                    if index < self._modules and name not in changing and code.is_foreign_class(type(node)):
                        self._keep_fields(value, index, (name,))
            if index < self._modules:
                for member in chain(space["_parameters"].values(), space["_buffers"].values(), space["_modules"].values()):
                    self._keep(member)
        for kind in classes:
            self._keep(kind.forward)
        self._spaces = [weakref.ref(space) for space in spaces]  # classes and Python modules whose members are compared
        for space in spaces:
            for value in vars(space).values():
                self._keep(value)
        self._tables = list(tables)
        for table in tables:
            for value in table.values():
                self._keep(value)
        self._seen = self._look(nodes, classes)

    def holds(self) -> bool:
        """Whether all objects are the same as at construction."""
        nodes = [ref() for ref in self._nodes]
        classes = [ref() for ref in self._classes]
        if None in classes or any(map(_is_none, nodes)) or any(ref() is None for ref in self._alive.values()):
            return False
        try:
            return bool(self._look(nodes, classes) == self._seen)
        except (AttributeError, IndexError, KeyError, TypeError):  # a container is gone
            return False

    def _look(self, nodes: Sequence[Any], classes: Sequence[Any]) -> tuple[Any, ...]:
        spaces = list(map(vars, nodes))
        modules = spaces[: self._modules]
        values = [get(space) for get, space in zip(self._values, spaces, strict=True)]
        held = [space[name] for name in ("_parameters", "_buffers", "_modules") for space in modules]
        hooks = [space[name] for name in ("_forward_hooks", "_forward_pre_hooks") for space in modules]
        containers = [_at(spaces[index], path) for index, path in self._paths]
        kinds = [*map(type, nodes), *(kind.forward for kind in classes)]
        return (
            list(map(len, spaces)),  # finds a name more; one less is a KeyError
            list(map(id, chain.from_iterable(values))),
            list(map(len, held)),
            list(map(id, chain.from_iterable(map(dict.values, held)))),
            list(chain.from_iterable(held)),  # names
            list(chain.from_iterable(hooks)),  # numbers of their own
            list(map(id, kinds)),
            list(map(len, containers)),
            list(map(id, chain.from_iterable(map(_members, containers)))),
            [array.tobytes() for ref in self._arrays if (array := ref()) is not None],
            [list(map(id, vars(space).values())) for ref in self._spaces if (space := ref()) is not None],
            [list(map(id, table.values())) for table in self._tables],
            [list(map(id, _inside(_reached(spaces[index], path)))) for index, path in self._objects],
        )

    def _keep_fields(self, value: Any, node: int, path: tuple[Any, ...], objects: int = 0) -> None:
        """Register the plain objects in a value, also in containers or in each other, and hold what is in them."""
        if isinstance(value, CONTAINERS) and len(path) <= _DEPTH:
            inside = [(key, member) for key, member in _entries(value) if key is not None]
        elif objects < OBJECTS and not isinstance(value, _IMMUTABLE) and code.is_plain_object(value) and not is_config(value):
            inside, objects = list(code.object_fields(value).items()), objects + 1
        else:
            return
        if objects:
            self._objects.append((node, path))
        for key, member in inside:
            if objects:
                self._keep(member)
            self._keep_fields(member, node, (*path, key), objects)

    def _keep(self, value: Any, node: int = -1, path: tuple[Any, ...] = ()) -> None:
        """Hold an object, strongly or weakly, so that its id cannot be reused unnoticed; register containers and members."""
        if isinstance(value, _IMMUTABLE):
            self._held[id(value)] = value
        elif isinstance(value, CONTAINERS):
            if path and len(path) <= _DEPTH:
                self._paths.append((node, path))
                for key, member in _entries(value):
                    self._keep(member, node, (*path, key) if key is not None else ())
        else:
            if isinstance(value, np.ndarray):
                self._arrays.append(weakref.ref(value))
            with suppress(TypeError):  # some objects, such as a torch.dtype, take no weak references
                self._alive[id(value)] = weakref.ref(value)


def _reached(start: Any, path: tuple[Any, ...]) -> Any:
    """The object at a path of keys and names of fields."""
    found: Any = start
    for key in path:
        inside: Any = found if isinstance(found, CONTAINERS) else code.object_fields(found)
        found = inside[key]
    return found


def _inside(value: Any) -> Iterator[Any]:
    return _members(value) if isinstance(value, CONTAINERS) else iter(code.object_fields(value).values())


def _names(node: Any, own: frozenset[str]) -> list[str]:
    """The names of the attributes that are compared."""
    return [name for name in vars(node) if name not in own or name == "training"]


@lru_cache(maxsize=1024)
def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that returns the values of ``names`` in a dict as a tuple."""
    return itemgetter(*names) if len(names) > 1 else lambda space: tuple(space[name] for name in names)


def _is_none(value: Any) -> bool:
    return value is None


def _at(space: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        space = space[key]
    return space


def _members(container: Any) -> Iterator[Any]:
    return chain(container, container.values()) if isinstance(container, dict) else iter(container)


def _entries(container: Any) -> Iterator[tuple[Any, Any]]:
    """(key, member) of a container; the key is None for members that no key leads to."""
    if isinstance(container, dict):
        yield from ((None, key) for key in container)
        yield from container.items()
    elif isinstance(container, (list, tuple)):
        yield from enumerate(container)
    else:
        yield from ((None, member) for member in container)
