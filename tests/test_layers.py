"""Layers equal Flax's, or a NumPy loop, and compose without changing their meaning."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm
from jlstm.layers.compose import retime
from jlstm.testing import random_like

BATCH, TIME, SIZE = 2, 7, 3
XS = random_like(jnp.zeros((BATCH, TIME, SIZE)), seed=0)
TOKENS = jnp.array([[1, 2, 0], [4, 4, 3]])
KEY = jax.random.key(0)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def with_params(layer: Any, xs=XS) -> Any:
    """Random params, so that no bias or scale is at its first value."""
    return random_like(jax.eval_shape(layer.init, KEY, xs), seed=1)


def linen(module: nn.Module, xs, **params: Any) -> Any:
    return module.apply({"params": params}, xs)


# Equal to Flax.


@pytest.mark.parametrize("bias", [True, False])
def test_dense_equals_flax(bias):
    layer = jlstm.Dense(4, activation=jnp.tanh, bias=bias)
    params = with_params(layer)
    weights = {"kernel": params.w} | ({"bias": params.b} if bias else {})
    expected = jnp.tanh(linen(nn.Dense(4, use_bias=bias), XS, **weights))
    close(layer.apply(params, XS)[0], expected)


def test_embed_equals_flax():
    layer = jlstm.Embed(5, 4)
    params = with_params(layer, TOKENS)
    expected = linen(nn.Embed(5, 4), TOKENS, embedding=params.table)
    chex.assert_trees_all_equal(layer.apply(params, TOKENS)[0], expected)


def test_layer_norm_equals_flax():
    layer = jlstm.LayerNorm()
    params = with_params(layer)
    module = nn.LayerNorm(epsilon=1e-5)
    expected = linen(module, XS, scale=params.scale, bias=params.shift)
    close(layer.apply(params, XS)[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 3},
        {"width": 4},
        {"width": 3, "dilation": 2},
        {"width": 2, "padding": "CAUSAL"},
        {"width": 3, "dilation": 2, "padding": "CAUSAL"},
        {"width": 3, "padding": "VALID"},
        {"width": 2, "dilation": 2, "stride": 2, "padding": "VALID"},
    ],
    ids=str,
)
def test_conv_equals_flax(options):
    layer = jlstm.Conv(4, **options)
    params = with_params(layer)
    module = nn.Conv(
        4,
        kernel_size=(layer.width,),
        strides=layer.stride,
        kernel_dilation=layer.dilation,
        padding=layer.padding,
    )
    expected = linen(module, XS, kernel=params.w, bias=params.b)
    close(layer.apply(params, XS)[0], expected)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("stride", [2, 3])
def test_conv_with_a_stride_is_its_formula(width, stride):
    layer = jlstm.Conv(4, width=width, stride=stride)
    params = with_params(layer)
    xs, w, before = np.asarray(XS), np.asarray(params.w), (width - 1) // 2
    expected = np.zeros((BATCH, -(-TIME // stride), 4), np.float32) + np.asarray(
        params.b
    )
    for t in range(expected.shape[1]):
        for j in range(width):
            step = stride * t + j - before
            if 0 <= step < TIME:
                expected[:, t] += xs[:, step] @ w[j]
    close(layer.apply(params, XS)[0], jnp.asarray(expected))


def test_dropout_equals_flax_in_its_moments_and_without_a_key():
    ones = jnp.ones((1, 100, 100))
    ours, _ = jlstm.Dropout(0.3).apply((), ones, key=KEY)
    theirs: Any = nn.Dropout(0.3, deterministic=False).apply(
        {}, ones, rngs={"dropout": KEY}
    )
    np.testing.assert_allclose(np.unique(ours), np.unique(theirs), rtol=1e-6)
    assert abs(float((ours == 0).mean()) - 0.3) < 0.02
    chex.assert_trees_all_equal(jlstm.Dropout(0.3).apply((), ones)[0], ones)


# Vectors that exist.


def test_embed_takes_pretrained_vectors():
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    layer = jlstm.Embed(5, 4, table_init=jlstm.init.Pretrained(vectors))
    params = layer.init(KEY, TOKENS)
    chex.assert_trees_all_equal(layer.apply(params, TOKENS)[0], vectors[TOKENS])
    same = jlstm.Embed(5, 4, table_init=jlstm.init.Pretrained(vectors.copy()))
    other = jlstm.Embed(5, 4, table_init=jlstm.init.Pretrained(vectors + 1))
    assert (layer, hash(layer)) == (same, hash(same))
    assert layer != other


@pytest.mark.parametrize("frozen", [True, False])
def test_embed_frozen_has_no_gradient(frozen):
    layer = jlstm.Embed(5, 4, frozen=frozen)
    params = layer.init(KEY, TOKENS)
    grads = jax.grad(lambda p: layer.apply(p, TOKENS)[0].sum())(params)
    used = np.isin(np.arange(5), TOKENS)
    counts = np.bincount(np.asarray(TOKENS).ravel(), minlength=5)
    assert used.any()
    expected = np.zeros(5) if frozen else counts
    np.testing.assert_array_equal(grads.table, np.tile(expected[:, None], (1, 4)))


# Layers of layers.


def test_residual_adds_its_input():
    inner = jlstm.Dense(SIZE)
    params = with_params(inner)
    ys, _ = jlstm.Residual(inner).apply(params, XS)
    close(ys, XS + inner.apply(params, XS)[0])


@pytest.mark.parametrize("merge", ["concat", "sum", "mean", "product", "none"])
def test_bidirectional_merges_two_cells(merge):
    layer = jlstm.bidirectional(jlstm.LSTM(2), jlstm.GRU(2), merge=merge)
    params = with_params(layer)
    lengths = jnp.array([4, 7])
    a, _ = jlstm.unroll(jlstm.LSTM(2), params.forward, XS, lengths=lengths)
    options = {"lengths": lengths, "reverse": True}
    b, _ = jlstm.unroll(jlstm.GRU(2), params.backward, XS, **options)
    expected = {
        "concat": jnp.concatenate([a, b], -1),
        "sum": a + b,
        "mean": (a + b) / 2,
        "product": a * b,
        "none": (a, b),
    }
    close(layer.apply(params, XS, lengths=lengths)[0], expected[merge])


def test_bidirectional_joins_cells_of_two_sizes():
    layer = jlstm.bidirectional(jlstm.LSTM(2), jlstm.GRU(3))
    ys, carry = layer.apply(with_params(layer), XS)
    assert ys.shape == (BATCH, TIME, 5)
    assert (carry.forward.c.shape, carry.backward.h.shape) == ((BATCH, 2), (BATCH, 3))


def test_stack_nests():
    parts = (jlstm.RNN(jlstm.LSTM(2)), jlstm.LayerNorm(), jlstm.Dense(4))
    flat, nested = jlstm.stack(*parts), jlstm.stack(jlstm.stack(*parts[:2]), parts[2])
    a, b, c = with_params(flat)
    ys, carry = flat.apply((a, b, c), XS)
    again, inner = nested.apply(((a, b), c), XS)
    close((again, inner[0][0]), (ys, carry[0]))
    assert repr(nested) == "stack(stack(RNN(LSTM(2)), LayerNorm()), Dense(4))"


def test_stack_inits_its_parts_with_keys_of_their_own():
    first, second = jlstm.stack(*[jlstm.Dense(SIZE)] * 2).init(KEY, XS)
    assert bool((first.w != second.w).all())


STREAM = jlstm.stack(
    jlstm.Conv(3, width=3, dilation=2, padding="CAUSAL"),
    jlstm.RNN(jlstm.LSTM(2)),
    jlstm.Residual(jlstm.RNN(jlstm.GRU(2))),
    jlstm.Dense(4),
)


def test_step_equals_apply():
    params = with_params(STREAM)
    resets = jnp.zeros((BATCH, TIME), bool).at[0, 3].set(True)
    whole, after = STREAM.apply(params, XS, resets=resets)
    step = jax.jit(partial(jlstm.step, STREAM))
    carry, ys = STREAM.init_carry(params, (BATCH,)), []
    for t in range(TIME):
        carry, y = step(params, carry, XS[:, t], reset=resets[:, t])
        ys.append(y)
    close((jnp.stack(ys, 1), carry), (whole, after))
    first, y = jlstm.step(STREAM, params, None, XS[:, 0])
    close(y, whole[:, 0])
    chex.assert_trees_all_equal_shapes_and_dtypes(first, after)


def test_with_implementation_reaches_every_recurrence():
    layer = jlstm.stack(
        jlstm.bidirectional(jlstm.LSTM(2)),
        jlstm.Residual(jlstm.RNN(jlstm.GRU(4))),
        jlstm.stack(jlstm.RNN(jlstm.Elman(2)), jlstm.Dense(2)),
    )
    model = jlstm.Classifier(layer, 2)
    for name in ("scan", "fused"):
        changed = jlstm.with_implementation(model, name)
        rows = jlstm.summary(changed, XS).rows
        assert {row.implementation for row in rows} == {name, ""}
        assert sum(row.implementation == name for row in rows) == 4
    assert jlstm.with_implementation(changed, None) == model


def test_retime_follows_each_layer_of_a_stack():
    layer = jlstm.stack(
        jlstm.Conv(2, width=3, padding="VALID"),
        jlstm.Conv(2, width=2, stride=2),
        jlstm.RNN(jlstm.LSTM(2)),
    )
    params = with_params(layer)
    for length in range(TIME + 1):
        lengths = jnp.full(BATCH, length)
        after, _, _ = retime(layer, lengths, None, None)
        assert after is not None
        kept = int(after[0])
        assert kept == -(-max(length - 2, 0) // 2)
        alone = jax.eval_shape(layer.apply, params, XS[:, :length])[0]
        assert kept == alone.shape[1]
        mask = jnp.arange(TIME)[None] < lengths[:, None]
        _, by_mask, _ = retime(layer, None, mask, None)
        assert by_mask is not None
        assert by_mask.sum(1).tolist() == [kept] * BATCH


# Pooling against NumPy.


@pytest.mark.parametrize("kind", ["last", "first", "mean", "max", "sum"])
def test_pool_equals_numpy(kind):
    mask = jnp.array([[0, 1, 1, 0, 1, 0, 0], [0] * 7], bool)
    got, _ = jlstm.pool(jlstm.Dropout(0.0), (), XS, kind=kind, mask=mask)
    valid = np.asarray(XS)[0][np.asarray(mask)[0]]
    reduce = {
        "last": lambda v: v[-1],
        "first": lambda v: v[0],
        "mean": lambda v: v.mean(0),
        "max": lambda v: v.max(0),
        "sum": lambda v: v.sum(0),
    }
    close(got, np.stack([reduce[kind](valid), np.zeros(SIZE, np.float32)]))


# Summary.


@dataclasses.dataclass(frozen=True)
class Scale:
    """A layer of a user's own."""

    def init(self, key, xs):
        return jnp.ones(xs.shape[-1:], xs.dtype)

    def init_carry(self, params, batch_shape):
        return ()

    def apply(self, params, xs, carry=None, **masking):
        return xs * params.reshape(1, 1, -1), ()


