"""Prints a table of all cells: oracle, errors, speed of the fused loop, lines.

::

    python tests/cell_table.py              # about five minutes on two cores
    python tests/cell_table.py --only LSTM  # of cells whose name has this in it

Errors are the largest of the scan and the fused loop in float64, and of the fused loop
in float32, against the NumPy oracle of ``tests/oracles``; a gradient is compared by
slopes along random directions. Speed is how many times as fast as the scan the fused
loop is, for the gradients of all params, in float32: medians of rounds that take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from tests.oracles import Case, errors
from tests.test_oracles import CASES, case_of

# Of the benchmark: T, B, D, H.
SIZES = ((100, 32, 128, 128), (35, 20, 200, 200))
ROUNDS = 5


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--no-speed", action="store_true")
    options = parser.parse_args()
    columns = [
        "cell",
        "oracle",
        "f64 value",
        "f64 gradient",
        "f32 value",
        "f32 gradient",
    ]
    sizes = () if options.no_speed else SIZES
    columns += [f"fused / scan at {size}" for size in sizes] + ["loop", "lines"]
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    for case in map(case_of, CASES):
        if options.only in str(case):
            print("|", " | ".join(row(case, sizes)), "|", flush=True)


def row(case: Case, sizes: tuple[tuple[int, ...], ...]) -> list[str]:
    """Makes the entries of a cell."""
    wide = [errors(case, name) for name in ("scan", "fused")]
    narrow = errors(case, "fused", "float32")
    found = [max(error[key] for error in wide) for key in ("value", "gradient")]
    found += [narrow["value"], narrow["gradient"]]
    explanation = jlstm.explain(enlarged(case.cell, 8))
    loop = explanation.note or explanation.implementation
    return [
        f"`{case}`",
        case.source,
        *(f"{error:.0e}" for error in found),
        *(f"{speed(case, size):.2f}" for size in sizes),
        loop.partition(":")[0],
        str(lines_of(case.cell)),
    ]


def enlarged(cell: Any, size: int) -> Any:
    """Gives a cell, or the cell in a wrapper, another size, and its parts as well."""
    if hasattr(cell, "cell"):
        return dataclasses.replace(cell, cell=enlarged(cell.cell, size))
    size -= size % getattr(cell, "num_heads", 1)
    sizes = {"hidden_size": size}
    for name in ("proj_size", "state_size", "key_size"):
        if (part := getattr(cell, name, None)) is not None:
            sizes[name] = part * size // cell.hidden_size
    return dataclasses.replace(cell, **sizes)


def speed(case: Case, size: tuple[int, ...]) -> float:
    """Times the fused loop beside the scan."""
    time_steps, batch, features, hidden = size
    spatial = max(leaf.ndim for leaf in jax.tree.leaves(case.x)) > 1
    if spatial:
        features = hidden = 16  # channels
    if isinstance(case.cell, jlstm.ResidualCell):
        features = hidden
    cell = enlarged(case.cell, hidden)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> jax.Array:
        # A time that has elapsed stays one.
        axes = (*leaf.shape[:-1], features) if leaf.shape[-1:] > (1,) else leaf.shape
        drawn = rng.random((batch, time_steps, *axes))
        return jnp.asarray(drawn > 0.5 if leaf.dtype == bool else drawn, leaf.dtype)

    xs = jax.tree.map(draw, case.x)
    params = cell.init(jax.random.key(0), jax.tree.map(lambda x: x[:, 0], xs))

    def gradient(implementation: str) -> Callable[[], Any]:
        def loss(params: Any, xs: Any) -> jax.Array:
            ys, _ = jlstm.unroll(cell, params, xs, implementation=implementation)
            return jnp.sum(jnp.square(ys))

        compiled = jax.jit(jax.grad(loss, argnums=0))
        return lambda: jax.block_until_ready(compiled(params, xs))

    runs = [gradient(name) for name in ("scan", "fused")]
    for run in runs:
        run()
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for run in runs:
            began = time.perf_counter()
            for _ in range(3):
                run()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return float(np.median(ratios))


def lines_of(cell: Any) -> int:
    """Counts the lines of the file that defines a cell."""
    return len(Path(inspect.getfile(type(cell))).read_text().splitlines())


if __name__ == "__main__":
    main()
