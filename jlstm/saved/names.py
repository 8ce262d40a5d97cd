"""The classes and functions that a name in a file may stand for.

Files name classes and functions, and none is imported or called on that account. A name
is looked up in tables of what is known already.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlstm import cells, init, layers, models, types

# Elementwise functions, and softmax, that a config may have for an activation.
ACTIVATIONS = {
    "jlstm.cells": (cells, "sigmoid tanh"),
    "jax.nn": (
        jax.nn,
        "relu relu6 sigmoid softplus sparse_plus sparse_sigmoid soft_sign silu "
        "log_sigmoid leaky_relu hard_sigmoid hard_silu hard_tanh elu celu selu gelu "
        "squareplus mish identity softmax log_softmax",
    ),
    "jax.numpy": (
        jnp,
        "tanh abs arcsinh arctan cos exp expm1 log1p negative positive reciprocal "
        "sign sin sinc sinh sqrt square",
    ),
}


class Refused(ValueError):
    """A file asks for something well formed that is not allowed, or not there."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a file something stands, for errors."""

    path: Path
    name: str

    def at(self, part: str) -> Place:
        """A place inside this one."""
        return Place(self.path, self.name + part)

    def error(self, message: str) -> Refused:
        """Makes an error that names the place."""
        return Refused(f"load: {self.name} in {self.path} {message}")


@functools.cache
def exports() -> Mapping[str, Any]:
    """What the library exports, by full name."""
    found: dict[str, Any] = {"jlstm.types.Policy": types.Policy}
    for module in (cells, layers, models):
        found |= {f"{module.__name__}.{n}": getattr(module, n) for n in module.__all__}
    for name, value in vars(init).items():
        if getattr(value, "__module__", None) == init.__name__:
            found[f"{init.__name__}.{name}"] = value
    return found


@functools.cache
def configs() -> Mapping[str, Any]:
    """The classes of configs that a file may name."""

    def is_config(value: Any) -> bool:
        params = getattr(value, "__dataclass_params__", None)
        frozen = isinstance(value, type) and params is not None and params.frozen
        return frozen and not is_node(value)

    return {name: value for name, value in exports().items() if is_config(value)}


@functools.cache
def functions() -> Mapping[str, Callable]:
    """The functions that a file may name."""
    found = {
        name: value
        for name, value in exports().items()
        if name.startswith(init.__name__) and inspect.isfunction(value)
    }
    for prefix, (module, names) in ACTIVATIONS.items():
        there = (name for name in names.split() if hasattr(module, name))
        found |= {f"{prefix}.{name}": getattr(module, name) for name in there}
    return found


def is_node(cls: Any) -> bool:
    """Tells whether a class is one of pytrees: of flax.struct, or a NamedTuple."""
    if not isinstance(cls, type):
        return False
    return "_flax_dataclass" in vars(cls) or is_named_tuple(cls)


def is_named_tuple(cls: type) -> bool:
    """Tells whether a class is a NamedTuple."""
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def name_of(kind: str, value: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """Names what is in a table, or else by where it was defined."""
    for name, known in table.items():
        if known is value:
            return {kind: name}
    return {kind: value.__qualname__, "module": value.__module__}


def full_name(node: Mapping[str, Any], kind: str) -> str:
    """Writes such a name."""
    return ".".join(filter(None, (node.get("module"), node[kind])))


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a config, or ``None`` if it has none."""
    if isinstance(value, init.Pretrained):
        return {"shape": value.shape, "sha256": value.digest}
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
    elif is_named_tuple(type(value)):
        names = type(value)._fields
    else:
        return None
    return {name: getattr(value, name) for name in names}


def defaults_of(cls: Any) -> dict[str, Any]:
    """The defaults of a class's fields, ``MISSING`` where there is none."""
    if is_named_tuple(cls):
        return dict.fromkeys(cls._fields, dataclasses.MISSING) | cls._field_defaults
    return {field.name: field.default for field in dataclasses.fields(cls)}