def test_summary_counts_what_is_there():
    layer = jlstm.stack(
        jlstm.bidirectional(jlstm.LSTM(2)),
        Scale(),
        jlstm.Residual(jlstm.RNN(jlstm.GRU(4))),
        jlstm.Conv(3, width=2, padding="CAUSAL"),
    )
    model = jlstm.Tagger(layer, 5)
    params = jax.eval_shape(model.init, KEY, XS)
    _, carry = jax.eval_shape(model.apply, params, XS)
    table = jlstm.summary(model, XS)
    root = table.rows[0]
    assert root.params == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert root.output == f"[{BATCH}, {TIME}, 5]"
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry)]
    assert root.carry_bytes == sum(sizes)
    own = [row for row in table.rows if row.layer == "Scale()"]
    assert [(row.params, row.output) for row in own] == [(4, f"[{BATCH}, {TIME}, 4]")]
    parts = [row.params for row in table.rows if len(row.path) == 3]
    encoder = next(row for row in table.rows if row.path[-1] == "encoder")
    assert sum(parts) == encoder.params
    lines = str(table).splitlines()
    assert len(lines) == len(table.rows) + 1
    assert lines[0].split()[:3] == ["layer", "output", "params"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint32])
def test_lengths_of_any_integer_dtype_mask_alike(dtype):
    xs = np.ones((2, 300, 1), np.float32)
    mask = jlstm.valid_steps(xs, lengths=jnp_like([10, 100], dtype))
    assert np.asarray(mask).sum(1).tolist() == [10, 100]
    layer = jlstm.Conv(2, width=3, padding="VALID")
    after, _, _ = layer.retime(jnp_like([1, 5], dtype), None, None)
    assert np.asarray(after).tolist() == [0, 3]


