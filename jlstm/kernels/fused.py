r"""The fused loop: one ``custom_vjp`` for every cell in gated form.

A step computes :math:`z^x_t = \mathrm{project}(\theta, x_t)`, then
:math:`z^h_t = \mathrm{mix}(\theta, s_{t-1}, z^x_t)`, then
:math:`s_t, y_t = \mathrm{update}(\theta, s_{t-1}, z^x_t, z^h_t)`. The reverse loop
carries only the cotangent of the carry :math:`s`, and writes the cotangents of
:math:`z^x` and :math:`z^h`. The gradients of the params then come from one VJP over all
steps of a block, taken as one batch, which XLA computes as large matrix products.

Two gradients are summed step by step instead: those of small params that ``update``
reads itself, such as a vector, and that of the fresh carry where resets restore it.

The sequence is processed in blocks of steps, so that the arrays of a block stay in the
cache. The forward loop stores what the VJP of ``update`` needs
(:mod:`jlstm.kernels.layout`). To save memory it may store only the carry before each
block; the reverse loop then runs the block once more. A policy of a ``jax.checkpoint``
around the call can refer to these carries by the name ``jlstm_carry``, and to
:math:`z^x`, unless each step computes its own, by ``jlstm_zx``.

On a CPU the steps of a block run in C++ if they can (:mod:`jlstm.kernels.program`).
Otherwise they are a ``lax.scan`` (:mod:`jlstm.kernels.loops`), whose products with
weights run in C++ if they can (:mod:`jlstm.kernels.product`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from jlstm.cells.wrappers import prepare
from jlstm.kernels import blocks, library, loops, product, program, scan
from jlstm.kernels import layout as layouts
from jlstm.kernels.blocks import Place, over_steps, time_major
from jlstm.kernels.graph import Unsuited
from jlstm.kernels.layout import Kept, Layout, Step, split
from jlstm.kernels.loops import Loop, Span, Steps
from jlstm.kernels.request import (
    NEEDS_NUMBERS,
    Request,
    may_be_sharded,
    rows_in_one_place,
)
from jlstm.types import (
    PARTS,
    Array,
    Cell,
    PyTree,
    common_dtype,
    gated,
    join,
    smooth_leaves,
    where_rows,
    zero_rows,
)

# The bytes that the projected inputs of a block take, so that they stay in the caches;
# and the least number of steps of a block, since each block has a cost of its own.
BYTES, STEPS = 3 << 19, 8
# The largest weights, in elements, that stay in a core's cache while each step projects
# its own input; and the least number of rows for each core at which that pays.
SMALL, ROWS = 1 << 18, 16


def why_not(cell: Cell, request: Request) -> str | None:
    """Says why this loop cannot run a cell, or ``None`` if it can."""
    if not gated(cell):
        return f"{cell!r} has no gated form ({', '.join(PARTS)})"
    return NEEDS_NUMBERS if request.any_size else None


def note(cell: Cell, request: Request, xs: PyTree = None) -> str:
    """Says where the steps run, if that can be known.

    Without inputs, eight features are assumed.
    """
    request = request._replace(platform=request.platform or jax.default_backend())
    if (reason := product.why_not(request)) is not None:
        return f"its steps in XLA: {reason}"
    if xs is None:
        features = (8,) * getattr(cell, "x_ndim", 1)
        xs = jax.ShapeDtypeStruct((2, 2, *features), np.float32)
    if jax.tree.leaves(xs)[0].shape[1] < 2:
        return "one step, in XLA"

    def gradient(xs: PyTree) -> PyTree:
        params, rest = split(cell.init(jax.random.key(0), blocks.at(xs, 0, axis=1)))

        def total(params: PyTree) -> Array:
            prepared, steps = prepare(cell, join(params, rest), xs)
            batch = jax.tree.leaves(xs)[0].shape[:1]
            carry = cell.init_carry(join(params, rest), batch)
            like = jax.eval_shape(
                cell.step, prepared, carry, blocks.at(steps, 0, axis=1)
            )[0]
            carry = jax.tree.map(lambda a, b: a.astype(b.dtype), carry, like)
            out = unroll(cell, prepared, steps, carry, carry)
            leaves = jax.tree.leaves(smooth_leaves(out))
            return jnp.stack([leaf.astype(np.float32).sum() for leaf in leaves]).sum()

        return jax.grad(total)(params)

    token = _refused.set([])
    try:
        with rows_in_one_place():
            jax.eval_shape(gradient, xs)
    except Exception:
        return ""  # such inputs are not for this cell
    else:
        if not (reasons := _refused.get()):
            return "its steps in C++"
        where = "steps in XLA"
        if any(products for _, products in reasons):
            where = "products in C++, the rest of its steps in XLA"
        return f"its {where}: {reasons[0][0]}"
    finally:
        _refused.reset(token)


# Why traced steps could not run in C++, and whether their products could.
_refused: ContextVar[list[tuple[str, bool]]] = ContextVar("refused")


class Sequence(NamedTuple):
    """What the loop reads at each step, ``[B, T, ...]``."""

    xs: PyTree
    mask: Array | None
    resets: Array | None


class Given(NamedTuple):
    """The arguments of the loop, as one pytree."""

    params: PyTree
    carry: PyTree  # [B, ...]
    fresh: PyTree  # [B, ...]
    sequence: Sequence

    @property
    def time(self) -> int:
        """The number of steps."""
        return jax.tree.leaves(self.sequence.xs)[0].shape[1]


class Static(NamedTuple):
    """What is known when the loop is traced."""

    cell: Any
    layout: Layout
    block: int  # the number of its steps
    reverse: bool
    return_carries: bool
    checkpoint_every: int | None
    sharded: bool

    def segments(self, time: int) -> list[blocks.Segment]:
        """Returns the blocks of a sequence."""
        return blocks.segments(time, self.checkpoint_every or self.block)


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
    given = Given(params, carry, fresh, Sequence(xs, mask, resets))
    options: dict[str, Any] = {"reverse": reverse, "return_carries": return_carries}
    if given.time < 2:  # preparing a loop takes longer than one step
        options |= {"mask": mask, "resets": resets}
        return scan.unroll(cell, params, xs, carry, fresh, **options)
    static = _static(cell, given, checkpoint_every=checkpoint_every, **options)
    return _run(static, *split(given))


def _static(
    cell: Any,
    given: Given,
    *,
    reverse: bool = False,
    return_carries: bool = False,
    checkpoint_every: int | None = None,
) -> Static:
    first = _abstract_step(cell, given)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first.zx))
    return Static(
        cell=cell,
        layout=layouts.find(cell, given.params, first),
        block=blocks.near_divisor(given.time, max(STEPS, BYTES // max(1, size))),
        reverse=reverse,
        return_carries=return_carries,
        checkpoint_every=checkpoint_every,
        sharded=may_be_sharded(),
    )


def _first_step(cell: Any, given: Given) -> Step:
    return layouts.first_step(cell, given.params, given.carry, given.sequence.xs)


def _abstract_step(cell: Any, given: Given) -> Step:
    return jax.eval_shape(partial(_first_step, cell), given)


def _add(a: PyTree, b: PyTree) -> PyTree:
    """Adds ``b`` to ``a``, in the dtypes of ``a``."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), a, b)


