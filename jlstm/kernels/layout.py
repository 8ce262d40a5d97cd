"""Finds what the parts of a cell read, and what the reverse loop needs of each step.

The forward loop stores the arrays that the VJP of ``update`` holds, and the carry
before the step. An array that occurs twice is stored once. An array that follows from
others by little work, or from the params alone, is not stored but computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.kernels import recipes
from jlstm.kernels.recipes import Recipe
from jlstm.types import Array, PyTree, is_inexact, join, smooth_leaves

# Integers (a step counter in the carry, token ids in xs) have no cotangent. A tree is
# therefore split in two of the same structure, with None in each where the other has a
# leaf: None is an empty subtree, so that vjp, scan and vmap never meet such leaves.


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Separates leaves that have a cotangent from the others; see ``types.join``."""
    rest = jax.tree.map(lambda leaf: None if is_inexact(leaf) else leaf, tree)
    return smooth_leaves(tree), rest


def take(params: PyTree, places: tuple[int, ...]) -> list[Array]:
    """Picks some leaves by their indices."""
    leaves = jax.tree.leaves(params)
    return [leaves[place] for place in places]


def put(params: PyTree, places: tuple[int, ...], values: list[Array]) -> PyTree:
    """Replaces some leaves, given by their indices."""
    leaves, tree = jax.tree.flatten(params)
    for place, value in zip(places, values, strict=True):
        leaves[place] = value
    return tree.unflatten(leaves)


class Step(NamedTuple):
    """The arguments of ``update`` other than the params."""

    carry: PyTree
    zx: PyTree
    zh: PyTree


class Kept(NamedTuple):
    """What the reverse loop needs of a step."""

    pull: Callable  # the VJP of update
    step: Step  # None where it is not read


class Layout(NamedTuple):
    """What the parts of a cell read, and what is stored; found by tracing one step."""

    # The params that update reads, as indices of leaves. Vectors are no larger than the
    # carry of a row, and their gradients are summed step by step; the gradients of
    # matrices are summed over a block at once.
    vectors: tuple[int, ...]
    matrices: tuple[int, ...]
    mix_reads_zx: bool
    update_cuts_zx: bool  # whether update begins by cutting zx into parts
    dzx_is_dzh: bool = False  # whether their cotangents agree, as if zx + zh is read
    equal: tuple[int, ...] = ()  # for each leaf of Kept, the first one equal to it
    stored: tuple[int, ...] = ()  # the leaves of Kept that are stored
    made: tuple[Recipe, ...] = ()  # those that are computed from stored ones

    def store(self, kept: Kept) -> list[Array]:
        """Picks the leaves to store."""
        leaves = jax.tree.leaves(kept)
        stored = (leaves[i] for i in self.stored)
        return [
            leaf.astype(np.float32) if leaf.dtype == bool else leaf for leaf in stored
        ]

    def restore(self, stored: list[Array], like: Kept, *, whole: bool = True) -> Kept:
        """Puts the stored leaves back; the others come from ``like``.

        Unless ``whole`` is true, only ``step`` is restored.
        """
        leaves, tree = jax.tree.flatten(like)
        for i, leaf in zip(self.stored, stored, strict=True):
            leaves[i] = leaf != 0 if leaves[i].dtype == bool else leaf
        found = set(self.stored)
        for recipe in self.made if whole else ():
            leaves[recipe.made] = recipe(leaves)
            found.add(recipe.made)
        for i, first in enumerate(self.equal):
            if first in found:
                leaves[i] = leaves[first]
        return tree.unflatten(leaves)


def first_step(cell: Any, params: PyTree, carry: PyTree, xs: PyTree) -> Step:
    """Makes the arguments of the first step of a sequence."""
    zx = cell.project(params, jax.tree.map(lambda leaf: leaf[:, 0], xs))
    return Step(carry, zx, cell.mix(params, carry, zx))


def update(cell: Any, layout: Layout, params: PyTree, step: Step) -> tuple:
    """Runs ``update``; returns its results, and what the reverse loop needs of them.

    The latter includes a VJP for the vectors and for the smooth part of the step.
    """
    smooth, rest = split(step)

    def run(vectors: list[Array], smooth: Step) -> tuple[PyTree, PyTree]:
        replaced = put(params, layout.vectors, vectors)
        return split(cell.update(replaced, *join(smooth, rest)))

    vectors = take(params, layout.vectors)
    out, pull, out_rest = jax.vjp(run, vectors, smooth, has_aux=True)
    zx = step.zx if layout.mix_reads_zx or layout.matrices else None
    zh = step.zh if layout.matrices else None
    return join(out, out_rest), Kept(pull, Step(step.carry, zx, zh))


