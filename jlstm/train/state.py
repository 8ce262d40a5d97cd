"""What training carries from step to step."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlstm.types import Array, PyTree


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a state that is not finite."""


@flax.struct.dataclass
class TrainState:
    """Everything a training step reads and replaces.

    Attributes:
      step: number of steps taken, an int32 scalar.
      params: the parameters.
      opt_state: the state of the optax transformation.
      key: the typed PRNG key all randomness derives from, or None for none. Step ``n``
        uses ``fold_in(key, n)``, so that a resumed run repeats the uninterrupted one.
      carry: what the model hands from one batch to the next in truncated
        backpropagation through time; None where batches are independent.
      ema: an exponential moving average of the params; None for none.
      loss_scale: what keeps gradients in the range of float16; None for none.
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
    """The factor of the loss in a step whose gradients are float16.

    It is halved by a step that overflows, and doubled after ``growth_steps`` steps in a
    row that do not.

    Attributes:
      scale: the factor, float32.
      good_steps: steps since it last changed, int32.
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
    """Makes the state of step 0.

    Every leaf is copied: a train step donates its state, and the arrays passed in here
    stay usable.

    Args:
      params: the parameters.
      tx: the optax transformation that will update them.
      key: a typed key (``jax.random.key``), or None to train without randomness.
      carry: the first carry of truncated backpropagation, ``model.init_carry(...)``.
      ema: whether to keep an average of the params, for
        ``make_train_step(ema_decay=...)``.
      loss_scale: the first factor of the loss, such as ``2.0**15``, where gradients are
        float16; bfloat16 needs none.

    Returns:
      The state.

    Raises:
      ValueError: ``key`` is not one typed PRNG key, or ``loss_scale`` not positive.

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
    """Refuses arrays whose memory a train step has taken.

    Raises:
      ValueError: saying where the new ones are.
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