def _add_at(
    tree: PyTree, places: tuple[int, ...], values: list[Array], rest: PyTree
) -> PyTree:
    """Adds values to some leaves of a tree whose other part is ``rest``."""
    whole = join(tree, rest)
    values = _add(layouts.take(whole, places), values)
    return smooth_leaves(layouts.put(whole, places, values))


def _wide_zeros(leaf: Array) -> Array:
    return jnp.zeros_like(leaf, dtype=common_dtype(leaf.dtype, jnp.float32))


# How steps are bound to a loop, and the arrays that loops write to.


def _in_cpp(step: Callable, fixed: PyTree, example: Steps) -> program.Program | str:
    """Binds a step to a loop in C++, or says why that is not possible."""
    if (reason := product.why_not_here()) is not None:
        return reason
    try:
        return program.bind(step, fixed, example)
    except Unsuited as problem:
        return str(problem)


def _bind(
    step: Callable, fixed: PyTree, example: Steps, *, ahead: bool = False
) -> Loop:
    """Binds a step to a loop, in C++ if possible."""
    loop = _in_cpp(step, fixed, example)
    if not isinstance(loop, str):
        return loop
    run = product.with_weights(step, fixed, *example)
    # A step without such products comes back unchanged.
    _refused.get([]).append((loop, not isinstance(run, partial)))
    return loops.Scan(run, ahead=ahead and jax.default_backend() == "cpu")


def _buffers(like: PyTree, time: int, axis: int) -> PyTree:
    """Makes arrays to be written to: like ``[B, ...]``, with an axis of time added."""

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

    in_cpp = product.why_not_here() is None
    buffers = jax.tree.map(buffer, like)
    return library.memory(buffers) if in_cpp else buffers


