"""Guarantees of LSTMs and GRUs with other gates that the oracles do not give: equality
with torch and Flax, options, and mistakes."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE

import jlstm
from jlstm import cells, testing
from jlstm.testing import random_like

B, T, D = 3, 6, 4
KEY = jax.random.key(0)

NORMALISED = [jlstm.LayerNormLSTM(8), jlstm.LayerNormGRU(8)]

each_implementation = pytest.mark.parametrize("implementation", ["scan", "fused"])


def make_inputs(cell, dtype="float32"):
    """Random params, carry and xs ``[B, T, D]``, none of them zero."""
    xs = random_like(jnp.zeros((B, T, D), dtype), seed=1)
    params = testing.moved(cell.init(KEY, xs[:, 0]), seed=2)
    return params, random_like(cell.init_carry(params, (B,)), seed=3), xs


@partial(jax.jit, static_argnums=(0, 1))
def evaluate(cell, implementation, inputs, cotangents):
    """Results, and the gradients of their projection."""

    def project(inputs):
        params, carry, xs = inputs
        out = jlstm.unroll(cell, params, xs, carry, implementation=implementation)
        leaves = zip(jax.tree.leaves(out), cotangents, strict=True)
        return sum((a * b).sum() for a, b in leaves), out

    gradients, out = jax.grad(project, has_aux=True)(inputs)
    return out, gradients


def assert_close(got, expected, tolerance):
    """Compares lists of arrays, each relative to its magnitude."""
    for a, b in zip(jax.tree.leaves(got), expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Peers.


def torch_lstmp(inputs, cotangents):
    """Results and gradients of torch's LSTM with projection, in our order."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params, carry, xs = jax.device_get(inputs)
    hidden_size, proj_size = params.w_hr.shape
    module = torch.nn.LSTM(
        D, hidden_size, proj_size=proj_size, batch_first=True, dtype=torch.float64
    )
    weights = [
        *(module.weight_ih_l0, module.weight_hh_l0, module.weight_hr_l0),
        *(module.bias_ih_l0, module.bias_hh_l0),
    ]
    with torch.no_grad():
        for weight, leaf in zip(weights, jax.tree.leaves(params), strict=True):
            weight.copy_(torch.tensor(leaf.T))
    x, h, c = (torch.tensor(leaf, requires_grad=True) for leaf in (xs, *carry))
    ys, (last_h, last_c) = module(x, (h[None], c[None]))
    out = ys, last_h[0], last_c[0]
    pairs = zip(out, map(torch.tensor, jax.device_get(cotangents)), strict=True)
    torch.stack([(a * b).sum() for a, b in pairs]).sum().backward()
    gradients = [leaf.grad.numpy().T for leaf in weights]
    gradients += [leaf.grad.numpy() for leaf in (h, c, x)]
    return [leaf.detach().numpy() for leaf in out], gradients


@each_implementation
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_lstmp_equals_torch(implementation, dtype):
    cell = jlstm.LSTMP(6, 3, double_bias=True)
    with jax.enable_x64(True):
        inputs = make_inputs(cell, "float64")
        shapes = [jnp.zeros((B, T, 3)), jnp.zeros((B, 3)), jnp.zeros((B, 6))]
        cotangents = random_like(shapes, seed=4)
        expected = torch_lstmp(inputs, cotangents)
        inputs, cotangents = jax.tree.map(
            lambda leaf: leaf.astype(dtype), (inputs, cotangents)
        )
        got = jax.device_get(evaluate(cell, implementation, inputs, cotangents))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {dtype}
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, TOLERANCE[dtype])


def flax_mgu(inputs, cotangents):
    """Results and gradients of flax.linen's MGUCell over time, in our order."""
    linen = pytest.importorskip("flax.linen")
    module = linen.MGUCell(3, param_dtype=jnp.float64)

    def project(inputs):
        p, (h,), xs = inputs
        (w_f, w_n), (u_f, u_n) = (jnp.split(w, 2, axis=1) for w in (p.w_ih, p.w_hh))
        b_f, b_n = jnp.split(p.b, 2)
        weights = {
            "if": {"kernel": w_f, "bias": b_f},
            "in": {"kernel": w_n, "bias": b_n},
            "hf": {"kernel": u_f},
            "hn": {"kernel": u_n, "bias": p.b_hh},
        }
        step = partial(module.apply, {"params": weights})
        last, ys = jax.lax.scan(step, h, xs.swapaxes(0, 1))
        out = ys.swapaxes(0, 1), last
        return sum((a * b).sum() for a, b in zip(out, cotangents, strict=True)), out

    gradients, out = jax.jit(jax.grad(project, has_aux=True))(inputs)
    return list(out), jax.tree.leaves(gradients)


@each_implementation
def test_mgu_equals_flax(implementation):
    cell = jlstm.MGU(3, reset_after=True)
    with jax.enable_x64(True):
        inputs = make_inputs(cell, "float64")
        cotangents = random_like([jnp.zeros((B, T, 3)), jnp.zeros((B, 3))], seed=4)
        expected = flax_mgu(inputs, cotangents)
        got = evaluate(cell, implementation, inputs, cotangents)
    for a, b in zip(*jax.device_get((got, expected)), strict=True):
        assert_close(a, b, TOLERANCE["float64"])


