"""The laws themselves, each run on one example of a cell or a layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jlstm.cells import prepare
from jlstm.layers.compose import is_causal, retime
from jlstm.types import (
    Array,
    Cell,
    Layer,
    PyTree,
    gated,
    is_inexact,
    join,
    smooth_leaves,
)

BATCH, TIME = 3, 6
TOLERANCE = 1e-9


@contextlib.contextmanager
def law(name: str, subject: Any, run: Runner | None = None) -> Iterator[None]:
    """Adds the name of a law to the message of an assertion that fails inside.

    Args:
      name: the law, in words.
      subject: the cell or layer that is checked; the message shows it.
      run: what runs it, whose implementation is named too; ``None`` for none.

    Example:
      >>> with jlstm.testing.law("one is one", jlstm.LSTM(8)):
      ...     assert 1 == 1
    """
    try:
        yield
    except AssertionError as problem:
        way = f" ({run.way})" if run is not None and run.way else ""
        message = f"{subject!r} breaks the law: {name}{way}\n{problem}"
        raise AssertionError(message) from None


def assert_close(a: PyTree, b: PyTree) -> None:
    """Compares trees to rounding."""
    chex.assert_trees_all_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a cell or a layer is run on, as NumPy's arrays.

    Laws select, flip and compare by NumPy: JAX would compile each such operation.
    """

    params: PyTree
    xs: PyTree  # [B, T, ...]
    carry: PyTree  # [B, ...], not the fresh one

    def but(self, **changes: PyTree) -> Case:
        """Replaces a part."""
        return dataclasses.replace(self, **changes)


def random_like(tree: PyTree, seed: int, scale: float = 1.0) -> PyTree:
    """Replaces the floating leaves of a tree by normal noise, and keeps the others.

    Args:
      tree: a pytree of arrays, or of their shapes and dtypes.
      seed: of the noise.
      scale: its standard deviation.
    """
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf,
        _noise(tree, seed, scale),
    )


def _noise(tree: PyTree, seed: int, scale: float = 1.0) -> PyTree:
    # NumPy's generator, because compiling one of JAX's takes longer than a law.
    draw = np.random.default_rng(seed).standard_normal

    def replace(leaf: Any) -> Any:
        if not is_inexact(leaf):
            return leaf
        return np.asarray(draw(jnp.shape(leaf)) * scale, leaf.dtype)

    return jax.tree.map(replace, tree)


def moved(params: PyTree, seed: int) -> PyTree:
    """Adds a little noise to params, so that no learned carry or bias is left at zero.

    Args:
      params: a pytree of arrays.
      seed: of the noise, whose standard deviation is 0.1.
    """

    def move(leaf: Any, noise: Any) -> Any:
        return jnp.asarray(np.asarray(leaf) + noise) if is_inexact(leaf) else leaf

    return jax.tree.map(move, params, _noise(params, seed, 0.1))


def sequence_of(x: PyTree, seed: int) -> PyTree:
    """Makes random sequences ``[3, 6, ...]`` from an example of one step.

    Args:
      x: the example, ``[3, ...]``; integers are kept, in other rows at each step.
      seed: of the noise that replaces floats.
    """

    def repeat(leaf: Any) -> Array:
        rolled = [np.roll(leaf, t, axis=0) for t in range(TIME)]
        return jnp.asarray(np.stack(rolled, axis=1))

    return random_like(jax.tree.map(repeat, x), seed)


def to_numpy(tree: PyTree) -> PyTree:
    """Makes NumPy's arrays of all leaves but keys."""

    def convert(leaf: Any) -> Any:
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        return leaf if is_key else np.asarray(leaf)

    return _map(convert, tree)


def _wide(tree: PyTree) -> PyTree:
    def widen(leaf: Any) -> Any:
        return leaf.astype(np.float64) if is_inexact(leaf) else leaf

    return _map(widen, to_numpy(tree))


@partial(jax.jit, static_argnums=0)
def _fresh(subject: Any, params: PyTree) -> PyTree:
    return subject.init_carry(params, (BATCH,))


