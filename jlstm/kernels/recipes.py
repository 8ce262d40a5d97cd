"""Finds which of the arrays stored for a step follow from the others.

Computing such an array again takes a few operations on numbers that are in registers
then. Storing it takes memory, and time to write and read it.
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
    """Computes one array from some that are stored."""

    made: int
    of: tuple[int, ...]
    fun: ClosedJaxpr

    def __call__(self, arrays: Sequence[Array]) -> Array:
        """Computes the array; ``arrays`` are all arrays, of which some are read."""
        return jaxpr_as_fun(self.fun)(*(arrays[i] for i in self.of))[0]


def find(fun: Callable, args: tuple, locked: set[int]) -> list[Recipe]:
    """Finds which results of ``fun(*args)`` follow from other results by little work.

    Args:
      fun: a function that returns a list of different arrays.
      args: its arguments; only their shapes and dtypes count.
      locked: the indices of results that must be stored in any case.
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
    """Collects the equations for a variable, unless they are too much work."""
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
    """Counts the cheap and the dear operations of an equation for each element."""
    name, none = eqn.primitive.name, (float("inf"), 0.0)
    if name in ("custom_jvp_call", "jit", "pjit"):
        inner = eqn.params.get("call_jaxpr") or eqn.params["jaxpr"]
        parts = [_work(each) for each in inner.jaxpr.eqns]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    if name == "split":  # into one part
        return (0.0, 0.0) if len(eqn.outvars) == 1 else none
    if len(eqn.outvars) != 1 or name not in CHEAP | DEAR:
        return none
    return (1.0, 0.0) if name in CHEAP else (0.0, 1.0)
