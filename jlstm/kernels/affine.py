"""Tests whether a new carry is affine in the old one, element by element."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jlstm.cells.wrappers import prepare
from jlstm.kernels import blocks
from jlstm.kernels.graph import called
from jlstm.types import Array, PyTree, is_inexact

# Operations that are affine in all their arguments as long as no shape changes; and
# products, with the arguments that may depend on the carry, one at a time.
SUMS = ("add", "sub", "add_any", "neg", "copy", "copy_p", "reduce_precision")
SUMS += ("reshape", "broadcast_in_dim", "convert_element_type")
FACTORS = {"mul": (0, 1), "div": (0,)}


class NotAffine(Exception):
    """Raised for a carry that is not affine in the one before; says why."""


class Found(NamedTuple):
    """What a value depends on."""

    leaves: frozenset[int] = frozenset()  # of the carry before
    problem: str = ""  # why it is not affine in them


@functools.lru_cache
def why_not(cell: Any, inputs: tuple | None) -> str | None:
    """Says why the carry of a cell is not affine in the one before, or ``None``.

    Args:
      cell: a gated cell.
      inputs: the structure, shapes and dtypes of the inputs, as in
        :class:`jlstm.kernels.Request`; ``None`` assumes eight features.
    """
    features = (8,) * getattr(cell, "x_ndim", 1)
    xs = jax.ShapeDtypeStruct((2, 2, *features), jnp.float32)
    if inputs is not None:
        xs = inputs[0].unflatten(inputs[1])

    def look(key: Array, xs: PyTree) -> None:
        first = blocks.at(xs, 0, axis=1)
        params = cell.init(key, first)
        carry = cell.init_carry(params, jax.tree.leaves(first)[0].shape[:1])
        params, xs = prepare(cell, params, xs)
        pairs(cell, params, carry, blocks.at(xs, 0, axis=1))

    try:
        jax.eval_shape(look, jax.random.key(0), xs)
    except NotAffine as problem:
        return str(problem)
    except Exception:
        return None  # such inputs are not for this cell; a loop knows its own
    return None


def pairs(cell: Any, params: PyTree, carry: PyTree, x: PyTree) -> list:
    """Finds which leaves of a new carry depend on which leaves of an earlier one.

    The dependence may be direct, or over several steps. The arguments are those of one
    step; only their shapes and dtypes count.

    Returns:
      Pairs ``(after, before)`` of the indices of leaves; each leaf is paired with
      itself too.

    Raises:
      NotAffine: naming the first operation that is not affine, or that mixes elements.
    """
    leaves = jax.tree.leaves(carry)
    if not all(map(is_inexact, leaves)):
        raise NotAffine("the carry has arrays that are not floating")
    zx = cell.project(params, x)
    zh = cell.mix(params, carry, zx)
    if jax.tree.leaves(zh):
        raise NotAffine("mix returns a recurrent product, but must return ()")

    def new_carry(carry: PyTree, params: PyTree, zx: PyTree) -> PyTree:
        return cell.update(params, carry, zx, zh)[0]

    jaxpr = jax.make_jaxpr(new_carry)(carry, params, zx).jaxpr
    given = [Found(frozenset([i])) for i in range(len(leaves))]
    rest = [Found()] * (len(jaxpr.invars) - len(leaves))
    found = _read(jaxpr, given + rest)
    for each in found:
        if each.problem:
            raise NotAffine(each.problem)
    joined = {(i, j) for i, each in enumerate(found) for j in {i, *each.leaves}}
    for k in range(len(leaves)):
        before = [j for j in range(len(leaves)) if (k, j) in joined]
        after = [i for i in range(len(leaves)) if (i, k) in joined]
        joined |= {(i, j) for i in after for j in before}
    if any(leaves[i].dtype != leaves[j].dtype for i, j in joined):
        raise NotAffine(
            "arrays of the carry that depend on each other have different dtypes"
        )
    return sorted(joined)


def _read(jaxpr: Any, given: list[Found]) -> list[Found]:
    values = dict(zip(jaxpr.invars, given, strict=True))

    def find(atom: Any) -> Found:
        return Found() if isinstance(atom, Literal) else values.get(atom, Found())

    for eqn in jaxpr.eqns:
        args = [find(atom) for atom in eqn.invars]
        leaves = frozenset[int]().union(*(arg.leaves for arg in args))
        problems = [arg.problem for arg in args if arg.problem]
        inner = None if eqn.primitive.name.startswith("custom_vjp") else called(eqn)
        if not leaves:
            continue
        if inner is not None:
            made = _read(inner[0], args)
        else:
            # Not raised yet: the carry may not depend on this result.
            problem = _problem(eqn, [bool(arg.leaves) for arg in args])
            problem = problems[0] if problems else problem
            made = [Found(leaves, problem)] * len(eqn.outvars)
        values.update(zip(eqn.outvars, made, strict=True))
    return [find(atom) for atom in jaxpr.outvars]


def _problem(eqn: Any, flags: list[bool]) -> str:
    """Says why an equation is not affine in its flagged arguments, or nothing."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    given = [a.aval for a, flag in zip(eqn.invars, flags, strict=True) if flag]
    shapes = all(aval.shape == out.shape for aval in given)
    complex_to_real = any(map(_is_complex, given)) and not _is_complex(out)
    if shapes and is_inexact(out) and not complex_to_real:
        if name in SUMS:
            return ""
        if sum(flags) == 1 and flags.index(True) in FACTORS.get(name, ()):
            return ""
        if name == "select_n" and not flags[0]:
            return ""
    return (
        f"update must be affine and elementwise in the carry, but applies {name} to it"
    )


def _is_complex(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.complexfloating)
