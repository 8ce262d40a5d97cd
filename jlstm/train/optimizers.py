"""The two optimisers recurrent networks are trained with, composed of optax pieces.

Nothing here is special: each function is a ``optax.chain`` that its docstring spells
out, and any other optax transformation serves as well.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import optax

from jlstm.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Constant:
    """The rate stays at its highest, after a linear warm-up."""

    warmup: float = 0.0
    """Fraction of the run in which the rate rises."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes what follows the warm-up, which took ``start`` steps; 1 is highest."""
        del start, steps
        return optax.constant_schedule(1.0)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The rate falls along a line, after a linear warm-up."""

    warmup: float = 0.0
    """Fraction of the run in which the rate rises."""
    final_fraction: float = 0.0
    """Of the highest rate, at the end."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes what follows the warm-up, which took ``start`` steps; 1 is highest."""
        del start
        return optax.linear_schedule(1.0, self.final_fraction, steps)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The rate falls along half a cosine, after a linear warm-up."""

    warmup: float = 0.0
    """Fraction of the run in which the rate rises."""
    final_fraction: float = 0.0
    """Of the highest rate, at the end."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes what follows the warm-up, which took ``start`` steps; 1 is highest."""
        del start
        return optax.cosine_decay_schedule(1.0, steps, alpha=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """The rate falls by the same factor each step, after a linear warm-up."""

    warmup: float = 0.0
    """Fraction of the run in which the rate rises."""
    final_fraction: float = 0.01
    """Of the highest rate, at the end."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes what follows the warm-up, which took ``start`` steps; 1 is highest."""
        del start
        return optax.exponential_decay(1.0, steps, self.final_fraction)


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
    """The rate falls as one over the root of the step, after a linear warm-up."""

    warmup: float = 0.1
    """Fraction of the run in which the rate rises."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes what follows the warm-up, which took ``start`` steps; 1 is highest."""
        del steps
        first = max(start, 1)
        return lambda step: (first / (first + jnp.maximum(step, 0))) ** 0.5


@dataclasses.dataclass(frozen=True)
class Steps:
    """The rate is multiplied by a factor at some places, after a linear warm-up."""

    warmup: float = 0.0
    """Fraction of the run in which the rate rises."""
    at: tuple[float, ...] = (0.5, 0.75)
    """Places, as fractions of the run."""
    factor: float = 0.1
    """Of the rate before."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes what follows the warm-up, which took ``start`` steps; 1 is highest."""
        places = [round(place * (start + steps)) - start for place in self.at]
        if len(set(places)) < len(places) or min(places, default=1) < 1:
            raise ValueError(
                f"schedule.at: must rise, from after the warm-up on, got {self.at}"
            )
        return optax.piecewise_constant_schedule(
            1.0, dict.fromkeys(places, self.factor)
        )


Schedule = Constant | Linear | Cosine | Exponential | InverseSqrt | Steps
DecayIf = Callable[[str, Array], bool]


def is_matrix(path: str, leaf: Array) -> bool:
    """Tells whether a leaf has two dimensions or more: weights, not biases or gains."""
    del path
    return jnp.ndim(leaf) >= 2


def adamw(
    learning_rate: float,
    *,
    num_steps: int | None = None,
    schedule: Schedule = Constant(),
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
      num_steps: length of the run, which a schedule divides.
      schedule: how the rate rises and falls, see :func:`make_schedule`.
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
      >>> tx = jlstm.train.adamw(3e-3, schedule=jlstm.train.Cosine(), num_steps=1000)
      >>> state = jlstm.train.create_state({"w": jnp.ones((2, 2))}, tx)
    """
    rate = make_schedule(learning_rate, num_steps=num_steps, schedule=schedule)
    decay = optax.adamw(
        rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_mask(decay_if)
    )
    return optax.chain(_clip(clip_norm), decay)


def sgd(
    learning_rate: float,
    *,
    num_steps: int | None = None,
    schedule: Schedule = Constant(),
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
      num_steps: length of the run, which a schedule divides.
      schedule: how the rate rises and falls, see :func:`make_schedule`.
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
    rate = make_schedule(learning_rate, num_steps=num_steps, schedule=schedule)
    return optax.chain(
        _clip(clip_norm),
        optax.add_decayed_weights(weight_decay, mask=_mask(decay_if)),
        optax.sgd(rate, momentum=momentum or None, nesterov=nesterov),
    )


def make_schedule(
    learning_rate: float,
    *,
    num_steps: int | None = None,
    schedule: Schedule = Constant(),
) -> optax.Schedule:
    """Makes a learning-rate schedule.

    Step ``n`` of a warm-up of ``W`` steps has the rate ``(n + 1) / (W + 1)`` times the
    highest, so that no step is without effect. What follows is :class:`Constant`,
    :class:`Linear`, :class:`Cosine`, :class:`Exponential`, :class:`InverseSqrt` or
    :class:`Steps`; as the field of a config, each is a choice on the command line
    (``schedule:linear --schedule.warmup 0.1``).

    Args:
      learning_rate: the highest rate.
      num_steps: the length of the run; a constant rate without warm-up needs none.
      schedule: one of the classes above, or any with ``warmup`` and ``fall``.

    Returns:
      A function of the step.

    Raises:
      ValueError: a value out of range, or ``num_steps`` missing.

    Example:
      >>> train = jlstm.train
      >>> rate = train.make_schedule(1.0, schedule=train.Linear(), num_steps=4)
      >>> [float(rate(step)) for step in range(5)]
      [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if not isinstance(learning_rate, numbers.Real) or not learning_rate > 0:
        raise ValueError(f"learning_rate: must be positive, got {learning_rate}")
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps: must be at least 1, got {num_steps}")
    if isinstance(schedule, str | type) or not hasattr(schedule, "fall"):
        names = ", ".join(f"{kind.__name__}()" for kind in get_args(Schedule))
        raise ValueError(f"schedule: must be one of {names}, got {schedule!r}")
    for name, most in (("warmup", 1.0), ("final_fraction", 1.0 + 1e-9)):
        value = getattr(schedule, name, 0.0)
        if not 0 <= value < most:
            end = ")" if name == "warmup" else "]"
            raise ValueError(f"schedule.{name}: must lie in [0, 1{end}, got {value}")
    if num_steps is None:
        if schedule != Constant():
            raise ValueError(f"num_steps: {schedule!r} must know the length of the run")
        return optax.constant_schedule(learning_rate)
    start = round(schedule.warmup * num_steps)
    start = min(start, num_steps - 1)
    fall = schedule.fall(start, num_steps - start)
    rise = optax.linear_schedule(1 / (start + 1), 1.0, start) if start else fall
    shape = optax.join_schedules([rise, fall], [start]) if start else fall
    return lambda step: learning_rate * shape(step)


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
