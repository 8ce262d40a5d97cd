"""Compares jlstm with torch: values, and the gradients of everything.

Prints a table of the largest relative errors, from the golden files and, where torch is
installed, over the product of cells, depths, directions and shapes (some minutes)::

    python tests/torch_oracle.py
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden import make_golden
from golden.make_golden import Arrays, Case

import jlstm
from jlstm.layers import BidirectionalCarry, BidirectionalParams

IMPLEMENTATIONS = ("scan", "fused")
# Of values and of gradients.
TOLERANCE = {"float64": (1e-10, 1e-10), "float32": (1e-5, 1e-4)}

CELL = {
    "LSTM": partial(jlstm.LSTM, double_bias=True),
    "GRU": partial(jlstm.GRU, double_bias=True),
    "tanh": partial(jlstm.Elman, double_bias=True),
    "relu": partial(jlstm.Elman, activation=jax.nn.relu, double_bias=True),
}
PARAMS = {
    "LSTM": jlstm.LSTMParams,
    "GRU": jlstm.GRUParams,
    "tanh": jlstm.ElmanParams,
    "relu": jlstm.ElmanParams,
}
CARRY = {
    "LSTM": jlstm.LSTMCarry,
    "GRU": jlstm.GRUCarry,
    "tanh": jlstm.ElmanCarry,
    "relu": jlstm.ElmanCarry,
}


def make_layer(case: Case, implementation: str) -> jlstm.Layer:
    """Makes the stack that is torch's module."""
    cell = CELL[case.kind](make_golden.HIDDEN_SIZE)
    make = jlstm.bidirectional if case.directions == 2 else jlstm.RNN
    return jlstm.stack(*[make(cell, implementation=implementation)] * case.layers)


def make_params(case: Case, arrays: Arrays, prefix: str = "") -> Any:
    """Lays out torch's weights, or with ``"d_"`` the gradients, as a stack's params."""

    def cell_params(place: str) -> Any:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return PARAMS[case.kind](*(arrays[f"{prefix}{n}_{place}"].T for n in names))

    return _by_layer(case, map(cell_params, case.places), BidirectionalParams)


def make_carry(case: Case, arrays: Arrays, *names: str) -> Any:
    """Lays out torch's states ``[layers * directions, B, H]`` as a stack's carry."""
    rows = zip(*(arrays[name] for name in names), strict=True)
    carries = (CARRY[case.kind](*row) for row in rows)
    return _by_layer(case, carries, BidirectionalCarry)


def _by_layer(case: Case, parts: Iterable[Any], both: Any) -> tuple[Any, ...]:
    """Groups one part a layer and direction by layer, as a stack does."""
    listed = tuple(parts)
    if case.directions == 1:
        return listed
    return tuple(map(both, listed[::2], listed[1::2]))


def torch_results(case: Case, arrays: Arrays) -> tuple[Any, Any]:
    """Lays out what torch computed as :func:`jlstm_results` does."""
    states = ("h", "c")[: 2 if case.kind == "LSTM" else 1]
    gradients: dict[str, Any] = {
        "params": make_params(case, arrays, "d_"),
        "xs": arrays["d_x"],
    }
    if case.carry:
        names = [f"d_{name}" for name in case.carries]
        gradients["carry"] = make_carry(case, arrays, *names)
    values = {"ys": arrays["ys"], "carry": make_carry(case, arrays, *states)}
    return values, gradients


def jlstm_results(
    case: Case, arrays: Arrays, dtype: str, implementation: str
) -> tuple[Any, Any]:
    """Computes outputs and final carry, and all gradients of their projection."""
    layer = make_layer(case, implementation)
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    inputs: dict[str, Any] = {"params": make_params(case, arrays), "xs": arrays["x"]}
    if case.carry:
        inputs["carry"] = make_carry(case, arrays, *case.carries)
    names = [f"to_{name}" for name in ("h", "c") if f"to_{name}" in arrays]
    projection = {"ys": arrays["to_ys"], "carry": make_carry(case, arrays, *names)}
    lengths = None if case.lengths is None else np.array(case.lengths, np.int32)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        return jax.device_get(_evaluate(layer, inputs, lengths, projection))


@partial(jax.jit, static_argnums=0)
def _evaluate(layer: Any, inputs: Any, lengths: Any, projection: Any) -> Any:
    def project(inputs: Any) -> Any:
        ys, carry = layer.apply(**inputs, lengths=lengths)
        values = {"ys": ys, "carry": carry}
        parts = jax.tree.map(jnp.vdot, values, projection)
        return sum(jax.tree.leaves(parts), jnp.zeros((), ys.dtype)), values

    gradients, values = jax.grad(project, has_aux=True)(inputs)
    return values, gradients


def error(got: Any, expected: Any) -> float:
    """The largest error of the arrays of a tree, each relative to its magnitude."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return float(np.max([_array_error(a, b) for a, b in pairs]))  # keeps a NaN


def _array_error(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape:
        return np.inf
    # An array of zeros has no magnitude: there the error is absolute.
    return np.abs(got - expected).max() / (np.abs(expected).max() or 1.0)


def errors(
    case: Case, arrays: Arrays, dtype: str, implementation: str
) -> tuple[float, float]:
    """The errors of values and of gradients against ``arrays``, which torch made."""
    got = jlstm_results(case, arrays, dtype, implementation)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    values, gradients = map(error, got, torch_results(case, arrays))
    return values, gradients


def live_cases() -> Iterator[Case]:
    """Every cell, depth and direction; packed, unpacked, one row, one step."""
    shapes: list[dict[str, Any]] = [
        {"lengths": (2, 5, 1)},
        {"lengths": None, "carry": False},
        {"lengths": (3,), "batch": 1},
        {"lengths": None, "time": 1},
    ]
    product = itertools.product(CELL, (1, 2, 3), (1, 2), shapes)
    for seed, (kind, layers, directions, shape) in enumerate(product):
        yield Case(kind, layers, directions, seed=seed, **shape)


def _print_table(cases: Iterable[tuple[Case, Arrays]]) -> None:
    columns = [f"{dtype} {what}" for dtype in TOLERANCE for what in ("ys", "grad")]
    print(f"{'case':40}" + "".join(f"{column:>14}" for column in columns), flush=True)
    worst: list[float] = [0.0] * len(columns)
    for case, arrays in cases:
        row: list[float] = []
        for dtype in TOLERANCE:
            pairs = [errors(case, arrays, dtype, way) for way in IMPLEMENTATIONS]
            row += np.max(pairs, axis=0).tolist()
        worst = np.maximum(worst, row).tolist()
        _print_row(case.name, row)
    _print_row("worst", worst)


def _print_row(name: str, row: list[float]) -> None:
    print(f"{name:40}" + "".join(f"{value:14.1e}" for value in row), flush=True)


def main() -> None:
    """Prints the table."""
    # Hundreds of tiny programs: what they cost is their compilation.
    jax.config.update("jax_disable_most_optimizations", True)
    print("golden files; the worse of", " and ".join(IMPLEMENTATIONS))
    _print_table((case, make_golden.load(case)) for case in make_golden.CASES)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no live comparison")
        return
    drawn = ((case, make_golden.draw(case)) for case in live_cases())
    print("\nlive, against the torch that is installed")
    _print_table((c, a | make_golden.run_torch(c, a)) for c, a in drawn)


if __name__ == "__main__":
    main()
