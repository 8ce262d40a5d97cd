"""The loops in C++ equal the reference, whatever the processor and the threads."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE

import jlstm
from jlstm import door
from jlstm.kernels import Request, fused, library, native, scan

KEY = jax.random.key(0)
MISSING = library.why_not()
GRADIENT_TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(
    MISSING is not None and shutil.which("g++") is None, reason=str(MISSING)
)


def draw(seed, tree):
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(tree)
    drawn = [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return structure.unflatten(drawn)


def arguments(cell, batch, time, size):
    """Params, inputs, both carries and the cotangents of outputs and carry."""
    x = jax.ShapeDtypeStruct((batch, size), np.float32)
    params = draw(1, jax.eval_shape(cell.init, KEY, x))
    carry = jax.eval_shape(lambda p: cell.init_carry(p, (batch,)), params)
    xs = draw(2, jax.ShapeDtypeStruct((batch, time, size), np.float32))
    ys = draw(3, jax.ShapeDtypeStruct((batch, time, cell.hidden_size), np.float32))
    args = (params, xs, draw(4, carry), draw(5, carry))
    return args, (ys, draw(6, carry))


def flags(kind, batch, time):
    rng = np.random.default_rng(7)
    holes = rng.random((batch, time)) < 0.6
    ends = np.arange(time) < rng.integers(0, time + 1, batch)[:, None]
    masks = {"": None, "lengths": ends, "mask": holes, "resets": holes}
    mask = masks.get(kind, np.zeros((batch, time), bool))
    resets = rng.random((batch, time)) < 0.3 if kind == "resets" else None
    return mask, resets


def results(
    kernel, cell, args, cotangents, kind="", *, reverse=False, double=False, every=None
):
    """Outputs, and the gradients of params, inputs, carry and fresh carry."""
    mask, resets = flags(kind, *args[1].shape[:2])

    @jax.jit
    def run(args, cotangents):
        def apply(params, xs, carry, fresh):
            xs = xs if mask is None else jlstm.zero_rows(mask, xs)
            ys, carry, _ = kernel.unroll(
                cell, params, xs, carry, fresh, mask=mask, resets=resets,
                reverse=reverse, checkpoint_every=every,
            )  # fmt: skip
            return ys, carry

        out, pull = jax.vjp(apply, *args)
        return out, pull(cotangents)

    with jax.enable_x64(double):
        if double:
            args, cotangents = jax.tree.map(np.float64, (args, cotangents))
        return run(args, cotangents)


def check(found, expected, tolerance):
    pairs = zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    )
    for (path, a), b in pairs:
        if b.size:
            b = np.asarray(b)
            error = np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-30)
            assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def check_equal(cell, batch, time, size, kind, reverse):
    args, cotangents = arguments(cell, batch, time, size)
    options = {"kind": kind, "reverse": reverse}
    found = results(native, cell, args, cotangents, **options)
    expected = results(scan, cell, args, cotangents, double=True, **options)
    check(found[0], expected[0], TOLERANCE["float32"])
    check(found[1], expected[1], GRADIENT_TOLERANCE)


CASES = [
    # cell, rows, steps, features, how steps are masked, reverse
    (jlstm.LSTM(8), 3, 5, 3, "", False),
    (jlstm.LSTM(1), 1, 1, 1, "", True),
    (jlstm.LSTM(37, double_bias=True), 13, 6, 5, "lengths", False),
    (jlstm.LSTM(20, learned_carry=True), 9, 12, 70, "mask", True),
    (jlstm.LSTM(16), 21, 30, 4, "resets", False),  # several blocks of steps
    (jlstm.LSTM(130), 11, 3, 2, "resets", True),  # spans of unequal size
    (jlstm.LSTM(4), 600, 2, 3, "", False),  # more rows than a block
    (jlstm.LSTM(3), 5, 4, 2, "nothing", False),  # no step at all
    (jlstm.GRU(8), 3, 5, 3, "", True),
    (jlstm.GRU(1), 1, 1, 1, "", False),
    (jlstm.GRU(37, double_bias=True), 13, 6, 5, "lengths", True),
    (jlstm.GRU(20, learned_carry=True), 9, 12, 70, "mask", False),
    (jlstm.GRU(16), 21, 30, 4, "resets", True),
    (jlstm.GRU(3), 5, 4, 2, "nothing", True),
    # As many features as hidden units: cotangents of outputs and inputs share memory.
    (jlstm.LSTM(20), 21, 30, 20, "resets", True),
    (jlstm.LSTM(16), 3, 40, 16, "", False),
    (jlstm.GRU(20), 21, 30, 20, "mask", False),
]


EVERY = [
    (jlstm.LSTM(4), 3, "lengths", False),
    (jlstm.GRU(4), 3, "resets", True),
    (jlstm.GRU(4, double_bias=True), 7, "mask", False),
    (jlstm.LSTM(4, learned_carry=True), 2, "resets", True),
    (jlstm.LSTM(4), 9, "", True),
]


def test_input_of_no_features_is_taken_as_the_reference_does():
    (params, xs, *carries), cotangents = arguments(jlstm.LSTM(4), 3, 5, 1)
    args = (dataclasses.replace(params, w_ih=params.w_ih[:0]), xs[..., :0], *carries)
    for every in (None, 2):
        found = results(native, jlstm.LSTM(4), args, cotangents, "resets", every=every)
        expected = results(scan, jlstm.LSTM(4), args, cotangents, "resets")
        check(found, expected, 1e-5)


def test_library_is_built_where_there_is_a_compiler():
    assert MISSING is None


@pytest.mark.core
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_native_equals_the_reference(case):
    check_equal(*case)


def check_step(cell, batch, size, kind):
    args, _ = arguments(cell, batch, 1, size)
    mask, resets = flags(kind, batch, 1)

    def run(kernel, args):
        return jax.jit(
            lambda args: kernel.unroll(cell, *args, mask=mask, resets=resets)
        )(args)

    found = run(native, args)
    with jax.enable_x64(True):
        expected = run(scan, jax.tree.map(np.float64, args))
    check(found, expected, TOLERANCE["float32"])


STEPS = [
    (jlstm.LSTM(70, double_bias=True), 3, 5, "resets"),
    (jlstm.LSTM(1), 1, 1, ""),
    (jlstm.LSTM(2), 8, 1, "mask"),
    (jlstm.GRU(70, double_bias=True), 3, 5, "resets"),
    (jlstm.GRU(1), 1, 1, ""),
    (jlstm.GRU(128), 2, 200, ""),
]


@pytest.mark.core
@pytest.mark.parametrize("case", STEPS, ids=lambda case: "-".join(map(str, case)))
def test_single_step_equals_the_reference(case):
    check_step(*case)


# A process of its own: the loops are chosen once.
LOOPS = """
import test_cross_entropy
import test_product
import test_native
import test_program
from jlstm.kernels import cross_entropy, fused, product
product.may_be_sharded = fused.may_be_sharded = lambda: False
for case in test_native.STEPS:
    test_native.check_step(*case)
