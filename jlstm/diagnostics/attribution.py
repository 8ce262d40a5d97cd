"""Which inputs an output depends on: gradients, integrated gradients, occlusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jlstm import door
from jlstm.diagnostics.observe import check_inputs, run
from jlstm.types import Array, Cell, Layer, PyTree, is_inexact, where_rows, zero_rows

Method = Literal["gradient", "gradient_times_input", "integrated"]


@dataclasses.dataclass(frozen=True, repr=False)
class Attribution:
    """What each step of the input contributes to a number computed from the output.

    It prints the three largest contributions of each row.

    Attributes:
      steps: the contribution of each step, ``[B, T]``; zero at masked steps.
      features: the contribution of each feature, ``[B, T, D]``; None for occlusion.
      values: the number itself, ``[B]``.
      baseline: the number when all inputs are replaced by the baseline, ``[B]``; None
        unless the method is ``"integrated"``.
    """

    steps: np.ndarray
    features: np.ndarray | None
    values: np.ndarray
    baseline: np.ndarray | None = None

    def __repr__(self) -> str:
        lines = []
        for row, steps in enumerate(self.steps[:8]):
            most = np.argsort(-np.abs(steps), kind="stable")[:3]
            some = ", ".join(f"{step} ({steps[step]:.2g})" for step in most)
            lines.append(f"row {row}, of {self.values[row]:.3g}: most at steps {some}")
        if len(self.steps) > 8:
            lines.append(f"and {len(self.steps) - 8} rows more")
        return "\n".join(lines)


def attribute(
    layer: Layer | Cell,
    params: PyTree,
    xs: PyTree,
    target: Callable[[PyTree], Array],
    carry: PyTree = None,
    *,
    method: Method = "integrated",
    baseline: Array | None = None,
    points: int = 32,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
) -> Attribution:
    r"""Computes by gradients how much each input contributes to a number of each row.

    You choose the number :math:`y` by ``target``; it may be the logit of a class.
    ``"gradient"`` is :math:`\partial y / \partial x_t`, and the contribution of a step
    is its norm over the features. ``"gradient_times_input"`` multiplies the gradient by
    :math:`x_t`. ``"integrated"`` averages the gradient on the way from a baseline
    :math:`x'` to the input,

    .. math::
        (x_t - x'_t) \odot \int_0^1
            \frac{\partial y}{\partial x_t}(x' + \alpha (x - x')) \, d\alpha

    so that all contributions add up to :math:`y(x) - y(x')`. The integral is taken by
    the midpoint rule. For the last two methods, the contribution of a step is the sum
    over its features.

    Args:
      layer: a cell, or a layer or model with floating inputs. Of a model of tokens,
        give the part after the embedding.
      params: its params.
      xs: inputs ``[B, T, ...]``, one floating array.
      target: a function of the outputs (or of a model's answer) that returns one number
        for each row, ``[B]``, such as ``lambda ys: ys[:, -1, 0]``. The number of a row
        must depend on that row only.
      carry: the incoming carry; None means the fresh one.
      method: ``"integrated"``, ``"gradient"`` or ``"gradient_times_input"``. The first
        takes ``points`` times as long as the others, and its sum can be checked.
      baseline: :math:`x'`, inputs that stand for "nothing": an array that broadcasts to
        the shape of ``xs``. None means zeros.
      points: the number of points at which the gradient is computed for the integral.
        Raise it if the contributions do not add up.
      lengths: valid steps of each row, ``[B]`` integers; None if all are valid.
      mask: true at valid steps, ``[B, T]``, for padding that is not at the end; give
        ``lengths`` or ``mask``, not both.
      resets: true where a row begins anew, ``[B, T]``; None for nowhere.

    Returns:
      The contributions, as an :class:`Attribution`.

    Raises:
      TypeError: ``layer`` is neither a cell nor a layer.
      ValueError: the inputs are not floating, the method is unknown, or the target does
        not return ``[B]``.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.LSTM(4)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> found = jlstm.diagnostics.attribute(
      ...     layer, params, xs, lambda ys: ys[:, -1, 0])
      >>> total = found.values - found.baseline
      >>> bool(np.allclose(found.steps.sum(1), total, atol=1e-3))
      True

    References:
      Sundararajan, Taly & Yan, Axiomatic attribution for deep networks, 2017.
    """
    masking = {"lengths": lengths, "mask": mask, "resets": resets}
    masking = check_inputs("attribute", layer, xs, masking)
    if method not in get_args(Method):
        names = ", ".join(map(repr, get_args(Method)))
        raise door.error("attribute", f"method must be one of {names}, got {method!r}")
    if len(jax.tree.leaves(xs)) != 1 or not is_inexact(xs):
        raise door.error(
            "attribute",
            f"xs must be one floating array, got {door.shapes(xs)} "
            f"{jax.tree.leaves(xs)[0].dtype}; for tokens, give the layers after the "
            "embedding, and the embedded vectors",
        )
    if not isinstance(points, int) or points < 1:
        raise door.error("attribute", f"points must be a positive int, got {points!r}")
    _check_target("attribute", layer, params, xs, target, carry, masking)
    valid = door.valid_steps(xs, **masking)
    xs = zero_rows(valid, xs)
    other = jnp.zeros((), xs.dtype) if baseline is None else jnp.asarray(baseline)
    other = zero_rows(valid, jnp.broadcast_to(other.astype(xs.dtype), xs.shape))
    options = layer, target, method, points
    features, values, of_baseline = _attribute(
        *options, params, xs, other, carry, masking
    )
    features = np.asarray(features)
    wide = features.reshape(*features.shape[:2], -1).astype(np.float64)
    steps = np.linalg.norm(wide, axis=-1) if method == "gradient" else wide.sum(-1)
    integrated = method == "integrated"
    return Attribution(
        steps,
        features,
        np.asarray(values),
        np.asarray(of_baseline) if integrated else None,
    )


def occlude(
    layer: Layer | Cell,
    params: PyTree,
    xs: PyTree,
    target: Callable[[PyTree], Array],
    carry: PyTree = None,
    *,
    baseline: PyTree = None,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
) -> Attribution:
    r"""Computes how much a number of each row changes when one step is left out.

    .. math::
        a_t = y(x) - y(x \text{ without } x_t)

    The layer runs once for each step, so this takes T times as long as one run. It
    works for any inputs, tokens too.

    Args:
      layer: a cell, a layer or a model.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      target: a function of the outputs (or of a model's answer) that returns one number
        for each row, ``[B]``.
      carry: the incoming carry; None means the fresh one.
      baseline: what replaces the step: a value that broadcasts to the shape of ``xs``,
        such as the id of an unknown symbol. None masks the step, so that the carry
        stays as it is and the output of the step is zero.
      lengths: valid steps of each row, ``[B]`` integers; None if all are valid.
      mask: true at valid steps, ``[B, T]``, for padding that is not at the end; give
        ``lengths`` or ``mask``, not both.
      resets: true where a row begins anew, ``[B, T]``; None for nowhere.

    Returns:
      The contributions, as an :class:`Attribution` without ``features``.

    Raises:
      TypeError: ``layer`` is neither a cell nor a layer.
      ValueError: the target does not return ``[B]``, or the layer refuses the inputs.

    Example:
      >>> model = jlstm.Classifier(jlstm.RNN(jlstm.GRU(4)), num_classes=2)
      >>> xs = jnp.ones((2, 5, 3))
      >>> params = model.init(jax.random.key(0), xs)
      >>> found = jlstm.diagnostics.occlude(model, params, xs, lambda y: y[:, 1])
      >>> found.steps.shape
      (2, 5)
    """
    masking = {"lengths": lengths, "mask": mask, "resets": resets}
    masking = check_inputs("occlude", layer, xs, masking)
    _check_target("occlude", layer, params, xs, target, carry, masking)
    valid = door.valid_steps(xs, **masking)
    batch, time = jax.tree.leaves(xs)[0].shape[:2]
    valid = jnp.ones((batch, time), bool) if valid is None else valid
    other = None
    if baseline is not None:
        other = jax.tree.map(
            lambda b, x: jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape),
            baseline,
            xs,
        )
    values, without = _occlude(
        layer, target, params, xs, other, carry, valid, masking["resets"]
    )
    steps = np.asarray(values)[:, None] - np.asarray(without).T
    return Attribution(np.where(valid, steps, 0), None, np.asarray(values))


def _check_target(
    where: str,
    layer: Any,
    params: PyTree,
    xs: PyTree,
    target: Callable[[PyTree], Array],
    carry: PyTree,
    masking: dict,
) -> None:
    call = partial(run, layer, False)
    ys = jax.eval_shape(call, params, xs, carry, **masking)[0]
    made = jax.eval_shape(target, ys)
    batch = jax.tree.leaves(xs)[0].shape[0]
    shape = getattr(made, "shape", None)
    if shape != (batch,):
        raise door.error(
            where,
            f"target must return a number for each row, [{batch}], got {shape}; such "
            "as lambda ys: ys[:, -1, 0]",
        )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attribute(
    layer: Any,
    target: Callable[[PyTree], Array],
    method: Method,
    points: int,
    params: PyTree,
    xs: Array,
    other: Array,
    carry: PyTree,
    masking: dict,
) -> tuple[Array, Array, Array]:
    def value(xs: Array) -> Array:
        return target(run(layer, False, params, xs, carry, **masking)[0])

    def gradient(xs: Array) -> Array:
        return jax.grad(lambda xs: value(xs).sum())(xs)

    values, of_other = value(xs), value(other)
    if method != "integrated":
        found = gradient(xs)
        return found if method == "gradient" else found * xs, values, of_other
    away = xs - other

    def add(total: Array, part: Array) -> tuple[Array, None]:
        return total + gradient(other + part * away), None

    parts = (jnp.arange(points, dtype=xs.dtype) + 0.5) / points
    total, _ = jax.lax.scan(add, jnp.zeros_like(xs), parts)
    return away * total / points, values, of_other


@partial(jax.jit, static_argnums=(0, 1))
def _occlude(
    layer: Any,
    target: Callable[[PyTree], Array],
    params: PyTree,
    xs: PyTree,
    other: PyTree,
    carry: PyTree,
    valid: Array,
    resets: Array | None,
) -> tuple[Array, Array]:
    def value(xs: PyTree, mask: Array) -> Array:
        masking = {"mask": mask, "resets": resets}
        return target(run(layer, False, params, xs, carry, **masking)[0])

    def without(step: Array) -> Array:
        here = jnp.arange(valid.shape[1]) == step
        if other is None:
            return value(xs, valid & ~here[None])
        flags = jnp.broadcast_to(here[None], valid.shape)
        return value(where_rows(flags, other, xs), valid)

    return value(xs, valid), jax.lax.map(without, jnp.arange(valid.shape[1]))
