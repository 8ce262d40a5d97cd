"""Models run unchanged on several devices, under Auto and under Explicit axes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlstm
from jlstm import train

BATCH, TIME, VOCAB, CLASSES = 4, 5, 7, 3

EMBED, LSTM, GRU = (
    jlstm.Embed(VOCAB, 4),
    jlstm.LSTM(2),
    jlstm.GRU(2, learned_carry=True),
)
MODELS = {
    "classifier": jlstm.Classifier(
        jlstm.stack(
            EMBED, jlstm.bidirectional(LSTM), jlstm.Residual(jlstm.Dropout(0.3))
        ),
        CLASSES,
    ),
    "tagger": jlstm.Tagger(
        jlstm.stack(
            EMBED,
            jlstm.bidirectional(LSTM, GRU),
            jlstm.Conv(3, width=2, padding="CAUSAL"),
            jlstm.Dropout(0.3, shared_over_time=True),
            jlstm.RNN(GRU),
        ),
        CLASSES,
    ),
    "language_model": jlstm.LanguageModel(
        jlstm.stack(jlstm.RNN(LSTM), jlstm.LayerNorm(), jlstm.Dense(4)),
        VOCAB,
        embed_size=4,
        tied=True,
    ),
    "convolutions": jlstm.Classifier(
        jlstm.stack(EMBED, jlstm.Conv(3, width=3), jlstm.Conv(3, 2, padding="VALID")),
        CLASSES,
        pooling="mean",
    ),
}
WAYS = [
    ("classifier", "fused"),
    ("tagger", "scan"),
    ("tagger", "fused"),
    ("language_model", "fused"),
    ("convolutions", "scan"),
]


# These take a loop over either kind of axes.
FAST = [
    (WAYS[3], AxisType.Explicit),
    (WAYS[4], AxisType.Auto),
]
SLOW = [pytest.mark.slow]


def make_batch(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    resets = rng.random((BATCH, TIME)) < 0.3
    tokens = rng.integers(0, VOCAB, (BATCH, TIME))
    batch = {"xs": tokens, "lengths": np.array([5, 3, 0, 1]), "resets": resets}
    if name == "convolutions":  # a VALID one refuses resets
        del batch["resets"]
    per_row = isinstance(MODELS[name], jlstm.Classifier)
    labels = (BATCH,) if per_row else (BATCH, TIME)
    return {**batch, "labels": rng.integers(0, CLASSES, labels)}


@jax.jit(static_argnums=0)
def run(model, params, carry, batch, key):
    """Answers, carry, loss and gradients, as a training step computes them."""
    batch = dict(batch)
    labels = batch.pop("labels")
    masked = {"lengths": batch["lengths"]} if labels.ndim == 2 else {}

    def loss_fn(params, carry):
        answer, carry = model.apply(params, carry=carry, key=key, **batch)
        loss = train.softmax_cross_entropy(answer, labels, **masked).value
        return loss, (answer, carry)

    return jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, carry)


def run_all(name: str, implementation: str, sharding: NamedSharding | None = None):
    model = jlstm.with_implementation(MODELS[name], implementation)
    batch = jax.tree.map(jnp.asarray, make_batch(name))
    params = jax.jit(model.init)(jax.random.key(0), batch["xs"])
    # A user's zeros: of the right shape, and sharded as nothing in particular.
    fresh = model.init_carry(params, (BATCH,))
    carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh)
    if sharding is not None:
        for data in ("xs", "labels"):
            batch[data] = jax.device_put(batch[data], sharding)
    return run(model, params, carry, batch, jax.random.key(1))


@functools.cache
def run_alone(name: str):
    return run_all(name, "scan")


AXES = pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=str)


# Explicit axes are what a loop can fail under; with automatic ones a loop is enough.
@pytest.mark.parametrize(
    ("name", "implementation", "axis"),
    [
        pytest.param(*way, axis, marks=[] if (way, axis) in FAST else SLOW)
        for way in WAYS
        for axis in (AxisType.Auto, AxisType.Explicit)
        if axis == AxisType.Explicit or way in (WAYS[2], WAYS[4])
    ],
)
def test_mesh_equals_one_device(name, implementation, axis):
    alone = run_alone(name)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        together = run_all(name, implementation, NamedSharding(mesh, P("data")))
    (_, (answer, _)), _ = together
    assert answer.sharding.spec[0] == "data"
    assert jax.tree.structure(together) == jax.tree.structure(alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        together,
        alone,
    )


@AXES
def test_mesh_serves_step_by_step(axis):
    layer = jlstm.stack(
        jlstm.Embed(VOCAB, 4), jlstm.RNN(jlstm.LSTM(2)), jlstm.Dense(CLASSES)
    )
    tokens = jnp.arange(BATCH, dtype=jnp.int32)
    params = layer.init(jax.random.key(0), tokens[:, None])
    expected, _ = layer.apply(params, tokens[:, None])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        x = jax.device_put(tokens, NamedSharding(mesh, P("data")))
        _, y = jlstm.step(layer, params, None, x, reset=x > 1)
    np.testing.assert_allclose(y, expected[:, 0], rtol=1e-5, atol=1e-6)
