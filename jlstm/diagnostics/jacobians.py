"""The Jacobian of a step, and products of many: norms, spectrum, Lyapunov exponents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jlstm import door
from jlstm.cells.wrappers import prepare
from jlstm.diagnostics.memory import numbers
from jlstm.diagnostics.observe import check_inputs, name_of
from jlstm.layers.recurrent import check_cell_field
from jlstm.types import Array, Cell, PyTree

Anchor = Literal["last", "first"]


@dataclasses.dataclass(frozen=True, repr=False)
class JacobianNorms:
    """How the norm of a product of step Jacobians changes with their number.

    Attributes:
      log_norms: natural logarithms, ``[B, T]``; entry k is of k + 1 steps.
      part: of which part of the carry.
    """

    log_norms: np.ndarray
    part: str

    @property
    def norms(self) -> np.ndarray:
        """The norms, ``[B, T]``; entry k is of k + 1 steps."""
        return np.exp(self.log_norms)

    @property
    def lags(self) -> np.ndarray:
        """The numbers of steps, ``[T]``, from 1 on."""
        return np.arange(1, self.log_norms.shape[1] + 1)

    @property
    def median(self) -> np.ndarray:
        """The medians over rows, ``[T]``."""
        return np.median(self.norms, axis=0)

    @property
    def rate(self) -> float:
        """The slope of the logarithm over the number of steps, by least squares.

        Of the medians over rows; minus infinity where the norm is zero somewhere.
        """
        curve = np.median(self.log_norms, axis=0)
        if not np.isfinite(curve).all():
            return -math.inf
        if curve.size < 2:
            return float(curve[0])
        return float(np.polyfit(self.lags, curve, 1)[0])

    @property
    def halving(self) -> float:
        """Steps in which the norm halves; infinity if it does not, 0 if at once."""
        return -math.log(2) / self.rate if self.rate < 0 else math.inf

    @property
    def half_life(self) -> int:
        """Steps until the median is half of that of one step, and stays below."""
        above = np.flatnonzero(self.median >= self.median[0] / 2)
        return int(above[-1] + 1)

    @property
    def memory_length(self) -> float:
        r"""The effective length of memory, :math:`\sum_k n_k / n_1`, in steps.

        Of a norm that falls by a factor r a step it is :math:`1 / (1 - r)`, but no more
        than the number of steps.
        """
        return float(self.median.sum() / self.median[0]) if self.median[0] else 0.0

    def __repr__(self) -> str:
        steps = self.lags[[0, -1]]
        change = "grows" if self.rate > 0 else "falls"
        return (
            f"norm of the Jacobian of {self.part} over k steps: {self.median[0]:.3g} "
            f"at k = {steps[0]}, {self.median[-1]:.3g} at k = {steps[1]}; it {change} "
            f"by a factor {math.exp(abs(self.rate)):.3g} a step; half-life "
            f"{self.half_life} steps, memory length {self.memory_length:.3g} steps"
        )


def jacobian_norms(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    part: str | None = None,
    anchor: Anchor = "last",
) -> JacobianNorms:
    r"""Computes the norms of :math:`\partial s_T / \partial s_{T-k}`, k from 1 to T.

    The largest singular values: what a gradient at the last step is multiplied by at
    most on its way back over k steps. Products are kept by their logarithms, so that
    none underflows.

    Args:
      cell: any cell.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      carry: the incoming carry; ``None`` means the fresh one.
      part: the name of a part of the carry, such as ``"h"``: of which the derivative is
        taken, and by which; ``None`` means the whole.
      anchor: ``"last"``; or ``"first"``, for :math:`\partial s_k / \partial s_0`.

    Raises:
      TypeError: no cell.
      ValueError: the carry has no such part; no steps; an unknown anchor.

    Example:
      >>> cell, xs = jlstm.LSTM(4), jnp.ones((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> found = jlstm.diagnostics.jacobian_norms(cell, params, xs, part="h")
      >>> found.norms.shape, found.lags.tolist()
      ((2, 5), [1, 2, 3, 4, 5])
    """
    if anchor not in get_args(Anchor):
        raise door.error(
            "jacobian_norms", f"anchor must be 'last' or 'first', got {anchor!r}"
        )
    places = _check("jacobian_norms", cell, params, xs, part)
    logs = _norms(cell, anchor, places, params, xs, carry)
    return JacobianNorms(np.asarray(logs, np.float64), part or "the carry")


@dataclasses.dataclass(frozen=True, repr=False)
class Spectrum:
    """Eigenvalues and singular values of the Jacobians of single steps.

    Attributes:
      eigenvalues: complex, ``[B, T, N]``, the largest first.
      singular_values: ``[B, T, N]``, the largest first.
    """

    eigenvalues: np.ndarray
    singular_values: np.ndarray

    def __repr__(self) -> str:
        radius = np.abs(self.eigenvalues).max(-1)
        return (
            f"spectral radius: {numbers(radius)}\n"
            f"largest singular value: {numbers(self.singular_values[..., 0])}"
        )


def spectrum(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    part: str | None = None,
) -> Spectrum:
    r"""Computes the spectra of :math:`\partial s_t / \partial s_{t-1}` at every step.

    Args are those of :func:`jacobian_norms`.

    Raises:
      TypeError: no cell.
      ValueError: the carry has no such part; no steps.

    Example:
      >>> cell, xs = jlstm.Elman(4), jnp.zeros((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])  # orthogonal
      >>> jlstm.diagnostics.spectrum(cell, params, xs)
      spectral radius: median 1, from 1 to 1
      largest singular value: median 1, from 1 to 1
    """
    places = _check("spectrum", cell, params, xs, part)
    found = np.asarray(_jacobians(cell, places, params, xs, carry))
    eigenvalues = np.linalg.eigvals(found).astype(np.result_type(found, np.complex64))
    order = np.argsort(-np.abs(eigenvalues), axis=-1, kind="stable")
    return Spectrum(
        np.take_along_axis(eigenvalues, order, axis=-1),
        np.linalg.svd(found, compute_uv=False),
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Lyapunov:
    """Lyapunov exponents of a recurrence driven by its inputs.

    Attributes:
      exponents: ``[B, N]``, the largest first: the mean logarithm of a factor a step.
    """

    exponents: np.ndarray

    def __repr__(self) -> str:
        largest = self.exponents[:, 0]
        middle = float(np.median(largest))
        word = "expands: small differences grow" if middle > 0 else "contracts"
        return (
            f"largest exponent: {numbers(largest)}; the recurrence {word}, by a factor "
            f"{math.exp(abs(middle)):.3g} a step"
        )


def lyapunov_exponents(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    count: int | None = None,
    skip: int = 0,
) -> Lyapunov:
    r"""Computes Lyapunov exponents along the trajectories of a batch.

    With :math:`J_t Q_{t-1} = Q_t R_t` at each step, Q orthogonal and R triangular,

    .. math::
        \lambda_i = \frac1T \sum_t \log |R_t^{ii}|

    Args:
      cell: any cell.
      params: its params.
      xs: inputs ``[B, T, ...]``; a long T, since the mean converges slowly.
      carry: the incoming carry; ``None`` means the fresh one.
      count: how many, the largest; ``None`` means all.
      skip: steps at the beginning that do not count.

    Raises:
      TypeError: no cell.
      ValueError: ``count`` or ``skip`` does not fit; no steps.

    Example:
      >>> cell, xs = jlstm.Elman(4, activation=jax.nn.identity), jnp.ones((2, 50, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])  # orthogonal
      >>> found = jlstm.diagnostics.lyapunov_exponents(cell, params, xs, count=2)
      >>> bool(abs(found.exponents).max() < 1e-5)
      True

    References:
      Engelken, Wolf & Abbott, Lyapunov spectra of chaotic recurrent neural networks,
      2023.
    """
    places = _check("lyapunov_exponents", cell, params, xs, None)
    time, size = jax.tree.leaves(xs)[0].shape[1], len(places)
    count = size if count is None else count
    for name, value, low, high in (
        ("count", count, 1, size),
        ("skip", skip, 0, time - 1),
    ):
        if not isinstance(value, int) or not low <= value <= high:
            raise door.error(
                "lyapunov_exponents",
                f"{name} must be an int from {low} to {high}, got {value!r}",
            )
    logs = _exponents(cell, count, skip, params, xs, carry)
    return Lyapunov(-np.sort(-np.asarray(logs, np.float64), axis=-1))


def _check(
    where: str, cell: Any, params: PyTree, xs: PyTree, part: str | None
) -> tuple[int, ...]:
    """Checks, and returns the places of a part in the flat carry of a row."""
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
    """Returns carries ``[B, N]``, inputs by step, and the way of one to the next."""
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


def _logarithm(matrix: Array, scale: Array) -> Array:
    return jnp.log(jnp.linalg.norm(matrix, 2, axis=(-2, -1))) + scale


def _scaled(matrix: Array, scale: Array) -> tuple[Array, Array]:
    """Divides matrices by their largest elements, whose logarithms join the scale."""
    most = jnp.abs(matrix).max((-2, -1))
    most = jnp.where(most > 0, most, jnp.ones_like(most))
    return matrix / most[:, None, None], scale + jnp.log(most)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _norms(
    cell: Any,
    anchor: Anchor,
    places: tuple[int, ...],
    params: PyTree,
    xs: PyTree,
    carry: PyTree,
) -> Array:
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
def _jacobians(
    cell: Any, places: tuple[int, ...], params: PyTree, xs: PyTree, carry: PyTree
) -> Array:
    first, xs, step = _begin(cell, params, xs, carry)
    columns, chosen = _columns(places, first), jnp.array(places)

    def each(carry: Array, x: PyTree) -> tuple[Array, Array]:
        carry, made = _push(lambda c: step(c, x), carry, columns)
        return carry, made[:, chosen]

    return jnp.moveaxis(jax.lax.scan(each, first, xs)[1], 0, 1)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _exponents(
    cell: Any, count: int, skip: int, params: PyTree, xs: PyTree, carry: PyTree
) -> Array:
    first, xs, step = _begin(cell, params, xs, carry)
    batch, size = first.shape
    # Not the unit vectors, of which a recurrence may never leave some.
    start = jax.random.orthogonal(jax.random.key(0), size, dtype=first.dtype)
    start = jnp.broadcast_to(start[:, :count], (batch, size, count))

    def each(state: tuple[Array, Array], x: PyTree) -> tuple[tuple, Array]:
        carry, columns = _push(lambda c: step(c, x), *state)
        columns, triangle = jnp.linalg.qr(columns)
        factors = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
        return (carry, columns), jnp.log(factors)

    return jax.lax.scan(each, (first, start), xs)[1][skip:].mean(0)