# The forward loop.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(static: Static, smooth: Given, rest: Given) -> tuple:
    return _forward(static, join(smooth, rest), keep=False)[0]


def _run_fwd(static: Static, smooth: Given, rest: Given) -> tuple:
    given = join(smooth, rest)
    out, stored = _forward(static, given, keep=True)
    return out, (given, stored)


def _forward(static: Static, given: Given, *, keep: bool) -> tuple:
    """Returns the results, and what is stored, keyed by the time axis of its loop."""
    whole = static.checkpoint_every is None
    forward = _Forward(static, given, keep=keep and whole)

    def block(state: tuple, xs: PyTree, place: Place) -> tuple:
        before, written, stored = state
        part = stored if whole else []
        carry, written, part = forward(before, xs, written, part, place.start)
        if whole:
            stored = part
        elif keep:
            stored = blocks.put_at(stored, before, place.number)
        return (carry, written, stored), None

    cuts, time = static.segments(given.time), given.time
    new, y, kept = _results(static, given)
    stored = []
    if keep and whole:
        stored = _buffers(kept, time, forward.axis)
    elif keep:
        stored = _buffers(new, sum(cut.blocks for cut in cuts), 0)
    written = _buffers((y, new if static.return_carries else None), time, 1)
    state = (given.carry, written, stored)
    xs, reverse = given.sequence.xs, static.reverse
    state, _ = blocks.over_blocks(block, state, cuts, xs, None, reverse=reverse)
    carry, (ys, carries), stored = state
    return (ys, carry, carries), {forward.axis: stored}


def _results(static: Static, given: Given) -> tuple[PyTree, PyTree, list]:
    """Finds the shapes of a step's carry and output, and of what is stored of it."""

    def step(given: Given) -> tuple:
        first = _first_step(static.cell, given)
        out, kept = layouts.update(static.cell, static.layout, given.params, first)
        return *out, static.layout.store(kept)

    return jax.eval_shape(step, given)


class _Forward:
    """Runs the steps of a block; the params are bound once, before all blocks.

    Args:
      static: what is known when the loop is traced.
      given: the arguments of the loop.
      keep: whether to store what the reverse loop needs.
      outputs: whether to write the outputs that a user gets.
    """

    def __init__(
        self, static: Static, given: Given, *, keep: bool, outputs: bool = True
    ):
        self.static, self.given, self.outputs = static, given, outputs
        make = partial(_forward_step, static, given, keep=keep, outputs=outputs)
        loop: Loop | str = "its projection is large"
        if _small_projection(static.cell, given):
            loop = _in_cpp(*make(projects=True))
        self.projects = not isinstance(loop, str)
        if isinstance(loop, str):
            ahead = static.layout.update_cuts_zx and not keep
            loop = _bind(*make(projects=False), ahead=ahead)
        self.loop, self.axis = loop, loop.axis

    def __call__(
        self,
        carry: PyTree,
        xs: PyTree,
        written: PyTree,
        stored: PyTree,
        read: Any,
        write: Any = None,
    ) -> tuple:
        """Runs steps from number ``read`` on; returns ``(carry, written, stored)``.

        Args:
          carry: the carry before them.
          xs: their inputs.
          written: the arrays for outputs and carries.
          stored: the arrays for what is stored, written from step ``write`` on.
          read: the number of the first step.
          write: where to write; ``None`` means ``read``.
        """
        carry = checkpoint_name(carry, "jlstm_carry")
        time = jax.tree.leaves(xs)[0].shape[1]
        whole, *kept = self.given.sequence
        inputs: tuple = ()
        if self.projects:
            kept.append(whole)
        else:
            xs = xs if self.axis else time_major(xs)
            project = self.static.cell.project
            zx = over_steps(
                project, self.given.params, xs, self.axis, sharded=may_be_sharded()
            )
            inputs = (checkpoint_name(zx, "jlstm_zx"),)
        steps = Steps(carry, inputs=inputs, kept=tuple(kept))
        span = Span(time, self.static.reverse, read, read if write is None else write)
        to = (written if self.outputs else None, stored)
        carry, _, _, written, stored = self.loop(steps, to, span)
        return carry, written, stored


