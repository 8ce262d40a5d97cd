"""The arithmetic that cells share: gates, products, normalisation."""

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
    """Computes ``x @ w + b``.

    Args:
      x: ``[..., D]``.
      w: ``[D, G]``.
      b: ``[G]``, or ``None`` for no bias.

    Returns:
      An array ``[..., G]``.

    Example:
      >>> jlstm.affine(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones(4)).shape
      (2, 4)
    """
    z = x @ w
    return z if b is None else add_vector(z, b)


def add_vector(z: Array, b: Array) -> Array:
    """Adds a vector to the last axis of an array.

    ``z + b`` does the same, except under ``jax.numpy_rank_promotion("raise")``, where
    JAX refuses it.

    Args:
      z: ``[..., G]``.
      b: ``[G]``.

    Example:
      >>> jlstm.add_vector(jnp.zeros((2, 3)), jnp.ones(3)).shape
      (2, 3)
    """
    return z + row(b, z)


def heads_product(h: Array, w_hh: Array) -> Array:
    """Multiplies ``h`` with recurrent weights head by head.

    Args:
      h: ``[..., H]``, one head after the other.
      w_hh: ``[N, H/N, G]``: for each head, one gate after the other.

    Returns:
      An array ``[..., NG]``: for each of the ``GN/H`` gates, one head after the other,
      as :func:`jlstm.gates` wants it.

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
    r"""Computes :math:`\gamma \odot (z - \mu) / \sqrt{s^2 + 10^{-5}}`.

    The mean :math:`\mu` and the variance :math:`s^2` are those of the last axis,
    computed in float32 at least.

    Args:
      z: ``[..., G]``.
      gamma: the scale, ``[G]``.

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
    """Gives a vector the dimensions that it needs to meet an array.

    It is for operations under ``jax.numpy_rank_promotion("raise")``, where JAX does not
    add dimensions by itself.

    Args:
      v: ``[G]``.
      z: an array ``[..., G]``; only its number of dimensions counts.

    Returns:
      ``v`` as ``[1, ..., 1, G]``.

    Example:
      >>> jlstm.row(jnp.ones(4), jnp.ones((2, 3, 4))).shape
      (1, 1, 4)
    """
    return v.reshape((1,) * (z.ndim - 1) + v.shape)


def fresh(
    learned: Array | None, size: int, batch_shape: tuple[int, ...], like: Array
) -> Array:
    """Makes one leaf of the fresh carry: learned, or zeros.

    The ``init_carry`` of a cell of your own calls it.

    Args:
      learned: the learned leaf, ``[H]``, or ``None`` for zeros.
      size: ``H``.
      batch_shape: the batch dimensions, such as ``(B,)``.
      like: an array whose dtype the zeros get, such as a weight.

    Returns:
      An array ``[*batch_shape, H]``.

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
    """Collects the gates of the steps that run inside, and what :func:`named` is given.

    The list must be read in the same trace in which the steps run.
    """
    collected: list[Named] = []
    token = _named.set(collected)
    try:
        yield collected
    finally:
        _named.reset(token)


def named(name: str, value: Array, activation: Any = None) -> Array:
    """Returns ``value``, and shows it under a name in :func:`jlstm.diagnostics.trace`.

    It is for gates that a cell computes without :func:`gates`. Nothing but diagnostics
    depends on it, and outside of them it does nothing.

    Args:
      name: the name of the gate.
      value: its values, ``[..., H]``.
      activation: the function that made it, which tells the range of its values: 0 to 1
        for :func:`sigmoid`, -1 to 1 for :func:`tanh`, none for others.

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

    It is the fast way to write gates. It computes one :math:`\tanh` over the whole
    block, since :math:`\sigma(x) = \tfrac12 + \tfrac12 \tanh(x/2)`, which XLA turns
    into vector instructions where it does not for a sigmoid of a slice. Its derivatives
    are functions of the results, :math:`\sigma' = \sigma - \sigma^2` and :math:`\tanh'
    = 1 - \tanh^2`, so a backward pass stores the gates and nothing else.

    If your ``update`` needs parts of ``zx`` or ``zh``, take them by ``jnp.split``
    instead of slices: the derivative of a slice pads with zeros, which is slow.

    Args:
      z: pre-activations, ``[..., len(kinds) * H]``, one gate after the other.
      kinds: one letter for each gate: ``s`` for a sigmoid, ``t`` for a tanh.
      names: one name for each gate, under which :func:`jlstm.diagnostics.trace` shows
        it: a string of letters, such as ``"ifgo"``, or a sequence of words. ``None``
        numbers the gates.

    Returns:
      A tuple with one array ``[..., H]`` for each gate.

    Raises:
      ValueError: ``kinds`` has another letter, the last axis of ``z`` cannot be divided
        by the number of gates, or there is another number of names.

    Example:
      >>> i, f, g, o = jlstm.gates(jnp.zeros((2, 12)), "ssts")
      >>> float(i[0, 0]), float(g[0, 0])
      (0.5, 0.0)
    """
    count = len(kinds)
    if not kinds or set(kinds) - set("st"):
        raise ValueError(
            f"gates: kinds must consist of the letters s and t, got {kinds!r}"
        )
    if z.shape[-1] % count:
        raise ValueError(
            f"gates: the last axis must be a multiple of {count} ({kinds!r}), got "
            f"{list(z.shape)}"
        )
    if names is not None and len(names) != count:
        raise ValueError(
            f"gates: names must have {count} entries, one for each gate of {kinds!r}, "
            f"got {names!r}"
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
    """Does what :func:`jlstm.gates` does, with functions of your choice.

    Args:
      z: pre-activations, ``[..., len(kinds) * H]``, one gate after the other.
      kinds: one letter for each gate, ``s`` or ``t``.
      activation: the function for each ``t``.
      gate_activation: the function for each ``s``. If the two are :func:`tanh` and
        :func:`sigmoid`, :func:`jlstm.gates` does the work.
      names: one name for each gate, as for :func:`jlstm.gates`.

    Returns:
      A tuple with one array ``[..., H]`` for each gate.

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
    """Computes :math:`1 / (1 + e^{-x})`; its derivative stores only the result.

    ``jax.nn.sigmoid`` has the same values.

    Args:
      x: an array of any shape.

    Example:
      >>> jlstm.sigmoid(jnp.zeros(2)).tolist()
      [0.5, 0.5]
    """
    return _activate_one(x, "s")


def tanh(x: Array) -> Array:
    """Computes the hyperbolic tangent; its derivative stores only the result.

    ``jnp.tanh`` has the same values.

    Args:
      x: an array of any shape.

    Example:
      >>> jlstm.tanh(jnp.zeros(2)).tolist()
      [0.0, 0.0]
    """
    return _activate_one(x, "t")


def _activate_one(x: Array, kind: str) -> Array:
    return _activate(jnp.atleast_1d(x), kind)[0].reshape(jnp.shape(x))


def positive(x: Array) -> Array:
    """Computes ``x + 1/2`` where ``x >= 0``, else ``sigmoid(x)``, which is positive.

    Args:
      x: an array of any shape.

    References:
      Feng et al., Were RNNs all we needed?, 2024, where it is called g.

    Example:
      >>> jlstm.cells.positive(jnp.array([0.0, 2.0])).tolist()
      [0.5, 2.5]
    """
    return jnp.where(x >= 0, x + 0.5, sigmoid(x))
