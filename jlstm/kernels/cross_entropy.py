"""The cross-entropy of a linear layer and its gradients, in C++.

The logits of a few hundred rows stay in memory, beside the gradients of the weights of
their classes. The threads share the classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.kernels import library, product
from jlstm.kernels.request import Request, may_be_sharded
from jlstm.types import Array

# With fewer multiplications, XLA is done before a second core has begun.
FEW = 1 << 20


def why_not(features: Array, w: Array) -> str | None:
    """Says why XLA computes the cross-entropy, or ``None`` if C++ does."""
    dtypes = frozenset({str(features.dtype), str(w.dtype)})
    request = Request(jax.default_backend(), dtypes, sharded=may_be_sharded())
    if dtypes != {"float32"} or features.size * w.shape[1] < FEW:
        return "these are for float32 and many classes"
    return product.why_not(request)


def loss(
    smoothing: float, w: Array, b: Array, features: Array, labels: Array, valid: Array
) -> Array:
    """Sums the cross-entropy; see :func:`loss_and_gradients`."""
    return _call(smoothing, w, b, features, labels, valid, gradients=False)[0]


def loss_and_gradients(
    smoothing: float, w: Array, b: Array, features: Array, labels: Array, valid: Array
) -> tuple[Array, Array, Array, Array]:
    """Sums the cross-entropy over rows, and computes its gradients.

    Args:
      smoothing: the weight of the uniform distribution.
      w: ``[D, V]``.
      b: ``[V]``.
      features: ``[..., D]``, zeros where invalid.
      labels: ``[...]``, in range.
      valid: ``[...]``, boolean.

    Returns:
      The sum over valid rows, and its gradients with respect to ``w``, ``b`` and
      ``features``.
    """
    loss, dfeatures, dw, db = _call(
        smoothing, w, b, features, labels, valid, gradients=True
    )
    return loss, dw, db, dfeatures


def _call(
    smoothing: float,
    w: Array,
    b: Array,
    features: Array,
    labels: Array,
    valid: Array,
    *,
    gradients: bool,
) -> list[Array]:
    shapes = [x.shape if gradients else (0,) for x in (features, w, b)]
    return library.call(
        "jlstm_cross_entropy",
        [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((), *shapes)],
        features,
        w,
        b,
        labels.astype(jnp.int32),
        valid,
        smoothing=np.float32(smoothing),
        gradients=gradients,
    )
