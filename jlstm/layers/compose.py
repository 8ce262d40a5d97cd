"""Layers made of layers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jlstm import door
from jlstm.cells.wrappers import Lookup, LookupParams
from jlstm.layers.pointwise import Dropout, Embed, EmbedParams
from jlstm.layers.recurrent import (
    RNN,
    Bidirectional,
    BidirectionalParams,
    check_layer_field,
    is_layer,
    rows,
    run_layer,
    take_valid,
    wrong_carry,
)
from jlstm.types import Array, Layer, PyTree, config, gated, zero_rows

Pooling = Literal["last", "first", "mean", "max", "sum"]


@config
class Stack:
    """Layers one after another; :func:`jlstm.stack` makes it.

    Attributes:
      layers: the layers, first to last.
    """

    layers: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("stack: needs at least one layer")
        for i, layer in enumerate(self.layers):
            check_layer_field(f"stack.layers[{i}]", layer)

    def __repr__(self) -> str:
        return f"stack({', '.join(map(repr, self.layers))})"

    @property
    def causal(self) -> bool:
        """Whether all layers are causal."""
        return all(is_causal(layer) for layer in self.layers)

    @property
    def pointwise(self) -> bool:
        """Whether each output depends on the input at that step alone."""
        return all(is_pointwise(layer) for layer in self.layers)

    def init(self, key: Array, xs: PyTree) -> tuple[PyTree, ...]:
        """Makes the params of each layer, from the outputs of the one before."""
        params = []
        for i, layer in enumerate(self.layers):
            with door.at(f"stack[{i}]"):
                params.append(layer.init(jax.random.fold_in(key, i), xs))
                xs = jax.eval_shape(layer.apply, params[-1], xs)[0]
        return tuple(params)

    def init_carry(
        self, params: tuple[PyTree, ...], batch_shape: tuple[int, ...]
    ) -> tuple[PyTree, ...]:
        """Makes the fresh carry of each layer."""
        pairs = zip(self.layers, params, strict=True)
        return tuple(layer.init_carry(p, batch_shape) for layer, p in pairs)

    def retime(
        self, lengths: Array | None, mask: Array | None, resets: Array | None
    ) -> tuple[Array | None, Array | None, Array | None]:
        """Retimes by each layer in turn."""
        for layer in self.layers:
            lengths, mask, resets = retime(layer, lengths, mask, resets)
        return lengths, mask, resets

    def check(self, xs: PyTree) -> None:
        """Looks at concrete inputs, as the first layer does."""
        with door.at("stack[0]"):
            check_input(self.layers[0], xs)

    def apply(
        self,
        params: tuple[PyTree, ...],
        xs: PyTree,
        carry: tuple[PyTree, ...] | None = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        """Runs the layers; each gets a key of its own."""
        masking: dict[str, Any] = {
            "lengths": lengths,
            "mask": mask,
            "resets": resets,
            "key": key,
        }
        return self._enter("apply", params, xs, carry, masking)

    def last(
        self,
        params: tuple[PyTree, ...],
        xs: PyTree,
        carry: tuple[PyTree, ...] | None = None,
        **masking: Any,
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        """Pools the last layer that sees more than one step, then runs the others."""
        return self._enter("last", params, xs, carry, masking)

    def _enter(
        self,
        method: Literal["apply", "last"],
        params: tuple[PyTree, ...],
        xs: PyTree,
        carry: tuple[PyTree, ...] | None,
        masking: dict[str, Array | None],
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        door.check_hashable(self, "stack")
        if isinstance(carry, (jax.Array, np.ndarray)):
            raise wrong_carry("stack", "a tuple with one entry for each layer", carry)
        for name, value in (("params", params), ("carry", carry)):
            if value is not None and len(value) != len(self.layers):
                raise door.error(
                    "stack",
                    f"{name} must have one entry for each of the {len(self.layers)} "
                    f"layers, got {len(value)}",
                )
        names = ("lengths", "mask", "resets")
        flags = door.as_arrays(*(masking.get(name) for name in names))
        given: dict[str, Any] = dict(zip(names, flags, strict=True))
        valid = door.valid_steps(xs, **given, where="stack")
        if hasattr(self.layers[0], "check"):
            self.check(zero_rows(valid, xs))
        given["key"] = masking.get("key")
        if rows() is not None:  # a summary needs the layers to run, not a compiled copy
            return self._run(method, params, xs, carry, given)
        return _run_stack(self, method, params, xs, carry, given)

    def _run(
        self,
        method: Literal["apply", "last"],
        params: tuple[PyTree, ...],
        xs: PyTree,
        carry: tuple[PyTree, ...] | None,
        options: dict[str, Array | None],
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        masking: dict[str, Any] = dict(options)
        key = masking.pop("key")
        carry = (None,) * len(self.layers) if carry is None else carry
        layers = self.layers
        if isinstance(layers[0], Embed) and len(layers) > 1:
            joined = on_ids(layers[0], params[0], layers[1], params[1], xs)
            if joined is not None:
                layers = (Dropout(0.0), joined[0], *layers[2:])
                params = ((), joined[1], *params[2:])
        pooled_at = len(self.layers)
        if method == "last":
            seeing = [i for i, m in enumerate(self.layers) if not is_pointwise(m)]
            pooled_at = seeing[-1] if seeing else 0
        carries = []
        for i, layer in enumerate(layers):
            layer_key = None if key is None else jax.random.fold_in(key, i)
            args = (f"stack[{i}]", layer, params[i], xs, carry[i])
            after = retime(layer, **masking)
            if i == pooled_at:
                # One step is left, which a row without valid steps does not have.
                xs, new = last(*args, key=layer_key, **masking)
                xs = jax.tree.map(lambda leaf: leaf[:, None], xs)
                after = (None, _any_valid(*after[:2]), None)
            else:
                xs, new = run_layer(*args, key=layer_key, **masking)
            masking = dict(zip(masking, after, strict=True))
            carries.append(new)
        if method == "last":
            xs = jax.tree.map(lambda leaf: leaf[:, 0], xs)
        return xs, tuple(carries)


@partial(jax.jit, static_argnums=(0, 1))
def _run_stack(stack: Stack, method: Any, *args: Any) -> Any:
    return stack._run(method, *args)


def _any_valid(lengths: Array | None, mask: Array | None) -> Array | None:
    if lengths is not None:
        return lengths[:, None] > 0
    return None if mask is None else mask.any(1, keepdims=True)


def stack(*layers: Layer) -> Stack:
    """Runs layers one after another.

    Params and carry are tuples with one entry for each layer. A stack is a layer, so
    stacks nest. No layer declares the size of its input: ``init`` finds it.

    Args:
      *layers: the layers, first to last; a recurrent cell must be wrapped, as in
        ``RNN(cell)``.

    Returns:
      A layer.

    Raises:
      TypeError: something is not a layer, such as a bare cell.
      ValueError: there are no layers.

    Example:
      >>> layer = jlstm.stack(jlstm.Embed(10, 4), jlstm.RNN(jlstm.LSTM(8)))
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), tokens), tokens)
      >>> ys.shape, carry[1].h.shape
      ((1, 3, 8), (1, 8))
    """
    return Stack(layers)


# The most rows of a table that is joined; it has at most half as many rows as there are
# ids, too.
_MOST_ROWS = 512


def on_ids(
    embed: Embed, embed_params: EmbedParams, layer: Layer, params: PyTree, ids: Array
) -> tuple[Layer, PyTree] | None:
    """Joins an embedding and a layer, where it pays; see ``cells.wrappers.Lookup``.

    Returns:
      A layer that takes the ids, and its params; or ``None``.
    """
    if rows() is not None:  # a summary shows both
        return None
    size: Any = ids.size  # no number where an exported program takes any
    if not isinstance(size, int) or embed.vocab_size > min(_MOST_ROWS, size // 2):
        return None
    return _on_rows(layer, params, embed.table(embed_params))


def _on_rows(layer: Any, params: Any, table: Array) -> tuple[Layer, PyTree] | None:
    if isinstance(layer, Stack):
        first = _on_rows(layer.layers[0], params[0], table)
        if first is None:
            return None
        return Stack((first[0], *layer.layers[1:])), (first[1], *params[1:])
    if isinstance(layer, Bidirectional):
        forward = _on_rows(layer.forward, params.forward, table)
        backward = _on_rows(layer.backward, params.backward, table)
        if forward is None or backward is None:
            return None
        layer = dataclasses.replace(layer, forward=forward[0], backward=backward[0])
        return layer, BidirectionalParams(forward[1], backward[1])
    if not isinstance(layer, RNN) or layer.implementation == "cudnn":
        return None  # which projects inputs itself
    if not _projects_rows(layer.cell, params, table):
        return None
    layer = dataclasses.replace(layer, cell=Lookup(layer.cell))
    return layer, LookupParams(params, table)


def _projects_rows(cell: Any, params: PyTree, table: Array) -> bool:
    """Whether a cell makes of a table's rows what it would make of them one by one."""
    if not gated(cell) or hasattr(cell, "prepare") or getattr(cell, "x_ndim", 1) != 1:
        return False
    try:
        projected = jax.eval_shape(cell.project, params, table)
    except (TypeError, ValueError):
        return False  # what does not fit is named where the cell takes a step
    leaves = jax.tree.leaves(projected)
    return all(leaf.shape[:1] == table.shape[:1] for leaf in leaves)


