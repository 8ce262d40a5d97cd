"""Layers as modules of Flax, and modules of Flax as layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jlstm
import jlstm.flax
from jlstm.testing import check_layer

KEY = jax.random.key(0)
XS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
LENGTHS = jnp.array([5, 2])
LAYER = jlstm.stack(
    jlstm.bidirectional(jlstm.Elman(2), implementation="scan"),
    jlstm.Dropout(0.5),
    jlstm.Dense(2),
)
run = LAYER.apply


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def filled(types: Any) -> Any:
    """Arrays of any values, by NumPy, since to compile an init takes longer."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) / 2, types
    )


@pytest.fixture(scope="module")
def params() -> Any:
    return filled(jax.eval_shape(LAYER.init, KEY, XS))


# Layers as modules.


def test_module_runs_its_layer(params):
    module = jlstm.flax.Module(LAYER, params=params)
    carry = LAYER.init_carry(params, (2,))
    options: Any = {"lengths": LENGTHS, "resets": jnp.zeros((2, 5), bool)}
    got = nnx.jit(lambda m, xs, carry: m(xs, carry, **options))(module, XS, carry)
    close(got, run(params, XS, **options))
    noisy = run(params, XS, key=nnx.Rngs(dropout=3).dropout())
    rngs = nnx.Rngs(dropout=3)
    close(module(XS, rngs=rngs), noisy)
    assert not np.allclose(module(XS, rngs=rngs)[0], noisy[0])
    close(module(XS, key=nnx.Rngs(dropout=3).dropout()), noisy)


def test_module_has_a_param_for_each_leaf(params):
    module = jlstm.flax.Module(LAYER, params=params)
    state = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    assert {"/".join(map(str, path)) for path in state} == {
        *(f"weights/0/{way}/{name}" for way in ("forward", "backward")
          for name in ("w_ih", "w_hh", "b")),
        "weights/2/w",
        "weights/2/b",
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, module.params, params)
    assert jax.tree.structure(module.params) == jax.tree.structure(params)
    counted = jlstm.flax.Module(Counted(), XS, rngs=nnx.Rngs(0))
    assert not nnx.to_flat_state(nnx.state(counted, nnx.Param))
    assert int(counted.params) == 3


class Counted:
    """A layer whose params are one integer."""

    def init(self, key, xs):
        return jnp.array(3)

    def init_carry(self, params, batch_shape):
        return ()

    def apply(self, params, xs, carry=None, **masking):
        return xs, ()


def test_module_learns_as_its_params_do(params):
    tx = optax.sgd(0.1, momentum=0.9)

    def loss_of(ys: Any) -> Any:
        return jnp.square(ys[0]).sum()

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: loss_of(LAYER.apply(p, XS, lengths=LENGTHS)))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    module = jlstm.flax.Module(LAYER, params=params)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step_of_module(module, optimizer):
        grads = nnx.grad(lambda m: loss_of(m(XS, lengths=LENGTHS)))(module)
        optimizer.update(module, grads)

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
        step_of_module(module, optimizer)
    close(module.params, params)


def test_module_is_made_of_state_and_graph(params):
    module = jlstm.flax.Module(LAYER, params=params)
    graph, state = nnx.split(module)
    types = jax.ShapeDtypeStruct(XS.shape, XS.dtype)

    def make() -> Any:
        return jlstm.flax.Module(LAYER, types, rngs=nnx.Rngs(0))

    other_graph, types_of_state = nnx.split(nnx.eval_shape(make))
    assert graph == other_graph
    assert hash(graph) == hash(other_graph)
    shapes = jax.tree.map(jnp.shape, types_of_state)
    assert shapes == jax.tree.map(jnp.shape, state)
    # As a checkpoint of names and arrays.
    again = jlstm.flax.Module(LAYER, params=jax.tree.map(jnp.zeros_like, params))
    nnx.update(again, nnx.to_pure_dict(state))
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_module_is_one_of_linen_by_the_bridge_of_flax():
    types = jax.ShapeDtypeStruct(XS.shape, XS.dtype)
    module = nnx.bridge.to_linen(jlstm.flax.Module, LAYER, types)
    variables = filled(jax.eval_shape(module.init, KEY, XS))
    assert set(variables) == {"params"}
    ours = jlstm.flax.Module(LAYER, params=filled(jax.eval_shape(LAYER.init, KEY, XS)))
    nnx.update(ours, variables["params"])
    options: Any = {"lengths": LENGTHS, "key": jax.random.key(5)}
    got = jax.jit(module.apply)(variables, XS, **options)
    close(got, run(ours.params, XS, **options))


