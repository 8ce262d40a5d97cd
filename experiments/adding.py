"""The adding problem: remembering two numbers over hundreds of steps.

Each of T steps shows a number from U(0, 1) and a mark. Two steps are marked, one in
each half. After the last step the network must answer the sum of the two marked
numbers. Always answering 1 gives a mean squared error of 1/6, which is the floor. An
LSTM learns to keep the two numbers; a simple recurrent network (Elman) forgets them.

    python experiments/adding.py --workdir runs/adding
    python experiments/adding.py --preset cpu --lengths 100 400

The gate biases of the LSTM begin with chrono initialisation (Tallec & Ollivier, 2018),
which spreads its memory times over the length of the sequence. The Elman network begins
with an orthogonal recurrent matrix. Both are trained alike, on sequences that are drawn
anew for each update, and scored on the same 2,000 others.

Paper: Hochreiter & Schmidhuber, Long short-term memory, 1997, experiment 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from jlstm import diagnostics, train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """Options of the adding problem."""

    lengths: tuple[int, ...] = (100, 400)
    """Lengths T of the sequences; each network is trained once for each length."""
    hidden_size: int = 64
    """Hidden units of each network."""
    batch_size: int = 64
    """Sequences in each update."""
    num_steps: int = 2_500
    """Updates of each network."""
    learning_rate: float = 4e-3
    """Highest learning rate of the schedule."""
    schedule: train.Schedule = train.Cosine(warmup=0.05)
    """How the learning rate rises and falls."""
    test_size: int = 2_000
    """Sequences on which each network is scored at the end."""


PRESETS = {
    "cpu": Config(),
    "smoke": Config(
        lengths=(8,), hidden_size=8, batch_size=8, num_steps=40, test_size=50
    ),
    "paper": Config(lengths=(100, 500, 1_000), num_steps=50_000, learning_rate=1e-3),
}


def draw(rng: np.random.Generator, batch: int, length: int) -> dict[str, np.ndarray]:
    """Draws sequences: ``xs [B, T, 2]`` and their answers ``[B]``."""
    numbers = rng.random((batch, length), np.float32)
    marks = np.zeros((batch, length), np.float32)
    rows = np.arange(batch)
    marks[rows, rng.integers(0, length // 2, batch)] = 1
    marks[rows, rng.integers(length // 2, length, batch)] = 1
    return {"xs": np.stack([numbers, marks], -1), "answer": (numbers * marks).sum(1)}


def stream(seed: int, batch: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Draws batches without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield draw(rng, batch, length)


def cells(config: Config, length: int) -> dict[str, jlstm.Cell]:
    """Makes the cells of the two networks, by name."""
    chrono = jlstm.init.Chrono(length)
    return {
        "LSTM": jlstm.LSTM(config.hidden_size, forget_bias=chrono),
        "Elman": jlstm.Elman(config.hidden_size),
    }


def fit_one(
    config: Config, workdir: train.Workdir, name: str, cell: jlstm.Cell, length: int
) -> float:
    """Trains one network on sequences of one length, and returns its test error."""
    model = jlstm.Classifier(jlstm.RNN(cell), num_classes=1)

    def loss_fn(params, batch, *, key, carry):
        answer, _ = model.apply(params, batch["xs"])
        return train.squared_error(answer[:, 0], batch["answer"]), train.Aux({})

    shared = train.data_parallel(loss_fn, config.devices)
    tx = train.adamw(
        config.learning_rate,
        num_steps=config.num_steps,
        schedule=config.schedule,
        weight_decay=0.0,
    )
    batches = stream(config.seed + length, config.batch_size, length)
    params = model.init(jax.random.key(config.seed), jnp.asarray(next(batches)["xs"]))
    print(f"{name}, T = {length}, {cell!r}")
    report = train.fit(
        train.create_state(params, tx),
        train.make_train_step(shared, tx, debug_nans=config.debug_nans),
        batches,
        num_steps=config.num_steps,
        hooks=workdir.watchers(f"{name.lower()}_{length}", unit="sequences"),
        log_every=max(config.num_steps // 100, 1),
        checkpoints=workdir.checkpoints(f"{name.lower()}_{length}"),
    )
    test = stream(config.seed + 1_000_000 + length, config.test_size, length)
    eval_step = train.make_eval_step(shared)
    score = train.evaluate(eval_step, report.state.params, [next(test)])
    return score["loss"]


def plot(config: Config, workdir: train.Workdir, floor: float) -> None:
    """Plots the errors of all networks over the updates, one panel for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with diagnostics.style():
        figure, panels = pyplot.subplots(
            1,
            len(config.lengths),
            figsize=(4.5 * len(config.lengths), 3.4),
            sharey=True,
            squeeze=False,
        )
        for panel, length in zip(panels[0], config.lengths, strict=True):
            for name in cells(config, length):
                records = train.read_jsonl(
                    workdir.metrics_of(f"{name.lower()}_{length}")
                )
                steps = [record["step"] for record in records]
                panel.plot(steps, [record["loss"] for record in records], label=name)
            panel.axhline(floor, color="#555555", ls="--", lw=1, label="answering 1")
            panel.set(title=f"T = {length}", xlabel="updates", yscale="log")
        panels[0, 0].set_ylabel("mean squared error")
        panels[0, -1].legend()
        figure.savefig(workdir.plots / "adding.png")
        pyplot.close(figure)


def main(config: Config) -> dict:
    """Trains both networks at each length, and scores them."""
    if config.data is not None:
        raise ValueError("adding: takes no --data; its sequences are drawn")
    if not config.lengths or min(config.lengths) < 3:
        raise ValueError(f"adding: lengths must be at least 3, got {config.lengths}")
    workdir = train.Workdir(config, experiment="adding")
    if workdir.result is not None:
        return workdir.result
    print(train.describe(config))
    errors = {
        f"{name}_{length}": fit_one(config, workdir, name, cell, length)
        for length in config.lengths
        for name, cell in cells(config, length).items()
    }
    # The same test sequences, answered by the mean: 1.
    rng = np.random.default_rng(config.seed + 1_000_000 + max(config.lengths))
    answers = draw(rng, config.test_size, max(config.lengths))["answer"]
    floor = float(np.mean((answers - 1.0) ** 2))
    plot(config, workdir, floor)
    for name, error in errors.items():
        print(f"{name}: mean squared error {error:.4f} (floor {floor:.4f})")
    return workdir.write_result(
        metric=f"mean squared error of the LSTM at T = {max(config.lengths)}",
        value=errors[f"LSTM_{max(config.lengths)}"],
        others={"Elman net": errors[f"Elman_{max(config.lengths)}"]},
        floor=floor,
        floor_name="answering 1",
        lower_is_better=True,
        errors=errors,
    )


if __name__ == "__main__":
    train.run(main, PRESETS)
