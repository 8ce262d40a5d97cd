"""Losses and metrics over ragged batches, as exact means.

Every function returns a :class:`Mean`, which keeps a total and a count. An average over
batches with different numbers of valid steps is therefore the average over all valid
steps. Masked positions are replaced by zeros before any arithmetic, so their content,
NaN included, changes neither the value nor the gradient. Arithmetic is in float32 at
least.

No function flattens its arguments, and gathers run along the last axis only, so that
sharded inputs work under every kind of mesh.
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
    """A mean that keeps its weight: ``total / count``.

    Two means can be averaged exactly, by adding their totals and their counts.

    Attributes:
      total: the sum of the terms, a scalar.
      count: the number of terms, or the sum of their weights, a scalar.

    Example:
      >>> float(jlstm.train.Mean(jnp.float32(6), jnp.int32(3)).value)
      2.0
    """

    total: Array | float
    count: Array | int

    @property
    def value(self) -> Array:
        """The mean; if the count is 0, zero with zero gradients."""
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

    For logits :math:`z` of one position and its label :math:`y`,

    .. math::
        -\log p_y, \quad p = \mathrm{softmax}(z), \qquad
        \text{or} \quad -(1 - \epsilon) \log p_y - \epsilon \frac1V \sum_v \log p_v

    with label smoothing :math:`\epsilon`.

    Args:
      logits: ``[..., V]``, floating: one score for each class.
      labels: ``[...]``, integers in ``0 .. V-1``. At valid positions, labels outside
        this range are an error; inside a trace, where values are not known, they make
        the loss NaN. Exclude absent labels with ``mask``.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``labels``. None if all are valid.
      lengths: ``[B]``, integers, for labels ``[B, T, ...]``: the number of valid steps
        of each row. With ``mask`` too, a position counts if both say that it is valid.
      label_smoothing: :math:`\epsilon`, from 0 to below 1. A value such as 0.1 keeps
        the model from becoming too sure of its answers; 0 is the plain loss.

    Returns:
      The mean over valid labels.

    Raises:
      ValueError: shapes or dtypes do not fit, or a label or length is out of range.

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
    logits = _array(where, logits)
    labels, valid, wrong = check_labels(where, logits, labels, mask, lengths)
    losses = cross_entropies(_clean(logits, valid), labels, label_smoothing)
    return refuse(wrong, _mean(losses, valid))


def accuracy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    """Computes the fraction of positions whose largest logit is that of the label.

    Args:
      logits: ``[..., V]``, one score for each class.
      labels: ``[...]``, integers, as in :func:`softmax_cross_entropy`.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``: the valid steps of each row.

    Returns:
      The mean over valid labels, between 0 and 1.

    Raises:
      ValueError: as in :func:`softmax_cross_entropy`.

    Example:
      >>> print(jlstm.train.accuracy(jnp.eye(3), jnp.array([0, 1, 1])).value)
      0.6666667
    """
    logits = _array("accuracy", logits)
    labels, valid, wrong = check_labels("accuracy", logits, labels, mask, lengths)
    guesses = jnp.argmax(_clean(logits, valid), axis=-1)
    return refuse(wrong, _mean((guesses == labels).astype(jnp.float32), valid))


def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> Mean:
    r"""Computes the cross-entropy of independent yes-or-no labels, in nats.

    For a logit :math:`z` and its label :math:`y`,

    .. math:: -y \log \sigma(z) - (1 - y) \log \sigma(-z)

    Use it when several classes may be true at once; where exactly one is true, use
    :func:`softmax_cross_entropy`.

    Args:
      logits: ``[...]``, floating: above 0 for yes.
      labels: of the same shape: booleans, or probabilities between 0 and 1.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``: the valid steps of each row.

    Returns:
      The mean over valid labels.

    Raises:
      ValueError: shapes do not fit, or a length is out of range.

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
      predictions: ``[...]``, floating.
      targets: of the same shape.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``targets``.
      lengths: ``[B]``, for targets ``[B, T, ...]``: the valid steps of each row.

    Returns:
      The mean over valid elements.

    Raises:
      ValueError: shapes do not fit, or a length is out of range.

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

    Outliers weigh less than in :func:`squared_error`.

    Args:
      predictions: ``[...]``, floating.
      targets: of the same shape.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``targets``.
      lengths: ``[B]``, for targets ``[B, T, ...]``: the valid steps of each row.

    Returns:
      The mean over valid elements.

    Raises:
      ValueError: shapes do not fit, or a length is out of range.

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

    For the quantile :math:`\tau`, its prediction :math:`\hat y_\tau` and the target
    :math:`y`,

    .. math:: \max\big(\tau u, (\tau - 1) u\big), \qquad u = y - \hat y_\tau

    On average this loss is least where :math:`\hat y_\tau` is the :math:`\tau`-quantile
    of :math:`y`. At :math:`\tau = 0.5` it is half the absolute error.

    Nothing keeps the predictions in the order of their quantiles. If the quantiles
    ascend, sort the predictions along the last axis: this never raises the loss.

    Args:
      predictions: ``[..., Q]``, one for each quantile.
      targets: ``[...]``.
      quantiles: the ``Q`` values of :math:`\tau`, each between 0 and 1, such as
        ``(0.1, 0.5, 0.9)`` for a median with an interval of 80 %.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``targets``.
      lengths: ``[B]``, for targets ``[B, T, ...]``: the valid steps of each row.

    Returns:
      The mean over valid targets and all quantiles.

    Raises:
      ValueError: shapes do not fit, or a quantile or length is out of range.

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
            f"{where}: quantiles must be at least one number in (0, 1), got "
            f"{quantiles}; give numbers such as (0.1, 0.5, 0.9)"
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
    """Converts a mean in nats to bits, such as bits per character.

    Args:
      nats: a loss in nats, as :func:`softmax_cross_entropy` returns it.

    Returns:
      The same loss divided by ``log(2)``, with the same count.

    Example:
      >>> print(jlstm.train.bits(jlstm.train.Mean(jnp.log(8.0), jnp.int32(1))).value)
      3.0
    """
    return Mean(nats.total / math.log(2.0), nats.count)


