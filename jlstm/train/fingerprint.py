"""Fingerprints: what data a run reads, and what results it has, in comparable form."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def fingerprint(batches: Any) -> dict[str, Any]:
    """Describes the batches of a run, so that it is not continued with other data.

    For a dataset of ``grain`` or :mod:`jlstm.data` this is each transformation with its
    length. Transformations of :mod:`jlstm.data` also tell their kind, options, seed and
    the SHA-256 of their source; a function of your own does so if it has an attribute
    ``about``. Datasets and sequences add the SHA-256 of a few batches. An iterator or a
    generator has its type alone.

    Args:
      batches: the batches, as :func:`jlstm.train.fit` takes them.

    Returns:
      A dict of JSON's types.

    Example:
      >>> jlstm.train.fingerprint([np.zeros(2)])["length"]
      1
    """
    found: dict[str, Any] = {"type": type(batches).__name__}
    nodes = list(_nodes(batches))
    if hasattr(batches, "_parents"):
        found["transformations"] = [_describe(node) for node in nodes]
    if isinstance(batches, Sequence) or (
        hasattr(batches, "_parents") and hasattr(batches, "__getitem__")
    ):
        found["length"] = length = len(batches)
        # The first epoch's first, second and middle batch, and the second's first.
        epoch = len(nodes[-1])
        places = sorted({0, 1, epoch // 2, epoch} & set(range(min(length, epoch + 1))))
        found["batches"] = {str(i): hash_tree(batches[i]) for i in places}
    return found


def _nodes(dataset: Any) -> Iterator[Any]:
    yield dataset
    for parent in getattr(dataset, "_parents", ()):
        yield from _nodes(parent)


def _describe(node: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": type(node).__name__.lstrip("_")}
    with contextlib.suppress(TypeError):  # a stream has none
        found["length"] = len(node)
    for value in vars(node).values():
        if hasattr(value, "about"):
            found["about"] = value.about
    return found


def hash_tree(tree: Any) -> str:
    """Hashes a pytree of arrays: names, dtypes, shapes and bytes.

    Equal hashes mean equal bits. Compare the states of two runs by it.

    Args:
      tree: the pytree, such as ``report.state``; it may contain typed PRNG keys.

    Returns:
      The SHA-256, as hexadecimal digits.

    Example:
      >>> jlstm.train.hash_tree({"w": np.zeros(2)})[:8]
      '2da08e17'
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array):
            if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            leaf = _whole(leaf)
        array = np.asarray(leaf)
        about = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(about.encode())
        if array.dtype.hasobject:  # of which the bytes are addresses
            array = np.array([_plain(item) for item in array.ravel().tolist()])
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _plain(item: Any) -> str:
    known = isinstance(item, str | bytes | int | float | bool | None)
    return repr(item) if known else type(item).__name__


def _whole(array: jax.Array) -> Any:
    if array.is_fully_addressable:
        return array
    if array.is_fully_replicated:
        return array.addressable_data(0)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lists the differences between two values of JSON's types, one line for each.

    Args:
      old: the earlier value.
      new: the later value.
      path: the name of both, put before each line.

    Returns:
      Lines such as ``"seed: was 1, is now 2"``.

    Example:
      >>> from jlstm.train.fingerprint import difference
      >>> difference({"seed": 1, "data": {"length": 3}}, {"seed": 2, "data": {}})
      ['seed: was 1, is now 2', 'data.length: was 3, is now absent']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{path}.{name}" if path else str(name)
            if name not in new:
                lines.append(f"{inner}: was {_short(old[name])}, is now absent")
            elif name not in old:
                lines.append(f"{inner}: was absent, is now {_short(new[name])}")
            else:
                lines += difference(old[name], new[name], inner)
        return lines
    if _is_list(old) and _is_list(new) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for line in difference(a, b, f"{path}[{i}]")
        ]
    return [] if old == new else [f"{path}: was {_short(old)}, is now {_short(new)}"]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
