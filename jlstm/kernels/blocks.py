"""A sequence cut into blocks of steps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlstm.types import PyTree


class Segment(NamedTuple):
    """Blocks of equal size; a sequence has one, or a second of one shorter block."""

    start: int
    blocks: int
    steps: int  # in a block


def segments(time: int, size: int) -> list[Segment]:
    """Cuts T into blocks of ``size`` steps, the last one shorter if need be."""
    count, rest = divmod(time, size)
    found = [Segment(0, count, size), Segment(count * size, 1, rest)]
    return [segment for segment in found if segment.blocks * segment.steps]


def near_divisor(time: int, size: int) -> int:
    """Picks a size near ``size`` that divides T, so that one segment is enough."""
    if time <= size:
        return time
    near = [n for n in range((size + 1) // 2, 2 * size + 1) if time % n == 0]
    return min(near, key=lambda n: max(n / size, size / n), default=size)


def time_major(tree: PyTree) -> PyTree:
    """Swaps the first two axes of each leaf, which undoes itself."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)
