"""Pytrees of arrays on disk, written by Orbax, with a hash of each file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jlstm.files import part_of
from jlstm.train.files import Damaged, begin, former_of, seal, verify
from jlstm.train.state import type_name
from jlstm.types import PyTree
from jlstm.weights import name_leaves, rebuild

ARRAYS = "arrays"
T = TypeVar("T")


def save(
    path: str | os.PathLike[str], tree: PyTree, *, overwrite: bool = False
) -> None:
    """Writes a pytree of arrays to a folder, whole or not at all.

    The folder gets its name only when everything is on the disk, with the SHA-256 of
    each file. Shapes and dtypes are kept, and typed PRNG keys can be saved too.

    Args:
      path: the path of the folder, such as ``"runs/a/params"``.
      tree: the pytree of arrays, such as params or a whole ``TrainState``.
      overwrite: whether to replace what is at ``path``. The old folder stays until the
        new one is whole.

    Raises:
      FileExistsError: there is something at ``path``, and ``overwrite`` is false.
      ValueError: the tree has no arrays.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/params"
      >>> jlstm.train.save(path, {"w": jnp.arange(3)})
      >>> jlstm.train.load(path, {"w": jnp.zeros(3, int)})
      {'w': Array([0, 1, 2], dtype=int32)}
    """
    folder = Path(path).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"save: {folder} exists; choose another path, or give overwrite=True"
        )
    leaves = name_leaves(tree)
    if not leaves:
        raise ValueError("save: the tree has no leaves, nothing to save")
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = begin_together(folder)
    orbax().save(str(half / ARRAYS), storable(leaves))
    if jax.process_index() == 0:
        seal(half, folder)
    barrier("jlstm_save")


def load(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """Reads the pytree that :func:`jlstm.train.save` wrote.

    Args:
      path: the path of the folder.
      like: a pytree of the same structure, shapes and dtypes. If it holds arrays, such
        as freshly made params, the result is placed on the same devices. If it holds
        shapes alone, from ``jax.eval_shape``, the result is on the first device.

    Returns:
      The saved arrays, in the structure of ``like``.

    Raises:
      FileNotFoundError: there is nothing at ``path``.
      ValueError: there is no checkpoint at ``path``, a file of it was changed, or an
        array is missing, unexpected, or of another shape or dtype; the message names
        the first one.

    Example:
      See :func:`save`.
    """
    folder = Path(path).absolute()
    if not folder.exists():
        # What replaced it was on its way when the process was killed.
        folder = former_of(folder) if former_of(folder).exists() else folder
    if not folder.exists():
        raise FileNotFoundError(f"load: there is no checkpoint at {folder}")
    try:
        verify(folder)
        saved = read_types(folder)
    except Damaged as damage:
        raise Damaged(f"load: {folder} is not an intact checkpoint: {damage}") from None
    expected = name_leaves(like)
    check_types(folder, saved, expected)
    return rebuild(like, read_arrays(folder, expected))


def orbax() -> Any:
    """Imports Orbax when it is needed, since the import is slow."""
    from orbax.checkpoint import v1 as ocp

    return ocp


def begin_together(folder: Path) -> Path:
    """Makes, for all processes, the folder that is renamed to ``folder`` when whole."""
    half = part_of(folder)
    if jax.process_index() == 0:
        begin(folder)
    barrier("jlstm_begin")
    return half


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def by_the_first(action: Callable[[], T]) -> T | None:
    """Runs an action in the first process; returns None in the others.

    Raises:
      ValueError: in all other processes, if the action failed in the first, which
        raises its own error.
    """
    made, problem = None, None
    if jax.process_index() == 0:
        try:
            made = action()
        except (ValueError, OSError) as error:
            problem = error
    failed = agree(int(problem is not None))
    if problem is not None:
        raise problem
    if failed:
        raise ValueError("process 0 could not begin; see its output for the reason")
    return made


def agree(number: int) -> int:
    """Returns the number that the first process was given, in all processes."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out arrays without elements, which cannot be stored and need not be."""
    kept = {name: leaf for name, leaf in leaves.items() if leaf.size}
    return kept or {"nothing": jnp.zeros(1)}


def read_types(folder: Path) -> dict[str, Any]:
    """Reads the names, shapes and dtypes of the arrays of a checkpoint."""
    try:
        found: Any = orbax().metadata(str(folder / ARRAYS)).metadata
    except Exception as error:
        raise Damaged(f"{ARRAYS} cannot be read ({type(error).__name__})") from error
    return dict(found)


def read_arrays(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays of a checkpoint, onto the devices of the expected ones."""
    targets = {name: _place(leaf) for name, leaf in storable(expected).items()}
    loaded: Any = orbax().load(str(folder / ARRAYS), targets)
    return {
        name: _free(loaded[name], leaf)
        if leaf.size
        else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in expected.items()
    }


def _free(loaded: jax.Array, like: Any) -> jax.Array:
    """Uncommits a loaded array from its device if the array it replaces was."""
    if not isinstance(like, jax.Array) or like.committed or jax.process_count() > 1:
        return loaded
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(loaded))
        return jax.random.wrap_key_data(
            jnp.asarray(data), impl=jax.random.key_impl(like)
        )
    return jnp.array(np.asarray(loaded), copy=True)


def _place(leaf: Any) -> Any:
    """Places a leaf without sharding on the first device, not where it was saved from.

    With several processes, each gets a whole copy of what is not shared.
    """
    sharding = getattr(leaf, "sharding", None)
    if jax.process_count() > 1 and (sharding is None or sharding.is_fully_addressable):
        mesh = jax.make_mesh((jax.device_count(),), ("all",), (AxisType.Auto,))
        sharding = NamedSharding(mesh, PartitionSpec())
    elif sharding is not None:
        return leaf
    else:
        sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_types(
    folder: Path, saved: Mapping[str, Any], expected: Mapping[str, Any], part: str = ""
) -> None:
    """Compares the types of the expected arrays with those that were saved.

    Of the saved arrays only those count whose names begin with ``part``.

    Raises:
      ValueError: naming the first leaf that is missing, unexpected, or of another type.
    """
    expected = {name: leaf for name, leaf in expected.items() if leaf.size}
    names = [name for name in saved if name.startswith(part) and name not in expected]
    for name in [*expected, *(name for name in names if name != "nothing")]:
        got = _stored_type(saved[name]) if name in saved else "missing"
        want = _stored_type(expected[name]) if name in expected else "missing"
        if "missing" in (got, want):
            other = "like" if want == "missing" else folder
            raise ValueError(
                f"load: {name}, {want if got == 'missing' else got}, is missing in "
                f"{other}; give like= the structure that was saved"
            )
        if got != want:
            raise ValueError(
                f"load: {name} in {folder} is {got}, expected {want}; it is of another "
                "model"
            )


def _stored_type(leaf: Any) -> str:
    """Writes a leaf's type as it is on disk, where a key is stored as its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return type_name(leaf)