@config
class Residual:
    """Adds a layer's input to its output, :math:`y_t = x_t + f(x)_t`.

    Attributes:
      layer: the layer, whose outputs must have the shape of its inputs.

    Example:
      >>> layer, xs = jlstm.Residual(jlstm.RNN(jlstm.LSTM(3))), jnp.ones((2, 5, 3))
      >>> layer.apply(layer.init(jax.random.key(0), xs), xs)[0].shape
      (2, 5, 3)

    References:
      He et al., Deep residual learning, 2016.
    """

    layer: Any

    def __post_init__(self) -> None:
        check_layer_field("Residual.layer", self.layer)

    @property
    def causal(self) -> bool:
        """Whether the inner layer is causal."""
        return is_causal(self.layer)

    @property
    def pointwise(self) -> bool:
        """Whether each output depends on the input at that step alone."""
        return is_pointwise(self.layer)

    def init(self, key: Array, xs: PyTree) -> PyTree:
        """Makes the inner layer's params."""
        return self.layer.init(key, xs)

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...]) -> PyTree:
        """Makes the inner layer's fresh carry."""
        return self.layer.init_carry(params, batch_shape)

    def last(
        self, params: PyTree, xs: PyTree, carry: PyTree = None, **masking: Any
    ) -> tuple[PyTree, PyTree]:
        """Takes the output at the last valid step; a causal layer ends there.

        Raises:
          ValueError: the inner layer is not causal: its directions end elsewhere, where
            the input that would be added is another one.
        """
        if not self.causal:
            raise door.error(
                "Residual",
                f"needs a causal layer for pooling 'last', got {self.layer!r}; pool by "
                "'mean' or 'max'",
            )
        ys, carry = self.apply(params, xs, carry, **masking)
        masking.pop("key", None)
        return take_valid(ys, door.valid_steps(xs, **masking)), carry

    def apply(
        self,
        params: PyTree,
        xs: PyTree,
        carry: PyTree = None,
        *,
        key: Array | None = None,
        **masking: Any,
    ) -> tuple[PyTree, PyTree]:
        """Runs the inner layer and adds its input, which must have the same shape."""
        mask = door.valid_steps(xs, **masking, where="Residual")
        ys, carry = run_layer(
            "Residual", self.layer, params, xs, carry, key=key, **masking
        )
        if door.shapes(ys) != door.shapes(xs):
            raise door.error(
                "Residual",
                f"{self.layer!r} must return the shape of its input, "
                f"{door.shapes(xs)}, got {door.shapes(ys)}; put Dense(size) before it",
            )
        return jax.tree.map(jnp.add, zero_rows(mask, xs), ys), carry


