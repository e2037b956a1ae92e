"""Law: code that is not transformers' own: the classes that a model is of, and what stands in for functions of its library.

A shell of the same class has the same code, so nothing of it deviates; but it may be other code tomorrow. Its classes enter
an identity by name and by a digest of their functions, and a function that was put into a module of transformers by its name.
"""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import json_digest
from pqcodec.formats.engines.model_identity.watch import Named, classes_of


def foreign_classes(modules: Named) -> list[Any]:
    """Classes of the modules, and those that they are made from, whose code is of other packages."""
    return [kind for each in classes_of(modules) for kind in each.__mro__ if code.is_foreign(kind)]


def homes_of(modules: Named) -> list[Any]:
    """The Python modules that the modules' classes are written in, each once."""
    names = dict.fromkeys(kind.__module__ for kind in classes_of(modules) if kind.__module__.startswith("transformers.models."))
    return [sys.modules[name] for name in names if name in sys.modules]


def foreign(modules: Named) -> list[str]:
    """Classes of other packages with a digest of their code, and functions of such that stand in transformers' modules.

    Raises InvalidArgument for a function there that has no name that lasts.
    """
    found = {f"{code.type_name(kind)} {json_digest(code.told_of_class(kind))}" for kind in foreign_classes(modules)}
    for home in homes_of(modules):
        for name, value in vars(home).items():
            for function in code.layers(value) if callable(value) else ():
                package = code.package_of(function)
                if not isinstance(getattr(function, "__code__", None), CodeType) or package in code.KNOWN + code.LIBRARIES:
                    continue
                told = code.name_of(function)
                if not code.is_lasting(told):
                    raise InvalidArgument(
                        f"{home.__name__}.{name} was replaced by {told}, which has no name of its own: put the library's own "
                        "back, or pass an Identity of your own"
                    )
                found.add(f"{home.__name__}.{name} = {told} {json_digest(code.told_of_function(function))}")
    return sorted(found)