def fresh_carry(subject: Any, params: PyTree) -> PyTree:
    """Makes the fresh carry of a cell or a layer."""
    return to_numpy(_fresh(subject, params))


def cell_case(cell: Cell, x: PyTree, params: PyTree) -> Case:
    """Makes what a cell is run on, in float64."""
    x = _wide(np.zeros((BATCH, 5)) if x is None else x)
    if any(leaf.shape[:1] != (BATCH,) for leaf in jax.tree.leaves(x)):
        raise ValueError(f"check_cell: x must begin with a batch of {BATCH} rows")
    return _case(cell, x, sequence_of(x, seed=3), params)


def layer_case(layer: Layer, xs: PyTree, params: PyTree) -> Case:
    """Makes what a layer is run on, in float64."""
    xs = _wide(np.zeros((BATCH, TIME, 5)) if xs is None else xs)
    if any(leaf.shape[:2] != (BATCH, TIME) for leaf in jax.tree.leaves(xs)):
        raise ValueError(f"check_layer: xs must begin with [{BATCH}, {TIME}]")
    return _case(layer, xs, _noise(xs, seed=3), params)


def _case(subject: Any, example: PyTree, xs: PyTree, params: PyTree) -> Case:
    if params is None:
        example = _map(jnp.asarray, example)
        params = moved(_wide(subject.init(jax.random.key(0), example)), seed=1)
    params = to_numpy(params)
    carry = _noise(fresh_carry(subject, params), seed=2, scale=0.5)
    return Case(params, to_numpy(xs), carry)


Program = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def _projected(
    program: Program, case: Case, end: Any, smooth: PyTree
) -> tuple[Array, PyTree]:
    """Projects outputs on random directions, the final carry's scaled by ``end``."""
    out = program(*join(smooth, (case.params, case.xs, case.carry)))
    ys, carry = _dot(_directions(out), smooth_leaves(out))
    return ys + carry * end, out


def _directions(out: tuple[PyTree, PyTree]) -> PyTree:
    return smooth_leaves(_noise(out, seed=7))


def _dot(a: tuple, b: tuple) -> tuple[Array, ...]:
    """Inner products, one an entry of the tuples."""

    def dot(a: PyTree, b: PyTree) -> Any:
        products = jax.tree.map(lambda x, y: (x * y).sum(), a, b)
        return sum(jax.tree.leaves(products), start=np.float64(0.0))

    return tuple(map(dot, a, b))


class Runner:
    """Runs a subject, with gradients; one compile a direction serves all laws."""

    def __init__(
        self,
        call: Callable[..., tuple[PyTree, PyTree]],
        way: str = "",
        takes_resets: bool = True,
    ) -> None:
        self.call = call
        self.way = way
        self.takes_resets = takes_resets
        self.plain = jax.jit(call)
        self._jitted = jax.jit(self.run, static_argnames="options")

    def run(
        self, case: tuple, flags: dict, end: Any, options: tuple = ()
    ) -> dict[str, PyTree]:
        """Returns outputs, the projected loss, and its gradients."""
        program = partial(self.call, **flags, **dict(options))
        loss = partial(_projected, program, Case(*case), end)
        (value, (ys, carry)), grads = jax.value_and_grad(loss, has_aux=True)(
            smooth_leaves(case)
        )
        grads = dict(zip(("d_params", "d_xs", "d_carry"), grads, strict=True))
        return {"ys": ys, "carry": carry, "loss": value, **grads}

    def __call__(
        self,
        case: Case,
        *,
        mask: np.ndarray | None = None,
        resets: np.ndarray | None = None,
        end: float = 1.0,
        **options: Any,
    ) -> dict[str, PyTree]:
        """Runs it compiled, the final carry's part of the loss scaled by ``end``."""
        flags = {"mask": np.ones((BATCH, TIME), bool) if mask is None else mask}
        if self.takes_resets:
            none = np.zeros((BATCH, TIME), bool)
            flags["resets"] = none if resets is None else resets
        hashable = tuple(sorted(options.items()))
        parts = (case.params, case.xs, case.carry)
        out = self._jitted(parts, flags, np.float64(end), options=hashable)
        return to_numpy(out)


