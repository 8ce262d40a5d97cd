"""An embedding of few symbols is joined with the cell that reads it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_native import check

import jlstm
from jlstm.bench.cases import MGU
from jlstm.kernels import library
from jlstm.layers import compose

IDS = np.random.default_rng(0).integers(0, 7, (3, 9)).astype(np.int32)
KEY = jax.random.key(0)


def embed(**options):
    return jlstm.Embed(7, 4, **options)


def joined(layer, params):
    return compose.on_ids(
        layer.layers[0], params[0], layer.layers[1], params[1], jnp.asarray(IDS)
    )


def apart(model, params, ids, **options):
    """Runs the layers one after another, so that none are joined."""
    if isinstance(model, jlstm.LanguageModel):
        model = jlstm.stack(model._embed, model.body)
        params = (params.embed, params.body)
    carries = []
    for layer, layer_params in zip(model.layers, params, strict=True):
        ids, carry = layer.apply(layer_params, ids, **options)
        carries.append(carry)
    return ids, carries


def together(model, params, ids, **options):
    return getattr(model, "features", model.apply)(params, ids, **options)


def gradient(run, model, params, **options):
    def score(params):
        leaves = jax.tree.leaves(run(model, params, IDS, **options))
        return sum(
            jnp.sin(leaf.astype(jnp.float32) + i).sum() for i, leaf in enumerate(leaves)
        )

    return jax.jit(jax.value_and_grad(score))(params)


LSTM = jlstm.LSTM(3, double_bias=True)
MODELS = {
    "LSTM": jlstm.stack(embed(), jlstm.RNN(LSTM)),
    "GRU": jlstm.stack(embed(), jlstm.RNN(jlstm.GRU(3, double_bias=True))),
    "reset before": jlstm.stack(
        embed(), jlstm.RNN(jlstm.GRU(3, reset_after=False), reverse=True)
    ),
    "a user's cell": jlstm.stack(embed(), jlstm.RNN(MGU(3))),
    "both directions": jlstm.stack(embed(), jlstm.bidirectional(LSTM), jlstm.RNN(LSTM)),
    "stack in a stack": jlstm.stack(
        embed(), jlstm.stack(jlstm.RNN(LSTM), jlstm.Dense(2))
    ),
    "checkpoints": jlstm.stack(embed(), jlstm.RNN(LSTM, checkpoint_every=4)),
    "frozen": jlstm.stack(embed(frozen=True), jlstm.RNN(LSTM)),
    "language model": jlstm.LanguageModel(jlstm.RNN(jlstm.GRU(4)), 7, 4, tied=True),
}


QUICK = ["LSTM", "a user's cell", "checkpoints", "frozen"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS],
)
def test_joined_layers_equal_those_one_after_another(name):
    model = MODELS[name]
    params = model.init(KEY, IDS)
    if isinstance(model, compose.Stack):
        assert joined(model, params) is not None
    options = {"lengths": np.array([9, 0, 4])}
    found = gradient(together, model, params, **options)
    check(found, gradient(apart, model, params, **options), 2e-5)


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
@pytest.mark.parametrize("cell", [LSTM, jlstm.GRU(3, double_bias=True)], ids=repr)
def test_native_loop_takes_ids(cell, monkeypatch):
    monkeypatch.setattr("jlstm.door.may_be_sharded", lambda: False)
    layer = jlstm.stack(embed(), jlstm.RNN(cell, implementation="native"))
    params = layer.init(KEY, IDS)
    check(gradient(together, layer, params), gradient(apart, layer, params), 2e-5)
    bytes_, _ = layer.apply(params, IDS.astype(np.uint8))
    np.testing.assert_array_equal(bytes_, layer.apply(params, IDS)[0])


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
def test_gradient_of_the_gradient_of_the_native_loop_on_ids(monkeypatch):
    monkeypatch.setattr("jlstm.door.may_be_sharded", lambda: False)
    layer = jlstm.stack(embed(), jlstm.RNN(LSTM, implementation="native"))
    params = layer.init(KEY, IDS)

    def penalty(params, run):
        grads = gradient(run, layer, params)[1]
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))

    run = jax.jit(jax.grad(penalty), static_argnums=1)
    check(run(params, together), run(params, apart), 1e-4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (jlstm.Embed(200, 4), jlstm.RNN(LSTM)),  # more symbols than steps
        (embed(), jlstm.Residual(jlstm.RNN(jlstm.LSTM(4)))),
        (embed(), jlstm.Dropout(0.5)),
        (embed(), jlstm.Dense(3)),
        (embed(), jlstm.RNN(jlstm.LSTM(3), implementation="cudnn")),
    ],
    ids=["large vocabulary", "Residual", "Dropout", "Dense", "cudnn"],
)
def test_other_layers_are_not_joined(first, second):
    layer = jlstm.stack(first, second)
    # On a CPU cuDNN is refused as soon as it is to run.
    params = jlstm.with_implementation(layer, "scan").init(KEY, IDS)
    assert joined(layer, params) is None


class Prepared(MGU):
    """A cell that looks at its inputs before the loop."""

    def prepare(self, params, xs, *, key=None):
        del key
        return params, xs - xs.mean(1, keepdims=True)


def test_cell_that_prepares_its_inputs_is_not_joined():
    layer = jlstm.stack(embed(), jlstm.RNN(Prepared(3)))
    assert joined(layer, layer.init(KEY, IDS)) is None


def test_policy_holds_for_joined_layers():
    policy = jlstm.Policy(compute=jnp.bfloat16)
    layer = jlstm.stack(embed(), jlstm.RNN(LSTM, policy=policy))
    params = layer.init(KEY, IDS)
    assert joined(layer, params) is not None
    ys, _ = layer.apply(params, IDS)
    exact, _ = jlstm.stack(embed(), jlstm.RNN(LSTM)).apply(params, IDS)
    assert ys.dtype == jnp.bfloat16
    np.testing.assert_allclose(ys.astype(jnp.float32), exact, atol=0.03)


def test_errors_and_summaries_know_both_layers():
    layer = MODELS["LSTM"]
    params = layer.init(KEY, IDS)
    with pytest.raises(ValueError, match=r"stack\[0\].Embed: ids must lie in 0..6"):
        layer.apply(params, IDS + 1)
    model = MODELS["language model"]
    with pytest.raises(ValueError, match=r"Embed: ids must lie in 0..6"):
        model.apply(model.init(KEY, IDS), IDS + 1)
    wrong = (params[0], jlstm.RNN(LSTM).init(KEY, jnp.ones((1, 1, 5))))
    with pytest.raises(ValueError, match=r"stack\[1\].*cannot take a step"):
        layer.apply(wrong, IDS)
    assert "Embed" in str(jlstm.summary(layer, IDS))