def average(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Averages the metrics of many batches.

    The average of a :class:`Mean` is exact: the sum of all totals over the sum of all
    counts. A plain scalar has the same weight in each batch. Everything is fetched from
    the device at once, and summed in float64. The mean over nothing is NaN, so that it
    cannot be taken for a good score.

    Args:
      metrics: one dict for each batch. A batch without some name does not count in the
        average of that name.

    Returns:
      One float for each name.

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

    They are added to ``sums`` one by one, so the result has the same bits in however
    many calls they come.
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
    """Returns the loss of each label, for logits ``z [..., V]``."""
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
    """Refuses a label smoothing outside ``[0, 1)``."""
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
) -> tuple[Array, Array | None, Array | None]:
    """Checks logits and labels.

    Returns:
      Labels in range, a mask of valid ones, and whether any was out of range: None if
      that is known to be false.
    """
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
                f"{low if low < 0 else high}; exclude absent labels with mask="
            )
        return labels, valid, None
    clipped = jnp.clip(labels, 0, size - 1)
    return clipped, valid, jnp.any(clipped != labels)


def refuse(wrong: Array | None, mean: Mean) -> Mean:
    """Makes a mean NaN if ``wrong``."""
    if wrong is None:
        return mean
    return Mean(jnp.where(wrong, jnp.nan, mean.total), mean.count)


def _array(where: str, x: ArrayLike) -> Array:
    if isinstance(x, tuple):
        raise ValueError(
            f"{where}: expected an array, got a tuple of {len(x)}; apply returns the "
            "outputs and the carry: logits, carry = model.apply(...)"
        )
    return jnp.asarray(x)


def _check_pair(
    where: str,
    x: ArrayLike,
    y: ArrayLike,
    mask: ArrayLike | None,
    lengths: ArrayLike | None,
) -> tuple[Array, Array, Array | None]:
    """Checks two arrays of one shape; returns both cleaned, and a mask or None."""
    x, y = _array(where, x), _array(where, y)
    if x.shape != y.shape:
        raise ValueError(
            f"{where}: the two arguments must have the same shape, got {type_name(x)} "
            f"and {type_name(y)}"
        )
    valid = _valid(where, x.shape, mask, lengths)
    x, y = _clean(x, valid), _clean(y, valid)
    dtype = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return x.astype(dtype), y.astype(dtype), valid


def _valid(
    where: str,
    shape: tuple[int, ...],
    mask: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Array | None:
    """Combines mask and lengths into one boolean array that begins ``shape``."""
    valid = None
    if mask is not None:
        valid = jnp.asarray(mask)
        if valid.dtype != bool or valid.shape != shape[: valid.ndim]:
            raise ValueError(
                f"{where}: mask must be boolean, of shape {shape} or of its first "
                f"axes, got {type_name(valid)}"
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
