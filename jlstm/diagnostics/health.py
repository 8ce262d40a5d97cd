"""A verdict on how far gradients reach, in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jlstm.diagnostics.jacobians import JacobianNorms, jacobian_norms
from jlstm.types import Cell, PyTree

# A smaller change than by this factor, over the whole sequence, counts as none.
FACTOR = 2.0
BIASES = ("forget_bias", "update_bias")


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """Whether gradients vanish, hold or explode; it prints as a sentence.

    Attributes:
      word: ``"vanish"`` or ``"explode"`` if the norm of gradients changes by more than
        a factor of 2 over the sequence, else ``"hold"``.
      steps: the number of steps in which the norm halves or doubles; infinity if it
        holds.
      norms: the measured norms.
      others: the norms that other settings would give, by their names, such as
        ``"forget_bias=1.0"``.
    """

    word: str
    steps: float
    norms: JacobianNorms
    others: dict[str, JacobianNorms]

    def __repr__(self) -> str:
        median, lags = self.norms.median, self.norms.lags
        text = f"gradients {self.word}: they {_change(self.norms)} (norm "
        text += f"{median[0]:.2g} after {_steps(lags[0])}, {median[-1]:.2g} after "
        text += f"{_steps(lags[-1])})"
        for setting, norms in self.others.items():
            text += f"; with {setting} they would {_change(norms)}"
        return text


def _word(norms: JacobianNorms) -> str:
    change = norms.rate * len(norms.lags)
    if abs(change) < math.log(FACTOR):
        return "hold"
    return "explode" if change > 0 else "vanish"


def _change(norms: JacobianNorms) -> str:
    word = _word(norms)
    if word == "hold":
        return f"change by less than a factor {FACTOR:g} in {len(norms.lags)} steps"
    change = "halve" if word == "vanish" else "double"
    return f"{change} {_every(math.log(2) / abs(norms.rate))}"


def _steps(count: float) -> str:
    text = f"{count:.3g}"
    return f"{text} step" + ("" if text == "1" else "s")


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
    """Says whether gradients vanish, hold or explode on their way back through time.

    It measures this with :func:`jacobian_norms`. If gradients vanish in a cell whose
    ``forget_bias`` (or ``update_bias``, for a GRU) is a number, it also measures how
    they would behave with a larger bias and the other params unchanged: with a bias
    of 1, or with 2 more if the bias is 1 or more already.

    Args:
      cell: any cell.
      params: its params, fresh or trained.
      xs: inputs ``[B, T, ...]`` like those of training. A few rows are enough; T should
        be as long as the memory that you need.
      carry: the incoming carry; None means the fresh one.
      part: the part of the carry to look at, such as ``"h"``; None means the whole, as
        in :func:`jacobian_norms`.

    Returns:
      The verdict, which prints as a sentence.

    Raises:
      TypeError: ``cell`` is no cell.
      ValueError: the carry has no such part, or there are no steps.

    Example:
      >>> cell, xs = jlstm.LSTM(4, forget_bias=0.0), jnp.zeros((1, 50, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> found = jlstm.diagnostics.verdict(cell, params, xs)
      >>> found.word, found.others["forget_bias=1.0"].halving > 2 * found.steps
      ('vanish', True)
    """
    norms = jacobian_norms(cell, params, xs, carry, part=part)
    word = _word(norms)
    steps = math.inf if word == "hold" else math.log(2) / abs(norms.rate)
    others: dict[str, JacobianNorms] = {}
    for name in BIASES if word == "vanish" else ():
        bias = getattr(cell, name, None)
        if isinstance(bias, int | float):
            new = 1.0 if bias < 1 else bias + 2.0
            moved = _moved(cell, name, new, params, xs)
            found = jacobian_norms(cell, moved, xs, carry, part=part)
            others[f"{name}={new}"] = found
    return Verdict(word, steps, norms, others)


def _moved(cell: Any, name: str, new: float, params: PyTree, xs: PyTree) -> PyTree:
    """Returns the params, changed as far as the new bias changes those of ``init``."""
    x = jax.tree.map(lambda leaf: leaf[:, 0], xs)
    key = jax.random.key(0)
    before = cell.init(key, x)
    after = dataclasses.replace(cell, **{name: new}).init(key, x)
    return jax.tree.map(lambda p, a, b: p + (b - a), params, before, after)
