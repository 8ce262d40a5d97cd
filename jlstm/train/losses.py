"""Losses and metrics over ragged batches, as exact means.

Every function returns a :class:`Mean`, a total and a count, so that an average over
batches with different numbers of valid steps is the average over all their steps.
Masked positions are cleaned before any arithmetic: whatever they hold, NaN included,
changes neither value nor gradient. Arithmetic is in float32 at least.

Nothing is flattened, and gathered along the last axis only, so that sharded inputs work
under every kind of mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jlstm.train.state import type_name
from jlstm.types import Array


@flax.struct.dataclass
class Mean:
    """A mean that knows its weight: ``total / count``.

    Attributes:
      total: the sum, a scalar.
      count: how many terms it has, a scalar.

    Example:
      >>> float(jlstm.train.Mean(jnp.float32(6), jnp.int32(3)).value)
      2.0
    """

    total: Array | float
    count: Array | int

    @property
    def value(self) -> Array:
        """The mean; where the count is 0, zero with zero gradients."""
        count = jnp.asarray(self.count, jnp.result_type(self.total))
        empty = count == 0
        mean = jnp.asarray(self.total) / jnp.where(empty, jnp.ones_like(count), count)
        return jnp.where(empty, jnp.zeros_like(mean), mean)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> Mean:
    r"""Computes the cross-entropy of integer labels, in nats.

    .. math::
        -\log p_y, \quad p = \mathrm{softmax}(z), \qquad
        \text{or} \quad -(1 - \epsilon) \log p_y - \epsilon \frac1V \sum_v \log p_v

    with label smoothing :math:`\epsilon`.

    Args:
      logits: ``[..., V]``, floating.
      labels: ``[...]``, integers in ``0 .. V-1``. Others, where valid, are an error if
        concrete and are clipped inside a trace; mark absent labels with the mask.
      mask: boolean, true where valid; its shape begins the shape of ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``; later steps are invalid.
      label_smoothing: the weight of the uniform distribution, in ``[0, 1)``.

    Returns:
      The mean over valid labels.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a concrete label out of range.

    Example:
      >>> logits, labels = jnp.zeros((2, 3, 4)), jnp.ones((2, 3), int)
      >>> loss = jlstm.train.softmax_cross_entropy(
      ...     logits, labels, lengths=jnp.array([3, 1])
      ... )
      >>> print(loss.count, loss.value)
      4 1.3862944
    """
    where = "softmax_cross_entropy"
    check_smoothing(where, label_smoothing)
    logits = jnp.asarray(logits)
    labels, valid = check_labels(where, logits, labels, mask, lengths)
    return _mean(cross_entropies(_clean(logits, valid), labels, label_smoothing), valid)


def accuracy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    """Computes how often the largest logit is the label's.

    Args:
      logits: ``[..., V]``.
      labels: ``[...]``, integers, as in :func:`softmax_cross_entropy`.
      mask: boolean, true where valid; its shape begins the shape of ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``.

    Returns:
      The mean over valid labels, between 0 and 1.

    Raises:
      ValueError: as in :func:`softmax_cross_entropy`.

    Example:
      >>> print(jlstm.train.accuracy(jnp.eye(3), jnp.array([0, 1, 1])).value)
      0.6666667
    """
    logits = jnp.asarray(logits)
    labels, valid = check_labels("accuracy", logits, labels, mask, lengths)
    guesses = jnp.argmax(_clean(logits, valid), axis=-1)
    return _mean((guesses == labels).astype(jnp.float32), valid)


def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    r"""Computes the cross-entropy of independent yes-or-no labels, in nats.

    .. math:: -y \log \sigma(z) - (1 - y) \log \sigma(-z)

    Args:
      logits: ``[...]``, floating.
      labels: of the same shape: booleans, or numbers between 0 and 1.
      mask: boolean, true where valid; its shape begins the shape of ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``.

    Returns:
      The mean over valid labels.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> loss = jlstm.train.sigmoid_cross_entropy(jnp.zeros(3), jnp.array([0, 1, 1]))
      >>> print(loss.value)
      0.6931472
    """
    where = "sigmoid_cross_entropy"
    logits, labels, valid = _check_pair(where, logits, labels, mask, lengths)
    yes, no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return _mean(-labels * yes - (1.0 - labels) * no, valid)


def squared_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    """Computes the squared error, ``(prediction - target)**2``.

    Args:
      predictions: ``[...]``.
      targets: of the same shape.
      mask: boolean, true where valid; its shape begins the shape of ``targets``.
      lengths: ``[B]``, for targets ``[B, T, ...]``.

    Returns:
      The mean over valid elements.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> print(jlstm.train.squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3))).value)
      1.0
    """
    where = "squared_error"
    predictions, targets, valid = _check_pair(
        where, predictions, targets, mask, lengths
    )
    return _mean(jnp.square(predictions - targets), valid)


def absolute_error(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    """Computes the absolute error, ``|prediction - target|``.

    Args:
      predictions: ``[...]``.
      targets: of the same shape.
      mask: boolean, true where valid; its shape begins the shape of ``targets``.
      lengths: ``[B]``, for targets ``[B, T, ...]``.

    Returns:
      The mean over valid elements.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> print(jlstm.train.absolute_error(jnp.zeros(2), jnp.array([1.0, -3.0])).value)
      2.0
    """
    where = "absolute_error"
    predictions, targets, valid = _check_pair(
        where, predictions, targets, mask, lengths
    )
    return _mean(jnp.abs(predictions - targets), valid)


def quantile_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    quantiles: Sequence[float],
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    r"""Computes the quantile (pinball) loss of several quantiles at once.

    .. math:: \max\big(\tau u, (\tau - 1) u\big), \qquad u = y - \hat y_\tau

    which is least, on average, where :math:`\hat y_\tau` is the :math:`\tau`-quantile
    of :math:`y`; at 0.5 it is half the absolute error. Nothing keeps predictions in the
    order of their quantiles. Where quantiles ascend, predictions sorted along the last
    axis have no higher a loss.

    Args:
      predictions: ``[..., Q]``, one a quantile.
      targets: ``[...]``.
      quantiles: the ``Q`` values of :math:`\tau`, in ``(0, 1)``, such as
        ``(0.1, 0.5, 0.9)``.
      mask: boolean, true where valid; its shape begins the shape of ``targets``.
      lengths: ``[B]``, for targets ``[B, T, ...]``.

    Returns:
      The mean over valid targets and all quantiles.

    Raises:
      ValueError: shapes that do not fit, or a quantile out of range.

    Example:
      >>> predictions = jnp.array([[1.0, 2.0, 6.0]])
      >>> loss = jlstm.train.quantile_loss(
      ...     predictions, jnp.array([3.0]), (0.1, 0.5, 0.9)
      ... )
      >>> print(loss.count, loss.value)  # (0.1 * 2 + 0.5 * 1 + 0.1 * 3) / 3
      3 0.33333334

    References:
      Koenker & Bassett, Regression quantiles, 1978.
    """
    where = "quantile_loss"
    levels = np.asarray(quantiles, np.float64)
    if levels.ndim != 1 or not levels.size or not ((levels > 0) & (levels < 1)).all():
        raise ValueError(
            f"{where}: quantiles must be numbers in (0, 1), at least one, got "
            f"{quantiles}; such as (0.1, 0.5, 0.9)"
        )
    shape = (*jnp.shape(targets), len(levels))
    if jnp.shape(predictions) != shape:
        raise ValueError(
            f"{where}: predictions must be {list(shape)}, one for each of the "
            f"{len(levels)} quantiles of targets [...], got {type_name(predictions)} "
            f"for targets {type_name(targets)}"
        )
    valid = _valid(where, jnp.shape(targets), mask, lengths)
    predictions, targets = _clean(predictions, valid), _clean(targets, valid)
    dtype = max(predictions.dtype, targets.dtype, key=lambda dtype: dtype.itemsize)
    error = targets.astype(dtype)[..., None] - predictions.astype(dtype)
    tau = jnp.asarray(levels, dtype).reshape((1,) * (len(shape) - 1) + levels.shape)
    return _mean(jnp.maximum(tau * error, (tau - 1) * error), valid)


def bits(nats: Mean) -> Mean:
    """Converts a mean in nats to bits, as in bits per character.

    Example:
      >>> print(jlstm.train.bits(jlstm.train.Mean(jnp.log(8.0), jnp.int32(1))).value)
      3.0
    """
    return Mean(nats.total / math.log(2.0), nats.count)


def average(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Averages the metrics of many batches.

    A :class:`Mean` is averaged exactly, total over count; a plain scalar counts the
    same in each batch. Everything is fetched from the device once, and summed in
    float64. A mean over nothing is NaN, so that it can never look like a good score.

    Args:
      metrics: a dict a batch. A name missing from a batch does not count in it.

    Returns:
      One float a name.

    Example:
      >>> Mean = jlstm.train.Mean
      >>> first, second = Mean(np.float32(3), 1), Mean(np.float32(1), 3)
      >>> jlstm.train.average([{"loss": first}, {"loss": second}])
      {'loss': 1.0}
    """
    return divide(sum_metrics(metrics))


