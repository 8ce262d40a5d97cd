"""Other libraries in their best documented configuration, imported when needed."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import jax

from jlstm.bench.cases import PACKAGES, Size, Suite
from jlstm.bench.program import (
    Apply,
    Inputs,
    Program,
    layer_program,
    make_inputs,
    make_tokens,
)


def installed(peer: str) -> bool:
    """Tells whether the package of a peer is installed, without importing it."""
    first = peer.partition("-")[0]
    return importlib.util.find_spec(PACKAGES.get(first, first)) is not None


def make_program(peer: str, suite: Suite, size: Size, threads: int) -> Program:
    """Makes a peer's program; a name such as ``"nnx-unroll4"`` unrolls the loop."""
    if peer == "torch":
        return _torch(suite, size, threads)
    name, _, unroll = peer.partition("-unroll")
    inputs = make_inputs(suite, size)
    apply, params = JAX_LIBRARIES[name](suite, size, inputs, int(unroll or 1))
    return layer_program(apply, params, inputs, train=suite.train)


def _nnx(suite: Suite, size: Size, inputs: Inputs, unroll: int) -> tuple[Apply, Any]:
    nnx = importlib.import_module("flax.nnx")

    cell = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}[suite.cell]
    rngs = nnx.Rngs(0)

    def rnn(features: int) -> Any:
        return nnx.RNN(cell(features, size.H, rngs=rngs), unroll=unroll)

    layers = [rnn(size.D)]
    if suite.bidirectional:
        layers = [nnx.Bidirectional(rnn(D), rnn(D)) for D in (size.D, 2 * size.H)]
    graph, params, rest = nnx.split(nnx.List(layers), nnx.Param, ...)

    def apply(params: Any, xs: jax.Array, lengths: Any = None) -> jax.Array:
        for layer in nnx.merge(graph, params, rest, copy=True):
            xs = layer(xs, seq_lengths=lengths)
        return xs

    return apply, params


def _linen(suite: Suite, size: Size, inputs: Inputs, unroll: int) -> tuple[Apply, Any]:
    linen = importlib.import_module("flax.linen")

    cell = {"lstm": linen.OptimizedLSTMCell, "gru": linen.GRUCell}[suite.cell]

    class Model(linen.Module):
        @linen.compact
        def __call__(self, xs: jax.Array, lengths: Any = None) -> jax.Array:
            def rnn() -> Any:
                return linen.RNN(cell(size.H), unroll=unroll)

            if not suite.bidirectional:
                return rnn()(xs)
            for _ in range(2):
                xs = linen.Bidirectional(rnn(), rnn())(xs, seq_lengths=lengths)
            return xs

    model: Any = Model()
    return model.apply, model.init(jax.random.key(0), inputs.xs)


def _haiku(suite: Suite, size: Size, inputs: Inputs, unroll: int) -> tuple[Apply, Any]:
    haiku = importlib.import_module("haiku")

    def run(xs: jax.Array) -> jax.Array:
        core = {"lstm": haiku.LSTM, "gru": haiku.GRU}[suite.cell](size.H)
        carry = core.initial_state(xs.shape[0])
        return haiku.dynamic_unroll(core, xs, carry, time_major=False, unroll=unroll)[0]

    model = haiku.without_apply_rng(haiku.transform(run))
    return model.apply, model.init(jax.random.key(0), inputs.xs)


def _equinox(
    suite: Suite, size: Size, inputs: Inputs, unroll: int
) -> tuple[Apply, Any]:
    equinox = importlib.import_module("equinox")

    is_lstm = suite.cell == "lstm"
    make = equinox.nn.LSTMCell if is_lstm else equinox.nn.GRUCell
    cell = make(size.D, size.H, key=jax.random.key(0))
    params, static = equinox.partition(cell, equinox.is_array)

    def apply(params: Any, xs: jax.Array) -> jax.Array:
        cell = equinox.combine(params, static)
        zeros = jax.numpy.zeros(size.H)

        def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            carry = cell(x, carry)
            return carry, carry[0] if is_lstm else carry

        def row(xs: jax.Array) -> jax.Array:
            carry = (zeros, zeros) if is_lstm else zeros
            return jax.lax.scan(step, carry, xs, unroll=unroll)[1]

        return jax.vmap(row)(xs)

    return apply, params


