"""Helpers that cut a sequence into blocks of steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlstm.types import Array, PyTree


class Segment(NamedTuple):
    """Some blocks of equal size; a sequence has one segment, or a second, short one."""

    start: int
    blocks: int
    steps: int  # in a block


def segments(time: int, size: int) -> list[Segment]:
    """Cuts T steps into blocks of ``size`` steps, the last one shorter if need be."""
    count, rest = divmod(time, size)
    found = [Segment(0, count, size), Segment(count * size, 1, rest)]
    return [segment for segment in found if segment.blocks * segment.steps]


def near_divisor(time: int, size: int) -> int:
    """Picks a size near ``size`` that divides T, so that one segment is enough."""
    if time <= size:
        return time
    near = [n for n in range((size + 1) // 2, 2 * size + 1) if time % n == 0]
    return min(near, key=lambda n: max(n / size, size / n), default=size)


class Place(NamedTuple):
    """The place of a block in the sequence."""

    start: Any  # its first step
    number: Any  # how many blocks come before it


def over_blocks(
    block: Callable,
    state: PyTree,
    cuts: list[Segment],
    read: PyTree,
    written: PyTree,
    *,
    reverse: bool,
) -> tuple[PyTree, PyTree]:
    """Runs ``block(state, part of read, place) -> (state, part of written)``.

    Blocks are cut out of batch-major arrays and written back into batch-major arrays,
    so no array as long as the sequence is ever transposed. A loop that needs time-major
    arrays transposes one block at a time.
    """
    numbers = [0, *itertools.accumulate(cut.blocks for cut in cuts)]
    for each, number in list(zip(cuts, numbers, strict=False))[:: -1 if reverse else 1]:

        def body(both: tuple, place: Place, steps: int = each.steps) -> tuple:
            state, written = both
            part = cut(read, place.start, steps, axis=1)
            state, done = block(state, part, place)
            return (state, paste(written, done, place.start, axis=1)), None

        blocks = jnp.arange(each.blocks, dtype=jnp.int32)
        places = Place(each.start + each.steps * blocks, number + blocks)
        both = (state, written)
        if each.blocks == 1:  # a loop would only cost time to compile
            both, _ = body(both, jax.tree.map(lambda leaf: leaf[0], places))
        else:
            both, _ = jax.lax.scan(body, both, places, reverse=reverse)
        state, written = both
    return state, written


def scan_blocks(
    block: Callable, carry: PyTree, inputs: PyTree, size: int, *, reverse: bool
) -> tuple[PyTree, PyTree]:
    """Runs ``block(carry, inputs) -> (carry, outs)`` over time-major blocks.

    Unlike :func:`over_blocks`, this function can be differentiated by JAX.
    """
    order = -1 if reverse else 1
    time = jax.tree.leaves(inputs)[0].shape[0]
    outs = []
    for start, blocks, steps in segments(time, size)[::order]:

        def part(leaf: Array, window: tuple = (start, blocks, steps)) -> Array:
            start, blocks, steps = window
            found = leaf[start : start + blocks * steps]
            return found.reshape(blocks, steps, *leaf.shape[1:])

        carry, out = jax.lax.scan(
            block, carry, jax.tree.map(part, inputs), reverse=reverse
        )
        outs.append(out)

    def whole(*parts: Array) -> Array:
        return jnp.concatenate(
            [p.reshape(p.shape[0] * p.shape[1], *p.shape[2:]) for p in parts]
        )

    return carry, jax.tree.map(whole, *outs[::order])


def over_steps(
    fun: Callable, params: PyTree, steps: PyTree, axis: int, *, sharded: bool
) -> PyTree:
    """Applies ``fun(params, step)`` to the steps of a block, as one batch if possible.

    On a CPU, a gradient that contracts two axes ``[T, B, D]`` takes twice as long as
    one that contracts ``[T * B, D]``. The axes cannot be merged if params differ by row
    or the batch lies on several devices.
    """
    lead = jax.tree.leaves(steps)[0].shape[:2]

    def flat(leaf: Array) -> Array:
        return leaf.reshape(lead[0] * lead[1], *leaf.shape[2:])

    def unflat(leaf: Array) -> Array:
        return leaf.reshape(*lead, *leaf.shape[1:])

    if not sharded:
        try:
            return jax.tree.map(unflat, fun(params, jax.tree.map(flat, steps)))
        except (TypeError, ValueError):
            pass
    return jax.vmap(fun, in_axes=(None, axis), out_axes=axis)(params, steps)


# These functions read and write parts of the leaves of a tree, along one axis. Without
# support for negative indices, XLA vectorises them on a CPU.
_INDEX: dict[str, Any] = {"allow_negative_indices": False}


def cut(tree: PyTree, start: Any, size: int, *, axis: int) -> PyTree:
    """Takes ``size`` steps from ``start`` on."""

    def cut(leaf: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis, **_INDEX)

    return jax.tree.map(cut, tree)


def paste(tree: PyTree, part: PyTree, start: Any, *, axis: int) -> PyTree:
    """Writes a part from ``start`` on."""

    def paste(leaf: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis, **_INDEX)

    return jax.tree.map(paste, tree, part)


def at(tree: PyTree, step: Any, *, axis: int) -> PyTree:
    """Takes one step, without its axis."""

    def at(leaf: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(leaf, step, axis, keepdims=False, **_INDEX)

    return jax.tree.map(at, tree)


def put_at(tree: PyTree, part: PyTree, step: Any) -> PyTree:
    """Writes one step of time-major arrays."""
    return paste(tree, jax.tree.map(lambda leaf: leaf[None], part), step, axis=0)


def time_major(tree: PyTree) -> PyTree:
    """Swaps the first two axes of each leaf, which undoes itself."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)
