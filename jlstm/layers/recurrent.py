"""A cell over a sequence: in one direction, or in both."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jlstm import door
from jlstm.cells.wrappers import Lookup, Precision
from jlstm.types import (
    Array,
    Cell,
    Layer,
    Policy,
    PyTree,
    check_literal,
    config,
    zero_rows,
)

Merge = Literal["concat", "sum", "mean", "product", "none"]


def is_layer(value: Any) -> bool:
    """Tells whether a value has the methods of a layer."""
    return _has(value, "apply", "init_carry")


def _has(value: Any, *methods: str) -> bool:
    # A class has the methods too, where parentheses were forgotten.
    is_instance = not isinstance(value, type)
    return is_instance and all(hasattr(value, method) for method in methods)


def is_cell(value: Any) -> bool:
    """Tells whether a value has the methods of a cell."""
    return _has(value, "step", "init_carry")


def check_cell_field(where: str, value: Any) -> None:
    """Refuses what is not a cell.

    Raises:
      TypeError: naming what came, and what to write instead.
    """
    _check_instance(where, value, "a cell")
    if not is_cell(value) or is_layer(value):
        what = "the layer " if is_layer(value) else ""
        hint = "; give the cell itself, such as LSTM(256)" if is_layer(value) else ""
        raise TypeError(f"{where}: must be a cell, got {what}{value!r}{hint}")
    if dataclasses.is_dataclass(value):
        check_literal(value)


def check_layer_field(where: str, value: Any) -> None:
    """Refuses what is not a layer.

    Raises:
      TypeError: naming what came, and what to write instead.
    """
    _check_instance(where, value, "a layer")
    if is_layer(value):
        if dataclasses.is_dataclass(value):
            check_literal(value)
        return
    if is_cell(value):
        raise TypeError(
            f"{where}: must be a layer, got the cell {value!r}; wrap it: RNN({value!r})"
        )
    raise TypeError(f"{where}: must be a layer, got {value!r}")


def _check_instance(where: str, value: Any, kind: str) -> None:
    if isinstance(value, type):
        name = value.__name__
        raise TypeError(
            f"{where}: must be {kind}, got the class {name}; make one: {name}(...)"
        )


def wrong_carry(where: str, expected: str, carry: PyTree) -> ValueError:
    """Makes the error of what is no carry; in its place stand keys and lengths too."""
    got, hint = f"a {type(carry).__name__}", ""
    if all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(carry)):
        got += f" of {door.shapes(carry)}"
    if isinstance(carry, (jax.Array, np.ndarray)):
        got = f"an array {list(carry.shape)} {carry.dtype}"
        hint = "; give lengths=, mask=, resets= and key= by name"
    return door.error(where, f"carry must be {expected}, got {got}{hint}")


@dataclasses.dataclass
class Row:
    """One layer as it ran, for :func:`jlstm.summary`."""

    path: tuple[str, ...]
    layer: Any
    params: PyTree
    ys: PyTree = None
    carry: PyTree = None


_rows: contextvars.ContextVar[list[Row] | None] = contextvars.ContextVar(
    "rows", default=None
)


def rows() -> list[Row] | None:
    """The rows of the summary that is being made, or ``None``."""
    return _rows.get()


@contextlib.contextmanager
def recording() -> Iterator[list[Row]]:
    """Collects a row for each layer that runs inside."""
    collected: list[Row] = []
    token = _rows.set(collected)
    try:
        yield collected
    finally:
        _rows.reset(token)


def run_layer(
    name: str,
    layer: Layer,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    method: Literal["apply", "last"] = "apply",
    **masking: Any,
) -> tuple[PyTree, PyTree]:
    """Runs a layer inside another, so that errors and summaries name its place.

    The ``apply`` of a layer of your own calls it for each layer that it contains.

    Args:
      name: what errors and summaries call the inner layer, such as ``"encoder"``.
      layer: the inner layer.
      params: its params.
      xs: its inputs, ``[B, T, ...]``.
      carry: its incoming carry; ``None`` means the fresh one.
      method: the method to call: ``"apply"``, or ``"last"`` for a layer that has it.
      **masking: ``lengths``, ``mask``, ``resets`` and ``key``, as for ``apply``.

    Returns:
      ``(ys, carry)``, as the method returns it.
    """
    with door.at(name):
        collected = rows()
        run = getattr(layer, method)
        if collected is None:
            return run(params, xs, carry, **masking)
        row = Row(door.path(), layer, params)
        collected.append(row)
        row.ys, row.carry = run(params, xs, carry, **masking)
        return row.ys, row.carry


@config
class RNN:
    """Makes a layer of a cell: runs it over a batch of sequences.

    Attributes:
      cell: any cell, such as ``LSTM(256)``.
      reverse: true runs from each row's last valid step to its first; outputs stay in
        the order of the inputs. The layer is then not causal.
      implementation: the loop that runs the cell, by its name; ``None``, the default,
        chooses one. See :func:`jlstm.unroll`.
      policy: the dtypes of params, products and carry, for half precision; ``None``
        keeps those of the arrays. See :class:`jlstm.Policy`.
      checkpoint_every: for long sequences, the number of steps between stored carries,
        or ``"sqrt"``; a gradient then takes less memory and more time. ``None``, the
        default, stores every step. See :func:`jlstm.unroll`.

    Raises:
      NotImplementedError: on construction, if the named implementation cannot run the
        cell.
      TypeError: on construction, if a layer is in the place of the cell.
      ValueError: on construction, if the implementation is unknown.

    Example:
      >>> layer = jlstm.RNN(jlstm.GRU(8), reverse=True)
      >>> xs = jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> ys, carry = layer.apply(params, xs, lengths=jnp.array([5, 2]))
      >>> ys.shape
      (2, 5, 8)
    """

    cell: Any
    reverse: bool = False
    implementation: str | None = None
    policy: Policy | None = None
    checkpoint_every: int | Literal["sqrt"] | None = None

    def __post_init__(self) -> None:
        check_cell_field("RNN.cell", self.cell)
        door.check_checkpoint_every(self.checkpoint_every, "RNN")
        door.choose(self.cell, self.implementation)
        if not isinstance(self.policy, Policy | None):
            raise TypeError(
                f"RNN.policy: must be a Policy or None, got {self.policy!r}; give a "
                "Policy, such as jlstm.Policy(compute=jnp.bfloat16)"
            )

    @property
    def causal(self) -> bool:
        """Whether outputs depend on earlier inputs only."""
        return not self.reverse

    @property
    def _cell(self) -> Cell:
        return self.cell if self.policy is None else Precision(self.cell, self.policy)

    def init(self, key: Array, xs: PyTree) -> PyTree:
        """Makes the cell's params for inputs like ``xs [B, T, D]``."""
        door.batch_and_time(xs, "RNN.init")
        _check_floating("RNN.init", self.cell, xs)
        door.check_xs(self.cell, xs, "RNN.init")

        # Only shape and dtype of a step count, and T may be 0.
        def first(leaf: Any) -> Array:
            return jnp.zeros((leaf.shape[0], *leaf.shape[2:]), leaf.dtype)

        return self._cell.init(key, jax.tree.map(first, xs))

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...]) -> PyTree:
        """Makes the cell's fresh carry."""
        return self._cell.init_carry(params, batch_shape)

    def apply(
        self,
        params: PyTree,
        xs: PyTree,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs the cell; see :func:`jlstm.unroll`."""
        _check_floating("RNN", self.cell, xs)
        self._check_carry(params, xs, carry)
        ys, carry = door.unroll(
            self._cell,
            params,
            xs,
            carry,
            lengths=lengths,
            mask=mask,
            resets=resets,
            key=key,
            reverse=self.reverse,
            checkpoint_every=self.checkpoint_every,
            implementation=self.implementation,
        )
        return ys, carry

    def last(
        self,
        params: PyTree,
        xs: PyTree,
        carry: PyTree = None,
        *,
        key: Array | None = None,
        **masking: Any,
    ) -> tuple[PyTree, PyTree]:
        """Runs the cell and returns the output of the last step that it took."""
        ys, carry = self.apply(params, xs, carry, key=key, **masking)
        mask = door.valid_steps(xs, **masking)
        return take_valid(ys, mask, first=self.reverse), carry

    def _check_carry(self, params: PyTree, xs: PyTree, carry: PyTree) -> None:
        """Refuses a bare array where the cell's carry is none like it."""
        if not isinstance(carry, (jax.Array, np.ndarray)):
            return
        batch, _ = door.batch_and_time(xs, "RNN")
        fresh: Any = jax.eval_shape(lambda p: self.init_carry(p, (batch,)), params)
        if not hasattr(fresh, "shape"):
            expected = f"{type(fresh).__name__} {door.shapes(fresh)}"
            raise wrong_carry("RNN", expected, carry)
        is_key = jnp.issubdtype(carry.dtype, jax.dtypes.prng_key)
        if is_key or fresh.ndim != carry.ndim:
            raise wrong_carry("RNN", f"an array {list(fresh.shape)}", carry)


def _check_floating(where: str, cell: Cell, xs: PyTree) -> None:
    """Points integer inputs of a built-in cell to Embed."""
    leaves = jax.tree.leaves(xs)
    if (
        len(leaves) == 1
        and jnp.issubdtype(leaves[0].dtype, jnp.integer)
        and type(cell).__module__.startswith("jlstm.cells")
        and not isinstance(cell, Lookup)
    ):
        raise door.error(
            where,
            f"xs of {cell!r} must be floating, got {leaves[0].dtype}; put "
            "Embed(vocab_size, size) before it",
        )


def take_valid(ys: PyTree, mask: Array | None, *, first: bool = False) -> PyTree:
    """Takes each row's last (or first) valid step of ``ys [B, T, ...]``.

    A row without valid steps gives zeros.
    """
    time = jax.tree.leaves(ys)[0].shape[1]
    if time == 0:
        return jax.tree.map(lambda leaf: leaf.sum(1), ys)
    if mask is None:
        return jax.tree.map(lambda leaf: leaf[:, 0 if first else -1], ys)
    # A sum of one term, so that no gather meets a sharded axis.
    steps = jnp.arange(time, dtype=jnp.int32)[None, :]
    outside = time if first else -1
    seen = jnp.where(mask, steps, outside)
    chosen = seen.min(1) if first else seen.max(1)
    flags = mask & (steps == chosen[:, None])
    picked = zero_rows(flags, ys)
    return jax.tree.map(lambda leaf: leaf.sum(1), picked)


@struct.dataclass
class BidirectionalParams:
    """Params of the two directions.

    Attributes:
      forward: those of the forward layer.
      backward: those of the backward layer.
    """

    forward: PyTree
    backward: PyTree


class BidirectionalCarry(NamedTuple):
    """Carries of the two directions.

    Attributes:
      forward: that of the forward layer, after each row's last valid step.
      backward: that of the backward layer, after each row's first valid step.
    """

    forward: PyTree
    backward: PyTree


@config
class Bidirectional:
    """Two layers over one sequence; :func:`jlstm.bidirectional` makes it.

    Attributes:
      forward: the layer that runs forward.
      backward: the layer that runs in reverse.
      merge: how outputs are merged, see :func:`jlstm.bidirectional`.
    """

    forward: RNN
    backward: RNN
    merge: Merge = "concat"

    causal = False

    def __post_init__(self) -> None:
        if self.forward.reverse or not self.backward.reverse:
            raise ValueError(
                "Bidirectional: forward must have reverse=False and backward "
                f"reverse=True, got {self.forward!r} and {self.backward!r}; use "
                "bidirectional(cell)"
            )
        if self.merge not in get_args(Merge):
            names = ", ".join(repr(name) for name in get_args(Merge))
            raise ValueError(
                f"bidirectional: merge must be one of {names}, got {self.merge!r}"
            )

    def __repr__(self) -> str:
        options = [repr(self.forward.cell)]
        if self.backward.cell != self.forward.cell:
            options.append(repr(self.backward.cell))
        for name in ("implementation", "policy", "checkpoint_every"):
            if (value := getattr(self.forward, name)) is not None:
                options.append(f"{name}={value!r}")
        if self.merge != "concat":
            options.append(f"merge={self.merge!r}")
        return f"bidirectional({', '.join(options)})"

    def init(self, key: Array, xs: PyTree) -> BidirectionalParams:
        """Makes the params of both directions."""
        keys = jax.random.split(key)
        with door.at("forward"):
            forward = self.forward.init(keys[0], xs)
        with door.at("backward"):
            return BidirectionalParams(forward, self.backward.init(keys[1], xs))

    def init_carry(
        self, params: BidirectionalParams, batch_shape: tuple[int, ...]
    ) -> BidirectionalCarry:
        """Makes the fresh carries of both directions."""
        return BidirectionalCarry(
            self.forward.init_carry(params.forward, batch_shape),
            self.backward.init_carry(params.backward, batch_shape),
        )

    def apply(
        self,
        params: BidirectionalParams,
        xs: PyTree,
        carry: BidirectionalCarry | None = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[PyTree, BidirectionalCarry]:
        """Runs both directions and merges their outputs, aligned in time."""
        masking: dict[str, Any] = {
            "lengths": lengths,
            "mask": mask,
            "resets": resets,
            "key": key,
        }
        return self._both("apply", params, xs, carry, **masking)

    def last(
        self,
        params: BidirectionalParams,
        xs: PyTree,
        carry: BidirectionalCarry | None = None,
        **masking: Any,
    ) -> tuple[PyTree, BidirectionalCarry]:
        """Merges the outputs of the last steps that the directions took."""
        return self._both("last", params, xs, carry, **masking)

    def _both(
        self,
        method: Literal["apply", "last"],
        params: BidirectionalParams,
        xs: PyTree,
        carry: BidirectionalCarry | None,
        key: Array | None = None,
        **masking: Any,
    ) -> tuple[PyTree, BidirectionalCarry]:
        keys = (None, None) if key is None else jax.random.split(key)
        if carry is None:
            carry = BidirectionalCarry(None, None)
        if not isinstance(carry, BidirectionalCarry):
            expected = "a BidirectionalCarry(forward, backward)"
            raise wrong_carry("bidirectional", expected, carry)
        outs = []
        for i, name in enumerate(("forward", "backward")):
            parts = (getattr(part, name) for part in (self, params, carry))
            layer, layer_params, layer_carry = parts
            options = {"method": method, "key": keys[i], **masking}
            outs.append(
                run_layer(name, layer, layer_params, xs, layer_carry, **options)
            )
        (forward, carry_forward), (backward, carry_backward) = outs
        ys = self._merged(forward, backward)
        return ys, BidirectionalCarry(carry_forward, carry_backward)

    def _merged(self, forward: PyTree, backward: PyTree) -> PyTree:
        if self.merge == "none":
            return forward, backward
        merge = {
            "concat": lambda a, b: jnp.concatenate([a, b], axis=-1),
            "sum": jnp.add,
            "mean": lambda a, b: (a + b) / 2,
            "product": jnp.multiply,
        }[self.merge]
        cut = -1 if self.merge == "concat" else None
        leaves = [jax.tree.leaves(tree) for tree in (forward, backward)]
        first, second = ([leaf.shape[:cut] for leaf in tree] for tree in leaves)
        if first != second:
            raise door.error(
                "bidirectional",
                f"merge={self.merge!r} needs outputs of one shape, got "
                f"{door.shapes(forward)} and {door.shapes(backward)}; use "
                "merge='concat' or 'none'",
            )
        return jax.tree.map(merge, forward, backward)


def bidirectional(
    cell: Cell,
    backward: Cell | None = None,
    *,
    merge: Merge = "concat",
    implementation: str | None = None,
    policy: Policy | None = None,
    checkpoint_every: int | Literal["sqrt"] | None = None,
) -> Bidirectional:
    r"""Runs one cell forward and one backward over a sequence, and merges the outputs.

    .. math::
        y_t = [\overrightarrow{h}_t, \overleftarrow{h}_t]

    So each output depends on the whole sequence. The layer is not causal: it cannot be
    streamed.

    Args:
      cell: the forward cell.
      backward: the backward cell; ``None``, the default, means the same config as
        ``cell``. The two directions have params of their own either way.
      merge: ``"concat"``, the default, joins the outputs on the last axis; ``"sum"``,
        ``"mean"`` and ``"product"`` combine them element by element; ``"none"`` returns
        a pair.
      implementation: the loop that runs the cells, as for :class:`jlstm.RNN`.
      policy: the dtypes, as for :class:`jlstm.RNN`.
      checkpoint_every: steps between stored carries, as for :class:`jlstm.RNN`.

    Returns:
      A layer, whose carry is a :class:`jlstm.BidirectionalCarry`.

    Raises:
      TypeError: a layer is in the place of a cell.
      ValueError: ``merge`` is unknown.

    Example:
      >>> layer = jlstm.bidirectional(jlstm.LSTM(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.backward.h.shape
      ((2, 5, 16), (2, 8))

    References:
      Schuster & Paliwal, 1997; Graves & Schmidhuber, 2005.
    """
    check_cell_field("bidirectional.cell", cell)
    if backward is not None:
        check_cell_field("bidirectional.backward", backward)
    options: dict[str, Any] = {
        "implementation": implementation,
        "policy": policy,
        "checkpoint_every": checkpoint_every,
    }
    return Bidirectional(
        RNN(cell, **options),
        RNN(cell if backward is None else backward, reverse=True, **options),
        merge,
    )
