r"""The gated loop: one ``custom_vjp`` for every cell in gated form.

With :math:`z^x_t = \mathrm{project}(\theta, x_t)`,
:math:`z^h_t = \mathrm{mix}(\theta, s_{t-1}, z^x_t)` and
:math:`s_t, y_t = \mathrm{update}(\theta, s_{t-1}, z^x_t, z^h_t)`, the reverse loop
carries only the cotangent of the carry :math:`s` and writes the cotangents of
:math:`z^x` and :math:`z^h`. The gradients of the params come from one VJP over the
steps of a block, taken as one batch, which XLA sees as large matrix products.

The sequence runs in blocks of steps, so that what a block makes stays in the cache. The
forward loop stores what the VJP of ``update`` holds; or, to save memory, only the carry
before each block, and the reverse loop runs the block once more. For a policy of a
``jax.checkpoint`` around the call, these carries have the name ``jlstm_carry``, and
:math:`z^x` has ``jlstm_zx``, unless each step computes its own.

On a CPU the steps of a block are :mod:`jlstm.kernels.program`'s where they can be; else
their products with weights are :mod:`jlstm.kernels.product`'s.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from jlstm.cells.wrappers import prepare
from jlstm.kernels import library, product, program, recipes, scan
from jlstm.kernels.blocks import Segment, near_divisor, segments, time_major
from jlstm.kernels.graph import Unsuited
from jlstm.kernels.recipes import Recipe
from jlstm.kernels.request import Request, may_be_sharded, rows_in_one_place
from jlstm.types import (
    PARTS,
    Array,
    Cell,
    PyTree,
    common_dtype,
    gated,
    is_inexact,
    join,
    smooth_leaves,
    where_rows,
    zero_rows,
)

# The projected inputs of a block take about so many bytes, which stay in the caches. It
# has so many steps at least, since a block has a price of its own.
BYTES, STEPS = 3 << 19, 8
# Weights of so many elements stay in a core's cache while each step reads them; for
# fewer rows it does not pay to read them at each step.
SMALL, FEW_ROWS = 1 << 18, 32


def why_not(cell: Cell, request: Request) -> str | None:
    """Says why this loop cannot run a cell, or ``None`` if it can."""
    del request
    if gated(cell):
        return None
    return f"{cell!r} has no gated form ({', '.join(PARTS)})"


def note(cell: Cell, request: Request, xs: PyTree = None) -> str:
    """Says where the steps run; without inputs, those of eight features are assumed."""
    if (reason := product.why_not(request)) is not None:
        return f"its steps in XLA: {reason}"
    reason = _why_unsuited(cell, xs)
    if reason is None:
        return "its steps in C++"
    return f"its products in C++, the rest of its steps in XLA: {reason}"


def _why_unsuited(cell: Cell, xs: PyTree) -> str | None:
    """Says why the steps of a cell are no program, as far as that can be known."""
    if xs is None:
        features = (8,) * getattr(cell, "x_ndim", 1)
        xs = jax.ShapeDtypeStruct((2, 2, *features), np.float32)

    def bind(xs: PyTree) -> None:
        params = cell.init(jax.random.key(0), _at(xs, 0, 1))
        params, xs = prepare(cell, params, xs)
        carry = cell.init_carry(params, jax.tree.leaves(xs)[0].shape[:1])
        loop = Loop(params, carry, carry, Steps(xs, None, None))
        static = Static(cell, _layout(cell, loop), False, False, None, False)
        make = partial(_forward_step, static, loop, keep=True, outputs=True)
        program.bind(*make(projects=False))

    try:
        jax.eval_shape(bind, xs)
    except Unsuited as problem:
        return str(problem)
    except Exception:
        return None  # of inputs that cannot be guessed nothing is known
    return None


class Steps(NamedTuple):
    """What the loop reads at each step, ``[B, T, ...]``; XLA's, ``[T, B, ...]``."""

    xs: PyTree
    mask: Array | None
    resets: Array | None


class Loop(NamedTuple):
    """The arguments of the loop, as one pytree."""

    params: PyTree
    carry: PyTree  # [B, ...]
    fresh: PyTree  # [B, ...]
    steps: Steps


class Static(NamedTuple):
    """What is known when the loop is traced."""

    cell: Any
    layout: Layout
    reverse: bool
    return_carries: bool
    checkpoint_every: int | None
    sharded: bool


