"""Law: the name, package and content of a function or class, from its code and not from attributes that a wrapper copies."""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Iterator
from types import CodeType, SimpleNamespace
from typing import Any

LIBRARIES = (*(sys.stdlib_module_names - {"__main__"}), "numpy", "packaging", "huggingface_hub", "tqdm")
KNOWN = ("torch", "transformers", "peft", "accelerate", "builtins", "typing", "collections", "functools", "abc")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def unbound(function: Any) -> Any:
    """The function inside a bound method or a ``functools.partial``."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        else:
            return function


def layers(function: Any) -> Iterator[Any]:
    """A function and those that it wraps (``functools.wraps``), outermost first."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        function = unbound(function)
        yield function
        function = getattr(function, "__wrapped__", None)


def module_of(function: Any) -> str:
    """The name of the Python module whose source a function is written in."""
    function = unbound(function)
    space = getattr(function, "__globals__", None)
    return str(space.get("__name__", "") if space else getattr(function, "__module__", None) or "")


def package_of(function: Any) -> str:
    """The name of the package whose source a function is written in."""
    return module_of(function).split(".")[0]


def name_of(function: Any) -> str:
    """The module and qualified name of a function."""
    function = unbound(function)
    code = getattr(function, "__code__", None)
    name = code.co_qualname if code else getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module_of(function) or type(function).__module__}.{name}"


def is_lasting(name: str) -> bool:
    """Whether a name identifies one function in any process; those of lambdas and local functions do not."""
    return "<" not in name


def type_name(kind: Any) -> str:
    """The module and qualified name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


# -- foreign code ------------------------------------------------------------------------------------------------
def is_foreign(kind: Any) -> bool:
    """Whether a class is of a package outside ``KNOWN``."""
    return kind.__module__.split(".")[0] not in KNOWN


@functools.lru_cache(maxsize=1024)
def _has_foreign_bases(kind: Any) -> bool:
    return any(is_foreign(base) for base in kind.__mro__)


def is_foreign_class(kind: Any) -> bool:
    """Whether a class of modules, a base class of it, or the function that replaced its ``forward``, is foreign."""
    return _has_foreign_bases(kind) or package_of(kind.forward) not in KNOWN


def is_plain_object(value: Any) -> bool:
    """Whether an object is of a foreign class and no library's, so that its fields describe it."""
    kind = type(value)
    if hasattr(value, "data_ptr") or hasattr(value, "_modules"):  # tensors and modules have checks of their own
        return False
    if isinstance(value, SimpleNamespace):
        return True
    return is_foreign(kind) and kind.__module__.split(".")[0] not in LIBRARIES and not hasattr(value, "__code__")


def object_fields(value: Any) -> dict[str, Any]:
    """The fields of an object by name, including those in ``__slots__``."""
    if isinstance(value, enum.Enum):
        return {"name": value.name}
    slots = [name for base in type(value).__mro__ for name in _names(vars(base).get("__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(value, name)}
    return found | dict(getattr(value, "__dict__", {}))


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def class_content(kind: Any) -> list[Any]:
    """The content of a class, as JSON: its functions, and its numbers and strings, by name."""
    found: list[Any] = []
    for name, value in sorted(vars(kind).items()):
        function = unbound(getattr(value, "fget", value))
        if isinstance(getattr(function, "__code__", None), CodeType):
            found.append([name, *function_content(function)])
        elif isinstance(value, (bool, int, float, str)) and not name.startswith("__"):
            found.append([name, repr(value)])
    return found


def function_content(function: Any) -> list[Any]:
    """The content of a function, as JSON: bytecode, names, constants, defaults, closure; values that are not plain by type."""
    held = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    held["closure"] = [_cell(cell) for cell in function.__closure__ or ()]
    return [*_of_code(function.__code__), *([name, value_content(value)] for name, value in held.items() if value)]


def callable_content(value: Any) -> list[Any]:
    """The content of a function, or of a callable object: its class and its fields."""
    if hasattr(value, "__code__"):
        return function_content(value)
    return [class_content(type(value)), value_content(object_fields(value))]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is still empty
        return None


def value_content(value: Any) -> Any:
    """A plain value or containers of such, as JSON; the type's name for anything else."""
    if isinstance(value, (list, tuple)):
        return [value_content(member) for member in value]
    if isinstance(value, dict):
        return [[str(key), value_content(member)] for key, member in value.items()]
    return repr(value) if isinstance(value, _PLAIN) else type_name(type(value))


def _of_code(one: CodeType) -> Iterator[Any]:
    yield one.co_code.hex()
    yield list(one.co_names)
    for constant in one.co_consts:
        yield list(_of_code(constant)) if isinstance(constant, CodeType) else repr(constant)
