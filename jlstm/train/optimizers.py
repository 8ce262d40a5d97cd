"""Two optimisers that are usual for recurrent networks, composed of optax parts.

Each function returns an ``optax.chain``, which its docstring spells out. Any other
optax transformation can be used instead.
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
    """The learning rate stays at its highest value, after an optional warm-up."""

    warmup: float = 0.0
    """Fraction of the run in which the rate rises to its highest, from 0 to below 1."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes the schedule for the steps after the warm-up; 1 is the highest rate."""
        del start, steps
        return optax.constant_schedule(1.0)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The learning rate falls linearly, after an optional linear warm-up.

    It falls from its highest value to ``final_fraction`` of it at the last step.
    """

    warmup: float = 0.0
    """Fraction of the run in which the rate rises to its highest, from 0 to below 1."""
    final_fraction: float = 0.0
    """The rate at the end of the run, as a fraction of the highest rate."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes the schedule for the steps after the warm-up; 1 is the highest rate."""
        del start
        return optax.linear_schedule(1.0, self.final_fraction, steps)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The learning rate falls along half a cosine, after an optional linear warm-up.

    It falls slowly at first, fast in the middle, and slowly again towards
    ``final_fraction`` of its highest value. A good choice for most runs.
    """

    warmup: float = 0.0
    """Fraction of the run in which the rate rises to its highest, from 0 to below 1."""
    final_fraction: float = 0.0
    """The rate at the end of the run, as a fraction of the highest rate."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes the schedule for the steps after the warm-up; 1 is the highest rate."""
        del start
        return optax.cosine_decay_schedule(1.0, steps, alpha=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """The learning rate falls by the same factor each step, after an optional warm-up.

    At the last step it is ``final_fraction`` of its highest value.
    """

    warmup: float = 0.0
    """Fraction of the run in which the rate rises to its highest, from 0 to below 1."""
    final_fraction: float = 0.01
    """The rate at the end of the run, as a fraction of the highest rate; above 0."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes the schedule for the steps after the warm-up; 1 is the highest rate."""
        del start
        return optax.exponential_decay(1.0, steps, self.final_fraction)


@dataclasses.dataclass(frozen=True)
class InverseSqrt:
    """The learning rate falls as one over the square root of the step.

    After a warm-up of ``W`` steps, step ``n`` has ``sqrt(W / n)`` times the highest
    rate. The rate does not depend on the length of the run otherwise.
    """

    warmup: float = 0.1
    """Fraction of the run in which the rate rises to its highest, from 0 to below 1."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes the schedule for the steps after the warm-up; 1 is the highest rate."""
        del steps
        first = max(start, 1)
        return lambda step: (first / (first + jnp.maximum(step, 0))) ** 0.5


@dataclasses.dataclass(frozen=True)
class Steps:
    """The learning rate is multiplied by a factor at certain points of the run.

    With the defaults it falls to a tenth after half of the run, and to a hundredth
    after three quarters. An optional linear warm-up comes before.
    """

    warmup: float = 0.0
    """Fraction of the run in which the rate rises to its highest, from 0 to below 1."""
    at: tuple[float, ...] = (0.5, 0.75)
    """The points at which the rate falls: fractions of the run, ascending."""
    factor: float = 0.1
    """By which the rate is multiplied at each of these points."""

    def fall(self, start: int, steps: int) -> optax.Schedule:
        """Makes the schedule for the steps after the warm-up; 1 is the highest rate."""
        places = [round(place * (start + steps)) - start for place in self.at]
        if len(set(places)) < len(places) or min(places, default=1) < 1:
            raise ValueError(
                "schedule.at: must be in rising order, and after the warm-up, got "
                f"{self.at}"
            )
        return optax.piecewise_constant_schedule(
            1.0, dict.fromkeys(places, self.factor)
        )


Schedule = Constant | Linear | Cosine | Exponential | InverseSqrt | Steps
"""The schedules of the learning rate; :func:`make_schedule` says how they are used."""
DecayIf = Callable[[str, Array], bool]


def is_matrix(path: str, leaf: Array) -> bool:
    """Tells whether a leaf has two or more axes, unlike biases and gains."""
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
    """Makes AdamW, with the gradient clipped by its global norm.

    The result is ``optax.chain(clip_by_global_norm(clip_norm), adamw(schedule, ...))``.
    A learning rate from ``1e-3`` to ``1e-2`` is usual for recurrent networks.

    Args:
      learning_rate: the learning rate; with a schedule, its highest value.
      num_steps: the length of the run in steps, as given to :func:`fit`. Every schedule
        except ``Constant()`` without warm-up needs it.
      schedule: how the rate rises and falls, such as ``Cosine(warmup=0.05)``; see
        :func:`make_schedule`.
      clip_norm: a gradient with a larger global norm is scaled down to this norm.
        Smaller values are safer where gradients explode; None does not clip.
      weight_decay: the strength of the decoupled weight decay: each step subtracts
        ``rate * weight_decay * param``. 0 decays nothing.
      decay_if: ``(path, leaf) -> bool``, which leaves decay. By default those with two
        or more axes do, so biases do not. The path of a leaf is a string such as
        ``"encoder/w_hh"``.
      b1: the decay of the average gradient, Adam's first moment.
      b2: the decay of the average squared gradient, Adam's second moment. Lower values,
        such as 0.99, adapt faster and suit short runs.
      eps: added to the root of the second moment, against division by zero.

    Returns:
      The optax transformation, for ``create_state`` and ``make_train_step``.

    Raises:
      ValueError: a value is out of range, or ``num_steps`` is missing.

    References:
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
    """Makes stochastic gradient descent, with the gradient clipped by its global norm.

    The result is ``optax.chain(clip_by_global_norm(clip_norm),
    add_decayed_weights(weight_decay), sgd(schedule, momentum, nesterov))``.

    Args:
      learning_rate: the learning rate; with a schedule, its highest value.
      num_steps: the length of the run in steps, as given to :func:`fit`. Every schedule
        except ``Constant()`` without warm-up needs it.
      schedule: how the rate rises and falls; see :func:`make_schedule`.
      clip_norm: a gradient with a larger global norm is scaled down to this norm; None
        does not clip.
      weight_decay: the strength of an L2 penalty: ``weight_decay * param`` is added to
        the clipped gradient. 0 decays nothing.
      decay_if: ``(path, leaf) -> bool``, which leaves decay, as in :func:`adamw`.
      momentum: the decay of the velocity, such as 0.9; 0 keeps no velocity.
      nesterov: whether to use Nesterov's momentum, which looks ahead along the
        velocity.

    Returns:
      The optax transformation, for ``create_state`` and ``make_train_step``.

    Raises:
      ValueError: a value is out of range, or ``num_steps`` is missing.

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
    """Makes a learning-rate schedule: a function from the step to the rate.

    In a warm-up of ``W`` steps, step ``n`` (from 0) has ``(n + 1) / (W + 1)`` times the
    highest rate, so that already the first step has an effect. After it the rate
    follows :class:`Constant`, :class:`Linear`, :class:`Cosine`, :class:`Exponential`,
    :class:`InverseSqrt` or :class:`Steps`. If a config has a field of type
    :data:`Schedule`, each of them is a choice on the command line:
    ``schedule:linear --schedule.warmup 0.1``.

    Args:
      learning_rate: the highest rate.
      num_steps: the length of the run in steps. Only a constant rate without warm-up
        does without it.
      schedule: one of the classes above, or an object of your own with an attribute
        ``warmup`` and a method ``fall(start, steps)``.

    Returns:
      A function of the step, as optax takes it for a learning rate.

    Raises:
      ValueError: a value is out of range, or ``num_steps`` is missing.

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
    if isinstance(schedule, Exponential) and schedule.final_fraction == 0:
        raise ValueError(
            "schedule.final_fraction: must be above 0 for Exponential, got 0; Linear "
            "and Cosine can end at 0"
        )
    if num_steps is None:
        if schedule != Constant():
            raise ValueError(
                f"num_steps: needed by {schedule!r}, got None; give the length of the "
                "run in steps"
            )
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