# Laws that cells and layers share.


def _map(f: Callable[[Any], Any], tree: PyTree) -> PyTree:
    return jax.tree.map(f, tree)


def _row(tree: PyTree, row: int) -> PyTree:
    return _map(lambda leaf: leaf[row], tree)


def _where(mask: np.ndarray, on_true: PyTree, on_false: PyTree) -> PyTree:
    def select(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)

    return jax.tree.map(select, on_true, on_false)


def holes() -> np.ndarray:
    """Returns a mask ``[3, 6]`` with left padding, holes, and a row that is empty."""
    rows = [[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    return np.array(rows, bool)


def right_padding() -> np.ndarray:
    """Returns the mask ``[3, 6]`` of the lengths 4, 6 and 0."""
    return np.arange(TIME)[None, :] < np.array([[4], [TIME], [0]])


def fill(xs: PyTree, mask: Any, value: float) -> PyTree:
    """Writes garbage into masked steps: a value, -1 in integers, false in booleans.

    Args:
      xs: a pytree of arrays ``[B, T, ...]``.
      mask: true at the steps to keep, ``[B, T]``.
      value: what to write into floats, such as NaN.
    """

    def garbage(leaf: Any) -> np.ndarray:
        written = value if is_inexact(leaf) else 0 if leaf.dtype == bool else -1
        return np.broadcast_to(np.array(written).astype(leaf.dtype), leaf.shape)

    return _where(np.asarray(mask), xs, _map(garbage, xs))


def check_padding(subject: Any, case: Case, run: Runner, **options: Any) -> None:
    """Padding is inert, and a row of length 0 returns its carry."""
    for mask in (holes(), right_padding()):
        zeros = fill(case.xs, mask, 0.0)
        clean = run(case.but(xs=zeros), mask=mask, **options)
        for value in (1e3, np.nan):
            with law(f"{value} in the padding changes nothing", subject, run):
                garbage = fill(case.xs, mask, value)
                got = run(case.but(xs=garbage), mask=mask, **options)
                assert_close(got, clean)
        with law("gradients are finite, and zero in the padding", subject, run):
            _assert_finite(clean)
            assert_close(fill(clean["d_xs"], mask, 0.0), clean["d_xs"])
        with law("a row of length 0 returns its carry, in gradients too", subject, run):
            assert_close(_row(clean["carry"], 2), _row(case.carry, 2))
            directions = _directions((clean["ys"], clean["carry"]))
            assert_close(_row(clean["d_carry"], 2), _row(directions[1], 2))


def _assert_finite(tree: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(tree):
        finite = np.all(np.isfinite(np.asarray(leaf, np.float64)))
        assert finite, f"not finite at {jax.tree_util.keystr(path)}"


def check_chunks(subject: Any, case: Case, run: Runner) -> None:
    """Chunks fed with the returned carry equal one pass."""
    with law("chunks equal the whole", subject, run):
        whole, carry, ys, half = run(case), case.carry, [], TIME // 2
        for start in range(0, TIME, half):
            chunk = _map(lambda x, s=start: x[:, s : s + half], case.xs)
            y, carry = run.plain(case.params, chunk, carry)
            ys.append(y)
        joined = jax.tree.map(lambda *a: np.concatenate(a, 1), *ys)
        assert_close((joined, carry), (whole["ys"], whole["carry"]))


def check_rows(
    subject: Any,
    case: Case,
    run: Runner,
    take_rows: Callable[[PyTree, Array], PyTree] | None = None,
) -> None:
    """A row depends on itself alone, wherever it stands."""
    order, mask = np.array([2, 0, 1]), holes()

    def rows(chosen: np.ndarray) -> Case:
        xs, carry = _map(lambda x: x[chosen], (case.xs, case.carry))
        if take_rows is None:
            return Case(case.params, xs, carry)
        return Case(jax.jit(take_rows)(case.params, chosen), xs, carry)

    with law("rows are independent", subject, run):
        out = run(case, mask=mask)
        permuted = run(rows(order), mask=mask[order])
        expected = _map(lambda x: x[order], (out["ys"], out["carry"]))
        assert_close((permuted["ys"], permuted["carry"]), expected)
        one = rows(np.array([0]))
        alone, _ = to_numpy(run.plain(one.params, one.xs, one.carry))
        assert_close(_row(alone, 0), _row(run(case)["ys"], 0))


@partial(jax.jit, static_argnums=0)
def _pull_fresh(subject: Any, params: PyTree, cotangent: PyTree) -> PyTree:
    """Takes a cotangent of the fresh carry to the params that it was learned in."""

    def fresh(smooth: PyTree) -> PyTree:
        return smooth_leaves(subject.init_carry(join(smooth, params), (BATCH,)))

    return jax.vjp(fresh, smooth_leaves(params))[1](cotangent)[0]


def check_resets(subject: Any, case: Case, run: Runner, **options: Any) -> None:
    """Resets equal separate sequences, here made by masking one segment at a time."""
    boundary = np.array([[2], [4], [0]])  # at 0 the whole row is new
    resets = np.arange(TIME)[None, :] == boundary
    before = np.arange(TIME)[None, :] < boundary
    # Row 0 has its boundary at a masked step, where it holds too.
    mask = np.ones((BATCH, TIME), bool)
    mask[0, 2] = mask[1, 1] = False
    old, new = (~before, before) if options.get("reverse") else (before, ~before)

    fresh = fresh_carry(subject, case.params)
    with law("resets equal separate sequences", subject, run):
        whole = run(case, mask=mask, resets=resets, **options)
        first = run(case, mask=old & mask, end=0.0, **options)
        second = run(case.but(carry=fresh), mask=new & mask, **options)
        assert_close(whole["ys"], _where(old, first["ys"], second["ys"]))
        assert_close(whole["carry"], second["carry"])
        assert_close(whole["d_carry"], first["d_carry"])
        # A learned fresh carry has a gradient from every reset.
        learned = to_numpy(_pull_fresh(subject, case.params, second["d_carry"]))
        parts = (first["d_params"], second["d_params"], learned)
        assert_close(whole["d_params"], jax.tree.map(lambda *g: sum(g), *parts))
        both = jax.tree.map(np.add, first["d_xs"], second["d_xs"])
        assert_close(whole["d_xs"], both)
    if options.get("reverse"):
        return  # in reverse a reset follows its step, so none precedes the first
    with law("a reset leaves nothing of a carry that is not finite", subject, run):
        lost = _map(
            lambda x: np.full_like(x, np.nan) if is_inexact(x) else x, case.carry
        )
        resets = np.broadcast_to(np.arange(TIME) == 0, (BATCH, TIME))
        anew = run(case, mask=mask, resets=resets)
        assert_close(run(case.but(carry=lost), mask=mask, resets=resets), anew)


def check_vmap(subject: Any, case: Case, run: Runner) -> None:
    """``vmap`` over params and inputs equals a loop."""

    def scaled(scale: float) -> PyTree:
        parts = (case.params, case.xs, case.carry)
        return _map(lambda x: x * scale if is_inexact(x) else x, parts)

    def gradient(*parts: PyTree) -> PyTree:
        flags = {"mask": np.ones((BATCH, TIME), bool)}
        return run.run(parts, flags, np.float64(1.0))

    def stack(*leaves: Any) -> Any:
        is_array = isinstance(leaves[0], np.ndarray)
        return np.stack(leaves) if is_array else jnp.stack(leaves)

    with law("vmap over params and inputs equals a loop", subject, run):
        cases = [scaled(1.0), scaled(0.5)]
        stacked = jax.tree.map(stack, *cases)
        together = to_numpy(jax.jit(jax.vmap(gradient))(*stacked))
        for i, parts in enumerate(cases):
            assert_close(_row(together, i), run(Case(*parts)))


def check_derivatives(subject: Any, case: Case, run: Runner) -> None:
    """Compares directional derivatives with central differences, to second order."""
    parts = (case.params, case.xs, case.carry)
    flags: dict[str, Any] = {"mask": holes()}
    if run.takes_resets:
        flags["resets"] = np.broadcast_to(np.arange(TIME) == 4, (BATCH, TIME))
    along, across = (_noise(smooth_leaves(parts), seed, 0.1) for seed in (4, 5))
    epsilon = 1e-5

    def at(step: float) -> dict[str, PyTree]:
        shifted = jax.tree.map(lambda a, b: a + step * b, smooth_leaves(parts), along)
        return run(Case(*join(shifted, parts)), **flags)

    def slope(result: dict[str, PyTree], direction: PyTree) -> Any:
        grads = (result["d_params"], result["d_xs"], result["d_carry"])
        return sum(_dot(grads, direction))

    high, here, low = at(epsilon), at(0.0), at(-epsilon)
    close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-7)
    with law("gradients equal finite differences", subject, run):
        difference = (high["loss"] - low["loss"]) / (2 * epsilon)
        close(slope(here, along), difference)

    def slope_at(smooth: PyTree) -> Array:
        return slope(run.run(join(smooth, parts), flags, np.float64(1.0)), across)

    with law("gradients of gradients equal finite differences", subject, run):
        difference = (slope(high, across) - slope(low, across)) / (2 * epsilon)
        second = to_numpy(jax.jit(jax.grad(slope_at))(smooth_leaves(parts)))
        close(sum(_dot(second, along)), difference)


def check_config(subject: Any) -> None:
    """A copy is equal, and has the same hash."""
    with law("a config is hashable and equal by value", subject):
        again = copy_of(subject)
        assert again == subject, "a copy differs"
        assert hash(again) == hash(subject), "a copy has another hash"


def copy_of(config: Any) -> Any:
    """Makes a config again from its fields; something else is copied.

    Args:
      config: a cell or a layer.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.replace(config)
    return copy.copy(config)


class Traces(list[int]):
    """A count, equal to itself alone: each check finds what it compiles itself."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclasses.dataclass(frozen=True)
class CountedCell:
    """A cell that counts how often it is traced; equal by value within a check."""

    subject: Any
    traces: Traces

    def init(self, key: Array, x: PyTree) -> PyTree:
        """Makes the subject's params."""
        return self.subject.init(key, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "subject"), name)

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...]) -> PyTree:
        """Counts, since every trace makes a fresh carry."""
        self.traces.append(1)
        return self.subject.init_carry(params, batch_shape)


