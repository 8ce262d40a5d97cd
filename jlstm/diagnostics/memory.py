"""What a trace says about gates and memory: saturation, time constants, writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from jlstm import door
from jlstm.diagnostics.traces import Trace, Traces


def only(trace: Trace | Traces) -> Trace:
    """Returns the trace of one recurrence, also if it is the only one of a layer.

    Raises:
      ValueError: there are several, or none.
    """
    if isinstance(trace, Trace):
        return trace
    if len(trace) != 1:
        found = ", ".join(map(repr, trace)) or "none"
        raise door.error(
            "diagnostics",
            f"needs the trace of one recurrence, got {len(trace)}: {found}; take one "
            "by its path, traces[path]",
        )
    return next(iter(trace.values()))


def numbers(values: np.ndarray) -> str:
    """Writes the median of numbers, the least and the largest."""
    if not values.size:
        return "none"
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"median {middle:.3g}, from {low:.3g} to {high:.3g}"


@dataclasses.dataclass(frozen=True, repr=False)
class Saturation:
    """How often the gates of each unit are nearly shut or nearly open.

    Attributes:
      low: for each gate, the fraction of valid steps at which it is in the lowest tenth
        of its range, ``[H]``.
      high: the same for the highest tenth, ``[H]``.
    """

    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]

    def __repr__(self) -> str:
        lines = [
            f"{name}: {self.low[name].mean():.1%} of steps in the lowest tenth of its "
            f"range, {self.high[name].mean():.1%} in the highest"
            for name in self.low
        ]
        return "\n".join(lines) or "no gates of a known range"


def saturation(trace: Trace | Traces) -> Saturation:
    """Computes how often the gates of each unit are nearly shut or nearly open.

    A gate that is always open or always shut passes almost no gradient to its weights.
    Gates whose range is not known are left out.

    Args:
      trace: the trace of one recurrence, from :func:`trace`.

    Returns:
      The fractions, by gate and unit.

    Raises:
      ValueError: the traces are of several recurrences; choose one by its path.

    Example:
      >>> cell, xs = jlstm.LSTM(4), jnp.ones((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> found = jlstm.diagnostics.trace(cell, params, xs)
      >>> jlstm.diagnostics.saturation(found).high["f"].shape
      (4,)

    References:
      Karpathy, Johnson & Fei-Fei, Visualizing and understanding recurrent networks,
      2015.
    """
    trace = only(trace)
    valid = np.asarray(trace.valid)
    low, high = {}, {}
    for name, bounds in trace.ranges.items():
        if bounds is None:
            continue
        seen = _seen(trace.gates[name], valid)
        part = (seen - bounds[0]) / (bounds[1] - bounds[0])
        low[name], high[name] = _mean(part < 0.1), _mean(part > 0.9)
    return Saturation(low, high)


@dataclasses.dataclass(frozen=True, repr=False)
class TimeConstants:
    """Over how many steps each unit forgets.

    Attributes:
      steps: for each part of the carry, the time constants of its units in steps,
        ``[H]``. Infinity means that nothing is forgotten; 0 means that a unit keeps
        nothing, unless through the recurrent product.
    """

    steps: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return "\n".join(
            f"{name}: {numbers(steps)} steps" for name, steps in self.steps.items()
        )


def time_constants(trace: Trace | Traces) -> TimeConstants:
    r"""Computes over how many steps the memory of each unit falls to :math:`1/e`.

    .. math::
        \tau = -1 / \overline{\log |\kappa_t|}

    The bar is the average over valid steps, and :math:`\kappa` is the retention, the
    fraction of the old carry that a step keeps (see :class:`Trace`). In an LSTM,
    :math:`\kappa` is the forget gate: 0.95 gives a time constant of about 20 steps.

    Args:
      trace: the trace of one recurrence, from :func:`trace`.

    Returns:
      The time constants in steps, by part of the carry and unit.

    Raises:
      ValueError: the traces are of several recurrences; choose one by its path.

    Example:
      >>> cell, xs = jlstm.LSTM(4, forget_bias=3.0), jnp.zeros((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> found = jlstm.diagnostics.trace(cell, params, xs)
      >>> jlstm.diagnostics.time_constants(found).steps["c"].round(1).tolist()
      [20.6, 20.6, 20.6, 20.6]
    """
    trace = only(trace)
    valid = np.asarray(trace.valid)
    made = {}
    for name, kept in trace.retention.items():
        with np.errstate(divide="ignore"):
            rate = _mean(np.log(np.abs(_seen(kept, valid))))
            made[name] = np.where(rate < 0, -1 / np.minimum(rate, -0.0), np.inf)
    return TimeConstants(made)


@dataclasses.dataclass(frozen=True, repr=False)
class DeadUnits:
    """Units whose carry hardly changes.

    Attributes:
      units: for each part of the carry, the indices of its dead units.
      sizes: for each part of the carry, its number of units.
    """

    units: dict[str, np.ndarray]
    sizes: dict[str, int]

    def __repr__(self) -> str:
        lines = []
        for name, dead in self.units.items():
            some = ": " + ", ".join(map(str, dead[:10])) if dead.size else ""
            more = ", ..." if dead.size > 10 else ""
            lines.append(f"{name}: {dead.size} of {self.sizes[name]} dead{some}{more}")
        return "\n".join(lines)


def dead_units(trace: Trace | Traces, *, tolerance: float = 0.01) -> DeadUnits:
    """Finds units whose carry hardly changes over all steps and rows.

    Args:
      trace: the trace of one recurrence, from :func:`trace`.
      tolerance: a unit is dead if its range (largest minus smallest value over all
        valid steps) is at most this fraction of the largest range among the units.

    Returns:
      The dead units, by part of the carry.

    Raises:
      ValueError: the traces are of several recurrences, or ``tolerance`` is not from 0
        to below 1.

    Example:
      >>> cell, xs = jlstm.LSTM(4), jnp.ones((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> jlstm.diagnostics.dead_units(jlstm.diagnostics.trace(cell, params, xs))
      h: 0 of 4 dead
      c: 0 of 4 dead
    """
    if not 0 <= tolerance < 1:
        raise door.error(
            "dead_units", f"tolerance must be at least 0 and below 1, got {tolerance}"
        )
    trace = only(trace)
    valid = np.asarray(trace.valid)
    units, sizes = {}, {}
    for name, value in trace.memory.items():
        seen = _seen(value, valid)
        seen = np.abs(seen).reshape(len(seen), -1) if np.iscomplexobj(seen) else seen
        seen = seen.reshape(len(seen), -1)
        moves = np.ptp(seen, axis=0) if len(seen) else np.zeros(seen.shape[1:])
        units[name] = np.flatnonzero(moves <= tolerance * moves.max(initial=0))
        sizes[name] = moves.size
    return DeadUnits(units, sizes)


@dataclasses.dataclass(frozen=True, repr=False)
class Writes:
    """Which steps wrote what the carry holds at the end.

    Attributes:
      by_step: for each part of the carry, the contribution of each step to its final
        value, ``[B, T, H]``.
      by_initial: the contribution of the incoming carry, ``[B, H]``.
      largest: the step that contributed most, ``[B, H]``; -1 if the incoming carry did.
    """

    by_step: dict[str, np.ndarray]
    by_initial: dict[str, np.ndarray]
    largest: dict[str, np.ndarray]

    def __repr__(self) -> str:
        lines = []
        for name, steps in self.by_step.items():
            total = np.abs(steps).sum() + np.abs(self.by_initial[name]).sum()
            part = np.abs(steps).sum(axis=(0, *range(2, steps.ndim))) / (total or 1)
            most = np.argsort(-part, kind="stable")[:3]
            some = ", ".join(f"{step} ({part[step]:.0%})" for step in most)
            lines.append(f"{name}: most was written at steps {some}")
        return "\n".join(lines)


def writes(trace: Trace | Traces) -> Writes:
    r"""Computes how much each step contributed to the final carry.

    .. math::
        c_T = \sum_s (c_s - \kappa_s \odot c_{s-1}) \prod_{t > s} \kappa_t
            + c_0 \prod_t \kappa_t

    with the retention :math:`\kappa` (see :class:`Trace`). The first factor of a term
    is what step s wrote, and the product is the part of it that later steps kept. The
    sum is exact. A masked step writes nothing and keeps everything; a step that begins
    from the fresh carry keeps nothing.

    Args:
      trace: the trace of one recurrence, from :func:`trace`.

    Returns:
      The contributions, by part of the carry.

    Raises:
      ValueError: the traces are of several recurrences; choose one by its path.

    Example:
      >>> cell, xs = jlstm.LSTM(4), jnp.ones((1, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> found = jlstm.diagnostics.trace(cell, params, xs)
      >>> total = jlstm.diagnostics.writes(found).by_step["c"].sum(1)
      >>> bool(np.allclose(total, found.memory["c"][:, -1]))
      True
    """
    trace = only(trace)
    valid, begins = np.asarray(trace.valid), np.asarray(trace.begins)
    by_step, by_initial, largest = {}, {}, {}
    for name, value in trace.memory.items():
        after, kept = np.asarray(value), np.asarray(trace.retention[name])
        wide = np.result_type(after, np.float64)
        after, kept = after.astype(wide), kept.astype(wide)
        kept = np.where(_like(valid, kept), kept, 1)
        kept = np.where(_like(begins, kept), 0, kept)
        initial = np.asarray(trace.initial[name]).astype(wide)
        if trace.reverse:
            after, kept = after[:, ::-1], kept[:, ::-1]
        before = np.concatenate([initial[:, None], after[:, :-1]], axis=1)
        ones = np.ones_like(kept[:, :1])
        later = np.cumprod(np.concatenate([ones, kept[:, ::-1]], axis=1), axis=1)
        later = later[:, ::-1]  # of all steps from each on; and of none
        steps = (after - kept * before) * later[:, 1:]
        first = initial * later[:, 0]
        if trace.reverse:
            steps = steps[:, ::-1]
        sizes = np.concatenate([np.abs(first)[:, None], np.abs(steps)], axis=1)
        by_step[name], by_initial[name] = steps, first
        largest[name] = sizes.argmax(1) - 1
    return Writes(by_step, by_initial, largest)


def _seen(value: Iterable, valid: np.ndarray) -> np.ndarray:
    """The values at valid steps ``[N, ...]``, in double precision."""
    array = np.asarray(value)
    return array[valid].astype(np.result_type(array, np.float64))


def _mean(values: np.ndarray) -> np.ndarray:
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    return values.mean(0)


def _like(flags: np.ndarray, array: np.ndarray) -> np.ndarray:
    return flags.reshape(flags.shape + (1,) * (array.ndim - 2))
