"""Plausible mistakes, each told in one line before any law is tried."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.cells import prepare
from jlstm.door import check_hashable
from jlstm.layers.recurrent import check_cell_field, check_layer_field
from jlstm.testing.laws import BATCH, Case, to_numpy
from jlstm.types import PyTree, is_inexact, join, smooth_leaves

CELL = {
    "init": ["key", "x"],
    "init_carry": ["params", "batch_shape"],
    "step": ["params", "carry", "x"],
}
LAYER = {
    "init": ["key", "xs"],
    "init_carry": ["params", "batch_shape"],
    "apply": ["params", "xs", "carry"],
}


def check_is_cell(cell: Any) -> None:
    """Refuses what is no cell: a layer, a class, methods of another shape.

    Raises:
      TypeError: it is none, or a method is missing or takes another order.
      ValueError: it has no hash, or a field holds a lambda.
    """
    check_cell_field("check_cell", cell)
    check_hashable(cell, "check_cell")
    _check_methods("check_cell", cell, CELL)


def check_is_layer(layer: Any) -> None:
    """Refuses what is no layer, as :func:`check_is_cell` does."""
    check_layer_field("check_layer", layer)
    check_hashable(layer, "check_layer")
    _check_methods("check_layer", layer, LAYER)


def _check_methods(where: str, subject: Any, methods: dict[str, list[str]]) -> None:
    for method, expected in methods.items():
        written = f"{method}({', '.join(expected)})"
        if not callable(getattr(subject, method, None)):
            raise TypeError(f"{where}: {subject!r} needs a method {written}")
        given = list(inspect.signature(getattr(subject, method)).parameters)
        # Names are free; but one of these in another place is a swap.
        if any(a != b and a in expected for a, b in zip(given, expected, strict=False)):
            raise TypeError(
                f"{where}: {type(subject).__name__} must define {written}, got "
                f"({', '.join(given)}); keep this order"
            )


def check_cell_results(cell: Any, case: Case, *, rows_in_params: bool = False) -> None:
    """Refuses results of another shape or dtype, and what is not finite at x = 0.

    Args:
      cell: the cell.
      case: what it is run on.
      rows_in_params: whether params have a leaf for each row, and so fix the batch.

    Raises:
      ValueError: saying what was expected, what came, and what to do.
    """
    where = "check_cell"
    _check_fresh(where, cell, case.params, BATCH if rows_in_params else BATCH + 1)
    fresh = jax.eval_shape(lambda p: cell.init_carry(p, (BATCH,)), case.params)
    params, x = jax.eval_shape(partial(_first_step, cell), case.params, case.xs)
    out = _call(f"{where}: step(params, carry, x)", cell.step, params, fresh, x)
    _check_pair(f"{where}: step must return (carry, y)", out, fresh)
    new, y = out
    _check_carry(f"{where}: step", new, fresh)
    _check_output(f"{where}: step must return y", y, axes=1)
    _check_finite_at_zero(cell, case)


def check_layer_results(layer: Any, case: Case) -> None:
    """Refuses results of another shape or dtype.

    Raises:
      ValueError: saying what was expected, what came, and what to do.
    """
    where = "check_layer"
    _check_fresh(where, layer, case.params, BATCH + 1)
    parts = (case.params, case.xs, case.carry)
    out = _call(f"{where}: apply(params, xs, carry)", layer.apply, *parts)
    _check_pair(f"{where}: apply must return (ys, carry)", out, case.carry)
    ys, new = out
    _check_carry(f"{where}: apply", new, case.carry)
    _check_output(f"{where}: apply must return ys", ys, axes=2)


def describe(tree: PyTree) -> str:
    """Writes the types of a tree, as ``LSTMCarry(.h float64[3, 4], ...)``."""
    found = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]
    if hasattr(tree, "shape"):
        return found[0]
    return f"{type(tree).__name__}({', '.join(found)})"


def _first_step(cell: Any, params: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    params, xs = prepare(cell, params, xs)
    return params, jax.tree.map(lambda leaf: leaf[:, 0], xs)


def _call(where: str, method: Callable[..., Any], *args: PyTree) -> Any:
    """Finds the types of what a method returns; tells why it fails."""
    try:
        return jax.eval_shape(method, *args)
    except Exception as problem:
        _, *given = map(describe, args)
        reason = (str(problem).splitlines() or [""])[0]
        raise ValueError(
            f"{where} fails on {' and '.join(given)}, in this order: "
            f"{type(problem).__name__}: {reason}"
        ) from problem


def _check_fresh(where: str, subject: Any, params: PyTree, batch: int) -> None:
    fresh = jax.eval_shape(lambda p: subject.init_carry(p, (batch,)), params)
    for leaf in jax.tree.leaves(fresh):
        if leaf.shape[:1] != (batch,):
            raise ValueError(
                f"{where}: every carry leaf begins with the batch: init_carry(params, "
                f"({batch},)) must return leaves [{batch}, ...], got "
                f"{list(leaf.shape)}; take the batch from batch_shape"
            )


def _check_pair(expected: str, out: PyTree, carry: PyTree) -> None:
    is_pair = isinstance(out, tuple) and len(out) == 2
    # A carry of two parts is a pair too.
    if not is_pair or jax.tree.structure(out) == jax.tree.structure(carry):
        raise ValueError(f"{expected}, got only {describe(out)}; return both")


def _check_carry(where: str, new: PyTree, old: PyTree) -> None:
    if describe(new) != describe(old):
        raise ValueError(
            f"{where} must return a carry of the type it was given, {describe(old)}, "
            f"got {describe(new)}; take dtypes from params and x, and mind the order "
            "of the results"
        )


def _check_output(where: str, ys: PyTree, axes: int) -> None:
    begins = ["B", "T"][:axes]
    for leaf in jax.tree.leaves(ys):
        if leaf.ndim < axes or leaf.shape[0] != BATCH:
            raise ValueError(
                f"{where} of leaves [{', '.join(begins)}, ...] with B={BATCH}, got "
                f"{list(leaf.shape)}; return one output for each row"
            )
        if is_inexact(leaf) and jnp.finfo(leaf.dtype).bits < 64:
            raise ValueError(
                f"{where} of the dtype that params and inputs promote to, float64, "
                f"got {leaf.dtype}; take the dtype from them instead of naming one"
            )


def _check_finite_at_zero(cell: Any, case: Case) -> None:
    zeros = jax.tree.map(np.zeros_like, case.xs)

    def run(smooth: PyTree) -> tuple[Any, PyTree]:
        params, xs, carry = join(smooth, (case.params, zeros, case.carry))
        params, x = _first_step(cell, params, xs)
        new, y = cell.step(params, carry, x)
        leaves = jax.tree.leaves(smooth_leaves((new, y)))
        return sum((leaf.sum() for leaf in leaves), jnp.zeros(())), (new, y)

    given = smooth_leaves((case.params, zeros, case.carry))
    grads, out = jax.jit(jax.grad(run, has_aux=True))(given)
    names = ("carry", "y", *(f"gradient of {n}" for n in ("params", "x", "carry")))
    for name, tree in zip(names, (*out, *grads), strict=True):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_numpy(tree))):
            raise ValueError(
                "check_cell: step must be finite at x = 0, because padding is zeroed; "
                f"got NaN or infinity in the {name}; guard what divides by x, or takes "
                "its root or logarithm"
            )