def sum_metrics(
    metrics: Iterable[Mapping[str, Any]],
    sums: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, tuple[float, float]]:
    """Sums totals and counts by name, in float64, after one fetch from the device.

    One by one onto ``sums``: in however many calls, the result has the same bits.
    """
    sums = dict(sums or {})
    for batch in jax.device_get(list(metrics)):
        for name, metric in batch.items():
            mean = metric if isinstance(metric, Mean) else Mean(metric, 1)
            old_total, old_count = sums.get(name, (0.0, 0.0))
            sums[name] = (
                old_total + float(mean.total),
                old_count + float(mean.count),
            )
    return sums


def divide(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Divides totals by counts; a mean over nothing is NaN."""
    return {
        name: total / count if count else math.nan
        for name, (total, count) in sums.items()
    }


def cross_entropies(z: Array, labels: Array, label_smoothing: float) -> Array:
    """Returns the loss of each label, for logits ``z [..., V]`` as wide as it is."""
    z = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    log_sum, score = _log_sum_and_score(z, labels)
    if label_smoothing:
        uniform = jnp.mean(z, axis=-1)
        score = (1.0 - label_smoothing) * score + label_smoothing * uniform
    return log_sum - score


def _mean(losses: Array, valid: Array | None) -> Mean:
    if valid is None:
        return Mean(jnp.sum(losses), jnp.int32(losses.size))
    valid = jnp.broadcast_to(_expand(valid, losses.ndim), losses.shape)
    total = jnp.sum(jnp.where(valid, losses, 0))
    return Mean(total, jnp.sum(valid, dtype=jnp.int32))


def _clean(x: ArrayLike, valid: Array | None) -> Array:
    """Casts to float32 at least, and puts zeros where ``valid`` is false."""
    # jnp.promote_types would refuse bfloat16 under strict promotion.
    x = jnp.asarray(x)
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    return x if valid is None else jnp.where(_expand(valid, x.ndim), x, 0)


def _expand(mask: Array, ndim: int) -> Array:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


@jax.custom_jvp
def _log_sum_and_score(z: Array, labels: Array) -> tuple[Array, Array]:
    """Returns ``log(sum(exp(z)))`` and ``z`` at the labels, ``z`` at most 0."""
    log_sum = jnp.log(jnp.sum(jnp.exp(z), axis=-1))
    if jax.typeof(z).sharding.spec[-1] is not None:  # no gather along such an axis
        return log_sum, jnp.sum(jnp.where(_is_label(labels, z), z, 0), axis=-1)
    return log_sum, jnp.take_along_axis(z, labels[..., None], axis=-1)[..., 0]


@_log_sum_and_score.defjvp
def _log_sum_and_score_jvp(primals: Any, tangents: Any) -> Any:
    # Autodiff would keep exp(z) beside z. Here only z lives on, and the gradient by
    # the logits takes its memory in one pass: it may, because the maximum, which is
    # log_sum as the scores are at most 0, makes it wait until z has been gathered from.
    (z, labels), (dz, _) = primals, tangents
    log_sum, score = _log_sum_and_score(z, labels)
    p = jnp.exp(z - jnp.maximum(log_sum, score)[..., None])
    # By a product, whose transpose, unlike that of a choice, makes no array of zeros.
    chosen = _is_label(labels, z).astype(dz.dtype)
    return (log_sum, score), (jnp.sum(p * dz, axis=-1), jnp.sum(chosen * dz, axis=-1))


def _is_label(labels: Array, z: Array) -> Array:
    shape = (*(1,) * labels.ndim, z.shape[-1])
    return labels[..., None] == jax.lax.broadcasted_iota(
        labels.dtype, shape, labels.ndim
    )


def check_smoothing(where: str, label_smoothing: float) -> None:
    """Refuses a weight outside ``[0, 1)``."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"{where}: label_smoothing must be in [0, 1), got {label_smoothing}"
        )