def jnp_like(values: Any, dtype: Any) -> Any:
    """A NumPy array, where the annotations ask for one of JAX's."""
    return np.array(values, dtype)


def test_lengths_and_masks_may_be_lists():
    layer = jlstm.stack(jlstm.RNN(jlstm.LSTM(2)))
    xs = jnp.ones((2, 3, 1))
    params = layer.init(jax.random.key(0), xs)
    lengths: Any = [3, 1]
    mask: Any = [[True, True, True], [True, False, False]]
    ys, _ = layer.apply(params, xs, lengths=lengths)
    np.testing.assert_array_equal(ys, layer.apply(params, xs, mask=mask)[0])


def test_step_refuses_a_classifier_that_reads_both_ways():
    model = jlstm.Classifier(jlstm.bidirectional(jlstm.LSTM(2)), 2)
    params = model.init(jax.random.key(0), jnp.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="step: needs a causal layer"):
        jlstm.step(model, params, None, jnp.ones((1, 3)))


def test_pool_last_refuses_a_residual_whose_directions_end_elsewhere():
    layer = jlstm.Residual(jlstm.bidirectional(jlstm.LSTM(2)))
    xs = jnp.ones((1, 3, 4))
    params = layer.init(jax.random.key(0), xs)
    with pytest.raises(ValueError, match="Residual: needs a causal layer"):
        jlstm.pool(layer, params, xs)
    causal = jlstm.Residual(jlstm.RNN(jlstm.LSTM(4)))
    params = causal.init(jax.random.key(0), xs)
    lengths = jnp.array([2])
    ys, _ = causal.apply(params, xs, lengths=lengths)
    y, _ = jlstm.pool(causal, params, xs, lengths=lengths)
    np.testing.assert_array_equal(y, ys[:, 1])


@pytest.mark.parametrize("merge", ["sum", "mean", "product"])
def test_merge_refuses_outputs_of_two_sizes(merge):
    layer = jlstm.bidirectional(jlstm.LSTM(1), jlstm.LSTM(2), merge=merge)
    xs = jnp.ones((1, 3, 4))
    params = layer.init(jax.random.key(0), xs)
    with pytest.raises(ValueError, match="needs outputs of one shape"):
        layer.apply(params, xs)


def test_params_of_another_config_are_refused():
    xs, tokens = jnp.ones((1, 3, 4)), jnp.ones((1, 3), jnp.int32)
    pairs = [
        (jlstm.RNN(jlstm.LSTM(2)), jlstm.RNN(jlstm.LSTM(3)), xs),
        (jlstm.Embed(5, 2), jlstm.Embed(6, 2), tokens),
        (jlstm.LayerNorm(), jlstm.LayerNorm(), xs[..., :1]),
    ]
    for made_for, used_by, inputs in pairs:
        example = xs if inputs is not tokens else tokens
        params = made_for.init(jax.random.key(0), example)
        with pytest.raises(ValueError, match=r"\w+: .*, got |cannot take a step"):
            used_by.apply(params, inputs)
