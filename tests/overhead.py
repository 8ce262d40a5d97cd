"""What ``fit`` costs beside the steps: hooks, metrics, checkpoints at their defaults.

::

    python tests/overhead.py

times the same steps in a bare loop and by ``fit``, in turns, and prints the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import data, train

BATCH, LENGTH, VOCABULARY = 32, 64, 100


def main() -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--hidden-size", type=int, default=128)
    given = parser.parse_args()
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 1_000_000)
    lanes = data.lanes(stream, batch_size=BATCH, length=LENGTH, seed=0).repeat()
    layer = jlstm.RNN(jlstm.LSTM(given.hidden_size))
    model = jlstm.LanguageModel(layer, VOCABULARY, 32)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

    def loss_fn(params, batch, *, key, carry):
        ys, carry = model.features(params, batch["inputs"], carry)
        loss = train.projected_cross_entropy(ys, *model.head(params), batch["targets"])
        return loss, train.Aux({}, carry)

    tx = train.adamw(1e-3)
    step = train.make_train_step(loss_fn, tx)

    def begin() -> train.TrainState:
        return train.create_state(params, tx, carry=model.init_carry(params, (BATCH,)))

    def bare() -> None:
        state, batches = begin(), iter(lanes)
        for _ in range(given.steps):
            state, _ = step(state, next(batches))
        jax.block_until_ready(state)

    def fitted() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            train.fit(
                begin(), step, lanes, num_steps=given.steps,
                hooks=[train.write_jsonl(path / "m.jsonl"), train.show_progress()],
                checkpoints=train.Checkpoints(path / "checkpoints"),
            )  # fmt: skip

    def seconds(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    bare()
    pairs = [(seconds(bare), seconds(fitted)) for _ in range(given.rounds)]
    ratio = statistics.median(b / a for a, b in pairs)
    ms = statistics.median(a for a, _ in pairs) / given.steps * 1e3
    print(
        f"a step of {ms:.2f} ms takes {ratio:.3f} times as long in fit, with a line of "
        f"metrics each 50 steps and a checkpoint at the end of {given.steps}"
    )
    return 0 if ratio <= 1.03 else 1


if __name__ == "__main__":
    sys.exit(main())
