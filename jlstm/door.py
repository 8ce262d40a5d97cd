"""Runs a cell over a sequence: checks arguments, chooses a loop, says why."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlstm.cells.wrappers import prepare
from jlstm.kernels import IMPLEMENTATIONS, Request
from jlstm.kernels.request import UNKNOWN, may_be_sharded
from jlstm.types import Array, Cell, PyTree, gated, where_rows, zero_rows

# Where in a tree of layers the running call stands, for error messages.
_path: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "path", default=()
)


@contextlib.contextmanager
def at(name: str) -> Iterator[None]:
    """Names a place in a tree of layers, for the errors raised inside."""
    token = _path.set((*_path.get(), name))
    try:
        yield
    finally:
        _path.reset(token)


def path() -> tuple[str, ...]:
    """The names of the places around the running call, outermost first."""
    return _path.get()


# A function that gets each call of `unroll` inside, and may run it in another way.
_observer: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar(
    "observer", default=None
)


@contextlib.contextmanager
def observing(observer: Callable[[Unrolled], Any] | None) -> Iterator[None]:
    """Hands each call of :func:`unroll` inside to a function that runs it instead.

    Inside the function, :func:`path` names the place of the call in the tree of layers.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def error(where: str, message: str) -> ValueError:
    """Makes a ``ValueError`` that begins with the path of layers and ``where``."""
    places = [place for place in (*path(), where) if place]
    return ValueError(f"{'.'.join(places)}: {message}")


