"""The two optimisers recurrent networks are trained with, composed of optax pieces.

Nothing here is special: each function is a ``optax.chain`` that its docstring spells
out, and any other optax transformation serves as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jlstm.types import Array, PyTree

Schedule = Literal["constant", "linear", "cosine"]
DecayIf = Callable[[str, Array], bool]


def is_matrix(path: str, leaf: Array) -> bool:
    """Tells whether a leaf has two dimensions or more: weights, not biases or gains."""
    del path
    return jnp.ndim(leaf) >= 2


def adamw(
    learning_rate: float,
    *,
    num_steps: int | None = None,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.01,
    decay_if: DecayIf = is_matrix,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Makes AdamW behind a clip of the gradient's global norm.

    ``chain(clip_by_global_norm(clip_norm), adamw(schedule, ...))``

    Args:
      learning_rate: the highest rate of the schedule.
      num_steps: length of the run, for a schedule that ends.
      schedule: what follows the warm-up, see :func:`make_schedule`.
      warmup_steps: steps of linear warm-up.
      final_fraction: which fraction of the rate a schedule ends at.
      clip_norm: the largest global norm of a gradient; None for no limit.
      weight_decay: decoupled, that is, multiplied by the rate only.
      decay_if: ``(path, leaf) -> bool``, which leaves decay; the path is written
        ``"encoder/w_hh"``.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Returns:
      The transformation.

    Raises:
      ValueError: a value out of range, or ``num_steps`` missing.

    Reference:
      Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
      >>> tx = jlstm.train.adamw(3e-3, schedule="cosine", num_steps=1000)
      >>> state = jlstm.train.create_state({"w": jnp.ones((2, 2))}, tx)
    """
    rate = make_schedule(
        learning_rate,
        num_steps=num_steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
    )
    decay = optax.adamw(
        rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_mask(decay_if)
    )
    return optax.chain(_clip(clip_norm), decay)


def sgd(
    learning_rate: float,
    *,
    num_steps: int | None = None,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    decay_if: DecayIf = is_matrix,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Makes stochastic gradient descent behind a clip of the gradient's global norm.

    ``chain(clip_by_global_norm(clip_norm), add_decayed_weights(weight_decay),
    sgd(schedule, momentum, nesterov))``

    Args:
      learning_rate: the highest rate of the schedule.
      num_steps: length of the run, for a schedule that ends.
      schedule: what follows the warm-up, see :func:`make_schedule`.
      warmup_steps: steps of linear warm-up.
      final_fraction: which fraction of the rate a schedule ends at.
      clip_norm: the largest global norm of a gradient; None for no limit.
      weight_decay: added to the clipped gradient, the L2 penalty of classic results.
      decay_if: ``(path, leaf) -> bool``, which leaves decay.
      momentum: decay of the velocity; 0 keeps none.
      nesterov: whether to look ahead along the velocity.

    Returns:
      The transformation.

    Raises:
      ValueError: a value out of range, or ``num_steps`` missing.

    Example:
      >>> tx = jlstm.train.sgd(1.0, clip_norm=0.25)
      >>> state = jlstm.train.create_state({"w": jnp.ones((2, 2))}, tx)
    """
    rate = make_schedule(
        learning_rate,
        num_steps=num_steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
    )
    return optax.chain(
        _clip(clip_norm),
        optax.add_decayed_weights(weight_decay, mask=_mask(decay_if)),
        optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
    )


def make_schedule(
    learning_rate: float,
    *,
    num_steps: int | None = None,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    final_fraction: float = 0.0,
) -> optax.Schedule:
    """Makes a learning-rate schedule.

    Step ``n`` of the warm-up has the rate ``(n + 1) / (warmup_steps + 1)`` times the
    highest, so that no step is without effect. After it the rate stays, or falls along
    a line or half a cosine to ``final_fraction`` of the highest at ``num_steps``.

    Args:
      learning_rate: the highest rate.
      num_steps: the step at which the fall ends.
      schedule: ``"constant"``, ``"linear"`` or ``"cosine"``.
      warmup_steps: steps of linear warm-up.
      final_fraction: in ``[0, 1]``.

    Returns:
      A function of the step.

    Raises:
      ValueError: a value out of range, or ``num_steps`` missing.

    Example:
      >>> rate = jlstm.train.make_schedule(1.0, schedule="linear", num_steps=4)
      >>> [float(rate(step)) for step in range(5)]
      [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check_schedule(learning_rate, num_steps, schedule, warmup_steps, final_fraction)
    warmup = optax.linear_schedule(
        learning_rate / (warmup_steps + 1), learning_rate, warmup_steps
    )
    if schedule == "constant" or num_steps is None:
        after = optax.constant_schedule(learning_rate)
    elif schedule == "linear":
        after = optax.linear_schedule(
            learning_rate, learning_rate * final_fraction, num_steps - warmup_steps
        )
    else:
        after = optax.cosine_decay_schedule(
            learning_rate, num_steps - warmup_steps, alpha=final_fraction
        )
    return (
        optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after
    )


def _check_schedule(
    learning_rate: float,
    num_steps: int | None,
    schedule: str,
    warmup_steps: int,
    final_fraction: float,
) -> None:
    names = get_args(Schedule)
    if schedule not in names:
        raise ValueError(f"schedule: must be one of {names}, got {schedule!r}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: must be positive, got {learning_rate}")
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction: must be in [0, 1], got {final_fraction}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: must be 0 or more, got {warmup_steps}")
    if schedule != "constant" and num_steps is None:
        raise ValueError(f"num_steps: schedule={schedule!r} must know where it ends")
    if num_steps is not None and num_steps <= warmup_steps:
        raise ValueError(
            f"num_steps: must be more than warmup_steps, got {num_steps} and "
            f"{warmup_steps}"
        )


def _clip(norm: float | None) -> optax.GradientTransformation:
    if norm is None:
        return optax.identity()
    if not norm > 0:
        raise ValueError(f"clip_norm: must be positive, or None, got {norm}")
    return optax.clip_by_global_norm(norm)


def _mask(decay_if: DecayIf) -> Callable[[PyTree], PyTree]:
    def mask(params: PyTree) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, leaf: decay_if(
                jax.tree_util.keystr(path, simple=True, separator="/"), leaf
            ),
            params,
        )

    return mask
