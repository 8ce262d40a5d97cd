"""The cross-entropy of a projection, without its logits in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jlstm.train.losses import (
    Mean,
    check_labels,
    check_smoothing,
    cross_entropies,
)
from jlstm.train.state import type_name
from jlstm.types import Array, PyTree, common_dtype

# What the logits of one block may take. More leaves the caches, and memory that large
# goes back to the system after each step, to be asked for and cleared again.
BLOCK_BYTES = 8 << 20


def projected_cross_entropy(
    features: ArrayLike,
    w: ArrayLike,
    b: ArrayLike,
    labels: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> Mean:
    r"""Computes the cross-entropy of a projection whose logits are never held whole.

    It is ``softmax_cross_entropy(features @ w + b, labels)``. The logits of a few steps
    at a time are made and turned into gradients at once, which of many classes takes
    less time, and a fraction of the memory.

    Args:
      features: ``[B, T, D]``, taken some steps at a time, or ``[..., D]``, taken whole.
      w: ``[D, V]``.
      b: ``[V]``.
      labels: ``[B, T]`` or ``[...]``, integers, as in :func:`softmax_cross_entropy`.
      mask: boolean, true where valid; its shape begins the shape of ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``; later steps are invalid.
      label_smoothing: the weight of the uniform distribution, in ``[0, 1)``.

    Returns:
      The mean over valid labels.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a concrete label out of range.

    Example:
      >>> ys, w, b = jnp.ones((2, 3, 5)), jnp.zeros((5, 4)), jnp.zeros(4)
      >>> labels = jnp.ones((2, 3), int)
      >>> print(jlstm.train.projected_cross_entropy(ys, w, b, labels).value)
      1.3862944
    """
    where = "projected_cross_entropy"
    features, w, b = jnp.asarray(features), jnp.asarray(w), jnp.asarray(b)
    if w.ndim != 2 or b.shape != w.shape[1:] or features.shape[-1:] != w.shape[:1]:
        raise ValueError(
            f"{where}: expected features [..., D], w [D, V] and b [V], got "
            f"{type_name(features)}, {type_name(w)} and {type_name(b)}"
        )
    check_smoothing(where, label_smoothing)
    dtype = common_dtype(features.dtype, w.dtype, b.dtype)
    logits = jax.ShapeDtypeStruct((*features.shape[:-1], *b.shape), dtype)
    labels, valid = check_labels(where, logits, labels, mask, lengths)
    if valid is None:
        valid = jnp.ones(labels.shape, bool)
    valid = valid.reshape(valid.shape + (1,) * (labels.ndim - valid.ndim))
    valid = jnp.broadcast_to(valid, labels.shape)
    features = jnp.where(valid[..., None], features.astype(dtype), 0)
    steps = _steps_at_once(labels.shape, b.size)
    blocks = tuple(_in_blocks(x, steps) for x in (features, labels, valid))
    total = _total(label_smoothing, w.astype(dtype), b.astype(dtype), *blocks)
    return Mean(total, jnp.sum(valid, dtype=jnp.int32))


def _steps_at_once(shape: tuple[int, ...], num_classes: int) -> int:
    """How many steps of labels ``[B, T]`` make a block; 0 takes labels whole."""
    if len(shape) != 2 or 0 in shape:
        return 0
    most = max(1, BLOCK_BYTES // (4 * shape[0] * num_classes))
    num_blocks = math.ceil(shape[1] / most)
    return math.ceil(shape[1] / num_blocks)


def _in_blocks(x: Array, steps: int) -> Array:
    """Cuts ``[B, T, ...]``, padded with zeros, into ``[K, B * steps, ...]``."""
    if not steps:
        return x[None]
    rows, time, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -time % steps)] + [(0, 0)] * len(rest))
    x = x.reshape(rows, -1, steps, *rest).swapaxes(0, 1)
    # As rows: of two axes to sum over, XLA would transpose the gradient of the logits.
    return x.reshape(x.shape[0], -1, *rest)


def _block_total(
    smoothing: float, w: Array, b: Array, features: Array, labels: Array, valid: Array
) -> Array:
    logits = features @ w
    logits = logits + b.reshape((1,) * (logits.ndim - 1) + b.shape)
    losses = cross_entropies(_wide(logits), labels, smoothing)
    return jnp.sum(jnp.where(valid, losses, 0))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(smoothing: float, w: Array, b: Array, *blocks: Array) -> Array:
    """Sums the cross-entropy over blocks ``[K, ...]`` of features, labels and mask."""

    def run(block: tuple[Array, ...]) -> tuple[Array, None]:
        return _block_total(smoothing, w, b, *block), None

    return _over_blocks(run, blocks)[0]


@_total.defjvp
def _total_jvp(smoothing: float, primals: Any, tangents: Any) -> tuple[Array, Any]:
    # The gradients are made beside the loss, while the logits of a block are at hand.
    w, b, *blocks = primals
    slopes_at = jax.value_and_grad(partial(_block_total, smoothing), argnums=(0, 1, 2))

    def run(block: tuple[Array, ...]) -> tuple[PyTree, Array]:
        total, (dw, db, dfeatures) = slopes_at(w, b, *block)
        return (total, dw, db), dfeatures

    (total, *slopes), dfeatures = _over_blocks(run, tuple(blocks))
    pairs = zip((*slopes, dfeatures), tangents[:3], strict=True)
    return total, sum(jnp.sum(_wide(t) * _wide(slope)) for slope, t in pairs)


def _over_blocks(
    run: Callable[[tuple[Array, ...]], tuple[PyTree, PyTree]], blocks: tuple[Array, ...]
) -> tuple[PyTree, PyTree]:
    """Sums the first result over blocks, in float32 at least, and stacks the second."""

    def sums_of(block: tuple[Array, ...]) -> PyTree:
        return jax.tree.map(_wide, run(block)[0])

    def add(sums: PyTree, block: tuple[Array, ...]) -> tuple[PyTree, PyTree]:
        more, kept = run(block)
        return jax.tree.map(lambda a, b: a + _wide(b), sums, more), kept

    shapes = jax.eval_shape(sums_of, tuple(x[0] for x in blocks))
    zeros = jax.tree.map(lambda shape: lax.full_like(shape, 0), shapes)
    return lax.scan(add, zeros, blocks)


def _wide(x: Array) -> Array:
    return x.astype(common_dtype(x.dtype, jnp.float32))
