"""Law: the name of a function, and whose it is, from its code and not from attributes that a wrapper copies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any


def plain(function: Any) -> Any:
    """What a method is bound to, or a partial object made of."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        else:
            return function


def layers(function: Any) -> Iterator[Any]:
    """A function and those that it wraps, as ``functools.wraps`` tells them, outermost first."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        function = plain(function)
        yield function
        function = getattr(function, "__wrapped__", None)


def module_of(function: Any) -> str:
    """The module whose source a function is written in."""
    function = plain(function)
    space = getattr(function, "__globals__", None)
    return str(space.get("__name__", "") if space else getattr(function, "__module__", None) or "")


def package_of(function: Any) -> str:
    return module_of(function).split(".")[0]


def name_of(function: Any) -> str:
    """Module and qualified name."""
    function = plain(function)
    code = getattr(function, "__code__", None)
    name = code.co_qualname if code else getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module_of(function) or type(function).__module__}.{name}"


def is_lasting(name: str) -> bool:
    """Whether a name stands for one function only, in any process: lambdas' and local functions' do not."""
    return "<" not in name


def type_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
