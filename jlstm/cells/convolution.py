"""Convolutions of a step; on a CPU, their gradients are products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jlstm.types import Array

Window = tuple[tuple[int, ...], str, tuple[int, ...]]  # strides, padding, dilation


def convolve(
    x: Array,
    w: Array,
    *,
    strides: Sequence[int] | None = None,
    padding: Literal["SAME", "VALID"] = "SAME",
    dilation: Sequence[int] | None = None,
) -> Array:
    """Convolves ``x [..., *S, D]`` with ``w [*K, D, G]`` over the spatial axes ``*S``.

    Args:
      x: the input; the axes before ``*S`` are batch dimensions.
      w: the kernel: one to three spatial axes, then the channels in and out.
      strides: places between two outputs, one int for each spatial axis; ``None`` means
        1.
      padding: ``"SAME"`` pads with zeros so that strides 1 keep the shape; ``"VALID"``
        does not pad.
      dilation: places between two taps, one int for each spatial axis; ``None`` means
        1.

    Returns:
      An array ``[..., *S', G]``, where ``S'`` is smaller than ``S`` if strides or
      padding make it so.

    Example:
      >>> jlstm.cells.convolve(jnp.ones((2, 8, 8, 3)), jnp.ones((5, 5, 3, 4))).shape
      (2, 8, 8, 4)
    """
    axes = w.ndim - 2
    ones = (1,) * axes
    window = tuple(strides or ones), padding, tuple(dilation or ones)
    sharding = jax.typeof(x).sharding
    on_cpu, in_mesh = jax.default_backend() == "cpu", sharding.mesh.axis_types
    if AxisType.Explicit not in in_mesh:
        return (_convolve_on_cpu if on_cpu else _convolve)(x, w, window)
    if on_cpu:
        return _multiply(x, w, window)
    # Axes that are joined to one batch, here or by vmap, have no explicit sharding.
    spec = PartitionSpec(*sharding.spec[: -1 - axes], *(None,) * (axes + 1))
    run_in_mesh: Any = jax.sharding.auto_axes(_convolve, out_sharding=spec)
    return run_in_mesh(x, w, window)


def _convolve(x: Array, w: Array, window: Window) -> Array:
    axes = w.ndim - 2
    lead, names = x.shape[: -1 - axes], "XYZ"[:axes]
    dtype = jnp.result_type(x, w)  # which a product would find itself
    z = jax.lax.conv_general_dilated(
        x.reshape(math.prod(lead), *x.shape[len(lead) :]).astype(dtype),
        w.astype(dtype),
        window_strides=window[0],
        padding=window[1],
        rhs_dilation=window[2],
        dimension_numbers=(f"N{names}C", f"{names}IO", f"N{names}C"),
    )
    return z.reshape(*lead, *z.shape[1:])


_convolve_on_cpu = jax.custom_jvp(_convolve, nondiff_argnums=(2,))


@_convolve_on_cpu.defjvp
def _convolve_jvp(window: Window, primals: tuple, tangents: tuple) -> tuple:
    # In a loop, XLA's own gradient of a convolution takes 5 to 20 times as long there.
    (x, w), (dx, dw) = primals, tangents
    of_w = jax.checkpoint(partial(_multiply, window=window))  # keeps x, not its patches
    made = _multiply(dx, w, window) + of_w(x, dw)
    return _convolve_on_cpu(x, w, window), made


def _multiply(x: Array, w: Array, window: Window) -> Array:
    """Convolves by one product."""
    return _patches(x, w.shape[:-2], window) @ w.reshape(-1, w.shape[-1])


def _patches(x: Array, kernel: tuple[int, ...], window: Window) -> Array:
    """Joins what a kernel meets at each place, to ``[..., *S, KD]``."""
    axes, (strides, padding, dilation) = len(kernel), window
    spatial = x.shape[-1 - axes : -1]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pads = jax.lax.padtype_to_pads(spatial, spans, strides, padding)
    x = jnp.pad(x, [*((0, 0),) * (x.ndim - 1 - axes), *pads, (0, 0)])
    sizes = [
        (n + sum(pad) - span) // s + 1
        for n, pad, span, s in zip(spatial, pads, spans, strides, strict=True)
    ]

    def met(tap: tuple[int, ...]) -> Array:
        cuts = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, sizes, strides, strict=True)
        ]
        return x[(..., *cuts, slice(None))]

    return jnp.concatenate([met(tap) for tap in np.ndindex(*kernel)], axis=-1)