def test_module_inside_of_a_module():
    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.encoder = jlstm.flax.Module(jlstm.Dense(2), XS, rngs=rngs)
            self.head = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, xs):
            return self.head(self.encoder(xs)[0])

    outer = Outer(nnx.Rngs(0))
    expected = outer.head(jlstm.Dense(2).apply(outer.encoder.params, XS)[0])
    close(nnx.jit(lambda m, xs: m(xs))(outer, XS), expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: jlstm.flax.Module(LAYER, XS), ValueError, "give either params, or xs"),
        (lambda: jlstm.flax.Module(LAYER), ValueError, "give either params, or xs"),
        (
            lambda: jlstm.flax.Module(LAYER, XS, rngs=nnx.Rngs(0), params=()),
            ValueError,
            "give either params, or xs and rngs to make them",
        ),
        (
            lambda: jlstm.flax.Module(jlstm.LSTM(2), XS),  # type: ignore
            TypeError,
            "flax.Module.layer: must be a layer, got the cell LSTM(2); wrap it",
        ),
        (
            lambda: jlstm.flax.Module(jlstm.Dropout(0.5), params=())(
                XS, key=KEY, rngs=nnx.Rngs(0)
            ),
            ValueError,
            "flax.Module: give key or rngs, not both",
        ),
    ],
)
def test_module_refuses(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_flax_is_loaded_where_it_is_touched(monkeypatch):
    module = jlstm.flax
    monkeypatch.delattr(jlstm, "flax")
    assert jlstm.flax is module
    with pytest.raises(AttributeError, match="'jlstm' has no attribute 'flux'"):
        jlstm.flux  # type: ignore  # noqa: B018


@pytest.mark.slow
def test_the_page_on_flax_and_files_runs(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pytest.importorskip("flatbuffers")
    page = Path(__file__).parents[1] / "docs" / "how-to" / "exchange.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 6
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec("\n".join(blocks), {})


# Modules as layers.


class Perceptron(nnx.Module):
    def __init__(self, size, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, size, rngs=rngs) for _ in range(1)])
        self.norm = nnx.LayerNorm(size, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.norm(x)


def make_perceptron(rngs):
    return Perceptron(4, rngs=rngs)


LINEN = jlstm.lift(nn.Sequential((nn.Dense(4), nn.tanh, nn.LayerNorm())))
NNX = jlstm.lift(Perceptron, size=4)


@pytest.mark.parametrize("layer", [LINEN, NNX], ids=str)
def test_lifted_modules_act_on_each_step(layer):
    params = layer.init(KEY, XS)
    ys, carry = layer.apply(params, XS, lengths=LENGTHS)
    assert carry == ()
    if layer is LINEN:
        expected: Any = layer.source.module.apply({"params": params}, XS)
    else:
        module = make_perceptron(nnx.Rngs(0))
        nnx.update(module, params)
        expected = module(XS)
    mask = jnp.arange(5)[None, :] < LENGTHS[:, None]
    close(ys, jlstm.zero_rows(mask, expected))
    dirty = jnp.where(mask[..., None], XS, jnp.nan)
    np.testing.assert_array_equal(layer.apply(params, dirty, lengths=LENGTHS)[0], ys)
    _, y = jlstm.step(layer, params, None, XS[:, 1])
    close(y, expected[:, 1])


@pytest.mark.parametrize(
    "layer",
    [
        jlstm.lift(nnx.Linear, 5, 2),
        pytest.param(
            jlstm.lift(nn.Sequential((nn.Dense(3), nn.tanh, nn.LayerNorm()))),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_lifted_modules_obey_the_laws(layer):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        check_layer(layer)


@pytest.mark.slow
def test_lifted_convolutions_obey_the_laws_but_of_resets():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        check_layer(jlstm.lift(nn.Conv(3, (3,)), per_step=False), resets=False)


def test_lifted_modules_see_the_sequence_where_they_are_asked_to():
    layer = jlstm.lift(nn.Conv(4, (3,)), per_step=False)
    params = layer.init(KEY, XS)
    expected: Any = nn.Conv(4, (3,)).apply({"params": params}, XS)
    close(layer.apply(params, XS)[0], expected)
    assert not layer.causal
    assert not layer.pointwise
    with pytest.raises(NotImplementedError, match="cannot honour resets"):
        layer.apply(params, XS, resets=jnp.zeros((2, 5), bool))
    valid = jlstm.lift(nn.Conv(4, (3,), padding="VALID"), per_step=False)
    with pytest.raises(ValueError, match=r"must return \[B, T, \.\.\.\], like its in"):
        valid.apply(params, XS)


def test_lifted_modules_are_configs():
    assert repr(LINEN) == (
        "lift(Sequential(layers=(Dense(features=4), tanh, LayerNorm())))"
    )
    assert repr(NNX) == "lift(Perceptron, size=4)"
    assert jlstm.lift(nn.Dense(4)) == jlstm.lift(nn.Dense(4))
    assert hash(jlstm.lift(nn.Dense(4))) == hash(jlstm.lift(nn.Dense(4)))
    assert jlstm.lift(nn.Dense(4)) != jlstm.lift(nn.Dense(3))
    assert jlstm.lift(Perceptron, 4) == jlstm.lift(Perceptron, 4)
    assert jlstm.lift(Perceptron, 4) != jlstm.lift(Perceptron, 3)
    assert jlstm.lift(nn.Conv(2, (3,))) != jlstm.lift(nn.Conv(2, (3,)), per_step=False)
    tokens = jnp.array([[1, 2, 3]])
    layer = jlstm.stack(
        jlstm.lift(nn.Embed(5, 3)),
        jlstm.RNN(jlstm.LSTM(2)),
        jlstm.Residual(jlstm.lift(make_linear)),
    )
    layer = jlstm.with_implementation(layer, "scan")
    assert "lift(make_linear)" in str(jlstm.summary(layer, tokens))


def make_linear(rngs):
    return nnx.Linear(2, 2, rngs=rngs)


def test_lifted_modules_are_saved_with_their_layer(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "lifted.safetensors"
    for layer, other in ((LINEN, jlstm.lift(nn.Dense(3))), (NNX, LINEN)):
        params = layer.init(KEY, XS)
        jlstm.save(path, layer, params)
        again, loaded = jlstm.load(path, layer)
        assert again is layer
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        with pytest.raises(ValueError, match=r"which load does not know; give the lay"):
            jlstm.load(path)
        with pytest.raises(ValueError, match=r"layer\.source: .* in the file, "):
            jlstm.load(path, other)


REFUSED = [
    (
        lambda: nn.BatchNorm(True),
        {},
        "the collections batch_stats in BatchNorm(use_run",
    ),
    (
        lambda: nn.Dropout(0.5, deterministic=False),
        {},
        "random numbers for 'dropout' in Dropout(rate=0.5, deterministic=False)",
    ),
    (
        lambda: nnx.BatchNorm,
        {"num_features": 3},
        "mean (BatchStat), var (BatchStat) in",
    ),
    (lambda: nnx.Dropout, {"rate": 0.5}, "rngs/count (RngCount), rngs/key (RngKey) in"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_lift_refuses_modules_with_more_than_params(make, options, message):
    layer = jlstm.lift(make(), **options)
    message = f"lift: a module must have only params, got {message}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.init(KEY, XS)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: jlstm.lift(nn.Dense),
            TypeError,
            "must be a module, got the class Dense; make one: Dense(...)",
        ),
        (
            lambda: jlstm.lift(nn.Dense(4), 3),
            TypeError,
            "Dense is an instance already and takes no further arguments; give them to "
            "its class",
        ),
        (
            lambda: jlstm.lift(nnx.Linear(3, 4, rngs=nnx.Rngs(0))),
            TypeError,
            "must be a class of nnx, got an instance of Linear; give the class and its "
            "arguments, lift(Linear, ...), because a config cannot hold the arrays",
        ),
        (
            lambda: jlstm.lift(3),
            TypeError,
            "must be a module of flax.linen, a class",
        ),
        (
            lambda: jlstm.lift(lambda rngs: nnx.Linear(3, 4, rngs=rngs)),
            ValueError,
            "must be a class or a module-level function, got <lambda>",
        ),
        (
            lambda: jlstm.lift(nn.Sequential([nn.Dense(3)])),  # type: ignore
            ValueError,
            "Sequential(layers=(Dense(features=3),)) must be hashable; use tuples",
        ),
        (
            lambda: jlstm.lift(nnx.Linear, [3], 4),
            ValueError,
            "the arguments in Linear, (3,), 4 must be hashable; use tuples instead of",
        ),
        (
            lambda: jlstm.Lifted(nn.Dense(4)),  # type: ignore
            ValueError,
            "must be a module-level function or a frozen dataclass",
        ),
        (lambda: jlstm.Lifted(3), TypeError, "must be made by lift(module), got 3"),  # type: ignore
    ],
)
def test_lift_refuses(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make()
