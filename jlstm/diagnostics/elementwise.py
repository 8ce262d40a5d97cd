"""The diagonal of a Jacobian, by one product where the function is elementwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jlstm.kernels.graph import called
from jlstm.types import Array

# How a value depends on the argument: not at all; each element on its own element only;
# the same, after arrays were concatenated; or in any other way.
NONE, OWN, WIDE, JOINED = range(4)
MOVES = ("rev", "sort", "transpose", "gather", "scatter", "triangular_solve", "fft")


def diagonal(function: Callable[[Array], list[Array]], x: Array) -> list[Array]:
    """Computes the diagonals of the Jacobians of ``function`` at ``x [B, ...]``.

    The first axis is a batch whose rows are independent. The results have the shape of
    ``x``.
    """
    if is_elementwise(function, x):
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]
    shape, size = x.shape, math.prod(x.shape[1:])

    def one(unit: Array) -> list[Array]:
        tangent = jnp.zeros((shape[0], size), x.dtype).at[:, unit].set(1)
        _, out = jax.jvp(function, (x,), (tangent.reshape(shape),))
        return [leaf.reshape(shape[0], size)[:, unit] for leaf in out]

    made = jax.lax.map(one, jnp.arange(size))
    return [leaf.T.reshape(shape) for leaf in made]


def is_elementwise(function: Callable[[Array], list[Array]], x: Array) -> bool:
    """Tells from its jaxpr whether each element depends on its own element only."""
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    return all(kind < WIDE for kind in _read(jaxpr, [OWN]))


def _read(jaxpr: Any, given: list[int]) -> list[int]:
    kinds = dict(zip(jaxpr.invars, given, strict=True))

    def find(atom: Any) -> int:
        return NONE if isinstance(atom, Literal) else kinds.get(atom, NONE)

    for eqn in jaxpr.eqns:
        args = [find(atom) for atom in eqn.invars]
        if not any(args):
            continue
        inner = called(eqn)
        if inner is not None and len(inner[0].invars) == len(args):
            made = _read(inner[0], args)
        else:
            made = [_kind(eqn, args)] * len(eqn.outvars)
        kinds.update(zip(eqn.outvars, made, strict=True))
    return [find(atom) for atom in jaxpr.outvars]


def _kind(eqn: Any, args: list[int]) -> int:
    name, most = eqn.primitive.name, max(args)
    if most == JOINED:
        return JOINED
    if name == "concatenate":
        return WIDE if most == OWN else JOINED
    if name == "split":
        return OWN if most == WIDE else JOINED
    given = [a.aval.shape for a, kind in zip(eqn.invars, args, strict=True) if kind]
    same = all(shape == var.aval.shape for shape in given for var in eqn.outvars)
    moves = name in MOVES or name.startswith(("cum", "dot", "conv_", "reduce_w"))
    loops = name in ("scan", "while", "cond")
    return most if same and not moves and not loops else JOINED
