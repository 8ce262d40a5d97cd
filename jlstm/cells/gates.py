"""Arithmetic that cell authors share: products, normalisation, gates."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.types import Array, common_dtype


def affine(x: Array, w: Array, b: Array | None = None) -> Array:
    """Computes ``x @ w + b`` for ``x [..., D]``, ``w [D, G]``, ``b [G]``.

    Example:
      >>> jlstm.affine(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4)).shape
      (2, 4)
    """
    z = x @ w
    return z if b is None else add_vector(z, b)


def add_vector(z: Array, b: Array) -> Array:
    """Adds ``b [G]`` to ``z [..., G]``, legal where rank promotion is refused."""
    return z + row(b, z)


def heads_product(h: Array, w_hh: Array) -> Array:
    """Computes ``h @ w_hh`` head by head, for ``h [..., H]`` and ``w_hh [N, H/N, G]``.

    The result, ``[..., NG]``, has in each of the ``GN/H`` gates one head after the
    other, where those of ``w_hh`` have one gate after the other.

    Example:
      >>> jlstm.cells.heads_product(jnp.ones((2, 6)), jnp.ones((3, 2, 8))).shape
      (2, 24)
    """
    heads, size, width = w_hh.shape
    # One product a head: a batched one is slower on a CPU, and cannot run in C++.
    weights = [w.reshape(size, width) for w in jnp.split(w_hh, heads)]
    pairs = zip(jnp.split(h, heads, axis=-1), weights, strict=True)
    by_head = [jnp.split(part @ w, width // size, axis=-1) for part, w in pairs]
    by_gate = zip(*by_head, strict=True)
    return jnp.concatenate([part for gate in by_gate for part in gate], axis=-1)


def normalise(z: Array, gamma: Array) -> Array:
    r"""Computes :math:`\gamma \odot (z - \mu) / \sqrt{\sigma^2 + 10^{-5}}`.

    The moments are those of the last axis, in float32 at least.

    Example:
      >>> jlstm.cells.normalise(jnp.array([1.0, 3.0]), jnp.ones(2)).round(3).tolist()
      [-1.0, 1.0]
    """
    wide = z.astype(common_dtype(z.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(variance + 1e-5)
    return scaled.astype(z.dtype) * row(gamma, z)


def row(v: Array, z: Array) -> Array:
    """Shapes ``v [G]`` to meet ``z [..., G]``, also where rank promotion is refused.

    Example:
      >>> jlstm.row(jnp.ones(4), jnp.ones((2, 3, 4))).shape
      (1, 1, 4)
    """
    return v.reshape((1,) * (z.ndim - 1) + v.shape)


def fresh(
    learned: Array | None, size: int, batch_shape: tuple[int, ...], like: Array
) -> Array:
    """Makes a leaf ``[*batch_shape, H]`` of the fresh carry: learned, or zeros.

    Args:
      learned: ``[H]``, or None.
      size: ``H``.
      batch_shape: the batch dimensions.
      like: an array of the dtype.

    Example:
      >>> jlstm.fresh(None, 4, (2,), jnp.ones(3)).shape
      (2, 4)
    """
    leaf = jnp.zeros((size,), like.dtype) if learned is None else learned
    return jnp.broadcast_to(leaf, (*batch_shape, size))


class Named(NamedTuple):
    """What a step computed under a name, for :mod:`jlstm.diagnostics`."""

    name: str
    kind: str  # "s" of a sigmoid, "t" of a tanh, "" of anything else
    value: Array


_named: contextvars.ContextVar[list[Named] | None] = contextvars.ContextVar(
    "named", default=None
)


@contextlib.contextmanager
def naming() -> Iterator[list[Named]]:
    """Collects what the steps inside name: gates, and what :func:`named` is given.

    A step must run in the trace that reads the list.
    """
    collected: list[Named] = []
    token = _named.set(collected)
    try:
        yield collected
    finally:
        _named.reset(token)


def named(name: str, value: Array, activation: Any = None) -> Array:
    """Returns ``value``, under a name that :func:`jlstm.diagnostics.trace` shows.

    For what a cell computes without :func:`gates`. Nothing else depends on it, and
    outside a trace it does nothing.

    Args:
      name: of the gate.
      value: ``[..., H]``.
      activation: the function it came from, which tells its range: that of
        :func:`sigmoid` is 0 to 1, that of :func:`tanh` -1 to 1, others have none.

    Example:
      >>> jlstm.named("n", jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    collected = _named.get()
    if collected is not None:
        collected.append(Named(name, _kind(activation), value))
    return value


def _kind(activation: Any) -> str:
    if activation in (sigmoid, jax.nn.sigmoid):
        return "s"
    return "t" if activation in (tanh, jnp.tanh, jax.nn.tanh) else ""


def _name_gates(
    parts: tuple[Array, ...],
    kinds: str,
    names: Sequence[str] | None,
    functions: dict[str, Any],
) -> tuple[Array, ...]:
    collected = _named.get()
    if collected is not None:
        if names is None:
            first = sum(each.name[1:].isdigit() for each in collected)
            names = [f"{kind}{first + i}" for i, kind in enumerate(kinds)]
        for name, kind, part in zip(names, kinds, parts, strict=True):
            collected.append(Named(name, _kind(functions[kind]), part))
    return parts


def gates(
    z: Array, kinds: str, names: Sequence[str] | None = None
) -> tuple[Array, ...]:
    r"""Splits pre-activations into gates and applies their activations.

    One :math:`\tanh` over the whole block, since
    :math:`\sigma(x) = \tfrac12 + \tfrac12 \tanh(x/2)`: XLA vectorises it where it does
    not vectorise a sigmoid of a slice. The derivative is written in terms of the
    results, :math:`\sigma' = \sigma - \sigma^2` and :math:`\tanh' = 1 - \tanh^2`, so
    that a backward pass stores them and nothing else. Where an ``update`` needs parts
    of ``zx`` or ``zh``, take them by ``jnp.split``: the transpose of a slice pads with
    zeros, which XLA does not vectorise either.

    Args:
      z: pre-activations ``[..., len(kinds) * H]``.
      kinds: one letter a gate, ``s`` for a sigmoid and ``t`` for a tanh.
      names: one a gate, for :func:`jlstm.diagnostics.trace`: a string of letters, such
        as ``"ifgo"``, or a sequence of words.

    Returns:
      One array ``[..., H]`` a gate.

    Raises:
      ValueError: another letter, a last axis that does not divide, or another number
        of names.

    Example:
      >>> i, f, g, o = jlstm.gates(jnp.zeros((2, 12)), "ssts")
      >>> float(i[0, 0]), float(g[0, 0])
      (0.5, 0.0)
    """
    count = len(kinds)
    if not kinds or set(kinds) - set("st"):
        raise ValueError(f"gates: kinds must be letters s and t, got {kinds!r}")
    if z.shape[-1] % count:
        raise ValueError(
            f"gates: the last axis must be a multiple of {count} ({kinds!r}), got "
            f"{list(z.shape)}"
        )
    if names is not None and len(names) != count:
        raise ValueError(
            f"gates: names must be {count}, one a gate of {kinds!r}, got {names!r}"
        )
    functions = {"s": sigmoid, "t": tanh}
    return _name_gates(_activate(z, kinds), kinds, names, functions)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _activate(z: Array, kinds: str) -> tuple[Array, ...]:
    count = len(kinds)
    if set(kinds) == {"t"}:
        return tuple(jnp.split(jnp.tanh(z), count, axis=-1))
    sigmoid = np.repeat([kind == "s" for kind in kinds], z.shape[-1] // count)
    sigmoid = sigmoid.reshape((1,) * (z.ndim - 1) + sigmoid.shape)
    scale = jnp.asarray(np.where(sigmoid, 0.5, 1.0), z.dtype)
    shift = jnp.asarray(np.where(sigmoid, 0.5, 0.0), z.dtype)
    return tuple(jnp.split(jnp.tanh(z * scale) * scale + shift, count, axis=-1))


@_activate.defjvp
def _activate_jvp(kinds: str, primals: tuple, tangents: tuple) -> tuple:
    parts = _activate(primals[0], kinds)
    results = []
    for kind, a, d in zip(
        kinds, parts, jnp.split(tangents[0], len(kinds), axis=-1), strict=True
    ):
        # Products of d with a alone: d * (1 - a * a) would store 1 - a * a beside a.
        scaled = d * a
        results.append(scaled - scaled * a if kind == "s" else d - scaled * a)
    return parts, tuple(results)


def activate(
    z: Array,
    kinds: str,
    activation: Callable[[Array], Array],
    gate_activation: Callable[[Array], Array],
    names: Sequence[str] | None = None,
) -> tuple[Array, ...]:
    """Does what :func:`jlstm.gates` does, with other functions for its letters.

    Args:
      z: pre-activations ``[..., len(kinds) * H]``.
      kinds: one letter a gate, as in :func:`jlstm.gates`.
      activation: for each ``t``; with :func:`tanh` and :func:`sigmoid`, all is done in
        one go.
      gate_activation: for each ``s``.
      names: as in :func:`gates`.

    Example:
      >>> i, g = jlstm.activate(jnp.ones((2, 8)), "st", jax.nn.relu, jlstm.sigmoid)
      >>> float(g[0, 0])
      1.0
    """
    if activation is tanh and gate_activation is sigmoid:
        return gates(z, kinds, names)
    pairs = zip(kinds, jnp.split(z, len(kinds), axis=-1), strict=True)
    functions = {"s": gate_activation, "t": activation}
    parts = tuple(functions[kind](part) for kind, part in pairs)
    return _name_gates(parts, kinds, names, functions)


def sigmoid(x: Array) -> Array:
    """``jax.nn.sigmoid``, whose derivative stores its result and nothing else.

    Example:
      >>> jlstm.sigmoid(jnp.zeros(2)).tolist()
      [0.5, 0.5]
    """
    return _activate_one(x, "s")


def tanh(x: Array) -> Array:
    """``jnp.tanh``, whose derivative stores its result and nothing else.

    Example:
      >>> jlstm.tanh(jnp.zeros(2)).tolist()
      [0.0, 0.0]
    """
    return _activate_one(x, "t")


def _activate_one(x: Array, kind: str) -> Array:
    return _activate(jnp.atleast_1d(x), kind)[0].reshape(jnp.shape(x))


def positive(x: Array) -> Array:
    """Applies ``x + 1/2`` where ``x >= 0``, else a sigmoid; continuous, and positive.

    References:
      Feng et al., Were RNNs all we needed?, 2024, where it is called g.

    Example:
      >>> jlstm.cells.positive(jnp.array([0.0, 2.0])).tolist()
      [0.5, 2.5]
    """
    return jnp.where(x >= 0, x + 0.5, sigmoid(x))