def check_labels(
    where: str,
    logits: Array | jax.ShapeDtypeStruct,
    labels: ArrayLike,
    mask: ArrayLike | None,
    lengths: ArrayLike | None,
) -> tuple[Array, Array | None]:
    """Checks logits and labels; returns labels in range, and what is valid."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{where}: labels must be integers, got {type_name(labels)}; "
            "take argmax of one-hot labels first"
        )
    if logits.shape[:-1] != labels.shape or logits.ndim == 0:
        raise ValueError(
            f"{where}: logits [..., V] must have one dimension more than labels [...], "
            f"got {type_name(logits)} and {type_name(labels)}"
        )
    if labels.dtype.itemsize < 4:  # 300 classes do not fit in a byte
        labels = labels.astype(jnp.int32)
    valid = _valid(where, labels.shape, mask, lengths)
    if valid is not None:
        labels = jnp.where(_expand(valid, labels.ndim), labels, 0)
    size = logits.shape[-1]
    if _is_concrete(labels) and labels.size:
        low, high = _range(labels)
        if low < 0 or high >= size:
            raise ValueError(
                f"{where}: labels must be in 0..{size - 1} where valid, got "
                f"{low if low < 0 else high}; mark absent labels with mask="
            )
    return jnp.clip(labels, 0, size - 1), valid


def _check_pair(
    where: str,
    x: ArrayLike,
    y: ArrayLike,
    mask: ArrayLike | None,
    lengths: ArrayLike | None,
) -> tuple[Array, Array, Array | None]:
    """Checks two arrays of one shape; returns both clean, and what is valid."""
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f"{where}: the two arguments must have the same shape, got {type_name(x)} "
            f"and {type_name(y)}"
        )
    valid = _valid(where, jnp.shape(x), mask, lengths)
    x, y = _clean(x, valid), _clean(y, valid)
    dtype = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return x.astype(dtype), y.astype(dtype), valid


def _valid(
    where: str,
    shape: tuple[int, ...],
    mask: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Array | None:
    """Joins mask and lengths to one boolean array that begins ``shape``, or None."""
    valid = None
    if mask is not None:
        valid = jnp.asarray(mask)
        if valid.dtype != bool or valid.shape != shape[: valid.ndim]:
            raise ValueError(
                f"{where}: mask must be boolean, with a shape that begins {shape}, got "
                f"{type_name(valid)}"
            )
    if lengths is not None:
        steps = _mask_from_lengths(where, shape, jnp.asarray(lengths))
        if valid is None:
            return steps
        ndim = max(valid.ndim, steps.ndim)
        valid = _expand(valid, ndim) & _expand(steps, ndim)
    return valid


def _mask_from_lengths(where: str, shape: tuple[int, ...], lengths: Array) -> Array:
    integers = jnp.issubdtype(lengths.dtype, jnp.integer)
    if len(shape) < 2 or lengths.shape != shape[:1] or not integers:
        raise ValueError(
            f"{where}: lengths must be integers [B] for labels or targets [B, T, ...], "
            f"got {type_name(lengths)} for shape {shape}"
        )
    if _is_concrete(lengths) and lengths.size:
        low, high = _range(lengths)
        if low < 0 or high > shape[1]:
            raise ValueError(
                f"{where}: lengths must be in 0..{shape[1]}, got "
                f"{low if low < 0 else high}"
            )
    steps = jax.lax.broadcasted_iota(lengths.dtype, (1, shape[1]), 1)
    return steps < lengths[:, None]


def _range(x: Array) -> tuple[int, int]:
    # By NumPy: inside a trace JAX would trace the minimum of a constant too.
    values = np.asarray(x)
    return int(values.min()), int(values.max())


def _is_concrete(x: Array) -> bool:
    return not isinstance(x, Tracer) and x.is_fully_addressable