def unroll(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    key: Array | None = None,
    reverse: bool = False,
    return_carries: bool = False,
    checkpoint_every: int | Literal["sqrt"] | None = None,
    implementation: str | None = None,
) -> tuple[PyTree, ...]:
    r"""Runs a cell over a batch of sequences.

    .. math::
        s_t, y_t = \mathrm{step}(\theta, s_{t-1}, x_t), \qquad t = 1 \dots T

    where :math:`\theta` are the params, :math:`s_t` the carry after step t and
    :math:`s_0` the incoming carry. A masked step keeps the carry and gives zeros for
    its output. What stands in the padding, even NaN, changes no output and no gradient.

    Args:
      cell: any cell, such as ``LSTM(256)``.
      params: its params, as ``cell.init`` makes them.
      xs: inputs ``[B, T, D]``, or a pytree of arrays ``[B, T, ...]``.
      carry: the incoming carry, ``[B, ...]``, such as the one returned for the chunk
        before; ``None`` means the fresh one.
      lengths: the number of valid steps in each row, ``[B]`` integers from 0 to T; the
        steps after them are padding. ``None`` means that all steps are valid.
      mask: instead of ``lengths``, ``[B, T]`` booleans, true at valid steps; padding
        may be anywhere. Give one of the two, not both.
      resets: ``[B, T]`` booleans. Where ``resets[b, t]`` is true, row b has a boundary
        between the steps t-1 and t, at which the carry is made fresh again. This holds
        in both directions, and at masked steps too. ``None`` means no boundaries.
      key: a typed key, ``jax.random.key(seed)``, for the cell's noise, such as zoneout;
        ``None`` means no noise.
      reverse: true runs from each row's last valid step to its first. The outputs stay
        in the order of the inputs.
      return_carries: true also returns the carry after each step, which takes memory
        for T carries.
      checkpoint_every: saves memory where a gradient of a long sequence needs too much.
        With an integer k, the carry is stored once in k steps, and the backward pass
        computes the steps between again, which costs about one more forward pass.
        ``"sqrt"`` takes the square root of T for k, which needs nearly the least
        memory.
        ``None``, the default, stores every step. The results are the same.
      implementation: the loop that runs the cell: ``"native"``, ``"chunkwise"``,
        ``"fused"``, ``"cudnn"``, ``"scan"``, ``"associative"`` or ``"parallel"``.
        ``None``, the default, chooses one; see :func:`explain`. A loop that is named
        never falls back to another.

    Returns:
      ``(ys, carry)``. The outputs are ``[B, T, H]``. The carry is the one after each
      row's last valid step, and the incoming carry in a row of length 0. With
      ``return_carries``, ``(ys, carry, carries)``, with the carries ``[B, T, ...]``.

    Raises:
      ValueError: a shape, dtype or value does not fit, or the implementation is
        unknown.
      NotImplementedError: the named implementation cannot run this cell; or the call is
        inside a ``jax.shard_map`` that was not given ``check_vma=False``.

    Example:
      >>> cell, xs = jlstm.LSTM(8), jnp.ones((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), xs[:, 0])
      >>> ys, carry = jlstm.unroll(cell, params, xs, lengths=jnp.array([5, 2]))
      >>> bool((ys[1, 2:] == 0).all()), bool((ys[1, 1] == carry.h[1]).all())
      (True, True)
    """
    check_hashable(cell, "unroll")
    if hasattr(cell, "apply"):
        raise error(
            "unroll", f"needs a cell, got the layer {cell!r}; call its apply instead"
        )
    lengths, mask, resets = as_arrays(lengths, mask, resets)
    check_xs(cell, xs, "unroll")
    _check_shard_map((params, xs, carry))
    given_mask = mask
    mask = valid_steps(xs, lengths=lengths, mask=mask, resets=resets, where="unroll")
    check_checkpoint_every(checkpoint_every, "unroll")
    request = _request(
        (params, xs),
        xs,
        lengths,
        given_mask,
        resets,
        reverse,
        return_carries,
        checkpoint_every,
    )
    name = choose(cell, implementation, request)
    batch, time = jax.tree.leaves(xs)[0].shape[:2]
    if checkpoint_every == "sqrt":
        checkpoint_every = max(1, math.isqrt(time))
    call = Call(cell, name, reverse, return_carries, checkpoint_every, may_be_sharded())
    observer = _observer.get()
    with _telling_of_params(cell, params, xs):
        _check_carry(cell, params, carry, batch)
        if observer is None:
            return _unroll(call, params, xs, carry, mask, resets, key)
        with observing(None):  # what the cell itself unrolls is not observed
            return observer(Unrolled(call, params, xs, carry, mask, resets, key))


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call of :func:`jlstm.unroll`; equal ones compile once."""

    cell: Any
    implementation: str
    reverse: bool
    return_carries: bool
    checkpoint_every: int | None
    sharded: bool


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A checked call of :func:`unroll`, as an observer sees it."""

    call: Call
    params: PyTree
    xs: PyTree
    carry: PyTree
    mask: Array | None
    resets: Array | None
    key: Array | None

    def run(self) -> tuple[PyTree, ...]:
        """Runs it, and returns what it would have returned."""
        arrays = self.params, self.xs, self.carry, self.mask, self.resets, self.key
        return _unroll(self.call, *arrays)

    def changed(self, **fields: Any) -> Unrolled:
        """Returns another call of the same arrays, some static fields changed."""
        call = dataclasses.replace(self.call, **fields)
        return dataclasses.replace(self, call=call)

    def begun(self) -> tuple[Array | None, Array | None]:
        """Which steps ``[B, T]`` begin from the fresh carry, and which rows end so.

        In the order in which steps are taken: in reverse, a boundary between t-1 and t
        comes after t, that is, before step t-1 is taken.
        """
        return _begun(self.resets, self.call.reverse)


def _begun(resets: Array | None, reverse: bool) -> tuple[Array | None, Array | None]:
    if resets is None or not resets.shape[1] or not reverse:
        return resets, None
    return jnp.roll(resets, -1, axis=1).at[:, -1].set(False), resets[:, 0]


