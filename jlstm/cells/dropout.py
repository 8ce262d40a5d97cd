"""Wrappers that add noise to a cell, drawn once a sequence before the loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlstm.cells.wrappers import Wrapper
from jlstm.types import Array, PyTree, config, gated


def check_rates(wrapper: Any, *names: str) -> None:
    """Refuses probabilities out of range, and a wrapper that does nothing.

    Raises:
      ValueError: naming the field.
    """
    rates = {name: getattr(wrapper, name) for name in names}
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(
                f"{type(wrapper).__name__}.{name}: must be in [0, 1), got {rate}"
            )
    if not any(rates.values()):
        raise ValueError(
            f"{type(wrapper).__name__}: give {' or '.join(names)} above 0, or leave "
            "the wrapper out"
        )


@config
class Zoneout(Wrapper):
    r"""Keeps, at random, parts of the carry as they were before the step.

    .. math::
        h_t = d \odot h_{t-1} + (1 - d) \odot \tilde h_t, \qquad
        d \sim \mathrm{Bernoulli}(p), \text{ or } d = p \text{ without a key}

    for each step and unit, where :math:`\tilde h_t` is what the cell computed; and
    likewise for the memory :math:`c` of a cell that has one. A cell whose output is its
    new :math:`h` outputs :math:`h_t`.

    Attributes:
      cell: the cell. Its carry has fields ``h`` and, if ``c`` is above 0, ``c``; or it
        is a single array, which counts as ``h``.
      h: the probability that a unit of ``h`` is kept as it was, in [0, 1). The paper
        uses 0.05.
      c: the same for ``c``, such as 0.5.

    Raises:
      ValueError: on construction, if a probability is out of range or both are 0.

    Example:
      >>> layer = jlstm.RNN(jlstm.Zoneout(jlstm.LSTM(8), h=0.05, c=0.5))
      >>> xs = jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> ys, carry = layer.apply(params, xs, key=jax.random.key(1))
      >>> bool((ys[:, -1] == carry.h).all())
      True

    References:
      Krueger et al., Zoneout: regularizing RNNs by randomly preserving hidden
      activations, 2017.
    """

    cell: Any
    h: float = 0.0
    c: float = 0.0

    def __post_init__(self) -> None:
        check_rates(self, "h", "c")

    @property
    def _rates(self) -> dict[str, float]:
        rates = {"h": self.h, "c": self.c}
        return {name: rate for name, rate in rates.items() if rate}

    def before(
        self, params: PyTree, xs: PyTree, key: Array | None
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Draws what is kept at each step."""
        shape = jax.tree.leaves(xs)[0].shape[:2]
        carry = jax.eval_shape(lambda p: self.cell.init_carry(p, shape[:1]), params)
        kept = {}
        for n, (name, rate) in enumerate(self._rates.items()):
            leaf = self._leaf(carry, name)
            if key is not None:
                keep = jax.random.bernoulli(
                    jax.random.fold_in(key, n), rate, (*shape, *leaf.shape[1:])
                )
                kept[name] = keep.astype(leaf.dtype)
        return params, xs, None, kept

    def after(
        self, extra: PyTree, old: PyTree, new: PyTree, y: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Mixes the new carry with the old."""
        parts = {}
        for name, rate in self._rates.items():
            keep = extra.get(name, rate)
            was, made = self._leaf(old, name), self._leaf(new, name)
            parts[name] = keep * was + (1 - keep) * made
            if y is made:
                y = parts[name]
        if hasattr(new, "_replace"):
            return new._replace(**parts), y
        return parts["h"], y

    def _leaf(self, carry: PyTree, name: str) -> Any:
        if name == "h" and not hasattr(carry, "_fields"):
            leaf = carry
        else:
            leaf = getattr(carry, name, None)
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"Zoneout.{name}: the carry of {self.cell!r} has no field {name!r}; "
                f"{fields_of(carry)}"
            )
        return leaf


@config
class VariationalDropout(Wrapper):
    r"""Drops inputs and recurrent connections, the same ones at all steps of a row.

    .. math::
        z^x_t = \mathrm{project}(\theta, m_x \odot x_t), \qquad
        z^h_t = \mathrm{mix}(\theta, m_h \odot h_{t-1}, z^x_t)

    with masks :math:`m` of the values 0 and :math:`1 / (1 - p)`, one for each row,
    which all gates share. Without a key the masks are 1. A product in ``update``, such
    as that of a GRU with ``reset_after=False``, reads the whole :math:`h`.

    Attributes:
      cell: the cell. For ``recurrent`` it must be in gated form and have an ``h`` in
        its carry.
      inputs: the probability that a feature of ``x`` is dropped, in [0, 1).
      recurrent: the probability that a unit of ``h`` is dropped on its way into the
        recurrent product, in [0, 1).

    Raises:
      ValueError: on construction, if a probability is out of range, both are 0, or
        ``recurrent`` is given with a cell that is not in gated form.

    Example:
      >>> cell = jlstm.VariationalDropout(jlstm.LSTM(8), inputs=0.2, recurrent=0.2)
      >>> layer, xs = jlstm.RNN(cell), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> ys, _ = layer.apply(params, xs, key=jax.random.key(1))

    References:
      Gal & Ghahramani, A theoretically grounded application of dropout in recurrent
      neural networks, 2016.
    """

    cell: Any
    inputs: float = 0.0
    recurrent: float = 0.0

    def __post_init__(self) -> None:
        check_rates(self, "inputs", "recurrent")
        if self.recurrent and not gated(self.cell):
            raise ValueError(
                "VariationalDropout.cell: recurrent dropout needs a cell with "
                f"project, mix and update, got {self.cell!r}, which has only step"
            )

    def before(
        self, params: PyTree, xs: PyTree, key: Array | None
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Drops inputs, and draws what is dropped of ``h``."""
        if key is None:
            return params, xs, None, None
        leaves, structure = jax.tree.flatten(xs)
        keys, batch = jax.random.split(key, len(leaves) + 1), leaves[0].shape[0]
        mask = None
        if self.recurrent:
            carry = jax.eval_shape(lambda p: self.cell.init_carry(p, (batch,)), params)
            h = getattr(carry, "h", carry)
            mask = _keep(keys[-1], self.recurrent, h.shape, h.dtype)
        if self.inputs:
            leaves = [
                x * _keep(key, self.inputs, (batch, 1, *x.shape[2:]), x.dtype)
                for key, x in zip(keys, leaves, strict=False)
            ]
        return params, structure.unflatten(leaves), mask, None

    def mix(self, params: Any, carry: PyTree, zx: Any) -> PyTree:
        """Mixes what is left of ``h``."""
        if params.extra is not None:
            left = getattr(carry, "h", carry) * params.extra
            carry = carry._replace(h=left) if hasattr(carry, "_replace") else left
        return super().mix(params, carry, zx)


def fields_of(carry: PyTree) -> str:
    """Lists the fields of a carry, for a message."""
    fields = getattr(carry, "_fields", ())
    if not fields:
        return f"it is of type {type(carry).__name__}"
    return f"its fields are: {', '.join(fields)}"


def _keep(key: Array, rate: float, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.bernoulli(key, 1 - rate, shape).astype(dtype) / (1 - rate)


@config
class DropConnect(Wrapper):
    r"""Drops weights, the same ones in all rows and at all steps of a sequence.

    .. math::
        \hat W = m \odot W, \qquad
        m \sim \mathrm{Bernoulli}(1 - p) / (1 - p)

    Without a key nothing is dropped.

    Attributes:
      cell: the cell.
      rate: the probability that a weight is dropped, in (0, 1); 0.5 is usual.
      names: the weights, by their names in the cell's params; the recurrent ones unless
        given.

    Raises:
      ValueError: on construction, if ``rate`` is out of range.

    Example:
      >>> layer = jlstm.RNN(jlstm.DropConnect(jlstm.LSTM(8), 0.5))
      >>> xs = jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> ys, _ = layer.apply(params, xs, key=jax.random.key(1))

    References:
      Wan et al., Regularization of neural networks using DropConnect, 2013; Merity,
      Keskar & Socher, Regularizing and optimizing LSTM language models, 2018.
    """

    cell: Any
    rate: float
    names: tuple[str, ...] = ("w_hh",)

    def __post_init__(self) -> None:
        check_rates(self, "rate")

    def before(
        self, params: PyTree, xs: PyTree, key: Array | None
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Drops weights."""
        for n, name in enumerate(self.names):
            w = weight_of(self, params, name)
            if key is not None:
                keep = _keep(jax.random.fold_in(key, n), self.rate, w.shape, w.dtype)
                params = replace(params, name, w * keep)
        return params, xs, None, None


def weight_of(wrapper: Any, params: PyTree, name: str) -> Array:
    """Returns a weight of a cell by its name.

    Raises:
      ValueError: there is none of this name.
    """
    if isinstance(params, dict):
        fields = params
    elif hasattr(params, "_asdict"):
        fields = params._asdict()
    else:
        fields = getattr(params, "__dict__", {})
    if not hasattr(fields.get(name), "dtype"):
        found = [key for key, leaf in fields.items() if hasattr(leaf, "dtype")]
        raise ValueError(
            f"{type(wrapper).__name__}.names: {wrapper.cell!r} has no weight {name!r}; "
            + (f"its weights are: {', '.join(found)}" if found else "it has none")
        )
    return fields[name]


def replace(params: PyTree, name: str, weight: Array) -> PyTree:
    """Returns params with another weight."""
    if isinstance(params, dict):
        return {**params, name: weight}
    if hasattr(params, "_replace"):
        return params._replace(**{name: weight})
    return dataclasses.replace(params, **{name: weight})
