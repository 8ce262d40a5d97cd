r"""The loop of a linear recurrence, computed in parallel by an associative scan.

If ``mix`` returns nothing and ``update`` is affine in the carry, element by element, a
step is :math:`s_t = a_t \odot s_{t-1} + b_t`. Two such steps combine into one:

.. math::
    (a_1, b_1) \circ (a_2, b_2) = (a_2 \odot a_1,\; a_2 \odot b_1 + b_2)

This operation is associative, so ``lax.associative_scan`` finds all carries of a block
of steps in a number of rounds that grows with the logarithm of the block. A reset is a
step that keeps nothing of the carry before, even if that is not finite.

:math:`b_t` is ``update`` applied to a carry of zeros, and :math:`a_t` is its
derivative. If leaves of the carry depend on each other, as a real and an imaginary part
do, the :math:`a_t` of an element is a small matrix. The outputs come from applying
``update`` once more, to the carries before each step.

JAX differentiates this loop, in every mode.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlstm.cells.wrappers import Lookup
from jlstm.kernels import affine, blocks, fused, scan
from jlstm.kernels.request import Request, may_be_sharded
from jlstm.types import Array, Cell, PyTree, where_rows, zero_rows

# The bytes that the carries of a block take: on a CPU they then stay in its caches. No
# other platform was measured.
BYTES = {"cpu": 1 << 18}
ELSEWHERE = 1 << 25

Factors = dict[tuple[int, int], Array]  # by (leaf after, leaf before)
Step = tuple[Factors, list[Array], Array | None]  # the last: whether it begins anew


def why_not(cell: Cell, request: Request) -> str | None:
    """Says why this loop cannot run a cell, or ``None`` if it can.

    The answer depends on the shapes of the inputs; if they are not known, eight
    features are assumed.
    """
    if (reason := fused.why_not(cell, request)) is not None:
        return reason
    if type(cell) is Lookup:  # of which only the inner cell sees the carry
        cell, request = cell.cell, request._replace(inputs=None)
    return affine.why_not(cell, request.inputs)


def unroll(
    cell: Any,
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
    """Runs a linear recurrence; see :func:`jlstm.kernels.scan.unroll`."""
    time = jax.tree.leaves(xs)[0].shape[1]
    if time < 2:
        return scan.unroll(
            cell,
            params,
            xs,
            carry,
            fresh,
            mask=mask,
            resets=resets,
            reverse=reverse,
            return_carries=return_carries,
        )
    try:
        pairs = affine.pairs(cell, params, carry, blocks.at(xs, 0, axis=1))
    except affine.NotAffine as problem:
        raise NotImplementedError(
            f"associative: {problem}; use implementation='scan', or None for the "
            "default"
        ) from None
    over_steps = functools.partial(blocks.over_steps, sharded=may_be_sharded())
    tree = jax.tree.structure(carry)

    def update(params: PyTree, step: tuple) -> tuple[PyTree, PyTree]:
        carry, zx = step
        return cell.update(params, carry, zx, cell.mix(params, carry, zx))

    def linear(params: PyTree, step: tuple) -> tuple[Factors, list[Array]]:
        """Finds the factors of a step by one JVP for each leaf, and its summands."""
        zeros, zx = jax.tree.leaves(step[0]), step[1]
        columns, summands = [], zeros
        for j, leaf in enumerate(zeros):

            def along(leaf: Array, j: int = j) -> list[Array]:
                carry = tree.unflatten([*zeros[:j], leaf, *zeros[j + 1 :]])
                return jax.tree.leaves(update(params, (carry, zx))[0])

            summands, column = jax.jvp(along, (leaf,), (jnp.ones_like(leaf),))
            columns.append(column)
        return {(i, j): columns[j][i] for i, j in pairs}, summands

    def block(carry: PyTree, inputs: tuple) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        xs, valid, reset = inputs
        steps = jax.tree.leaves(xs)[0].shape[0]

        def repeat(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf, (steps, *leaf.shape))

        zx = over_steps(cell.project, params, xs, 0)
        zeros = jax.tree.map(lambda leaf: repeat(jnp.zeros_like(leaf)), carry)
        factors, summands = over_steps(linear, params, (zeros, zx), 0)
        if valid is not None:
            summands = zero_rows(valid, summands)
            for (i, j), leaf in factors.items():
                held = jnp.full_like(leaf, i == j)
                factors[i, j] = where_rows(valid, leaf, held)
        each_fresh = jax.tree.map(repeat, fresh) if reset is not None else None
        if reset is not None:
            started = _apply(factors, summands, jax.tree.leaves(each_fresh))
            summands = where_rows(reset, started, summands)
            factors = zero_rows(~reset, factors)
        first = jax.tree.leaves(carry)
        carries = _solve(reverse, reset, factors, summands, first)
        before = tree.unflatten(_before(reverse, carries, first))
        if reset is not None:
            before = where_rows(reset, each_fresh, before)
        ys = zero_rows(valid, over_steps(update, params, (before, zx), 0)[1])
        carries = tree.unflatten(carries)
        last = blocks.at(carries, 0 if reverse else steps - 1, axis=0)
        return last, (ys, carries if return_carries else None)

    if checkpoint_every is not None:
        block = jax.checkpoint(block, prevent_cse=False)
    size = checkpoint_every or blocks.near_divisor(time, _block_size(carry))
    inputs = blocks.time_major((xs, mask, resets))
    carry, outs = blocks.scan_blocks(block, carry, inputs, size, reverse=reverse)
    ys, carries = blocks.time_major(outs)
    return ys, carry, carries


def _block_size(carry: PyTree) -> int:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
    return max(16, BYTES.get(jax.default_backend(), ELSEWHERE) // max(1, size))


def _apply(factors: Factors, summands: list[Array], carry: list[Array]) -> list[Array]:
    """Applies one step, or several combined ones, to a carry."""
    made = list(summands)
    for (i, j), factor in factors.items():
        made[i] = made[i] + factor * carry[j]
    return made


def _then(first: Step, second: Step) -> Step:
    """Combines two steps into one."""
    factors, summands, anew = second
    made: Factors = {}
    for (i, k), left in factors.items():
        for (other, j), right in first[0].items():
            if k == other:
                product = left * right
                made[i, j] = made[i, j] + product if (i, j) in made else product
    both = made, _apply(factors, summands, first[1])
    if anew is None or first[2] is None:
        return *both, None
    return *where_rows(anew, (factors, summands), both), anew | first[2]


def _before(reverse: bool, carries: list[Array], first: list[Array]) -> list[Array]:
    """Returns the carries before each step, given those after each step."""
    if reverse:
        pairs = [(a[1:], b[None]) for a, b in zip(carries, first, strict=True)]
    else:
        pairs = [(b[None], a[:-1]) for a, b in zip(carries, first, strict=True)]
    return [jnp.concatenate(pair) for pair in pairs]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(
    reverse: bool,
    reset: Array | None,
    factors: Factors,
    summands: list[Array],
    first: list[Array],
) -> list[Array]:
    """Returns the carries after each step, given the one before all of them."""
    start = -1 if reverse else 0
    # The effect of the incoming carry on the first step is added to its summand.
    at_start = [leaf[start] for leaf in summands]
    begun = _apply({ij: leaf[start] for ij, leaf in factors.items()}, at_start, first)
    if reset is not None:
        begun = where_rows(reset[start], at_start, begun)
    begun = [
        jnp.concatenate([a[:-1], b[None]] if reverse else [b[None], a[1:]])
        for a, b in zip(summands, begun, strict=True)
    ]
    steps = factors, begun, reset
    return jax.lax.associative_scan(_then, steps, reverse=reverse)[1]


@_solve.defjvp
def _solve_jvp(reverse: bool, primals: tuple, tangents: tuple) -> tuple:
    # JAX's own rule would also compute the tangents of all products of factors.
    reset, factors, _, first = primals
    _, dfactors, dsummands, dfirst = tangents
    carries = _solve(reverse, *primals)
    before = _before(reverse, carries, first)
    if reset is not None:
        before = zero_rows(~reset, before)
    dsummands = _apply(dfactors, dsummands, before)
    return carries, _solve(reverse, reset, factors, dsummands, dfirst)