def unroll(
    cell: Cell,
    params: PyTree,
    xs: PyTree,
    carry: PyTree,
    fresh: PyTree,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    reverse: bool = False,
    return_carries: bool = False,
    checkpoint_every: int | None = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Runs a gated cell over a sequence; see :func:`jlstm.kernels.scan.unroll`."""
    loop = Loop(params, carry, fresh, Steps(xs, mask, resets))
    if not _time(loop):
        return scan.unroll(
            cell, params, xs, carry, fresh, return_carries=return_carries
        )
    layout = _layout(cell, loop)
    sharded = may_be_sharded()
    static = Static(cell, layout, reverse, return_carries, checkpoint_every, sharded)
    return _run(static, *_split(loop))


def _time(loop: Loop) -> int:
    return jax.tree.leaves(loop.steps.xs)[0].shape[1]


# Integers (a step counter in the carry, token ids in xs) have no cotangent. A tree is
# therefore split in two of the same structure, with None in each where the other has a
# leaf: None is an empty subtree, so that vjp, scan and vmap never meet such leaves.


def _split(tree: PyTree) -> tuple[PyTree, PyTree]:
    rest = jax.tree.map(lambda leaf: None if is_inexact(leaf) else leaf, tree)
    return smooth_leaves(tree), rest


def _add(a: PyTree, b: PyTree) -> PyTree:
    """Adds ``b`` to ``a``, in the dtypes of ``a``."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), a, b)


# One step. What the forward loop stores of it: the arrays that the VJP of update
# holds, and the carry before the step. An array that is there twice is stored once, and
# one that is made of params alone is made again.


class Step(NamedTuple):
    """The arguments of ``update`` beside the params."""

    carry: PyTree
    zx: PyTree
    zh: PyTree


class Kept(NamedTuple):
    """What the reverse loop needs of a step."""

    pull: Callable  # the VJP of update
    step: Step  # None where it is not read


class Layout(NamedTuple):
    """What the parts of a cell read and keep, found by tracing one step."""

    vectors: tuple[int, ...]  # params that update reads, summed step by step
    matrices: tuple[int, ...]  # the same, but summed over a block at once
    mix_reads_zx: bool
    update_cuts_zx: bool  # rather than to begin by arithmetic on all of it
    steps: int  # of a block
    equal: tuple[int, ...] = ()  # for each leaf of Kept, the first that is the same
    stored: tuple[int, ...] = ()  # leaves of Kept
    made: tuple[Recipe, ...] = ()  # other leaves, from those

    def store(self, kept: Kept) -> list[Array]:
        """Picks the leaves to store."""
        leaves = jax.tree.leaves(kept)
        stored = (leaves[i] for i in self.stored)
        return [
            leaf.astype(np.float32) if leaf.dtype == bool else leaf for leaf in stored
        ]

    def restore(self, stored: list[Array], like: Kept, *, whole: bool = True) -> Kept:
        """Puts the stored leaves back; the others come from ``like``.

        Unless the whole is wanted, only ``step`` counts.
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


def _begins_by_cutting(fun: Callable, args: tuple) -> bool:
    """Whether ``fun`` begins by taking parts of its first argument."""
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    given = set(map(id, jaxpr.invars[: len(jax.tree.leaves(args[0]))]))
    cutting = {"slice", "split", "dynamic_slice", "gather"}
    return any(
        eqn.primitive.name in cutting and id(eqn.invars[0]) in given
        for eqn in jaxpr.eqns
    )


def _first_step(cell: Any, loop: Loop) -> Step:
    x = jax.tree.map(lambda leaf: leaf[:, 0], loop.steps.xs)
    zx = cell.project(loop.params, x)
    return Step(loop.carry, zx, cell.mix(loop.params, loop.carry, zx))


def _update(cell: Any, layout: Layout, params: PyTree, step: Step) -> tuple:
    """Runs ``update`` and its VJP for the vectors and the smooth part of the step."""
    smooth, rest = _split(step)

    def update(vectors: list[Array], smooth: Step) -> tuple[PyTree, PyTree]:
        replaced = _put(params, layout.vectors, vectors)
        return _split(cell.update(replaced, *join(smooth, rest)))

    vectors = _take(params, layout.vectors)
    out, pull, out_rest = jax.vjp(update, vectors, smooth, has_aux=True)
    zx = step.zx if layout.mix_reads_zx or layout.matrices else None
    zh = step.zh if layout.matrices else None
    return join(out, out_rest), Kept(pull, Step(step.carry, zx, zh))


def _take(params: PyTree, places: tuple[int, ...]) -> list[Array]:
    leaves = jax.tree.leaves(params)
    return [leaves[place] for place in places]


def _put(params: PyTree, places: tuple[int, ...], values: list[Array]) -> PyTree:
    leaves, tree = jax.tree.flatten(params)
    for place, value in zip(places, values, strict=True):
        leaves[place] = value
    return tree.unflatten(leaves)


def _add_at(
    tree: PyTree, places: tuple[int, ...], values: list[Array], rest: PyTree
) -> PyTree:
    """Adds values to some leaves of a tree whose other part is ``rest``."""
    whole = join(tree, rest)
    return smooth_leaves(_put(whole, places, _add(_take(whole, places), values)))


def _layout(cell: Any, loop: Loop) -> Layout:
    params, step = loop.params, jax.eval_shape(partial(_first_step, cell), loop)
    leaves = jax.tree.leaves(params)
    largest = max((leaf.size for leaf in jax.tree.leaves(step.carry)), default=0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.zx))

    def reads(places: list[int]) -> bool:
        def update(values: list[Array], fixed: tuple) -> PyTree:
            return cell.update(_put(fixed[0], tuple(places), values), *fixed[1])

        return any(_varying(update, [leaves[i] for i in places], (params, step)))

    def mix(zx: PyTree, fixed: tuple) -> PyTree:
        return cell.mix(*fixed, zx)

    read = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    # Most cells read none: one question instead of one for each.
    read = [i for i in read if reads([i])] if reads(read) else []
    small = [leaf.ndim < 2 or leaf.size <= largest for leaf in leaves]
    layout = Layout(
        vectors=tuple(i for i in read if small[i]),
        matrices=tuple(i for i in read if not small[i]),
        mix_reads_zx=any(_varying(mix, step.zx, (params, step.carry))),
        update_cuts_zx=_begins_by_cutting(
            lambda zx, params, step: cell.update(params, step.carry, zx, step.zh),
            (step.zx, params, step),
        ),
        steps=near_divisor(_time(loop), max(STEPS, BYTES // max(1, size))),
    )
    names: list[int] = []

    def kept(step: Step, params: PyTree) -> Kept:
        kept = _update(cell, layout, params, step)[1]
        names[:] = map(id, jax.tree.leaves(kept))
        return kept

    moves = _varying(kept, step, params)
    equal = tuple(names.index(name) for name in names)
    moving = [i for i in dict.fromkeys(equal) if moves[i]]
    # The step itself is read apart from the others too.
    size = len(jax.tree.leaves(jax.eval_shape(kept, step, params).step))
    of_step = {i for i in equal[len(equal) - size :] if i in moving}

    def arrays(step: Step, params: PyTree) -> list[Array]:
        leaves = jax.tree.leaves(kept(step, params))
        return [leaves[i] for i in moving]

    found = recipes.find(arrays, (step, params), {moving.index(i) for i in of_step})
    made = [
        each._replace(made=moving[each.made], of=tuple(moving[i] for i in each.of))
        for each in found
    ]
    again = {each.made for each in made}
    stored = tuple(i for i in moving if i not in again)
    return layout._replace(equal=equal, stored=stored, made=tuple(made))


def _varying(fun: Callable, moving: PyTree, fixed: PyTree) -> list[bool]:
    """Tells which leaves of ``fun(moving, fixed)`` depend on ``moving``.

    vmap knows: what depends on no mapped argument is not mapped.
    """
    flags: list[bool] = []

    def row(moving: PyTree, fixed: PyTree) -> tuple:
        kinds = tuple({type(leaf) for leaf in jax.tree.leaves(moving)})
        # A copy, since some calls wrap results that are not mapped as well.
        results = map(jnp.copy, jax.tree.leaves(fun(moving, fixed)))
        flags.extend(isinstance(leaf, kinds) for leaf in results)
        return ()

    def probe(moving: PyTree, fixed: PyTree) -> None:
        moving = jax.tree.map(lambda leaf: leaf[None], moving)
        jax.vmap(lambda moving: row(moving, fixed), axis_size=1)(moving)

    jax.eval_shape(probe, moving, fixed)
    return flags


# Blocks of steps.


def _segments(static: Static, loop: Loop) -> list[Segment]:
    return segments(_time(loop), static.checkpoint_every or static.layout.steps)


class Place(NamedTuple):
    """Where a block is."""

    start: Array  # its first step
    number: Array  # of blocks before it


def _over_blocks(
    block: Callable,
    state: PyTree,
    cuts: list[Segment],
    read: PyTree,
    written: PyTree,
    *,
    reverse: bool,
) -> tuple[PyTree, PyTree]:
    """Runs ``block(state, part of read, place) -> (state, part of written)``.

    Blocks are cut out of batch-major arrays and written back into such, so that no
    array of the length of the sequence is ever transposed. What XLA steps through is, a
    block at a time.
    """
    numbers = [0, *itertools.accumulate(cut.blocks for cut in cuts)]
    for cut, number in list(zip(cuts, numbers, strict=False))[:: -1 if reverse else 1]:

        def body(both: tuple, place: Place, steps: int = cut.steps) -> tuple:
            state, written = both
            part = _cut(read, place.start, steps, axis=1)
            state, done = block(state, part, place)
            return (state, _paste(written, done, place.start, 1)), None

        blocks = jnp.arange(cut.blocks, dtype=jnp.int32)
        places = Place(cut.start + cut.steps * blocks, number + blocks)
        both = (state, written)
        if cut.blocks == 1:  # a loop would only cost time to compile
            both, _ = body(both, jax.tree.map(lambda leaf: leaf[0], places))
        else:
            both, _ = jax.lax.scan(body, both, places, reverse=reverse)
        state, written = both
    return state, written


# What would be computed for negative indices keeps XLA from vectorising on a CPU.
_INDEX: dict[str, Any] = {"allow_negative_indices": False}


def _cut(tree: PyTree, start: Any, size: int, *, axis: int = 0) -> PyTree:
    def cut(leaf: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis, **_INDEX)

    return jax.tree.map(cut, tree)


def _paste(tree: PyTree, part: PyTree, start: Any, axis: int = 0) -> PyTree:
    def paste(leaf: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis, **_INDEX)

    return jax.tree.map(paste, tree, part)


def _at(tree: PyTree, step: Any, axis: int = 0) -> PyTree:
    def at(leaf: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(leaf, step, axis, keepdims=False, **_INDEX)

    return jax.tree.map(at, tree)


def _put_at(tree: PyTree, part: PyTree, step: Any) -> PyTree:
    return _paste(tree, jax.tree.map(lambda leaf: leaf[None], part), step)


def _over_steps(fun: Callable, params: PyTree, steps: PyTree, axis: int) -> PyTree:
    """Applies ``fun(params, step)`` to the steps of a block, as one batch if it can.

    A gradient that contracts two axes, ``[T, B, D]``, is twice as slow on a CPU as one
    that contracts ``[T * B, D]``. Params that differ by row forbid it.
    """
    lead = jax.tree.leaves(steps)[0].shape[:2]

    def flat(leaf: Array) -> Array:
        return leaf.reshape(lead[0] * lead[1], *leaf.shape[2:])

    def unflat(leaf: Array) -> Array:
        return leaf.reshape(*lead, *leaf.shape[1:])

    if not may_be_sharded():
        try:
            return jax.tree.map(unflat, fun(params, jax.tree.map(flat, steps)))
        except (TypeError, ValueError):
            pass
    return jax.vmap(fun, in_axes=(None, axis), out_axes=axis)(params, steps)


# The loop.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: Static, smooth: Loop, rest: Loop) -> tuple:
    return _forward(static, join(smooth, rest), keep=False)[0]


def _in_cpp(step: Callable, fixed: PyTree, steps: program.Steps) -> Any:
    """The loop over the steps of a block in C++, if there can be one."""
    if product.why_not(_here()) is not None:
        return None
    try:
        return program.bind(step, fixed, steps)
    except Unsuited:
        return None


def _here() -> Request:
    return Request(platform=jax.default_backend(), sharded=may_be_sharded())


class Runner(NamedTuple):
    """Runs the steps of a block, with params that are bound once before all blocks.

    ``run(carry, steps, to, stored, start, write) -> (carry, to, stored)`` takes a block
    of ``steps``, which begins at step ``start``. It writes what the steps return into
    the arrays ``to``, and what is stored of them into ``stored``, from ``write`` on.
    """

    run: Callable
    in_cpp: bool


def _forward_step(
    static: Static, loop: Loop, *, keep: bool, outputs: bool, projects: bool
) -> tuple:
    """A step, what is the same for all steps, and arguments like those to come."""
    cell, layout = static.cell, static.layout

    def step(
        fixed: tuple,
        carry: PyTree,
        sums: PyTree,
        inputs: tuple,
        kept: tuple,
        mix: Any = None,
    ) -> tuple:
        params, fresh = fixed
        valid, reset, *x = kept
        zx = cell.project(params, x[0]) if projects else inputs[0]
        if reset is not None:
            carry = where_rows(reset, fresh, carry)
        zh = cell.mix(params, carry, zx) if mix is None else mix(carry, zx)
        now, stored = Step(carry, zx, zh), []
        if keep:
            (new, y), all_kept = _update(cell, layout, params, now)
            stored = layout.store(all_kept)
        else:
            new, y = cell.update(params, *now)
        if valid is not None:
            new, y = where_rows(valid, new, carry), zero_rows(valid, y)
        outs = (y, new if static.return_carries else None) if outputs else None
        return new, sums, None, (outs, stored)

    first = jax.eval_shape(partial(_first_step, cell), loop)
    xs, *flags = _at(tuple(loop.steps), 0, 1)
    kept, inputs = (*flags, xs) if projects else tuple(flags), (first.zx,)
    example = program.Steps(loop.carry, (), () if projects else inputs, kept)
    return step, (loop.params, loop.fresh), example


def _small_projection(loop: Loop, first: Step) -> bool:
    """Whether steps may project their inputs themselves."""
    if jax.tree.leaves(first.zx)[0].shape[0] < FEW_ROWS:
        return False
    xs, zx = (jax.tree.leaves(tree) for tree in (loop.steps.xs, first.zx))
    features = sum(leaf[0, 0].size for leaf in xs)
    return features * sum(leaf.size // leaf.shape[0] for leaf in zx) <= SMALL


def _forward_loop(
    static: Static, loop: Loop, *, keep: bool, outputs: bool = True
) -> Runner:
    cell, layout, reverse = static.cell, static.layout, static.reverse
    first = jax.eval_shape(partial(_first_step, cell), loop)
    make = partial(_forward_step, static, loop, keep=keep, outputs=outputs)
    for projects in (True, False):
        if projects and not _small_projection(loop, first):
            continue
        in_cpp = _in_cpp(*make(projects=projects))
        if in_cpp is not None:
            break

    def project(steps: Steps, axis: int) -> PyTree:
        zx = _over_steps(cell.project, loop.params, steps.xs, axis)
        return checkpoint_name(zx, "jlstm_zx")

    if in_cpp is not None:

        def run(
            carry: PyTree, steps: Steps, to: Any, stored: Any, start: Any, write: Any
        ) -> tuple:
            carry = checkpoint_name(carry, "jlstm_carry")
            time = jax.tree.leaves(steps.xs)[0].shape[1]
            xs, *kept = loop.steps
            inputs: tuple = ()
            if projects:
                kept.append(xs)
            else:
                inputs = (project(steps, 1),)
            whole = program.Steps(carry, (), inputs, tuple(kept))
            span = program.Span(time, reverse, start, write)
            written = (to if outputs else None, stored if keep else [])
            carry, _, _, (to, made) = in_cpp(whole, written, span)
            return carry, to, made if keep else stored

        return Runner(run, in_cpp=True)

    step, fixed, _ = make(projects=False)
    mix = product.with_weights(cell.mix, loop.params, first.carry, first.zx)
    ahead = layout.update_cuts_zx and not keep and jax.default_backend() == "cpu"

    def body(state: tuple, inputs: tuple) -> tuple:
        carry, stored, place = state
        zx, *flags = inputs
        carry, _, _, (outs, made) = step(fixed, carry, (), (zx,), tuple(flags), mix)
        stored = _put_at(stored, made, place) if keep else stored
        return (carry, stored, place + (-1 if reverse else 1)), outs

    def scan_steps(
        carry: PyTree, steps: Steps, to: Any, stored: Any, start: Any, write: Any
    ) -> tuple:
        carry = checkpoint_name(carry, "jlstm_carry")
        steps = time_major(steps)
        if reverse:
            write = write + jax.tree.leaves(steps.xs)[0].shape[0] - 1
        state = (carry, stored, jnp.asarray(write, jnp.int32))
        inputs = (project(steps, 0), steps.mask, steps.resets)
        scanned = _scan_ahead if ahead else jax.lax.scan
        (carry, stored, _), outs = scanned(body, state, inputs, reverse=reverse)
        if outputs:
            to = _paste(to, time_major(outs), start, 1)
        return carry, to, stored

    return Runner(scan_steps, in_cpp=False)


def _scan_ahead(
    body: Callable, carry: PyTree, xs: PyTree, *, reverse: bool
) -> tuple[PyTree, PyTree]:
    """``lax.scan``, where each step reads the inputs of the next.

    XLA fuses the reading of inputs with the first use of them. Where that use is a cut,
    such a fusion is not vectorised on a CPU: a GRU took twice as long.
    """
    count = jax.tree.leaves(xs)[0].shape[0]
    steps = jnp.arange(count, dtype=jnp.int32)
    following = jnp.clip(steps + (-1 if reverse else 1), 0, count - 1)

    def run(state: tuple, following: Array) -> tuple[tuple, PyTree]:
        carry, out = body(*state)
        return (carry, _at(xs, following)), out

    first = _at(xs, count - 1 if reverse else 0)
    (carry, _), outs = jax.lax.scan(run, (carry, first), following, reverse=reverse)
    return carry, outs


class ByRow(NamedTuple):
    """What is stored of all steps, ``[B, T, ...]``; XLA stores ``[T, B, ...]``."""

    arrays: list[Array]


def _forward(static: Static, loop: Loop, *, keep: bool) -> tuple:
    whole = static.checkpoint_every is None
    runner = _forward_loop(static, loop, keep=keep and whole)

    def block(state: tuple, steps: Steps, place: Place) -> tuple:
        before, to, stored = state
        part, start = stored if whole else [], place.start
        carry, to, part = runner.run(before, steps, to, part, start, start)
        if keep:
            stored = part if whole else _put_at(stored, before, place.number)
        return (carry, to, stored), None

    cuts, time = _segments(static, loop), _time(loop)
    (new, y), kept = _abstract_step(static, loop)
    stored = None
    if keep and whole:
        stored = _buffers(kept, time, int(runner.in_cpp))
    elif keep:
        stored = _buffers(new, sum(cut.blocks for cut in cuts), 0)
    to = _buffers((y, new if static.return_carries else None), time, 1)
    state = (loop.carry, to, stored)
    state, _ = _over_blocks(
        block, state, cuts, loop.steps, None, reverse=static.reverse
    )
    carry, (ys, carries), stored = state
    if runner.in_cpp and keep and whole:
        stored = ByRow(stored)
    return (ys, carry, carries), stored


def _abstract_step(static: Static, loop: Loop) -> tuple:
    """What a step returns, and what is stored of it."""

    def step(loop: Loop) -> tuple:
        first = _first_step(static.cell, loop)
        out, kept = _update(static.cell, static.layout, loop.params, first)
        return out, static.layout.store(kept)

    return jax.eval_shape(step, loop)


def _buffers(like: PyTree, time: int, axis: int) -> PyTree:
    """Makes arrays to be written: like ``[B, ...]``, with an axis of time."""

    def buffer(leaf: Any) -> Any:
        def longer(sizes: Any, size: int | None) -> tuple:
            return (*sizes[:axis], size, *sizes[axis:])

        shape, sharding = longer(leaf.shape, time), jax.typeof(leaf).sharding
        if in_cpp:
            return jax.ShapeDtypeStruct(shape, leaf.dtype)
        array = jnp.zeros(shape, leaf.dtype)
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            return array
        spec = PartitionSpec(*longer(sharding.spec, None))
        return jax.sharding.reshard(array, spec)

    in_cpp = product.why_not(_here()) is None
    buffers = jax.tree.map(buffer, like)
    return library.memory(buffers) if in_cpp else buffers


def _run_fwd(static: Static, smooth: Loop, rest: Loop) -> tuple:
    loop = join(smooth, rest)
    out, stored = _forward(static, loop, keep=True)
    return out, (loop, stored)


def _pull_mix(
    cell: Any, params: PyTree, carry: PyTree, zx: PyTree, dzh: PyTree
) -> tuple:
    """The VJP of ``mix`` for the carry and zx, and the cotangent as it is."""
    smooth, rest = _split((carry, zx))

    def mix(smooth: tuple) -> PyTree:
        return smooth_leaves(cell.mix(params, *join(smooth, rest)))

    return jax.vjp(mix, smooth)[1](dzh)[0], dzh


def _run_bwd(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    # Where that is known, it was known when the outputs were computed.
    with contextlib.nullcontext() if static.sharded else rows_in_one_place():
        return _backward(static, saved, cotangents)


def _backward(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    cell, layout = static.cell, static.layout
    loop, stored = saved
    dys, dcarry, dcarries = (smooth_leaves(tree) for tree in cotangents)
    params, params_rest = _split(loop.params)
    # Of this only the structure counts, and what is made of params alone.
    first = _first_step(cell, loop)
    like = _update(cell, layout, loop.params, first)[1]
    one_buffer: list[Any] = []  # the structure of dzx, where it is dzh

    def step(
        fixed: tuple,
        cotangent: PyTree,
        dvectors: list[Array],
        inputs: tuple,
        others: tuple,
        pull_mix: Any = None,
    ) -> tuple:
        params, like, first_zx = fixed
        dcarry, dfresh = cotangent
        valid, reset, dy, dafter, *stored = others
        (stored,) = (*inputs, *stored)
        kept = layout.restore(stored, like)
        dnew = dcarry if dafter is None else _add(dcarry, dafter)
        dout = zero_rows(valid, dnew), zero_rows(valid, dy)
        added, (dbefore, dzx, dzh) = kept.pull(dout)
        zx = first_zx if kept.step.zx is None else kept.step.zx
        shared = _same(dzx, dzh)
        pull_mix = pull_mix or partial(_pull_mix, cell, params)
        (through_mix, through_zx), dzh = pull_mix(kept.step.carry, zx, dzh)
        dbefore = _add(dbefore, through_mix)
        if layout.mix_reads_zx:
            dzx = _add(dzx, through_zx)
        if valid is not None:
            dbefore = _add(dbefore, zero_rows(~valid, dnew))
        if reset is not None:
            dfresh = _add(dfresh, zero_rows(reset, dbefore))
            dbefore = zero_rows(~reset, dbefore)
        shared = shared and not layout.mix_reads_zx
        one_buffer[:] = [jax.tree.structure(dzx)] if shared else []
        dzx = None if one_buffer else dzx
        outs = (dzx, dzh, dout if layout.matrices else None)
        return (dbefore, dfresh), _add(dvectors, added), outs, ()

    fixed = (loop.params, like, first.zx)
    zeros = (
        jax.tree.map(jnp.zeros_like, smooth_leaves(loop.fresh)),
        [_wide_zeros(leaf) for leaf in _take(loop.params, layout.vectors)],
    )
    others = (loop.steps.mask, loop.steps.resets, dys, dcarries)
    abstract = _abstract_step(static, loop)[1]
    again: Any = None
    if static.checkpoint_every is not None:
        again = _forward_loop(static, loop, keep=True, outputs=False)
    # Of steps that run again a block has arrays of its own.
    parts = ((abstract,), ()) if again is not None else ((), (abstract,))
    example = (parts[0], (*_at(others, 0, 1), *parts[1]))
    in_cpp = _in_cpp(step, fixed, program.Steps((dcarry, zeros[0]), zeros[1], *example))
    by_row = again.in_cpp if again is not None else isinstance(stored, ByRow)
    if isinstance(stored, ByRow):
        stored = stored.arrays
    if again is None and by_row != (in_cpp is not None):
        stored = time_major(stored)
    pull_mix = None
    if in_cpp is None:
        shapes = (first.carry, first.zx, smooth_leaves(first.zh))
        pull_mix = product.with_weights(partial(_pull_mix, cell), loop.params, *shapes)

    def body(cotangent: tuple, others: tuple) -> tuple:
        state, sums = cotangent
        made = step(fixed, state, sums, (), others, pull_mix)
        return made[:2], made[2]

    def block(cotangent: tuple, part: tuple, place: Place) -> tuple:
        inner, dparams = cotangent
        steps, dys, dcarries = part
        size, axis = jax.tree.leaves(steps.xs)[0].shape[1], int(in_cpp is not None)
        if again is None:
            kept = _cut(stored, place.start, size, axis=axis)
        else:
            to = _buffers(abstract, size, int(again.in_cpp))
            carry = _at(stored, place.number)
            kept = again.run(carry, steps, None, to, place.start, 0)[2]
            if again.in_cpp != bool(axis):
                kept = time_major(kept)
        if in_cpp is not None:
            parts = ((kept,), ()) if again is not None else ((), (stored,))
            whole = program.Steps(inner[0], inner[1], parts[0], (*others, *parts[1]))
            span = program.Span(size, not static.reverse, place.start)
            made = in_cpp(whole, (), span)
            inner, outs = made[:2], made[2]
        else:
            steps, dys, dcarries = time_major((steps, dys, dcarries))
            inputs = (steps.mask, steps.resets, dys, dcarries, kept)
            inner, outs = jax.lax.scan(body, inner, inputs, reverse=not static.reverse)
        dzx, dzh, douts = outs
        if one_buffer:
            dzx = one_buffer[0].unflatten(jax.tree.leaves(dzh))
        added, dxs = _pull_parts(steps.xs, kept, (dzx, dzh, douts), axis)
        return (inner, _add(dparams, added)), dxs if axis else time_major(dxs)

    def _pull_parts(xs: PyTree, stored: list[Array], douts: tuple, axis: int) -> tuple:
        """The gradients of the params and of xs, for the steps of a block at once."""
        size = jax.tree.leaves(xs)[0].shape[axis]
        step = layout.restore(stored, like, whole=False).step
        zx = step.zx
        if zx is None:  # nothing reads it

            def repeat(leaf: Array) -> Array:
                leaf = jnp.expand_dims(leaf, axis)
                shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
                return jnp.broadcast_to(leaf, shape)

            zx = jax.tree.map(repeat, first.zx)
        (smooth_x, *smooth_step), rest = _split((xs, step.carry, zx, step.zh))

        def parts(params: PyTree, matrices: list[Array], xs: PyTree) -> tuple:
            steps = ((xs, *smooth_step), rest)
            return _over_steps(part, (params, matrices), steps, axis)

        def part(differentiated: tuple, inputs: tuple) -> tuple:
            params, matrices = differentiated
            params = join(params, params_rest)
            x, *step = join(*inputs)
            out = None
            if layout.matrices:
                replaced = _put(loop.params, layout.matrices, matrices)
                out = cell.update(replaced, *step)
            mixed = cell.mix(params, *step[:2])
            return smooth_leaves((cell.project(params, x), mixed, out))

        matrices = _take(loop.params, layout.matrices)
        _, pull = jax.vjp(parts, params, matrices, smooth_x)
        dparams, dmatrices, dxs = pull(douts)
        return _add_at(dparams, layout.matrices, dmatrices, params_rest), dxs

    cotangent = (((dcarry, zeros[0]), zeros[1]), jax.tree.map(_wide_zeros, params))
    cotangent, dxs = _over_blocks(
        block,
        cotangent,
        _segments(static, loop),
        (loop.steps, dys, dcarries),
        _buffers(_at(smooth_leaves(loop.steps.xs), 0, 1), _time(loop), 1),
        reverse=not static.reverse,
    )
    ((dcarry, dfresh), dvectors), dparams = cotangent
    dparams = _add_at(dparams, layout.vectors, dvectors, params_rest)
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    return Loop(dparams, dcarry, dfresh, Steps(dxs, None, None)), None


def _wide_zeros(leaf: Array) -> Array:
    return jnp.zeros_like(leaf, dtype=common_dtype(leaf.dtype, jnp.float32))


def _same(a: PyTree, b: PyTree) -> bool:
    pairs = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(pairs[0]) == len(pairs[1]) and all(
        x is y for x, y in zip(*pairs, strict=True)
    )


_run.defvjp(_run_fwd, _run_bwd)
