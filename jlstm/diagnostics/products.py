"""Products of step Jacobians, built from the derivatives of one step after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jlstm import door
from jlstm.cells.wrappers import prepare
from jlstm.diagnostics.observe import check_inputs, name_of
from jlstm.layers.recurrent import check_cell_field
from jlstm.types import Array, PyTree, common_dtype

Anchor = Literal["last", "first"]


def check_part(
    where: str, cell: Any, params: PyTree, xs: PyTree, part: str | None
) -> tuple[int, ...]:
    """Checks a part of the carry; returns its indices in the flat carry of a row."""
    check_cell_field(where, cell)
    check_inputs(where, cell, xs, {})
    if not jax.tree.leaves(xs)[0].shape[1]:
        raise door.error(where, "xs must have at least one step, got none")
    fresh = jax.eval_shape(lambda p: cell.init_carry(p, (1,)), params)
    start, places = 0, {}
    for path, leaf in jax.tree.leaves_with_path(fresh):
        places[name_of(path)] = range(start, start + math.prod(leaf.shape))
        start += math.prod(leaf.shape)
    if part is None:
        return tuple(range(start))
    if part not in places:
        names = ", ".join(map(repr, places))
        raise door.error(where, f"part must be one of {names}, got {part!r}")
    return tuple(places[part])


def _begin(
    cell: Any, params: PyTree, xs: PyTree, carry: PyTree
) -> tuple[Array, PyTree, Callable[[Array, PyTree], Array]]:
    """Returns carries ``[B, N]``, inputs by step, and the function of one step."""
    batch = jax.tree.leaves(xs)[0].shape[0]
    fresh = cell.init_carry(params, (batch,))
    run_params, xs = prepare(cell, params, xs)
    xs = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), xs)

    def advance(carry: PyTree, x: PyTree) -> PyTree:
        return cell.step(run_params, carry, x)[0]

    like = jax.eval_shape(advance, fresh, jax.tree.map(lambda leaf: leaf[0], xs))
    carry = fresh if carry is None else carry
    carry = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), carry, like)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], carry))

    def flat(carry: PyTree) -> Array:
        return jax.vmap(lambda row: ravel_pytree(row)[0])(carry)

    def step(carry: Array, x: PyTree) -> Array:
        return flat(advance(jax.vmap(unravel)(carry), x))

    return flat(carry), xs, step


def _push(step: Callable[[Array], Array], carry: Array, columns: Array) -> tuple:
    """Takes a step, and multiplies columns ``[B, N, K]`` by its Jacobian."""
    new, push = jax.linearize(step, carry)
    return new, jax.vmap(push, -1, -1)(columns)


def _columns(places: tuple[int, ...], carry: Array) -> Array:
    batch, size = carry.shape
    eye = jnp.eye(size, dtype=carry.dtype)[:, jnp.array(places)]
    return jnp.broadcast_to(eye, (batch, *eye.shape))


def _wide(array: Array) -> Array:
    """Widens to float32 at least, since linear algebra has no shorter dtypes."""
    return array.astype(common_dtype(array.dtype, jnp.float32))


def _logarithm(matrix: Array, scale: Array) -> Array:
    return jnp.log(jnp.linalg.norm(_wide(matrix), 2, axis=(-2, -1))) + _wide(scale)


def _scaled(matrix: Array, scale: Array) -> tuple[Array, Array]:
    """Divides matrices by their largest elements, and moves these into the scale."""
    most = jnp.abs(matrix).max((-2, -1))
    most = jnp.where(most > 0, most, jnp.ones_like(most))
    return matrix / most[:, None, None], scale + jnp.log(most)


@partial(jax.jit, static_argnums=(0, 1, 2))
def norms_of_products(
    cell: Any,
    anchor: Anchor,
    places: tuple[int, ...],
    params: PyTree,
    xs: PyTree,
    carry: PyTree,
) -> Array:
    """Computes the logarithms of the norms of products, ``[B, T]``."""
    first, xs, step = _begin(cell, params, xs, carry)
    columns, chosen = _columns(places, first), jnp.array(places)
    scale = jnp.zeros_like(first[:, 0])

    def onward(state: tuple, x: PyTree) -> tuple[tuple, Array]:
        carry, columns, scale = state
        carry, columns = _push(lambda c: step(c, x), carry, columns)
        columns, scale = _scaled(columns, scale)
        return (carry, columns, scale), _logarithm(columns[:, chosen], scale)

    def back(state: tuple, inputs: tuple) -> tuple[tuple, Array]:
        columns, scale = state
        carry, x = inputs
        _, pull = jax.vjp(lambda c: step(c, x), carry)
        columns = jax.vmap(lambda c: pull(c)[0], -1, -1)(columns)
        columns, scale = _scaled(columns, scale)
        return (columns, scale), _logarithm(columns[:, chosen], scale)

    if anchor == "first":
        return jax.lax.scan(onward, (first, columns, scale), xs)[1].T
    before = jax.lax.scan(lambda c, x: (step(c, x), c), first, xs)[1]
    found = jax.lax.scan(back, (columns, scale), (before, xs), reverse=True)[1]
    return found[::-1].T


@partial(jax.jit, static_argnums=(0, 1))
def jacobians(
    cell: Any, places: tuple[int, ...], params: PyTree, xs: PyTree, carry: PyTree
) -> Array:
    """Computes the Jacobians of single steps, ``[B, T, N, N]``."""
    first, xs, step = _begin(cell, params, xs, carry)
    columns, chosen = _columns(places, first), jnp.array(places)

    def each(carry: Array, x: PyTree) -> tuple[Array, Array]:
        carry, made = _push(lambda c: step(c, x), carry, columns)
        return carry, made[:, chosen]

    return _wide(jnp.moveaxis(jax.lax.scan(each, first, xs)[1], 0, 1))


@partial(jax.jit, static_argnums=(0, 1, 2))
def exponents(
    cell: Any, count: int, skip: int, params: PyTree, xs: PyTree, carry: PyTree
) -> Array:
    """Computes Lyapunov exponents, ``[B, count]``."""
    first, xs, step = _begin(cell, params, xs, carry)
    batch, size = first.shape
    # Random directions, since a recurrence may never leave some of the unit vectors.
    start = jax.random.orthogonal(jax.random.key(0), size, dtype=_wide(first).dtype)
    start = start[:, :count].astype(first.dtype)
    start = jnp.broadcast_to(start, (batch, size, count))

    def each(state: tuple[Array, Array], x: PyTree) -> tuple[tuple, Array]:
        carry, columns = _push(lambda c: step(c, x), *state)
        columns, triangle = jnp.linalg.qr(_wide(columns))
        factors = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
        return (carry, columns.astype(carry.dtype)), jnp.log(factors)

    return jax.lax.scan(each, (first, start), xs)[1][skip:].mean(0)
