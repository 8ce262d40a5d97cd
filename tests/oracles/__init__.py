"""Cells beside their formulas, written from the papers in NumPy, one loop, float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import testing

B, T = 3, 6
DISTANCE = 1e-5  # of central differences


_FOUR = jax.ShapeDtypeStruct((4,), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A cell, and a NumPy loop that is its formula.

    Attributes:
      cell: the cell.
      oracle: ``(params, carry, xs [B, T, ...]) -> (ys, carry)``, in float64.
      source: where the formula stands.
      x: shape and dtype of an input ``[...]`` at one step, or a pytree of them.
      smooth: false where a derivative jumps, so that a difference may cross a kink.
    """

    cell: Any
    oracle: Callable[..., Any]
    source: str
    x: Any = _FOUR
    smooth: bool = True

    def __str__(self) -> str:
        return repr(self.cell)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def loop(step: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an oracle of a step ``(params, carry, x) -> (carry, y)``."""

    def run(params: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        ys = []
        for t in range(jax.tree.leaves(xs)[0].shape[1]):
            carry, y = step(params, carry, jax.tree.map(lambda x, t=t: x[:, t], xs))
            ys.append(y)
        return np.stack(ys, 1), carry

    return run


def errors(case: Case, implementation: str, dtype: str = "float64") -> dict[str, float]:
    """Compares a loop of the library with the oracle: values, and gradients.

    A gradient is met by its slope along random directions of params, carry and inputs,
    against central differences of the oracle.

    Returns:
      The largest error of values, relative to their magnitude, and that of slopes,
      relative to the norms of gradient and direction.
    """
    with jax.enable_x64(True):
        made = _inputs(case)
        narrow = jax.tree.map(lambda leaf: _cast(leaf, dtype), made)

        @jax.jit
        def run(inputs: Any) -> Any:
            params, carry, xs = inputs
            return jlstm.unroll(
                case.cell, params, xs, carry, implementation=implementation
            )

        results = jax.device_get(run(narrow))
        weights = testing.random_like(results, seed=5)

        def loss(inputs: Any) -> Any:
            return _dot(run(inputs), weights)

        gradients = jax.device_get(jax.jit(jax.grad(loss))(narrow))
        directions = [
            jax.device_get(testing.random_like(narrow, seed=seed)) for seed in (6, 7, 8)
        ]
        weights, made = jax.device_get((weights, made))

    expected = case.oracle(*made)
    pairs = zip(*map(jax.tree.leaves, (results, expected)), strict=True)
    value = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)

    def along(direction: Any, distance: float) -> float:
        moved = jax.tree.map(lambda a, d: _move(a, d, distance), made, direction)
        return float(_dot(case.oracle(*moved), weights))

    worst = 0.0
    for direction in directions:
        # Of a complex leaf, JAX's gradient is the conjugate of the one that is meant.
        slope = float(_dot(gradients, direction))
        near, far = (
            (along(direction, d) - along(direction, -d)) / (2 * d)
            for d in (DISTANCE, 2 * DISTANCE)
        )
        difference = (4 * near - far) / 3  # without the error of third derivatives
        size = _norm(gradients) * _norm(direction)
        worst = max(worst, abs(slope - difference) / size)
    return {"value": value, "gradient": worst}


def _inputs(case: Case) -> tuple[Any, Any, Any]:
    """Random params, carry and inputs, none of them zero."""

    def zeros(*axes: int) -> Any:
        return jax.tree.map(lambda s: jnp.zeros((*axes, *s.shape), _wide(s)), case.x)

    one, xs = zeros(B), zeros(B, T)
    params = testing.moved(case.cell.init(jax.random.key(0), one), seed=2)
    carry = testing.random_like(case.cell.init_carry(params, (B,)), seed=3)
    return params, carry, testing.random_like(xs, seed=1)


def _wide(leaf: Any) -> Any:
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return np.promote_types(leaf.dtype, np.float64) if inexact else leaf.dtype


def _cast(leaf: Any, dtype: str) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    wide = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    return leaf.astype(np.result_type(dtype, np.complex64) if wide else dtype)


def _move(a: Any, d: Any, distance: float) -> Any:
    return a + distance * d if np.issubdtype(np.asarray(a).dtype, np.inexact) else a


def _dot(a: Any, b: Any) -> Any:
    """Sums the products of leaves in their order; of complex ones, the real part."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((x * y).real.sum() for x, y in pairs)


def _norm(tree: Any) -> float:
    return float(np.sqrt(sum((np.abs(x) ** 2).sum() for x in jax.tree.leaves(tree))))
