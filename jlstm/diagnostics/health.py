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
      others: what would be measured with another setting, such as
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
    """The params, moved as far as another bias moves those at init."""
    x = jax.tree.map(lambda leaf: leaf[:, 0], xs)
    key = jax.random.key(0)
    before = cell.init(key, x)
    after = dataclasses.replace(cell, **{name: new}).init(key, x)
    return jax.tree.map(lambda p, a, b: p + (b - a), params, before, after)
