"""Pytrees in one ``.safetensors`` file, which is data and runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.files import write_whole
from jlstm.types import PyTree

# The format's names of dtypes, and NumPy's.
DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
LONG = ("float64", "int64", "uint64")


def save_weights(
    path: str | os.PathLike[str],
    tree: PyTree,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a pytree of arrays to one ``.safetensors`` file, all or nothing.

    A tensor has the path of its leaf for a name, as ``forward/w_hh``. The file's
    metadata also get ``format``, which is ``jlstm``, and ``sha256``, a hash of all
    tensors. A file that is there is replaced.

    Args:
      path: of the file; folders are made.
      tree: the pytree, such as params; typed PRNG keys cannot be in it.
      metadata: more of it, such as the name of a model.

    Raises:
      ImportError: without safetensors.
      ValueError: the tree has no leaves, two of one name, or one of a dtype that the
        format lacks; metadata that are not strings.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/params.safetensors"
      >>> jlstm.train.save_weights(path, {"w": jnp.arange(3)})
      >>> jlstm.train.load_weights(path, {"w": jnp.zeros(3, int)})
      {'w': Array([0, 1, 2], dtype=int32)}
    """
    where, about = "save_weights", dict(metadata or {})
    _library(where)
    texts = all(isinstance(text, str) for item in about.items() for text in item)
    if not texts or {"format", "sha256"} & set(about):
        raise ValueError(
            f"{where}: metadata must map strings to strings, without 'format' and "
            f"'sha256', got {about}"
        )
    arrays = laid_out(_some(where, named(where, tree)))
    write(where, path, arrays, {**about, "sha256": hash_of(arrays)})


def load_weights(
    path: str | os.PathLike[str], like: PyTree, *, require_hash: bool = True
) -> PyTree:
    """Reads what :func:`jlstm.train.save_weights` wrote, after all of it is checked.

    It reads the params in a file of :func:`jlstm.save` too.

    Args:
      path: of the file.
      like: a pytree of the same structure, shapes and dtypes; of arrays, or of
        ``jax.eval_shape``.
      require_hash: whether to refuse a file without the hash of its tensors, as other
        libraries write it. A hash that is there must always fit.

    Returns:
      The pytree of JAX arrays, of the structure of ``like``.

    Raises:
      FileNotFoundError: there is no file at ``path``.
      ImportError: without safetensors.
      ValueError: it is not a valid ``.safetensors`` file, its tensors have changed
        since they were written, or one is missing, unexpected, or of another shape or
        dtype; names the first.

    Example:
      See :func:`save_weights`.
    """
    where = "load_weights"
    _library(where)
    expected = _some(where, named(where, like))
    file = read(where, path)
    return tree_of(where, file, like, expected, require_hash=require_hash)


def write(
    where: str,
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    about: Mapping[str, str],
) -> None:
    """Writes arrays that are laid out, and metadata, with the hash among them."""
    library = _library(where)
    data = library.numpy.save(dict(arrays), metadata={**about, "format": "jlstm"})
    write_whole(Path(path).absolute(), data)


class File(NamedTuple):
    """A ``.safetensors`` file that is well formed."""

    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, str]


def read(where: str, path: str | os.PathLike[str]) -> File:
    """Reads a file as it is.

    Raises:
      FileNotFoundError: there is none.
      ImportError: without safetensors.
      ValueError: it is not a valid ``.safetensors`` file.
    """
    library, path = _library(where), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file at {path}")
    data = path.read_bytes()
    try:
        tensors = dict(library.deserialize(data))
    except library.SafetensorError as error:
        raise ValueError(
            f"{where}: {path} is not a valid .safetensors file: {error}{_hint(data)}"
        ) from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return File(path, tensors, header.get("__metadata__") or {})


