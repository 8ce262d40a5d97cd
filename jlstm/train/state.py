"""The training state: everything that one step of training hands to the next."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlstm.types import Array, PyTree


class NonFiniteError(FloatingPointError):
    """Raised when a loss, a gradient or a state holds NaN or infinity."""


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and replaces.

    :func:`create_state` makes it. It is a pytree, so it can be passed to compiled
    functions, saved and loaded.

    Attributes:
      step: the number of steps taken, an int32 scalar.
      params: the params of the model, a pytree of arrays.
      opt_state: the state of the optax transformation, such as Adam's moments.
      key: the typed PRNG key from which all randomness of training derives, or None
        for training without randomness. The step after ``n`` steps uses
        ``fold_in(key, n)``, so a run that is continued draws the same numbers as one
        that was never interrupted.
      carry: the carry that the model hands from one batch to the next in truncated
        backpropagation through time; None where batches are independent.
      ema: an exponential moving average of the params; None if none is kept.
      loss_scale: the factor that keeps float16 gradients from underflowing; None for
        other dtypes.
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    key: Array | None = None
    carry: PyTree = None
    ema: PyTree = None
    loss_scale: LossScale | None = None


@flax.struct.dataclass
class LossScale:
    """The factor by which the loss is multiplied while gradients are float16.

    Small float16 gradients would become zero; a large factor keeps them in range, and
    the gradients are divided by it afterwards. A step whose gradients overflow is
    skipped and halves the factor, down to 1. After 2,000 steps in a row without an
    overflow the factor is doubled, up to ``2.0**24``.

    Attributes:
      scale: the factor, a float32 scalar.
      good_steps: the number of steps without an overflow since the factor last changed,
        an int32 scalar.
    """

    scale: Array
    good_steps: Array


def create_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    key: Array | None = None,
    carry: PyTree = None,
    ema: bool = False,
    loss_scale: float | None = None,
) -> TrainState:
    """Makes the state from which training begins, at step 0.

    Every array is copied. A training step reuses the memory of its state, so the arrays
    that you pass in here stay usable.

    Args:
      params: the initial params, as ``model.init`` returns them.
      tx: the optax transformation that updates them. Give the same one to
        :func:`make_train_step`.
      key: ``jax.random.key(seed)``, for models with dropout or other noise; None to
        train without randomness.
      carry: the first carry of truncated backpropagation through time,
        ``model.init_carry(params, (B,))``; None where batches are independent.
      ema: whether to keep an average of the params. It takes the memory of one more
        copy of them, and ``make_train_step(ema_decay=...)`` updates it.
      loss_scale: the initial factor of the loss, for float16 gradients; ``2.0**15`` is
        a usual value. float32 and bfloat16 need none.

    Returns:
      The state.

    Raises:
      ValueError: ``tx`` is no optax transformation, ``key`` is not one typed PRNG key,
        or ``loss_scale`` is not positive.

    Example:
      >>> tx = jlstm.train.adamw(1e-3)
      >>> state = jlstm.train.create_state({"w": jnp.ones(3)}, tx)
      >>> int(state.step)
      0
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(
            f"create_state: tx must be an optax transformation, got {tx!r}; such as "
            "adamw(1e-3)"
        )
    if key is not None and not is_key(key):
        raise ValueError(
            f"create_state: key must be one typed key, got {jnp.result_type(key)}"
            f"{list(jnp.shape(key))}; make it with jax.random.key(seed)"
        )
    # A transformation may keep the params themselves in its state, and no buffer can be
    # donated twice; hence the copy of everything, in one go.
    scale = None
    if loss_scale is not None:
        if not loss_scale > 0:
            raise ValueError(
                f"create_state: loss_scale must be positive, got {loss_scale}"
            )
        scale = LossScale(jnp.float32(loss_scale), jnp.int32(0))
    state = TrainState(
        jnp.int32(0),
        params,
        tx.init(params),
        key,
        carry,
        ema=params if ema else None,
        loss_scale=scale,
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def check_alive(where: str, tree: PyTree) -> None:
    """Refuses arrays whose memory a training step has reused.

    Raises:
      ValueError: an array was donated; the message says where the new one is.
    """
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    if any(not isinstance(x, Tracer) and x.is_deleted() for x in arrays):
        raise ValueError(
            f"{where}: the state was donated to an earlier step; use the state that "
            "it returned (report.state of fit), or make_train_step(donate=False)"
        )


def is_key(leaf: PyTree) -> bool:
    """Tells whether a leaf is a single typed PRNG key."""
    return (
        isinstance(leaf, jax.Array)
        and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and leaf.shape == ()
    )


def type_name(leaf: PyTree) -> str:
    """Writes a leaf's type as ``float32[4,8]``."""
    return f"{jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]"