# Heads.


@each_implementation
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_one_head_is_the_cell_itself(name, implementation):
    plain = getattr(jlstm, name)(4)
    heads = getattr(jlstm, f"MultiHead{name}")(4, num_heads=1)
    params, carry, xs = make_inputs(plain)
    weights = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    weights = {k: v for k, v in weights.items() if v is not None}
    weights["w_hh"] = params.w_hh[None]
    same = getattr(cells, f"MultiHead{name}Params")(**weights)
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(
        jnp.shape, heads.init(KEY, xs[:, 0])
    )
    shapes = [jnp.zeros((B, T, 4)), *carry]
    cotangents = random_like(shapes, seed=4)
    expected = evaluate(plain, implementation, (params, carry, xs), cotangents)
    got = evaluate(heads, implementation, (same, carry, xs), cotangents)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(a.reshape(b.shape), b)


# Options.


def test_lstmp_clips_the_cell_state_and_the_output():
    cell = jlstm.LSTMP(8, 5, cell_clip=0.4, proj_clip=0.1)
    params, carry, xs = make_inputs(cell)
    ys, _, carries = jlstm.unroll(cell, params, xs, carry, return_carries=True)
    for array, limit in ((ys, 0.1), (carries.c, 0.4)):
        clipped = np.abs(array) == np.float32(limit)
        assert float(jnp.abs(array).max()) == np.float32(limit)
        assert 0.05 < clipped.mean() < 0.95


@pytest.mark.parametrize(
    ("cell", "gate", "gates"),
    [
        (jlstm.CIFG(3, forget_bias=2.5), 0, 3),
        (jlstm.LSTMP(3, 2, forget_bias=2.5), 1, 4),
        (jlstm.LayerNormLSTM(3, forget_bias=2.5), 1, 4),
        (jlstm.MultiHeadLSTM(4, 2, forget_bias=2.5), 1, 4),
        (jlstm.MGU(3, forget_bias=2.5), 0, 2),
        (jlstm.MGU(3, reset_after=True, forget_bias=2.5), 0, 2),
    ],
    ids=repr,
)
def test_forget_bias_moves_the_forget_gate_alone(cell, gate, gates):
    b = cell.init(KEY, jnp.zeros((B, D))).b
    expected = 2.5 * (np.arange(gates) == gate)
    np.testing.assert_array_equal(b, np.repeat(expected, cell.hidden_size))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", NORMALISED, ids=repr)
def test_normalised_cells_divide_by_no_zero_in_half_precision(cell, dtype):
    x = jnp.zeros((B, D), dtype)
    params = cell.init(KEY, x)
    carry = cell.init_carry(params, (B,))

    @jax.jit
    @jax.grad
    def gradient(inputs):
        return cell.step(*inputs)[1].sum()

    for leaf in jax.tree.leaves(gradient((params, carry, x))):
        assert leaf.dtype == dtype
        assert bool(jnp.isfinite(leaf).all())


@pytest.mark.parametrize("cell", NORMALISED, ids=repr)
def test_normalised_cells_with_biases_learn_from_sequences_that_begin_with_zeros(cell):
    cell = dataclasses.replace(cell, b_init=jlstm.init.Normal(0.1))
    xs = jnp.zeros((B, 100, D)).at[:, -3:].set(1)
    params = cell.init(KEY, xs[:, 0])

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.square(jlstm.unroll(cell, params, xs)[0]).sum()

    for leaf in jax.tree.leaves(gradient(params)):
        assert float(jnp.abs(leaf).max()) < 1e6  # without biases, it overflows


# Mistakes.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(jlstm.CIFG, 0),
            "CIFG.hidden_size: must be a positive int, got 0",
        ),
        (
            partial(jlstm.LSTMP, 4, 0),
            "LSTMP.proj_size: must be a positive int, got 0",
        ),
        (
            partial(jlstm.LSTMP, 4, 2, cell_clip=0),
            "LSTMP.cell_clip: must be a positive number or None, got 0",
        ),
        (
            partial(jlstm.LSTMP, 4, 2, proj_clip=True),
            "LSTMP.proj_clip: must be a positive number or None, got True",
        ),
        (
            partial(jlstm.LSTMP, 4, 2, proj_clip=float("nan")),
            "LSTMP.proj_clip: must be a positive number or None, got nan",
        ),
        (
            partial(jlstm.LayerNormLSTM, -1),
            "LayerNormLSTM.hidden_size: must be a positive int, got -1",
        ),
        (
            partial(jlstm.LayerNormGRU, True),
            "LayerNormGRU.hidden_size: must be a positive int, got True",
        ),
        (
            partial(jlstm.MultiHeadLSTM, 6, 0),
            "MultiHeadLSTM.num_heads: must be a positive int, got 0",
        ),
        (
            partial(jlstm.MultiHeadLSTM, 6, 4),
            "MultiHeadLSTM.num_heads: must divide hidden_size=6, got 4",
        ),
        (
            partial(jlstm.MultiHeadGRU, 6, 4),
            "MultiHeadGRU.num_heads: must divide hidden_size=6, got 4",
        ),
        (partial(jlstm.MGU, 0), "MGU.hidden_size: must be a positive int, got 0"),
    ],
)
def test_mistakes_get_one_clear_line(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
