r"""The loop of an LSTM in cuDNN, on a CUDA GPU.

It calls ``jax.experimental.rnn.lstm``, which has the same order of gates, transposed
weights, and two biases:

.. math::
    a_i, a_f, a_g, a_o = x W_{ih}^\top + b_{ih} + h W_{hh}^\top + b_{hh}

cuDNN takes padding at the end of rows only, so for the reverse direction the valid
steps of each row are flipped. It fails on a row of length 0; such a row is given one
step, whose results are not used. Each call reads the lengths on the host, which waits
for them.

Products are computed in float32, as on a CPU. They use TensorFloat-32 only if
``jax_default_matmul_precision`` is set to that or to less.

JAX refuses ``vmap``, forward mode and second gradients of this call. The call has not
been run on a GPU yet: the code around it is tested with JAX's reference implementation
in its place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlstm.cells.gates import sigmoid, tanh
from jlstm.cells.lstm import LSTM, LSTMCarry, LSTMParams
from jlstm.kernels import fused
from jlstm.kernels.request import Request
from jlstm.types import Array, Cell, where_rows, zero_rows

PRECISION = "jax_default_matmul_precision"
LOWER = ("default", "high", "bfloat16", "tensorfloat32", "TF32_TF32_F32")


def why_not(cell: Cell, request: Request) -> str | None:
    """Says why this loop cannot run a cell as asked, or ``None`` if it can."""
    if type(cell) is not LSTM:
        return f"runs only an LSTM, got {cell!r}"
    if (cell.activation, cell.gate_activation) != (tanh, sigmoid):
        return "computes only tanh and sigmoid, got other activations"
    if request.mask == "mask":
        return "takes padding only at the end of rows, as lengths; got a mask"
    if request.resets:
        return "cannot restore the fresh carry at resets"
    return request.exceeds("gpu")


def unroll(
    cell: Cell,
    params: LSTMParams,
    xs: Array,
    carry: LSTMCarry,
    fresh: LSTMCarry,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_carries: bool = False,
    checkpoint_every: int | None = None,
) -> tuple[Array, LSTMCarry, None]:
    """Runs an LSTM; see :func:`jlstm.kernels.scan.unroll`."""
    del resets, return_carries, checkpoint_every
    if not xs.size:
        return fused.unroll(cell, params, xs, carry, fresh, mask=mask, reverse=reverse)
    _check_platform()
    lengths, some = jnp.full(xs.shape[:1], xs.shape[1], jnp.int32), None
    if mask is not None:
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        some, lengths = lengths > 0, jnp.maximum(lengths, 1)
    before = zero_rows(some, carry)

    def flip(steps: Array) -> Array:
        if not reverse:
            return steps
        return jnp.flip(steps, axis=1) if mask is None else _flip(steps, lengths)

    weights, precision = pack_lstm(params), _precision()
    ys, h, c = _lstm(
        flip(xs), before.h[None], before.c[None], weights, lengths, precision=precision
    )
    after = LSTMCarry(h[0], c[0])
    if some is not None:
        after = where_rows(some, after, carry)
    return zero_rows(mask, flip(ys)), after, None


def _lstm(
    xs: Array,
    h: Array,
    c: Array,
    weights: Array,
    lengths: Array,
    *,
    precision: jax.lax.Precision,
) -> tuple[Array, Array, Array]:
    """Calls cuDNN: ``xs [B, T, D]``, ``h`` and ``c`` ``[1, B, H]``, ``lengths [B]``."""
    from jax.experimental import rnn  # imported here, so that `import jlstm` is quick

    return rnn.lstm(
        xs,
        h,
        c,
        weights,
        lengths,
        input_size=xs.shape[-1],
        hidden_size=h.shape[-1],
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
        precision=precision,
    )


def pack_lstm(params: LSTMParams) -> Array:
    """Packs params into one vector, as cuDNN has them: ``[4H * (D + H + 2)]``.

    First come the matrices, ``[4H, D]`` and ``[4H, H]``, and then both biases.
    """
    b_hh = jnp.zeros_like(params.b) if params.b_hh is None else params.b_hh
    matrices = params.w_ih.T.ravel(), params.w_hh.T.ravel()
    return jnp.concatenate([*matrices, params.b, b_hh])


def _flip(x: Array, lengths: Array) -> Array:
    """Reverses the valid steps of each row ``[B, T, ...]``; padding stays in place."""
    time = x.shape[1]
    steps = jnp.arange(time, dtype=lengths.dtype)[None]
    order = (lengths[:, None] - 1 - steps) % time

    def take(row: Array, order: Array) -> Array:
        # Each step is taken exactly once, so the gradient needs no atomic sums.
        return row.at[order].get(mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(take)(x, order)


def _precision() -> jax.lax.Precision:
    lower = getattr(jax.config, PRECISION) in LOWER
    return jax.lax.Precision.HIGH if lower else jax.lax.Precision.HIGHEST


def _check_platform() -> None:
    """Refuses a platform on which JAX would run and give wrong results."""
    from jax.extend import backend

    if "rocm" in backend.get_backend().platform_version.lower():
        raise NotImplementedError(
            "cudnn: runs only on CUDA, but the arrays are on ROCm, whose library "
            "orders the gates differently; use implementation='scan', or None for the "
            "default"
        )
