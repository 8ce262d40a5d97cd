"""Loops that take many steps at once, beside those that take one: errors and times.

::

    python tests/parallel_forms.py

prints for each cell and length the largest difference of values and of gradients to the
step form, ``scan``, relative to the largest of each array, in float32; and the medians
of times, taken in turns, of a forward pass and of a gradient. It takes some minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlstm

# The matrices of an mLSTM at each step, or of all pairs of steps, are too many.
LONG = 10_000
LINEAR = ("scan", "fused", "associative")
CHUNKED = {False: ("scan", "fused", "chunkwise", "parallel"), True: ("chunkwise",)}


def main() -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    size = given.hidden_size
    cells = [jlstm.MinLSTM(size), jlstm.MinGRU(size), jlstm.LRU(size, r_min=0.9)]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; B = {given.batch}")
    head = f"{'':14}{'values':>9}{'gradients':>11}{'forward ms':>12}{'gradient ms':>13}"
    for steps in given.times:
        for cell in (*cells, jlstm.MLSTM(size, num_heads=4)):
            linear = not isinstance(cell, jlstm.MLSTM)
            names = LINEAR if linear else CHUNKED[steps * given.batch > LONG]
            print(f"\n{cell!r}, T = {steps}\n{head}", flush=True)
            compare(cell, steps, names, given)
    return 0


def compare(cell: Any, steps: int, names: tuple[str, ...], given: Any) -> None:
    """Prints the rows of one cell."""
    draw = np.random.default_rng(0).standard_normal
    xs = jnp.asarray(draw((given.batch, steps, given.hidden_size)), jnp.float32)
    params = cell.init(jax.random.key(0), xs[:, 0])
    # Where that is too large for a gradient, some steps are computed twice.
    wide = isinstance(cell, jlstm.MLSTM) and steps * given.batch > LONG
    runs = {name: functions(cell, name) for name in names}
    reference = functions(cell, "scan", "sqrt" if wide else None)
    expected = jax.device_get([run(params, xs) for run in reference])
    errors = {}
    for name, pair in runs.items():
        found = jax.device_get([run(params, xs) for run in pair])
        errors[name] = list(map(difference, found, expected))
    times: dict[str, tuple[list[float], list[float]]] = {n: ([], []) for n in names}
    for _ in range(given.rounds):
        for name, pair in runs.items():
            for run, to in zip(pair, times[name], strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run(params, xs))
                to.append(1e3 * (time.perf_counter() - start))
    middle = {name: list(map(statistics.median, pair)) for name, pair in times.items()}
    best = [min(pair[i] for pair in middle.values()) for i in range(2)]
    for name, (value, gradient) in errors.items():
        columns = f"{value:9.0e}{gradient:11.0e}"
        for width, taken, least in zip((12, 13), middle[name], best, strict=True):
            columns += f"{taken:{width - 1}.1f}{'*' if taken == least else ' '}"
        default = jlstm.explain(cell).implementation == name
        print(f"{name:14}{columns}{'  default' if default else ''}", flush=True)


def functions(cell: Any, name: str, every: Any = None) -> tuple[Callable, Callable]:
    """A forward pass, and a gradient by params and inputs."""
    options: dict[str, Any] = {"implementation": name, "checkpoint_every": every}

    def forward(params: Any, xs: jax.Array) -> Any:
        return jlstm.unroll(cell, params, xs, **options)

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        return jnp.square(forward(params, xs)[0]).mean()

    return jax.jit(forward), jax.jit(jax.grad(loss, argnums=(0, 1)))


def difference(found: Any, expected: Any) -> float:
    """The largest of any array, relative to the largest element of that array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