def _forward_step(
    static: Static, given: Given, *, keep: bool, outputs: bool = True, projects: bool
) -> tuple:
    """Makes a step, its fixed arguments, and an example of the others."""
    cell, layout = static.cell, static.layout

    def step(
        fixed: tuple, carry: PyTree, sums: tuple, inputs: tuple, kept: tuple, _: tuple
    ) -> tuple:
        params, fresh = fixed
        valid, reset, *x = kept
        zx = cell.project(params, x[0]) if projects else inputs[0]
        if reset is not None:
            carry = where_rows(reset, fresh, carry)
        now, stored = Step(carry, zx, cell.mix(params, carry, zx)), []
        if keep:
            (new, y), all_kept = layouts.update(cell, layout, params, now)
            stored = layout.store(all_kept)
        else:
            new, y = cell.update(params, *now)
        if valid is not None:
            new, y = where_rows(valid, new, carry), zero_rows(valid, y)
        written = (y, new if static.return_carries else None) if outputs else None
        return new, sums, None, written, stored

    xs, *flags = blocks.at(tuple(given.sequence), 0, axis=1)
    kept, inputs = (*flags, xs), ()
    if not projects:
        kept, inputs = tuple(flags), (_abstract_step(cell, given).zx,)
    example = Steps(given.carry, inputs=inputs, kept=kept)
    return step, (given.params, given.fresh), example


