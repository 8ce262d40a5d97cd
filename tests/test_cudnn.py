"""What surrounds the call of cuDNN gives the results of scan, and names its limits."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import rnn
from jax.extend import backend
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxlib import gpu_rnn

import jlstm
from jlstm.kernels import Request, cudnn
from jlstm.testing import random_like

BATCH, TIME, SIZE = 3, 5, 2
RAGGED = (3, TIME, 0)
CELLS = [jlstm.LSTM(3), jlstm.LSTM(2, double_bias=True, learned_carry=True)]
XS = jnp.ones((BATCH, TIME, SIZE))
CELL = CELLS[0]
PARAMS = CELL.init(jax.random.key(0), XS[:, 0])

directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "back"])
ragged = pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "ragged"])


def stand_in(xs, h, c, weights, lengths, *, precision):
    """JAX's reference of the call; a row of length 0 spoils the batch, as in cuDNN."""
    del precision
    weights = jnp.where((lengths > 0).all(), weights, jnp.nan)
    sizes = xs.shape[-1], h.shape[-1], 1
    unpacked = rnn.unpack_lstm_weights(weights, *sizes, False)
    return rnn.lstm_ref(xs, h, c, *unpacked, lengths, *sizes, 0.0, False)


@pytest.fixture
def anywhere(monkeypatch):
    """Runs the loop on any platform, in any dtype, without cuDNN."""
    monkeypatch.setattr(cudnn, "why_not", lambda cell, request: None)
    monkeypatch.setattr(cudnn, "_lstm", stand_in)