def tree_of(
    where: str,
    file: File,
    like: PyTree,
    expected: Mapping[str, Any],
    *,
    require_hash: bool = True,
) -> PyTree:
    """Makes a tree of a file's tensors, which must be those that are expected.

    Raises:
      ValueError: one is not, or the hash is not theirs.
    """
    path, found = file.path, file.tensors
    for name in [*expected, *sorted(found)]:
        want = got = "no such tensor"
        if name in expected:
            want = type_of(expected[name])
        if name in found:
            dtype = str(found[name]["dtype"])
            got = _type(DTYPES.get(dtype, dtype), found[name]["shape"])
        if got != want:
            raise ValueError(
                f"{where}: {name} in {path}: expected {want}, got {got}; give like= "
                "the structure that was saved"
            )
        if want.startswith(LONG) and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"{where}: {name} in {path} is {got}, which JAX has only with "
                "jax_enable_x64; enable it"
            )
    arrays = {name: _view(found[name]) for name in expected}
    digest = file.about.get("sha256")
    if digest is None and require_hash:
        raise ValueError(
            f"{where}: {path} has no sha256 in its metadata, so its tensors "
            "cannot be checked; give require_hash=False if you trust it"
        )
    if digest is not None and digest != hash_of(arrays):
        raise ValueError(
            f"{where}: the tensors of {path} have changed since they were written: "
            f"expected SHA-256 {digest}, got {hash_of(arrays)}; get the file again"
        )
    return rebuild(like, {name: jnp.array(x) for name, x in arrays.items()})


def laid_out(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Lays arrays out as the format does, little-endian and by rows."""
    arrays = {}
    for name, leaf in leaves.items():
        array = np.asarray(leaf, order="C")
        arrays[name] = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return arrays


def name_leaves(tree: PyTree, where: str = "save") -> dict[str, Any]:
    """Names the leaves by their paths, as in ``params/forward/w_hh``.

    A flat dict is independent of how others write tuples and dataclasses, so that what
    is compared is what was saved.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "leaf": (
            leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        )
        for path, leaf in named
    }
    if len(leaves) < len(named):
        raise ValueError(
            f"{where}: {len(named)} leaves have only {len(leaves)} different names; "
            "rename those that share a path"
        )
    return leaves


def rebuild(like: PyTree, arrays: Mapping[str, Any]) -> PyTree:
    """Puts named leaves, in their order, into the structure of a tree."""
    return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))


def type_of(leaf: Any) -> str:
    """Writes the dtype and shape of an array, as ``float32[2,3]``."""
    return _type(leaf.dtype.name, leaf.shape)


def _type(dtype: str, shape: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def hash_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Hashes names, dtypes, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        about = [name, array.dtype.name, array.shape]
        digest.update(json.dumps(about).encode() + b"\n")
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _library(where: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f'{where}: safetensors is not installed; run pip install "jlstm[weights]"'
        ) from error
    return safetensors


def named(where: str, tree: PyTree) -> dict[str, Any]:
    """Names the leaves, of which all can be in a file, and none twice.

    Raises:
      ValueError: saying which cannot.
    """
    leaves = name_leaves(tree, where)
    for name, leaf in leaves.items():
        if name == "__metadata__":
            raise ValueError(f"{where}: a leaf cannot be called {name}; rename it")
        if leaf.dtype.name not in DTYPES.values():
            raise ValueError(
                f"{where}: {name} is {leaf.dtype.name}, which a .safetensors file "
                "cannot hold; leave it out, or convert it (a key with "
                "jax.random.key_data)"
            )
    return leaves


def _some(where: str, leaves: dict[str, Any]) -> dict[str, Any]:
    if not leaves:
        raise ValueError(f"{where}: the tree has no leaves")
    return leaves


def _view(tensor: Mapping[str, Any]) -> np.ndarray:
    dtype = jnp.dtype(DTYPES[tensor["dtype"]])
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


def _hint(data: bytes) -> str:
    """Tells what is no such file; a good one may begin alike."""
    if data.startswith(b"PK"):
        return "; it is a zip archive, as torch.save and numpy.savez write"
    if data.startswith(b"\x80"):
        return "; it looks like a pickle, which could run any code and is never read"
    return ""
