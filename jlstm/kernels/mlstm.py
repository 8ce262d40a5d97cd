r"""The loops of an mLSTM that process many steps at once, as attention does.

Consider a chunk of steps that begins with the memory :math:`C_0`, and let
:math:`F_t = \sum_{r \le t} \log f_r`. After step t the memory holds what step s wrote
with the weight :math:`e^{D_{ts}}`, and :math:`C_0` with the weight :math:`e^{g_t}`,

.. math::
    D_{ts} = F_t - F_s + \log i_s, \qquad g_t = F_t + m_0

With the stabiliser :math:`m_t = \max(\max_{s \le t} D_{ts},\, g_t)`, the same as in the
step form, a query reads

.. math::
    q_t C_t e^{-m_t} = \sum_{s \le t} e^{D_{ts} - m_t} (q_t \cdot k_s)\, v_s
        + e^{g_t - m_t} q_t C_0

and likewise for :math:`n`. ``"parallel"`` takes the whole sequence as one chunk, whose
work grows with the square of its length. ``"chunkwise"`` hands the carry from chunk to
chunk.

A masked step has :math:`\log f = 0` and :math:`\log i = -\infty`. A reset begins with
the fresh carry, and separates the steps before it from those after. Numbers that are
not finite are taken out of the products, where a weight of zero would not stop them,
and the steps that they reach become NaN.

JAX differentiates these loops, in every mode.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlstm.cells.mlstm import MLSTM, MLSTMCarry, MLSTMGates, mlstm_gates, mlstm_read
from jlstm.cells.wrappers import Lookup, Precision
from jlstm.kernels import blocks, scan
from jlstm.kernels.request import Request, may_be_sharded
from jlstm.types import Array, Cell, PyTree, where_rows, zero_rows


def _inner(cell: Any) -> Any:
    while type(cell) in (Precision, Lookup):
        cell = cell.cell
    return cell


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A loop over chunks.

    Attributes:
      steps: the number of steps of a chunk; ``None`` makes one chunk of all.
    """

    steps: int | None

    def why_not(self, cell: Cell, request: Request) -> str | None:
        """Says why this loop cannot run a cell as asked, or ``None`` if it can."""
        if type(_inner(cell)) is not MLSTM:
            return f"runs only an MLSTM, got {cell!r}"
        if self.steps is None and request.checkpoint_every:
            return "computes all steps at once, so it cannot honour checkpoint_every"
        return None

    def unroll(
        self,
        cell: Any,
        params: PyTree,
        xs: PyTree,
        carry: MLSTMCarry,
        fresh: MLSTMCarry,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        reverse: bool = False,
        return_carries: bool = False,
        checkpoint_every: int | None = None,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Runs an mLSTM; see :func:`jlstm.kernels.scan.unroll`."""
        time = jax.tree.leaves(xs)[0].shape[1]
        if time < 2:
            options: Any = {"mask": mask, "resets": resets, "reverse": reverse}
            options["return_carries"] = return_carries
            return scan.unroll(cell, params, xs, carry, fresh, **options)
        sharded, exp_forget = may_be_sharded(), _inner(cell).exp_forget
        first = blocks.at(xs, 0, axis=1)
        like = jax.eval_shape(cell.step, params, carry, first)

        def chunk(carry: MLSTMCarry, inputs: tuple) -> tuple[MLSTMCarry, tuple]:
            xs, valid, reset = _flip(inputs) if reverse else inputs
            zx = blocks.over_steps(cell.project, params, xs, 0, sharded=sharded)
            before, begun = jax.tree.map(lambda a: a.astype(zx.dtype), (carry, fresh))
            sound = _finite(zx, 2), _finite(before, 1)
            zx, before = zero_rows(sound[0], zx), zero_rows(sound[1], before)
            gates = mlstm_gates(zx, carry.c.shape[-3:], exp_forget)
            carries, ys = _chunk(
                gates, before, begun, valid, reset, sound, every=return_carries
            )
            made = carries, zero_rows(valid, ys)
            carries, ys = jax.tree.map(lambda a, b: a.astype(b.dtype), made, like)
            outs = ys, carries if return_carries else None
            last = jax.tree.map(lambda leaf: leaf[-1], carries)
            return last, _flip(outs) if reverse else outs

        if checkpoint_every is not None:
            chunk = jax.checkpoint(chunk, prevent_cse=False)
        size = checkpoint_every or min(time, self.steps or time)
        inputs = blocks.time_major((xs, mask, resets))
        carry, outs = blocks.scan_blocks(chunk, carry, inputs, size, reverse=reverse)
        ys, carries = blocks.time_major(outs)
        return ys, carry, carries


# The steps of a chunk: more mean more work for each, fewer carry the memory more often.
CHUNKWISE, PARALLEL = Chunks(64), Chunks(None)


def _finite(tree: PyTree, axes: int) -> Array:
    """Tells which rows, or steps of rows, have finite numbers only."""
    flags = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree)]
    each = [f.all(axis=tuple(range(axes, f.ndim))) for f in flags]
    return functools.reduce(jnp.logical_and, each)


def _flip(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[::-1], tree)


def _sums(x: Array) -> tuple[Array, Array]:
    """Returns cumulative sums, and their rounding errors.

    A sum of many steps is large, and the difference of two would have its errors.
    """

    def add(a: tuple, b: tuple) -> tuple[Array, Array]:
        total = a[0] + b[0]
        part = total - a[0]
        error = (a[0] - (total - part)) + (b[0] - part)
        return total, a[1] + b[1] + jax.lax.stop_gradient(error)

    return jax.lax.associative_scan(add, (x, jnp.zeros_like(x)), axis=-1)


def _chunk(
    gates: MLSTMGates,
    before: MLSTMCarry,
    fresh: MLSTMCarry,
    valid: Array | None,
    reset: Array | None,
    sound: tuple[Array, Array],
    *,
    every: bool,
) -> tuple[MLSTMCarry, Array]:
    """Processes the steps of a chunk, ``[k, B, ...]``, in the order of time.

    ``sound`` says of which steps, and of which rows of ``before``, the numbers are
    finite; the others hold zeros instead.

    Returns:
      The carries after every step, or after the last only, and the outputs.
    """
    q, k, v, o, log_i, log_f = gates
    if valid is not None:
        log_i, log_f = where_rows(valid, log_i, -jnp.inf), zero_rows(valid, log_f)
    log_i, log_f = (jnp.moveaxis(z, 0, -1) for z in (log_i, log_f))  # [B, N, k]
    total, error = _sums(log_f)
    steps = jnp.arange(len(q))
    seen = (steps[None, :] <= steps[:, None])[None]  # [B, t, s]
    begun = jnp.ones((1, len(q)), bool)  # whether the carry before still counts
    # The weights of carries at each step: the one before, and fresh ones after resets.
    carries = [(total + error + before.m[..., None], before)]
    if reset is not None:
        segment = jnp.cumsum(reset.T, axis=-1, dtype=jnp.int32)  # [B, k]
        together = segment[:, :, None] == segment[:, None, :]
        seen &= together
        begins = (together & reset.T[:, None, :]).astype(total.dtype)
        later = total - jnp.einsum("bts,bns->bnt", begins, total)
        later += error + jnp.einsum("bts,bns->bnt", begins, log_f - error)
        later += fresh.m[..., None]
        begun = segment == 0
        carries = [
            (jnp.where(begun[:, None], carries[0][0], -jnp.inf), before),
            (jnp.where(begun[:, None], -jnp.inf, later), fresh),
        ]
    spoilt = (seen & ~sound[0].T[:, None]).any(-1) | (begun & ~sound[1][:, None])
    written = total[..., :, None] - total[..., None, :]
    written += error[..., :, None] + (log_i - error)[..., None, :]
    written = jnp.where(seen[:, None], written, -jnp.inf)
    m = written.max(-1)
    for weight, _ in carries:
        m = jnp.maximum(m, weight)
    written = jnp.exp(written - m[..., None])

    # What the queries read, and then the memory itself.
    scores = jnp.einsum("tbnk,sbnk->bnts", q, k) * written
    values, weights = jnp.einsum("bnts,sbnv->tbnv", scores, v), scores.sum(-1)
    ends = slice(None) if every else slice(-1, None)
    keys = jnp.einsum("bnts,sbnk->tsbnk", written[..., ends, :], k)
    c, n = jnp.einsum("tsbnk,sbnv->tbnkv", keys, v), keys.sum(1)
    for weight, carry in carries:
        held = jnp.moveaxis(jnp.exp(weight - m), -1, 0)[..., None]  # [k, B, N, 1]
        asked = held * q
        weights += jnp.einsum("tbnk,bnk->bnt", asked, carry.n)
        values += jnp.einsum("tbnk,bnkv->tbnv", asked, carry.c)
        n += held[ends] * carry.n[None]
        c += held[ends][..., None] * carry.c[None]
    weights, m = (jnp.moveaxis(z, -1, 0) for z in (weights, m))

    unit = jnp.where(spoilt.T, jnp.nan, jnp.ones_like(spoilt.T, m.dtype))

    def spoil(flags: Array, leaf: Array) -> Array:
        return leaf * flags.reshape(*flags.shape, *(1,) * (leaf.ndim - 2))

    carries = MLSTMCarry(c, n, m[ends])
    carries = jax.tree.map(functools.partial(spoil, unit[ends]), carries)
    return carries, spoil(unit, mlstm_read(o, values, weights, m))