@pytest.fixture
def on_gpu(monkeypatch):
    """As the door sees it on a machine with a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.fixture
def traceable(monkeypatch):
    """The call itself can be traced where there is no cuDNN to ask for sizes."""
    name = "compute_rnn_workspace_reserve_space_sizes"
    monkeypatch.setattr(gpu_rnn, name, lambda *sizes: (0, 16), raising=False)


def case(cell, shape=(BATCH, TIME, SIZE), dtype=jnp.float64) -> tuple:
    """Params, inputs and an incoming carry, ``None`` where the cell learns one."""
    xs = random_like(jnp.zeros(shape, dtype), seed=0)
    x = jax.ShapeDtypeStruct((shape[0], shape[-1]), dtype)
    params = random_like(jax.eval_shape(cell.init, jax.random.key(0), x), seed=1)
    carry = random_like(cell.init_carry(params, shape[:1]), seed=2)
    return params, xs, None if cell.learned_carry else carry


def results(implementation, cell, args, **options) -> tuple[Any, Any]:
    """Outputs and the carry, and the gradients of all arguments."""

    def run(args):
        out = jlstm.unroll(cell, *args, implementation=implementation, **options)
        pairs = zip(*map(jax.tree.leaves, (out, random_like(out, seed=3))), strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs), out

    gradients, out = jax.jit(jax.grad(run, has_aux=True))(args)
    return out, gradients


def check_equal(cell, args, *, lengths, reverse, tolerance=1e-10):
    """Compares with scan, with NaN in the padding."""
    params, xs, carry = args
    options: dict[str, Any] = {"reverse": reverse}
    valid = jnp.ones(xs.shape[:2], bool)
    if lengths is not None:
        options["lengths"] = jnp.array(lengths)
        valid = jnp.arange(xs.shape[1])[None] < options["lengths"][:, None]
    args = params, jnp.where(valid[..., None], xs, jnp.nan), carry
    found, expected = (results(way, cell, args, **options) for way in ("cudnn", "scan"))
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)
    chex.assert_tree_all_finite(found)
    (ys, _), (_, dxs, _) = found
    assert not ys[~valid].any()
    assert not dxs[~valid].any()


@ragged
@directions
@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_values_and_gradients_are_those_of_scan(cell, reverse, lengths, anywhere):
    with jax.enable_x64(True):
        check_equal(cell, case(cell), lengths=lengths, reverse=reverse)


def test_values_and_gradients_in_float32_are_those_of_scan(anywhere):
    args = case(CELL, dtype=jnp.float32)
    check_equal(CELL, args, lengths=RAGGED, reverse=True, tolerance=1e-5)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((1, 1, SIZE), None),
        ((1, 4, 1), (4,)),
        ((2, 3, SIZE), (0, 0)),
        ((2, 0, SIZE), (0, 0)),
        ((0, 3, SIZE), None),
    ],
    ids=["one step", "one row", "all rows of length 0", "no steps", "no rows"],
)
def test_edges_are_those_of_scan(shape, lengths, anywhere):
    with jax.enable_x64(True):
        check_equal(CELL, case(CELL, shape), lengths=lengths, reverse=True)


def test_row_of_length_0_reaches_no_other_row(anywhere):
    with jax.enable_x64(True):
        params, xs, carry = case(CELL)
        carry = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), carry)
        lengths = jnp.array(RAGGED)

        def gradient(rows):
            def loss(params):
                ys, after = jlstm.unroll(
                    CELL,
                    params,
                    xs[:rows],
                    jax.tree.map(lambda leaf: leaf[:rows], carry),
                    lengths=lengths[:rows],
                    implementation="cudnn",
                )
                return (ys**2).sum() + (after.c[:2] ** 2).sum()

            return jax.jit(jax.grad(loss))(params)

        chex.assert_trees_all_close(gradient(3), gradient(2), rtol=1e-12)


@pytest.mark.parametrize("cell", CELLS, ids=repr)
def test_pack_is_the_layout_that_jax_unpacks(cell):
    params = case(cell, dtype=jnp.float32)[0]
    packed, sizes = cudnn.pack_lstm(params), (SIZE, cell.hidden_size, 1, False)
    assert packed.shape == (rnn.get_num_params_in_lstm(*sizes),)
    b_hh = jnp.zeros_like(params.b) if params.b_hh is None else params.b_hh
    expected = [params.w_ih.T, params.w_hh.T, params.b, b_hh]
    found = [part[0] for part in rnn.unpack_lstm_weights(packed, *sizes)]
    chex.assert_trees_all_equal(found, expected)


# The call itself, traced.


def loss(params, xs=XS):
    carry = CELL.init_carry(params, (xs.shape[0],))
    ys, after, _ = cudnn.unroll(CELL, params, xs, carry, carry)
    return ys.sum() + after.c.sum()


@pytest.mark.parametrize(
    ("default", "allow_tf32"),
    [
        (None, False),
        ("highest", False),
        ("float32", False),
        ("F32_F32_F32", False),
        ("high", True),
        ("tensorfloat32", True),
        ("bfloat16", True),
    ],
)
def test_products_are_float32_unless_lowered(default, allow_tf32, traceable):
    with jax.default_matmul_precision(default):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(PARAMS).jaxpr
    calls = {
        eqn.primitive.name: eqn.params["cudnn_allow_tf32"]
        for eqn in jaxpr.eqns
        if eqn.primitive.name.startswith("rnn_")
    }
    assert calls == {"rnn_fwd": allow_tf32, "rnn_bwd": allow_tf32}


def test_shard_map_is_traced(traceable):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    sharded = partial(jax.shard_map, mesh=mesh, check_vma=False, out_specs=P())
    gradient = sharded(jax.grad(loss), in_specs=(P(), P("data")))
    args = PARAMS, jnp.ones((4, TIME, SIZE))
    assert "rnn_bwd" in str(jax.make_jaxpr(gradient)(*args))


def test_rocm_is_refused(traceable, monkeypatch):
    rocm = SimpleNamespace(platform_version="PJRT C API\nrocm 70000")
    monkeypatch.setattr(backend, "get_backend", lambda: rocm)
    with pytest.raises(
        NotImplementedError, match="cudnn: runs only on CUDA, but the arrays are on"
    ):
        jax.eval_shape(loss, PARAMS)


# What is refused, and never chosen.

SHARDED = (
    "would gather rows that may lie on several devices; call it inside jax.shard_map"
)
LIMITS = {
    "takes padding only at the end of rows, as lengths; got a mask": {
        "mask": jnp.ones((BATCH, TIME), bool)
    },
    "cannot restore the fresh carry at resets": {
        "resets": jnp.zeros((BATCH, TIME), bool)
    },
    "cannot return the carry of every step": {"return_carries": True},
    "stores every step, so it cannot honour checkpoint_every": {"checkpoint_every": 2},
    # The suite has two devices.
    SHARDED: {},
}


def check_refused(reason, cell=CELL, params=PARAMS, xs=XS, **options):
    for call in (
        partial(jlstm.unroll, cell, params, xs),
        partial(jlstm.explain, cell, xs),
    ):
        with pytest.raises(NotImplementedError) as caught:
            call(implementation="cudnn", **options)
        hint = "use implementation='scan', or None for the default"
        assert str(caught.value) == f"cudnn: {reason}; {hint}"
    explained = dict(jlstm.explain(cell, xs, **options).others)
    assert explained["cudnn"] == f"cannot: {reason}"


@pytest.mark.parametrize("reason", LIMITS)
def test_limits_are_named(reason, on_gpu):
    check_refused(reason, **LIMITS[reason])


def test_platform_is_named():
    check_refused("runs only on a GPU, but the arrays are on a cpu")


def test_dtypes_are_named(on_gpu):
    params, xs = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (PARAMS, XS))
    check_refused("computes only in float32, got bfloat16", params=params, xs=xs)


def test_cells_other_than_lstm_are_refused_at_construction():
    for cell in (jlstm.GRU(3), jlstm.Precision(CELL, jlstm.Policy())):
        with pytest.raises(NotImplementedError, match="cudnn: runs only an LSTM, got"):
            jlstm.RNN(cell, implementation="cudnn")
    assert jlstm.RNN(CELL, implementation="cudnn").implementation == "cudnn"


def test_none_never_chooses_it(on_gpu, monkeypatch):
    assert (
        cudnn.why_not(CELL, Request("gpu", frozenset({"float32"}), "lengths")) is None
    )
    monkeypatch.setattr("jlstm.door.may_be_sharded", lambda: False)
    explanation = jlstm.explain(CELL, XS, lengths=jnp.array(RAGGED))
    assert explanation.implementation == "fused"
    assert dict(explanation.others)["cudnn"] == "can: fused comes first"