for case in test_native.CASES[2:5] + test_native.CASES[9:13]:
    test_native.check_equal(*case)
for shape in test_product.SHAPES:
    test_product.check_product(*shape)
test_program.check_operations()
test_program.check_cell(*test_program.CASES[2])
cross_entropy.FEW = 0
for size in test_cross_entropy.SIZES.values():
    test_cross_entropy.check_cross_entropy(size, True, 0.1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loops", ["portable", "avx2"])
def test_loops_for_other_processors_equal_the_reference(loops):
    environment = {**os.environ, "JLSTM_LOOPS": loops}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    command = [sys.executable, "-c", LOOPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("cell", "every"),
    [
        (jlstm.LSTM(3), None),
        pytest.param(jlstm.GRU(3), 3, marks=pytest.mark.slow),
        pytest.param(jlstm.LSTM(3), 3, marks=pytest.mark.slow),
        pytest.param(jlstm.GRU(3), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradient_of_a_gradient_equals_that_of_fused(cell, every):
    (params, xs, carry, fresh), _ = arguments(cell, 3, 4, 2)
    mask, resets = flags("resets", 3, 4)

    def score(kernel, params, xs, carry):
        ys, carry, _ = kernel.unroll(
            cell, params, xs, carry, fresh, mask=mask, resets=resets,
            checkpoint_every=every,
        )  # fmt: skip
        return sum((leaf**2).sum() for leaf in jax.tree.leaves((ys, carry)))

    def penalty(kernel, *args):
        grads = jax.grad(score, argnums=(1, 2, 3))(kernel, *args)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))

    outer = jax.jit(jax.grad(penalty, argnums=(1, 2, 3)), static_argnums=0)
    found, expected = (outer(kernel, params, xs, carry) for kernel in (native, fused))
    check(found, expected, GRADIENT_TOLERANCE)


def test_map_over_params_equals_a_loop():
    cell = jlstm.LSTM(3)
    (params, xs, carry, fresh), _ = arguments(cell, 3, 4, 2)
    both = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), params)

    def gradient(params):
        def score(params):
            return native.unroll(cell, params, xs, carry, fresh)[0].sum()

        return jax.grad(score)(params)

    mapped = jax.jit(jax.vmap(gradient))(both)
    for i in range(2):
        alone = gradient(jax.tree.map(lambda leaf, i=i: leaf[i], both))
        check(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone, 1e-6)