@partial(jax.jit, static_argnums=0)
def _unroll(
    call: Call,
    params: PyTree,
    xs: PyTree,
    carry: PyTree,
    mask: Array | None,
    resets: Array | None,
    key: Array | None,
) -> tuple[PyTree, ...]:
    cell = call.cell
    xs, resets = zero_rows(mask, xs), shard_like(resets, xs)
    run_params, xs = prepare(cell, params, xs, key)
    batch = jax.tree.leaves(xs)[0].shape[0]
    fresh = cell.init_carry(params, (batch,))
    # The fresh carry's dtypes first, so that a float32 carry may meet float64 params.
    carry = fresh if carry is None else _cast_like(carry, fresh)
    fresh, carry = _fit(cell, run_params, xs, fresh, carry)

    before, last = _begun(resets, call.reverse)
    ys, carry, carries = IMPLEMENTATIONS[call.implementation].unroll(
        cell,
        run_params,
        xs,
        carry,
        fresh,
        mask=mask,
        resets=before,
        reverse=call.reverse,
        return_carries=call.return_carries,
        checkpoint_every=call.checkpoint_every,
    )
    if last is not None:
        carry = where_rows(last, fresh, carry)
    return (ys, carry, carries) if call.return_carries else (ys, carry)


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.asarray(a).astype(b.dtype), tree, like)


def _fit(cell: Cell, params: PyTree, xs: PyTree, *carries: PyTree) -> list[PyTree]:
    """Gives carries the type that a step returns, as a loop demands.

    A ``jnp.zeros`` has neither the dtype of a promoted sum nor, under a mesh with
    explicit axes, the sharding of the data.
    """

    def first(leaf: Array) -> Array:
        if leaf.shape[1]:
            return leaf[:, 0]
        return jnp.zeros((leaf.shape[0], *leaf.shape[2:]), leaf.dtype)

    def step(params: PyTree, carry: PyTree, xs: PyTree) -> PyTree:
        return cell.step(params, carry, jax.tree.map(first, xs))[0]

    fresh = carries[0]
    try:
        out = jax.eval_shape(step, params, fresh, xs)
    except (TypeError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise error(
            "unroll",
            f"{cell!r} cannot take a step on x {shapes(xs, drop=1)} with these params "
            f"and carry {shapes(fresh)}: {reason}",
        ) from problem
    _check_like("the carry that step returned", out, fresh)

    def fit(leaf: Array, like: Any) -> Array:
        leaf = leaf.astype(like.dtype)
        spec = getattr(like.sharding, "spec", None)
        if spec is None or AxisType.Explicit not in like.sharding.mesh.axis_types:
            return leaf
        return jax.sharding.reshard(leaf, spec)

    return [jax.tree.map(fit, carry, out) for carry in carries]


def shard_like(x: Any, like: PyTree, axes: int | None = None) -> Any:
    """Shards the first axes of an array as a tree's, where axes are explicit.

    There a select or a concatenation demands operands of one sharding, which a
    ``jnp.zeros`` does not have.

    Args:
      x: an array, or ``None``.
      like: a tree of arrays; its first leaf counts.
      axes: how many axes of ``x`` to shard, all if ``None``.
    """
    sharding = jax.typeof(jax.tree.leaves(like)[0]).sharding
    if x is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    names = sharding.spec[: x.ndim if axes is None else axes]
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*names)))


# Checks. Shapes and dtypes are always known, values only where they are concrete.


def shapes(tree: PyTree, drop: int = 0) -> str:
    """Writes the shapes of a tree's leaves, without ``drop`` axes after the batch."""
    found = [np.shape(x) for x in jax.tree.leaves(tree)]
    found = [list(shape[:1] + shape[1 + drop :]) for shape in found]
    return str(found[0]) if len(found) == 1 else str(found)


def check_hashable(config: Any, where: str) -> None:
    """Refuses a cell or layer that cannot be a static argument.

    Raises:
      ValueError: it has no hash.
    """
    try:
        hash(config)
    except TypeError as problem:
        raise error(
            where,
            f"{type(config).__name__} must be hashable, got {problem}; make it a "
            "frozen dataclass whose fields are numbers, strings, tuples or "
            "module-level functions",
        ) from None


