"""Equinox: cells, in a scan of a user's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jlstm
from peers import D, Live, Module, load

H = 2


def _make(kind: str, count: int = 1, *, bias: bool = True) -> Live:
    equinox = load("equinox")
    make = getattr(equinox.nn, kind)
    cells = [
        make(D if i == 0 else H, H, use_bias=bias, key=jax.random.key(i))
        for i in range(count)
    ]
    names = ("weight_ih", "weight_hh", "bias", "bias_n")
    weights = [
        {n: getattr(c, n) for n in names if getattr(c, n, None) is not None}
        for c in cells
    ]
    pairs = kind == "LSTMCell"

    def run_cell(arrays: Any, cell: Any, xs: Any, carry: list[Any]) -> Any:
        cell = equinox.tree_at(
            lambda c: [getattr(c, name) for name in arrays],
            cell,
            [jnp.asarray(array) for array in arrays.values()],
        )

        def step(state: Any, x: Any) -> Any:
            state = cell(x, tuple(state) if pairs else state[0])
            state = list(state) if pairs else [state]
            return state, state[0]

        return jax.vmap(lambda xs, carry: jax.lax.scan(step, carry, xs))(xs, carry)

    def run(weights: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        del lengths
        each, final = (2 if pairs else 1), []
        for i, arrays in enumerate([weights] if count == 1 else weights):
            state = carry[each * i : each * (i + 1)]
            last, xs = run_cell(arrays, cells[i], xs, state)
            final += last
        return [xs], final

    return Live(weights[0] if count == 1 else weights, run)


LSTM, GRU = jlstm.RNN(jlstm.LSTM(H)), jlstm.RNN(jlstm.GRU(H))
BIASES: dict[str, Any] = {"zero": ("b", "b_hh"), "options": (("bias", False),)}

MODULES = [
    Module("equinox", "LSTMCell", LSTM, partial(_make, "LSTMCell")),
    Module("equinox", "GRUCell", GRU, partial(_make, "GRUCell")),
    Module(
        "equinox",
        "GRUCell without bias",
        GRU,
        partial(_make, "GRUCell", bias=False),
        **BIASES,
    ),
    Module(
        "equinox",
        "2 x LSTMCell",
        jlstm.stack(LSTM, LSTM),
        partial(_make, "LSTMCell", 2),
        told=False,
    ),
]
