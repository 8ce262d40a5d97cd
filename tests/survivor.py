"""A run to be killed: an LSTM with dropout, AdamW, a carry, and shuffled lanes.

``python tests/survivor.py --workdir DIR --num-steps 200``; the tests start it, stop it
in every way there is, start it again, and compare ``state_sha256``.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import data, train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """Options of the run."""

    num_steps: int = 60
    """Updates."""
    hidden_size: int = 8
    """Of the LSTM."""
    batch_size: int = 4
    """Lanes."""
    dropout: float = 0.3
    """Of the LSTM's outputs."""
    learning_rate: float = 1e-2
    """Of AdamW."""
    symbols: int = 2_000
    """In the stream."""
    log_every: int = 10
    """Steps between reports."""
    slow_data: float = train.indifferent(0.0)
    """Seconds for which each batch is waited."""
    slow_eval: float = train.indifferent(0.0)
    """Seconds that each evaluation takes."""
    poison: tuple[int, ...] = ()
    """Batches whose loss is NaN."""
    max_skipped: int = 5
    """Steps in a row that may be skipped."""
    keep: int = train.indifferent(2)
    """Checkpoints."""


PRESETS = {"test": Config()}


def main(config: Config) -> dict[str, Any]:
    """Trains."""
    workdir = train.Workdir(config, experiment="survivor")
    if workdir.result is not None:
        return workdir.result
    stream = np.random.default_rng(config.seed).integers(0, 7, config.symbols)
    layer = jlstm.stack(
        jlstm.RNN(jlstm.LSTM(config.hidden_size)), jlstm.Dropout(config.dropout)
    )
    model = jlstm.LanguageModel(layer, 7, 5)
    params = model.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))

    def loss_fn(params, batch, *, key, carry):
        ys, carry = model.apply(
            params, batch["inputs"], carry, key=key, resets=batch["resets"]
        )
        loss = train.softmax_cross_entropy(ys, batch["targets"])
        factor = jnp.where(batch["bad"].any(), jnp.nan, 1.0)
        loss = train.Mean(loss.total * factor, loss.count)
        return loss, train.Aux({}, carry)

    shared = train.data_parallel(loss_fn, config.devices)
    lanes = data.lanes(
        stream, batch_size=config.batch_size, length=6, segment=2, seed=config.seed
    )

    # What the fingerprint reads is at hand.
    probed = (-1, 0, 1, len(lanes) // 2, len(lanes))

    def spoil(index: int, batch: Any) -> dict[str, np.ndarray]:
        if index not in probed:
            time.sleep(config.slow_data)
        bad = np.full((config.batch_size,), index in config.poison)
        return batch | {"bad": bad}

    batches = lanes.repeat().map_with_index(spoil)
    tx = train.adamw(
        config.learning_rate, schedule=train.Cosine(0.1), num_steps=config.num_steps
    )
    state = train.create_state(
        params,
        tx,
        key=jax.random.key(1) if config.dropout else None,
        carry=model.init_carry(params, (config.batch_size,)),
        ema=True,
    )
    eval_step = train.make_eval_step(shared)

    def held_out():
        for index in range(2):
            time.sleep(config.slow_eval / 2)
            yield spoil(-1, lanes[index])

    carry = model.init_carry(params, (config.batch_size,))
    score = train.evaluate_every(
        20, lambda p, b, c=None: eval_step(p, b, carry if c is None else c), held_out
    )
    report = train.fit(
        state,
        train.make_train_step(shared, tx, ema_decay=0.99, debug_nans=config.debug_nans),
        batches,
        num_steps=config.num_steps,
        hooks=[
            score,
            train.keep_best("validation_loss"),
            train.early_stopping("validation_loss", patience=10**9),
            *workdir.watchers(unit="symbols"),
        ],
        log_every=config.log_every,
        checkpoints=workdir.checkpoints(best="validation_loss", keep=config.keep),
        max_skipped=config.max_skipped,
    )
    return workdir.write_result(
        metric="loss",
        value=report.metrics["validation_loss"],
        floor=np.log(7),
        floor_name="uniform",
        lower_is_better=True,
        skipped=report.skipped,
    )


if __name__ == "__main__":
    train.run(main, PRESETS)
