"""Norms of products of Jacobians, spectra, and Lyapunov exponents."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import jax
import numpy as np

from jlstm import door
from jlstm.diagnostics.memory import numbers
from jlstm.diagnostics.products import (
    Anchor,
    check_part,
    exponents,
    jacobians,
    norms_of_products,
)
from jlstm.types import Cell, PyTree


@dataclasses.dataclass(frozen=True, repr=False)
class JacobianNorms:
    """How the norm of a product of step Jacobians changes with the number of steps.

    Attributes:
      log_norms: the natural logarithms of the norms, ``[B, T]``; entry k is that of
        k + 1 steps.
      part: the part of the carry that was differentiated.
    """

    log_norms: np.ndarray
    part: str

    @property
    def norms(self) -> np.ndarray:
        """The norms, ``[B, T]``; entry k is that of k + 1 steps."""
        return np.exp(self.log_norms)

    @property
    def lags(self) -> np.ndarray:
        """The numbers of steps, ``[T]``: 1, 2, and so on."""
        return np.arange(1, self.log_norms.shape[1] + 1)

    @property
    def median(self) -> np.ndarray:
        """The medians of the norms over rows, ``[T]``."""
        return np.median(self.norms, axis=0)

    @property
    def rate(self) -> float:
        """The growth rate of the norm: the logarithm of its mean factor a step.

        It is the slope, by least squares, of the median logarithm over the number of
        steps. Below 0 the norm falls; minus infinity means that it becomes zero.
        """
        curve = np.median(self.log_norms, axis=0)
        if not np.isfinite(curve).all():
            return -math.inf
        if curve.size < 2:
            return float(curve[0])
        return float(np.polyfit(self.lags, curve, 1)[0])

    @property
    def halving(self) -> float:
        """Steps in which the norm halves; infinity if it does not fall."""
        return -math.log(2) / self.rate if self.rate < 0 else math.inf

    @property
    def half_life(self) -> int:
        """The last number of steps over which the norm stays above half its first."""
        above = np.flatnonzero(self.median >= self.median[0] / 2)
        return int(above[-1] + 1)

    @property
    def memory_length(self) -> float:
        r"""The effective length of memory in steps, :math:`\sum_k n_k / n_1`.

        Here :math:`n_k` is the median norm over k steps. If the norm falls by a factor
        r each step, this is :math:`1 / (1 - r)`, but at most the number of steps.
        """
        return float(self.median.sum() / self.median[0]) if self.median[0] else 0.0

    def __repr__(self) -> str:
        steps = self.lags[[0, -1]]
        change = "grows" if self.rate > 0 else "falls"
        # Where the norm does not fall, neither has a meaning.
        falls = (
            f"; half-life {self.half_life} steps, memory length "
            f"{self.memory_length:.3g} steps"
        )
        return (
            f"norm of the Jacobian of {self.part} over k steps: {self.median[0]:.3g} "
            f"at k = {steps[0]}, {self.median[-1]:.3g} at k = {steps[1]}; it {change} "
            f"by a factor {math.exp(abs(self.rate)):.3g} a step"
            f"{falls if self.rate < 0 else ''}"
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
    r"""Computes how strongly the carry depends on the carry k steps earlier.

    The results are the norms (largest singular values) of
    :math:`\partial s_T / \partial s_{T-k}` for k from 1 to T. Each bounds the factor by
    which a gradient at the last step is multiplied on its way back over k steps. The
    products are kept as logarithms, so none underflows.

    Args:
      cell: any cell.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      carry: the incoming carry; None means the fresh one.
      part: the name of a part of the carry, such as ``"h"``, which is differentiated
        with respect to itself at the earlier step; None means the whole carry.
      anchor: ``"last"`` goes back from the last step. ``"first"`` goes forward from the
        first: the norms of :math:`\partial s_k / \partial s_0`.

    Returns:
      The norms for each row and number of steps.

    Raises:
      TypeError: ``cell`` is no cell.
      ValueError: the carry has no such part, there are no steps, or the anchor is
        unknown.

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
    places = check_part("jacobian_norms", cell, params, xs, part)
    logs = norms_of_products(cell, anchor, places, params, xs, carry)
    return JacobianNorms(np.asarray(logs, np.float64), part or "the carry")


@dataclasses.dataclass(frozen=True, repr=False)
class Spectrum:
    """The eigenvalues and singular values of the Jacobians of single steps.

    Attributes:
      eigenvalues: complex, ``[B, T, N]``, the largest modulus first. N is the number of
        elements in the carry of a row.
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
    r"""Computes the eigenvalues and singular values of every step's Jacobian.

    The Jacobian of a step is :math:`\partial s_t / \partial s_{t-1}`. Where its
    largest eigenvalues have a modulus near 1, memory lasts.

    Args:
      cell: any cell.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      carry: the incoming carry; None means the fresh one.
      part: the name of a part of the carry, such as ``"h"``; None means the whole. The
        time and memory grow with the size of the part.

    Returns:
      The eigenvalues and singular values, for each row and step.

    Raises:
      TypeError: ``cell`` is no cell.
      ValueError: the carry has no such part, or there are no steps.

    Example:
      >>> cell, xs = jlstm.Elman(4), jnp.zeros((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])  # orthogonal
      >>> jlstm.diagnostics.spectrum(cell, params, xs)
      spectral radius: median 1, from 1 to 1
      largest singular value: median 1, from 1 to 1
    """
    places = check_part("spectrum", cell, params, xs, part)
    found = np.asarray(jacobians(cell, places, params, xs, carry))
    eigenvalues = np.linalg.eigvals(found).astype(np.result_type(found, np.complex64))
    order = np.argsort(-np.abs(eigenvalues), axis=-1, kind="stable")
    return Spectrum(
        np.take_along_axis(eigenvalues, order, axis=-1),
        np.linalg.svd(found, compute_uv=False),
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Lyapunov:
    """The Lyapunov exponents of a recurrence driven by its inputs.

    Attributes:
      exponents: ``[B, N]``, the largest first. Each is the mean logarithm of the factor
        by which a small difference of carries grows each step; above 0 it grows.
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
    r"""Computes the Lyapunov exponents of a cell on a batch of sequences.

    They measure whether small differences between carries grow (positive exponents) or
    die out (negative ones). With :math:`J_t` the Jacobian of step t and
    :math:`J_t Q_{t-1} = Q_t R_t`, Q orthogonal and R triangular,

    .. math::
        \lambda_i = \frac1T \sum_t \log |R_t^{ii}|

    Args:
      cell: any cell.
      params: its params.
      xs: inputs ``[B, T, ...]``. Choose a long T, such as some hundreds of steps, since
        the mean converges slowly.
      carry: the incoming carry; None means the fresh one.
      count: how many of the largest exponents to compute; None means all.
      skip: the number of steps at the beginning that do not count, until the carry has
        forgotten where it began.

    Returns:
      The exponents of each row.

    Raises:
      TypeError: ``cell`` is no cell.
      ValueError: ``count`` or ``skip`` is out of range, or there are no steps.

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
    places = check_part("lyapunov_exponents", cell, params, xs, None)
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
    logs = exponents(cell, count, skip, params, xs, carry)
    return Lyapunov(-np.sort(-np.asarray(logs, np.float64), axis=-1))