def pool(
    layer: Layer,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    kind: Pooling = "last",
    name: str = "pool",
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    key: Array | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs a layer and reduces its outputs over time, to ``[B, ...]``.

    Args:
      layer: any layer.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      carry: the incoming carry; ``None`` means the fresh one.
      kind: how outputs become one vector. ``"last"``, the default, takes the output
        after the last step that each direction *processed*: step ``lengths - 1`` of the
        forward direction, the first valid step of the backward one. ``"first"`` takes
        the output at the first valid step; ``"mean"``, ``"max"`` and ``"sum"`` are over
        the valid steps.
      name: what errors and summaries call the layer.
      lengths: the number of valid steps in each row, as for :func:`jlstm.unroll`.
      mask: true at valid steps, as for :func:`jlstm.unroll`.
      resets: boundaries within rows, as for :func:`jlstm.unroll`.
      key: a typed key for noise; ``None`` means no noise.

    Returns:
      ``(pooled, carry)``. In a row without valid steps, ``pooled`` is zero.

    Raises:
      ValueError: ``kind`` is unknown, or the layer refuses its arguments.

    Example:
      >>> layer, xs = jlstm.bidirectional(jlstm.LSTM(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> y, carry = jlstm.pool(layer, params, xs, lengths=jnp.array([5, 2]))
      >>> bool((y == jnp.concatenate([carry.forward.h, carry.backward.h], -1)).all())
      True
    """
    if kind not in get_args(Pooling):
        names = ", ".join(repr(name) for name in get_args(Pooling))
        raise door.error("pool", f"kind must be one of {names}, got {kind!r}")
    masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
    if kind == "last":
        return last(name, layer, params, xs, carry, key=key, **masking)
    ys, carry = run_layer(name, layer, params, xs, carry, key=key, **masking)
    lengths, mask, _ = retime(layer, **masking)
    valid = door.valid_steps(ys, lengths=lengths, mask=mask, where=name)
    return _reduce(ys, valid, kind), carry


def _reduce(ys: PyTree, valid: Array | None, kind: Pooling) -> PyTree:
    if kind == "first":
        return take_valid(ys, valid, first=True)
    batch, time = jax.tree.leaves(ys)[0].shape[:2]
    if valid is None:
        valid = jnp.ones((batch, time), bool)
    count = valid.sum(1, dtype=jnp.int32)

    def reduce(leaf: Array) -> Array:
        flags = valid.reshape(valid.shape + (1,) * (leaf.ndim - 2))
        if kind == "max" and time:
            # The gradient of a max compares values for equality, which fails (0 / 0)
            # where the compiler computes them twice and rounds them differently.
            low = jnp.where(flags, leaf, jnp.full_like(leaf, _least(leaf.dtype)))
            highest = jax.lax.argmax(low, 1, jnp.int32)[:, None]
            steps = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, 1)
            flags = flags & (steps == highest)
            return jnp.where(flags, leaf, jnp.zeros_like(leaf)).sum(1)
        total = jnp.where(flags, leaf, jnp.zeros_like(leaf)).sum(1)
        if kind == "sum":
            return total
        divisor = jnp.maximum(count, 1).astype(leaf.dtype)
        return total / divisor.reshape((-1,) + (1,) * (leaf.ndim - 2))

    return jax.tree.map(reduce, ys)


def _least(dtype: Any) -> Any:
    return -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


# What a layer may leave out, with what it means to leave it out.


def is_causal(layer: Layer) -> bool:
    """Tells whether a layer's outputs depend on no later inputs.

    Such a layer can be streamed, in chunks or by :func:`jlstm.step`.

    Args:
      layer: any layer or model.

    Returns:
      Its attribute ``causal``, or true if it has none.

    Example:
      >>> jlstm.is_causal(jlstm.bidirectional(jlstm.LSTM(8)))
      False
    """
    return getattr(layer, "causal", True)


def is_pointwise(layer: Layer) -> bool:
    """Tells whether each output depends on the input at that step alone."""
    return getattr(layer, "pointwise", False)


def check_input(layer: Layer, xs: PyTree) -> None:
    """Lets a layer look at concrete inputs before anything is traced."""
    check = getattr(layer, "check", None)
    if check is not None:
        check(xs)


def retime(
    layer: Layer, lengths: Array | None, mask: Array | None, resets: Array | None
) -> tuple[Array | None, Array | None, Array | None]:
    """Tells what lengths, mask and resets are after a layer."""
    method = getattr(layer, "retime", None)
    if method is None:
        return lengths, mask, resets
    return method(lengths, mask, resets)


def last(
    name: str,
    layer: Layer,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    **masking: Any,
) -> tuple[PyTree, PyTree]:
    """Runs a layer and takes the output after its last processed step."""
    if hasattr(layer, "last"):
        return run_layer(name, layer, params, xs, carry, method="last", **masking)
    ys, carry = run_layer(name, layer, params, xs, carry, **masking)
    masking.pop("key", None)
    lengths, mask, _ = retime(layer, **masking)
    return take_valid(ys, door.valid_steps(ys, lengths=lengths, mask=mask)), carry


def step(
    layer: Layer,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    *,
    reset: Array | None = None,
    key: Array | None = None,
) -> tuple[PyTree, PyTree]:
    """Advances a causal layer by one step, so that a whole stack acts like a cell.

    Use it where the next input is not known before the output: to serve a stream, to
    decode, to act.

    Args:
      layer: a causal layer or model.
      params: its params.
      carry: the carry of the step before; ``None`` means the fresh one.
      x: input at this step, ``[B, D]``, or ``[B]`` token ids for an ``Embed``.
      reset: ``[B]`` booleans, true in rows whose carry is made fresh before this step;
        ``None`` means in none.
      key: a typed key for noise, another one at each step; ``None`` means no noise.

    Returns:
      ``(carry, y)``, in the order of ``jax.lax.scan``.

    Raises:
      TypeError: a cell is in the place of the layer.
      ValueError: the layer is not causal, or gives one answer for a whole sequence.

    Example:
      >>> layer = jlstm.stack(jlstm.RNN(jlstm.LSTM(8)), jlstm.Dense(2))
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 1, 3)))
      >>> carry, y = jlstm.step(layer, params, None, jnp.ones((1, 3)))
      >>> y.shape
      (1, 2)
    """
    if not is_layer(layer):
        check_layer_field("step", layer)
    if not is_causal(layer):
        raise door.error(
            "step",
            f"needs a causal layer, got {layer!r}, whose outputs need the future",
        )
    _check_answers(layer, params, x)
    xs = jax.tree.map(lambda leaf: leaf[:, None], x)
    resets = None if reset is None else reset[:, None]
    ys, carry = layer.apply(params, xs, carry, resets=resets, key=key)
    return carry, jax.tree.map(lambda leaf: leaf[:, 0], ys)


# Layers that were found to give an output a step, with the types of their inputs.
_stepwise: set[Any] = set()


def _check_answers(layer: Layer, params: PyTree, x: PyTree) -> None:
    """Refuses a layer that gives one answer a sequence, such as a ``Classifier``."""
    key = layer, door.inputs_of(x)
    if key in _stepwise:
        return
    steps = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (a.shape[0], 2, *a.shape[1:]), jnp.result_type(a)
        ),
        x,
    )
    ys, _ = jax.eval_shape(layer.apply, params, steps)
    if any(leaf.ndim < 2 or leaf.shape[1] != 2 for leaf in jax.tree.leaves(ys)):
        raise door.error(
            "step",
            f"needs a layer with one output for each step, got {layer!r}, which gives "
            "one answer for a whole sequence; call step with its encoder",
        )
    _stepwise.add(key)


def with_implementation(layer: Any, implementation: str | None) -> Any:
    """Returns a layer or model whose recurrences all run by one implementation.

    Args:
      layer: any layer or model.
      implementation: the name of the loop, as for :func:`jlstm.unroll`; ``None`` lets
        each recurrence choose.

    Returns:
      The same layer with another ``implementation`` in each of its ``RNN``; its params
      stay valid.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: it cannot run one of the cells.

    Example:
      >>> jlstm.with_implementation(jlstm.stack(jlstm.RNN(jlstm.LSTM(8))), "scan")
      stack(RNN(LSTM(8), implementation='scan'))
    """
    return replace_recurrences(layer, implementation=implementation)


def replace_recurrences(layer: Any, **fields: Any) -> Any:
    """Returns a layer or model all of whose RNNs have other fields."""
    if isinstance(layer, RNN):
        return dataclasses.replace(layer, **fields)
    if isinstance(layer, tuple):
        return tuple(replace_recurrences(part, **fields) for part in layer)
    if not dataclasses.is_dataclass(layer) or isinstance(layer, type):
        return layer
    parts = {
        field.name: replace_recurrences(getattr(layer, field.name), **fields)
        for field in dataclasses.fields(layer)
        if field.init
    }
    return dataclasses.replace(layer, **parts)
