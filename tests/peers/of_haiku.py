"""Haiku: cores, and ``DeepRNN``."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jlstm
from peers import B, D, Live, Module, T, load

H = 2


def _make(
    *kinds: str,
    x: tuple[int, ...] = (D,),
    state: tuple[int, ...] = (H,),
    **options: Any,
) -> Live:
    haiku = load("haiku")
    pairs = [kind.endswith("LSTM") for kind in kinds]

    def unroll(xs: Any, states: Any) -> Any:
        sizes = {} if "output_channels" in options else {"hidden_size": H}
        cores = [getattr(haiku, kind)(**sizes, **options) for kind in kinds]
        core = cores[0] if len(cores) == 1 else haiku.DeepRNN(cores)
        return haiku.dynamic_unroll(core, xs, states, time_major=False)

    module = haiku.without_apply_rng(haiku.transform(unroll))

    def pack(carry: list[Any]) -> Any:
        rest = iter(carry)
        states: tuple[Any, ...] = tuple(
            haiku.LSTMState(next(rest), next(rest)) if pair else next(rest)
            for pair in pairs
        )
        return states[0] if len(kinds) == 1 else states

    def run(weights: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        del lengths
        ys, final = module.apply(weights, xs, pack(carry))
        return [ys], jax.tree.leaves(final)

    carry = [jnp.zeros((B, *state))] * sum(2 if pair else 1 for pair in pairs)
    weights = module.init(jax.random.key(0), jnp.ones((B, T, *x)), pack(carry))
    return Live(weights, run)


GRU = jlstm.GRU(H, reset_after=False)
RELU = jlstm.Elman(H, activation=jax.nn.relu)
DOUBLE = jlstm.Elman(H, activation=jax.nn.relu, double_bias=True)
DEEP = jlstm.stack(*map(jlstm.RNN, (jlstm.LSTM(H), GRU, jlstm.LSTM(H))))
GRID = (3, 2)

MODULES = [
    Module("haiku", "LSTM", jlstm.RNN(jlstm.LSTM(H)), partial(_make, "LSTM")),
    Module("haiku", "GRU", jlstm.RNN(GRU), partial(_make, "GRU")),
    Module("haiku", "VanillaRNN", jlstm.RNN(DOUBLE), partial(_make, "VanillaRNN")),
    Module(
        "haiku",
        "VanillaRNN one bias",
        jlstm.RNN(RELU),
        partial(_make, "VanillaRNN", double_bias=False),
    ),
    Module(
        "haiku",
        "Conv2DLSTM",
        jlstm.RNN(jlstm.ConvLSTM(H, (3, 2), GRID)),
        partial(
            _make,
            "Conv2DLSTM",
            x=(*GRID, D),
            state=(*GRID, H),
            input_shape=GRID,
            output_channels=H,
            kernel_shape=(3, 2),
        ),
        told=False,
        folds=True,
        x=(*GRID, D),
    ),
    Module("haiku", "DeepRNN", DEEP, partial(_make, "LSTM", "GRU", "LSTM"), told=False),
]
