"""Pytrees on disk, by Orbax: atomic, and checked before anything is returned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlstm.train.state import type_name
from jlstm.types import PyTree


def save(
    path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False
) -> None:
    """Writes a pytree of arrays to a folder, all or nothing.

    A folder of this name appears only when all is written. Leaves keep shape and dtype,
    typed PRNG keys included.

    Args:
      path: of the folder.
      tree: the pytree, such as a ``TrainState`` or params.
      overwrite: whether an old checkpoint may be replaced.

    Raises:
      FileExistsError: there is something at ``path``, and ``overwrite`` is false.
      ValueError: the tree has no leaves.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/params"
      >>> jlstm.train.save(path, {"w": jnp.arange(3)})
      >>> jlstm.train.load(path, {"w": jnp.zeros(3, int)})
      {'w': Array([0, 1, 2], dtype=int32)}
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(path).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"save: {folder} exists; choose another path, or give overwrite=True"
        )
    leaves = _leaves(tree)
    if not leaves:
        raise ValueError("save: the tree has no leaves, nothing to save")
    ocp.save(str(folder), leaves, overwrite=overwrite)


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Reads the pytree that :func:`save` wrote.

    Args:
      path: of the folder.
      like: a pytree of the same structure, shapes and dtypes; of arrays,
        whose shardings the result takes over, or of ``jax.eval_shape``, which means the
        first device.

    Returns:
      The pytree, of the structure of ``like``.

    Raises:
      FileNotFoundError: there is nothing at ``path``.
      ValueError: it is not a checkpoint, or a leaf is missing, unexpected, or of
        another shape or dtype; names the first such leaf.

    Example:
      See :func:`save`.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(path).absolute()
    if not folder.exists():
        raise FileNotFoundError(f"load: there is no checkpoint at {folder}")
    try:
        saved: Any = ocp.metadata(str(folder)).metadata
    except Exception as error:
        raise ValueError(
            f"load: {folder} is not a readable checkpoint ({type(error).__name__})"
        ) from error
    expected = _leaves(like)
    _check(folder, saved, expected)
    targets = {name: _place(leaf) for name, leaf in expected.items()}
    loaded: Any = ocp.load(str(folder), targets)
    return jax.tree.unflatten(
        jax.tree.structure(like), [loaded[name] for name in expected]
    )


def _leaves(tree: PyTree) -> dict[str, Any]:
    """Names the leaves by their paths, as in ``params/forward/w_hh``.

    A flat dict is independent of how Orbax writes tuples and dataclasses, so that what
    is compared is what was saved.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "leaf": (
            leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        )
        for path, leaf in named
    }


def _place(leaf: Any) -> Any:
    """Gives a leaf without sharding the first device, not the one it was saved from."""
    if getattr(leaf, "sharding", None) is not None:
        return leaf
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check(folder: Path, saved: Any, expected: dict[str, Any]) -> None:
    for name in [*expected, *(name for name in saved if name not in expected)]:
        got = _stored_type(saved[name]) if name in saved else "missing"
        want = _stored_type(expected[name]) if name in expected else "missing"
        if "missing" in (got, want):
            other = "like" if want == "missing" else folder
            raise ValueError(
                f"load: {name}, {want if got == 'missing' else got}, is missing in "
                f"{other}; give like the structure that was saved"
            )
        if got != want:
            raise ValueError(f"load: {name} in {folder} is {got}, expected {want}")


def _stored_type(leaf: Any) -> str:
    """Writes a leaf's type as it is on disk: keys are stored as their data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return type_name(leaf)
