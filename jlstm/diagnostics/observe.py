"""Runs a layer, and observes every step of every recurrence inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlstm import door
from jlstm.cells.gates import naming
from jlstm.cells.wrappers import prepare
from jlstm.diagnostics.elementwise import diagonal
from jlstm.diagnostics.traces import Trace, Traces
from jlstm.layers.compose import check_input
from jlstm.layers.recurrent import check_layer_field, is_layer, recording
from jlstm.types import (
    Array,
    Cell,
    Layer,
    PyTree,
    gated,
    is_inexact,
    where_rows,
    zero_rows,
)


def trace(
    layer: Layer | Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree = None,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    key: Array | None = None,
    reverse: bool = False,
) -> Any:
    """Runs a cell or a layer, and keeps what every step of its recurrences did.

    It is compiled once for each layer and shape. A wrapped cell shows the gates of the
    inner cell.

    Args:
      layer: a cell, a layer or a model.
      params: its params.
      xs: inputs ``[B, T, ...]``.
      carry: the incoming carry; None means the fresh one.
      lengths: valid steps of each row, ``[B]`` integers; None if all are valid.
      mask: true at valid steps, ``[B, T]``, for padding that is not at the end; give
        ``lengths`` or ``mask``, not both.
      resets: true where a row begins anew, ``[B, T]``; None for nowhere.
      key: the PRNG key of dropout and other noise; None runs without noise.
      reverse: for a cell only: whether to take the steps from the last to the first.

    Returns:
      A :class:`Trace` for a cell; for a layer, a :class:`Traces`, which maps the paths
      of its recurrences to traces.

    Raises:
      TypeError: ``layer`` is neither a cell nor a layer.
      ValueError: ``reverse`` is given for a layer, no recurrence can be observed, or
        the layer refuses the inputs.

    Example:
      >>> layer = jlstm.stack(jlstm.RNN(jlstm.LSTM(4)), jlstm.Dense(2))
      >>> xs = jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> found = jlstm.diagnostics.trace(layer, params, xs)["stack[0]"]
      >>> list(found.gates), found.gates["f"].shape, found.retention["c"].shape
      (['i', 'f', 'g', 'o'], (2, 5, 4), (2, 5, 4))
    """
    masking = {"lengths": lengths, "mask": mask, "resets": resets}
    masking = check_inputs("trace", layer, xs, masking)
    if is_layer(layer) and reverse:
        raise door.error(
            "trace", "reverse is only for cells; a layer has its own direction"
        )
    masking["key"] = key
    with in_sight("trace", layer):
        ys, last, found = _trace(layer, reverse, params, xs, carry, masking)
    return Traces(found, ys, last) if is_layer(layer) else found[0]


def check_inputs(
    where: str, layer: Any, xs: PyTree, masking: Mapping[str, Any]
) -> dict[str, Any]:
    """Checks inputs whose values are known, and turns lists into arrays.

    Raises:
      TypeError: ``layer`` is neither a cell nor a layer.
      ValueError: xs, lengths, mask or resets do not fit.
    """
    if not (hasattr(layer, "step") and hasattr(layer, "init_carry")):
        check_layer_field(where, layer)
    door.check_hashable(layer, where)
    made = dict(zip(masking, door.as_arrays(*masking.values()), strict=True))
    door.valid_steps(xs, **made, where=where)
    check_input(layer, xs)
    return made


def run(layer: Any, reverse: bool, *args: Any, **masking: Any) -> tuple:
    """Runs a layer, or unrolls a cell over a sequence."""
    if is_layer(layer):
        return layer.apply(*args, **masking)
    return door.unroll(layer, *args, reverse=reverse, **masking)


def observed(
    observer: Callable[[str, door.Unrolled], Any], call: Callable[[], Any]
) -> Any:
    """Calls a function, and shows its recurrences to an observer, with their paths."""
    seen: dict[str, int] = {}

    def observe(unrolled: door.Unrolled) -> Any:
        path = ".".join(door.path()) or "RNN"
        seen[path] = count = seen.get(path, 0) + 1
        path = path if count == 1 else f"{path} ({count})"
        return observer(path, unrolled)

    # While layers are recorded, a stack runs them one by one, not as a compiled whole.
    with recording(), door.observing(observe):
        return call()


@contextlib.contextmanager
def in_sight(where: str, layer: Any) -> Iterator[None]:
    """Explains the error of a recurrence that cannot be observed.

    Raises:
      ValueError: it runs inside a function that the layer compiles or scans itself.
    """
    try:
        yield
    except jax.errors.UnexpectedTracerError:
        raise out_of_sight(where, layer) from None


def out_of_sight(where: str, layer: Any) -> ValueError:
    """Makes the error for a layer whose recurrences cannot be observed."""
    return door.error(
        where,
        f"finds no recurrence in {layer!r}; a recurrence inside a jax.jit or a "
        "lax.scan of the layer's own cannot be seen; give the inner layer by itself",
    )


@partial(jax.jit, static_argnums=(0, 1))
def _trace(
    layer: Any, reverse: bool, params: PyTree, xs: PyTree, carry: PyTree, masking: dict
) -> tuple[PyTree, PyTree, tuple[Trace, ...]]:
    found: list[Trace] = []

    def observer(path: str, unrolled: door.Unrolled) -> tuple[PyTree, ...]:
        made, outs = _observe(path if is_layer(layer) else "", unrolled)
        found.append(made)
        return outs

    ys, carry = observed(
        observer, lambda: run(layer, reverse, params, xs, carry, **masking)
    )[:2]
    if not found:
        raise out_of_sight("trace", layer)
    return ys, carry, tuple(found)


def _observe(path: str, unrolled: door.Unrolled) -> tuple[Trace, tuple[PyTree, ...]]:
    call = unrolled.call
    cell: Any = call.cell
    outs = unrolled.changed(return_carries=True, implementation="scan").run()
    ys, _, carries = outs
    batch, time = jax.tree.leaves(unrolled.xs)[0].shape[:2]
    valid = jnp.ones((batch, time), bool) if unrolled.mask is None else unrolled.mask
    begins, _ = unrolled.begun()
    fresh = cell.init_carry(unrolled.params, (batch,))
    fresh = jax.tree.map(lambda a, b: a.astype(b.dtype), fresh, carries)
    initial = fresh if unrolled.carry is None else unrolled.carry
    initial = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), initial, carries)
    before = _before(carries, initial, call.reverse)
    if begins is not None:
        repeated = jax.tree.map(
            lambda a, b: jnp.broadcast_to(a[:, None], b.shape), fresh, before
        )
        before = where_rows(begins, repeated, before)
    xs = zero_rows(unrolled.mask, unrolled.xs)
    params, xs = prepare(cell, unrolled.params, xs, unrolled.key)
    names: list[Any] = [(), ()]

    def each(carry: PyTree, x: PyTree) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        values, advance = _step(cell, params, carry, x)
        names[0] = tuple((each.name, each.kind) for each in values)
        names[1], kept = _retention(advance, carry)
        return tuple(each.value for each in values), kept

    gates, kept = jax.vmap(each, 1, 1)(before, xs)
    begins = jnp.zeros((batch, time), bool) if begins is None else begins
    values = gates, _values(carries), kept, _values(initial)
    made = Trace(
        path,
        cell,
        call.reverse,
        (_distinct(names[0]), names[1]),
        values,
        carries,
        before,
        ys,
        valid,
        begins,
    )
    return made, outs if call.return_carries else outs[:2]


def _before(carries: PyTree, initial: PyTree, reverse: bool) -> PyTree:
    def shift(leaf: Array, first: Array) -> Array:
        if reverse:
            return jnp.concatenate([leaf[:, 1:], first[:, None]], axis=1)
        return jnp.concatenate([first[:, None], leaf[:, :-1]], axis=1)

    return jax.tree.map(shift, carries, initial)


def _step(cell: Any, params: PyTree, carry: PyTree, x: PyTree) -> tuple[list, Any]:
    """Takes a step; returns its named gates, and the carry's path without products."""
    # Gates inside a function that the step compiles itself would not be seen.
    with naming() as values, jax.disable_jit():
        if not gated(cell):
            cell.step(params, carry, x)
            return values, lambda carry: cell.step(params, carry, x)[0]
        zx = cell.project(params, x)
        zh = cell.mix(params, carry, zx)
        cell.update(params, carry, zx, zh)
        return values, lambda carry: cell.update(params, carry, zx, zh)[0]