def _small_projection(cell: Any, given: Given) -> bool:
    """Tells whether each step may project its own inputs."""
    xs, zx = map(jax.tree.leaves, (given.sequence.xs, _abstract_step(cell, given).zx))
    batch = xs[0].shape[0]
    if batch * jax.local_device_count() < ROWS * library.cores():
        return False
    features = sum(math.prod(leaf.shape[2:]) for leaf in xs)
    return features * sum(leaf.size // batch for leaf in zx) <= SMALL


# The reverse loop.


def _run_bwd(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    # This may be traced outside the shard_map or the context in which the forward loop
    # was traced, and which said that no batch is cut.
    with contextlib.nullcontext() if static.sharded else rows_in_one_place():
        return _backward(static, saved, cotangents)


_run.defvjp(_run_fwd, _run_bwd)


def _backward(static: Static, saved: tuple, cotangents: tuple) -> tuple:
    cell, layout = static.cell, static.layout
    given, stored = saved
    ((stored_axis, stored),) = stored.items()
    dys, dcarry, dcarries = (smooth_leaves(tree) for tree in cotangents)
    params, params_rest = split(given.params)
    # Stored arrays replace their part of these; the rest depends on the params only.
    first = _first_step(cell, given)
    like = layouts.update(cell, layout, given.params, first)[1]
    stored_like = _results(static, given)[2]
    again = None
    if static.checkpoint_every is not None:
        again = _Forward(static, given, keep=True, outputs=False)

    _, *flags = given.sequence
    kept = (*flags, dys, dcarries)  # read at each step
    zeros = jax.tree.map(jnp.zeros_like, smooth_leaves(given.fresh))
    dvectors = layouts.take(given.params, layout.vectors)
    dvectors = [_wide_zeros(leaf) for leaf in dvectors]
    # What is stored of a step comes as ``stored`` if the forward loop has written it,
    # and as ``inputs`` if the block is run again; one of the two is always empty.
    parts = (stored_like, []) if again else ([], stored_like)
    first_read = blocks.at(kept, 0, axis=1)
    example = Steps((dcarry, zeros), dvectors, parts[0], first_read, parts[1])
    loop = _bind(_backward_step(static), (given.params, like, first.zx), example)
    axis = loop.axis
    if not again and stored_axis != axis:
        stored = time_major(stored)

    def block(cotangent: tuple, xs: PyTree, place: Place) -> tuple:
        (state, dvectors), dparams = cotangent
        time = jax.tree.leaves(xs)[0].shape[1]
        if again:
            made = _buffers(stored_like, time, again.axis)
            carry = blocks.at(stored, place.number, axis=0)
            made = again(carry, xs, None, made, place.start, 0)[2]
            made = made if again.axis == axis else time_major(made)
            parts = (made, [])
        else:
            made = blocks.cut(stored, place.start, time, axis=axis)
            parts = ([], stored)
        steps = Steps(state, dvectors, parts[0], kept, parts[1])
        span = Span(time, not static.reverse, place.start)
        state, dvectors, douts, *_ = loop(steps, ((), []), span)
        xs = xs if axis else time_major(xs)
        step = layout.restore(made, like, whole=False).step
        zx = _repeat(first.zx, time, axis) if step.zx is None else step.zx
        pull = _parts_vjp(static, given.params, xs, step._replace(zx=zx), axis)
        added, dmatrices, dxs = pull(douts)
        added = _add_at(added, layout.matrices, dmatrices, params_rest)
        return (
            ((state, dvectors), _add(dparams, added)),
            dxs if axis else time_major(dxs),
        )

    dparams = jax.tree.map(_wide_zeros, params)
    dxs = blocks.at(smooth_leaves(given.sequence.xs), 0, axis=1)
    cotangent, dxs = blocks.over_blocks(
        block,
        (((dcarry, zeros), dvectors), dparams),
        static.segments(given.time),
        given.sequence.xs,
        _buffers(dxs, given.time, 1),
        reverse=not static.reverse,
    )
    ((dcarry, dfresh), dvectors), dparams = cotangent
    dparams = _add_at(dparams, layout.vectors, dvectors, params_rest)
    dparams = jax.tree.map(lambda d, p: d.astype(p.dtype), dparams, params)
    return Given(dparams, dcarry, dfresh, Sequence(dxs, None, None)), None


def _backward_step(static: Static) -> Callable:
    """Makes the step of the reverse loop, which carries cotangents of two carries."""
    cell, layout = static.cell, static.layout

    def step(
        fixed: tuple,
        cotangent: tuple,
        dvectors: list[Array],
        made: list[Array],
        kept: tuple,
        stored: list[Array],
    ) -> tuple:
        params, like, first_zx = fixed
        dcarry, dfresh = cotangent
        valid, reset, dy, dafter = kept
        held: Kept = layout.restore([*made, *stored], like)
        dnew = dcarry if dafter is None else _add(dcarry, dafter)
        dout = zero_rows(valid, dnew), zero_rows(valid, dy)
        added, (dbefore, dzx, dzh) = held.pull(dout)
        carry, zx = held.step.carry, held.step.zx
        smooth, rest = split((carry, first_zx if zx is None else zx))

        def mix(smooth: tuple) -> PyTree:
            return smooth_leaves(cell.mix(params, *join(smooth, rest)))

        through_mix, through_zx = jax.vjp(mix, smooth)[1](dzh)[0]
        dbefore = _add(dbefore, through_mix)
        if layout.mix_reads_zx:
            dzx = _add(dzx, through_zx)
        if valid is not None:
            dbefore = _add(dbefore, zero_rows(~valid, dnew))
        if reset is not None:
            dfresh = _add(dfresh, zero_rows(reset, dbefore))
            dbefore = zero_rows(~reset, dbefore)
        dzx = None if layout.dzx_is_dzh else dzx
        douts = (dzx, dzh, dout if layout.matrices else None)
        return (dbefore, dfresh), _add(dvectors, added), douts, (), []

    return step


def _parts_vjp(
    static: Static, params: PyTree, xs: PyTree, steps: Step, axis: int
) -> Callable:
    """Makes the VJP of the parts of a cell, for all steps of a block at once.

    It is ``pull((dzx, dzh, douts)) -> (dparams, dmatrices, dxs)``. The arguments are
    the cotangents of ``project``, of ``mix``, and of ``update`` if that reads matrices.
    """
    cell, layout = static.cell, static.layout
    smooth_params, params_rest = split(params)
    (smooth_x, *smooth_step), rest = split((xs, *steps))

    def parts(smooth_params: PyTree, matrices: list[Array], xs: PyTree) -> tuple:
        inputs = ((xs, *smooth_step), rest)
        return over_steps(
            part,
            (smooth_params, matrices),
            inputs,
            axis,
            sharded=may_be_sharded(),
        )

    def part(differentiated: tuple, inputs: tuple) -> tuple:
        smooth_params, matrices = differentiated
        joined = join(smooth_params, params_rest)
        x, *step = join(*inputs)
        out = None
        if layout.matrices:
            replaced = layouts.put(params, layout.matrices, matrices)
            out = cell.update(replaced, *step)
        mixed = cell.mix(joined, *step[:2])
        return smooth_leaves((cell.project(joined, x), mixed, out))

    matrices = layouts.take(params, layout.matrices)
    (zx, *_), pull = jax.vjp(parts, smooth_params, matrices, smooth_x)

    def pull_all(douts: tuple) -> tuple:
        dzx, dzh, dout = douts
        if layout.dzx_is_dzh:
            dzx = jax.tree.structure(zx).unflatten(jax.tree.leaves(dzh))
        return pull((dzx, dzh, dout))

    return pull_all


def _repeat(tree: PyTree, time: int, axis: int) -> PyTree:
    """Repeats, for the steps of a block, what none of them reads."""

    def repeat(leaf: Array) -> Array:
        leaf = jnp.expand_dims(leaf, axis)
        shape = (*leaf.shape[:axis], time, *leaf.shape[axis + 1 :])
        return jnp.broadcast_to(leaf, shape)

    return jax.tree.map(repeat, tree)
