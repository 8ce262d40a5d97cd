"""How far gradients reach at initialisation: the norm of dh_T/dh_0 against T.

A gradient that goes back over T steps is multiplied by the Jacobian dh_T/dh_0. If the
norm of the Jacobian falls, what happened T steps ago cannot be learned; if it rises,
learning is unstable. This script computes the norm (the largest singular value) for
many cells before any training, on random inputs. Each curve is the median over rows.

    python experiments/gradient_health.py --workdir runs/gradient_health

Papers: Hochreiter, Untersuchungen zu dynamischen neuronalen Netzen, 1991; Bengio,
Simard & Frasconi, Learning long-term dependencies with gradient descent is difficult,
1994.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import numpy as np

import jlstm
from jlstm import diagnostics, train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """Options of the measurement."""

    length: int = 500
    """Largest number of steps, T."""
    hidden_size: int = 32
    """Hidden units of each cell, and features of its inputs."""
    input_scale: float = 0.1
    """Standard deviation of the inputs; larger inputs saturate gates, which forget
    sooner."""
    batch_size: int = 8
    """Rows of the batch, over which the median is taken."""


OTHERS = ("LSTM, forget bias 1", "GRU", "Elman, orthogonal", "Elman, Glorot weights")
PRESETS = {
    "cpu": Config(),
    "smoke": Config(length=12, hidden_size=4, batch_size=2),
    "paper": Config(length=2_000, hidden_size=128, batch_size=32),
}


def cells(config: Config) -> dict[str, dict[str, Any]]:
    """Makes the cells by name, grouped into panels."""
    size, init = config.hidden_size, jlstm.init
    elman = functools.partial(jlstm.Elman, size)
    return {
        "simple": {
            "Elman, Glorot weights": elman(w_hh_init=init.glorot_uniform),
            "Elman, orthogonal": elman(),
            "IRNN": elman(activation=jax.nn.relu, w_hh_init=init.Identity()),
            "IndRNN": jlstm.IndRNN(size),
        },
        "gated": {
            "LSTM, forget bias 0": jlstm.LSTM(size, forget_bias=0.0),
            "LSTM, forget bias 1": jlstm.LSTM(size),
            "LSTM, chrono": jlstm.LSTM(size, forget_bias=init.Chrono(config.length)),
            "GRU": jlstm.GRU(size),
            "MGU": jlstm.MGU(size),
            "CIFG": jlstm.CIFG(size),
        },
        "extended, linear": {
            "sLSTM": jlstm.SLSTM(size),
            "minLSTM": jlstm.MinLSTM(size),
            "minGRU": jlstm.MinGRU(size),
            "LRU": jlstm.LRU(size),
            "LRU, r from 0.99 on": jlstm.LRU(size, r_min=0.99, r_max=0.999),
        },
    }


def norms(config: Config, cell: Any) -> diagnostics.JacobianNorms:
    """Computes the norms of dh_t/dh_0 for t from 1 on.

    For a cell without an h, such as the LRU, it takes the whole carry.
    """
    keys = jax.random.split(jax.random.key(config.seed))
    shape = (config.batch_size, config.length, config.hidden_size)
    xs = config.input_scale * jax.random.normal(keys[0], shape)
    params = cell.init(keys[1], xs[:, 0])
    part = "h" if hasattr(cell.init_carry(params, (1,)), "h") else None
    return diagnostics.jacobian_norms(cell, params, xs, part=part, anchor="first")


def plot(
    found: dict[str, dict[str, diagnostics.JacobianNorms]], workdir: train.Workdir
) -> None:
    """Plots the norms over T, one panel for each family of cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with diagnostics.style():
        figure, panels = pyplot.subplots(1, len(found), figsize=(12, 3.6), sharey=True)
        for panel, (family, curves) in zip(panels, found.items(), strict=True):
            for name, curve in curves.items():
                panel.plot(curve.lags, np.maximum(curve.median, 1e-12), label=name)
            panel.set(xscale="log", yscale="log", xlabel="T", title=family)
            panel.set_ylim(1e-8, 1e4)
            panel.legend(loc="lower left")
        panels[0].set_ylabel("largest singular value of $dh_T / dh_0$")
        figure.savefig(workdir.plots / "gradient_health.png")
        pyplot.close(figure)


def main(config: Config) -> dict[str, Any]:
    """Measures all cells, plots the norms, and writes the result."""
    workdir = train.Workdir(config, experiment="gradient_health")
    if workdir.result is not None:
        return workdir.result
    print(train.describe(config))
    found = {
        family: {name: norms(config, cell) for name, cell in members.items()}
        for family, members in cells(config).items()
    }
    plot(found, workdir)
    each = {
        name: norms for members in found.values() for name, norms in members.items()
    }
    curves = {name: norms.median for name, norms in each.items()}
    write = train.write_jsonl(workdir.metrics)
    for t in range(1, config.length + 1):
        at_t = {name: float(curve[t - 1]) for name, curve in curves.items()}
        write(train.Report(t, config.length, cast(Any, None), at_t))
    at = [t for t in (1, 10, 100, config.length) if t <= config.length]
    print(f"{'':24}{'half-life':>10}" + "".join(f"{f'T = {t}':>12}" for t in at))
    for name, curve in curves.items():
        row = "".join(f"{curve[t - 1]:>12.2g}" for t in at)
        print(f"{name:24}{each[name].half_life:>10}{row}")
    return workdir.write_result(
        metric=f"norm of dh_T/dh_0 at T = {config.length}, LSTM, chrono initialisation",
        value=curves["LSTM, chrono"][-1],
        others={name: curves[name][-1] for name in OTHERS},
        floor=curves["LSTM, forget bias 0"][-1],
        floor_name="LSTM, forget bias 0",
        lower_is_better=False,
        half_lives={name: float(norms.half_life) for name, norms in each.items()},
    )


if __name__ == "__main__":
    train.run(main, PRESETS)