def _distinct(names: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    seen: dict[str, int] = {}
    made = []
    for name, kind in names:
        seen[name] = count = seen.get(name, 0) + 1
        made.append((name if count == 1 else f"{name} ({count})", kind))
    return tuple(made)


def name_of(path: Any) -> str:
    """Names a part of a carry by its path."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "carry"


def _places(carry: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    """Names the parts of a carry, with the indices of their leaves."""
    names = [name_of(path) for path, _ in jax.tree.leaves_with_path(carry)]
    made: list[tuple[str, tuple[int, ...]]] = []
    for i, name in enumerate(names):
        head, dot, last = name.rpartition(".")
        if last == "re" and f"{head}{dot}im" in names:
            made.append((f"{head}{dot}s", (i, names.index(f"{head}{dot}im"))))
        elif last != "im" or f"{head}{dot}re" not in names:
            made.append((name, (i,)))
    return made


def _joined(leaves: list[Array]) -> Array:
    return leaves[0] if len(leaves) == 1 else jax.lax.complex(*leaves)


def _values(carry: PyTree) -> tuple[Array, ...]:
    leaves = jax.tree.leaves(carry)
    return tuple(_joined([leaves[i] for i in places]) for _, places in _places(carry))


def _retention(
    advance: Callable[[PyTree], PyTree], carry: PyTree
) -> tuple[tuple[str, ...], tuple[Array, ...]]:
    leaves, tree = jax.tree.flatten(carry)
    names, made = [], []
    for name, places in _places(carry):
        first = places[0]
        names.append(name)
        if not is_inexact(leaves[first]):
            made.append(jnp.zeros(leaves[first].shape))
            continue

        def along(
            leaf: Array, first: int = first, places: tuple[int, ...] = places
        ) -> list[Array]:
            changed = [*leaves[:first], leaf, *leaves[first + 1 :]]
            out = jax.tree.leaves(advance(tree.unflatten(changed)))
            return [out[i] for i in places]

        made.append(_joined(diagonal(along, leaves[first])))
    return tuple(names), tuple(made)
