"""The structure of params as JSON; a leaf is its dtype and shape."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlstm.saved import config
from jlstm.saved.names import (
    Place,
    defaults_of,
    exports,
    fields_of,
    full_name,
    is_named_tuple,
    is_node,
    name_of,
)
from jlstm.types import Layer, PyTree

CONTAINERS = {"dict": dict, "list": list, "tuple": tuple}
KEYS = ("name", "key", "idx")  # what the keys of paths have, of three types


def encode(tree: PyTree, place: str) -> Any:
    """Makes JSON of the structure of params.

    Raises:
      ValueError: a node is of a class that could not be made again.
    """
    if tree is None:
        return None
    if jax.tree_util.all_leaves([tree]):
        leaf = tree if hasattr(tree, "dtype") else jnp.asarray(tree)
        return {"dtype": leaf.dtype.name, "shape": list(leaf.shape)}
    cls, parts = type(tree), _parts(tree)
    made = {key: encode(part, f"{place}.{key}") for key, part in parts.items()}
    if cls is dict and all(type(key) in (str, int) for key in parts):
        return {"dict": [list(pair) for pair in made.items()]}
    if cls in (list, tuple):
        return {cls.__name__: list(made.values())}
    if not (dataclasses.is_dataclass(cls) or is_named_tuple(cls)):
        raise ValueError(
            f"{place} must be a dict with keys of strings or ints, a list, a tuple, a "
            f"NamedTuple or a dataclass, got a {cls.__name__} with keys "
            f"{', '.join(map(repr, parts))}"
        )
    static = {n: v for n, v in (fields_of(tree) or {}).items() if n not in parts}
    return {
        **name_of("class", cls, exports()),
        "fields": made,
        "static": {n: config.encode(v, f"{place}.{n}") for n, v in static.items()},
    }


def _parts(tree: PyTree) -> dict[Any, PyTree]:
    """The children of a node, by their keys."""
    named = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    return {
        next(getattr(path[0], key) for key in KEYS if hasattr(path[0], key)): part
        for path, part in named
    }


def classes(layer: Layer | None) -> dict[str, type]:
    """The classes of params that a file may name.

    They are the library's, and those that stand beside the classes of a layer.
    """
    found = {name: value for name, value in exports().items() if is_node(value)}
    for module in {sys.modules.get(cls.__module__) for cls in _classes(layer)}:
        for value in list(vars(module).values()) if module else ():
            if isinstance(value, type):
                found.setdefault(value.__qualname__, value)
    return found


def _classes(value: Any) -> Iterator[type]:
    """The classes in a config."""
    if type(value) is tuple:
        for part in value:
            yield from _classes(part)
    elif value is not None:
        yield type(value)
        for part in (fields_of(value) or {}).values():
            yield from _classes(part)


def decode(node: Any, known: Mapping[str, type], place: Place) -> PyTree:
    """Makes the structure of params, of arrays that are types alone.

    Raises:
      ValueError: a class is not known, or has other fields.
    """
    if node is None:
        return None
    if "dtype" in node:
        return jax.ShapeDtypeStruct(tuple(node["shape"]), jnp.dtype(node["dtype"]))
    if "dict" in node:
        pairs = node["dict"]
        return {key: decode(part, known, place.at(f".{key}")) for key, part in pairs}
    for kind in ("list", "tuple"):
        if kind in node:
            parts = enumerate(node[kind])
            made = [decode(part, known, place.at(f"[{i}]")) for i, part in parts]
            return made if kind == "list" else tuple(made)
    cls = known.get(node["class"])
    if cls is None or not (dataclasses.is_dataclass(cls) or is_named_tuple(cls)):
        raise place.error(
            f"is of the class {full_name(node, 'class')}, which is neither in jlstm "
            "nor in the module of a class of the layer; give the layer: load(path, "
            "layer), or read only the params with jlstm.train.load_weights(path, like)"
        )
    parts, static = node["fields"].items(), node["static"].items()
    fields = {n: decode(part, known, place.at(f".{n}")) for n, part in parts}
    fields |= {n: config.decode(value, place.at(f".{n}")) for n, value in static}
    return _bare(cls, fields, place)


def _bare(cls: Any, fields: dict[str, Any], place: Place) -> PyTree:
    """Makes an instance from its fields, without a call of its class."""
    defaults = defaults_of(cls)
    values = {**defaults, **fields}
    if set(values) != set(defaults) or dataclasses.MISSING in values.values():
        raise place.error(
            f"has the fields {', '.join(fields)}, expected {', '.join(defaults)}; it "
            f"was saved by another version of {cls.__qualname__}"
        )
    if is_named_tuple(cls):
        return tuple.__new__(cls, values.values())
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
