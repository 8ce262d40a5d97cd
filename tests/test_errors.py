"""A user's mistake gets one clear line, at the door, and never inside a traced loop."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm

BATCH, TIME, SIZE = 2, 5, 3
XS = jnp.ones((BATCH, TIME, SIZE))
TOKENS = jnp.zeros((BATCH, TIME), jnp.int32)
KEY = jax.random.key(0)
LSTM = jlstm.LSTM(4)
PARAMS = LSTM.init(KEY, XS[:, 0])
FRESH = LSTM.init_carry(PARAMS, (BATCH,))
LONG = LSTM.init_carry(PARAMS, (BATCH + 1,))
EMBED = jlstm.Embed(7, SIZE)
TABLE = EMBED.init(KEY, TOKENS)
DENSE = jlstm.Dense(4)
CONV = jlstm.Conv(4, width=3, padding="CAUSAL")
CONV_PARAMS = CONV.init(KEY, XS)
STACK = jlstm.stack(EMBED, jlstm.bidirectional(LSTM))
BOTH = STACK.init(KEY, TOKENS)
MODEL = jlstm.LanguageModel(jlstm.RNN(LSTM), 7, 3)
ANSWER = jlstm.Classifier(jlstm.RNN(LSTM), num_classes=1)
ANSWER_PARAMS = ANSWER.init(KEY, XS)
LENGTHS = jnp.array([5, 2])


@dataclasses.dataclass(frozen=True)
class StepOnly:
    """A cell without a gated form."""

    hidden_size: int

    def init(self, key, x):
        del key
        return jnp.zeros((x.shape[-1], self.hidden_size), x.dtype)

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, params.shape[-1]), params.dtype)

    def step(self, params, carry, x):
        carry = jnp.tanh(carry + x @ params)
        return carry, carry


@dataclasses.dataclass(frozen=True)
class HalfGated(StepOnly):
    """A cell that defines one part of the gated form."""

    def project(self, params, x):
        return x @ params


@dataclasses.dataclass(frozen=True)
class Growing(StepOnly):
    """A cell whose carry changes its shape."""

    def step(self, params, carry, x):
        _, y = super().step(params, carry, x)
        return jnp.concatenate([carry, y], axis=-1), y


@dataclasses.dataclass(frozen=True)
class WithActivation(StepOnly):
    """A cell with a function in a field."""

    activation: Callable[[Any], Any] = jnp.tanh


class NotHashable(StepOnly):
    """A cell without a hash, as one that is not frozen."""

    __hash__ = None  # type: ignore[assignment]


def loose(value: Any) -> Any:
    """Hides a wrong type from the type checker."""
    return value


def by_place(layer: Any, given: Any, xs: Any = XS) -> Any:
    """Gives a layer's apply something in the place of the carry."""
    return layer.apply(layer.init(KEY, xs), xs, given)


def unroll(**options: Any) -> Any:
    given = {"cell": LSTM, "params": PARAMS, "xs": XS, **options}
    return jlstm.unroll(**given)


class Mistake(NamedTuple):
    call: Callable[[], Any]
    error: type[Exception]
    line: str  # the whole message, "..." standing for anything


