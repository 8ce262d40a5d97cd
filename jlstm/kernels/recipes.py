"""What of the arrays that are stored of a step follows from the others.

To compute it again costs a few operations on what is in registers then; to store it
costs memory, and the time to write and to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jlstm.types import Array

CHEAP = {"add", "add_any", "sub", "mul", "neg", "max", "min", "copy"}
DEAR = {"tanh", "logistic", "exp", "div"}
MOST_CHEAP, MOST_DEAR = 4, 1


class Recipe(NamedTuple):
    """Makes one array from some that are stored."""

    made: int
    of: tuple[int, ...]
    fun: ClosedJaxpr

    def __call__(self, arrays: Sequence[Array]) -> Array:
        """Makes the array; ``arrays`` are all, of which some are read."""
        return jaxpr_as_fun(self.fun)(*(arrays[i] for i in self.of))[0]


def find(fun: Callable, args: tuple, locked: set[int]) -> list[Recipe]:
    """Finds which results of ``fun(*args)`` follow from other results by little work.

    Args:
      fun: returns a list of arrays, none of them twice.
      args: its arguments; only shapes and dtypes count.
      locked: the numbers of results to be stored in any case.
    """
    closed = jax.make_jaxpr(fun)(*args)
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    constants = {var for var, value in known.items() if not isinstance(value, Tracer)}
    producers = {out: i for i, eqn in enumerate(jaxpr.eqns) for out in eqn.outvars}
    numbers = {var: i for i, var in enumerate(jaxpr.outvars)}
    stored, needed, recipes = set(numbers), {jaxpr.outvars[i] for i in locked}, []
    for var in sorted(stored & set(producers), key=lambda v: -producers[v]):
        if var in needed:
            continue
        equations, inputs = set[int](), set[Any]()
        have = (stored - {var}) | constants
        if not _collect(jaxpr, producers, have, var, equations, inputs):
            continue
        stored.discard(var)
        given = [v for v in numbers if v in inputs]
        needed |= set(given)
        consts = [v for v in jaxpr.constvars if v in inputs]
        alone = jaxpr.replace(
            constvars=consts,
            invars=given,
            outvars=[var],
            eqns=[jaxpr.eqns[i] for i in sorted(equations)],
        )
        body = ClosedJaxpr(alone, [known[v] for v in consts])
        recipes.append(Recipe(numbers[var], tuple(numbers[v] for v in given), body))
    return recipes


def _collect(
    jaxpr: Any, producers: dict, have: set, var: Any, equations: set, inputs: set
) -> bool:
    """Collects what makes a variable of those that there are, unless it is too much."""
    if isinstance(var, Literal):
        return True
    if var in have:
        inputs.add(var)
        return True
    if var not in producers:
        return False
    equations.add(producers[var])
    work = [_work(jaxpr.eqns[i]) for i in equations]
    if sum(w[0] for w in work) > MOST_CHEAP or sum(w[1] for w in work) > MOST_DEAR:
        return False
    return all(
        _collect(jaxpr, producers, have, atom, equations, inputs)
        for atom in jaxpr.eqns[producers[var]].invars
    )


def _work(eqn: Any) -> tuple[float, float]:
    """How many cheap and dear operations an equation takes for each element."""
    name, none = eqn.primitive.name, (float("inf"), 0.0)
    if name in ("custom_jvp_call", "jit", "pjit"):
        inner = eqn.params.get("call_jaxpr") or eqn.params["jaxpr"]
        parts = [_work(each) for each in inner.jaxpr.eqns]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    if name == "split":  # into one
        return (0.0, 0.0) if len(eqn.outvars) == 1 else none
    if len(eqn.outvars) != 1 or name not in CHEAP | DEAR:
        return none
    return (1.0, 0.0) if name in CHEAP else (0.0, 1.0)
