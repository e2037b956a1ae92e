"""Law: the attributes that foreign code writes while it computes, which are its memory and not its settings.

They are found in the bytecode of ``forward`` and of what it calls by name: assignments (``self._seen = n``), changes of an
attribute's content (``self._sizes[0] = n``, ``self._all.append(x)``, ``self._state.n += 1``, ``self._table.copy_(x)``), and
string constants in code that calls ``setattr``. Names count for all classes of a model, since modules write into each other.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from pqcodec.formats.engines.model_identity import code

_CALLED = {"forward", "__call__", "generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}
_CHANGING = "append appendleft extend insert remove pop popleft popitem clear update setdefault add discard"
_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_STORES = {
    "STORE_SUBSCR": 1,
    "DELETE_SUBSCR": 1,
    "STORE_SLICE": 2,
}  # instructions that change a container, and the stack entries of their keys
_OF_ALL = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "builtins", "abc")


@dataclass(frozen=True)
class WrittenAttributes:
    """Names of the attributes that foreign code writes."""

    assigned: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()  # assigned, or whose content (container, tensor, object) is changed


def attributes_written_by(kinds: Iterable[Any]) -> WrittenAttributes:
    """The attributes that the foreign ones among some classes write."""
    methods: dict[str, set[Any]] = {}
    for kind in kinds:
        if code.is_foreign_class(kind):
            for base in kind.__mro__:
                if not base.__module__.startswith(_OF_ALL):
                    for name, value in vars(base).items():
                        methods.setdefault(name, set()).update(_functions(value))
    seen: set[Any] = set()
    waiting = [function for name in _CALLED & methods.keys() for function in methods[name]]
    assigned: set[str] = set()
    changed: set[str] = set()
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        names, sets, changes = _written(function.__code__)
        assigned |= sets
        changed |= changes
        for name in names:
            beside = function.__globals__.get(name)
            waiting += methods.get(name, ())
            waiting += [one for one in _functions(beside) if code.package_of(one) not in code.KNOWN + code.LIBRARIES]
    return WrittenAttributes(frozenset(assigned), frozenset(assigned | changed))


def _functions(value: Any) -> list[FunctionType]:
    """The functions of a function, method or property, and those that they wrap."""
    parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
    return [each for part in parts for each in code.layers(part) if isinstance(each, FunctionType)]


@lru_cache(maxsize=1024)
def _written(one: CodeType) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The names that code uses, the attributes that it assigns, and those whose content it changes."""
    names, assigned, changed = set(one.co_names), set[str](), set(_changes(one))
    for step in dis.get_instructions(one):
        if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            assigned.add(str(step.argval))
    for constant in one.co_consts:
        if isinstance(constant, CodeType):
            inner = _written(constant)
            names, assigned, changed = names | inner[0], assigned | inner[1], changed | inner[2]
        elif isinstance(constant, str) and {"setattr", "__setattr__"} & set(one.co_names):
            assigned.add(constant)
    return frozenset(names), frozenset(assigned), frozenset(changed)


def _changes(one: CodeType) -> Iterator[str]:
    """The attributes whose content code changes."""
    steps = list(dis.get_instructions(one))
    for at, step in enumerate(steps):
        if step.opname in ("STORE_ATTR", "DELETE_ATTR") or (step.opname == "COPY" and step.arg == 1):  # x.n = 1, or x.n += 1
            yield from _loaded(steps, at)
        if step.opname in _LOADS and _changes_it(str(step.argval)):
            yield from _loaded(steps, at)
        if step.opname in _STORES:
            keys = _STORES[step.opname]
            if at and steps[at - 1].opname == "SWAP":  # x[n] += 1: go back to where container and key are copied
                copies = (
                    back for back in range(at - 1, -1, -1) if steps[back].opname == "COPY" and steps[back].arg == keys + 1
                )
                at = next(copies, at) - keys
            yield from _container(steps, at, keys)


def _loaded(steps: Sequence[Any], end: int) -> Iterator[str]:
    """The attributes x and y if ``thing.x.y`` or ``thing.x[n].y`` is loaded just before instruction ``end``."""
    for at in range(end - 1, -1, -1):
        if steps[at].opname in _LOADS:
            yield str(steps[at].argval)
        elif steps[at].opname == "BINARY_SUBSCR" or steps[at].argrepr == "[]":
            yield from _container(steps, at, 1)
            return
        else:
            return


def _container(steps: Sequence[Any], end: int, keys: int) -> Iterator[str]:
    """The attributes that lead to the container that was loaded before ``keys`` stack entries ahead of instruction ``end``."""
    at = end
    while keys > 0 and at > 0:
        at -= 1
        keys -= dis.stack_effect(steps[at].opcode, steps[at].arg, jump=False)
    if keys == 0:
        yield from _loaded(steps, at)


def _changes_it(method: str) -> bool:
    return method in _CHANGING.split() or (method.endswith("_") and not method.startswith("_"))
