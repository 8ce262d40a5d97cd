"""The reference: one plain ``lax.scan`` over time, for any cell."""

from __future__ import annotations

import jax

from jlstm.types import Array, Cell, PyTree, where_rows, zero_rows


def why_not(cell: Cell) -> str | None:
    """Says why this loop cannot run a cell: it always can."""
    del cell
    return None


def unroll(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree,
    fresh: PyTree,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_carries: bool = False,
) -> tuple[PyTree, PyTree, PyTree]:
    """Runs a cell over a sequence; every kernel has this signature.

    Args:
      cell: any cell.
      params: what ``prepare`` returned, or the params.
      xs: time-major, ``[T, B, ...]``, zero where masked.
      carry: the incoming carry, ``[B, ...]``.
      fresh: the fresh carry, ``[B, ...]``, which resets restore.
      mask: ``[T, B]``, true at valid steps; ``None`` if all are.
      resets: ``[T, B]``, true where the fresh carry is restored before the step is
        taken, in the order in which steps are taken.
      reverse: takes the steps from the last to the first.
      return_carries: also stacks the carries.

    Returns:
      ``(ys, carry, carries)``: outputs ``[T, B, ...]``, zero where masked; the final
      carry; and the carry after each step, ``[T, B, ...]``, or ``None``.
    """

    def body(carry: PyTree, inputs: tuple) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        x, valid, reset = inputs
        if reset is not None:
            carry = where_rows(reset, fresh, carry)
        new, y = cell.step(params, carry, x)
        if valid is not None:
            new, y = where_rows(valid, new, carry), zero_rows(valid, y)
        return new, (y, new if return_carries else None)

    inputs = (xs, mask, resets)
    carry, (ys, carries) = jax.lax.scan(body, carry, inputs, reverse=reverse)
    return ys, carry, carries