class CountedLayer(CountedCell):
    """A layer that counts how often it is traced."""

    def apply(self, *args: Any, **masking: Any) -> tuple[PyTree, PyTree]:
        """Counts, and runs the subject."""
        self.traces.append(1)
        return self.subject.apply(*args, **masking)


def check_traces(
    subject: Any,
    counted: Callable[[Traces], Any],
    make_call: Callable[[Any], Callable[..., Any]],
    args: tuple,
    compiled: PyTree,
) -> None:
    """Two calls with equal configs trace once; the second config is a copy."""
    with law("jit equals eager, and equal configs share a trace", subject):
        traces = Traces()
        eager = make_call(counted(traces))(*args)
        once = len(traces)
        assert once, "it was not traced at all"
        make_call(counted(traces))(*args)
        assert len(traces) == once, f"traced {len(traces)} times, expected {once}"
        assert_close(eager[0], compiled)


# The laws of a cell alone.


def check_parts(cell: Any, case: Case) -> None:
    """The gated form equals the step."""
    if not gated(cell):
        return

    @jax.jit
    def both(params: PyTree, xs: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
        params, xs = prepare(cell, params, xs)
        x = _map(lambda leaf: leaf[:, 0], xs)
        zx = cell.project(params, x)
        parts = cell.update(params, carry, zx, cell.mix(params, carry, zx))
        return parts, cell.step(params, carry, x)

    with law("step(p, c, x) == update(p, c, zx, mix(p, c, zx))", cell):
        assert_close(*to_numpy(both(case.params, case.xs, case.carry)))


def check_python_loop(cell: Any, case: Case, run: Runner) -> None:
    """Unrolling equals stepping in Python."""

    @jax.jit
    def step(params: PyTree, xs: PyTree, carry: PyTree, t: int) -> tuple:
        params, xs = prepare(cell, params, xs)
        return cell.step(params, carry, _map(lambda x: x[:, t], xs))

    carry, steps = case.carry, []
    for t in range(TIME):
        carry, y = to_numpy(step(case.params, case.xs, carry, t))
        steps.append((y, carry))
    ys, carries = jax.tree.map(lambda *a: np.stack(a, 1), *steps)
    with law("unrolling equals a Python loop", cell, run):
        got = run.call(case.params, case.xs, case.carry, return_carries=True)
        assert_close(to_numpy(got), (ys, carry, carries))


def check_reverse(cell: Any, case: Case, run: Runner) -> None:
    """Running in reverse equals flipping, running and flipping back."""
    mask, flip = holes(), partial(_map, lambda x: np.flip(x, 1))
    with law("reverse equals flipping", cell, run):
        back = run(case, reverse=True, mask=mask)
        flipped = run(case.but(xs=flip(case.xs)), mask=flip(mask))
        expected = (flip(flipped["ys"]), flipped["carry"])
        assert_close((back["ys"], back["carry"]), expected)


# The laws of a layer alone.


def check_lengths(layer: Layer, case: Case, run: Runner) -> None:
    """Lengths equal their mask, before and after ``retime``."""
    parts = _map(jnp.asarray, (case.params, case.xs, case.carry))
    lengths, padding = _map(jnp.asarray, (np.array([4, TIME, 0]), right_padding()))
    with law("lengths equal the mask that they stand for", layer):
        by_mask = run(case, mask=right_padding())
        found = to_numpy(layer.apply(*parts, lengths=lengths))
        assert_close(found, (by_mask["ys"], by_mask["carry"]))
    with law("no mask equals a mask of valid steps", layer):
        full = run(case)
        assert_close(to_numpy(layer.apply(*parts)), (full["ys"], full["carry"]))
    with law("outputs are zero where retime says that they are not valid", layer):
        after = np.asarray(retime(layer, lengths, None, None)[0])
        mask = np.asarray(retime(layer, None, padding, None)[1])
        time = jax.tree.leaves(by_mask["ys"])[0].shape[1]
        valid = np.arange(time)[None, :] < after[:, None]
        assert_close(mask, valid)
        assert_close(fill(by_mask["ys"], valid, 0.0), by_mask["ys"])


def check_causal(layer: Layer, case: Case, run: Runner, causal: bool) -> None:
    """A causal layer streams; another one sees ahead."""
    if causal:
        check_chunks(layer, case, run)
        return
    with law("a layer that is not causal depends on the future", layer):
        past = np.broadcast_to(np.arange(TIME) == 0, (BATCH, TIME))
        other = case.but(xs=fill(case.xs, past, 0.0))
        now, then = run(case)["ys"], run(other)["ys"]
        pairs = zip(jax.tree.leaves(now), jax.tree.leaves(then), strict=True)
        changed = any(bool((a[:, 0] != b[:, 0]).any()) for a, b in pairs)
        assert changed, "its first output does not; set causal = True"


def check_layer_resets(layer: Layer, case: Case, run: Runner) -> None:
    """Resets equal separate sequences, in both directions."""
    if is_causal(layer):
        check_resets(layer, case, run)
        return
    # The two directions enter a segment from its two ends, so let both be fresh.
    fresh = fresh_carry(layer, case.params)
    resets = np.arange(TIME)[None, :] == np.array([[2], [4], [0]])
    before = np.cumsum(resets, 1) == 0
    with law("resets equal separate sequences", layer):
        whole = run(case.but(carry=fresh), resets=resets)
        parts = [run(case.but(carry=fresh), mask=m)["ys"] for m in (before, ~before)]
        assert_close(whole["ys"], _where(before, *parts))
