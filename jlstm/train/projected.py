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

from jlstm.kernels import cross_entropy
from jlstm.train.losses import (
    Mean,
    check_labels,
    check_smoothing,
    cross_entropies,
    refuse,
)
from jlstm.train.state import type_name
from jlstm.types import Array, PyTree, common_dtype

# The memory that the logits of one block may take. More does not fit in the caches; and
# memory that large goes back to the system after each step, and must then be requested
# and cleared again.
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
    r"""Computes the cross-entropy of a linear layer without holding all its logits.

    The result is that of ``softmax_cross_entropy(features @ w + b, labels)``. The
    logits of a few steps at a time are computed and turned into gradients at once. With
    many classes this takes less time and a fraction of the memory. On a CPU, in
    float32, it runs in C++ if jlstm was installed with its C++ library.

    Args:
      features: ``[B, T, D]``, processed some steps at a time, or ``[..., D]``,
        processed as a whole: the outputs before the last layer.
      w: ``[D, V]``, the weights of the last layer. A
        :class:`jlstm.LanguageModel` returns them with ``b``, as
        ``model.head(params)``.
      b: ``[V]``, its biases.
      labels: ``[B, T]`` or ``[...]``, integers, as in :func:`softmax_cross_entropy`.
      mask: boolean, true at valid positions: ``[B]``, ``[B, T]`` or of the shape of
        ``labels``.
      lengths: ``[B]``, for labels ``[B, T, ...]``: the valid steps of each row.
      label_smoothing: the weight of the uniform distribution, from 0 to below 1, as in
        :func:`softmax_cross_entropy`.

    Returns:
      The mean over valid labels.

    Raises:
      ValueError: shapes or dtypes do not fit, or a label or length is out of range.

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
    labels, valid, wrong = check_labels(where, logits, labels, mask, lengths)
    if valid is None:
        valid = jnp.ones(labels.shape, bool)
    valid = valid.reshape(valid.shape + (1,) * (labels.ndim - valid.ndim))
    valid = jnp.broadcast_to(valid, labels.shape)
    w, b = w.astype(dtype), b.astype(dtype)
    features = jnp.where(valid[..., None], features.astype(dtype), 0)
    total = _total(label_smoothing, w, b, features, labels, valid)
    return refuse(wrong, Mean(total, jnp.sum(valid, dtype=jnp.int32)))


def _block_total(
    smoothing: float, w: Array, b: Array, features: Array, labels: Array, valid: Array
) -> Array:
    logits = features @ w
    logits = logits + b.reshape((1,) * (logits.ndim - 1) + b.shape)
    losses = cross_entropies(_wide(logits), labels, smoothing)
    return jnp.sum(jnp.where(valid, losses, 0))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(smoothing: float, w: Array, b: Array, features: Array, *of: Array) -> Array:
    """Sums the cross-entropy over features ``[..., D]``, with their labels and mask."""
    if cross_entropy.why_not(features, w) is None:
        return cross_entropy.loss(smoothing, w, b, features, *of)

    def run(block: tuple[Array, ...]) -> tuple[Array, None]:
        return _block_total(smoothing, w, b, *block), None

    return _over_blocks(run, _in_blocks(b.size, features, *of))[0]


@_total.defjvp
def _total_jvp(smoothing: float, primals: Any, tangents: Any) -> tuple[Array, Any]:
    w, _, features, *_ = primals
    library = cross_entropy.why_not(features, w) is None
    slopes_of = _slopes_by_library if library else _slopes
    total, *slopes = slopes_of(smoothing, *primals)
    pairs = zip(slopes, tangents[:3], strict=True)
    return total, sum(jnp.sum(_wide(t) * _wide(slope)) for slope, t in pairs)


def _slopes(
    smoothing: float, w: Array, b: Array, features: Array, *of: Array
) -> tuple[Array, ...]:
    """Returns the sum and its gradients with respect to ``w``, ``b`` and the features.

    The gradients are computed together with the sum, while the logits of a block are
    there.
    """
    slopes_at = jax.value_and_grad(partial(_block_total, smoothing), argnums=(0, 1, 2))

    def run(block: tuple[Array, ...]) -> tuple[PyTree, Array]:
        total, (dw, db, dfeatures) = slopes_at(w, b, *block)
        return (total, dw, db), dfeatures

    blocks, pull = jax.vjp(lambda x: _in_blocks(b.size, x, *of)[0], features)
    sums, dfeatures = _over_blocks(run, (blocks, *_in_blocks(b.size, *of)))
    return *sums, *pull(dfeatures)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _slopes_by_library(smoothing: float, *args: Array) -> tuple[Array, ...]:
    return cross_entropy.loss_and_gradients(smoothing, *args)


@_slopes_by_library.defjvp
def _slopes_by_library_jvp(smoothing: float, primals: Any, tangents: Any) -> Any:
    def slopes(*parts: Array) -> tuple[Array, ...]:
        return _slopes(smoothing, *parts, *primals[3:])

    curved = jax.jvp(slopes, primals[:3], tangents[:3])[1]
    return _slopes_by_library(smoothing, *primals), curved


def _in_blocks(num_classes: int, *arrays: Array) -> tuple[Array, ...]:
    """Cuts arrays ``[B, T, ...]`` into ``[K, B * steps, ...]``, padded with zeros.

    Arrays of other shapes become one block each. The last array has the shape of the
    labels.
    """
    shape = arrays[-1].shape
    if len(shape) != 2 or 0 in shape:
        return tuple(x[None] for x in arrays)
    rows, time = shape
    most = max(1, BLOCK_BYTES // (4 * rows * num_classes))
    steps = math.ceil(time / math.ceil(time / most))

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -time % steps)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(rows, -1, steps, *x.shape[2:]).swapaxes(0, 1)
        # One axis of rows: with two axes to sum over, XLA would transpose the gradient.
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return tuple(cut(x) for x in arrays)


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
