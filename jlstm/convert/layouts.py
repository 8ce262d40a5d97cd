"""Layouts that several libraries share: a matrix a gate, and convolutions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from jlstm.cells import ConvLSTM
from jlstm.convert.cells import (
    Weights,
    emits,
    fold,
    reorder,
    shapes,
    sizes,
)
from jlstm.convert.parts import Part, Place
from jlstm.convert.tensors import Leaves, Tensors, text

I_G_F_O = (0, 2, 1, 3)  # from that order to i, f, g, o, and back


def find_places(
    tensors: Tensors, numbered: str, single: str, sides: tuple[str, str]
) -> list[Place]:
    """Tells layers and directions from the beginnings of names.

    Args:
      tensors: by name.
      numbered: a pattern of a layer of a stack, whose group is its number.
      single: what a cell's names begin with in a layer of one direction.
      sides: the same in a layer of two, forward first.
    """
    names: dict[int | None, list[str]] = {}
    for name in tensors:
        match = re.match(numbered, name)
        number, rest = (int(match[1]), name[match.end() :]) if match else (None, name)
        names.setdefault(number, []).append(rest)
    numbers = sorted(number for number in names if number is not None) or [None]
    places = []
    for level, number in enumerate(numbers):
        directions = 1 + any(name.startswith(sides) for name in names[number])
        bare = not any(name.startswith((single, *sides)) for name in names[number])
        places += [
            Place(level, number or 0, direction, directions, number is not None, bare)
            for direction in range(directions)
        ]
    return places


def read_gates(
    leaves: Leaves,
    cell: Any,
    inputs: tuple[str, ...],
    carries: tuple[str, ...],
    biased: tuple[str, ...],
) -> Weights:
    """Reads kernels and biases of each gate."""
    size, out = cell.hidden_size, emits(cell)

    def join(names: tuple[str, ...], *shape: int | str) -> np.ndarray:
        return np.concatenate([leaves.take(n, *shape) for n in names], axis=-1)

    w_ih = join(tuple(f"{n}/kernel" for n in inputs), leaves.inputs, size)
    w_hh = join(tuple(f"{n}/kernel" for n in carries), out, size)
    zeros = np.zeros(size, w_hh.dtype)
    b, b_hh = (
        np.concatenate(
            [leaves.take(f"{n}/bias", size) if n in biased else zeros for n in names]
        )
        for names in (inputs, carries)
    )
    return Weights(w_ih, w_hh, b, b_hh)


def write_gates(
    part: Part,
    weights: Weights,
    inputs: tuple[str, ...],
    carries: tuple[str, ...],
    biased: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """Writes kernels and biases of each gate."""
    b, apart = fold(part.cell, weights)
    count = len(inputs)
    arrays: dict[str, np.ndarray] = {}
    for names, w in ((inputs, weights.w_ih), (carries, weights.w_hh)):
        kernels = np.split(w, count, axis=-1)
        arrays |= {f"{n}/kernel": k for n, k in zip(names, kernels, strict=True)}
    sums = zip(inputs, carries, np.split(b, count), strict=True)
    arrays |= {f"{i if i in biased else h}/bias": bias for i, h, bias in sums}
    if apart is not None:
        arrays[f"{carries[-1]}/bias"] = apart
    return arrays


def forget(cell: Any, like: np.ndarray) -> np.ndarray:
    """What some libraries add to the gates i, f, g, o in each step: 1 to f."""
    return np.repeat(np.array([0, 1, 0, 0], like.dtype), cell.hidden_size)


def why_not_plain(cell: ConvLSTM) -> str | None:
    """Says why a cell on a grid is none of those that only have a kernel."""
    plain = {1}.issuperset(sizes(cell, "strides") + sizes(cell, "dilation"))
    if plain and cell.padding == "SAME":
        return None
    return "its convolution has padding 'SAME', and no strides or dilation"


def no_grid(leaves: Leaves, leaf: str) -> ValueError:
    """Makes the error of a convolution that no layer was given for."""
    hint = (
        "; give layer=, such as RNN(ConvLSTM(...)), because the weights do not tell "
        "its spatial shape"
    )
    return leaves.error(leaf, "no convolution", text(leaves.shape(leaf, "")), hint)


def read_grid(
    leaves: Leaves, cell: ConvLSTM, modules: tuple[str, str], names: tuple[str, str]
) -> Weights:
    """Reads two convolutions, gates i, g, f, o, where 1 is added to f in each step."""
    shape = shapes(cell, leaves.inputs)
    kernels = [
        leaves.take(f"{module}/{names[0]}", *shape[ours])
        for module, ours in zip(modules, ("w_ih", "w_hh"), strict=True)
    ]
    biases = [np.zeros(4 * cell.hidden_size, kernels[0].dtype)] * 2
    if any(f"{module}/{names[1]}" in leaves for module in modules):
        biases = [
            leaves.take(f"{module}/{names[1]}", *shape["b"]) for module in modules
        ]
    w_ih, w_hh, b, b_hh = (reorder(a, I_G_F_O) for a in kernels + biases)
    return Weights(w_ih, w_hh, b + forget(cell, b), b_hh)


def write_grid(
    part: Part, weights: Weights, modules: tuple[str, str], names: tuple[str, str]
) -> dict[str, np.ndarray]:
    """Undoes :func:`read_grid`; the second bias is zero."""
    b = weights.b - forget(part.cell, weights.b)
    whole = (weights.w_ih, weights.w_hh, b, np.zeros_like(b))
    leaves = [f"{module}/{name}" for name in names for module in modules]
    arrays = (reorder(array, I_G_F_O) for array in whole)
    return dict(zip(leaves, arrays, strict=True))
