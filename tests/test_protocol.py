"""Guarantees that cells and layers of one's own need nothing but the public API.

Each of these is written as a user would write it, and stretches the protocol somewhere:
a spatial carry, two sizes in a carry, a pytree of inputs, noise by step, params that
differ by row, a layer that changes T. All pass the laws, on every loop that can run
them.
"""

from __future__ import annotations

import dataclasses
import re
import runpy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import jlstm
from jlstm import train
from jlstm.testing import check_cell, check_layer

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def weights(key, *shapes, dtype=jnp.float32):
    keys = jax.random.split(key, len(shapes))
    draw = jlstm.init.glorot_uniform
    return [draw(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


# Minimal gated unit (Zhou et al., 2016) without biases: a step, and nothing else.


@dataclass(frozen=True)
class MGU:
    hidden_size: int

    def init(self, key, x):
        size = self.hidden_size
        w_f, w_h = weights(key, *[(x.shape[-1] + size, size)] * 2, dtype=x.dtype)
        return {"w_f": w_f, "w_h": w_h}

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["w_f"].dtype)

    def step(self, params, h, x):
        f = jax.nn.sigmoid(jnp.concatenate([x, h], -1) @ params["w_f"])
        candidate = jnp.tanh(jnp.concatenate([x, f * h], -1) @ params["w_h"])
        h = (1 - f) * h + f * candidate
        return h, h


# ConvLSTM (Shi et al., 2015): x and the carry are images.


class ConvLSTMCarry(NamedTuple):
    h: jax.Array  # [B, height, width, C]
    c: jax.Array


def convolve(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@dataclass(frozen=True)
class ConvLSTM:
    hidden_size: int  # channels
    height: int
    width: int

    x_ndim = 3

    def init(self, key, x):
        shapes = [
            (3, 3, n, 4 * self.hidden_size) for n in (x.shape[-1], self.hidden_size)
        ]
        return dict(
            zip(("w_x", "w_h"), weights(key, *shapes, dtype=x.dtype), strict=True)
        )

    def init_carry(self, params, batch_shape):
        shape = (*batch_shape, self.height, self.width, self.hidden_size)
        return ConvLSTMCarry(*2 * [jnp.zeros(shape, params["w_h"].dtype)])

    def project(self, params, x):
        return convolve(x, params["w_x"])

    def mix(self, params, carry, zx):
        return convolve(carry.h, params["w_h"])

    def update(self, params, carry, zx, zh):
        i, f, g, o = jlstm.gates(zx + zh, "ssts")
        c = f * carry.c + i * g
        h = o * jnp.tanh(c)
        return ConvLSTMCarry(h, c), h

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


# LSTM with recurrent projection (Sak et al., 2014): h is smaller than c.


@struct.dataclass
class ProjectedParams:
    lstm: jlstm.LSTMParams  # its w_hh is [P, 4H]
    w_hr: jax.Array  # [H, P]


@dataclass(frozen=True)
class ProjectedLSTM:
    hidden_size: int
    projection_size: int

    def init(self, key, x):
        size, gates = self.projection_size, 4 * self.hidden_size
        shapes = [(x.shape[-1], gates), (size, gates), (self.hidden_size, size)]
        w_ih, w_hh, w_hr = weights(key, *shapes, dtype=x.dtype)
        b = jnp.zeros(gates, x.dtype)
        return ProjectedParams(jlstm.LSTMParams(w_ih, w_hh, b), w_hr)

    def init_carry(self, params, batch_shape):
        sizes = (self.projection_size, self.hidden_size)
        zeros = (jnp.zeros((*batch_shape, n), params.w_hr.dtype) for n in sizes)
        return jlstm.LSTMCarry(*zeros)

    def project(self, params, x):
        return jlstm.affine(x, params.lstm.w_ih, params.lstm.b)

    def mix(self, params, carry, zx):
        return carry.h @ params.lstm.w_hh

    def update(self, params, carry, zx, zh):
        i, f, g, o = jlstm.gates(zx + zh, "ssts")
        c = f * carry.c + i * g
        h = (o * jnp.tanh(c)) @ params.w_hr
        return jlstm.LSTMCarry(h, c), h

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


# GRU-D (Che et al., 2018): x is (values, which were observed, time since they were).


class GRUDCarry(NamedTuple):
    h: jax.Array  # [B, H]
    x_last: jax.Array  # [B, D], the last observed values


@dataclass(frozen=True)
class GRUD:
    hidden_size: int

    def init(self, key, x):
        values, _, _ = x
        d, h = values.shape[-1], self.hidden_size
        names = {"w_x": (d, 3 * h), "w_m": (d, 3 * h), "w_h": (h, 2 * h), "u": (h, h)}
        names |= {"decay_h": (d, h), "decay_x": (1, d), "mean": (1, d)}
        made = weights(key, *names.values(), dtype=values.dtype)
        return dict(zip(names, made, strict=True))

    def init_carry(self, params, batch_shape):
        sizes = (self.hidden_size, params["decay_x"].shape[-1])
        dtype = params["w_x"].dtype
        return GRUDCarry(*(jnp.zeros((*batch_shape, n), dtype) for n in sizes))

    def project(self, params, x):
        values, observed, elapsed = x
        decay_h = jnp.exp(-jax.nn.softplus(elapsed @ params["decay_h"]))
        decay_x = jnp.exp(-jax.nn.softplus(elapsed * params["decay_x"]))
        from_mask = observed.astype(values.dtype) @ params["w_m"]
        return values, observed, decay_h, decay_x, from_mask

    def imputed(self, params, carry, zx):
        values, observed, _, decay_x, _ = zx
        guess = decay_x * carry.x_last + (1 - decay_x) * params["mean"]
        return jnp.where(observed, values, guess)

    def mix(self, params, carry, zx):
        x = self.imputed(params, carry, zx) @ params["w_x"]
        return x, (zx[2] * carry.h) @ params["w_h"]

    def update(self, params, carry, zx, zh):
        values, observed, decay_h, _, from_mask = zx
        from_x, from_h = zh
        size = self.hidden_size
        z = from_x + from_mask
        r, u = jlstm.gates(z[..., : 2 * size] + from_h, "ss")
        decayed = decay_h * carry.h
        n = jnp.tanh(z[..., 2 * size :] + (r * decayed) @ params["u"])
        h = u * decayed + (1 - u) * n
        return GRUDCarry(h, jnp.where(observed, values, carry.x_last)), h

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


# Zoneout (Krueger et al., 2017) around any cell: noise by step, drawn before the loop.


class Zoned(NamedTuple):
    x: Any  # the inner cell's x, or its zx
    keep: Any  # like the carry: true where the old value stays; None if deterministic


@dataclass(frozen=True)
class Zoneout:
    cell: Any
    rate: float

    gated = property(lambda self: jlstm.gated(self.cell))

    def init(self, key, x):
        return self.cell.init(key, x)

    def init_carry(self, params, batch_shape):
        return self.cell.init_carry(params, batch_shape)

    def prepare(self, params, xs, *, key=None):
        batch, time = jax.tree.leaves(xs)[0].shape[:2]
        carry = jax.eval_shape(lambda p: self.cell.init_carry(p, (batch,)), params)
        params, xs = jlstm.prepare(self.cell, params, xs, key)
        if key is None:
            return params, Zoned(xs, None)
        leaves, structure = jax.tree.flatten(carry)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        keep = [
            jax.random.bernoulli(k, self.rate, (batch, time, *leaf.shape[1:]))
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return params, Zoned(xs, structure.unflatten(keep))

    def project(self, params, x):
        return Zoned(self.cell.project(params, x.x), x.keep)

    def mix(self, params, carry, zx):
        return self.cell.mix(params, carry, zx.x)

    def update(self, params, carry, zx, zh):
        new, _ = self.cell.update(params, carry, zx.x, zh)
        return self.zone(carry, new, zx.keep)

    def step(self, params, carry, x):
        new, _ = self.cell.step(params, carry, x.x)
        return self.zone(carry, new, x.keep)

    def zone(self, old, new, keep):
        if keep is None:
            new = jax.tree.map(
                lambda o, n: self.rate * o + (1 - self.rate) * n, old, new
            )
        else:
            new = jax.tree.map(jnp.where, keep, old, new)
        return new, jax.tree.leaves(new)[0]


# An attention decoder (Luong et al., 2015, input feeding): the encoder's memory is
# constant in time and differs by row, so it is a leaf of the params.


@struct.dataclass
class AttentionParams:
    w_ih: jax.Array  # [D, 4H]
    w_hh: jax.Array  # [H, 4H]
    w_ch: jax.Array  # [E, 4H]
    w_key: jax.Array  # [E, H]
    memory: jax.Array | None = None  # [B, S, E]
    keys: jax.Array | None = None  # [B, S, H], made once a sequence


class AttentionCarry(NamedTuple):
    h: jax.Array  # [B, H]
    c: jax.Array  # [B, H]
    context: jax.Array  # [B, E]


@dataclass(frozen=True)
class AttentionLSTM:
    hidden_size: int
    memory_size: int

    def init(self, key, x):
        h, e = self.hidden_size, self.memory_size
        shapes = [(x.shape[-1], 4 * h), (h, 4 * h), (e, 4 * h), (e, h)]
        return AttentionParams(*weights(key, *shapes, dtype=x.dtype))

    def init_carry(self, params, batch_shape):
        sizes = (self.hidden_size, self.hidden_size, self.memory_size)
        dtype = params.w_ih.dtype
        return AttentionCarry(*(jnp.zeros((*batch_shape, n), dtype) for n in sizes))

    def prepare(self, params, xs, *, key=None):
        keys = params.memory @ params.w_key
        return dataclasses.replace(params, keys=keys), xs

    def project(self, params, x):
        return x @ params.w_ih

    def mix(self, params, carry, zx):
        return carry.h @ params.w_hh + carry.context @ params.w_ch

    def update(self, params, carry, zx, zh):
        i, f, g, o = jlstm.gates(zx + zh, "ssts")
        c = f * carry.c + i * g
        h = o * jnp.tanh(c)
        scores = jnp.einsum("bsh,bh->bs", params.keys, h)
        attention = jax.nn.softmax(scores)
        context = jnp.einsum("bs,bse->be", attention, params.memory)
        y = {"output": jnp.concatenate([h, context], -1), "attention": attention}
        return AttentionCarry(h, c, context), y

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


# A layer that halves T by joining pairs of steps (Chan et al., 2016).


@dataclass(frozen=True)
class Halve:
    causal = False

    def init(self, key, xs):
        return ()

    def init_carry(self, params, batch_shape):
        return ()

    def retime(self, lengths, mask, resets):
        if resets is not None:
            raise NotImplementedError("Halve: a boundary may fall inside a pair")
        if mask is not None:
            time = mask.shape[1] // 2
            mask = mask[:, : 2 * time].reshape(-1, time, 2).all(2)
        return None if lengths is None else lengths // 2, mask, None

    def apply(
        self, params, xs, carry=None, *, lengths=None, mask=None, resets=None, key=None
    ):
        valid = jlstm.valid_steps(xs, lengths=lengths, mask=mask, resets=resets)
        xs = jlstm.zero_rows(valid, xs)
        batch, time, features = xs.shape
        ys = xs[:, : time // 2 * 2].reshape(batch, time // 2, 2 * features)
        lengths, mask, _ = self.retime(lengths, mask, resets)
        return jlstm.zero_rows(
            jlstm.valid_steps(ys, lengths=lengths, mask=mask), ys
        ), ()


IMAGE = jnp.zeros((3, 4, 3, 2))
IRREGULAR = (
    jnp.zeros((3, 4)),
    jnp.array([[True, False, True, True], [False] * 4, [True, True, False, False]]),
    jnp.zeros((3, 4)),
)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("cell", "x"),
    [
        (MGU(4), None),
        slow(GRUD(3), IRREGULAR),
        (Zoneout(jlstm.LSTM(4), 0.2), None),
        slow(ConvLSTM(2, height=4, width=3), IMAGE),
        slow(ProjectedLSTM(4, projection_size=2), None),
        slow(Zoneout(MGU(4), 0.2), None),
    ],
    ids=lambda value: repr(value) if hasattr(value, "step") else "",
)
def test_cell_obeys_the_laws(cell, x):
    # Both loops are checked with the built-in cells.
    implementations = ("fused",) if jlstm.gated(cell) else ("scan",)
    check_cell(cell, x, implementations=implementations)


def test_attention_decoder_obeys_the_laws():
    cell = AttentionLSTM(4, memory_size=3)
    draw = np.random.default_rng(0).standard_normal
    with jax.enable_x64(True):
        params = cell.init(jax.random.key(0), jnp.zeros((3, 5), jnp.float64))
        memory = jnp.asarray(draw((3, 7, 3)))
        params = dataclasses.replace(params, memory=memory)
    check_cell(
        cell,
        params=params,
        implementations=("fused",),
        smooth=False,  # JAX's own derivatives of its own attention
        take_rows=lambda p, rows: dataclasses.replace(p, memory=p.memory[rows]),
    )


@pytest.mark.parametrize(
    ("cell", "expected"),
    [(Zoneout(jlstm.GRU(4), 0.5), True), (Zoneout(MGU(4), 0.5), False)],
)
def test_gated_asks_a_wrappers_inner_cell(cell, expected):
    assert jlstm.gated(cell) is expected


def test_zoneout_draws_the_same_masks_on_every_loop():
    cell, xs = Zoneout(jlstm.LSTM(4), 0.5), jnp.ones((2, 6, 3))
    params = cell.init(jax.random.key(0), xs[:, 0])

    def run(key, name):
        return jlstm.unroll(cell, params, xs, key=key, implementation=name)

    key = jax.random.key(1)
    np.testing.assert_allclose(run(key, "scan")[0], run(key, "fused")[0], atol=1e-6)
    assert not np.allclose(run(key, "scan")[0], run(None, "scan")[0])
    assert not np.allclose(run(key, "scan")[0], run(jax.random.key(2), "scan")[0])


def test_half_defined_gated_form_is_refused_by_name():
    @dataclass(frozen=True)
    class Half(MGU):
        def project(self, params, x):
            return x

    with pytest.raises(
        TypeError, match=r"Half: the gated form needs .* without mix, update"
    ):
        check_cell(Half(4))


def test_halving_layer_obeys_the_laws():
    check_layer(Halve(), resets=False)


@pytest.mark.slow
def test_stack_with_a_halving_layer_obeys_the_laws():
    layer = jlstm.stack(
        jlstm.bidirectional(jlstm.LSTM(2)), Halve(), jlstm.bidirectional(jlstm.GRU(2))
    )
    check_layer(layer, resets=False)


def test_own_cell_runs_in_bidirectional_stack_classifier_and_fit():
    model = jlstm.Classifier(
        jlstm.stack(
            jlstm.bidirectional(MGU(8)), jlstm.Dropout(0.1), jlstm.RNN(jlstm.GRU(8))
        ),
        num_classes=2,
    )
    xs = jax.random.normal(jax.random.key(1), (16, 7, 3))
    batch = {"xs": xs, "label": (xs[:, 0, 0] > 0).astype(jnp.int32)}
    batch["lengths"] = jnp.full(16, 5, jnp.int32)

    def loss_fn(params, batch, *, key, carry):
        logits, _ = model.apply(params, batch["xs"], lengths=batch["lengths"], key=key)
        loss = train.softmax_cross_entropy(logits, batch["label"])
        return loss, train.Aux({"accuracy": train.accuracy(logits, batch["label"])})

    tx = train.adamw(1e-2)
    params = model.init(jax.random.key(0), xs)
    state = train.create_state(params, tx, key=jax.random.key(2))
    step = train.make_train_step(loss_fn, tx)
    report = train.fit(state, step, [batch] * 80, num_steps=80, log_every=10)
    assert report.metrics["accuracy"] > 0.9


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_of_the_readme_runs_alone(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them saves
    Path("block.py").write_text(block, encoding="utf-8")
    runpy.run_path("block.py")
