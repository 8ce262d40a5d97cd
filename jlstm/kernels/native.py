r"""The loops of an LSTM and of a GRU in C++, on the cores of a CPU.

Each call puts the weights once into the order in which they are read. A step then
computes the gates of a few rows and hidden units in registers. The rows of a batch are
shared among XLA's own threads, which wait for each other only at the end. Masked steps
cost nothing. The loops are for float32; they are there if a C++ compiler was found when
jlstm was installed.

A gradient reads the gates and carries that the forward loop has stored or, with
``checkpoint_every``, computes them again block by block. The gradient of a gradient
uses the fused loop.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.cells.gates import sigmoid, tanh
from jlstm.cells.gru import GRU, GRUCarry, GRUParams
from jlstm.cells.lstm import LSTM, LSTMCarry, LSTMParams
from jlstm.cells.wrappers import Lookup
from jlstm.kernels import fused, library
from jlstm.kernels.blocks import segments
from jlstm.kernels.request import Request
from jlstm.types import Array, Cell, PyTree

# With fewer rows, XLA computes the product with the inputs for all steps at once.
FEW_ROWS = 8
# Larger weights, in elements, leave no room in a core's cache for what they multiply.
LARGE = 1 << 18


def why_not(cell: Cell, request: Request) -> str | None:
    """Says why this loop cannot run a cell as asked, or ``None`` if it can."""
    if type(cell) is Lookup and request.checkpoint_every:
        return (
            "would store the projected inputs of all steps, so it cannot honour "
            "checkpoint_every with an embedding"
        )
    if type(cell) is Lookup:
        floats = {d for d in request.dtypes or () if jnp.issubdtype(d, jnp.inexact)}
        cell, request = cell.cell, request._replace(dtypes=frozenset(floats) or None)
    if type(cell) is not LSTM and type(cell) is not GRU:
        return f"has loops only for LSTM and GRU, got {cell!r}"
    if (cell.activation, cell.gate_activation) != (tanh, sigmoid):
        return "computes only tanh and sigmoid, got other activations"
    if isinstance(cell, GRU) and not cell.reset_after:
        return "has no loop for a GRU with reset_after=False"
    request = request._replace(checkpoint_every=False)  # blocks are cut outside
    return request.exceeds("cpu") or library.why_not()


class Args(NamedTuple):
    """What a loop reads and differentiates; absent arrays have no elements."""

    xs: Array  # [B, T, D]; or [B, T, G], projected already, if w_ih has no elements
    w_ih: Array  # [D, G]
    w_hh: Array  # [H, G]
    bias: Array  # [G]
    bias_n: Array  # [H], inside r * (.) of a GRU
    h: Array  # [B, H]
    c: Array  # [B, H], of an LSTM
    fresh_h: Array  # [B, H]
    fresh_c: Array  # [B, H], of an LSTM


class Flags(NamedTuple):
    """Booleans of steps, ``[B, T]``; absent ones have no elements."""

    mask: Array
    resets: Array


class Out(NamedTuple):
    """The outputs and the final carry."""

    ys: Array  # [B, T, H]
    h: Array  # [B, H]
    c: Array  # [B, H], of an LSTM


class Kept(NamedTuple):
    """What the forward loop stores for the backward loop."""

    ys: Array  # [B, T, H]
    gates: Array  # [B, T, 4H]; of a GRU r, z, the part of n inside r * (.), and n
    before_c: Array  # [B, T, H], c before each step, of an LSTM


class Carries(NamedTuple):
    """What is stored instead if blocks of steps are computed again."""

    h: Array  # [K, B, H], before each block
    c: Array


class Static(NamedTuple):
    """What is known when a loop is traced."""

    gru: bool
    reverse: bool
    checkpoint_every: int | None = None


def unroll(
    cell: Cell,
    params: PyTree,
    xs: Array,
    carry: PyTree,
    fresh: PyTree,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_carries: bool = False,
    checkpoint_every: int | None = None,
) -> tuple[Array, PyTree, None]:
    """Runs an LSTM or a GRU; see :func:`jlstm.kernels.scan.unroll`."""
    del return_carries
    if not xs.size:
        return fused.unroll(
            cell,
            params,
            xs,
            carry,
            fresh,
            mask=mask,
            resets=resets,
            reverse=reverse,
            checkpoint_every=checkpoint_every,
        )
    gru = isinstance(cell.cell if isinstance(cell, Lookup) else cell, GRU)
    none = jnp.zeros((0,), np.float32)
    if isinstance(cell, Lookup):
        xs, params = cell.project(params, xs), params.cell
        w_ih, bias = none, jnp.zeros_like(params.b)  # xs has it already
    else:
        w_ih, bias = params.w_ih, params.b
        if not gru and params.b_hh is not None:
            bias = bias + params.b_hh
    bias_n = none
    if gru:
        size = params.w_hh.shape[0]
        bias_n = jnp.zeros((size,), np.float32)
        if params.b_hh is not None:
            bias_n = params.b_hh[-size:]
            bias = bias.at[: params.b_hh.size - size].add(params.b_hh[:-size])
    args = Args(
        xs,
        w_ih,
        params.w_hh,
        bias,
        bias_n,
        *_carry(carry, none),
        *_carry(fresh, none),
    )
    no_flags = jnp.zeros((0,), bool)
    flags = Flags(*(no_flags if flag is None else flag for flag in (mask, resets)))
    out: Any = _run(Static(gru, reverse, checkpoint_every), args, flags)
    carry = GRUCarry(out.h) if gru else LSTMCarry(out.h, out.c)
    return out.ys, carry, None


def _carry(carry: PyTree, none: Array) -> tuple[Array, Array]:
    return carry.h, getattr(carry, "c", none)


# Three functions with gradients of their own, each of which uses the next: the outputs;
# the outputs and what the backward loop reads, without cotangent; and the gradients.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: Static, args: Args, flags: Flags) -> Out:
    return _forward(static, args, flags, keep=False)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_and_keep(static: Static, args: Args, flags: Flags) -> tuple:
    if static.checkpoint_every is None:
        return _forward(static, args, flags, keep=True)
    return _forward_in_blocks(static, args, flags)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    static: Static, args: Args, flags: Flags, kept: Kept | Carries, cotangents: Out
) -> Args:
    return _backward(static, args, flags, kept, cotangents)


def _run_fwd(static: Static, args: Args, flags: Flags) -> tuple:
    made: Any = _run_and_keep(static, args, flags)
    return made[0], (args, flags, made[1])


def _run_bwd(static: Static, saved: tuple, cotangents: Out) -> tuple:
    return _gradients(static, *saved, cotangents), None


def _run_and_keep_fwd(static: Static, args: Args, flags: Flags) -> tuple:
    made: Any = _run_and_keep(static, args, flags)
    return made, (args, flags, made[1])


def _run_and_keep_bwd(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    return _run_bwd(static, saved, cotangents[0])


def _gradients_fwd(
    static: Static, args: Args, flags: Flags, kept: Kept, cotangents: Out
) -> tuple:
    made = _gradients(static, args, flags, kept, cotangents)
    return made, (args, flags, kept, cotangents)


def _gradients_bwd(static: Static, saved: tuple, cotangents: Args) -> tuple:
    args, flags, kept, before = saved

    def gradients(args: Args, cotangents: Out) -> Args:
        return jax.vjp(lambda args: _reference(static, args, flags), args)[1](
            cotangents
        )[0]

    by_args, by_cotangents = jax.vjp(gradients, args, before)[1](cotangents)
    # What was stored follows from the arguments, whose gradient covers it already.
    return by_args, None, jax.tree.map(jnp.zeros_like, kept), by_cotangents


def _reference(static: Static, args: Args, flags: Flags) -> Out:
    size, columns = args.w_hh.shape
    w_ih = args.w_ih if args.w_ih.size else jnp.eye(columns, dtype=np.float32)
    if static.gru:
        cell, carries = GRU(size), (GRUCarry(args.h), GRUCarry(args.fresh_h))
        params = GRUParams(w_ih, args.w_hh, args.bias, args.bias_n)
    else:
        cell = LSTM(size)
        carries = LSTMCarry(args.h, args.c), LSTMCarry(args.fresh_h, args.fresh_c)
        params = LSTMParams(w_ih, args.w_hh, args.bias)
    mask, resets = (flag if flag.size else None for flag in flags)
    ys, carry, _ = fused.unroll(
        cell,
        params,
        args.xs,
        *carries,
        mask=mask,
        resets=resets,
        reverse=static.reverse,
    )
    return Out(ys, *_carry(carry, args.c))


_run.defvjp(_run_fwd, _run_bwd)
_run_and_keep.defvjp(_run_and_keep_fwd, _run_and_keep_bwd)
_gradients.defvjp(_gradients_fwd, _gradients_bwd)


# Blocks of steps that are computed again for their gradients.


def _size(static: Static) -> int:
    assert static.checkpoint_every is not None
    return static.checkpoint_every


def _forward_in_blocks(static: Static, args: Args, flags: Flags) -> tuple[Out, Carries]:
    # A loop of XLA, which leaves out the outputs if nothing reads them.
    time, every = args.xs.shape[1], _size(static)

    def run(state: tuple[Out, Carries], start: Array, steps: int) -> tuple:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, steps, 1) if x.size else x

        before, kept = state
        now = args._replace(xs=cut(args.xs), h=before.h, c=before.c)
        out, _ = _forward(static, now, jax.tree.map(cut, flags), keep=False)
        ys = jax.lax.dynamic_update_slice_in_dim(before.ys, out.ys, start, 1)
        kept = Carries(
            kept.h.at[start // every].set(before.h),
            kept.c.at[start // every].set(before.c),
        )
        return (out._replace(ys=ys), kept), None

    shape = (*args.xs.shape[:2], args.w_hh.shape[0])
    ys = library.memory(jax.ShapeDtypeStruct(shape, np.float32))
    count = -(-time // every)
    kept = Carries(*(jnp.zeros((count, *x.shape), x.dtype) for x in (args.h, args.c)))
    state = Out(ys, args.h, args.c), kept
    cuts = segments(time, every)
    for start, blocks, steps in reversed(cuts) if static.reverse else cuts:
        starts = start + steps * jnp.arange(blocks)
        body = partial(run, steps=steps)
        state, _ = jax.lax.scan(body, state, starts, reverse=static.reverse)
    return state


# Calls of the library.


def _forward(
    static: Static, args: Args, flags: Flags, *, keep: bool
) -> tuple[Out, Kept]:
    lead, size = args.xs.shape[:2], args.w_hh.shape[0]
    each, none = (*lead, size), (0,)
    gates = (*lead, 4 * size) if keep else none
    before_c = each if keep and not static.gru else none
    if args.w_ih.size and lead[0] < FEW_ROWS and lead[1] > 1:
        projected = args.xs @ args.w_ih
        args = args._replace(xs=projected, w_ih=jnp.zeros(none, projected.dtype))
    shapes = (each, args.h.shape, args.c.shape, gates, before_c)
    ys, h, c, gates, before_c = _call("jlstm_forward", shapes, static, *args, *flags)
    return Out(ys, h, c), Kept(ys, gates, before_c)


def _backward(
    static: Static, args: Args, flags: Flags, kept: Kept | Carries, cotangents: Out
) -> Args:
    lead, features = args.xs.shape[:2], args.xs.shape[2]
    size, columns = args.w_hh.shape
    none, every = (0,), lead[1]
    stored, before = Kept(*(jnp.zeros(none, np.float32) for _ in Kept._fields)), args
    again = [none] * 3
    if isinstance(kept, Kept):
        stored = kept
        # For larger weights XLA computes the product once all cotangents are there.
        inputs = 0 < args.w_ih.size < LARGE
    else:
        every = min(every, _size(static))
        before = args._replace(h=kept.h, c=kept.c)
        each = (lead[0], every, size)
        again = [each, (*each[:2], 4 * size), none if static.gru else each]
        inputs = args.w_ih.size > 0
    # Results may take over the memory of what a step has read already: cotangents of
    # inputs that of outputs, and cotangents of an LSTM's gates that of the gates.
    aliases = {}
    if inputs and args.xs.shape == cotangents.ys.shape:
        aliases = {12: 0}
    elif not inputs and isinstance(kept, Kept) and not static.gru:
        aliases = {10: 0}
    carry = (args.h.shape, args.c.shape)
    dxs, dw_ih, dw_hh, dbias, dh, dc, dfresh_h, dfresh_c, *_ = _call(
        "jlstm_backward",
        (
            (*lead, features if inputs else columns),
            args.w_ih.shape,
            args.w_hh.shape,
            (4 * size,),
            *carry,
            *(carry if flags.resets.size else (none, none)),
            *again,
        ),
        static,
        *before,
        *stored,
        *cotangents,
        *flags,
        aliases=aliases,
        every=np.int64(every),
        inputs=inputs,
    )
    if args.w_ih.size and not inputs:
        dxs = dxs @ args.w_ih.T
    if not flags.resets.size:
        dfresh_h, dfresh_c = jnp.zeros_like(dh), jnp.zeros_like(dc)
    return Args(
        xs=dxs,
        w_ih=dw_ih,
        w_hh=dw_hh,
        bias=dbias[:columns],
        bias_n=dbias[columns:],
        h=dh,
        c=dc,
        fresh_h=dfresh_h,
        fresh_c=dfresh_c,
    )


def _call(
    name: str,
    shapes: tuple,
    static: Static,
    *args: Array,
    aliases: Any = None,
    **options: Any,
) -> list[Array]:
    results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    options = {"gru": static.gru, "reverse": static.reverse, **options}
    return library.call(name, results, *args, aliases=aliases, **options)
