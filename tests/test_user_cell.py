"""A cell as a user writes it: every loop, wrapper, layer and model runs it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm
from jlstm import testing
from jlstm.kernels import library
from jlstm.kernels.request import rows_in_one_place

B, T, D = 2, 5, 4


@dataclass(frozen=True)
class MGU:
    """Minimal gated unit, in parts: the reset follows the product."""

    hidden_size: int

    def init(self, key, x):
        keys, n = jax.random.split(key), 2 * self.hidden_size
        return {
            "w_ih": jlstm.init.glorot_uniform(keys[0], (x.shape[-1], n), x.dtype),
            "w_hh": jlstm.init.glorot_uniform(keys[1], (self.hidden_size, n), x.dtype),
        }

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["w_hh"].dtype)

    def project(self, params, x):
        return x @ params["w_ih"]

    def mix(self, params, h, zx):
        return h @ params["w_hh"]

    def update(self, params, h, zx, zh):
        (x_f, x_n), (h_f, h_n) = (jnp.split(z, 2, axis=-1) for z in (zx, zh))
        (f,) = jlstm.gates(x_f + h_f, "s")
        n = jlstm.tanh(x_n + f * h_n)
        h = (1 - f) * h + f * n
        return h, h

    def step(self, params, h, x):
        zx = self.project(params, x)
        return self.update(params, h, zx, self.mix(params, h, zx))


@dataclass(frozen=True)
class StepMGU:
    """The same as a step alone, which most will write first."""

    hidden_size: int

    def init(self, key, x):
        return MGU(self.hidden_size).init(key, x)

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["w_hh"].dtype)

    def step(self, params, h, x):
        (x_f, x_n), (h_f, h_n) = (
            jnp.split(z, 2, axis=-1) for z in (x @ params["w_ih"], h @ params["w_hh"])
        )
        f = jax.nn.sigmoid(x_f + h_f)
        h = (1 - f) * h + f * jnp.tanh(x_n + f * h_n)
        return h, h


def inputs():
    return testing.random_like(jnp.zeros((B, T, D)), seed=1)


@pytest.mark.core
def test_it_obeys_the_laws_and_its_steps_run_in_cpp():
    testing.check_cell(MGU(2), implementations=("fused",))
    there = library.why_not() is None
    with rows_in_one_place():  # as on one device; the suite has two
        note = jlstm.explain(MGU(8)).note
    assert (note == "its steps in C++") == there, note


def test_both_ways_of_writing_it_are_one_function():
    xs, lengths = inputs(), jnp.array([5, 3])
    params = MGU(3).init(jax.random.key(0), xs[:, 0])
    parts, _ = jlstm.unroll(MGU(3), params, xs, lengths=lengths)
    step, _ = jlstm.unroll(StepMGU(3), params, xs, lengths=lengths)
    np.testing.assert_allclose(parts, step, atol=1e-6)
    assert not jlstm.gated(StepMGU(3))


WRAPPED = [
    jlstm.Zoneout(MGU(4), h=0.2),
    jlstm.VariationalDropout(MGU(4), inputs=0.2, recurrent=0.2),
    jlstm.DropConnect(MGU(4), 0.2),
    jlstm.WeightNorm(MGU(4), names=("w_ih", "w_hh")),
    jlstm.ClipCarry(MGU(4), 0.5),
    jlstm.ResidualCell(MGU(4)),
]
MGU_LAYER = jlstm.RNN(MGU(4))
LAYERS = [
    jlstm.RNN(MGU(4), checkpoint_every=2),
    jlstm.RNN(MGU(4), policy=jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)),
    jlstm.bidirectional(MGU(4), StepMGU(3)),
    jlstm.stack(
        jlstm.RNN(MGU(4)), jlstm.Dropout(0.1), jlstm.Residual(jlstm.RNN(MGU(4)))
    ),
    *map(jlstm.RNN, WRAPPED),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_every_layer_and_wrapper_trains_it(layer):
    xs, lengths = inputs(), jnp.array([5, 3])
    params = layer.init(jax.random.key(0), xs)

    def loss(params, xs):
        ys, _ = layer.apply(params, xs, lengths=lengths, key=jax.random.key(1))
        return jnp.sum(ys.astype(jnp.float32) ** 2)

    (value, (gradients, dx)) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, xs)
    assert float(value) > 0
    leaves = jax.tree.leaves(gradients)
    assert all(bool(jnp.isfinite(g).all()) for g in leaves)
    assert all(float(jnp.abs(g).max()) > 0 for g in leaves)
    assert not dx[1, 3:].any()  # the padding


def test_models_and_streaming_take_it():
    tokens = jnp.array([[1, 2, 3, 0], [4, 5, 0, 0]])
    model = jlstm.LanguageModel(jlstm.RNN(MGU(8)), 7, 8)
    params = model.init(jax.random.key(0), tokens)
    logits, _ = model.apply(params, tokens)
    carry = model.init_carry(params, (2,))
    for t in range(4):
        carry, y = jlstm.step(model, params, carry, tokens[:, t])
        np.testing.assert_allclose(y, logits[:, t], atol=1e-5)
    model = jlstm.Classifier(jlstm.bidirectional(MGU(4)), num_classes=3)
    params = model.init(jax.random.key(0), inputs())
    assert model.apply(params, inputs())[0].shape == (B, 3)