def _keras(suite: Suite, size: Size, inputs: Inputs, unroll: int) -> tuple[Apply, Any]:
    keras = importlib.import_module("keras")

    del unroll  # Keras unrolls all of T or nothing
    make = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[suite.cell]

    def rnn() -> Any:
        return make(size.H, return_sequences=True)

    layers = [rnn()]
    if suite.bidirectional:
        layers = [keras.layers.Bidirectional(rnn()) for _ in range(2)]
    shape = inputs.xs.shape
    for layer in layers:
        layer.build(shape)
        shape = (*shape[:2], inputs.cotangent.shape[-1])
    params = [[v.value for v in layer.trainable_variables] for layer in layers]
    rest = [[v.value for v in layer.non_trainable_variables] for layer in layers]

    def apply(params: Any, xs: jax.Array, lengths: Any = None) -> jax.Array:
        mask = {}
        if lengths is not None:
            mask["mask"] = jax.numpy.arange(xs.shape[1])[None] < lengths[:, None]
        for layer, own, other in zip(layers, params, rest, strict=True):
            xs, _ = layer.stateless_call(own, other, xs, **mask)
        return xs

    return apply, params


JAX_LIBRARIES: dict[str, Callable[..., tuple[Apply, Any]]] = {
    "nnx": _nnx,
    "linen": _linen,
    "haiku": _haiku,
    "equinox": _equinox,
    "keras": _keras,
}


def _torch(suite: Suite, size: Size, threads: int) -> Program:
    torch = importlib.import_module("torch")

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if suite.kind == "language":
        return _torch_language(torch, suite, size)
    inputs = make_inputs(suite, size)
    xs = torch.from_numpy(inputs.xs)
    if suite.kind == "step":
        cell, x = torch.nn.LSTMCell(size.D, size.H), xs[:, 0].contiguous()
        carry = None

        def step() -> None:
            nonlocal carry
            with torch.inference_mode():
                carry = cell(x, carry)

        return Program({"call": step})

    make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[suite.cell]
    two = suite.bidirectional
    layer = make(
        size.D, size.H, num_layers=1 + two, batch_first=True, bidirectional=two
    )
    cotangent = torch.from_numpy(inputs.cotangent)
    lengths = None if inputs.lengths is None else torch.from_numpy(inputs.lengths)

    def apply(xs: Any) -> Any:
        if lengths is None:
            return layer(xs)[0]
        rnn = torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(
            xs, lengths, batch_first=True, enforce_sorted=False
        )
        ys, _ = layer(packed)
        return rnn.pad_packed_sequence(ys, batch_first=True, total_length=size.T)[0]

    def forward() -> None:
        with torch.inference_mode():
            apply(xs)

    wanted = [xs.requires_grad_(suite.train), *layer.parameters()]

    def backward() -> None:
        torch.autograd.grad(apply(xs), wanted, cotangent)

    return Program({"call": backward if suite.train else forward})


def _torch_language(torch: Any, suite: Suite, size: Size) -> Program:
    nn, functional = torch.nn, torch.nn.functional
    embed = nn.Embedding(suite.vocab_size, size.D)
    body = nn.LSTM(size.D, size.H, num_layers=suite.num_layers, batch_first=True)
    head = nn.Linear(size.H, suite.vocab_size)
    params = list(nn.ModuleList([embed, body, head]).parameters())
    clip = suite.num_layers > 1
    tx = torch.optim.SGD(params, 1.0) if clip else torch.optim.Adam(params, 1e-3)
    pool, carry = itertools.cycle(make_tokens(suite, size)), None

    def call() -> None:
        nonlocal carry
        tokens = torch.from_numpy(next(pool)).long()
        if carry is not None:
            carry = tuple(part.detach() for part in carry)
        tx.zero_grad(set_to_none=True)
        ys, carry = body(embed(tokens[:, :-1]), carry)
        logits = head(ys).flatten(0, 1)
        loss = functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(params, 5.0)
        tx.step()

    return Program({"call": call}, {"tokens": size.B * size.T})
