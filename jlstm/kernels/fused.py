r"""The gated loop: one ``custom_vjp`` for every cell in gated form.

With :math:`u_t = \mathrm{update}(\theta, s_{t-1}, z^x_t, z^h_t)` and
:math:`z^h_t = \mathrm{mix}(\theta, s_{t-1}, z^x_t)`, the reverse loop carries only the
cotangent of the carry :math:`s` and writes the cotangents of :math:`z^x` and
:math:`z^h` to a buffer. What it leaves out of the loop is computed for all T at once:
``project`` and its gradients by plain autodiff, and the gradients of the params in
``mix`` and ``update`` by one VJP of each, vmapped over time, which XLA sees as large
matrix products.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlstm.types import (
    PARTS,
    Array,
    Cell,
    PyTree,
    gated,
    is_inexact,
    join,
    smooth_leaves,
    where_rows,
    zero_rows,
)


def why_not(cell: Cell) -> str | None:
    """Says why this loop cannot run a cell, or ``None`` if it can."""
    if gated(cell):
        return None
    return f"{cell!r} has no gated form ({', '.join(PARTS)})"


class Static(NamedTuple):
    """What is known when the loop is traced."""

    cell: Any
    reverse: bool
    return_carries: bool


class Loop(NamedTuple):
    """The arguments of the loop, as one pytree."""

    params: PyTree
    zx: PyTree  # [T, B, ...]
    carry: PyTree  # [B, ...]
    fresh: PyTree  # [B, ...]
    mask: Array | None  # [T, B]
    resets: Array | None  # [T, B]


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
    """Runs a gated cell over a sequence; see :func:`jlstm.kernels.scan.unroll`."""
    zx = jax.vmap(cell.project, in_axes=(None, 0))(params, xs)  # type: ignore
    loop = Loop(params, zx, carry, fresh, mask, resets)
    return _run(Static(cell, reverse, return_carries), *_split(loop))


# Integers (a step counter in the carry, token ids in zx) have no cotangent. A tree is
# therefore split in two of the same structure, with None in each where the other has a
# leaf: None is an empty subtree, so that vjp, scan and vmap never meet such leaves.


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    rest = jax.tree.map(lambda leaf: None if is_inexact(leaf) else leaf, tree)
    return smooth_leaves(tree), rest


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: Static, smooth: Loop, rest: Loop) -> tuple:
    return _forward(static, join(smooth, rest))[0]


def _forward(static: Static, loop: Loop) -> tuple:
    cell = static.cell

    def body(carry: PyTree, inputs: tuple) -> tuple:
        zx, valid, reset = inputs
        if reset is not None:
            carry = where_rows(reset, loop.fresh, carry)
        zh = cell.mix(loop.params, carry, zx)
        new, y = cell.update(loop.params, carry, zx, zh)
        if valid is not None:
            new, y = where_rows(valid, new, carry), zero_rows(valid, y)
        return new, (y, new if static.return_carries else None, carry, zh)

    inputs = (loop.zx, loop.mask, loop.resets)
    carry, stacks = jax.lax.scan(body, loop.carry, inputs, reverse=static.reverse)
    ys, carries, before, zh = stacks
    return (ys, carry, carries), (before, zh)


def _run_fwd(static: Static, smooth: Loop, rest: Loop) -> tuple:
    loop = join(smooth, rest)
    out, (before, zh) = _forward(static, loop)
    return out, (loop, before, zh)


def _run_bwd(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    cell, (loop, before, zh) = static.cell, saved
    dys, dcarry, dcarries = (smooth_leaves(tree) for tree in cotangents)
    params_smooth, params_rest = _split(loop.params)

    # Both parts as functions of smooth arguments, with smooth results. The other
    # leaves of (carry, zx, zh) ride along as `rest`.
    def mix(params: PyTree, carry_zx: PyTree, rest: PyTree) -> PyTree:
        params = join(params, params_rest)
        return smooth_leaves(cell.mix(params, *join(carry_zx, rest)))

    def update(params: PyTree, parts: PyTree, rest: PyTree) -> PyTree:
        params = join(params, params_rest)
        return smooth_leaves(cell.update(params, *join(parts, rest)))

    def body(cotangent: tuple, inputs: tuple) -> tuple:
        dcarry, dfresh = cotangent
        parts, valid, reset, dy, dafter = inputs
        dnew = dcarry if dafter is None else _add(dcarry, dafter)
        dout = (zero_rows(valid, dnew), zero_rows(valid, dy))
        (carry, zx, zh), rest = _split(parts)
        _, pull = jax.vjp(lambda p: update(params_smooth, p, rest), (carry, zx, zh))
        (dbefore, dzx, dzh) = pull(dout)[0]
        _, pull = jax.vjp(lambda p: mix(params_smooth, p, rest[:2]), (carry, zx))
        through_mix, through_zx = pull(dzh)[0]
        dbefore, dzx = _add(dbefore, through_mix), _add(dzx, through_zx)
        if valid is not None:
            dbefore = _add(dbefore, zero_rows(~valid, dnew))
        if reset is not None:
            dfresh = _add(dfresh, zero_rows(reset, dbefore))
            dbefore = zero_rows(~reset, dbefore)
        return (dbefore, dfresh), (dzx, dzh, dout)

    parts = (before, loop.zx, zh)
    zeros = jax.tree.map(jnp.zeros_like, smooth_leaves(loop.fresh))
    inputs = (parts, loop.mask, loop.resets, dys, dcarries)
    (dcarry, dfresh), (dzx, dzh, douts) = jax.lax.scan(
        body, (dcarry, zeros), inputs, reverse=not static.reverse
    )

    # The gradients of the params, for all T at once.
    smooth, rest = _split(parts)
    over_time = partial(jax.vmap, in_axes=(None, 0, 0))
    _, pull = jax.vjp(lambda p: over_time(update)(p, smooth, rest), params_smooth)
    dparams = pull(douts)[0]
    _, pull = jax.vjp(lambda p: over_time(mix)(p, smooth[:2], rest[:2]), params_smooth)
    dparams = _add(dparams, pull(dzh)[0])
    return Loop(dparams, dzx, dcarry, dfresh, None, None), None


_run.defvjp(_run_fwd, _run_bwd)
