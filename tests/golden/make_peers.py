"""Makes the golden files of converters whose libraries the tests do without.

Written with Keras 3.15.1 on JAX, Haiku 0.0.17 and Equinox 0.13.8, in float64, by::

    PYTHONPATH=tests python tests/golden/make_peers.py

A file holds, for each module of a library, weights as the library has them, inputs and
initial states, and what the library computes from them: outputs, final states, and the
gradients of a projection of both, as :mod:`peers` does.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import peers
from peers import Module, of_equinox, of_haiku, of_keras

FOLDER = pathlib.Path(__file__).parent
FAMILIES = {"keras": of_keras, "haiku": of_haiku, "equinox": of_equinox}
MODULES = [module for family in FAMILIES.values() for module in family.MODULES]


def pack(tree: Any) -> tuple[np.ndarray, str]:
    """Lays the arrays of dicts and lists in one, with their places and shapes."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    shapes = {}
    for path, leaf in pairs:
        keys = [str(getattr(key, "key", getattr(key, "idx", None))) for key in path]
        shapes["|".join(keys)] = leaf.shape
    vector = np.concatenate([np.ravel(leaf) for _, leaf in pairs])
    return vector.astype(np.float64), json.dumps(shapes)


def unpack(vector: np.ndarray, shapes: str) -> Any:
    """Undoes :func:`pack`."""
    tree: dict[str, Any] = {}
    for place, shape in json.loads(shapes).items():
        *path, last = place.split("|")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        count = math.prod(shape)
        node[last], vector = vector[:count].reshape(shape), vector[count:]
    return _lists(tree)


def _lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {str(i) for i in range(len(tree))}:
        return [_lists(tree[str(i)]) for i in range(len(tree))]
    return {key: _lists(value) for key, value in tree.items()}


def load(module: Module) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """Reads what was drawn for a module, and what its library computes from that."""
    with np.load(FOLDER / f"peer-{module.peer}.npz") as file:
        whole = unpack(file[module.name], str(file[f"{module.name} shapes"]))
    drawn = whole["drawn"]
    lengths = drawn.get("lengths")
    drawn["lengths"] = None if lengths is None else lengths.astype(np.int32)
    return drawn, (whole["values"], whole["gradients"])


def main() -> None:
    """Writes a file for each library."""
    jax.config.update("jax_enable_x64", True)
    for peer in FAMILIES:
        contents: dict[str, Any] = {}
        for module in (module for module in MODULES if module.peer == peer):
            live = module.live()
            drawn = peers.draw(module, live.weights)
            values, gradients = peers.evaluate_peer(live, drawn)
            whole = {"drawn": drawn, "values": values, "gradients": gradients}
            vector, shapes = pack(whole)
            contents |= {module.name: vector, f"{module.name} shapes": shapes}
        file = FOLDER / f"peer-{peer}.npz"
        np.savez_compressed(file, **contents)
        print(f"{file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
