"""Law: functions that models look up by a name in a table: attention, masks, experts and RoPE, and who put them there.

``transformers.AttentionInterface.register("sdpa", mine)`` makes another model of every one that runs by "sdpa". So of the names
that a model's configs say, the functions found are told where they are not transformers' own, and where "sdpa" and "eager",
which count as one otherwise, lead to another function of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import code
from pqcodec.formats.engines.model_identity.digests import json_digest
from pqcodec.formats.engines.model_identity.watch import Named, classes_of

_TABLES = {  # of transformers, by module
    "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
    "transformers.masking_utils": ("ALL_MASK_ATTENTION_FUNCTIONS", "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING"),
    "transformers.integrations.moe": ("ALL_EXPERTS_FUNCTIONS",),
    "transformers.modeling_rope_utils": ("ROPE_INIT_FUNCTIONS",),
}
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
_SAME = ("eager", "sdpa")  # names that are expected to lead to functions called so, or to none


def tables_of(modules: Named) -> list[tuple[str, dict[str, Any]]]:
    """The tables that a model's code may look into, those of its own Python modules as well, by name; each dict once."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    places = [(home, name) for home, names in _TABLES.items() for name in names]
    homes = dict.fromkeys(kind.__module__ for kind in classes_of(modules))
    spaces = {home: vars(sys.modules[home]) for home in [*_TABLES, *homes] if home in sys.modules}
    places += [(home, name) for home in homes if home in spaces for name, value in spaces[home].items() if _is_interface(value)]
    for home, name in places:
        table: Any = spaces.get(home, {}).get(name)
        layers = (table._local_mapping, table._global_mapping) if _is_interface(table) else (table,)
        for each in layers:  # what a table says by itself comes before what its class says
            if isinstance(each, dict):
                found.setdefault(id(each), (f"{home}.{name}", each))
    return list(found.values())


def dicts_of(modules: Named) -> list[dict[str, Any]]:
    """The tables and the dicts in them."""
    tables = [table for _, table in tables_of(modules)]
    return tables + [value for table in tables for value in table.values() if isinstance(value, dict)]


def _is_interface(value: Any) -> bool:
    return hasattr(type(value), "_global_mapping") and hasattr(value, "_local_mapping")


def registered(modules: Named, configs: list[Any]) -> list[str]:
    """What a model finds under the names of its configs that is not transformers' own, with a digest of its code.

    Raises InvalidArgument for a function that has no name that lasts.
    """
    names = {str(getattr(config, which, None)) for config in configs for which in _IMPLEMENTATIONS}
    names |= {text for config in configs for text in _texts(config.to_dict())}
    found = []
    for table, functions in tables_of(modules):
        for name in names & functions.keys():
            value = functions[name]
            for each in value.values() if isinstance(value, dict) else (value,):  # layers of two kinds have two masks
                told = _told(each, f"{table}[{name!r}]", name if name in _SAME else "")
                found += [f"{table}[{name!r}] = {told}"] if told else []
    return sorted(found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _texts(member)


def _told(function: Any, place: str, expected: str) -> str:
    """The name and digest of a function, "" where it is transformers' own, called as is ``expected``."""
    others = [each for each in code.layers(function) if code.package_of(each) not in code.KNOWN]
    if not others:
        name = code.name_of(function)
        return "" if name.rpartition(".")[2].startswith(expected) else name
    for each in others:
        if not code.is_lasting(code.name_of(each)):
            raise InvalidArgument(
                f"{place} was registered as {code.name_of(each)}, which has no name of its own: register the library's own "
                "again, or pass an Identity of your own"
            )
    bound = [code.told_of_value([function.args, function.keywords])] if isinstance(function, partial) else []
    return f"{code.name_of(others[0])} {json_digest([*map(code.told_of_callable, others), *bound])}"
