"""A config as JSON.

Tuples become lists. A value that is neither a number, nor a string, nor ``None``
becomes an object that names its class, or the function.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jlstm.init import Pretrained
from jlstm.saved.names import (
    Place,
    configs,
    defaults_of,
    exports,
    fields_of,
    full_name,
    functions,
    name_of,
)

# Fields that say how a layer is computed, not what.
WAYS = {"implementation", "checkpoint_every"}
SHOWN = ("repr", "class", "function", "float")  # what stands for an object, in a line
PRETRAINED = "jlstm.init.Pretrained"


def encode(value: Any, place: str) -> Any:
    """Makes JSON of a config.

    Raises:
      ValueError: a field has no literal form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is tuple:
        return [encode(part, f"{place}[{i}]") for i, part in enumerate(value)]
    if (fields := fields_of(value)) is not None:
        about = name_of("class", type(value), exports())
        about["fields"] = {n: encode(v, f"{place}.{n}") for n, v in fields.items()}
        return about
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        if "<" in value.__qualname__:
            raise ValueError(
                f"{place} must be a module-level function, got "
                f"{value.__qualname__}; define it at the top of a module"
            )
        return name_of("function", value, functions())
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"{place} must be a number, a string, a tuple, a frozen dataclass or "
            f"a module-level function, got a {type(value).__name__}"
        ) from None
    about = name_of("class", type(value), {})
    if type(value).__repr__ is not object.__repr__:
        about["repr"] = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return about


def decode(node: Any, place: Place) -> Any:
    """Makes a config of JSON, of jlstm's classes and known functions alone.

    Raises:
      ValueError: another class or function, or a value that a class refuses.
    """
    if isinstance(node, list):
        return tuple(decode(part, place.at(f"[{i}]")) for i, part in enumerate(node))
    if not isinstance(node, dict):
        return node
    if "float" in node:
        return float(node["float"])
    kind = "function" if "function" in node else "class"
    name, table = node[kind], functions() if kind == "function" else configs()
    if "module" in node or name not in (*table, PRETRAINED):
        raise place.error(
            f"is of the {kind} {full_name(node, kind)}, which load does not know; give "
            "the layer: load(path, layer)"
        )
    if kind == "function":
        return table[name]
    fields = {n: decode(v, place.at(f".{n}")) for n, v in node["fields"].items()}
    make = Pretrained.absent if name == PRETRAINED else table[name]
    try:
        return make(**fields)
    except (TypeError, ValueError, NotImplementedError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise place.error(f"cannot be made: {reason}") from None


def differences(stored: Any, value: Any, place: str) -> Iterator[str]:
    """Says in which fields a config differs from the stored one."""
    given = encode(value, place)
    if _is_object(stored) and _is_object(given) and stored["class"] == given["class"]:
        fields, defaults = fields_of(value) or {}, None
        for name in dict.fromkeys([*stored["fields"], *fields]):
            there = f"{place}.{name}"
            if name in WAYS and "module" not in given:
                continue
            if name not in fields:
                yield _difference(there, stored["fields"][name], dataclasses.MISSING)
            elif name in stored["fields"]:
                yield from differences(stored["fields"][name], fields[name], there)
            else:
                defaults = defaults or defaults_of(type(value))
                if fields[name] != defaults[name]:
                    new = encode(fields[name], there)
                    yield _difference(there, dataclasses.MISSING, new)
    elif _is_list(stored) and _is_list(given) and len(stored) == len(given):
        for i, (part, other) in enumerate(zip(stored, value, strict=True)):
            yield from differences(part, other, f"{place}[{i}]")
    elif _anywhere(stored) != _anywhere(given):
        yield _difference(place, stored, given)


def _is_object(node: Any) -> bool:
    return isinstance(node, dict) and "fields" in node


def _is_list(node: Any) -> bool:
    return isinstance(node, list)


def _anywhere(node: Any) -> Any:
    """Leaves out the module of a definition: that of a script has two names."""
    if not isinstance(node, dict):
        return node
    return {key: value for key, value in node.items() if key != "module"}


def _difference(place: str, stored: Any, given: Any) -> str:
    return f"{place}: {_show(stored)} in the file, {_show(given)} in the layer given"


def _show(node: Any) -> str:
    if node is dataclasses.MISSING:
        return "no such field"
    if isinstance(node, list):
        return f"a tuple of {len(node)}"
    if isinstance(node, dict):
        return next((str(node[k]) for k in SHOWN if k in node), repr(node))
    return repr(node)
