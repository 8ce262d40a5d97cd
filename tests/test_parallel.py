"""A batch over two devices gives what one device gives, whatever its size."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlstm
from jlstm import train
from jlstm.kernels import library

MODEL = jlstm.Tagger(jlstm.bidirectional(jlstm.LSTM(3)), 4)
LANGUAGE = jlstm.LanguageModel(jlstm.RNN(jlstm.GRU(3)), 7, 3)
KEY = jax.random.key(0)

close = partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-12)


def tag_loss(params, batch, *, key, carry):
    logits, _ = MODEL.apply(params, batch["xs"], lengths=batch["lengths"])
    loss = train.softmax_cross_entropy(logits, batch["tags"], lengths=batch["lengths"])
    right = train.accuracy(logits, batch["tags"], lengths=batch["lengths"])
    return loss, train.Aux({"accuracy": right, "norm": jnp.square(logits).mean()})


def language_loss(params, batch, *, key, carry):
    logits, carry = LANGUAGE.apply(params, batch["ids"], carry)
    return train.softmax_cross_entropy(logits, batch["next"]), train.Aux({}, carry)


def tags(rows: int, time: int = 6) -> dict:
    draw = np.random.default_rng(rows)
    return {
        "xs": draw.standard_normal((rows, time, 2)),
        "tags": draw.integers(0, 4, (rows, time)),
        "lengths": draw.integers(0, time + 1, rows),
    }


@pytest.mark.parametrize("rows", [pytest.param(6, marks=pytest.mark.slow), 5, 1])
def test_loss_metrics_and_gradients_equal_one_device(rows):
    with jax.enable_x64(True):
        batch = jax.tree.map(jnp.asarray, tags(rows))
        params = MODEL.init(KEY, batch["xs"])

        def results(loss_fn):
            def loss(params):
                loss, aux = loss_fn(params, batch, key=None, carry=None)
                return loss.value, (loss, aux.metrics)

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

        close(results(train.data_parallel(tag_loss, 2)), results(tag_loss))


@pytest.mark.parametrize("rows", [pytest.param(4, marks=pytest.mark.slow), 3])
def test_training_with_a_carry_equals_one_device(rows):
    with jax.enable_x64(True):
        ids = np.random.default_rng(0).integers(0, 7, (5, rows, 4))
        batches = [{"ids": part, "next": (part + 1) % 7} for part in ids]
        params = LANGUAGE.init(KEY, jnp.zeros((1, 1), jnp.int32))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        tx = train.sgd(0.1)

        def run(loss_fn):
            carry = LANGUAGE.init_carry(params, (rows,))
            state = train.create_state(params, tx, carry=carry)
            step, metrics = train.make_train_step(loss_fn, tx), {}
            for batch in batches:
                state, metrics = step(state, batch)
            eval_step = train.make_eval_step(loss_fn)
            carry = LANGUAGE.init_carry(params, (rows,))
            scores = train.evaluate(eval_step, state.params, batches, carry)
            return state.params, state.carry, train.average([metrics]), scores

        close(run(train.data_parallel(language_loss, 2)), run(language_loss))


def test_each_device_draws_its_own_noise():
    def noise(params, batch, *, key, carry):
        drawn = jax.random.normal(key, batch.shape)
        return train.Mean(params + drawn.sum(), batch.size), train.Aux({}, drawn)

    run = train.data_parallel(noise, 2)
    drawn = run(jnp.zeros(()), jnp.zeros(5), key=KEY, carry=None)[1].carry
    assert len(set(drawn.tolist())) == 5
    again = run(jnp.zeros(()), jnp.zeros(5), key=KEY, carry=None)[1].carry
    chex.assert_trees_all_equal(drawn, again)


def test_one_device_is_the_loss_itself():
    assert train.data_parallel(tag_loss, 1) is tag_loss


@pytest.mark.parametrize("devices", [0, 3, "2"])
def test_devices_that_are_not_there_are_refused(devices):
    with pytest.raises(ValueError, match=rf"data_parallel: .* 1\.\.2, .* {devices};"):
        train.data_parallel(tag_loss, devices)


def test_leaf_without_the_batch_is_refused_by_name():
    batch = {**tags(4), "lengths": np.zeros(3, int)}
    with pytest.raises(ValueError, match=r"batch\['lengths'\] \[3\], batch\['tags'\]"):
        train.data_parallel(tag_loss, 2)({}, batch, key=None, carry=None)


@pytest.mark.parametrize("implementation", [None, "scan"])
def test_shard_map_that_tracks_devices_is_refused(implementation):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    layer, xs = (
        jlstm.RNN(jlstm.LSTM(2), implementation=implementation),
        jnp.ones((4, 3, 2)),
    )
    params = layer.init(jax.random.key(0), xs)

    def apply(check_vma):
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
        return jax.shard_map(
            lambda params, xs: layer.apply(params, xs)[0],
            mesh=mesh, check_vma=check_vma, **specs,
        )(params, xs)  # fmt: skip

    np.testing.assert_allclose(apply(False), layer.apply(params, xs)[0], atol=1e-6)
    with pytest.raises(NotImplementedError, match="give shard_map check_vma=False"):
        apply(True)


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
def test_fewer_rows_than_devices_meet_the_loops_in_cpp():
    model = jlstm.Tagger(jlstm.RNN(jlstm.Elman(4)), 3)
    batch = {"xs": jnp.ones((1, 5, 2), jnp.float32), "tags": jnp.zeros((1, 5), int)}
    params = model.init(jax.random.key(0), batch["xs"])

    def loss_fn(params, batch, *, key, carry):
        scores, _ = model.apply(params, batch["xs"])
        return train.softmax_cross_entropy(scores, batch["tags"]), train.Aux({})

    def loss(params, batch):
        parallel: Any = train.data_parallel(loss_fn, 2)
        return parallel(params, batch, key=None, carry=None)[0].value

    text = jax.jit(jax.grad(loss)).lower(params, batch).as_text()
    assert text.count("@jlstm_program") == 2  # forward and backward
