"""How far gradients reach at initialisation: the norm of dh_T/dh_0 against T.

A gradient that goes back over T steps is multiplied by the Jacobian dh_T/dh_0. Where
its norm falls, what happened T steps ago cannot be learned; where it rises, learning is
unstable. This is the largest singular value of that Jacobian for many cells, before any
training, on noise: the median over rows.

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
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jlstm
from jlstm import train


@dataclasses.dataclass(frozen=True)
class Config(train.Options):
    """Options of the experiment."""

    length: int = 500
    """The greatest T."""
    hidden_size: int = 32
    """Width of the layer, and of its inputs."""
    input_scale: float = 0.1
    """Deviation of the inputs; large ones saturate, and forget sooner."""
    batch_size: int = 8
    """Rows, of which the median is taken."""


PRESETS = {
    "cpu": Config(),
    "smoke": Config(length=12, hidden_size=4, batch_size=2),
    "paper": Config(length=2_000, hidden_size=128, batch_size=32),
}


def cells(config: Config) -> dict[str, dict[str, Any]]:
    """The cells by name, in panels."""
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


def norms(config: Config, cell: Any) -> np.ndarray:
    """Computes the norms ``[T]`` of dh_t/dh_0, t from 1 on.

    Of a cell without an h, such as the LRU, the whole carry counts.
    """
    keys = jax.random.split(jax.random.key(config.seed))
    shape = (config.batch_size, config.length, config.hidden_size)
    xs = config.input_scale * jax.random.normal(keys[0], shape)
    params = cell.init(keys[1], xs[:, 0])
    fresh = cell.init_carry(params, (1,))
    start, unravel = ravel_pytree(fresh)
    marks = jax.tree_util.tree_map_with_path(mark, fresh)
    chosen = np.flatnonzero(ravel_pytree(marks)[0])
    chosen = chosen if chosen.size else np.arange(start.size)

    def hidden(h: jax.Array, x: jax.Array) -> jax.Array:
        """The h of all steps ``[T, H]`` of one row, from its first."""
        carry = unravel(start.at[chosen].set(h))
        _, _, carries = jlstm.unroll(
            cell, params, x[None], carry, return_carries=True, implementation="scan"
        )
        rows = [leaf.reshape(config.length, -1) for leaf in jax.tree.leaves(carries)]
        return jnp.concatenate(rows, axis=-1)[:, chosen]

    # The outputs are more than the inputs, so that forward mode is the quicker.
    jacobians = jax.jit(jax.vmap(jax.jacfwd(hidden), (None, 0)))
    found = np.asarray(jacobians(start[chosen], xs), np.float64)
    return np.median(np.linalg.norm(found, 2, axis=(-2, -1)), axis=0)


def mark(path: Any, leaf: jax.Array) -> jax.Array:
    """Marks what belongs to h."""
    name = jax.tree_util.keystr(path, simple=True)
    return jnp.full_like(leaf, name in ("h", ""))


def half_life(found: np.ndarray) -> float:
    """Steps until a norm is half of what it is after one step, and stays below."""
    above = np.flatnonzero(found >= found[0] / 2)
    return float(above[-1] + 1)


def plot(found: dict[str, dict[str, np.ndarray]], workdir: train.Workdir) -> None:
    """Plots the norms over T, a panel a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(found), figsize=(12, 3.6), sharey=True, layout="constrained"
    )
    colors = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]
    for panel, (family, curves) in zip(panels, found.items(), strict=True):
        for (name, curve), color in zip(curves.items(), colors, strict=False):
            steps = np.arange(1, len(curve) + 1)
            panel.plot(steps, np.maximum(curve, 1e-12), label=name, color=color, lw=1.6)
        panel.set(xscale="log", yscale="log", xlabel="T", title=family)
        panel.set_ylim(1e-8, 1e4)
        panel.grid(alpha=0.25, lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, loc="lower left")
    panels[0].set_ylabel(r"largest singular value of $\partial h_T / \partial h_0$")
    figure.savefig(workdir.plots / "gradient_health.png", dpi=150)
    pyplot.close(figure)


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment."""
    workdir = train.Workdir(config, experiment="gradient_health")
    if workdir.result is not None:
        return workdir.result
    print(train.describe(config))
    found = {
        family: {name: norms(config, cell) for name, cell in members.items()}
        for family, members in cells(config).items()
    }
    plot(found, workdir)
    curves = {
        name: curve for members in found.values() for name, curve in members.items()
    }
    write = train.write_jsonl(workdir.metrics)
    for t in range(1, config.length + 1):
        at_t = {name: float(curve[t - 1]) for name, curve in curves.items()}
        write(train.Report(t, config.length, cast(Any, None), at_t))
    at = [t for t in (1, 10, 100, config.length) if t <= config.length]
    print(f"{'':24}{'half-life':>10}" + "".join(f"{f'T = {t}':>12}" for t in at))
    for name, curve in curves.items():
        row = "".join(f"{curve[t - 1]:>12.2g}" for t in at)
        print(f"{name:24}{half_life(curve):>10.0f}{row}")
    return workdir.write_result(
        metric=f"norm of dh_T/dh_0 at T = {config.length}, LSTM, chrono initialisation",
        value=curves["LSTM, chrono"][-1],
        floor=curves["Elman, Glorot weights"][-1],
        floor_name="simple recurrent network, Glorot weights",
        lower_is_better=False,
        half_lives={name: half_life(curve) for name, curve in curves.items()},
    )


if __name__ == "__main__":
    train.run(main, PRESETS)