def find(cell: Any, params: PyTree, step: Step) -> Layout:
    """Traces one step; of ``step`` only shapes and dtypes count."""
    leaves = jax.tree.leaves(params)
    rows = (math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(step.carry))
    largest = max(rows, default=0)

    def reads(places: list[int]) -> bool:
        def run(values: list[Array], fixed: tuple) -> PyTree:
            return cell.update(put(fixed[0], tuple(places), values), *fixed[1])

        return any(_varying(run, [leaves[i] for i in places], (params, step)))

    def mix(zx: PyTree, fixed: tuple) -> PyTree:
        return cell.mix(*fixed, zx)

    read = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    # Most cells read none, so all leaves are tried together first.
    read = [i for i in read if reads([i])] if reads(read) else []
    small = [leaf.ndim < 2 or leaf.size <= largest for leaf in leaves]
    layout = Layout(
        vectors=tuple(i for i in read if small[i]),
        matrices=tuple(i for i in read if not small[i]),
        mix_reads_zx=any(_varying(mix, step.zx, (params, step.carry))),
        update_cuts_zx=begins_by_cutting(
            lambda zx, params, step: cell.update(params, step.carry, zx, step.zh),
            (step.zx, params, step),
        ),
    )
    return _find_stored(cell, layout, params, step)


def _find_stored(cell: Any, layout: Layout, params: PyTree, step: Step) -> Layout:
    """Finds what the VJP of ``update`` holds, and which parts of that to store."""
    names: list[int] = []
    same: list[bool] = []

    def kept(step: Step, params: PyTree) -> Kept:
        kept = update(cell, layout, params, step)[1]
        names[:] = map(id, jax.tree.leaves(kept))
        return kept

    def pull(step: Step, params: PyTree) -> None:
        out, kept = update(cell, layout, params, step)
        _, (_, *dz) = kept.pull(smooth_leaves(out))
        dzx, dzh = map(jax.tree.leaves, dz)
        same.append(list(map(id, dzx)) == list(map(id, dzh)))

    moves = _varying(kept, step, params)
    equal = tuple(names.index(name) for name in names)
    moving = [i for i in dict.fromkeys(equal) if moves[i]]
    # The step is also read without the rest, so its leaves must be stored.
    size = len(jax.tree.leaves(jax.eval_shape(kept, step, params).step))
    of_step = {i for i in equal[len(equal) - size :] if i in moving}

    def arrays(step: Step, params: PyTree) -> list[Array]:
        leaves = jax.tree.leaves(kept(step, params))
        return [leaves[i] for i in moving]

    found = recipes.find(arrays, (step, params), {moving.index(i) for i in of_step})
    made = tuple(
        each._replace(made=moving[each.made], of=tuple(moving[i] for i in each.of))
        for each in found
    )
    again = {each.made for each in made}
    stored = tuple(i for i in moving if i not in again)
    jax.eval_shape(pull, step, params)
    dzx_is_dzh = same[0] and not layout.mix_reads_zx
    return layout._replace(dzx_is_dzh=dzx_is_dzh, equal=equal, stored=stored, made=made)


def begins_by_cutting(fun: Callable, args: tuple) -> bool:
    """Tells whether ``fun`` cuts its first argument before any arithmetic on it."""
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    given = set(map(id, jaxpr.invars[: len(jax.tree.leaves(args[0]))]))
    cutting = {"slice", "split", "dynamic_slice", "gather"}
    return any(
        eqn.primitive.name in cutting and id(eqn.invars[0]) in given
        for eqn in jaxpr.eqns
    )


def _varying(fun: Callable, moving: PyTree, fixed: PyTree) -> list[bool]:
    """Tells which leaves of ``fun(moving, fixed)`` depend on ``moving``.

    vmap knows: a result that depends on no mapped argument is not mapped.
    """
    flags: list[bool] = []

    def row(moving: PyTree, fixed: PyTree) -> tuple:
        kinds = tuple({type(leaf) for leaf in jax.tree.leaves(moving)})
        # Copies, since some calls wrap results that are not mapped as well.
        results = map(jnp.copy, jax.tree.leaves(fun(moving, fixed)))
        flags.extend(isinstance(leaf, kinds) for leaf in results)
        return ()

    def probe(moving: PyTree, fixed: PyTree) -> None:
        moving = jax.tree.map(lambda leaf: leaf[None], moving)
        jax.vmap(lambda moving: row(moving, fixed), axis_size=1)(moving)

    jax.eval_shape(probe, moving, fixed)
    return flags
