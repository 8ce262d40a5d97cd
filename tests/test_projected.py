"""The loss of a projection equals the loss of its logits, which are never held."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlstm
from jlstm import train
from jlstm.train import projected

B, T, D, V = 4, 7, 5, 11
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "lengths": {"lengths": np.array([7, 0, 3, 1])},
    "mask": {"mask": np.arange(B * T).reshape(B, T) % 3 != 0, "label_smoothing": 0.2},
    "nothing": {"mask": np.zeros((B, T), bool)},
}


@pytest.fixture(autouse=True)
def two_steps_at_once(monkeypatch):
    monkeypatch.setattr(projected, "BLOCK_BYTES", 4 * B * V * 2)


def make_parts(dtype: Any = np.float64, shape: tuple[int, ...] = (B, T)) -> tuple:
    draw = np.random.default_rng(0).normal
    parts = (draw(size=s).astype(dtype) for s in ((*shape, D), (D, V), (V,)))
    return *parts, np.random.default_rng(1).integers(0, V, shape)


def of_logits(features, w, b, labels, **options) -> train.Mean:
    logits = features @ w + b.reshape((1,) * (features.ndim - 1) + b.shape)
    return train.softmax_cross_entropy(logits, labels, **options)


def gradients(loss_fn: Any, labels: Any, **options: Any) -> Any:
    def value(*parts):
        return loss_fn(*parts, labels, **options).value

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))


@pytest.mark.core
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_loss_and_gradients_equal_those_of_the_logits(options):
    with jax.enable_x64(True):
        features, w, b, labels = map(jnp.asarray, make_parts())
        got, want = (
            gradients(f, labels, **options)(features, w, b)
            for f in (train.projected_cross_entropy, of_logits)
        )
        mean = train.projected_cross_entropy(features, w, b, labels, **options)
        assert int(mean.count) == int(
            of_logits(features, w, b, labels, **options).count
        )
        assert mean.value.dtype == jnp.float64
        chex.assert_trees_all_close(mean.value, want[0], rtol=1e-10)
    chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, T), (B, 0), (B,), (), (2, 3, 4)])
def test_labels_of_any_shape_have_a_loss(shape):
    *parts, labels = make_parts(np.float32, shape)
    got, want = (
        gradients(f, labels)(*parts) for f in (train.projected_cross_entropy, of_logits)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_second_derivatives_equal_those_of_the_logits():
    with jax.enable_x64(True):
        features, w, b, labels = map(jnp.asarray, make_parts())
        lengths = OPTIONS["lengths"]["lengths"]

        def curvature(loss_fn):
            def value(w):
                return loss_fn(features, w, b, labels, lengths=lengths).value

            return jax.jit(jax.jacfwd(jax.grad(value)))(w)

        got, want = curvature(train.projected_cross_entropy), curvature(of_logits)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_garbage_under_the_mask_changes_nothing():
    features, *parts, labels = make_parts(np.float32)
    mask = OPTIONS["mask"]["mask"]
    garbage = np.where(mask[..., None], features, np.nan)
    wild = np.where(mask, labels, -100)
    run = gradients(train.projected_cross_entropy, labels, mask=mask)
    got = gradients(train.projected_cross_entropy, wild, mask=mask)(garbage, *parts)
    chex.assert_trees_all_equal(got, run(features, *parts))
    assert not np.asarray(got[1][0])[~mask].any()


def test_bfloat16_sums_in_float32():
    *parts, labels = make_parts(jnp.bfloat16)
    got = gradients(train.projected_cross_entropy, labels)(*parts)
    wide = [np.asarray(x, np.float32) for x in parts]
    want = gradients(of_logits, labels)(*wide)
    assert got[0].dtype == jnp.float32
    assert [g.dtype for g in got[1]] == [jnp.bfloat16] * 3
    got = jax.tree.map(lambda x: np.asarray(x, np.float32), got)
    chex.assert_trees_all_close(got, want, rtol=0.03, atol=3e-3)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "specs", [(P("data"), P(), P()), (P(), P(None, "data"), P("data"))]
)
def test_sharded_batch_or_classes_agree(axis_type, specs):
    features, w, b, labels = make_parts(np.float32)
    if specs[2] != P():  # an even number of classes
        w, b, labels = w[:, :-1], b[:-1], labels % (V - 1)
    run = gradients(train.projected_cross_entropy, labels)
    want = run(features, w, b)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((features, w, b), specs, strict=True)
        ]
        got = jax.tree.map(np.asarray, run(*sharded))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_logits_are_not_in_memory():
    features, w, b, labels = make_parts(np.float32, (8, 64))
    w, b = np.tile(w, 100), np.tile(b, 100)

    def temporary(loss_fn):
        run = gradients(loss_fn, labels).lower(features, w, b).compile()
        return run.memory_analysis().temp_size_in_bytes

    logits = 4 * labels.size * b.size
    assert temporary(of_logits) > logits
    assert temporary(train.projected_cross_entropy) < logits / 8


def test_language_model_gives_what_the_loss_needs():
    tokens = jnp.arange(B * T).reshape(B, T) % V
    lengths = jnp.array([7, 0, 3, 1])
    for tied in (False, True):
        model = jlstm.LanguageModel(jlstm.RNN(jlstm.LSTM(3)), V, 3, tied=tied)
        params = model.init(jax.random.key(0), tokens)

        def loss(params, whole, model=model):
            if whole:
                logits, carry = model.apply(params, tokens, lengths=lengths)
                mean = train.softmax_cross_entropy(logits, tokens, lengths=lengths)
            else:
                ys, carry = model.features(params, tokens, lengths=lengths)
                head = model.head(params)
                mean = train.projected_cross_entropy(ys, *head, tokens, lengths=lengths)
            return mean.value, carry

        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        chex.assert_trees_all_close(
            run(params, False), run(params, True), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((4, V), "f")}, r"expected features .* got float32\[4,7,5\]"),
        ({"b": np.zeros((1, V), "f")}, r"b \[V\], got .* float32\[1,11\]"),
        ({"labels": np.full((B, T), V)}, r"labels must be in 0..10 .* got 11"),
        ({"labels": np.zeros(B, int)}, "one dimension more than labels"),
        ({"labels": np.zeros((B, T), "f")}, "labels must be integers"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"lengths": np.full(B, 8)}, r"lengths must be in 0..7, got 8"),
    ],
)
def test_mistake_gets_one_clear_line(change, message):
    names = ("features", "w", "b", "labels")
    given = dict(zip(names, make_parts(np.float32), strict=True)) | change
    with pytest.raises(ValueError, match=f"^projected_cross_entropy: .*{message}"):
        train.projected_cross_entropy(**given)
