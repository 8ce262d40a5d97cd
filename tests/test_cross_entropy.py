"""The cross-entropy in C++ equals NumPy's in float64, and so do its gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE
from test_projected import of_logits

from jlstm import train
from jlstm.kernels import cross_entropy, library

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=str(library.why_not())
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on one device, and for any number of classes."""
    monkeypatch.setattr(cross_entropy, "may_be_sharded", lambda: False)
    monkeypatch.setattr(cross_entropy, "FEW", 0)


def draw(batch: tuple, features: int, classes: int) -> tuple[tuple, Any]:
    rng = np.random.default_rng(0)
    shapes = (*batch, features), (features, classes), (classes,)
    parts = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return tuple(parts), rng.integers(0, classes, batch).astype(np.int32)


def in_numpy(parts, labels, valid, smoothing):
    """The mean and its gradients, in float64."""
    features, w, b = parts
    rows = features.reshape(-1, len(w)).astype(np.float64)
    z = rows @ w.astype(np.float64) + b
    largest = z.max(-1, keepdims=True)
    log_sums = largest + np.log(np.exp(z - largest).sum(-1, keepdims=True))
    wanted = np.full_like(z, smoothing / b.size)
    wanted[np.arange(len(z)), labels.ravel()] += 1 - smoothing
    weights = valid.reshape(-1, 1) / max(1, valid.sum())
    dz = (np.exp(z - log_sums) - wanted) * weights
    loss = ((log_sums - z) * wanted * weights).sum()
    dfeatures = (dz @ w.T.astype(np.float64)).reshape(features.shape)
    return loss, (dfeatures, rows.T @ dz, dz.sum(0))


def evaluated(labels: Any, **options: Any) -> tuple[Any, Any]:
    def value(features, w, b):
        mean = train.projected_cross_entropy(features, w, b, labels, **options)
        return mean.value

    return jax.jit(value), jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))


def check_cross_entropy(size, masked, smoothing):
    """Compares with NumPy; run for each set of instructions by ``test_native``."""
    batch, _, classes = size
    parts, labels = draw(*size)
    valid = np.arange(labels.size).reshape(batch) % 3 != 0 if masked else None
    value, slopes = evaluated(labels, mask=valid, label_smoothing=smoothing)
    assert "jlstm_cross_entropy" in slopes.lower(*parts).as_text()
    valid = np.ones(batch, bool) if valid is None else valid
    expected = in_numpy(parts, labels, valid, smoothing)
    for found, want in zip(
        jax.tree.leaves((value(*parts), slopes(*parts))),
        jax.tree.leaves((expected[0], expected)),
        strict=True,
    ):
        error = np.abs(found - want).max() / max(1e-6, np.abs(want).max())
        assert error <= TOLERANCE["float32"], (classes, error)


SIZES = {  # batch, features, classes
    "odd": ((3, 5), 7, 37),
    "one of each": ((1, 1), 1, 1),
    "one class": ((2, 2), 3, 1),
    "few": ((2,), 4, 2),
    "whole vectors": ((4, 6), 64, 128),
    "two blocks of rows": ((3, 101), 3, 20_001),
    "no batch": ((), 5, 19),
}


@pytest.mark.core
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize(("masked", "smoothing"), [(False, 0.0), (True, 0.1)])
def test_loss_and_gradients_equal_those_of_numpy(size, masked, smoothing):
    check_cross_entropy(size, masked, smoothing)


def test_logits_of_any_size_have_a_loss():
    (features, w, b), labels = draw((2, 3), 4, 30)
    value, slopes = evaluated(labels)
    for scale in (1e-4, 30.0, 1e4):
        valid = np.ones(labels.shape, bool)
        want, (_, dw, _) = in_numpy((features * scale, w, b), labels, valid, 0.0)
        loss, (_, found, _) = slopes(features * np.float32(scale), w, b)
        np.testing.assert_allclose([loss, value(features * scale, w, b)], want, 1e-5)
        np.testing.assert_allclose(found, dw, atol=1e-5 * scale)


def test_what_is_not_a_number_is_seen_unless_masked():
    (features, w, b), labels = draw((2, 3), 4, 30)
    features[0, 1, 2] = np.nan
    assert np.isnan(evaluated(labels)[0](features, w, b))
    mask = np.arange(6).reshape(2, 3) != 1
    loss, slopes = evaluated(labels, mask=mask)[1](features, w, b)
    chex.assert_tree_all_finite((loss, slopes))
    assert not np.asarray(slopes[0])[0, 1].any()
    b[3] = -np.inf  # a class that never comes
    loss, slopes = evaluated(labels, mask=mask & (labels != 3))[1](features, w, b)
    chex.assert_tree_all_finite((loss, slopes))
    assert not np.asarray(slopes[1])[:, 3].any()


def test_other_derivatives_equal_those_of_the_logits():
    parts, labels = draw((2, 3), 4, 9)

    def value(loss_fn, w, b):
        return loss_fn(parts[0], w, b, labels, label_smoothing=0.1).value

    w, b = map(jnp.asarray, parts[1:])
    for transform in (
        lambda f: jax.jvp(f, (w, b), (w, b)),
        lambda f: jax.hessian(f)(w, b),
        lambda f: jax.vmap(jax.grad(f), (0, None))(jnp.stack([w, -w]), b),
    ):
        found, expected = (
            jax.jit(partial(transform, partial(value, f)))()
            for f in (train.projected_cross_entropy, of_logits)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_devices_add_up_to_one():
    parts, labels = draw((4, 3), 5, 40)
    params = parts[1], parts[2]

    def loss_fn(params, batch, *, key, carry):
        w, b = params
        loss = train.projected_cross_entropy(batch[0], w, b, batch[1])
        return loss, train.Aux({})

    def slopes(loss_fn):
        def value(params):
            batch = parts[0], labels
            return loss_fn(params, batch, key=None, carry=None)[0].value

        return jax.jit(jax.value_and_grad(value))

    shared = slopes(train.data_parallel(loss_fn, 2))
    assert "jlstm_cross_entropy" in shared.lower(params).as_text()
    chex.assert_trees_all_close(
        shared(params), slopes(loss_fn)(params), rtol=1e-5, atol=1e-6
    )


def test_where_it_does_not_run_xla_does(monkeypatch):
    parts, labels = draw((2, 3), 4, 9)

    def runs_here(*parts):
        return "jlstm_cross" in evaluated(labels)[1].lower(*parts).as_text()

    assert runs_here(*parts)
    assert not runs_here(*(jnp.bfloat16(x) for x in parts))
    monkeypatch.setattr(cross_entropy, "FEW", 1 << 20)
    assert not runs_here(*parts)
    monkeypatch.setattr(cross_entropy, "FEW", 0)
    monkeypatch.setattr(cross_entropy, "may_be_sharded", lambda: True)
    assert not runs_here(*parts)
