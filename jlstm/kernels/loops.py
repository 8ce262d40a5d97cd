"""A loop over the steps of a block, by ``lax.scan``.

:func:`jlstm.kernels.program.bind` makes a loop that is called in the same way and runs
in C++. The two differ in the order of arrays that nobody else sees: batch-major
``[B, T, ...]`` in C++, time-major ``[T, B, ...]`` here, where the arrays of one step
are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jlstm.kernels import blocks
from jlstm.kernels.blocks import time_major
from jlstm.types import Array, PyTree


class Steps(NamedTuple):
    """What steps read, beside what is the same for all; one step has ``[B, ...]``."""

    state: PyTree  # handed from step to step
    sums: PyTree = ()  # [...], to which each step adds sums over the rows
    inputs: PyTree = ()  # of this block, in the order of the loop
    kept: PyTree = ()  # of the whole sequence, [B, T, ...]
    stored: PyTree = ()  # of the whole sequence, in the order of the loop


class Span(NamedTuple):
    """Which steps a loop takes."""

    time: int  # how many steps
    reverse: bool
    read: Any = 0  # where they begin in kept and stored
    write: Any = 0  # where they begin in what is written


class Loop(Protocol):
    """Runs steps: ``step(fixed, *steps) -> (state, sums, outs, written, stored)``."""

    axis: int  # the axis of time, in the order of the loop

    def __call__(self, steps: Steps, to: tuple, span: Span) -> tuple:
        """Runs a span of steps; returns ``(state, sums, outs, written, stored)``.

        Args:
          steps: what the steps read.
          to: ``(written, stored)``, arrays longer than the span, of which a part is
            overwritten: ``[B, T, ...]``, and in the order of the loop. The results
            ``outs`` become new arrays, in the order of the loop.
          span: which steps to run.
        """
        ...


class Scan:
    """A loop by ``lax.scan``, compiled by XLA.

    Args:
      step: the step, with its fixed arguments bound.
      ahead: whether each step reads the inputs of the next one. XLA fuses the reading
        of inputs with their first use. If that is a cut, the fusion is not vectorised
        on a CPU, and a GRU takes twice as long.
    """

    axis = 0

    def __init__(self, step: Callable, *, ahead: bool = False):
        self.step, self.ahead = step, ahead

    def __call__(self, steps: Steps, to: tuple, span: Span) -> tuple:
        """Runs the steps; see :class:`Loop`."""
        kept = time_major(blocks.cut(steps.kept, span.read, span.time, axis=1))
        stored = blocks.cut(steps.stored, span.read, span.time, axis=0)
        last = span.time - 1 if span.reverse else 0
        start = jnp.asarray(span.write + last, jnp.int32)

        def body(carry: tuple, inputs: tuple) -> tuple:
            state, sums, to, place = carry
            state, sums, outs, written, made = self.step(state, sums, *inputs)
            to = blocks.put_at(to, made, place)
            place = place + (-1 if span.reverse else 1)
            return (state, sums, to, place), (outs, written)

        carry = (steps.state, steps.sums, to[1], start)
        scan = _scan_ahead if self.ahead else jax.lax.scan
        carry, (outs, written) = scan(
            body, carry, (steps.inputs, kept, stored), span.time, span.reverse
        )
        state, sums, made, _ = carry
        written = blocks.paste(to[0], time_major(written), span.write, axis=1)
        return state, sums, outs, written, made


def _scan_ahead(
    body: Callable, carry: PyTree, xs: PyTree, length: int, reverse: bool
) -> tuple[PyTree, PyTree]:
    """Runs ``lax.scan`` so that each step reads the inputs of the next one."""
    steps = jnp.arange(length, dtype=jnp.int32)
    following = jnp.clip(steps + (-1 if reverse else 1), 0, length - 1)

    def run(state: tuple, following: Array) -> tuple[tuple, PyTree]:
        carry, out = body(*state)
        return (carry, blocks.at(xs, following, axis=0)), out

    first = blocks.at(xs, length - 1 if reverse else 0, axis=0)
    (carry, _), outs = jax.lax.scan(run, (carry, first), following, reverse=reverse)
    return carry, outs
