"""Flax, Linen and NNX; and the LSTM of ``jax.experimental.rnn``, by its reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jlstm
from peers import B, D, Live, Module, T, load

H = 2
FLAT = {"input_size": D, "hidden_size": H}


def _linen(kind: str, shape: str, x: tuple[int, ...] = (D,), **options: Any) -> Live:
    linen = load("flax.linen")

    def rnn() -> Any:
        return linen.RNN(getattr(linen, kind)(H, **options))

    single = rnn()
    xs = jnp.ones((B, T, *x), jnp.float32)  # as its carry is, while params are made
    module = {
        "RNN": lambda: single,
        "Bidirectional": lambda: linen.Bidirectional(rnn(), rnn()),
        "Sequential": lambda: linen.Sequential([rnn(), rnn()]),
        "cell": lambda: getattr(linen, kind)(H, **options),
    }[shape]()
    pairs = "LSTM" in kind

    def run(weights: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        states: Any = _pack(carry) if pairs else carry
        options = {"seq_lengths": lengths, "return_carry": True}
        if shape == "Bidirectional":
            options["initial_carry"] = tuple(states)
            final, ys = module.apply(weights, xs, **options)
        elif shape == "Sequential":
            final, ys = [], xs
            for i, state in enumerate(states):
                own = {"params": weights["params"][f"layers_{i}"]}
                last, ys = single.apply(own, ys, initial_carry=state, **options)
                final.append(last)
        else:
            inner = weights["params"]
            own = {"params": {"cell": inner} if shape == "cell" else inner}
            last, ys = single.apply(own, xs, initial_carry=states[0], **options)
            final = [last]
        return [ys], _unpack(final) if pairs else list(final)

    if shape == "cell":
        carry = module.initialize_carry(jax.random.key(0), (B, D))
        return Live(module.init(jax.random.key(0), carry, xs[:, 0]), run)
    return Live(module.init(jax.random.key(0), xs), run)


def _pack(carry: list[Any]) -> list[Any]:
    """From h, c, h, c to pairs of (c, h)."""
    return [(c, h) for h, c in zip(carry[::2], carry[1::2], strict=True)]


def _unpack(pairs: Any) -> list[Any]:
    return [leaf for c, h in pairs for leaf in (h, c)]


def _nnx(kind: str, shape: str) -> Live:
    nnx = load("flax.nnx")
    rngs = nnx.Rngs(0)

    def cell(inputs: int = D) -> Any:
        # Of which one computes in float32 if it is not told otherwise.
        options = {"dtype": jnp.float64} if kind == "SimpleCell" else {}
        return getattr(nnx, kind)(inputs, H, rngs=rngs, **options)

    def rnn(inputs: int = D) -> Any:
        return nnx.RNN(cell(inputs))

    module = {
        "RNN": rnn,
        "Bidirectional": lambda: nnx.Bidirectional(rnn(), rnn()),
        "Sequential": lambda: nnx.Sequential(rnn(), rnn(H)),
        "cell": cell,
    }[shape]()
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    pairs = "LSTM" in kind

    def run(weights: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        made = nnx.merge(graph, params, rest, copy=True)
        nnx.update(made, weights)
        states: Any = _pack(carry) if pairs else carry
        options = {"seq_lengths": lengths, "return_carry": True}
        if shape == "Bidirectional":
            final, ys = made(xs, initial_carry=tuple(states), **options)
        else:
            layers = {
                "Sequential": lambda: made.layers,
                "cell": lambda: [nnx.RNN(made)],
            }
            final, ys = [], xs
            for layer, state in zip(
                layers.get(shape, lambda: [made])(), states, strict=True
            ):
                last, ys = layer(ys, initial_carry=state, **options)
                final.append(last)
        return [ys], _unpack(final) if pairs else list(final)

    return Live(nnx.to_pure_dict(params), run)


def _flat(layers: int, bidirectional: bool) -> Live:
    rnn = load("jax.experimental.rnn")
    sizes = {**FLAT, "num_layers": layers, "bidirectional": bidirectional}
    weights = rnn.init_lstm_weight(jax.random.key(0), **sizes)

    def run(weights: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        matrices = rnn.unpack_lstm_weights(weights, **sizes)
        states = jnp.stack(carry[::2]), jnp.stack(carry[1::2])
        options = {"seq_lengths": jnp.asarray(lengths), "dropout": 0.0, **sizes}
        ys, h, c = rnn.lstm_ref(xs, *states, *matrices, **options)
        return [ys], [leaf for pair in zip(h, c, strict=True) for leaf in pair]

    return Live(weights, run)


CELLS: dict[str, Any] = {
    "LSTMCell": jlstm.LSTM(H),
    "OptimizedLSTMCell": jlstm.LSTM(H),
    "GRUCell": jlstm.GRU(H),
    "SimpleCell": jlstm.Elman(H),
    "MGUCell": jlstm.MGU(H, reset_after=True),
}
GRID = (3, 2)
CONV = jlstm.ConvLSTM(H, (3, 2), GRID)


def _layer(cell: Any, shape: str) -> Any:
    if shape == "Sequential":
        return jlstm.stack(jlstm.RNN(cell), jlstm.RNN(cell))
    return (jlstm.bidirectional if shape == "Bidirectional" else jlstm.RNN)(cell)


def _modules(peer: str, make: Any) -> list[Module]:
    shapes = [(k, "RNN") for k in CELLS if peer == "linen" or k != "MGUCell"]
    shapes += [(kind, "Bidirectional") for kind in ("LSTMCell", "GRUCell")]
    shapes += [("OptimizedLSTMCell", "Sequential"), ("GRUCell", "cell")]
    modules = []
    for kind, shape in shapes:
        options: dict[str, Any] = {"bare": shape == "cell", "lengths": True}
        if peer == "nnx" and kind == "GRUCell":
            options["zero"] = ("b_hh",)
        if peer == "nnx" and kind == "LSTMCell":
            options["options"] = (("optimized", False),)
        layer, name = _layer(CELLS[kind], shape), f"{kind} {shape}"
        modules.append(Module(peer, name, layer, partial(make, kind, shape), **options))
    return modules


DOUBLE = jlstm.LSTM(H, double_bias=True)
MODULES = [
    *_modules("linen", _linen),
    *_modules("nnx", _nnx),
    Module(
        "linen",
        "ConvLSTMCell RNN",
        jlstm.RNN(CONV),
        partial(_linen, "ConvLSTMCell", "RNN", x=(*GRID, D), kernel_size=(3, 2)),
        told=False,
        lengths=True,
        folds=True,
        x=(*GRID, D),
    ),
    Module(
        "jax_rnn",
        "lstm 1x forward",
        jlstm.RNN(DOUBLE),
        partial(_flat, 1, False),
        told=False,
        lengths=True,
    ),
    Module(
        "jax_rnn",
        "lstm 2x bidirectional",
        jlstm.stack(*[jlstm.bidirectional(DOUBLE)] * 2),
        partial(_flat, 2, True),
        told=False,
        lengths=True,
    ),
]
