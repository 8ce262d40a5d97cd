"""Every cell and layer obeys the laws, and the laws catch those that do not."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CELLS

import jlstm
from jlstm.testing import check_cell, check_layer

# One cell of each kind meets every loop; for the others one loop is enough.
KINDS = [jlstm.LSTM(3), jlstm.GRU(3), jlstm.Elman(3)]
VARIANTS = [
    *(cell for cell in CELLS if cell not in KINDS),
    jlstm.LSTM(2, forget_bias=jlstm.init.Chrono(9)),
    jlstm.Precision(jlstm.LSTM(2), jlstm.Policy(accumulate=jnp.float64)),
]
TOKENS = jnp.arange(18, dtype=jnp.int32).reshape(3, 6) % 7
LAYERS = [
    (jlstm.RNN(jlstm.GRU(2), reverse=True), None),
    (jlstm.bidirectional(jlstm.LSTM(2), jlstm.Elman(2)), None),
    (jlstm.Dense(2, activation=jnp.tanh), None),
    (jlstm.Embed(7, 2), TOKENS),
    (jlstm.LayerNorm(), None),
    (jlstm.Dropout(0.5), None),
    (jlstm.Residual(jlstm.RNN(jlstm.Elman(5))), None),
    (jlstm.Conv(2, width=3, dilation=2), None),
    (jlstm.Conv(2, width=2, dilation=2), None),
    (jlstm.Conv(2, width=3, padding="CAUSAL"), None),
    (jlstm.Tagger(jlstm.RNN(jlstm.Elman(2)), 3), None),
    (jlstm.LanguageModel(jlstm.RNN(jlstm.Elman(2)), 7, 2, tied=True), TOKENS),
]
RETIMING = [
    jlstm.Conv(2, width=3, stride=2),
    jlstm.Conv(2, width=2, padding="VALID"),
    jlstm.Tagger(jlstm.Conv(2, width=2, padding="VALID"), 2),
    jlstm.stack(jlstm.Conv(2, width=2, stride=2), jlstm.bidirectional(jlstm.Elman(2))),
]


def name_of(value: Any) -> str:
    return "xs" if isinstance(value, jax.Array) else repr(value)


@pytest.mark.core
@pytest.mark.parametrize("cell", KINDS, ids=repr)
def test_cell_obeys_the_laws(cell):
    check_cell(cell)


@pytest.mark.parametrize("cell", VARIANTS, ids=repr)
def test_variant_of_a_cell_obeys_the_laws(cell):
    # What a variant adds to its kind is linear, but for the other form of the GRU.
    smooth = not getattr(cell, "reset_after", True)
    check_cell(cell, implementations=("fused",), smooth=smooth)


@pytest.mark.parametrize(("layer", "xs"), LAYERS, ids=name_of)
def test_layer_obeys_the_laws(layer, xs):
    check_layer(layer, xs)


@pytest.mark.parametrize("layer", RETIMING, ids=repr)
def test_layer_that_changes_time_obeys_the_laws(layer):
    check_layer(layer, resets=False)


@pytest.mark.core
def test_stack_of_everything_obeys_the_laws():
    deep = jlstm.stack(
        jlstm.Embed(7, 3),
        jlstm.Conv(3, width=2, padding="CAUSAL"),
        jlstm.stack(jlstm.LayerNorm(), jlstm.RNN(jlstm.LSTM(3, learned_carry=True))),
        jlstm.Residual(jlstm.RNN(jlstm.GRU(3))),
        jlstm.Dropout(0.5),
        jlstm.Dense(2),
    )
    check_layer(deep, TOKENS, smooth=False)  # its parts are differentiated above


# The laws catch what is broken.


@dataclasses.dataclass(frozen=True)
class Leaky:
    """A sound cell, :math:`h' = h / 2 + tanh(x W)`, to be broken below."""

    hidden_size: int

    def init(self, key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], self.hidden_size), x.dtype)}

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["w"].dtype)

    def step(self, params, carry, x):
        return self.update(params, carry, self.project(params, x), ())

    def project(self, params, x):
        return x @ params["w"]

    def mix(self, params, carry, zx):
        return ()

    def update(self, params, carry, zx, zh):
        carry = carry / 2 + jnp.tanh(zx)
        return carry, carry


class CarryOfAnotherDtype(Leaky):
    """Its step returns float32, whatever it was given."""

    def step(self, params, carry, x):
        carry, y = super().step(params, carry, x)
        return carry.astype(jnp.float32), y


class PartsThatDiffer(Leaky):
    """Its parts decay faster than its step."""

    def step(self, params, carry, x):
        carry = carry / 3 + jnp.tanh(x @ params["w"])
        return carry, carry


class MixesRows(Leaky):
    """Its step reads the row above."""

    def project(self, params, x):
        return super().project(params, x + jnp.roll(x, 1, axis=0) / 10)


class PeeksAtTheSequence(Leaky):
    """Its ``prepare`` adds the mean over time, masked steps and all."""

    def prepare(self, params, xs, *, key=None):
        return params, xs + xs.mean(1, keepdims=True)


class NanAtZero(Leaky):
    """Is not finite at x = 0, where padding is."""

    def project(self, params, x):
        return super().project(params, x) / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CarryWithoutBatch(Leaky):
    """Its fresh carry forgets the batch."""

    def init_carry(self, params, batch_shape):
        return jnp.zeros((self.hidden_size,), params["w"].dtype)


@jax.custom_jvp
def wrong_tanh(x):
    return jnp.tanh(x)


wrong_tanh.defjvp(lambda x, dx: (jnp.tanh(*x), 1.01 * dx[0] * (1 - jnp.tanh(*x) ** 2)))


class WrongDerivative(Leaky):
    """Its activation has a derivative of its own."""

    def update(self, params, carry, zx, zh):
        carry = carry / 2 + wrong_tanh(zx)
        return carry, carry


class UnequalCopies(Leaky):
    """Is equal to itself alone."""

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


BROKEN_CELLS = {
    CarryOfAnotherDtype: "a carry of the type it was given",
    PartsThatDiffer: r"step\(p, c, x\) == update",
    MixesRows: "rows are independent|changes nothing|padding",
    PeeksAtTheSequence: "chunks equal the whole|unrolling equals",
    NanAtZero: "in the padding|in the gradients|gradients are finite",
    CarryWithoutBatch: "every carry leaf begins with the batch",
    WrongDerivative: "gradients equal finite differences",
    UnequalCopies: "hashable and equal by value",
}


def test_law_holds_for_the_cell_that_is_not_broken():
    check_cell(Leaky(2))


@pytest.mark.parametrize("broken", BROKEN_CELLS, ids=lambda c: c.__name__)
def test_law_catches_the_cell(broken):
    with pytest.raises(AssertionError, match="breaks the law") as caught:
        check_cell(broken(2), implementations=("scan",))
    first = str(caught.value).splitlines()[0]
    assert re.search(BROKEN_CELLS[broken], first), first


def test_law_catches_a_half_defined_gated_form():
    class Half(Leaky):
        mix: Any = None

    with pytest.raises(TypeError, match="project, update without mix; define all"):
        check_cell(Half(2))


@dataclasses.dataclass(frozen=True)
class Shift:
    """A layer to be broken below: adds its param; carries nothing."""

    pointwise = True

    def init(self, key, xs):
        return jnp.ones((), xs.dtype)

    def init_carry(self, params, batch_shape):
        return ()

    def apply(
        self, params, xs, carry=None, *, lengths=None, mask=None, resets=None, key=None
    ):
        valid = jlstm.valid_steps(xs, lengths=lengths, mask=mask, resets=resets)
        ys = self.map(jlstm.zero_rows(valid, xs) + params, resets)
        return jlstm.zero_rows(valid, ys), ()

    def map(self, ys, resets):
        return ys


class EmitsInPadding(Shift):
    """Its outputs are not zero where masked."""

    def apply(self, params, xs, carry=None, *, lengths=None, mask=None, **_):
        valid = jlstm.valid_steps(xs, lengths=lengths, mask=mask)
        return jlstm.zero_rows(valid, xs) + params, ()


class LeaksPadding(Shift):
    """Multiplies by the mask, which NaN survives."""

    def apply(self, params, xs, carry=None, *, lengths=None, mask=None, **_):
        valid = jlstm.valid_steps(xs, lengths=lengths, mask=mask)
        ys = xs + params
        return (ys if valid is None else ys * valid[..., None].astype(ys.dtype)), ()


class IgnoresLengths(Shift):
    """Knows masks alone."""

    def apply(self, params, xs, carry=None, *, lengths=None, **rest):
        return super().apply(params, xs, carry, **rest)


class IgnoresResets(Shift):
    """Sums over the past, also over that before a boundary."""

    def map(self, ys, resets):
        return jnp.cumsum(ys, axis=1)


class MixesRowsOfLayer(Shift):
    """Subtracts the mean over the batch."""

    def map(self, ys, resets):
        return ys - ys.mean(0, keepdims=True)


class ClaimsToBeCausal(Shift):
    """Adds the step ahead."""

    def map(self, ys, resets):
        return ys + jnp.roll(ys, -1, axis=1)


class ClaimsNotToBeCausal(Shift):
    """Sees one step, and says that it sees the future."""

    causal = False


BROKEN_LAYERS = {
    EmitsInPadding: "outputs are zero where|padding|not valid",
    LeaksPadding: "nan in the padding changes nothing",
    IgnoresLengths: "lengths equal the mask",
    IgnoresResets: "resets equal separate sequences|chunks equal the whole",
    MixesRowsOfLayer: "rows are independent",
    ClaimsToBeCausal: "chunks equal the whole",
    ClaimsNotToBeCausal: "depends on the future",
}


def test_law_holds_for_the_layer_that_is_not_broken():
    check_layer(Shift())


@pytest.mark.parametrize("broken", BROKEN_LAYERS, ids=lambda c: c.__name__)
def test_law_catches_the_layer(broken):
    with pytest.raises(AssertionError, match="breaks the law") as caught:
        check_layer(broken())
    first = str(caught.value).splitlines()[0]
    assert re.search(BROKEN_LAYERS[broken], first), first
