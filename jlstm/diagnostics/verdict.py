"""How far gradients reach, in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jlstm.diagnostics.jacobians import JacobianNorms, jacobian_norms
from jlstm.types import Cell, PyTree

# Over all steps of a sequence, a factor of less than this is no change.
FACTOR = 2.0
BIASES = ("forget_bias", "update_bias")


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """Whether gradients vanish, hold or explode; prints itself as a sentence.

    Attributes:
      word: ``"vanish"``, ``"hold"`` or ``"explode"``.
      steps: in how many steps their norm halves, or doubles; infinity if it does
        neither.
      norms: what was measured.
      others: by a setting, such as ``"forget_bias=1.0"``, the steps in which they would
        halve with it, infinity if they would not.
    """

    word: str
    steps: float
    norms: JacobianNorms
    others: dict[str, float]

    def __repr__(self) -> str:
        median, lags = self.norms.median, self.norms.lags
        text = f"gradients {self.word}: "
        if self.word == "hold":
            text += f"they change by less than a factor {FACTOR:g} in {lags[-1]} steps"
        else:
            change = "halve" if self.word == "vanish" else "double"
            text += f"they {change} {_every(self.steps)}"
        text += (
            f" (norm {median[0]:.2g} after {_steps(lags[0])}, {median[-1]:.2g} after "
            f"{_steps(lags[-1])})"
        )
        for setting, steps in self.others.items():
            if math.isinf(steps):
                text += f"; with {setting} they would not"
            else:
                text += f"; with {setting} they would {_every(steps)}"
        return text


def _steps(count: float) -> str:
    return f"{count:.3g} step" + ("" if count == 1 else "s")


def _every(steps: float) -> str:
    return f"every {_steps(steps)}" if steps >= 1 else "more than once a step"


def verdict(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    part: str | None = None,
) -> Verdict:
    """Says whether gradients vanish or explode on their way back through time.

    By :func:`jacobian_norms`. Where they vanish in a cell whose ``forget_bias`` (or the
    ``update_bias`` of a GRU) is a number, it is measured too how they would with a
    larger one, the other params being what they are: with 1, or if it is 1 or more,
    with 2 more.

    Args:
      cell: any cell.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      carry: the incoming carry; ``None`` means the fresh one.
      part: of the carry, as in :func:`jacobian_norms`.

    Raises:
      TypeError: no cell.
      ValueError: the carry has no such part; no steps.

    Example:
      >>> cell, xs = jlstm.LSTM(4, forget_bias=0.0), jnp.zeros((1, 50, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> found = jlstm.diagnostics.verdict(cell, params, xs)
      >>> found.word, found.others["forget_bias=1.0"] > 2 * found.steps
      ('vanish', True)
    """
    norms = jacobian_norms(cell, params, xs, carry, part=part)
    change = norms.rate * len(norms.lags)
    others: dict[str, float] = {}
    if abs(change) < math.log(FACTOR):
        return Verdict("hold", math.inf, norms, others)
    if change > 0:
        return Verdict("explode", math.log(2) / norms.rate, norms, others)
    for name in BIASES:
        bias = getattr(cell, name, None)
        if isinstance(bias, int | float):
            new = 1.0 if bias < 1 else bias + 2.0
            moved = _moved(cell, name, new, params, xs)
            found = jacobian_norms(cell, moved, xs, carry, part=part)
            others[f"{name}={new}"] = found.halving
    return Verdict("vanish", norms.halving, norms, others)


def _moved(cell: Any, name: str, new: float, params: PyTree, xs: PyTree) -> PyTree:
    """The params, moved as far as another bias moves those at init."""
    x = jax.tree.map(lambda leaf: leaf[:, 0], xs)
    key = jax.random.key(0)
    before = cell.init(key, x)
    after = dataclasses.replace(cell, **{name: new}).init(key, x)
    return jax.tree.map(lambda p, a, b: p + (b - a), params, before, after)
