"""Triton's interpreter without what it does in vain: kernels that it runs take half the time, and do the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any


def hasten() -> None:
    """Leave out what costs most and has no effect; to be called once, where kernels are interpreted.

    Every sum, difference and product of integers is computed a second time in 64 bits to see whether it overflows, which is
    then told to an assertion that only ``debug`` turns on. And every call of a function in a kernel makes triton.language an
    interpreted module again, as the kernel's launch did and undoes at its end.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug and hasattr(builder.options, "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang, (interpreter.tl, interpreter.tl.core))


def once_a_launch(patch: Callable[[Any], Any], modules: tuple[Any, ...]) -> Callable[[Any], Any]:
    """``patch``, which makes those of the modules that a function sees interpreted ones, where a launch has not done so yet.

    What it returns undoes that, where this Triton does so at all.
    """
    done: set[str] = set()

    @cache
    def seen(fn: Any) -> frozenset[str]:
        return frozenset(value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in modules)

    def once(fn: Any) -> Any:
        if seen(fn) <= done:
            return None
        scope = patch(fn)
        done.update(seen(fn))
        if scope is not None:
            undo = scope.restore
            scope.restore = lambda: (undo(), done.clear())
        return scope

    return once