def is_concrete(x: Any) -> bool:
    """Tells whether values can be looked at."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def value_range(x: Any) -> tuple[int, int]:
    """Returns the least and the largest of concrete integers."""
    # By NumPy: inside a trace JAX would trace the minimum of a constant too.
    values = np.asarray(x)
    return int(values.min()), int(values.max())


def as_arrays(*flags: Any) -> tuple[Any, ...]:
    """Makes arrays of lists, and int32 of other integers; keeps ``None``."""

    def convert(value: Any) -> Any:
        if value is None:
            return None
        value = value if isinstance(value, jax.Array) else np.asarray(value)
        # Narrow integers cannot count the steps of a long sequence.
        if jnp.issubdtype(value.dtype, jnp.integer):
            return value.astype(jnp.int32)
        return value

    return tuple(convert(value) for value in flags)


def batch_and_time(xs: PyTree, where: str) -> tuple[int, int]:
    """Returns ``(B, T)`` of a tree of ``[B, T, ...]``.

    Raises:
      ValueError: no leaves, a leaf of fewer than two axes, or leaves that disagree.
    """
    leaves = jax.tree.leaves(xs)
    if not leaves or any(np.ndim(leaf) < 2 for leaf in leaves):
        raise error(where, f"xs must be [B, T, ...], got shape {shapes(xs)}")
    if len({leaf.shape[:2] for leaf in leaves}) > 1:
        raise error(
            where, f"all leaves of xs must begin with the same [B, T], got {shapes(xs)}"
        )
    return leaves[0].shape[:2]


def check_xs(cell: Cell, xs: PyTree, where: str) -> None:
    """Refuses inputs that are no sequences of what a cell takes.

    Raises:
      ValueError: not ``[B, T, ...]``, with as many feature axes as ``cell.x_ndim``.
    """
    batch_and_time(xs, where)
    leaves = jax.tree.leaves(xs)
    features = getattr(cell, "x_ndim", 1)
    if len(leaves) == 1 and leaves[0].ndim != 2 + features:
        expected = "[B, T" + {0: "]", 1: ", D]"}.get(features, ", ...]")
        raise error(
            where,
            f"xs must be {expected}, got shape {leaves[0].shape}; {cell!r} takes "
            f"inputs with {features} feature dimension{'s' * (features != 1)} per "
            "step (its x_ndim)"
            + "; for one number per step give xs[..., None]"
            * (features == 1 and leaves[0].ndim == 2),
        )


def _check_shard_map(arrays: PyTree) -> None:
    types = map(jax.typeof, jax.tree.leaves(arrays))
    if any(type_.manual_axis_type.varying for type_ in types):
        raise NotImplementedError(
            "unroll: inside jax.shard_map, give shard_map check_vma=False, because "
            "the loops do not track which values differ among devices; take gradients "
            "outside the shard_map, or sum the gradients of the params over the "
            "devices yourself"
        )


def valid_steps(
    xs: PyTree,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    where: str = "valid_steps",
) -> Array | None:
    """Checks lengths, mask and resets, and returns them as one mask.

    This is the first line in the ``apply`` of a layer of your own. Give the result to
    :func:`jlstm.zero_rows`, once with the inputs and once with the outputs.

    Args:
      xs: the inputs, ``[B, T, ...]``.
      lengths: the number of valid steps in each row, ``[B]`` integers, or ``None``.
      mask: true at valid steps, ``[B, T]`` booleans, or ``None``.
      resets: ``[B, T]`` booleans, or ``None``; they are checked and not used.
      where: the first word of error messages, such as the name of your layer.

    Returns:
      ``[B, T]`` booleans, true at valid steps; ``None`` if every step is valid.

    Raises:
      ValueError: lengths and mask are both given, a shape or dtype is wrong, or a
        length is not in 0..T. Under ``jax.jit`` values are not known, and lengths out
        of range are clipped instead.

    Example:
      >>> jlstm.valid_steps(jnp.ones((1, 3, 5)), lengths=jnp.array([2])).tolist()
      [[True, True, False]]
    """
    shape = batch, time = batch_and_time(xs, where)
    lengths, mask, resets = as_arrays(lengths, mask, resets)
    for name, flags in (("mask", mask), ("resets", resets)):
        if flags is not None and (flags.shape != shape or flags.dtype != bool):
            raise error(
                where,
                f"{name} must be [B, T]=[{batch}, {time}] bool, got "
                f"{list(flags.shape)} {flags.dtype}",
            )
    if lengths is None:
        return shard_like(mask, xs)
    if mask is not None:
        raise error(where, "give lengths or mask, not both; got both")
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise error(
            where,
            f"lengths must be [B]=[{batch}] integers, got "
            f"{list(lengths.shape)} {lengths.dtype}",
        )
    if is_concrete(lengths) and batch:
        low, high = value_range(lengths)
        if low < 0 or high > time:
            raise error(
                where,
                f"lengths must lie in 0..T={time}, got values from {low} to {high}",
            )
    steps = jnp.arange(time, dtype=lengths.dtype)
    return shard_like(steps[None, :] < lengths[:, None], xs)


def check_checkpoint_every(value: Any, where: str) -> None:
    """Refuses a ``checkpoint_every`` that :func:`jlstm.unroll` does not take.

    Raises:
      ValueError: neither a positive integer, nor ``"sqrt"``, nor ``None``.
    """
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not whole and value not in ("sqrt", None):
        raise error(
            where,
            f"checkpoint_every must be a positive int, 'sqrt' or None, got {value!r}",
        )


@contextlib.contextmanager
def _telling_of_params(cell: Cell, params: PyTree, xs: PyTree) -> Iterator[None]:
    """Adds to an error in what way params are not those that ``cell.init`` makes."""
    try:
        yield
    except Exception as failure:
        with contextlib.suppress(Exception):  # it may be what `init` does not take
            x = jax.eval_shape(partial(jax.tree.map, lambda leaf: leaf[:, 0]), xs)
            made = jax.eval_shape(cell.init, jax.random.key(0), x)
            if line := _difference(params, made):
                path_ = ".".join([*filter(None, path()), "unroll"])
                failure.add_note(f"{path_}: {cell!r} has other params: {line}")
        raise


def _difference(tree: PyTree, like: PyTree) -> str | None:
    if type(tree) is not type(like):
        return f"expected {type(like).__name__}, got {type(tree).__name__}"
    if jax.tree.structure(tree) != jax.tree.structure(like):
        return "some are missing, or too many"
    leaves = zip(jax.tree.leaves_with_path(like), jax.tree.leaves(tree), strict=True)
    for (where, a), b in leaves:
        if a.shape != jnp.shape(b):
            name = jax.tree_util.keystr(where, simple=True, separator=".")
            return f"{name} must be {list(a.shape)}, got {list(jnp.shape(b))}"
    return None


def _check_carry(cell: Cell, params: PyTree, carry: PyTree, batch: int) -> None:
    if carry is None:
        return
    fresh = jax.eval_shape(lambda p: cell.init_carry(p, (batch,)), params)
    _check_like("carry", carry, fresh)


def _check_like(name: str, tree: PyTree, like: PyTree) -> None:
    got, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if got != expected:
        raise error("unroll", f"{name} must have the structure {expected}, got {got}")
    pairs = zip(jax.tree.leaves_with_path(like), jax.tree.leaves(tree), strict=True)
    for (path, a), b in pairs:
        if a.shape != jnp.shape(b):
            leaf = name + jax.tree_util.keystr(path)
            raise error(
                "unroll", f"{leaf} must be {list(a.shape)}, got {list(jnp.shape(b))}"
            )


# The choice of an implementation.


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation runs a cell, and why the others do not; ``print`` shows it.

    Attributes:
      implementation: the name of the one that runs.
      others: a pair for each of the others: its name, and a text that begins with
        ``can`` or ``cannot`` and gives the reason.
      note: a remark on the one that runs, or ``""``.
    """

    implementation: str
    others: tuple[tuple[str, str], ...]
    note: str = ""

    def __str__(self) -> str:
        first = f"{self.implementation} runs" + (self.note and f", {self.note}")
        return "\n".join([first, *map(" ".join, self.others)])