MISTAKES = {
    "wrong rank": Mistake(
        lambda: unroll(xs=XS[0]),
        ValueError,
        "unroll: xs must be [B, T, D], got shape (5, 3); LSTM(4) takes inputs ...",
    ),
    "rank four": Mistake(
        lambda: unroll(xs=XS[..., None]),
        ValueError,
        "unroll: xs must be [B, T, D], got shape (2, 5, 3, 1); LSTM(4) takes ...",
    ),
    "no leaves": Mistake(
        lambda: unroll(xs=()),
        ValueError,
        "unroll: xs must be [B, T, ...], got shape []",
    ),
    "leaves that disagree": Mistake(
        lambda: unroll(xs=(XS, XS[:1])),
        ValueError,
        "unroll: all leaves of xs must begin with the same [B, T], got ...",
    ),
    "wrong features": Mistake(
        lambda: unroll(xs=XS[..., :2]),
        ValueError,
        "unroll: LSTM(4) cannot take a step on x [2, 2] with these params ...",
    ),
    "wrong batch in the carry": Mistake(
        lambda: unroll(carry=LONG),
        ValueError,
        "unroll: carry.h must be [2, 4], got [3, 4]",
    ),
    "wrong structure of the carry": Mistake(
        lambda: unroll(carry=(FRESH.h, FRESH.c)),
        ValueError,
        "unroll: carry must have the structure ..., got ...",
    ),
    "float lengths": Mistake(
        lambda: unroll(lengths=jnp.ones(BATCH)),
        ValueError,
        "unroll: lengths must be [B]=[2] integers, got [2] float32",
    ),
    "lengths of another batch": Mistake(
        lambda: unroll(lengths=jnp.ones(3, jnp.int32)),
        ValueError,
        "unroll: lengths must be [B]=[2] integers, got [3] int32",
    ),
    "lengths beyond T": Mistake(
        lambda: unroll(lengths=jnp.array([6, 1])),
        ValueError,
        "unroll: lengths must lie in 0..T=5, got values from 1 to 6",
    ),
    "negative lengths": Mistake(
        lambda: unroll(lengths=np.array([5, -1])),
        ValueError,
        "unroll: lengths must lie in 0..T=5, got values from -1 to 5",
    ),
    "lengths and mask": Mistake(
        lambda: unroll(lengths=jnp.ones(2, jnp.int32), mask=jnp.ones((2, 5), bool)),
        ValueError,
        "unroll: give lengths or mask, not both; got both",
    ),
    "float mask": Mistake(
        lambda: unroll(mask=jnp.ones((2, 5))),
        ValueError,
        "unroll: mask must be [B, T]=[2, 5] bool, got [2, 5] float32",
    ),
    "mask of another T": Mistake(
        lambda: unroll(mask=jnp.ones((2, 4), bool)),
        ValueError,
        "unroll: mask must be [B, T]=[2, 5] bool, got [2, 4] bool",
    ),
    "float resets": Mistake(
        lambda: unroll(resets=jnp.ones((2, 5))),
        ValueError,
        "unroll: resets must be [B, T]=[2, 5] bool, got [2, 5] float32",
    ),
    "unknown implementation": Mistake(
        lambda: unroll(implementation="cudnnn"),
        ValueError,
        "unroll: implementation must be one of ..., got 'cudnnn'",
    ),
    "unknown implementation of a layer": Mistake(
        lambda: jlstm.RNN(LSTM, implementation="cudnnn"),
        ValueError,
        "unroll: implementation must be one of ..., got 'cudnnn'",
    ),
    "fused without a gated form": Mistake(
        lambda: jlstm.RNN(StepOnly(4), implementation="fused"),
        NotImplementedError,
        "fused: StepOnly(...) has no gated form (project, mix, update); use ...",
    ),
    "a half-defined gated form": Mistake(
        lambda: jlstm.RNN(HalfGated(4)),
        TypeError,
        "HalfGated: the gated form needs project, mix, update; got project ...",
    ),
    "a cell that is not hashable": Mistake(
        lambda: unroll(cell=NotHashable(4), params=jnp.ones((SIZE, 4))),
        ValueError,
        "unroll: NotHashable must be hashable, got ...; make it a frozen ...",
    ),
    "a carry that grows": Mistake(
        lambda: unroll(cell=Growing(4), params=jnp.ones((SIZE, 4))),
        ValueError,
        "unroll: the carry that step returned must be [2, 4], got [2, 8]",
    ),
    "a bare cell in a stack": Mistake(
        lambda: jlstm.stack(loose(jlstm.LSTM(256))),
        TypeError,
        "stack.layers[0]: must be a layer, got the cell LSTM(256); wrap it: RNN(...)",
    ),
    "a carry of another batch, deep in a stack": Mistake(
        lambda: STACK.apply(BOTH, TOKENS, ((), jlstm.BidirectionalCarry(None, LONG))),
        ValueError,
        "stack[1].backward.unroll: carry.h must be [2, 4], got [3, 4]",
    ),
    "a bare cell in a classifier": Mistake(
        lambda: jlstm.Classifier(loose(LSTM), 2),
        TypeError,
        "Classifier.encoder: must be a layer, got the cell LSTM(4); wrap it: ...",
    ),
    "a layer in a bidirectional": Mistake(
        lambda: jlstm.bidirectional(loose(jlstm.RNN(LSTM))),
        TypeError,
        "bidirectional.cell: must be a cell, got the layer RNN(LSTM(4)); give ...",
    ),
    "a layer in an RNN": Mistake(
        lambda: jlstm.RNN(DENSE),
        TypeError,
        "RNN.cell: must be a cell, got the layer Dense(4); give the cell itself...",
    ),
    "a string in a stack": Mistake(
        lambda: jlstm.stack(loose("LSTM")),
        TypeError,
        "stack.layers[0]: must be a layer, got 'LSTM'",
    ),
    "an empty stack": Mistake(
        lambda: jlstm.stack(), ValueError, "stack: needs at least one layer"
    ),
    "a lambda in a config": Mistake(
        lambda: jlstm.Elman(4, activation=lambda x: x),
        ValueError,
        "Elman.activation: must be a module-level function or a frozen ...",
    ),
    "a lambda in a cell of one's own": Mistake(
        lambda: jlstm.RNN(WithActivation(4, activation=lambda x: x)),
        ValueError,
        "WithActivation.activation: must be a module-level function or a frozen ...",
    ),
    "a lambda in a cell inside another": Mistake(
        lambda: jlstm.bidirectional(
            jlstm.Precision(WithActivation(4, lambda x: x), jlstm.Policy())
        ),
        ValueError,
        "WithActivation.activation: must be a module-level function or a frozen ...",
    ),
    "a lambda in a checked cell": Mistake(
        lambda: jlstm.testing.check_cell(WithActivation(4, activation=lambda x: x)),
        ValueError,
        "WithActivation.activation: must be a module-level function or a frozen ...",
    ),
    "a class in the place of a cell": Mistake(
        lambda: jlstm.RNN(jlstm.LSTM),
        TypeError,
        "RNN.cell: must be a cell, got the class LSTM; make one: LSTM(...)",
    ),
    "a class in the place of a layer": Mistake(
        lambda: jlstm.stack(loose(jlstm.Dropout)),
        TypeError,
        "stack.layers[0]: must be a layer, got the class Dropout; make one: ...",
    ),
    "the name of an activation": Mistake(
        lambda: jlstm.Dense(4, activation=loose("relu")),
        TypeError,
        "Dense.activation: must be a function or None, got 'relu'; give jax.nn.relu",
    ),
    "no activation that there is": Mistake(
        lambda: jlstm.Conv(4, 3, activation=loose("ReLU")),
        TypeError,
        "Conv.activation: must be a function or None, got 'ReLU'; give a ...",
    ),
    "the name of a policy": Mistake(
        lambda: jlstm.RNN(LSTM, policy=loose("bf16")),
        TypeError,
        "RNN.policy: must be a Policy or None, got 'bf16'; give a Policy, ...",
    ),
    "a key by its place": Mistake(
        lambda: by_place(jlstm.RNN(LSTM), KEY),
        ValueError,
        "RNN: carry must be LSTMCarry [[2, 4], [2, 4]], got an array [] key<fry>; "
        "give lengths=, mask=, resets= and key= by name",
    ),
    "lengths by their place": Mistake(
        lambda: by_place(jlstm.RNN(StepOnly(4)), LENGTHS),
        ValueError,
        "RNN: carry must be an array [2, 4], got an array [2] int32; give ... by name",
    ),
    "lengths by their place, of as many rows as layers": Mistake(
        lambda: by_place(STACK, LENGTHS, TOKENS),
        ValueError,
        "stack: carry must be a tuple with one entry for each layer, got ...; give ...",
    ),
    "lengths by their place, in both directions": Mistake(
        lambda: by_place(jlstm.Classifier(jlstm.bidirectional(LSTM), 2), LENGTHS),
        ValueError,
        "encoder.bidirectional: carry must be a Bidirectional...; give ... by name",
    ),
    "a key by its place, in a dropout": Mistake(
        lambda: by_place(jlstm.Dropout(0.5), KEY),
        ValueError,
        "Dropout: carry must be () or None, got an array [] key<fry>; give ... by name",
    ),
    "a mask by its place, in a convolution": Mistake(
        lambda: by_place(jlstm.Conv(4, 3), jnp.ones((2, 5), bool)),
        ValueError,
        "Conv: carry must be () or None, got an array [2, 5] bool; give ... by name",
    ),
    "a step of a cell as of a layer": Mistake(
        lambda: jlstm.step(loose(LSTM), PARAMS, FRESH, XS[:, 0]),
        TypeError,
        "step: must be a layer, got the cell LSTM(4); wrap it: RNN(LSTM(4))",
    ),
    "a summary of a cell": Mistake(
        lambda: jlstm.summary(loose(LSTM), XS),
        TypeError,
        "summary: must be a layer, got the cell LSTM(4); wrap it: RNN(LSTM(4))",
    ),
    "tokens given to params of vectors": Mistake(
        lambda: jlstm.RNN(LSTM).apply(PARAMS, TOKENS),
        ValueError,
        "RNN: xs of LSTM(4) must be floating, got int32; put Embed(...) before it",
    ),
    "a temperature without a key": Mistake(
        lambda: jlstm.generate(
            MODEL, MODEL.init(KEY, TOKENS), TOKENS, 3, temperature=1.0
        ),
        ValueError,
        "generate: temperature, top_k and top_p need key=, because they draw ...; ...",
    ),
    "hidden_size of zero": Mistake(
        lambda: jlstm.LSTM(0),
        ValueError,
        "LSTM.hidden_size: must be a positive int, got 0",
    ),
    "hidden_size of a float": Mistake(
        lambda: jlstm.LSTM(loose(4.0)),
        ValueError,
        "LSTM.hidden_size: must be a positive int, got 4.0",
    ),
    "an integer dtype in a policy": Mistake(
        lambda: jlstm.Policy(compute=jnp.int32),
        ValueError,
        "Policy.compute: must be a floating dtype, such as jnp.bfloat16, got int32",
    ),
    "a rate of one": Mistake(
        lambda: jlstm.Dropout(1.0),
        ValueError,
        "Dropout.rate: must be in [0, 1), got 1.0",
    ),
    "unknown gates": Mistake(
        lambda: jlstm.gates(jnp.ones((2, 4)), "sx"),
        ValueError,
        "gates: kinds must consist of the letters s and t, got 'sx'",
    ),
    "gates that do not divide": Mistake(
        lambda: jlstm.gates(jnp.ones((2, 5)), "ss"),
        ValueError,
        "gates: the last axis must be a multiple of 2 ('ss'), got [2, 5]",
    ),
    "tokens where vectors belong": Mistake(
        lambda: jlstm.RNN(LSTM).init(KEY, TOKENS),
        ValueError,
        "RNN.init: xs of LSTM(4) must be floating, got int32; put Embed(...) ...",
    ),
    "vectors where tokens belong": Mistake(
        lambda: EMBED.apply(TABLE, XS),
        ValueError,
        "Embed: xs must be integer token ids, got float32",
    ),
    "an id outside the vocabulary": Mistake(
        lambda: EMBED.apply(TABLE, TOKENS + 7),
        ValueError,
        "Embed: ids must lie in 0..6, got values from 7 to 7",
    ),
    "an id outside the vocabulary, in a stack": Mistake(
        lambda: STACK.apply(BOTH, TOKENS - 1),
        ValueError,
        "stack[0].Embed: ids must lie in 0..6, got values from -1 to -1",
    ),
    "an id outside the vocabulary, in a model": Mistake(
        lambda: jlstm.LanguageModel(jlstm.RNN(LSTM), 7, 3).apply(
            jlstm.LanguageModel(jlstm.RNN(LSTM), 7, 3).init(KEY, TOKENS), TOKENS + 7
        ),
        ValueError,
        "embed.Embed: ids must lie in 0..6, got values from 7 to 7",
    ),
    "a number of features where an input is needed": Mistake(
        lambda: jlstm.RNN(LSTM).init(KEY, 3),
        ValueError,
        "RNN.init: xs must be [B, T, ...], got shape []",
    ),
    "params of another layer": Mistake(
        lambda: DENSE.apply(DENSE.init(KEY, XS), XS[..., :2]),
        ValueError,
        "Dense: xs must be [B, T, D=3], got [2, 5, 2]",
    ),
    "wrong features of a convolution": Mistake(
        lambda: CONV.apply(CONV_PARAMS, XS[..., :2]),
        ValueError,
        "Conv: xs must be [B, T, D=3], got [2, 5, 2]",
    ),
    "wrong carry of a convolution": Mistake(
        lambda: CONV.apply(CONV_PARAMS, XS, loose(CONV.init_carry(CONV_PARAMS, (3,)))),
        ValueError,
        "Conv: carry must be a ConvCarry with xs [2, 2, 3], got a ConvCarry of ...",
    ),
    "a causal stride": Mistake(
        lambda: jlstm.Conv(4, 3, stride=2, padding="CAUSAL"),
        ValueError,
        "Conv.stride: must be 1 with padding='CAUSAL', which gives ..., got 2",
    ),
    "resets through a stride": Mistake(
        lambda: jlstm.Conv(4, 3, stride=2).apply(
            CONV_PARAMS, XS, resets=jnp.zeros((2, 5), bool)
        ),
        NotImplementedError,
        "Conv(4, 3, stride=2): cannot honour resets, because ...; use padding ...",
    ),
    "an unknown padding": Mistake(
        lambda: jlstm.Conv(4, 3, padding=loose("same")),
        ValueError,
        "Conv.padding: must be one of 'SAME', 'VALID', 'CAUSAL', got 'same'",
    ),
    "an unknown merge": Mistake(
        lambda: jlstm.bidirectional(LSTM, merge=loose("add")),
        ValueError,
        "bidirectional: merge must be one of 'concat', ..., got 'add'",
    ),
    "a sum of two sizes": Mistake(
        lambda: jlstm.bidirectional(LSTM, jlstm.GRU(5), merge="sum").apply(
            jlstm.bidirectional(LSTM, jlstm.GRU(5)).init(KEY, XS), XS
        ),
        ValueError,
        "bidirectional: merge='sum' needs outputs of one shape, got ...; use ...",
    ),
    "a residual of two sizes": Mistake(
        lambda: jlstm.Residual(DENSE).apply(DENSE.init(KEY, XS), XS),
        ValueError,
        "Residual: Dense(4) must return the shape of its input, [2, 5, 3], ...",
    ),
    "an unknown pooling of a classifier": Mistake(
        lambda: jlstm.Classifier(jlstm.RNN(LSTM), 2, pooling=loose("avg")),
        ValueError,
        "Classifier.pooling: must be one of 'last', ..., got 'avg'",
    ),
    "an unknown pooling": Mistake(
        lambda: jlstm.pool(jlstm.RNN(LSTM), PARAMS, XS, kind=loose("avg")),
        ValueError,
        "pool: kind must be one of 'last', ..., got 'avg'",
    ),
    "a step of a layer that needs the future": Mistake(
        lambda: jlstm.step(STACK, BOTH, None, TOKENS[:, 0]),
        ValueError,
        "step: needs a causal layer, got stack(...), whose outputs need the future",
    ),
    "a language model that sees the future": Mistake(
        lambda: jlstm.LanguageModel(jlstm.bidirectional(LSTM), 7, 3),
        ValueError,
        "LanguageModel.body: must be causal, got bidirectional(LSTM(4)), ...",
    ),
    "a tied head of another size": Mistake(
        lambda: jlstm.LanguageModel(jlstm.RNN(LSTM), 7, 3, tied=True).init(KEY, TOKENS),
        ValueError,
        "LanguageModel.tied: the body must return embed_size=3 features, got 4; ...",
    ),
    "params of another stack": Mistake(
        lambda: STACK.apply(BOTH[:1], TOKENS),
        ValueError,
        "stack: params must have one entry for each of the 2 layers, got 1",
    ),
    "vectors of another shape": Mistake(
        lambda: jlstm.Embed(
            7, 3, table_init=jlstm.init.Pretrained(np.ones((6, 3)))
        ).init(KEY, TOKENS),
        ValueError,
        "Pretrained: expected an array of shape [7, 3], got [6, 3]; match ...",
    ),
    "inputs without an axis of time": Mistake(
        lambda: jlstm.RNN(LSTM).init(KEY, XS[:, 0]),
        ValueError,
        "RNN.init: xs must be [B, T, D], got shape (2, 3); LSTM(4) takes inputs ...",
    ),
    "a dtype by a name that is none": Mistake(
        lambda: jlstm.Policy(compute="bf16"),
        ValueError,
        "Policy.compute: must be a floating dtype, such as jnp.bfloat16, got bf16",
    ),
    "an activation by its name": Mistake(
        lambda: jlstm.LSTM(4, activation=cast(Any, "relu")),
        TypeError,
        "LSTM.activation: must be a function, got 'relu'; give jax.nn.relu",
    ),
    "a step of one answer for a sequence": Mistake(
        lambda: jlstm.step(ANSWER, ANSWER_PARAMS, None, XS[:, 0]),
        ValueError,
        "step: needs a layer with one output for each step, got Classifier(...), ...",
    ),
    "an impossible time": Mistake(
        lambda: jlstm.init.Chrono(2), ValueError, "Chrono.max_time: must be >= 3, got 2"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_clear_line(name):
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as caught:
        mistake.call()
    assert caught.type is mistake.error
    pattern = re.escape(mistake.line).replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(caught.tb)]
    assert not [f for f in files if "/kernels/" in f], "raised inside a loop"


def test_error_tells_of_params_of_another_cell():
    xs, layer = jnp.ones((2, 3, 4)), jlstm.stack(jlstm.RNN(jlstm.LSTM(5)))
    others = {
        "expected LSTMParams, got GRUParams": jlstm.GRU(5),
        "w_ih must be [4, 20], got [4, 24]": jlstm.LSTM(6),
        "some are missing, or too many": jlstm.LSTM(5, double_bias=True),
    }
    for words, cell in others.items():
        params = jlstm.stack(jlstm.RNN(cell)).init(jax.random.key(0), xs)
        carry = layer.init_carry(layer.init(jax.random.key(0), xs), (7,))
        errors = AttributeError, ValueError  # of the carry, which has 7 rows, too
        with pytest.raises(errors, match=r"c0|carry.*must be") as caught:
            layer.apply(params, xs, carry)
        note = f"stack[0].unroll: LSTM(5) has other params: {words}"
        assert note in caught.value.__notes__


def test_mistakes_are_found_in_a_trace_too():
    def run(xs, lengths):
        return jlstm.unroll(LSTM, PARAMS, xs, lengths=lengths)

    with pytest.raises(
        ValueError, match=r"unroll: lengths must be \[B\]=\[2\] integers"
    ):
        jax.jit(run)(XS, jnp.ones(BATCH))


def test_lengths_out_of_range_are_clipped_in_a_trace():
    @jax.jit
    def run(lengths):
        return jlstm.unroll(LSTM, PARAMS, XS, lengths=lengths)

    got, expected = run(jnp.array([9, -4])), run(jnp.array([TIME, 0]))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_ids_out_of_range_are_clipped_in_a_trace():
    @jax.jit
    def run(tokens):
        return EMBED.apply(TABLE, tokens)[0]

    got = run(jnp.array([[-3, 0, 6, 99]]))
    np.testing.assert_array_equal(got[0], TABLE.table[jnp.array([0, 0, 6, 6])])


def test_ids_in_the_padding_may_be_anything():
    tokens = TOKENS.at[0, 3:].set(-1).at[1].set(99)
    lengths = jnp.array([3, 0])
    got, _ = STACK.apply(BOTH, tokens, lengths=lengths)
    expected, _ = STACK.apply(BOTH, TOKENS, lengths=lengths)
    np.testing.assert_array_equal(got, expected)
