"""Every cell and layer obeys the laws, and the laws catch those that do not."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CELLS

import jlstm
from jlstm.testing import check_cell, check_layer

# One cell of each kind meets every loop; for the others one loop is enough.
KINDS = [jlstm.LSTM(3), jlstm.GRU(3), jlstm.Elman(3)]
# The GRU's other form with every option covers its plain one; Chrono comes with every
# option of the LSTM.
CHRONO = jlstm.init.Chrono(9)
GRU = jlstm.GRU(2, reset_after=False, double_bias=True, learned_carry=True)
LSTM = jlstm.LSTM(2, double_bias=True, learned_carry=True)
MET = [*KINDS, jlstm.GRU(3, reset_after=False), GRU, LSTM]
slow = partial(pytest.param, marks=pytest.mark.slow)
BOTH = jlstm.bidirectional(jlstm.Elman(2))
VARIANTS = [
    GRU,
    *(slow(cell) for cell in CELLS if cell not in MET),
    # What these options add is linear, and is checked with the other cells.
    slow(jlstm.LSTM(2, forget_bias=CHRONO, double_bias=True, learned_carry=True)),
    slow(jlstm.Precision(jlstm.LSTM(2), jlstm.Policy(accumulate=jnp.float64))),
]
TOKENS = jnp.arange(18, dtype=jnp.int32).reshape(3, 6) % 7
LAYERS = [
    slow(jlstm.RNN(jlstm.GRU(2), reverse=True), None),  # as in both directions
    (jlstm.bidirectional(jlstm.LSTM(2), jlstm.Elman(2)), None),
    (jlstm.Dense(2, activation=jnp.tanh), None),
    (jlstm.Embed(7, 2), TOKENS),
    (jlstm.LayerNorm(), None),
    (jlstm.Dropout(0.5), None),
    slow(jlstm.Residual(jlstm.RNN(jlstm.Elman(5))), None),
    (jlstm.Conv(2, width=3, dilation=2), None),
    (jlstm.Conv(2, width=2, dilation=2), None),
    slow(jlstm.Conv(2, width=3, padding="CAUSAL"), None),
    slow(jlstm.Tagger(jlstm.RNN(jlstm.Elman(2)), 3), None),
    (jlstm.LanguageModel(jlstm.RNN(jlstm.Elman(2)), 7, 2, tied=True), TOKENS),
]
RETIMING = [
    jlstm.Conv(2, width=3, stride=2),
    jlstm.Conv(2, width=2, padding="VALID"),
    jlstm.Tagger(jlstm.Conv(2, width=2, padding="VALID"), 2),
    slow(jlstm.stack(jlstm.Conv(2, width=2, stride=2), BOTH)),
]


def name_of(value: Any) -> str:
    return "xs" if isinstance(value, jax.Array) else repr(value)


@pytest.mark.core
@pytest.mark.parametrize("cell", KINDS, ids=repr)
def test_cell_obeys_the_laws(cell):
    # What the plain scan adds to the fused loop does not depend on the cell.
    both = isinstance(cell, jlstm.LSTM)
    check_cell(cell, implementations=("fused", "scan") if both else ("fused",))


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


def test_laws_can_be_checked_again():
    for _ in range(2):
        check_cell(Leaky(2), implementations=("scan",), smooth=False)
        check_layer(jlstm.Dense(2), smooth=False)


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
    PartsThatDiffer: r"step\(p, c, x\) == update",
    MixesRows: "rows are independent|changes nothing|padding",
    PeeksAtTheSequence: "chunks equal the whole|unrolling equals",
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


# Plain mistakes get one line before any law.


class CarryOfAnotherDtype(Leaky):
    """Its step returns float32, whatever it was given."""

    def step(self, params, carry, x):
        carry, y = super().step(params, carry, x)
        return carry.astype(jnp.float32), y


class OutputOfAnotherDtype(Leaky):
    """Its step casts y to float32."""

    def step(self, params, carry, x):
        carry, y = super().step(params, carry, x)
        return carry, y.astype(jnp.float32)


class NanAtZero(Leaky):
    """Is not finite at x = 0, where padding is."""

    def project(self, params, x):
        return super().project(params, x) / jnp.linalg.norm(x, axis=-1, keepdims=True)


class NanGradientAtZero(Leaky):
    """Its gradient is not finite at x = 0, though its value is."""

    def project(self, params, x):
        return super().project(params, x) * jnp.linalg.norm(x, axis=-1, keepdims=True)


class CarryWithoutBatch(Leaky):
    """Its fresh carry forgets the batch."""

    def init_carry(self, params, batch_shape):
        return jnp.zeros((self.hidden_size,), params["w"].dtype)


class CarryOfOneBatch(Leaky):
    """Its fresh carry is made for the batch that its author had."""

    def init_carry(self, params, batch_shape):
        return jnp.zeros((3, self.hidden_size), params["w"].dtype)


class CarryAlone(Leaky):
    """Its step forgets y."""

    def step(self, params, carry, x):
        return super().step(params, carry, x)[0]


@dataclasses.dataclass(frozen=True)
class PairAlone:
    """Its step returns a carry of two parts, which looks like a carry and a y."""

    hidden_size: int
    init = Leaky.init

    def init_carry(self, params, batch_shape):
        zeros = jnp.zeros((*batch_shape, self.hidden_size), params["w"].dtype)
        return jlstm.LSTMCarry(zeros, zeros)

    def step(self, params, carry, x):
        return jlstm.LSTMCarry(jnp.tanh(x @ params["w"]) + carry.c, carry.c)


class ScalarOutput(Leaky):
    """Its y is one number for the whole batch."""

    def step(self, params, carry, x):
        carry, y = super().step(params, carry, x)
        return carry, y.sum()


@dataclasses.dataclass(frozen=True)
class SwapsArguments:
    """Its step takes x before the carry."""

    hidden_size: int
    init, init_carry = Leaky.init, Leaky.init_carry

    def step(self, params, x, h):
        return Leaky(self.hidden_size).step(params, h, x)


@dataclasses.dataclass(frozen=True)
class SwapsUnnamed:
    """Its step takes its input before its state, by other names."""

    hidden_size: int
    init, init_carry = Leaky.init, Leaky.init_carry

    def step(self, weights, given, state):
        return Leaky(self.hidden_size).step(weights, state, given)


@dataclasses.dataclass
class NotFrozen:
    """A cell without a hash."""

    hidden_size: int
    init, init_carry, step = Leaky.init, Leaky.init_carry, Leaky.step


class WithoutInit:
    """A cell that forgets ``init``."""

    init_carry, step = Leaky.init_carry, Leaky.step


MISTAKEN_CELLS = {
    "a class": (Leaky, "check_cell: must be a cell, got the class Leaky; make one: "),
    "a layer": (
        jlstm.RNN(Leaky(2)),
        r"check_cell: must be a cell, got the layer RNN\(",
    ),
    "no hash": (NotFrozen(2), "check_cell: NotFrozen must be hashable, .* frozen data"),
    "no init": (WithoutInit(), r"check_cell: .* needs a method init\(key, x\)"),
    "swapped": (
        SwapsArguments(2),
        r"SwapsArguments must define step\(params, carry, x\), got \(params, x, h\)",
    ),
    "swapped, unnamed": (
        SwapsUnnamed(2),
        r"step\(params, carry, x\) fails on float64\[3, 2\] and float64\[3, 5\], in",
    ),
    "carry alone": (CarryAlone(2), r"\(carry, y\), got only float64\[3, 2\]"),
    "pair alone": (PairAlone(2), r"\(carry, y\), got only LSTMCarry\(.h float"),
    "carry's dtype": (
        CarryOfAnotherDtype(2),
        r"a carry of the type it was given, float64\[3, 2\], got float32\[3, 2\]",
    ),
    "y's dtype": (OutputOfAnotherDtype(2), "promote to, float64, got float32; take"),
    "scalar y": (ScalarOutput(2), r"y of leaves \[B, ...\] with B=3, got \[\]"),
    "no batch": (CarryWithoutBatch(2), r"return leaves \[4, ...\], got \[2\]; take"),
    "one batch": (CarryOfOneBatch(2), r"return leaves \[4, ...\], got \[3, 2\]; take"),
    "NaN at 0": (NanAtZero(2), "finite at x = 0, because .* in the carry; guard what"),
    "gradient": (NanGradientAtZero(2), "finite at x = 0, .* in the gradient of x;"),
}


@pytest.mark.parametrize("name", MISTAKEN_CELLS)
def test_mistake_in_a_cell_gets_one_line(name):
    cell, line = MISTAKEN_CELLS[name]
    with pytest.raises((TypeError, ValueError), match=line) as caught:
        check_cell(cell)
    assert "\n" not in str(caught.value)


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


class OutputsAlone(Shift):
    """Its apply forgets the carry."""

    def apply(self, *args, **masking):
        return super().apply(*args, **masking)[0]


class FlattensTime(Shift):
    """Gives one number a row."""

    def apply(self, *args, **masking):
        ys, carry = super().apply(*args, **masking)
        return ys.sum((1, 2)), carry


@dataclasses.dataclass(frozen=True)
class SwapsCarry:
    """Its apply takes the carry first."""

    init, init_carry = Shift.init, Shift.init_carry

    def apply(self, params, carry, xs=None, **masking):
        return Shift().apply(params, xs, carry, **masking)


MISTAKEN_LAYERS = {
    "a class": (Shift, "check_layer: must be a layer, got the class Shift; make one:"),
    "a cell": (
        Leaky(2),
        r"must be a layer, got the cell Leaky\(.* wrap it: RNN\(",
    ),
    "outputs alone": (OutputsAlone(), r"\(ys, carry\), got only float64\[3, 6, 5\]"),
    "no time": (FlattensTime(), r"ys of leaves \[B, T, ...\] with B=3, got \[3\]"),
    "swapped": (
        SwapsCarry(),
        r"apply\(params, xs, carry\), got \(params, carry, xs",
    ),
}


@pytest.mark.parametrize("name", MISTAKEN_LAYERS)
def test_mistake_in_a_layer_gets_one_line(name):
    layer, line = MISTAKEN_LAYERS[name]
    with pytest.raises((TypeError, ValueError), match=line) as caught:
        check_layer(layer)
    assert "\n" not in str(caught.value)


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