def explain(
    cell: Cell,
    xs: PyTree = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_carries: bool = False,
    checkpoint_every: int | Literal["sqrt"] | None = None,
    implementation: str | None = None,
) -> Explanation:
    """Says which implementation :func:`jlstm.unroll` would run, and why not the others.

    Nothing is computed. Give the options with which you will call
    :func:`jlstm.unroll`, because some loops cannot run under all of them.

    Args:
      cell: any cell.
      xs: the inputs, or ``jax.ShapeDtypeStruct`` of their shapes and dtypes. Without
        them, a dtype that every implementation supports is assumed.
      lengths: as for :func:`jlstm.unroll`; only whether it is given counts.
      mask: likewise.
      resets: likewise.
      reverse: as for :func:`jlstm.unroll`.
      return_carries: likewise.
      checkpoint_every: likewise.
      implementation: the one to ask about; ``None`` asks which one is chosen.

    Returns:
      An :class:`Explanation`.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: the named implementation cannot run this cell.

    Example:
      >>> explanation = jlstm.explain(jlstm.Elman(8))
      >>> explanation.implementation
      'fused'
      >>> dict(explanation.others)["scan"]
      'can: fused comes first'
    """
    if hasattr(cell, "apply"):
        raise error(
            "explain",
            f"needs a cell, got the layer {cell!r}; for a layer, print "
            "jlstm.summary(layer, xs)",
        )
    check_hashable(cell, "explain")
    request = _request(
        xs, xs, lengths, mask, resets, reverse, return_carries, checkpoint_every
    )
    chosen = choose(cell, implementation, request)
    others = []
    for name, kernel in IMPLEMENTATIONS.items():
        if name != chosen:
            reason = kernel.why_not(cell, request)
            first = f"{chosen} {'was named' if implementation else 'comes first'}"
            why = f"can: {first}" if reason is None else f"cannot: {reason}"
            others.append((name, why))
    note = getattr(IMPLEMENTATIONS[chosen], "note", None)
    return Explanation(chosen, tuple(others), note(cell, request, xs) if note else "")


