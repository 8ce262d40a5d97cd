"""Training: losses are exact means, steps compile once, and no loop hides anything."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlstm import train
from jlstm.train.step import reach

QUANTILES = (0.1, 0.5, 0.8)


def quantile_loss(predictions, targets, **masking):
    return train.quantile_loss(predictions, targets, QUANTILES, **masking)


LOSSES = {
    "softmax": (train.softmax_cross_entropy, True),
    "accuracy": (train.accuracy, True),
    "sigmoid": (train.sigmoid_cross_entropy, False),
    "squared": (train.squared_error, False),
    "absolute": (train.absolute_error, False),
    "quantile": (quantile_loss, True),  # its targets lack the last dimension too
}


def make_inputs(of_classes, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[4, 5, 3]``, with labels ``[4, 5]`` or targets of the same shape."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, 3)).astype(dtype)
    if of_classes:
        return logits, rng.integers(0, 3, size=(4, 5))
    return logits, rng.integers(0, 2, size=(4, 5, 3)).astype(dtype)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def per_element(name, logits, labels):
    """The same losses in numpy float64, unmasked and unreduced."""
    z, y = logits.astype(np.float64), labels
    match name:
        case "softmax":
            return -np.take_along_axis(log_softmax(z), y[..., None], -1)[..., 0]
        case "accuracy":
            return (z.argmax(-1) == y).astype(np.float64)
        case "sigmoid":
            return np.log1p(np.exp(z)) - y * z
        case "squared":
            return (z - y) ** 2
        case "absolute":
            return np.abs(z - y)
        case "quantile":
            error, tau = y[..., None] - z, np.array(QUANTILES)
            return np.where(error > 0, tau * error, (tau - 1) * error)
    raise ValueError(name)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masking", ["none", "both"])
def test_losses_equal_numpy_float64(name, masking):
    loss_fn, of_classes = LOSSES[name]
    logits, labels = make_inputs(of_classes)
    mask = np.random.default_rng(1).random((4, 5)) < 0.6
    lengths = np.array([5, 0, 2, 4])
    valid = np.ones((4, 5), bool)
    options = {}
    if masking == "both":
        options = {"mask": mask, "lengths": lengths}
        valid = mask & (np.arange(5) < lengths[:, None])
    got = loss_fn(logits, labels, **options)
    want = per_element(name, logits, labels)[valid]
    assert int(got.count) == want.size
    np.testing.assert_allclose(got.value, want.mean(), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_cross_entropy_equals_optax(smoothing):
    logits, labels = make_inputs(True)
    targets = optax.smooth_labels(jnp.asarray(np.eye(3, dtype="f")[labels]), smoothing)

    def ours(z):
        return train.softmax_cross_entropy(z, labels, label_smoothing=smoothing).value

    def theirs(z):
        return optax.softmax_cross_entropy(z, targets).mean()

    for a, b in zip(
        jax.value_and_grad(ours)(logits),
        jax.value_and_grad(theirs)(logits),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["softmax", "sigmoid", "squared", "absolute", "quantile"]
)
def test_losses_ignore_garbage_under_the_mask(name):
    loss_fn, of_classes = LOSSES[name]
    logits, labels = make_inputs(of_classes)
    mask = np.random.default_rng(1).random((4, 5)) < 0.6
    garbage = np.resize(np.array([np.nan, np.inf, -np.inf, 1e30], "f"), logits.shape)
    dirty = np.where(mask[..., None], logits, garbage)
    bad_labels = (
        np.where(mask, labels, -7)
        if of_classes
        else np.where(mask[..., None], labels, garbage)
    )

    def value(z, y):
        return loss_fn(z, y, mask=mask).value

    clean = jax.value_and_grad(value)(logits, labels)
    for a, b in zip(
        clean, jax.jit(jax.value_and_grad(value))(dirty, bad_labels), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_losses_of_bfloat16_logits_are_computed_in_float32():
    logits, labels = make_inputs(True)
    low = jnp.asarray(logits, jnp.bfloat16)
    got = train.softmax_cross_entropy(low, labels).value
    want = per_element("softmax", np.asarray(low, np.float64), labels).mean()
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "squared", "quantile"])
def test_mean_over_nothing_is_zero_with_zero_gradient(name):
    loss_fn, of_classes = LOSSES[name]
    logits, labels = make_inputs(of_classes)
    value, grad = jax.value_and_grad(
        lambda z: loss_fn(z, labels, lengths=np.zeros(4, int)).value
    )(logits)
    assert value == 0
    assert not np.any(grad)


def test_mean_of_count_zero_has_zero_gradient_by_itself():
    for count in (jnp.int32(0), jnp.float32(0)):
        value, grad = jax.value_and_grad(lambda x, n=count: train.Mean(x, n).value)(1.0)
        assert (value, grad) == (0, 0)


def test_labels_out_of_range_are_refused_if_concrete_and_nan_in_a_trace():
    logits, _ = make_inputs(True)
    labels = np.full((4, 5), 3)
    with pytest.raises(ValueError, match=r"softmax_cross_entropy: labels .* 0\.\.2"):
        train.softmax_cross_entropy(logits, labels)
    few, mask = np.where(np.eye(4, 5) > 0, 3, 2), np.eye(4, 5) == 0
    for score in (train.softmax_cross_entropy, train.accuracy):
        for wrong in (labels, few, -few):
            assert np.isnan(jax.jit(score)(logits, wrong).value)
        masked = jax.jit(score)(logits, few, mask=mask).value
        np.testing.assert_array_equal(masked, score(logits, few, mask=mask).value)


def test_losses_refuse_what_apply_returns_whole():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    whole: Any = (logits, None)
    for score in (train.softmax_cross_entropy, train.accuracy):
        with pytest.raises(ValueError, match="a tuple of 2; apply returns the outputs"):
            score(whole, labels)
    with pytest.raises(ValueError, match="squared_error: expected an array, got a tu"):
        train.squared_error(whole, logits)


def test_run_with_labels_out_of_range_ends():
    def loss_fn(params, batch, *, key, carry):
        logits = batch["x"] * params[None]
        return train.softmax_cross_entropy(logits, batch["label"]), train.Aux({})

    tx = train.sgd(0.1)
    batch = {"x": np.ones((3, 1), np.float32), "label": np.array([1, 2, 1])}
    state = train.create_state(jnp.ones(2), tx)
    with pytest.raises(train.NonFiniteError, match="labels outside the classes"):
        train.fit(state, train.make_train_step(loss_fn, tx), [batch] * 9, num_steps=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.zeros((4, 5))}, "labels must be integers"),
        ({"labels": np.zeros((4, 4), int)}, "one dimension more"),
        ({"mask": np.ones((4, 5))}, "mask must be boolean"),
        ({"mask": np.ones(5, bool)}, "mask must be boolean"),
        ({"lengths": np.ones(5, int)}, r"lengths must be integers \[B\]"),
        ({"lengths": np.full(4, 6)}, r"lengths must be in 0\.\.5, got 6"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ],
)
def test_losses_refuse_bad_input_in_one_line(options, message):
    logits, labels = make_inputs(True)
    with pytest.raises(ValueError, match=message) as error:
        train.softmax_cross_entropy(logits, **{"labels": labels, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_agree_on_a_sharded_batch(name, axis_type):
    loss_fn, of_classes = LOSSES[name]
    logits, labels = make_inputs(of_classes)
    lengths = np.array([5, 0, 2, 4])

    def value(z, y, n):
        return loss_fn(z, y, lengths=n).value

    want = jax.value_and_grad(value)(logits, labels, lengths)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        inputs = jax.device_put(
            (logits, labels, lengths), NamedSharding(mesh, P("data"))
        )
        got = jax.jit(jax.value_and_grad(value))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_quantile_loss_is_least_at_the_quantiles_of_the_data():
    targets = np.random.default_rng(0).gamma(2.0, size=401).astype("f")
    best = np.quantile(targets, QUANTILES).astype("f")

    def value(predictions):
        rows = jnp.broadcast_to(predictions, (len(targets), len(QUANTILES)))
        return quantile_loss(rows, targets).value

    for index in range(len(QUANTILES)):
        for change in (-0.1, 0.1):
            moved = best.copy()
            moved[index] += change
            assert value(moved) > value(best)
    slope = jax.grad(value)(best)  # what one of 401 targets weighs, at most
    np.testing.assert_allclose(slope, 0, atol=1 / (3 * len(targets)))


def test_median_loss_is_half_the_absolute_error():
    predictions, targets = make_inputs(False)
    options = {"lengths": np.array([5, 0, 2, 4])}
    got = train.quantile_loss(predictions[..., None], targets, (0.5,), **options)
    want = train.absolute_error(predictions, targets, **options)
    assert int(got.count) == int(want.count)
    np.testing.assert_allclose(2 * got.value, want.value, rtol=1e-6)


def test_sorted_predictions_have_no_higher_quantile_loss():
    predictions, targets = make_inputs(True)
    every = partial(quantile_loss, targets=targets)
    before = jax.vmap(jax.vmap(lambda p, t: quantile_loss(p, t).value))
    rows = before(predictions, targets.astype("f"))
    assert (before(np.sort(predictions), targets.astype("f")) <= rows + 1e-6).all()
    assert every(np.sort(predictions)).value < every(predictions).value


def test_quantile_loss_takes_nan_targets_under_the_mask():
    predictions, _ = make_inputs(False)
    targets = np.random.default_rng(2).normal(size=(4, 5)).astype("f")
    mask = np.random.default_rng(1).random((4, 5)) < 0.6
    value = jax.value_and_grad(lambda p, t: quantile_loss(p, t, mask=mask).value)
    clean = value(predictions, targets)
    dirty = value(predictions, np.where(mask, targets, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantiles": ()}, r"quantiles must be at least one number in"),
        ({"quantiles": (0.0, 0.5, 0.9)}, r"in \(0, 1\), got \(0.0"),
        ({"quantiles": 0.5}, r"in \(0, 1\), got 0.5"),
        ({"quantiles": (0.1, 0.9)}, r"must be \[4, 5, 2\], one for each of the 2"),
        ({"targets": np.zeros((4, 5, 3))}, r"must be \[4, 5, 3, 3\], one for each"),
        ({"mask": np.ones((4, 5))}, "mask must be boolean"),
        ({"lengths": np.full(4, 6)}, r"lengths must be in 0\.\.5, got 6"),
    ],
)
def test_quantile_loss_refuses_bad_input_in_one_line(options, message):
    given = {"targets": np.zeros((4, 5)), "quantiles": QUANTILES, **options}
    with pytest.raises(ValueError, match=f"quantile_loss: .*{message}") as error:
        train.quantile_loss(make_inputs(True)[0], **given)
    assert "\n" not in str(error.value)


def test_bits_converts_nats():
    uniform = train.softmax_cross_entropy(jnp.zeros((2, 8)), jnp.zeros(2, int))
    np.testing.assert_allclose(train.bits(uniform).value, 3.0, rtol=1e-6)


# One linear model for everything below: w [3] and b [] fitted to y = xs @ w + b.


def make_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    xs = rng.normal(size=(size, 3)).astype("f")
    return {"xs": xs, "ys": xs @ np.array([1, -2, 3], "f") + np.float32(0.5)}


def make_params():
    return {"w": jnp.zeros(3), "b": jnp.zeros(())}


def predict(params, batch):
    return batch["xs"] @ params["w"] + params["b"]


def linear_loss(params, batch, *, key, carry):
    del key, carry
    return train.squared_error(predict(params, batch), batch["ys"]), train.Aux({})


def make_run(loss_fn: Any = linear_loss, *, learning_rate: Any = 0.1, **options):
    tx = train.sgd(learning_rate, clip_norm=None)
    state = train.create_state(make_params(), tx, **options)
    return state, train.make_train_step(loss_fn, tx)


def test_fit_solves_least_squares():
    state, step = make_run()
    batches = (make_batch(32, seed) for seed in range(200))
    report = train.fit(state, step, batches, num_steps=200)
    assert int(report.state.step) == report.step == 200
    assert report.metrics["loss"] < 1e-6
    np.testing.assert_allclose(report.state.params["w"], [1, -2, 3], atol=1e-3)


def test_step_equals_the_update_written_out():
    state, step = make_run()
    batch = make_batch(8)
    new, metrics = step(state, batch)
    residual = -batch["ys"].astype(np.float64)
    grad_w, grad_b = 2 * residual @ batch["xs"] / 8, 2 * residual.mean()
    np.testing.assert_allclose(new.params["w"], -0.1 * grad_w, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, (residual**2).mean(), rtol=1e-5)
    norm = math.hypot(np.linalg.norm(grad_w), grad_b)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_step_compiles_once_a_shape_even_while_it_looks_for_the_key():
    traces = []

    def loss_fn(params, batch, *, key, carry):
        traces.append(batch["xs"].shape)
        noise = jax.random.normal(key, batch["ys"].shape)
        noisy = {**batch, "ys": batch["ys"] + noise}
        return linear_loss(params, noisy, key=None, carry=carry)

    state, step = make_run(loss_fn, key=jax.random.key(0))
    for size in (8, 8, 8, 4, 8, 4):
        state, _ = step(state, make_batch(size))
    assert traces == [(8, 3), (4, 3)]


def test_step_donates_its_state_and_spares_the_caller():
    params, key = make_params(), jax.random.key(0)
    carry = jnp.zeros(2)
    tx = optax.chain(train.adamw(0.1), optax.ema(0.9))

    def loss_fn(params, batch, *, key, carry):
        loss, _ = linear_loss(params, batch, key=None, carry=None)
        scale = 1 + 0.1 * jax.random.uniform(key)
        return loss.value * scale, train.Aux({}, carry + 1)

    state = train.create_state(params, tx, key=key, carry=carry)
    first = state
    step = train.make_train_step(loss_fn, tx)
    for _ in range(2):
        state, _ = step(state, make_batch(8))
    assert first.params["w"].is_deleted()
    np.testing.assert_array_equal(params["w"], 0)
    np.testing.assert_array_equal(carry, 0)
    assert jax.random.key_data(key).shape == (2,)
    kept, _ = train.make_train_step(loss_fn, tx, donate=False)(state, make_batch(8))
    assert not state.params["w"].is_deleted()
    assert int(kept.step) == 3


def test_state_that_a_step_has_taken_is_refused():
    used, step = make_run()
    state, _ = step(used, make_batch(8))
    calls = {
        "train_step": lambda: step(used, make_batch(8)),
        "fit": lambda: train.fit(used, step, [make_batch(8)], num_steps=1),
        "evaluate": lambda: train.evaluate(
            train.make_eval_step(linear_loss), used.params, [make_batch(8)]
        ),
    }
    for where, call in calls.items():
        with pytest.raises(ValueError, match=f"^{where}: the state was donated .*$"):
            call()
    jax.jit(step)(state, make_batch(8))  # a trace has no memory to take
    jax.jit(lambda: step(state, make_batch(8)))()


def test_key_of_a_step_is_folded_from_the_key_and_the_step():
    def loss_fn(params, batch, *, key, carry):
        loss, _ = linear_loss(params, batch, key=None, carry=None)
        return loss, train.Aux({"draw": jax.random.uniform(key)})

    key = jax.random.key(7)
    state, step = make_run(loss_fn, key=key)
    for n in range(3):
        state, metrics = step(state, make_batch(4))
        draw = jax.random.uniform(jax.random.fold_in(key, n))
        assert metrics["draw"] == draw


def carry_loss(params, batch, *, key, carry):
    """Loss of ``w * carry``, and a new carry that depends on the params."""
    del key
    new = params["w"] * carry + batch
    return jnp.sum(jnp.square(new)), train.Aux({"carry": carry.sum()}, new)


def test_carry_flows_from_batch_to_batch_without_gradient():
    tx = train.sgd(0.1, clip_norm=None)
    params = {"w": jnp.ones(())}
    state = train.create_state(params, tx, carry=jnp.ones(2))
    step = train.make_train_step(carry_loss, tx)
    w, carry = 1.0, np.ones(2)
    for n in range(3):
        state, metrics = step(state, jnp.full(2, float(n)))
        np.testing.assert_allclose(metrics["carry"], carry.sum(), rtol=1e-5)
        new = w * carry + n
        w, carry = w - 0.1 * np.sum(2 * new * carry), new
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-4)
    np.testing.assert_allclose(state.carry, carry, rtol=1e-4)


def test_no_gradient_enters_or_leaves_a_step_by_its_carry():
    def loss_fn(params, batch, *, key, carry):
        return params["w"] * carry, train.Aux({}, params["w"] * carry)

    tx = train.sgd(1.0, clip_norm=None)
    step = train.make_train_step(loss_fn, tx, donate=False)
    state = train.create_state({"w": jnp.float32(2)}, tx, carry=jnp.float32(5))

    def after(w, carry):
        new, _ = step(dataclasses.replace(state, params={"w": w}, carry=carry), 0)
        return new.params["w"], new.carry

    w, carry = jnp.float32(2), jnp.float32(5)
    assert after(w, carry) == (2 - 5, 10)
    of_params, of_carry = jax.jacrev(after, argnums=(0, 1))(w, carry)
    assert (of_params, of_carry) == ((1, 0), (0, 0))


@pytest.mark.parametrize(
    ("initial", "returned", "message"),
    [
        (None, jnp.zeros(2), r"carry float32\[2\], but state.carry is None"),
        (jnp.zeros(2), None, r"carry None, but state.carry is float32\[2\]"),
        (jnp.zeros(2), jnp.zeros(3), r"float32\[3\].*float32\[2\]"),
        (jnp.zeros(2), jnp.zeros(2, int), r"int32\[2\].*float32\[2\]"),
    ],
)
def test_step_refuses_another_carry_in_one_line(initial, returned, message):
    state, step = make_run(
        lambda params, batch, *, key, carry: (params["b"], train.Aux({}, returned)),
        carry=initial,
    )
    with pytest.raises(ValueError, match=message) as error:
        step(state, make_batch(4))
    assert "init_carry" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda w: w[0], r"must return \(loss, Aux"),
        (lambda w: (w[0], {}), r"must return \(loss, Aux"),
        (lambda w: (w, train.Aux({})), r"'loss' must be a scalar .* float32\[3\]"),
        (lambda w: (w[0], train.Aux({"x": w})), "'x' must be a scalar"),
    ],
)
def test_step_refuses_another_result_in_one_line(result, message):
    state, step = make_run(lambda params, batch, *, key, carry: result(params["w"]))
    with pytest.raises(ValueError, match=message) as error:
        step(state, make_batch(4))
    assert "\n" not in str(error.value)


def test_create_state_refuses_a_raw_key():
    with pytest.raises(ValueError, match=r"create_state: key .* jax\.random\.key\("):
        train.create_state(make_params(), train.sgd(0.1), key=jax.random.PRNGKey(0))


# The search for unused keys.


@jax.custom_vjp
def ignore_key(x, key):
    del key
    return x


ignore_key.defvjp(lambda x, key: (x, None), lambda _, g: (g, None))


def through_while(x, key, use):
    def body(carry):
        n, x, key = carry
        key, sub = jax.random.split(key)
        return n + 1, x + jax.random.normal(sub) if use else x, key

    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, x, key))[1]


def through_scan(x, key, use):
    def body(carry, _):
        x, key = carry
        key, sub = jax.random.split(key)
        return (x * jax.random.uniform(sub) if use else x * 2, key), x

    return jax.lax.scan(body, (x, key), None, length=3)[0][0]


def through_cond(x, key, use):
    def yes(x, key):
        return x + jax.random.normal(key) if use else x

    return jax.lax.cond(x > 0, yes, lambda x, key: x, x, key)


KEY_PATHS = {
    "plain": lambda x, key, use: x + jax.random.normal(key) if use else x,
    "folded": lambda x, key, use: KEY_PATHS["plain"](
        x, jax.random.fold_in(key, 3), use
    ),
    "jit": lambda x, key, use: jax.jit(KEY_PATHS["plain"], static_argnums=2)(
        x, key, use
    ),
    "checkpoint": lambda x, key, use: jax.checkpoint(
        lambda x, key: KEY_PATHS["plain"](x, key, use)
    )(x, key),
    "custom_vjp": lambda x, key, use: ignore_key(KEY_PATHS["plain"](x, key, use), key),
    "scan": through_scan,
    "while": through_while,
    "cond": through_cond,
}


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("path", KEY_PATHS)
def test_reach_tells_a_used_key_from_one_passed_along(path, use):
    jaxpr = jax.make_jaxpr(lambda x, key: (KEY_PATHS[path](x, key, use), x))(
        1.0, jax.random.key(0)
    )
    assert reach(jaxpr, [False, True]) == [use, False]


def test_reach_follows_a_key_swapped_in_a_loop():
    def body(carry, _):
        x, first, second = carry
        return (x + jax.random.normal(second), second, first), None

    def swap(x, first, second):
        return jax.lax.scan(body, (x, first, second), None, length=2)[0][0]

    key = jax.random.key(0)
    assert reach(jax.make_jaxpr(swap)(1.0, key, key), [False, True, False]) == [True]


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("path", ["folded", "scan"])
def test_step_warns_once_of_an_unused_key(path, use):
    def loss_fn(params, batch, *, key, carry):
        return KEY_PATHS[path](params["b"], key, use), train.Aux({})

    state, step = make_run(loss_fn, key=jax.random.key(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            state, _ = step(state, make_batch(4))
    messages = [str(w.message) for w in caught if "key" in str(w.message)]
    assert len(messages) == (not use)
    assert all(w.filename == __file__ for w in caught)


def test_step_without_key_does_not_warn():
    state, step = make_run()
    step(state, make_batch(4))  # Warnings are errors here.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_fit_agrees_on_a_sharded_batch(axis_type):
    def run(place):
        tx = train.adamw(0.1, weight_decay=0.1, decay_if=lambda path, leaf: path == "w")
        state = train.create_state(place(make_params(), P()), tx)
        step = train.make_train_step(linear_loss, tx)
        batches = (place(make_batch(8, seed), P("data")) for seed in range(5))
        return train.fit(state, step, batches, num_steps=5).state.params

    want = run(lambda tree, spec: tree)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        got = run(lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


# Evaluation and averages.


def test_evaluate_does_not_depend_on_how_items_are_batched():
    eval_step = train.make_eval_step(linear_loss)
    batch = make_batch(12)
    pieces = [
        jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
        for a, b in [(0, 5), (5, 11), (11, 12)]
    ]
    whole = train.evaluate(eval_step, make_params(), [batch])
    parts = train.evaluate(eval_step, make_params(), pieces)
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
    naive = np.mean(
        [train.evaluate(eval_step, make_params(), [p])["loss"] for p in pieces]
    )
    assert abs(naive - whole["loss"]) > 1e-3


def test_evaluate_hands_the_carry_on_and_gives_no_key():
    def loss_fn(params, batch, *, key, carry):
        assert key is None
        carry = jnp.zeros(()) if carry is None else carry
        return carry, train.Aux({}, carry + batch)

    eval_step = train.make_eval_step(loss_fn)
    batches = [jnp.float32(1), jnp.float32(2), jnp.float32(3)]
    assert train.evaluate(eval_step, {}, batches)["loss"] == pytest.approx(4 / 3)
    start = jnp.float32(3)
    assert train.evaluate(eval_step, {}, batches, start)["loss"] == pytest.approx(
        13 / 3
    )


def test_evaluate_refuses_no_batches():
    with pytest.raises(ValueError, match="evaluate: batches is empty"):
        train.evaluate(train.make_eval_step(linear_loss), make_params(), [])


def test_average_over_nothing_is_nan():
    nothing = {"loss": train.Mean(jnp.zeros(()), jnp.int32(0))}
    assert math.isnan(train.average([nothing, nothing])["loss"])


# The loop.


def test_fit_reports_each_window_and_the_last_step():
    reports = []
    state, step = make_run(learning_rate=1e-9)
    batches = [make_batch(2 + n, seed=n) for n in range(7)]
    train.fit(state, step, batches, num_steps=7, log_every=3, hooks=[reports.append])
    assert [r.step for r in reports] == [3, 6, 7]
    assert [r.window_steps for r in reports] == [3, 3, 1]
    assert [r.counts["loss"] for r in reports] == [2 + 3 + 4, 5 + 6 + 7, 8]
    assert [r.last for r in reports] == [False, False, True]
    for report, members in zip(reports, [(0, 3), (3, 6), (6, 7)], strict=True):
        ys = np.concatenate([batch["ys"] for batch in batches[slice(*members)]])
        np.testing.assert_allclose(report.metrics["loss"], (ys**2).mean(), rtol=1e-5)


def test_fit_resumed_in_the_middle_repeats_the_uninterrupted_run():
    def loss_fn(params, batch, *, key, carry):
        noise = jax.random.normal(key, batch["ys"].shape)
        return train.squared_error(
            predict(params, batch) + noise, batch["ys"]
        ), train.Aux({}, carry + 1)

    batches = [make_batch(4, seed) for seed in range(6)]
    options = {"key": jax.random.key(1), "carry": jnp.zeros(())}
    state, step = make_run(loss_fn, **options)
    whole = train.fit(state, step, batches, num_steps=6).state
    state, step = make_run(loss_fn, **options)
    half = train.fit(state, step, batches[:4], num_steps=4).state
    rest = iter(batches[4:])
    resumed = train.fit(half, step, rest, num_steps=6).state
    assert_same(whole, resumed)
    done = train.fit(resumed, step, iter([]), num_steps=6)
    assert (done.step, done.metrics, done.last) == (6, {}, True)


def assert_same(a, b):
    """Two states are equal bit for bit, keys included."""
    keys, states = [], []
    for state in (a, b):
        keys.append(jax.random.key_data(state.key))
        states.append(dataclasses.replace(state, key=None))
    np.testing.assert_array_equal(keys[0], keys[1])
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_fit_reads_one_batch_a_step():
    batches = iter([make_batch(4) for _ in range(5)])
    state, step = make_run()
    train.fit(state, step, batches, num_steps=3, log_every=2)
    assert len(list(batches)) == 2


@pytest.mark.parametrize(("log_every", "steps"), [(2, [2, 4, 4]), (3, [3, 4])])
def test_fit_says_so_where_batches_end_early(log_every, steps):
    reports = []
    state, step = make_run()
    batches = [make_batch(4)] * 4
    report = train.fit(
        state, step, batches, num_steps=9, log_every=log_every, hooks=[reports.append]
    )
    assert [r.step for r in reports] == steps
    assert report is reports[-1]
    assert report.stop == "batches ended after step 4 of 9"
    assert int(report.state.step) == 4


def test_fit_refuses_bad_input():
    state, step = make_run()
    with pytest.raises(ValueError, match="fit: batches is empty"):
        train.fit(state, step, [], num_steps=3)
    with pytest.raises(
        ValueError, match="fit: num_steps must be a positive int, got 0"
    ):
        train.fit(state, step, [], num_steps=0)
    with pytest.raises(ValueError, match="fit: log_every"):
        train.fit(state, step, [], num_steps=1, log_every=0)
    one_hook: Any = print
    with pytest.raises(ValueError, match=r"fit: hooks must be .* write hooks=\[hook\]"):
        train.fit(state, step, [], num_steps=1, hooks=one_hook)
    for hooks in ([None], [print, 3]):
        with pytest.raises(ValueError, match="fit: hooks must be callable, got "):
            train.fit(state, step, [], num_steps=1, hooks=cast(Any, hooks))


def test_what_is_no_state_step_or_transformation_is_refused():
    state, step = make_run()
    eval_step = train.make_eval_step(linear_loss)
    any_fit, any_evaluate = cast(Any, train.fit), cast(Any, train.evaluate)
    batch = make_batch(4)
    with pytest.raises(
        ValueError, match=r"fit: state must be a TrainState, got a dict"
    ):
        any_fit(state.params, step, [batch], num_steps=1)
    for wrong in (linear_loss, eval_step, 3):
        with pytest.raises(ValueError, match=r"step from make_train_step, called with"):
            any_fit(state, wrong, [batch], num_steps=1)
    for wrong in (linear_loss, step):
        with pytest.raises(ValueError, match=r"step from make_eval_step, called with"):
            any_evaluate(wrong, state.params, [batch])
    with pytest.raises(ValueError, match=r"got a TrainState; give state\.params"):
        train.evaluate(eval_step, state, [batch])
    for call in (train.create_state, train.make_train_step):
        with pytest.raises(ValueError, match="tx must be an optax transformation, got"):
            cast(Any, call)(linear_loss, "adam")
    # A step of one's own, and one that does not tell what it takes.
    train.fit(state, lambda *args: step(*args), [batch], num_steps=1)


def test_fit_warns_where_batches_end_early_and_no_hook_shows_it():
    state, step = make_run()
    with pytest.warns(UserWarning, match="fit: batches ended after step 2 of 9"):
        train.fit(state, step, [make_batch(4)] * 2, num_steps=9)


def test_fit_fetches_nothing_between_reports():
    fetched = []

    class Watched:
        def __init__(self, value):
            self.value = value

        def __float__(self):
            fetched.append(self.value)
            return float(self.value)

    def step(state, batch) -> tuple[Any, Any]:
        assert not fetched or batch == 3
        return state, {"loss": Watched(batch)}

    state, _ = make_run()
    report = train.fit(state, step, [1, 2, 3], num_steps=3, log_every=3)
    assert fetched == [1, 2, 3]
    assert report.metrics == {"loss": 2.0}


def test_fit_closes_hooks_however_it_ends():
    class Hook:
        closed = 0

        def __call__(self, report):
            raise KeyboardInterrupt

        def close(self):
            self.closed += 1

    hook = Hook()
    state, step = make_run()
    with pytest.raises(KeyboardInterrupt):
        train.fit(
            state, step, [make_batch(4)], num_steps=1, hooks=[train.every(1, hook)]
        )
    assert hook.closed == 1


# Hooks.


NO_STATE: Any = None
LEAST: Any = "least"


def reports_of(*values, name="loss", num_steps=10**6):
    """One report a value, each of ten steps; None leaves the metric out."""
    for n, value in enumerate(values, 1):
        metrics = {} if value is None else {name: value}
        yield train.Report(10 * n, num_steps, NO_STATE, metrics, window_steps=10)


def test_every_runs_at_multiples_and_at_the_last_report_once():
    steps = []
    hook = train.every(25, lambda report: steps.append(report.step))
    reports = list(reports_of(*[0.0] * 8, num_steps=80))
    for report in [*reports, reports[-1]]:
        hook(report)
    assert steps == [30, 50, 80]


def test_evaluate_every_adds_validation_metrics():
    state, step = make_run()
    reports = []
    hooks = [
        train.evaluate_every(
            2, train.make_eval_step(linear_loss), lambda: [make_batch(16, 99)]
        ),
        reports.append,
    ]
    batches = [make_batch(8, seed) for seed in range(4)]
    train.fit(state, step, batches, num_steps=4, log_every=1, hooks=hooks)
    names = ["validation_loss" in report.metrics for report in reports]
    assert names == [False, True, False, True]
    assert reports[3].metrics["validation_loss"] < reports[1].metrics["validation_loss"]


@pytest.mark.parametrize(
    ("mode", "values", "stops"),
    [
        ("min", [3, 2, 2, 2.5], 4),
        ("max", [1, 2, 2, 1.5], 4),
        ("min", [3, 4, 2, 4, None, 1], None),
        ("min", [3, None, None, None], None),
        ("min", [math.nan, math.nan], 2),
        ("min", [2, math.nan, math.nan], 3),
    ],
)
def test_early_stopping_waits_for_its_patience(mode, values, stops):
    hook = train.early_stopping("loss", patience=2, mode=mode)
    reasons = []
    for report in reports_of(*values):
        hook(report)
        reasons.append(report.stop)
    first = next((n for n, reason in enumerate(reasons, 1) if reason), None)
    assert first == stops


def test_evaluate_every_refuses_batches_that_can_be_read_once():
    eval_step = train.make_eval_step(linear_loss)
    batches: Any = [make_batch(4)]
    with pytest.raises(ValueError, match=r"make_batches must be .* got a list; write"):
        train.evaluate_every(2, eval_step, batches)


def test_early_stopping_ends_the_run():
    state, step = make_run(learning_rate=1e-12)
    report = train.fit(
        state,
        step,
        [make_batch(4)] * 50,
        num_steps=50,
        log_every=5,
        hooks=[train.early_stopping("loss", patience=2)],
    )
    assert report.step == 15
    assert report.stop
    assert report.stop.startswith("loss has not improved on")


def test_early_stopping_warns_of_a_metric_that_never_came():
    hook = train.early_stopping("vallidation_loss", patience=2)
    first, last = reports_of(1.0, 2.0, num_steps=20)
    hook(first)
    with pytest.warns(UserWarning, match=r"'vallidation_loss' never .*\['loss'\]"):
        hook(last)


def test_keep_best_keeps_params_that_donation_cannot_take():
    state, step = make_run(learning_rate=0.1)
    best = train.keep_best("score", mode="max")
    seen = {}

    def score(report):
        report.metrics["score"] = {2: 0.9}.get(report.step, 0.1)
        seen[report.step] = np.array(report.state.params["w"])

    batches = [make_batch(4)] * 4
    train.fit(state, step, batches, num_steps=4, log_every=1, hooks=[score, best])
    assert (best.step, best.value) == (2, 0.9)
    np.testing.assert_array_equal(best.params["w"], seen[2])
    with pytest.raises(ValueError, match=r"keep_best: no report had .*'nothing'"):
        _ = train.keep_best("nothing").params


@pytest.mark.parametrize(
    "make",
    [
        lambda: train.keep_best("loss", mode=LEAST),
        lambda: train.early_stopping("loss", 2, mode=LEAST),
        lambda: train.early_stopping("loss", 0),
        lambda: train.every(0, print),
    ],
)
def test_hooks_refuse_bad_options(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_write_jsonl_appends_lines_that_are_json(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 10, "loss": 9.0}\n{"step": 20, "lo')
    hook = train.write_jsonl(path)
    for report in reports_of(1.5, math.nan, math.inf):
        hook(report)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 10, 20, 30]
    assert [record["loss"] for record in records] == [9.0, 1.5, None, None]
    assert [record["step"] for record in train.read_jsonl(path)] == [10, 20, 30]
    assert train.read_jsonl(path)[0]["loss"] == 1.5


def test_read_jsonl_names_the_broken_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(ValueError, match="read_jsonl: line 2 of"):
        train.read_jsonl(path)


def test_show_progress_prints_lines_where_there_is_no_terminal(capsys):
    show = train.show_progress(interval=1e9, unit="tokens")
    for step in (10, 20, 30):
        show(
            train.Report(
                step, 30, NO_STATE, {"loss": 0.25}, {"loss": 4000.0}, 1.0, 10, 0.5
            )
        )
    assert capsys.readouterr().out.splitlines() == [
        "step 10/30  loss 0.25  20 steps/s  8,000 tokens/s  eta 0:00:01",
        "step 30/30  loss 0.25  20 steps/s  8,000 tokens/s",
    ]


def test_show_progress_draws_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    show: Any = train.show_progress()
    for report in reports_of(0.5, 0.25, num_steps=20):
        report.window_seconds = 1.0
        show(report)
    show.close()
    out = capsys.readouterr().out
    assert "20/20" in out
    assert "loss 0.25" in out
    assert "10 steps/s" in out


# Optimisers.


def test_adamw_decays_matrices_only_unless_told_otherwise():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = jax.tree.map(jnp.zeros_like, params)

    def updated(**options) -> Any:
        tx = train.adamw(0.1, weight_decay=0.5, **options)
        with jax.numpy_dtype_promotion("standard"):  # Adam needs it
            updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    default = updated()
    np.testing.assert_allclose(default["w"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(default["b"], 1.0)
    changed = updated(decay_if=lambda path, leaf: path == "b")
    np.testing.assert_array_equal(changed["w"], 1.0)
    np.testing.assert_allclose(changed["b"], 0.95, rtol=1e-6)


def test_sgd_clips_the_global_norm_and_adds_momentum():
    tx = train.sgd(1.0, clip_norm=1.0, momentum=0.5)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.full(1, 30.0), "b": jnp.full(1, 40.0)}
    updates: Any
    state = tx.init(params)
    for scale in (1.0, 1.5):
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates["a"], -0.6 * scale, rtol=1e-6)
        np.testing.assert_allclose(updates["b"], -0.8 * scale, rtol=1e-6)


def test_make_schedule_warms_up_and_ends_where_it_says():
    options = {"warmup": 4 / 14, "final_fraction": 0.1}
    cosine: Any = train.make_schedule(
        2.0, schedule=train.Cosine(**options), num_steps=14
    )
    rates = [float(cosine(n)) for n in range(16)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[9], 1.1, rtol=1e-6)
    np.testing.assert_allclose(rates[14:], 0.2, rtol=1e-6)
    others = {
        train.Linear(**options): {9: 1.1, 14: 0.2},
        train.Exponential(**options): {9: 2 * 0.1**0.5, 14: 0.2},
        train.Constant(4 / 14): {0: 0.4, 4: 2.0, 14: 2.0},
        train.InverseSqrt(4 / 14): {0: 0.4, 4: 2.0, 8: 2.0 * 0.5**0.5, 16: 1.0},
        train.Steps(4 / 14, at=(0.5, 6 / 7), factor=0.1): {
            3: 1.6, 6: 2.0, 7: 0.2, 11: 0.2, 12: 0.02
        },
    }  # fmt: skip
    for schedule, rates in others.items():
        rate: Any = train.make_schedule(2.0, schedule=schedule, num_steps=14)
        got = [float(rate(step)) for step in rates]
        np.testing.assert_allclose(got, list(rates.values()), rtol=1e-6)
    flat: Any = train.make_schedule(2.0)
    assert float(flat(7)) == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": train.Cosine()}, "num_steps: needed by Cosine.*, got None"),
        ({"schedule": "cosine"}, r"schedule: must be one of Constant\(\), .*'cosine'"),
        ({"num_steps": 0}, "num_steps: must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"learning_rate": train.Linear()}, "learning_rate: must be positive, got Lin"),
        ({"schedule": train.Linear}, "schedule: must be one of"),
        (
            {"schedule": train.Linear(warmup=1.0)},
            r"schedule.warmup: must lie in \[0, 1",
        ),
        ({"schedule": train.Linear(0.1, 2.0)}, "schedule.final_fraction: must lie in"),
        ({"schedule": train.Exponential(0.1, 0.0)}, "must be above 0 for Exponential"),
        (
            {"schedule": train.Steps(at=(0.5, 0.5)), "num_steps": 9},
            "schedule.at: must be in rising order",
        ),
        ({"clip_norm": 0.0}, "clip_norm: must be positive"),
    ],
)
@pytest.mark.parametrize("make", [train.adamw, train.sgd])
def test_optimizers_refuse_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"learning_rate": 0.1, **options})


# Checkpoints.


def test_checkpoint_restores_a_train_state_with_its_key(tmp_path):
    tx = train.adamw(0.1)
    carry = {"h": (jnp.ones((2, 3), jnp.bfloat16), jnp.arange(2))}
    state = train.create_state(make_params(), tx, key=jax.random.key(5), carry=carry)
    train.save(tmp_path / "state", state)
    like = jax.eval_shape(lambda: state)
    for template in (state, like):
        assert_same(train.load(tmp_path / "state", template), state)


def test_checkpoint_is_not_overwritten_unless_told(tmp_path):
    train.save(tmp_path / "a", {"w": jnp.zeros(2)})
    with pytest.raises(FileExistsError, match=r"save: .* exists"):
        train.save(tmp_path / "a", {"w": jnp.ones(2)})
    train.save(tmp_path / "a", {"w": jnp.ones(2)}, overwrite=True)
    np.testing.assert_array_equal(
        train.load(tmp_path / "a", {"w": jnp.zeros(2)})["w"], 1
    )


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": {"w": jnp.zeros(3)}}, r"a/w .* float32\[2\], expected float32\[3\]"),
        ({"a": {"w": jnp.zeros(2, int)}}, r"float32\[2\], expected int32\[2\]"),
        ({"a": {"w": jnp.zeros(2, jnp.bfloat16)}}, r"expected bfloat16\[2\]"),
        ({"a": {"v": jnp.zeros(2)}}, r"load: a/v, float32\[2\], is missing in .*/a;"),
        ({}, r"load: a/w, float32\[2\], is missing in like; give like= the structure"),
    ],
)
def test_load_names_the_first_wrong_leaf(tmp_path, like, message):
    train.save(tmp_path / "a", {"a": {"w": jnp.zeros(2)}})
    with pytest.raises(ValueError, match=message) as error:
        train.load(tmp_path / "a", like)
    assert "\n" not in str(error.value)


def test_load_says_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: there is no checkpoint at"):
        train.load(tmp_path / "missing", {"w": jnp.zeros(2)})
    with pytest.raises(
        ValueError, match=r"intact checkpoint: manifest.json is missing"
    ):
        train.load(tmp_path, {"w": jnp.zeros(2)})


def test_import_loads_no_optional_package():
    code = (
        "import sys, jax, flax.struct, optax; before = set(sys.modules)\n"
        "import jlstm.train\n"
        "heavy = {'orbax', 'rich', 'tyro', 'matplotlib', 'grain', 'flax.nnx'}\n"
        "sys.exit(', '.join(heavy & (set(sys.modules) - before)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