def test_gradients_do_not_depend_on_what_else_runs():
    cell = jlstm.LSTM(16)
    args, cotangents = arguments(cell, 21, 30, 4)
    first = results(native, cell, args, cotangents)
    again = results(native, cell, args, cotangents)
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize(
    ("cell", "request_", "reason"),
    [
        (jlstm.Elman(3), Request(), r"has loops only for LSTM and GRU, got Elman\("),
        (jlstm.GRU(3, reset_after=False), Request(), "reset_after=False"),
        (jlstm.LSTM(3), Request(platform="gpu"), "runs only on a CPU, .* on a gpu"),
        (
            jlstm.LSTM(3),
            Request(dtypes=frozenset({"float32", "bfloat16"})),
            "computes only in float32, got bfloat16",
        ),
        (
            jlstm.LSTM(3),
            Request(return_carries=True),
            "cannot return the carry of every step",
        ),
        (jlstm.LSTM(3), Request(sharded=True), "several devices; call it inside"),
    ],
)
def test_request_that_native_cannot_meet_is_named(cell, request_, reason):
    with pytest.raises(NotImplementedError, match=f"native: .*{reason}"):
        door.choose(cell, "native", request_)
    assert door.choose(cell, None, request_) == "fused"


@pytest.mark.parametrize(("cell", "every", "kind", "reverse"), EVERY)
def test_checkpoints_change_nothing(cell, every, kind, reverse):
    args, cotangents = arguments(cell, 3, 7, 2)
    options = {"kind": kind, "reverse": reverse}
    found = results(native, cell, args, cotangents, every=every, **options)
    expected = results(native, cell, args, cotangents, **options)
    check(found, expected, GRADIENT_TOLERANCE)


# A process of its own: there are two devices here, and so one thread a call.
SHORT_BLOCK = """
import jax
import jlstm
import test_native
from jlstm.kernels import native

cell = jlstm.LSTM(64)
(_, xs, carry, fresh), _ = test_native.arguments(cell, 16, 410, 2)
params = cell.init(jax.random.key(0), xs[:, 0])  # of which no gradient explodes

def gradient(every):
    def score(params):
        ys, _, _ = native.unroll(
            cell, params, xs, carry, fresh, checkpoint_every=every
        )
        return (ys**2).sum()
    return jax.jit(jax.grad(score))

expected, again = gradient(None)(params), gradient(100)
for found in [again(params) for _ in range(40)]:  # threads meet by chance
    test_native.check(found, expected, 1e-4)
"""


@pytest.mark.slow
def test_short_last_block_keeps_out_of_the_way_of_other_threads():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", SHORT_BLOCK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_loops_in_cpp_hold_on_several_threads():
    names = ("native", "program", "product", "projected", "lookup", "cross_entropy")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "not sharded and not devices", *files],
        env={**kept, "JLSTM_TEST_DEVICES": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_native_comes_first_where_it_can():
    assert door.able(jlstm.LSTM(3))[0] == "native"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "was not built"), ("not a library", "was built for another jaxlib")],
)
def test_library_that_is_missing_or_broken_does_no_harm(
    content, reason, tmp_path, monkeypatch
):
    path = tmp_path / "library.so"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(library, "LIBRARY", path)
    library.why_not.cache_clear()
    try:
        assert reason in str(native.why_not(jlstm.LSTM(3), Request()))
    finally:
        library.why_not.cache_clear()


def test_empty_sequences_and_batches_are_fine():
    cell = jlstm.LSTM(3)
    for batch, time in ((2, 0), (0, 2)):
        (params, xs, carry, fresh), _ = arguments(cell, batch, time, 2)
        ys, last, _ = native.unroll(cell, params, xs, carry, fresh)
        assert ys.shape == (batch, time, 3)
        jax.tree.map(np.testing.assert_array_equal, last, carry)
    assert jnp.isfinite(ys).all()


@pytest.mark.parametrize("cell", [jlstm.LSTM(5), jlstm.GRU(5)], ids=repr)
def test_gradients_of_inputs_of_large_weights_are_the_same(cell, monkeypatch):
    args, cotangents = arguments(cell, 5, 4, 3)
    inside = results(native, cell, args, cotangents, "mask")
    monkeypatch.setattr(native, "LARGE", 0)
    check(results(native, cell, args, cotangents, "mask"), inside, 1e-5)