def _request(
    arrays: PyTree,
    xs: PyTree,
    lengths: Array | None,
    mask: Array | None,
    resets: Array | None,
    reverse: bool,
    return_carries: bool,
    checkpoint_every: Any,
) -> Request:
    leaves = jax.tree.leaves(arrays)
    dtypes = frozenset(str(jnp.result_type(leaf)) for leaf in leaves)
    sizes = (size for leaf in leaves for size in np.shape(leaf))
    return Request(
        platform=jax.default_backend(),
        dtypes=dtypes or None,
        mask="mask" if mask is not None else "" if lengths is None else "lengths",
        resets=resets is not None,
        reverse=reverse,
        return_carries=return_carries,
        checkpoint_every=checkpoint_every is not None,
        sharded=may_be_sharded(),
        any_size=not all(isinstance(size, int) for size in sizes),
        inputs=None if xs is None else inputs_of(xs),
    )


def inputs_of(xs: PyTree) -> tuple[Any, tuple]:
    """Returns the structure of inputs, and the shapes and dtypes of their leaves."""
    leaves, tree = jax.tree.flatten(xs)
    like = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    return tree, tuple(like)


def able(cell: Cell, request: Request = UNKNOWN) -> list[str]:
    """Names the implementations that can run a cell, in the order of choice."""
    return [
        n for n, kernel in IMPLEMENTATIONS.items() if not kernel.why_not(cell, request)
    ]


def choose(cell: Cell, implementation: str | None, request: Request = UNKNOWN) -> str:
    """Returns the name of the implementation to run; a named one never falls back."""
    gated(cell)  # refuses a half-defined form, whatever runs
    if implementation is None:
        found = (n for n, k in IMPLEMENTATIONS.items() if not k.why_not(cell, request))
        return next(found)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise error(
            "unroll", f"implementation must be one of {names}, got {implementation!r}"
        )
    reason = IMPLEMENTATIONS[implementation].why_not(cell, request)
    if reason is not None:
        raise NotImplementedError(
            f"{implementation}: {reason}; use implementation='scan', or None for the "
            "default"
        )
    return implementation
