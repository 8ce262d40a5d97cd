"""The reference loop: one plain ``lax.scan`` over time, for any cell."""

from __future__ import annotations

import jax

from jlstm.kernels.blocks import scan_blocks, time_major
from jlstm.kernels.request import Request
from jlstm.types import Array, Cell, PyTree, where_rows, zero_rows


def why_not(cell: Cell, request: Request) -> str | None:
    """Returns ``None``, since this loop can run any cell."""
    del cell, request
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
    checkpoint_every: int | None = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Runs a cell over a batch of sequences; every loop has this signature.

    Args:
      cell: any cell.
      params: its params, or what ``prepare`` made of them.
      xs: ``[B, T, ...]``, zero at masked steps.
      carry: the incoming carry, ``[B, ...]``.
      fresh: the fresh carry, ``[B, ...]``, which resets restore.
      mask: ``[B, T]``, true at valid steps; ``None`` if all are.
      resets: ``[B, T]``, true where the fresh carry is restored before a step, in the
        order in which steps are taken; ``None`` for nowhere.
      reverse: whether to take the steps from the last to the first.
      return_carries: whether to return the carry after each step too.
      checkpoint_every: the number of steps between two carries that are stored for a
        gradient, which computes the steps between them again; ``None`` stores all.

    Returns:
      ``(ys, carry, carries)``: the outputs ``[B, T, ...]``, zero at masked steps; the
      final carry; and the carry after each step, ``[B, T, ...]``, or ``None``.
    """

    def body(carry: PyTree, inputs: tuple) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        x, valid, reset = inputs
        if reset is not None:
            carry = where_rows(reset, fresh, carry)
        new, y = cell.step(params, carry, x)
        if valid is not None:
            new, y = where_rows(valid, new, carry), zero_rows(valid, y)
        return new, (y, new if return_carries else None)

    def block(carry: PyTree, inputs: tuple) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        return jax.lax.scan(body, carry, inputs, reverse=reverse)

    inputs = time_major((xs, mask, resets))
    time = jax.tree.leaves(xs)[0].shape[1]
    if checkpoint_every is None or not time:
        carry, outs = block(carry, inputs)
    else:
        block = jax.checkpoint(block, prevent_cse=False)
        carry, outs = scan_blocks(
            block, carry, inputs, checkpoint_every, reverse=reverse
        )
    ys, carries = time_major(outs)
    return ys, carry, carries
