"""The variants of jlstm that are timed: its loops, on one device or two."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlstm
from jlstm import door, train
from jlstm.bench.cases import MGU, Size, Suite
from jlstm.bench.program import (
    Apply,
    Call,
    Program,
    Refused,
    layer_program,
    make_inputs,
    make_tokens,
)
from jlstm.kernels.request import rows_in_one_place


@dataclasses.dataclass(frozen=True)
class Variant:
    """How jlstm runs a recurrence."""

    implementation: str | None = None
    devices: int = 1
    checkpoint_every: int | None = None
    library: bool = True  # the one in C++


VARIANTS = {
    "scan": Variant("scan"),
    "xla": Variant("fused", library=False),
    "one": Variant("fused"),
    "two": Variant("fused", devices=2),
    "native": Variant("native"),
    "checkpoint": Variant(checkpoint_every=256),  # of the default
}
CELLS = {"lstm": jlstm.LSTM, "gru": jlstm.GRU, "mgu": MGU}


def make_program(name: str, suite: Suite, size: Size) -> Program:
    """Makes a variant's program.

    Raises:
      Refused: jlstm has no such implementation for this cell, or JAX too few devices.
    """
    variant, cell = VARIANTS[name], CELLS[suite.cell](size.H)
    if not variant.library:  # read when it is first asked for
        os.environ["JLSTM_NATIVE"] = "0"
    # JAX reads it when it first uses a device.
    jax.config.update("jax_num_cpu_devices", variant.devices)
    if variant.implementation is not None:
        try:
            door.choose(cell, variant.implementation)
        except (ValueError, NotImplementedError) as reason:
            raise Refused(str(reason)) from None
    if len(jax.devices()) < variant.devices:
        raise Refused(f"needs {variant.devices} devices, got {len(jax.devices())}")
    make = {"layer": _layer, "step": _step, "language": _language}[suite.kind]
    return make(variant, cell, suite, size)


def _body(variant: Variant, cell: Any, suite: Suite) -> Any:
    options: dict[str, Any] = {
        "implementation": variant.implementation,
        "checkpoint_every": variant.checkpoint_every,
    }
    if suite.bidirectional:
        layer = jlstm.bidirectional(cell, **options)
        return jlstm.stack(layer, layer)
    layer = jlstm.RNN(cell, **options)
    return jlstm.stack(*[layer] * suite.num_layers) if suite.num_layers > 1 else layer


def _apply(layer: Any) -> Apply:
    def apply(params: Any, xs: jax.Array, lengths: Any = None) -> jax.Array:
        # As in train.data_parallel.
        single = contextlib.nullcontext() if len(xs) > 1 else rows_in_one_place()
        with single:
            return layer.apply(params, xs, lengths=lengths)[0]

    return apply


def _layer(variant: Variant, cell: Any, suite: Suite, size: Size) -> Program:
    layer, inputs = _body(variant, cell, suite), make_inputs(suite, size)
    params = layer.init(jax.random.key(0), inputs.xs)
    return layer_program(
        _apply(layer),
        params,
        inputs,
        train=suite.train,
        devices=min(variant.devices, size.B),  # as train.data_parallel does
    )


def _step(variant: Variant, cell: Any, suite: Suite, size: Size) -> Program:
    layer, xs = _body(variant, cell, suite), make_inputs(suite, size).xs
    params = layer.init(jax.random.key(0), xs)
    carry, x = layer.init_carry(params, xs.shape[:1]), jnp.asarray(xs[:, 0])
    step = jax.jit(functools.partial(jlstm.step, layer))

    def call() -> None:
        nonlocal carry
        carry, _ = jax.block_until_ready(step(params, carry, x))

    return Program({"call": call}, {"compile_s": _seconds(call)})


def _language(variant: Variant, cell: Any, suite: Suite, size: Size) -> Program:
    """Makes a training step of a language model, and the parts that it consists of."""
    body = _body(variant, cell, suite)
    model = jlstm.LanguageModel(body, suite.vocab_size, embed_size=size.D)
    batches = make_tokens(suite, size)
    params = model.init(jax.random.key(0), jnp.asarray(batches[0][:, :-1]))
    tx = optax.adam(1e-3)
    if suite.num_layers > 1:
        tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(1.0))

    def loss_fn(params: Any, batch: Any, *, key: Any, carry: Any) -> Any:
        ys, carry = model.features(params, batch[:, :-1], carry, key=key)
        loss = train.projected_cross_entropy(ys, *model.head(params), batch[:, 1:])
        return loss, train.Aux({}, carry)

    carry = model.init_carry(params, (size.B,))
    state = train.create_state(params, tx, carry=carry)
    shared = train.data_parallel(loss_fn, variant.devices)
    step, pool = train.make_train_step(shared, tx), itertools.cycle(batches)

    def call() -> None:
        nonlocal state
        state, metrics = step(state, next(pool))
        jax.block_until_ready((state, metrics))

    facts = {"compile_s": _seconds(call), "tokens": size.B * size.T}
    calls: dict[str, Call] = {"call": call}
    if variant.devices == 1:
        calls |= _parts(model, params, tx, batches[0], suite, size)
    return Program(calls, facts)


def _parts(
    model: jlstm.LanguageModel,
    params: Any,
    tx: optax.GradientTransformation,
    tokens: np.ndarray,
    suite: Suite,
    size: Size,
) -> dict[str, Call]:
    """Makes the parts of a training step, to be timed by themselves."""
    inputs = make_inputs(suite, size)
    recurrent = layer_program(_apply(model.body), params.body, inputs, train=True)

    # With a body that does nothing, only the embedding and the softmax are left.
    outside = dataclasses.replace(model, body=jlstm.Dropout(0.0))
    outside_params = dataclasses.replace(params, body=())

    @jax.jit
    def outer_gradients(params: Any, tokens: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            ys, _ = outside.features(params, tokens[:, :-1])
            head, labels = outside.head(params), tokens[:, 1:]
            return train.projected_cross_entropy(ys, *head, labels).value

        return jax.grad(loss)(params)

    state = train.create_state(params, tx)
    # As in a training step, the new state reuses the memory of the old one.
    held = (state.params, state.opt_state)

    @jax.jit(donate_argnums=0)
    def update(held: Any, grads: Any) -> Any:
        updates, opt_state = tx.update(grads, held[1], held[0])
        return optax.apply_updates(held[0], updates), opt_state

    def optimise() -> None:
        nonlocal held
        held = jax.block_until_ready(update(held, params))

    return {
        "recurrent": recurrent.calls["call"],
        "softmax and embedding": lambda: jax.block_until_ready(
            outer_gradients(outside_params, tokens)
        ),
        "optimiser": optimise,
    }


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
